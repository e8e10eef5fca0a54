"""Rewrites folded weights so that the same FP32 function quantizes better or runs faster.

Nothing here changes what a graph computes, up to float32 rounding. Not here: rounding to integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.graph import GraphPlan, Weights, norm_before
from qingyu.quantize.statistics import InputStatistics

__all__ = ["Folded", "smooth", "smooth_activations", "smoothing_factors", "without_spare_biases"]

Doubles = NDArray[np.float64]
SMALLEST = 1e-5  # of a channel's magnitude, so that channels that are never used get a finite factor


@dataclass(frozen=True)
class Folded:
    """Weights for ``write_graph``, and the statistics of linear layers' inputs in the graph that it writes.

    ``statistics`` may be empty where nobody needs them. ``divisors`` (in,) are by what the writer of a linear layer
    has yet to divide its input.
    """

    weights: Mapping[str, Weights]
    statistics: Mapping[str, InputStatistics]
    divisors: Mapping[str, Weights] = field(default_factory=dict)


def without_spare_biases(plan: GraphPlan, folded: Folded) -> Folded:
    """The same with key and value biases of zero, which a linear writer may leave out.

    The key's bias adds the same number to all scores of a query, which softmax ignores. The value's bias passes
    through attention unchanged, since shares add up to one, and so goes into the bias of attention.output.
    """
    weights, statistics = dict(folded.weights), dict(folded.statistics)
    for layer in range(plan.architecture.layers):
        prefix = f"encoder.layer.{layer}.attention"
        key, value, output = f"{prefix}.self.key", f"{prefix}.self.value", f"{prefix}.output.dense"
        passed = weights[f"{value}.bias"].astype(np.float64)
        moved = passed @ weights[f"{output}.weight"]
        _set(weights, f"{output}.bias", weights[f"{output}.bias"] + moved)
        for name in (key, value):
            weights[f"{name}.bias"] = np.zeros_like(weights[f"{name}.bias"])
        if output in statistics:
            statistics[output] = statistics[output].mapped(shift=passed, scales=np.ones_like(passed))
    return replace(folded, weights=weights, statistics=statistics)


def smooth(plan: GraphPlan, folded: Folded, *, strength: float) -> Folded:
    """The same with each LayerNormalization's state centred, and its wide channels scaled into the weights.

    As SmoothQuant (Xiao et al. 2022), with a shift as in Outlier Suppression+ (Wei et al. 2023). Both go into the
    LayerNormalization's own weights, so all that the graph needs more is one product on each residual. The last
    one, which gives the model's result, stays as it is. Needs the statistics of all these states.
    """
    weights, statistics = dict(folded.weights), dict(folded.statistics)
    for layer in range(plan.architecture.layers):
        prefix = f"encoder.layer.{layer}"
        attention = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
        after = f"{prefix}.attention.output"
        for norm, readers, adder in (
            (norm_before(layer), attention, f"{after}.dense"),
            (after, [f"{prefix}.intermediate.dense"], f"{prefix}.output.dense"),
        ):
            found = statistics[readers[0]]
            factors, shift = smoothing_factors(weights, readers, found, strength=strength), found.centre
            _scale(weights, norm, readers, adder, factors, shift)
            statistics.update(dict.fromkeys(readers, found.mapped(shift=shift, scales=factors)))
    return replace(folded, weights=weights, statistics=statistics)


def smooth_activations(folded: Folded, names: Sequence[str], *, strength: float) -> Folded:
    """The same with wide channels of what the activation function gives scaled into the weights.

    ``names`` are linear layers that read it, each alone. There is no weight that could divide it, so it costs a
    product in the graph.
    """
    weights, statistics = dict(folded.weights), dict(folded.statistics)
    divisors = dict(folded.divisors)
    for name in names:
        factors = smoothing_factors(weights, [name], statistics[name], strength=strength)
        _set(weights, f"{name}.weight", weights[f"{name}.weight"] * factors[:, None])
        statistics[name] = statistics[name].mapped(shift=np.zeros_like(factors), scales=factors)
        _set(divisors, name, factors)
    return Folded(weights, statistics, divisors)


def smoothing_factors(
    weights: Mapping[str, Weights], readers: Sequence[str], found: InputStatistics, *, strength: float
) -> Doubles:
    """What each channel of the input of ``readers`` is divided by: (in,), geometric mean 1.

    |activation|^strength / |weight|^(1 - strength), each the largest of the channel (SmoothQuant, equation 4).
    """
    widest = np.max([np.abs(weights[f"{name}.weight"]).max(axis=1) for name in readers], axis=0)
    factors = np.maximum(found.half_width, SMALLEST) ** strength
    factors = factors / np.maximum(widest.astype(np.float64), SMALLEST) ** (1 - strength)
    scaled: Doubles = factors / np.exp(np.log(factors).mean())
    return scaled


def _scale(
    weights: dict[str, Weights],
    norm: str,
    readers: Sequence[str],
    adder: str,
    factors: Doubles,
    shift: Doubles,
) -> None:
    """Make ``norm`` give (state - shift) / factors; its readers and what is added to its residual undo that."""
    for name in readers:
        weight = weights[f"{name}.weight"].astype(np.float64)
        _set(weights, f"{name}.bias", weights[f"{name}.bias"] + shift @ weight)
        _set(weights, f"{name}.weight", weight * factors[:, None])
    _set(weights, f"{adder}.bias", weights[f"{adder}.bias"] + shift)
    _set(weights, f"{norm}.LayerNorm.weight", weights[f"{norm}.LayerNorm.weight"] / factors)
    _set(weights, f"{norm}.LayerNorm.bias", (weights[f"{norm}.LayerNorm.bias"] - shift) / factors)
    _set(weights, f"{norm}.LayerNorm.scales", factors)
    _set(weights, f"{norm}.LayerNorm.shift", shift)


def _set(weights: dict[str, Weights], name: str, value: NDArray[np.floating]) -> None:
    weights[name] = value.astype(np.float32)
