"""The functions run from their bundles where nothing can be written and nobody can be reached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qingyu.bench import sandbox
from qingyu.errors import OperatorError
from qingyu.runtime.serverless.app_bundle import bundle_app


@pytest.fixture(scope="module")
def bundles(tiny_int8, tmp_path_factory):
    """A function bundle for each of two platforms."""
    reason = sandbox.why_not()
    if reason is not None:
        pytest.skip(f"needs root and namespaces: {reason}")
    folder = tmp_path_factory.mktemp("bundles")
    for target in ("lambda", "scf"):
        bundle_app(tiny_int8, folder / target, target)
    return folder


@pytest.fixture
def copy(bundles: Path, tmp_path: Path) -> Path:
    """A bundle to be spoilt; its files are linked, so replace them, never write into them."""
    shutil.copytree(bundles / "lambda", tmp_path / "copy", copy_function=os.link)
    return tmp_path / "copy"


@pytest.mark.parametrize("target", ["lambda", "scf"])
def test_a_function_runs_read_only_without_home_shm_and_network(target, bundles):
    row = sandbox.measure(bundles / target)
    assert row["sound"], row
    assert row["statuses"] == [200, 200]
    assert row["written"] == []


def test_it_runs_as_nobody(bundles):
    found = sandbox.run_in_sandbox(bundles / "lambda", [sandbox.request("/health", {})])
    assert found["user"] == 65534
    assert found["answers"][0]["statusCode"] == 405  # by a handler that is alive: /health takes GET


def test_a_bundle_without_its_model_answers_500(copy):
    shutil.rmtree(copy / "model")
    found = sandbox.run_in_sandbox(copy, [sandbox.request("/embed", {"inputs": "a"})])
    assert found["answers"][0]["statusCode"] == 500
    assert "model_failed" in found["answers"][0]["body"]
    assert "ModelNotFoundError" not in found["answers"][0]["body"]
    assert "no model" in found["stderr"]


def test_a_bundle_that_ends_badly_is_an_operators_error(copy):
    (copy / "lambda_function.py").unlink()
    (copy / "lambda_function.py").write_text("raise SystemExit('no entry')")
    shutil.rmtree(copy / "__pycache__")
    with pytest.raises(OperatorError, match="no entry"):
        sandbox.run_in_sandbox(copy, [])
    assert sandbox.main([str(copy)]) == 5
