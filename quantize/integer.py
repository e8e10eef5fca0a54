"""Linear layers as 8-bit integer products, and how the scale of their input is found.

    row       a scale for each token, when the graph runs: a vector does not depend on its neighbours in a batch
    tensor    one scale and zero point for a whole micro-batch, when the graph runs: it does
    static    one scale and zero point, fixed by calibration: it does not

Activations are uint8, because onnxruntime's int8 x int8 product is about ten times slower on x86. Weights have a
scale for each output channel. Tables (words, positions) are int8 with a scale for each row. Heads of tasks always have
a scale for each row of their input: they read few rows, so that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.graph import Select
from qingyu.quantize.codes import SMALLEST, quantize_columns, quantize_rows
from qingyu.quantize.halves import FLOAT, stored_halves
from qingyu.quantize.inputs import Input, input_of, is_head
from qingyu.quantize.ranges import Range

__all__ = ["FLOORS", "MICROSOFT", "IntegerLinear", "Scale", "lookup_rows"]

MICROSOFT = "com.microsoft"

Scale = Literal["row", "tensor", "static"]
Floats = NDArray[np.float32]

MIDDLE = np.uint8(128)
LEVELS = np.float32(127)
# The least value of an activation function, where it has one: codes below the zero point then need not reach as
# far as those above it. Magnitudes, rounded up.
FLOORS: Mapping[str, float] = {
    "gelu": 0.17,
    "gelu_python": 0.17,
    "gelu_new": 0.1701,
    "gelu_pytorch_tanh": 0.1701,
    "relu": 0.0,
    "silu": 0.2785,
    "swish": 0.2785,
}
# Of 256 codes, those below zero where there is a floor: a compromise, since tokens with small values would like
# more and those with large ones fewer. 16, 24, 32 and 48 measured alike on GELU.
FLOOR_CODES = np.uint8(32)


@dataclass(frozen=True)
class Codes:
    """Names of an input's uint8 codes (rows * tokens, in), its zero point, and the scale that the product takes.

    ``rows`` are the scales (rows * tokens, 1) that are applied after the product, if any.
    """

    codes: str
    zero_point: str
    scale: str
    rows: str | None = None


class IntegerLinear:
    """A ``LinearWriter`` of integer products; one instance writes one graph.

    ``scales`` says how each input finds its scale. ``divisors`` (in,) are what inputs are divided by first, and
    ``ranges`` hold the range of each static one after that, both by the name of a linear layer. ``floor`` is the
    magnitude of the least value of the activation function, ``None`` if it has none. ``table_bits`` are the bits of
    a table's codes, by its name, where they are not 8. ``narrow`` names the linear layers of the encoder that read
    chosen states only.
    """

    def __init__(
        self,
        scales: Mapping[Input, Scale],
        *,
        ranges: Mapping[str, Range],
        divisors: Mapping[str, Floats] | None = None,
        floor: float | None = None,
        weight_bits: int = 8,
        table_bits: Mapping[str, int] | None = None,
        narrow: Collection[str] = (),
    ) -> None:
        self._narrow = narrow
        self._table_bits = table_bits or {}
        self._scales, self._ranges, self._divisors = scales, ranges, divisors or {}
        self._floor = floor
        self._weight_bits = weight_bits
        self._zeros: dict[tuple[int, bool], str] = {}

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> Codes:
        """The activation as codes."""
        ways: Mapping[Scale, Callable[[GraphBuilder, str, str], Codes]] = {
            "row": self._by_row,
            "tensor": self._by_tensor,
            "static": self._static,
        }
        name = names[0]
        if name in self._divisors:
            activation = graph.node("Mul", [activation, graph.constant(1 / self._divisors[name])])
        way: Scale = "row" if is_head(name) else self._scales[input_of(name)]
        return ways[way](graph, activation, name)

    def _by_row(self, graph: GraphBuilder, activation: str, name: str) -> Codes:
        head = is_head(name)
        floor = self._floor if not head and input_of(name) == "output" else None
        scales, zero_point = (
            self._symmetric(graph, activation) if floor is None else self._floored(graph, activation, floor)
        )
        flat = graph.node("Squeeze", [scales, graph.ints(1)])
        inputs = [
            activation,
            flat,
            self._zero_vector(graph, flat, zero_point, few=head or name in self._narrow),
        ]
        codes = graph.node("QuantizeLinear", inputs, attributes={"axis": 0})
        return Codes(codes, graph.constant(zero_point), graph.constant(np.float32(1)), scales)

    def _symmetric(self, graph: GraphBuilder, activation: str) -> tuple[str, np.uint8]:
        largest = _largest(graph, graph.node("Abs", [activation]))
        scales = graph.node("Mul", [largest, graph.constant(np.float32(1) / LEVELS)])
        return graph.node("Max", [scales, graph.constant(SMALLEST)]), MIDDLE

    def _floored(self, graph: GraphBuilder, activation: str, floor: float) -> tuple[str, np.uint8]:
        """Finer than symmetric codes by up to 1.75, and without the pass over magnitudes."""
        zero_point = FLOOR_CODES if floor else np.uint8(0)
        scales = graph.node(
            "Mul", [_largest(graph, activation), graph.constant(np.float32(1 / (255 - int(zero_point))))]
        )
        least = np.float32(floor / int(zero_point)) if floor else SMALLEST
        return graph.node("Max", [scales, graph.constant(least)]), zero_point

    def _zero_vector(self, graph: GraphBuilder, scales: str, zero_point: np.uint8, *, few: bool) -> str:
        # All activations of an encoder have the same number of rows, and those of chosen states and a head, so one
        # vector of zero points serves them all.
        key = (int(zero_point), few)
        if key not in self._zeros:
            import onnx

            value = onnx.numpy_helper.from_array(np.array([zero_point], dtype=np.uint8))
            shape = graph.node("Shape", [scales])
            self._zeros[key] = graph.node("ConstantOfShape", [shape], attributes={"value": value})
        return self._zeros[key]

    def _by_tensor(self, graph: GraphBuilder, activation: str, name: str) -> Codes:
        # onnxruntime makes one operator of this and a product that is its only reader.
        return Codes(*_reordered(graph.nodes("DynamicQuantizeLinear", [activation], outputs=3)))

    def _static(self, graph: GraphBuilder, activation: str, name: str) -> Codes:
        found = self._ranges[name]
        scale = graph.constant(np.float32(found.scale))
        zero_point = graph.constant(np.uint8(found.zero_point))
        return Codes(graph.node("QuantizeLinear", [activation, scale, zero_point]), zero_point, scale)

    def apply(self, graph: GraphBuilder, prepared: Codes, name: str, weight: Floats, bias: Floats) -> str:
        """An integer product, scaled by channel inside the operator and by row after it, plus the bias."""
        codes, scales = quantize_columns(weight, bits=self._weight_bits)
        stored = graph.weight(f"{name}.weight.codes", codes), graph.weight(f"{name}.weight.scales", scales)
        return self._product(graph, prepared, name, *stored, bias)

    def _product(
        self, graph: GraphBuilder, prepared: Codes, name: str, codes: str, scales: str, bias: Floats
    ) -> str:
        inputs = [prepared.codes, codes, prepared.scale, scales, prepared.zero_point]
        needed = bool(bias.any())  # see folding.without_spare_biases
        if prepared.rows is None and needed:
            inputs += ["", graph.weight(f"{name}.bias", bias)]  # "": no zero points of weights
        product = graph.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
        if prepared.rows is None:
            return product
        product = graph.node("Mul", [product, prepared.rows])
        if not needed:
            return product
        # With a bias of one axis onnxruntime would fuse this and GELU into its BiasGelu, which takes a third
        # longer than the two operators.
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias[None, :])])

    def lookup(self, graph: GraphBuilder, name: str, table: Floats, select: Select) -> str:
        """The selected rows of a table stored as int8 with a scale for each row."""
        return lookup_rows(graph, name, table, select, bits=self._table_bits.get(name, 8))

    def stored(self, graph: GraphBuilder, name: str, weight: Floats) -> str:
        """The weight as float16, widened."""
        return stored_halves(graph, name, weight)

    def decode(self, graph: GraphBuilder, prepared: Codes, name: str, table: Floats, bias: Floats) -> str:
        """An integer product with the table's own codes: a row's scale is that of an output channel.

        onnxruntime turns the codes to (hidden, entries) once, when it loads the graph.
        """
        codes = graph.node("Transpose", [f"{name}.weight.codes"], attributes={"perm": (1, 0)})
        scales = graph.node("Squeeze", [f"{name}.weight.scales", graph.ints(1)])
        return self._product(graph, prepared, name, codes, scales, bias)


def lookup_rows(graph: GraphBuilder, name: str, table: Floats, select: Select, *, bits: int = 8) -> str:
    """The rows of a ``table`` (entries, hidden) that ``select`` takes, stored as int8 with a scale for each."""
    codes, scales = quantize_rows(table, bits=bits)
    chosen = select(graph.weight(f"{name}.weight.codes", codes))
    wide = graph.node("Cast", [chosen], attributes={"to": FLOAT})
    return graph.node("Mul", [wide, select(graph.weight(f"{name}.weight.scales", scales))])


def _largest(graph: GraphBuilder, values: str) -> str:
    return graph.node("ReduceMax", [values, graph.ints(-1)], attributes={"keepdims": 1})


def _reordered(outputs: Sequence[str]) -> tuple[str, str, str]:
    codes, scale, zero_point = outputs
    return codes, zero_point, scale
