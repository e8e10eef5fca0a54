"""Bundles of a model and all that runs it: small, tried, whole or not there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import qingyu
from qingyu.__main__ import main
from qingyu.errors import (
    CorruptFileError,
    InvalidOptionError,
    ModelNotFoundError,
    OperatorError,
    OutputError,
    UnsupportedModelError,
)
from qingyu.runtime.serverless import app_bundle
from qingyu.runtime.serverless.app_bundle import Machine, bundle_app, download_command
from qingyu.runtime.serverless.targets import PACKAGES, SERVER_PACKAGES, TARGETS
from qingyu.runtime.spec import ModelSpec, read_spec

HERE = Machine.here()
FOREIGN = Machine("aarch64" if HERE.name == "x86_64" else "x86_64", (3, 12))


@pytest.fixture(scope="module")
def edge_model(tiny_int8, tmp_path_factory):
    from qingyu.quantize.edge import add_edge

    folder = tmp_path_factory.mktemp("edge") / "tiny"
    shutil.copytree(tiny_int8, folder)
    add_edge(folder)
    return folder


def fake_wheels(folder: Path, machine: Machine, **more: str) -> Path:
    """Wheels with the right names and hardly anything in them; ``more`` is content by package."""
    folder.mkdir(parents=True)
    for package in PACKAGES:
        tag = f"{machine.tag}-{machine.tag}" if package in ("numpy", "onnxruntime") else "cp39-abi3"
        wheel = folder / f"{package}-1.0-{tag}-manylinux_2_28_{machine.name}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{package}/__init__.py", more.get(package, ""))
            archive.writestr(f"{package}/tests/test_it.py", "")
            archive.writestr(f"{package}-1.0.dist-info/LICENSE", "terms")
            archive.writestr(f"{package}-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def function(edge_model, tmp_path_factory):
    """A Lambda function's folder of the tiny model, and what was said of it."""
    output = tmp_path_factory.mktemp("function") / "out"
    return output, bundle_app(edge_model, output, "lambda")


def names(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


def test_a_function_of_the_model_in_the_package_takes_at_most_130_megabytes(tmp_path, capsys):
    """By the command line, which makes the edge file; the figure is also row 23 of docs/reliability.md."""
    assert main(["bundle-app", str(tmp_path / "out"), "--target", "lambda"]) == 0
    said = capsys.readouterr().out
    assert "handler: lambda_function.lambda_handler" in said
    assert "tried here, alone in a fresh process" in said
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in names(tmp_path / "out")}
    assert {"model/model.onnx", "model/model.ort", "lambda_function.py", "bundle.json"} <= sizes.keys()
    assert sum(sizes.values()) <= 130_000_000


def test_what_is_never_loaded_is_left_out_and_licences_stay(function):
    tree, made = function
    held = names(tree)
    assert not [
        name for name in held if "libonnxruntime.so" in name or "/tests/" in name or name.endswith(".pyi")
    ]
    assert not [name for name in held if name.startswith(("onnxruntime/tools", "numpy/f2py", "qingyu/cli"))]
    assert not [name for name in held if "huggingface" in name or "bundled" in name]
    for package in PACKAGES:
        licences = [
            file.as_posix()
            for file in importlib.metadata.files(package) or ()
            if any(word in file.name for word in ("LICENSE", "LICENCE", "NOTICE", "Notices"))
        ]
        assert set(licences) <= held, package
    assert {"qingyu-licenses/LICENSE", "qingyu-licenses/NOTICE"} <= held
    assert made.unpacked_bytes == sum((tree / name).stat().st_size for name in held)
    assert (made.tried, made.handler) == (True, "lambda_function.lambda_handler")


def test_modules_are_compiled_for_a_place_that_cannot_be_written(function):
    tree, _ = function
    held = names(tree)
    sources = [name for name in held if name.endswith(".py") and name.startswith(("qingyu/", "numpy/"))]
    assert sources
    for name in sources:
        path = Path(name)
        assert f"{path.parent.as_posix()}/__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc" in held
    compiled = (tree / "qingyu" / "__pycache__" / f"errors.{sys.implementation.cache_tag}.pyc").read_bytes()
    assert int.from_bytes(compiled[4:8], "little") == 0b01  # by hash, unchecked (PEP 552)


def test_the_bundle_says_what_is_in_it(function, edge_model):
    tree, made = function
    document = json.loads((tree / "bundle.json").read_text(encoding="utf-8"))
    assert document["packages"] == {**made.packages, "qingyu": qingyu.__version__}
    assert document["packages"].keys() == {"qingyu", *PACKAGES}
    assert document["machine"] == HERE.name
    slim = read_spec(tree / "model")
    assert slim == dataclasses.replace(read_spec(edge_model), files=slim.files)
    assert set(slim.files) == {"model.onnx", "model.ort", "tokenizer.json"}


