"""Linear layers whose weights alone are smaller in the file: 8- or 4-bit blocks, or halves of FP32.

Blocks run in com.microsoft.MatMulNBits. Not here: integer products with one scale for each input (``integer``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.graph import Select
from qingyu.quantize.codes import quantize_blocks
from qingyu.quantize.halves import halves, stored_halves, widened
from qingyu.quantize.integer import MICROSOFT, lookup_rows

__all__ = ["BlockLinear", "HalfLinear"]

# What onnxruntime may round the activations to for the product: 4 is int8, with a scale for each block of a row.
INT8_PRODUCTS = 4
UINT8, INT32 = 2, 6  # of onnx.TensorProto

Floats = NDArray[np.float32]


class BlockLinear:
    """A ``LinearWriter`` of weights in blocks of ``block`` inputs with a scale each, ``bits`` being 8 or 4.

    Activations are rounded to int8 row by row and block by block inside the operator, so a vector does not depend
    on its neighbours in a batch.
    """

    def __init__(self, *, bits: int, block: int) -> None:
        self._bits, self._block = bits, block

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> str:
        """The activation itself."""
        return activation

    def apply(self, graph: GraphBuilder, prepared: str, name: str, weight: Floats, bias: Floats) -> str:
        """A MatMulNBits and an Add."""
        codes, scales = quantize_blocks(weight, bits=self._bits, block=self._block)
        attributes = {
            "K": weight.shape[0],
            "N": weight.shape[1],
            "bits": self._bits,
            "block_size": self._block,
            "accuracy_level": INT8_PRODUCTS,
        }
        inputs = [
            prepared,
            graph.weight(f"{name}.weight.codes", codes),
            # Flat, as the operator's first versions want it; later ones take both.
            graph.weight(f"{name}.weight.scales", scales.ravel()),
        ]
        product = graph.node("MatMulNBits", inputs, domain=MICROSOFT, attributes=attributes)
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def lookup(self, graph: GraphBuilder, name: str, table: Floats, select: Select) -> str:
        """The selected rows of a table stored as int8 with a scale for each row."""
        return lookup_rows(graph, name, table, select)

    def decode(self, graph: GraphBuilder, prepared: str, name: str, table: Floats, bias: Floats) -> str:
        """A MatMulNBits of 8 bits with the table's own codes, whose scales are repeated for each block.

        onnxruntime brings both into that form once, when it loads the graph.
        """
        entries, width = table.shape
        blocks = -(-width // self._block)
        wide = graph.node("Cast", [f"{name}.weight.codes"], attributes={"to": INT32})
        ends = graph.ints(0, 0, 0, blocks * self._block - width)
        wide = graph.node("Pad", [wide, ends]) if blocks * self._block > width else wide
        moved = graph.node("Add", [wide, graph.constant(np.int32(128))])
        codes = graph.node("Cast", [moved], attributes={"to": UINT8})
        codes = graph.node("Reshape", [codes, graph.ints(entries, blocks, self._block)])
        scales = graph.node("Expand", [f"{name}.weight.scales", graph.ints(entries, blocks)])
        scales = graph.node("Reshape", [scales, graph.ints(-1)])
        attributes = {
            "K": width,
            "N": entries,
            "bits": 8,
            "block_size": self._block,
            "accuracy_level": INT8_PRODUCTS,
        }
        product = graph.node(
            "MatMulNBits", [prepared, codes, scales], domain=MICROSOFT, attributes=attributes
        )
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def stored(self, graph: GraphBuilder, name: str, weight: Floats) -> str:
        """The weight as float16, widened."""
        return stored_halves(graph, name, weight)


class HalfLinear:
    """A ``LinearWriter`` that stores weights and tables as float16 and computes in FP32.

    onnxruntime widens linear weights once, when it loads the graph; tables stay halves in memory.
    """

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> str:
        """The activation itself."""
        return activation

    def apply(self, graph: GraphBuilder, prepared: str, name: str, weight: Floats, bias: Floats) -> str:
        """A MatMul and an Add."""
        product = graph.node("MatMul", [prepared, stored_halves(graph, name, weight)])
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def lookup(self, graph: GraphBuilder, name: str, table: Floats, select: Select) -> str:
        """The selected rows of a table stored as float16."""
        return widened(graph, select(graph.weight(f"{name}.weight", halves(name, table))))

    def decode(self, graph: GraphBuilder, prepared: str, name: str, table: Floats, bias: Floats) -> str:
        """A Gemm with the table, which onnxruntime widens once for it."""
        inputs = [prepared, widened(graph, f"{name}.weight"), graph.weight(f"{name}.bias", bias)]
        return graph.node("Gemm", inputs, attributes={"transB": 1})

    def stored(self, graph: GraphBuilder, name: str, weight: Floats) -> str:
        """The weight as float16, widened."""
        return stored_halves(graph, name, weight)
