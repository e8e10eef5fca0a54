from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qingyu.errors import GraphError
from qingyu.runtime import selftest
from qingyu.runtime.selftest import CASES, Case, check_integer_kernels, integer_kernels_exact

Product = Callable[[Case], Any]


@pytest.fixture
def maker() -> ModuleType:
    pytest.importorskip("onnx")
    path = Path(__file__).with_name("make_selftest_graph.py")
    described = importlib.util.spec_from_file_location("make_selftest_graph", path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def as_if_given(monkeypatch: pytest.MonkeyPatch, product: Product) -> None:
    """Let the kernels of this machine give ``product(case)``."""
    monkeypatch.setattr(selftest, "_run", lambda _feeds: {case.name: product(case) for case in CASES})


def saturating_product(case: Case) -> Any:
    """What AVX2 without VNNI gives, one pair of products after the other, as the manual of VPMADDUBSW says."""
    left, right = selftest.activations(case).astype(int), selftest.weights(case).astype(int)
    sums = np.zeros((case.rows, case.columns), int)
    for k in range(0, case.depth, 2):
        pair = sum(np.outer(left[:, j], right[j]) for j in (k, k + 1) if j < case.depth)
        sums += np.minimum(np.maximum(pair, -32768), 32767)
    sums -= 128 * right.sum(0)
    return sums if case.operator == "MatMulInteger" else sums * selftest.column_scales(case)


def test_the_shipped_graph_is_the_one_its_source_makes(maker: ModuleType) -> None:
    shipped = resources.files("qingyu.runtime").joinpath(selftest.GRAPH).read_bytes()
    assert maker.selftest_graph() == shipped


def test_the_test_runs_on_this_machine_and_moderate_values_are_right() -> None:
    """True on every CPU we know; whether saturating values are right depends on the CPU."""
    report = check_integer_kernels()
    assert report.verdict in ("exact", "saturates")
    assert report.exact == integer_kernels_exact()
    assert [result.of for result in report.results] == [case.rows * case.columns for case in CASES]


def test_right_values_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_given(monkeypatch, selftest.exact_product)
    assert integer_kernels_exact()
    assert check_integer_kernels().verdict == "exact"


def test_a_kernel_that_saturates_pairs_is_found_and_told_from_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_if_given(monkeypatch, saturating_product)
    report = check_integer_kernels()
    assert not report.exact
    assert report.verdict == "saturates"
    for result in report.results:
        # Every value of every saturating case shows it: no row, column or tail can hide it.
        assert result.wrong == (result.of if result.case.values == "saturating" else 0)
        assert (result.largest_error > 0) == (result.case.values == "saturating")


@pytest.mark.parametrize("wrong", [1.0, -(2.0**20), float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_wrong_value_in_any_case_is_found(
    monkeypatch: pytest.MonkeyPatch, case: Case, wrong: float
) -> None:
    def product(asked: Case) -> Any:
        values = selftest.exact_product(asked)
        if asked == case:
            values[-1, -1] += wrong
        return values

    as_if_given(monkeypatch, product)
    report = check_integer_kernels()
    assert not report.exact
    assert report.verdict == "wrong"
    assert [result.wrong for result in report.results if result.case == case] == [1]


def test_a_machine_that_saturates_and_is_wrong_besides_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(case: Case) -> Any:
        values = np.asarray(saturating_product(case), float)
        values[0, 0] += case.values == "saturating"
        return values

    as_if_given(monkeypatch, product)
    assert check_integer_kernels().verdict == "wrong"


def test_the_cases_are_what_they_say() -> None:
    for case in CASES:
        left, right = selftest.activations(case).astype(int), selftest.weights(case).astype(int)
        largest_pair = np.abs(left[:, 0:-1, None] * right[None, :-1] + left[:, 1:, None] * right[None, 1:])
        assert (largest_pair.max() < 2**15) == (case.values == "moderate")
        assert np.abs(selftest.exact_product(case)).max() < 2**24
        assert right.min() >= -127
    assert {case.rows for case in CASES} >= {1, 33}
    assert any(case.depth % 2 and case.columns % 2 for case in CASES)


def test_a_graph_that_cannot_be_run_is_a_graph_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_feeds: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selftest, "_run", fail)
    with pytest.raises(GraphError, match="no such kernel"):
        integer_kernels_exact()


def test_importing_the_module_loads_no_onnxruntime() -> None:
    program = "import sys, qingyu.runtime.selftest; print('onnxruntime' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
