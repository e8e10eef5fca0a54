"""Tests this machine's integer matrix kernels against exact arithmetic, in a few milliseconds.

onnxruntime picks a kernel for the CPU it finds, and kernels have been wrong on some CPUs. Without VNNI,
AVX2 adds pairs of products in 16 bits, so that large values saturate: that is known and costs a little
fidelity. Any other difference means that INT8 vectors from this machine cannot be trusted.

Not here: the fidelity of a model (its certificate), and FP32 kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.onnxruntime_engine import PROVIDERS, import_onnxruntime, session_options, typed

__all__ = [
    "CASES",
    "Case",
    "CaseResult",
    "KernelReport",
    "check_integer_kernels",
    "integer_kernels_exact",
]

GRAPH = "selftest.onnx"  # written by tests/runtime/make_selftest_graph.py from CASES and the weights below
ZERO_POINT = 128  # of the activations, as in the graphs that qingyu.quantize writes

Values = Literal["moderate", "saturating"]
Operator = Literal["MatMulInteger", "MatMulIntegerToFloat"]


@dataclass(frozen=True)
class Case:
    """One product of (rows, depth) uint8 with (depth, columns) int8."""

    operator: Operator
    values: Values
    rows: int
    depth: int
    columns: int

    @property
    def name(self) -> str:
        """The name of its output in the graph."""
        return f"{self.operator}_{self.operands}"

    @property
    def operands(self) -> str:
        """The name of what is multiplied, the same for both operators: ``a_``, ``b_`` before it in the graph."""
        return f"{self.values}_{self.rows}x{self.depth}x{self.columns}"


# One row and many; below, at and across the widths of vector registers, so that the tails are run too.
SHAPES = ((1, 16, 16), (5, 70, 35), (33, 131, 67))
OPERATORS: tuple[Operator, ...] = ("MatMulInteger", "MatMulIntegerToFloat")
VALUES: tuple[Values, ...] = ("moderate", "saturating")
CASES = tuple(
    Case(operator, values, *shape) for operator in OPERATORS for values in VALUES for shape in SHAPES
)


@dataclass(frozen=True)
class CaseResult:
    """How many of the values of one product are wrong, and by how much at most.

    ``as_saturated``: every value is what a kernel gives that adds pairs of products in 16 bits.
    """

    case: Case
    wrong: int
    of: int
    largest_error: float
    as_saturated: bool


@dataclass(frozen=True)
class KernelReport:
    """The results of all cases.

    ``verdict`` is ``"exact"``; ``"saturates"`` when every value is what 16-bit pairs give, which costs a little
    fidelity; or ``"wrong"``, and INT8 must not be used.
    """

    results: tuple[CaseResult, ...]

    @property
    def exact(self) -> bool:
        """Whether every value of every product is right."""
        return all(result.wrong == 0 for result in self.results)

    @property
    def verdict(self) -> Literal["exact", "saturates", "wrong"]:
        """What the results mean for INT8 on this machine."""
        if self.exact:
            return "exact"
        return "saturates" if all(result.as_saturated for result in self.results) else "wrong"


def integer_kernels_exact() -> bool:
    """Whether this machine's uint8 x int8 products are exactly right, also where 16-bit pairs overflow."""
    return check_integer_kernels().exact


def check_integer_kernels() -> KernelReport:
    """Every case, run by onnxruntime and compared with exact integer arithmetic.

    Raises ``GraphError`` when onnxruntime cannot run the graph at all.
    """
    feeds = {f"a_{case.operands}": activations(case) for case in CASES}
    found = typed("testing the integer kernels", lambda: _run(feeds))
    return KernelReport(tuple(_compare(case, found[case.name]) for case in CASES))


def activations(case: Case) -> NDArray[np.uint8]:
    """The left side, (rows, depth); every value 0-255 occurs, or only the largest four."""
    rows, depth = np.indices((case.rows, case.depth))
    pattern = (rows * 31 + depth * 17) % 256
    return (pattern if case.values == "moderate" else 255 - pattern % 4).astype(np.uint8)


def weights(case: Case) -> NDArray[np.int8]:
    """The right side, (depth, columns).

    Moderate: at most 64, so that a pair of products fits 16 bits (2 x 255 x 64 = 32,640). Saturating: at
    least 123 and of one sign in a column, so that none does.
    """
    depth, columns = np.indices((case.depth, case.columns))
    pattern = depth * 7 + columns * 13 + depth * columns
    if case.values == "moderate":
        return (pattern % 129 - 64).astype(np.int8)
    return ((127 - pattern % 5) * np.where(columns % 2, -1, 1)).astype(np.int8)


def column_scales(case: Case) -> NDArray[np.float32]:
    """The scale of each column: powers of two, so that the scaled product is exact in float32 too."""
    return np.exp2(-(np.arange(case.columns) % 3)).astype(np.float32)


def exact_product(case: Case) -> NDArray[np.float64]:
    """What the case must give: integers below 2**24, for ``MatMulIntegerToFloat`` times the scales."""
    product = activations(case).astype(np.int64) @ weights(case).astype(np.int64)
    return _result(case, product)


def saturated_product(case: Case) -> NDArray[np.float64]:
    """What VPMADDUBSW gives, which adds two neighbouring products into 16 bits with saturation.

    Equal to onnxruntime 1.32 in every value on emulated Haswell and Skylake-Server CPUs (Intel's Software
    Developer's Manual, PMADDUBSW).
    """
    padding = case.depth % 2
    left = np.pad(activations(case).astype(np.int64), ((0, 0), (0, padding)))
    right = np.pad(weights(case).astype(np.int64), ((0, padding), (0, 0)))
    products = left[:, :, None] * right
    pairs = products[:, 0::2] + products[:, 1::2]
    return _result(case, np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1))


def _result(case: Case, product: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of unsigned times signed values with the zero point taken off, and scaled if the operator does."""
    product = product - ZERO_POINT * weights(case).astype(np.int64).sum(axis=0)
    scales = column_scales(case) if case.operator == "MatMulIntegerToFloat" else 1.0
    return np.asarray(product * scales, dtype=np.float64)


def _run(feeds: Mapping[str, NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    """The graph's outputs by name; the weights are constants there, as in a model, and so pre-packed."""
    onnxruntime = import_onnxruntime()
    graph = resources.files("qingyu.runtime").joinpath(GRAPH).read_bytes()
    options = session_options(onnxruntime, threads=1)
    session = onnxruntime.InferenceSession(graph, options, providers=list(PROVIDERS), enable_fallback=0)
    names = [case.name for case in CASES]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _compare(case: Case, found: NDArray[Any]) -> CaseResult:
    exact = exact_product(case)
    return CaseResult(
        case=case,
        wrong=int(np.count_nonzero(found != exact)),
        of=exact.size,
        largest_error=float(np.abs(found.astype(np.float64) - exact).max()),
        as_saturated=bool((found == saturated_product(case)).all()),
    )