@pytest.mark.parametrize("target", ["scf", "fc"])
def test_the_other_platforms_entries_are_what_is_tried(target, edge_model, tmp_path):
    """A handler under another name than its entry file has would fail the trial."""
    made = bundle_app(edge_model, tmp_path / "out", target)
    assert made.tried
    module, name = str(made.handler).split(".")
    assert f'__all__ = ["{name}"]' in (tmp_path / "out" / f"{module}.py").read_text(encoding="utf-8")


def test_a_board_gets_the_command_line(edge_model, tmp_path):
    made = bundle_app(edge_model, tmp_path / "board", "pi")
    assert made.handler is None
    command = [str(tmp_path / "board" / "qingyu"), "embed", "--profile", "edge", "--model"]
    environment = {"PATH": os.defpath, "QINGYU_PYTHON": sys.executable, "QINGYU_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, str(tmp_path / "board" / "model"), "今天天气真好"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["text"] == "今天天气真好"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Options of a bundle for another machine, which is made quickly: of next to nothing, and not tried."""
    return {"machine": FOREIGN, "wheels": fake_wheels(tmp_path_factory.mktemp("foreign") / "wheels", FOREIGN)}


def test_a_board_serves_others_when_asked_to(edge_model, tmp_path):
    for package in SERVER_PACKAGES:
        pytest.importorskip(package)
    bundle_app(edge_model, tmp_path / "board", "pi", server=True)
    # Without site-packages, so that nothing but the bundle can be what is used.
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command = [str(tmp_path / "board" / "qingyu"), "serve", "--port", "0", "--profile", "edge", "--model"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "board" / "model")],
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": os.defpath,
            "QINGYU_HOME": str(tmp_path / "home"),
            "QINGYU_PYTHON": str(tmp_path / "python"),
        },
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if '"ready"' in line:
                break
        assert process.poll() is None, lines
    finally:
        process.terminate()
        assert process.wait(30) == 0, lines
        process.stderr.close()


def test_a_function_has_no_server(edge_model, tmp_path):
    with pytest.raises(InvalidOptionError, match="expected a machine with a shell"):
        bundle_app(edge_model, tmp_path / "out", "lambda", server=True)


def test_the_same_bundle_is_the_same_zip(edge_model, foreign, tmp_path):
    for name in ("a.zip", "b.zip"):
        bundle_app(edge_model, tmp_path / name, "pi", as_zip=True, **foreign)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert names(tmp_path) == {"a.zip", "b.zip"}
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.getinfo("qingyu").external_attr >> 16 == 0o100755


def test_edge_only_leaves_the_graph_out(edge_model, foreign, tmp_path):
    bundle_app(edge_model, tmp_path / "out", "lambda", edge_only=True, **foreign)
    assert names(tmp_path / "out" / "model") == {"model.ort", "qingyu.json", "tokenizer.json"}


def test_for_another_machine_wheels_are_taken_and_it_says_that_nothing_was_tried(
    edge_model, tmp_path, capsys
):
    wheels = fake_wheels(tmp_path / "wheels", FOREIGN)
    arguments = ["bundle-app", str(tmp_path / "board"), "--target", "pi", "--model", str(edge_model)]
    more = ["--wheels", str(wheels), "--machine", FOREIGN.name, "--python", "3.12"]
    assert main([*arguments, *more]) == 0
    assert "NOT tried" in capsys.readouterr().out
    held = names(tmp_path / "board" / "lib")
    assert {"numpy/__init__.py", "numpy-1.0.dist-info/LICENSE", "qingyu/cli/embed.py"} <= held
    assert not [name for name in held if "tests" in name or name.endswith((".pyc", "RECORD"))]


def test_without_wheels_for_another_machine_the_error_has_the_command_that_brings_them(edge_model, tmp_path):
    with pytest.raises(OperatorError) as caught:
        bundle_app(edge_model, tmp_path / "out", "pi", machine=FOREIGN)
    assert download_command(FOREIGN, "wheels") in str(caught.value)
    assert f"onnxruntime=={importlib.metadata.version('onnxruntime')}" in download_command(FOREIGN, "wheels")
    assert not list(tmp_path.iterdir())


