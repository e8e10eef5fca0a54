"""Linear layers as FP32 products of values that are marked as quantized: the form that OpenVINO makes 8-bit ones of.

QuantizeLinear and DequantizeLinear stand before each product, one after the other, for activations (uint8, a fixed
scale and zero point) and after the stored codes of weights (int8, a scale for each output channel). Not here:
products that onnxruntime runs (``integer``), and how ranges are found (``ranges``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.graph import Select
from qingyu.quantize.codes import quantize_columns
from qingyu.quantize.halves import stored_halves
from qingyu.quantize.integer import lookup_rows
from qingyu.quantize.ranges import Range

__all__ = ["MarkedLinear"]

Floats = NDArray[np.float32]


class MarkedLinear:
    """A ``LinearWriter`` of marked products; one instance writes one graph.

    ``ranges`` hold the range of each input after it was divided by ``divisors`` (in,), where there are any, both by
    the name of a linear layer.
    """

    def __init__(
        self, ranges: Mapping[str, Range], *, divisors: Mapping[str, Floats], weight_bits: int = 8
    ) -> None:
        self._ranges, self._divisors, self._weight_bits = ranges, divisors, weight_bits

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> str:
        """The activation, rounded to codes and back."""
        name = names[0]
        if name in self._divisors:
            activation = graph.node("Mul", [activation, graph.constant(1 / self._divisors[name])])
        found = self._ranges[name]
        marks = [graph.constant(np.float32(found.scale)), graph.constant(np.uint8(found.zero_point))]
        return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [activation, *marks]), *marks])

    def apply(self, graph: GraphBuilder, prepared: str, name: str, weight: Floats, bias: Floats) -> str:
        """A MatMul with stored codes, and an Add."""
        codes, scales = quantize_columns(weight, bits=self._weight_bits)
        scales = scales.ravel()
        inputs = [
            graph.weight(f"{name}.weight.codes", codes),
            graph.weight(f"{name}.weight.scales", scales),
            graph.constant(np.zeros(len(scales), dtype=np.int8)),
        ]
        product = graph.node(
            "MatMul", [prepared, graph.node("DequantizeLinear", inputs, attributes={"axis": 1})]
        )
        if not bias.any():
            return product
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def lookup(self, graph: GraphBuilder, name: str, table: Floats, select: Select) -> str:
        """The selected rows of a table stored as int8 with a scale for each row."""
        return lookup_rows(graph, name, table, select)

    def decode(self, graph: GraphBuilder, prepared: str, name: str, table: Floats, bias: Floats) -> str:
        """Not written: only embeddings are."""
        raise NotImplementedError

    def stored(self, graph: GraphBuilder, name: str, weight: Floats) -> str:
        """The weight as float16, widened."""
        return stored_halves(graph, name, weight)
