"""The ways to quantize an encoder, as data, and the one function that writes a graph by any of them.

Not here: choosing between them (``pipeline``) and what each costs in fidelity (docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from qingyu.errors import InvalidOptionError
from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.graph import (
    WORDS,
    FloatLinear,
    GraphPlan,
    LinearWriter,
    Select,
    Weights,
    narrow_names,
    write_graph,
)
from qingyu.quantize.folding import Folded, smooth, smooth_activations, without_spare_biases
from qingyu.quantize.inputs import Input, input_of, linear_names
from qingyu.quantize.integer import FLOORS, MICROSOFT, IntegerLinear, Scale
from qingyu.quantize.marked import MarkedLinear
from qingyu.quantize.ranges import CALIBRATIONS, Calibration, Range
from qingyu.quantize.statistics import Statistics
from qingyu.quantize.weights_only import BlockLinear, HalfLinear
from qingyu.runtime.spec import Precision

__all__ = ["AUTO", "RECIPES", "STATIC", "Recipe", "recipe_named", "write_quantized"]

Products = Literal["integer", "marked", "blocks", "halves"]

ROW: Mapping[Input, Scale] = {
    "attention": "row",
    "context": "row",
    "intermediate": "row",
    "output": "row",
}
TENSOR: Mapping[Input, Scale] = dict.fromkeys(ROW, "tensor")
STATIC: Mapping[Input, Scale] = dict.fromkeys(ROW, "static")


@dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    ``products`` is how linear layers are computed; ``scales``, for integer products, how each input finds its
    scale, and ``calibration`` what range a static one covers. ``smoothing``, 0 (none) to 1, is how far wide
    channels are scaled into the weights; ``None`` where products have no use for it. ``weight_bits`` is the usual
    one of ``bits``. ``block`` is how many weights share a scale, ``None`` being all of an output channel.
    """

    name: str
    summary: str
    precision: Precision = "int8"
    products: Products = "integer"
    weight_bits: int = 8
    bits: tuple[int, ...] = (7, 8)
    scales: Mapping[Input, Scale] = field(default_factory=dict)
    calibration: Calibration = "min-max"
    smoothing: float | None = 0.0
    block: int | None = None

    @property
    def needs_statistics(self) -> bool:
        """Whether statistics of activations are needed, given the recipe's own smoothing."""
        return _needs_statistics(self, self.smoothing)


_STATIC = Recipe(
    "static",
    "8-bit products, smoothed, one fixed scale for each input: all values seen",
    scales=STATIC,
    smoothing=0.8,
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rowwise", "8-bit products, smoothed, a scale for each token", scales=ROW, smoothing=0.7),
        Recipe(
            "hybrid",
            "8-bit products, smoothed, fixed scales but for the widest input, which has one for each token",
            scales={**STATIC, "output": "row"},
            smoothing=0.7,
        ),
        Recipe(
            "dynamic",
            "8-bit products, a scale for each micro-batch: a vector depends on its neighbours",
            scales=TENSOR,
        ),
        _STATIC,
        replace(
            _STATIC,
            name="static-percentile",
            summary="8-bit products, smoothed, one fixed scale for each input: all values seen but the outermost",
            calibration="percentile",
        ),
        replace(
            _STATIC,
            name="static-entropy",
            summary="8-bit products, smoothed, one fixed scale for each input: of least divergence",
            calibration="entropy",
        ),
        Recipe(
            "weights-8",
            "8-bit weights in blocks, for memory and fidelity",
            products="blocks",
            bits=(8,),
            smoothing=None,
            block=32,
        ),
        Recipe(
            "weights-4",
            "4-bit weights in blocks, for memory",
            precision="int4",
            products="blocks",
            weight_bits=4,
            bits=(4,),
            smoothing=None,
            block=32,
        ),
        Recipe(
            "fp16",
            "weights stored as halves, computed in FP32: half the file, the same vectors",
            precision="fp16",
            products="halves",
            weight_bits=16,
            bits=(16,),
            smoothing=None,
        ),
    )
}