def test_wheels_that_are_missing_doubled_or_for_another_machine_are_refused(edge_model, tmp_path):
    wheels = fake_wheels(tmp_path / "wheels", FOREIGN)
    first = next(wheels.glob("numpy-*"))
    shutil.copy(first, wheels / first.name.replace("1.0", "2.0"))
    for machine in (FOREIGN, HERE, dataclasses.replace(FOREIGN, python=(3, 13))):
        with pytest.raises(OperatorError, match="cannot bundle numpy"):
            bundle_app(edge_model, tmp_path / "out", "pi", wheels=wheels, machine=machine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../escaped.py", "/escaped.py", "numpy/../../escaped.py"])
def test_a_wheel_with_a_path_that_leads_out_of_it_is_refused(name, edge_model, tmp_path):
    wheels = fake_wheels(tmp_path / "wheels", FOREIGN)
    with zipfile.ZipFile(next(wheels.glob("numpy-*")), "a") as archive:
        archive.writestr(name, "")
    with pytest.raises(OperatorError, match="leads out of it"):
        bundle_app(edge_model, tmp_path / "out", "pi", wheels=wheels, machine=FOREIGN)


def test_a_bundle_that_does_not_run_is_not_kept(edge_model, tmp_path):
    wheels = fake_wheels(tmp_path / "wheels", HERE, numpy="raise SystemExit('numpy is no numpy')")
    with pytest.raises(OperatorError, match="numpy is no numpy"):
        bundle_app(edge_model, tmp_path / "out", "lambda", wheels=wheels)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_bundle_with_other_vectors_is_not_kept(edge_model, tmp_path, monkeypatch):
    monkeypatch.setattr(app_bundle, "_vectors", lambda model: np.eye(3, 32, dtype=np.float32))
    with pytest.raises(OperatorError, match="vectors of cosine"):
        bundle_app(edge_model, tmp_path / "out", "lambda")
    assert not list(tmp_path.iterdir())


def changed(model: Path, place: Path, **fields: object) -> Path:
    shutil.copytree(model, place)
    spec = ModelSpec.from_json((place / "qingyu.json").read_text(encoding="utf-8"))
    (place / "qingyu.json").write_text(dataclasses.replace(spec, **fields).to_json(), encoding="utf-8")
    return place


def test_other_models_are_refused(tiny_model, tiny_int8, edge_model, head_model, tmp_path):
    cases = [
        (tiny_model, {}, UnsupportedModelError, "expected an INT8 model"),
        (head_model("fill-mask"), {}, UnsupportedModelError, "expected a model for embeddings"),
        (tiny_int8, {"edge_only": True}, UnsupportedModelError, "expected an edge file"),
        (tmp_path / "nowhere", {}, ModelNotFoundError, "no model at"),
    ]
    for model, options, kind, said in cases:
        with pytest.raises(kind, match=said):
            bundle_app(model, tmp_path / "out", "lambda", **options)
    with pytest.raises(InvalidOptionError, match="one of lambda, scf, fc, pi"):
        bundle_app(edge_model, tmp_path / "out", "toaster")
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_refused(edge_model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(edge_model, copy)
    content = bytearray((copy / "model.ort").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.ort").write_bytes(content)
    with pytest.raises(CorruptFileError):
        bundle_app(copy, tmp_path / "out", "lambda")
    assert not (tmp_path / "out").exists()


def test_over_the_limit_of_the_platform_nothing_is_written(edge_model, foreign, tmp_path, monkeypatch):
    small = dataclasses.replace(TARGETS["lambda"], limit=100_000)
    monkeypatch.setattr(app_bundle, "TARGETS", {**TARGETS, "lambda": small})
    with pytest.raises(OutputError, match="too large for AWS Lambda: expected at most 0 MB"):
        bundle_app(edge_model, tmp_path / "out", "lambda", **foreign)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_when_asked_and_only_a_bundle(edge_model, foreign, tmp_path):
    with pytest.raises(OutputError, match="no such folder"):
        bundle_app(edge_model, tmp_path / "no" / "out", "lambda")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="something else"):
        bundle_app(edge_model, tmp_path / "mine", "lambda", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (tmp_path / "out").mkdir()
    bundle_app(edge_model, tmp_path / "out", "lambda", **foreign)
    with pytest.raises(OutputError, match="--overwrite"):
        bundle_app(edge_model, tmp_path / "out", "lambda", **foreign)
    before = (tmp_path / "out" / "bundle.json").stat().st_ino
    bundle_app(edge_model, tmp_path / "out", "lambda", overwrite=True, **foreign)
    assert (tmp_path / "out" / "bundle.json").stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


def test_the_command_knows_the_targets_that_there_are():
    from qingyu.cli import bundle_app as command

    assert tuple(TARGETS) == command.TARGETS


def test_a_python_that_is_none_is_refused(tmp_path, capsys):
    assert main(["bundle-app", str(tmp_path / "out"), "--target", "pi", "--python", "three"]) == 3
    assert "expected a version as 3.12" in capsys.readouterr().err
