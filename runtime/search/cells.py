"""Cells of a large set of vectors, and the parts that they are put into: where to look for what is near.

A graph finds its way by vectors that are nearer and nearer. Between many groups that have nothing in common there is no
such way, and a search ends in a wrong group however long it goes on. So a large set is cut: its *cells*, the means of
groups of near vectors, are all compared with a query, which takes a tenth of a millisecond for two thousand, and the
graphs searched are those of the *parts* that the nearest cells belong to.

Not here: graphs (``graph``, ``parts``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.engine import Floats, Ids
from qingyu.runtime.vectors import unit

__all__ = ["Cells", "learn"]

LOOKED_AT = 32  # of the nearest cells, for the parts that they belong to
SLACK = 1.25  # a cell is near if its distance, 1 - cosine, is at most this times that of the nearest (SPANN, eq. 3)
TABLE = 1 << 23  # similarities that are held at once: 32 MB


@dataclass(frozen=True, eq=False)
class Cells:
    """``means``: unit vectors, float32 (cells, dim); ``parts``: the part that each cell belongs to, int32 (cells,)."""

    means: Floats
    parts: NDArray[np.int32]

    def part_of(self, vectors: Floats) -> Ids:
        """The part of the nearest cell of each vector, int64 (n,)."""
        rows = max(1, TABLE // len(self.means))
        found = [
            (vectors[start : start + rows] @ self.means.T).argmax(axis=1)
            for start in range(0, len(vectors), rows)
        ]
        parts: Ids = self.parts[np.concatenate(found)].astype(np.int64)
        return parts

    def parts_near(self, vector: Floats, most: int) -> list[int]:
        """At most ``most`` parts to search for what is near a vector (dim,), the nearest first; at least one."""
        cosines = self.means @ vector
        count = min(LOOKED_AT, len(cosines))
        best = np.argpartition(-cosines, count - 1)[:count]
        best = best[np.argsort(-cosines[best], kind="stable")]
        far = np.linalg.norm(vector) - cosines[best]
        near = best[far <= SLACK * far[0]] if far[0] > 0 else best
        return list(dict.fromkeys([int(self.parts[best[0]]), *self.parts[near].tolist()]))[:most]


def learn(sample: Floats, *, cells: int, parts: int) -> Cells:
    """Cells from a sample of unit vectors, (n, dim), and parts with about as many of the sample in each."""
    sums, weights = _merged(sample.astype(np.float32, copy=True), cells)
    means = unit(sums)
    numbers = np.zeros(len(means), dtype=np.int32)
    _halve(means, weights, np.arange(len(means)), parts, numbers, 0)
    return Cells(means, numbers)


def _merged(sums: Floats, target: int) -> tuple[Floats, Ids]:
    """Sums and sizes of at most ``target`` groups: again and again those are joined that are nearest to each other.

    This is agglomerative clustering by reciprocal nearest neighbours (Murtagh 1983), by the cosine of centroids. Unlike
    k-means, it needs no start, and a group of near vectors stays whole however many groups there are.
    """
    weights = np.ones(len(sums), dtype=np.int64)
    while len(sums) > target:
        nearest, cosines = _nearest_others(unit(sums))
        own = np.arange(len(sums))
        pairs = own[(nearest[nearest] == own) & (own < nearest)]
        if not len(pairs):  # a circle of equal distances
            pairs = own[cosines.argmax()][None]
        pairs = pairs[np.argsort(-cosines[pairs], kind="stable")][: len(sums) - target]
        sums[pairs] += sums[nearest[pairs]]
        weights[pairs] += weights[nearest[pairs]]
        kept = np.ones(len(sums), dtype=bool)
        kept[nearest[pairs]] = False
        sums, weights = sums[kept], weights[kept]
    return sums, weights


def _nearest_others(vectors: Floats) -> tuple[Ids, Floats]:
    """For each unit vector the nearest other one, and the cosine."""
    nearest = np.empty(len(vectors), dtype=np.int64)
    cosines = np.empty(len(vectors), dtype=np.float32)
    step = max(1, TABLE // len(vectors))
    for start in range(0, len(vectors), step):
        table = vectors[start : start + step] @ vectors.T
        rows = np.arange(len(table))
        table[rows, rows + start] = -np.inf
        nearest[start : start + step] = table.argmax(axis=1)
        cosines[start : start + step] = table[rows, nearest[start : start + step]]
    return nearest, cosines


def _halve(means: Floats, weights: Ids, own: Ids, parts: int, numbers: NDArray[np.int32], first: int) -> None:
    """Number the cells ``own`` with ``parts`` numbers from ``first``, by cutting them across their widest direction."""
    if parts <= 1 or len(own) <= 1:
        numbers[own] = first
        return
    centred = means[own] - np.average(means[own], axis=0, weights=weights[own])
    widest = np.linalg.eigh((centred * weights[own][:, None]).T @ centred)[1][:, -1]
    order = own[np.argsort(centred @ widest, kind="stable")]
    left = parts // 2
    before = np.cumsum(weights[order]) - weights[order] / 2
    cut = int(np.searchsorted(before, before[-1] * left / parts))
    cut = min(max(cut, 1), len(order) - 1)
    _halve(means, weights, order[:cut], left, numbers, first)
    _halve(means, weights, order[cut:], parts - left, numbers, first + left)
