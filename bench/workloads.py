"""What is measured: named workloads of Chinese text, the same texts for every contender and for the same seed.

Lengths are in characters, which for a BERT vocabulary of Chinese are tokens but for the two special ones. What a
model's tokenizer makes of them is counted where figures are made. Not here: how a contender runs them (``child``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qingyu.bench.texts import text_of_length
from qingyu.errors import InvalidOptionError

__all__ = ["GROWTH", "WORKLOADS", "Kind", "Lengths", "Workload", "arrival_times", "workload"]

Kind = Literal["bulk", "single", "arrivals", "growth", "cold", "memory"]

SEED = 20250601


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in characters around ``median``, within bounds; all alike where ``sigma`` is 0."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, chooser: random.Random) -> int:
        """One length."""
        drawn = round(math.exp(math.log(self.median) + self.sigma * chooser.gauss(0, 1)))
        return min(self.most, max(self.least, drawn))


QUERIES = Lengths(median=18, sigma=0.35, least=4, most=48)
# Median 48 tokens and, unless cut, 69 on average.
MIXED = Lengths(median=46, sigma=0.85, least=2, most=510)
# More than any of the models here reads in 512 tokens, so that all of a batch is full.
FULL = Lengths(median=1000, sigma=0.0, least=1000, most=1000)


@dataclass(frozen=True)
class Workload:
    """One way of using a model.

    ``texts`` are given in a round, ``quick`` in one of a quick run. "bulk": one call with all texts. "single": a call
    a text, each timed. "arrivals": texts arrive at random, ``rate`` a second, whatever the contender does, and each
    call takes all that wait; the time of each is from its arrival on. "growth": a call with each of ``GROWTH`` texts.
    "cold": a fresh process up to its first vector. "memory": a fresh process with all texts in one call, then idle.
    """

    name: str
    title: str
    kind: Kind
    lengths: Lengths
    texts: int
    quick: int
    rate: float = 0.0

    def sample(self, sources: Mapping[str, Sequence[str]], count: int) -> list[str]:
        """``count`` texts from all sources in turn; fewer are the first of more."""
        chooser = random.Random(f"{SEED} {self.name}")
        names = sorted(sources)
        return [
            text_of_length(sources[names[number % len(names)]], self.lengths.draw(chooser), chooser)
            for number in range(count)
        ]


GROWTH = (100, 1_000, 10_000, 100_000)

WORKLOADS = {
    one.name: one
    for one in (
        Workload("short", "Short queries in bulk", "bulk", QUERIES, 384, 192),
        Workload("mixed", "Mixed lengths", "bulk", MIXED, 192, 96),
        Workload("documents", "Documents of 512 tokens", "bulk", FULL, 16, 8),
        Workload("single", "One query at a time", "single", QUERIES, 150, 60),
        Workload("arrivals", "Queries that arrive at random", "arrivals", QUERIES, 200, 100, rate=50.0),
        Workload("growth", "More and more short texts", "growth", QUERIES, GROWTH[-1], GROWTH[1]),
        Workload("cold", "Cold start", "cold", QUERIES, 1, 1),
        Workload("memory", "Memory and idle CPU", "memory", FULL, 64, 16),
    )
}


def workload(name: str) -> Workload:
    """The workload of a name, or ``InvalidOptionError`` with the names there are."""
    if name not in WORKLOADS:
        raise InvalidOptionError(
            "unknown workload",
            expected=f"one of {', '.join(WORKLOADS)}",
            found=repr(name),
            remedy="Name one of them.",
        )
    return WORKLOADS[name]


def arrival_times(count: int, rate: float, *, seed: int = SEED) -> list[float]:
    """When each of ``count`` texts arrives, in seconds: a Poisson process of ``rate`` a second.

    >>> arrival_times(3, 10.0) == arrival_times(5, 10.0)[:3]
    True
    """
    chooser = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += chooser.expovariate(rate)
        times.append(now)
    return times
