"""Interleaved timing: every contender once a round, so that a machine's drift falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["medians", "ratios_to", "time_rounds"]


def time_rounds(contenders: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one untimed call of each; odd rounds run backwards."""
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median seconds of each contender."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios_to(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """How many times as fast as ``base`` each contender is: the median of the rounds' ratios.

    >>> ratios_to({"old": [4.0, 6.0], "new": [2.0, 3.0]}, "old")
    {'old': 1.0, 'new': 2.0}
    """
    return {
        name: statistics.median(b / own for b, own in zip(seconds[base], values, strict=True))
        for name, values in seconds.items()
    }
