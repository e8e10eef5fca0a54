"""The range of an input that 8-bit codes are to cover, from its statistics: calibration.

``min-max`` covers all that was seen. ``percentile`` leaves out the outermost values, and ``entropy`` more of them:
as many as make the 8-bit distribution differ least from the true one (Migacz, "8-bit inference with TensorRT",
GTC 2017; onnxruntime's calibrator of that name). Values outside a range become its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qingyu.quantize.statistics import InputStatistics

__all__ = ["CALIBRATIONS", "Calibration", "Range", "entropy", "minmax", "percentile"]

Calibration = Literal["min-max", "percentile", "entropy"]

LEVELS = 255  # steps between the lowest and the highest of 256 codes
FINE_BINS = 4096
POINTS = 8  # that stand for the values in a bin of one channel
SMALLEST = 1e-30
OUTSIDE = (
    1e-5  # percentile: the share of values left out, half of it at each end. 1e-4 and 1e-6 measured worse
)
ENTROPY_BINS = 2048  # of magnitudes
ENTROPY_LEVELS = 128  # magnitudes that 8-bit codes tell apart

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, 0 included, as unsigned 8-bit codes: value = (code - zero_point) x scale."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """What one step is worth; a float32."""
        return float(np.float32(max((self.high - self.low) / LEVELS, SMALLEST)))

    @property
    def zero_point(self) -> int:
        """The code of 0: 0 to 255."""
        return round(-self.low / self.scale)


def minmax(found: InputStatistics) -> Range:
    """All values that were seen."""
    return Range(min(0.0, float(found.minimum.min())), max(0.0, float(found.maximum.max())))


def percentile(found: InputStatistics, *, outside: float = OUTSIDE) -> Range:
    """The values but for a share of ``outside``, half at each end, all channels taken together."""
    counts, edges = _histogram(found)
    share = np.cumsum(counts) / counts.sum()
    low = edges[int(np.searchsorted(share, outside / 2, side="right"))]
    high = edges[int(np.searchsorted(share, 1 - outside / 2, side="left")) + 1]
    return Range(min(0.0, float(low)), max(0.0, float(high)))


def entropy(found: InputStatistics) -> Range:
    """The values of magnitude up to the threshold of least divergence, as far as there are any."""
    counts, edges = _histogram(found)
    middles = (edges[:-1] + edges[1:]) / 2
    magnitudes, limits = np.histogram(np.abs(middles), ENTROPY_BINS, (0, np.abs(edges).max()), weights=counts)
    threshold = float(limits[least_divergent(magnitudes)])
    everything = minmax(found)
    return Range(max(everything.low, -threshold), min(everything.high, threshold))


CALIBRATIONS: Mapping[Calibration, Callable[[InputStatistics], Range]] = {
    "min-max": minmax,
    "percentile": percentile,
    "entropy": entropy,
}


def least_divergent(counts: Doubles, *, levels: int = ENTROPY_LEVELS) -> int:
    """How many of the first bins to keep, at least ``levels``, so that ``levels`` codes tell most about them.

    Values beyond go into the last bin kept. What is minimized is the Kullback-Leibler divergence of the
    distribution that codes give from the one that is cut off.
    """
    kept = range(min(levels, len(counts)), len(counts) + 1)
    divergences = [_divergence(counts, length, levels) for length in kept]
    return kept[int(np.argmin(divergences))]


def _divergence(counts: Doubles, length: int, levels: int) -> float:
    inside = counts[:length].astype(np.float64)
    wanted = inside.copy()
    wanted[-1] += counts[length:].sum()
    level = np.arange(length) * levels // length
    filled = wanted > 0
    # Each code's values are spread evenly over those of its bins that are not empty.
    total = np.bincount(level, weights=inside, minlength=levels)
    bins = np.bincount(level, weights=filled, minlength=levels)
    coded = (total / np.maximum(bins, 1))[level]
    p = wanted[filled] / wanted.sum()
    q = np.maximum(coded[filled] / max(coded[filled].sum(), SMALLEST), SMALLEST)
    return float((p * np.log(p / q)).sum())


def _histogram(found: InputStatistics) -> tuple[Doubles, Doubles]:
    """Counts (FINE_BINS,) and edges of all channels together, from the least to the largest value."""
    low, high = float(found.minimum.min()), float(found.maximum.max())
    width = max((high - low) / FINE_BINS, SMALLEST)
    channel, place = np.nonzero(found.counts)
    weights = np.repeat(found.counts[channel, place] / POINTS, POINTS)
    offsets = (np.arange(POINTS) + 0.5) / POINTS
    values = found.low[channel, None] + (place[:, None] + offsets) * found.step[channel, None]
    values = np.clip(values, found.minimum[channel, None], found.maximum[channel, None])
    bins = np.clip((values.ravel() - low) / width, 0, FINE_BINS - 1).astype(np.int64)
    counts: Doubles = np.bincount(bins, weights=weights, minlength=FINE_BINS).astype(np.float64)
    edges: Doubles = low + width * np.arange(FINE_BINS + 1, dtype=np.float64)
    return counts, edges
