"""The row-wise recipe: 8-bit products with one activation scale for each token and one weight scale per channel.

A token's scale depends on that token alone, so a text's vector does not depend on its neighbours in a batch, and
the rounding error of a token does not grow with the largest value of another. Activations are uint8 with zero
point 128 because onnxruntime's int8 x int8 product is about ten times slower on x86.

Tables (words, positions) are int8 with a scale for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.graph import Select

__all__ = ["MICROSOFT", "RowwiseLinear", "quantize_columns", "quantize_rows"]

MICROSOFT = "com.microsoft"
LEVELS = np.float32(127)  # symmetric: -127 ... 127, so that a value and its negative round alike
SMALLEST = np.float32(1e-30)  # a scale for rows of zeros, which would otherwise divide zero by zero
FLOAT = 1  # onnx.TensorProto.FLOAT
UINT8_128 = np.array([128], dtype=np.uint8)

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]


def quantize_columns(weight: Floats) -> tuple[Codes, Floats]:
    """Codes int8 (in, out) and scales float32 (out,): weight = codes x scales, error at most half a scale.

    >>> quantize_columns(np.float32([[1, 0], [-0.5, 0]]))[0].tolist()
    [[127, 0], [-64, 0]]
    """
    scales = np.maximum(np.abs(weight).max(axis=0) / LEVELS, SMALLEST).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def quantize_rows(table: Floats) -> tuple[Codes, Floats]:
    """Codes int8 (rows, hidden) and scales float32 (rows, 1), one scale for each row of a table."""
    codes, scales = quantize_columns(np.ascontiguousarray(table.T))
    return np.ascontiguousarray(codes.T), scales[:, None]


@dataclass(frozen=True)
class QuantizedRows:
    """Names of an activation's codes uint8 (rows * tokens, in) and its scales float32 (rows * tokens, 1)."""

    codes: str
    scales: str


class RowwiseLinear:
    """A ``LinearWriter`` of the row-wise recipe; one instance writes one graph."""

    def __init__(self) -> None:
        self._zero_points: str | None = None

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> QuantizedRows:
        """Each row divided by its largest magnitude / 127 and rounded."""
        magnitude = graph.node(
            "ReduceMax", [graph.node("Abs", [activation]), graph.ints(-1)], attributes={"keepdims": 0}
        )
        scales = graph.node("Mul", [magnitude, graph.constant(1 / LEVELS)])
        scales = graph.node("Max", [scales, graph.constant(SMALLEST)])
        codes = graph.node(
            "QuantizeLinear", [activation, scales, self._zeros(graph, scales)], attributes={"axis": 0}
        )
        return QuantizedRows(codes, graph.node("Unsqueeze", [scales, graph.ints(1)]))

    def _zeros(self, graph: GraphBuilder, scales: str) -> str:
        # All activations of a graph have the same number of rows, so one vector of zero points serves them all.
        if self._zero_points is None:
            import onnx

            value = onnx.numpy_helper.from_array(UINT8_128)
            shape = graph.node("Shape", [scales])
            self._zero_points = graph.node("ConstantOfShape", [shape], attributes={"value": value})
        return self._zero_points

    def apply(
        self, graph: GraphBuilder, prepared: QuantizedRows, name: str, weight: Floats, bias: Floats
    ) -> str:
        """An integer product, scaled back by channel inside the operator and by row after it, plus the bias."""
        codes, scales = quantize_columns(weight)
        inputs = [
            prepared.codes,
            graph.weight(f"{name}.weight.codes", codes),
            graph.constant(np.float32(1)),
            graph.weight(f"{name}.weight.scales", scales),
            graph.constant(np.uint8(128)),
        ]
        product = graph.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
        product = graph.node("Mul", [product, prepared.scales])
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def lookup(self, graph: GraphBuilder, name: str, table: Floats, select: Select) -> str:
        """The selected rows of a table stored as int8 with a scale for each row."""
        codes, scales = quantize_rows(table)
        chosen = select(graph.weight(f"{name}.weight.codes", codes))
        wide = graph.node("Cast", [chosen], attributes={"to": FLOAT})
        return graph.node("Mul", [wide, select(graph.weight(f"{name}.weight.scales", scales))])