# From the fastest to the most faithful. Not dynamic, whose vectors depend on the batch; not static, which loses more
# than hybrid and is no faster; not fp16, which nothing could miss and which is only smaller.
AUTO: tuple[str, ...] = ("hybrid", "rowwise", "weights-8")


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; ``InvalidOptionError`` lists the names there are."""
    if name not in RECIPES:
        raise InvalidOptionError(
            "recipe", expected=f"one of {', '.join(RECIPES)}", found=repr(name), remedy="Use one of them."
        )
    return RECIPES[name]


def write_quantized(
    recipe: Recipe,
    plan: GraphPlan,
    weights: Mapping[str, Weights],
    *,
    statistics: Statistics | None = None,
    smoothing: float | None = None,
    weight_bits: int | None = None,
    keep_float: Collection[str] = (),
) -> bytes:
    """The serialized graph of the FP32 ``weights``, as ``read_weights`` gives them, quantized by ``recipe``.

    ``statistics`` are needed for static scales and for smoothing. ``smoothing`` and ``weight_bits`` replace the
    recipe's own; 0 is no smoothing, and 7 bits are for CPUs without VNNI. ``keep_float`` names linear layers that
    stay FP32. Raises ``InvalidOptionError``.
    """
    bits = _checked_bits(recipe, weight_bits)
    strength = _checked_smoothing(recipe, smoothing)
    _check_names(plan, keep_float)
    if _needs_statistics(recipe, strength) and statistics is None:
        raise InvalidOptionError(
            f"recipe {recipe.name}",
            expected="statistics of activations",
            found="none",
            remedy="Collect them with qingyu.quantize.statistics.collect.",
        )
    folded = Folded(dict(weights), dict(statistics or {}))
    if recipe.products in ("integer", "marked"):
        if strength:
            folded = smooth(plan, folded, strength=strength)
            folded = smooth_activations(folded, _wide(recipe, plan, keep_float), strength=strength)
        folded = without_spare_biases(plan, folded)
    writer = _Partly(WRITERS[recipe.products](recipe, plan, folded, bits), frozenset(keep_float))
    domains = () if recipe.products == "marked" else (MICROSOFT,)
    return write_graph(plan, folded.weights, writer, domains=domains)


def _wide(recipe: Recipe, plan: GraphPlan, keep_float: Collection[str]) -> list[str]:
    """The linear layers whose input is smoothed at the cost of a product: a scale for each token needs none."""
    names = [name for name in linear_names(plan) if input_of(name) == "output" and name not in keep_float]
    return names if recipe.scales["output"] != "row" else []


def _integer(recipe: Recipe, plan: GraphPlan, folded: Folded, bits: int) -> LinearWriter[Any]:
    floor = FLOORS.get(plan.architecture.activation)
    head = plan.task_head
    return IntegerLinear(
        recipe.scales,
        ranges=_ranges(recipe, folded),
        divisors=folded.divisors,
        floor=floor,
        weight_bits=bits,
        table_bits={WORDS: bits} if head is not None and head.tied else {},
        narrow=narrow_names(plan),
    )


def _ranges(recipe: Recipe, folded: Folded) -> dict[str, Range]:
    """The range of each input that has a fixed scale, by the name of a linear layer."""
    find = cache(
        CALIBRATIONS[recipe.calibration]
    )  # by identity: layers that share an input share its statistics
    return {
        name: find(found)
        for name, found in folded.statistics.items()
        if recipe.scales[input_of(name)] == "static"
    }


def _marked(recipe: Recipe, plan: GraphPlan, folded: Folded, bits: int) -> LinearWriter[Any]:
    return MarkedLinear(_ranges(recipe, folded), divisors=folded.divisors, weight_bits=bits)


def _blocks(recipe: Recipe, plan: GraphPlan, folded: Folded, bits: int) -> LinearWriter[Any]:
    assert recipe.block is not None
    return BlockLinear(bits=bits, block=recipe.block)


def _halves(recipe: Recipe, plan: GraphPlan, folded: Folded, bits: int) -> LinearWriter[Any]:
    return HalfLinear()


WRITERS: Mapping[Products, Callable[[Recipe, GraphPlan, Folded, int], LinearWriter[Any]]] = {
    "integer": _integer,
    "marked": _marked,
    "blocks": _blocks,
    "halves": _halves,
}


class _Partly:
    """A ``LinearWriter`` that leaves the linear layers ``kept`` in FP32 and the rest to another."""

    def __init__(self, writer: LinearWriter[Any], kept: frozenset[str]) -> None:
        self._writer, self._kept = writer, kept
        self._float = FloatLinear()

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> tuple[str, Any]:
        """The activation itself, and as the other writer wants it unless no layer needs that."""
        quantized = [name for name in names if name not in self._kept]
        return activation, self._writer.prepare(graph, activation, quantized) if quantized else None

    def apply(
        self, graph: GraphBuilder, prepared: tuple[str, Any], name: str, weight: Weights, bias: Weights
    ) -> str:
        """The linear layer, in FP32 or as the other writer does it."""
        activation, other = prepared
        if name in self._kept:
            return self._float.apply(graph, activation, name, weight, bias)
        return self._writer.apply(graph, other, name, weight, bias)

    def lookup(self, graph: GraphBuilder, name: str, table: Weights, select: Select) -> str:
        """As the other writer does it."""
        return self._writer.lookup(graph, name, table, select)

    def decode(
        self, graph: GraphBuilder, prepared: tuple[str, Any], name: str, table: Weights, bias: Weights
    ) -> str:
        """As the other writer does it."""
        return self._writer.decode(graph, prepared[1], name, table, bias)

    def stored(self, graph: GraphBuilder, name: str, weight: Weights) -> str:
        """The weight, in FP32 or as the other writer does it."""
        return (self._float if name in self._kept else self._writer).stored(graph, name, weight)


def _needs_statistics(recipe: Recipe, smoothing: float | None) -> bool:
    return bool(smoothing) or "static" in recipe.scales.values()


def _checked_bits(recipe: Recipe, bits: int | None) -> int:
    chosen = recipe.weight_bits if bits is None else bits
    if chosen not in recipe.bits:
        raise InvalidOptionError(
            f"weight_bits of recipe {recipe.name}",
            expected=" or ".join(map(str, recipe.bits)),
            found=repr(chosen),
            remedy="Leave it out, or choose another recipe.",
        )
    return chosen


def _checked_smoothing(recipe: Recipe, smoothing: float | None) -> float | None:
    if smoothing is None:
        return recipe.smoothing
    if not 0 <= smoothing <= 1 or (recipe.smoothing is None and smoothing):
        raise InvalidOptionError(
            f"smoothing of recipe {recipe.name}",
            expected="none" if recipe.smoothing is None else "0 to 1",
            found=repr(smoothing),
            remedy="Leave it out to use the recipe's own.",
        )
    return smoothing


def _check_names(plan: GraphPlan, names: Collection[str]) -> None:
    unknown = sorted(set(names) - set(linear_names(plan)))
    if unknown:
        raise InvalidOptionError(
            "keep_float",
            expected="names of linear layers, such as encoder.layer.0.output.dense",
            found=", ".join(unknown[:3]),
            remedy="Take them from qingyu.quantize.sensitivity.sensitive_layers.",
        )
