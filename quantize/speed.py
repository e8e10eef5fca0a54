"""How fast a model is against another in one interleaved run, the only comparison that holds on a shared machine.

Not here: absolute speed, which drifts by a factor of two, and other engines (``qingyu.bench``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qingyu.errors import InvalidOptionError
from qingyu.runtime.embedder import Embedder

__all__ = ["Speed", "measure_speed", "speed_ratio", "speed_sample"]

ROUNDS = 5
# Tokens of one round: enough for eight micro-batches, few enough that a small FP32 model takes about a second.
LEAST_TOKENS, MOST_TOKENS = 2048, 4096


@dataclass(frozen=True)
class Speed:
    """FP32 time divided by the candidate's for the same texts: above 1 the candidate is faster.

    ``ratio`` is the median over ``rounds``, ``least`` and ``most`` are the extremes. ``texts`` were embedded in
    each round, ``workers`` micro-batches at once, each of up to ``token_budget`` tokens.
    """

    ratio: float
    least: float
    most: float
    rounds: int
    texts: int
    workers: int
    token_budget: int


def speed_ratio(
    reference: Embedder, candidate: Embedder, texts: Sequence[str], *, rounds: int = ROUNDS
) -> float:
    """How many times faster ``candidate`` embeds the texts than ``reference``, as ``measure_speed`` finds it."""
    return measure_speed(reference, candidate, texts, rounds=rounds).ratio


def measure_speed(
    reference: Embedder, candidate: Embedder, texts: Sequence[str], *, rounds: int = ROUNDS
) -> Speed:
    """The median of per-round ratios, tokenizing included; the two models take turns at going first.

    A pass of each goes before, which loads the graphs and is not counted. Open both with the same profile and
    threads: ``InvalidOptionError`` when they do not cut the same micro-batches, for rounds below 1, and for
    no texts.
    """
    _check(reference, candidate, texts, rounds)
    for embedder in (reference, candidate):
        embedder.embed(texts)
    ratios = [_round(reference, candidate, texts, swap=number % 2 == 1) for number in range(rounds)]
    return Speed(
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        rounds=rounds,
        texts=len(texts),
        workers=reference.plan.workers,
        token_budget=reference.plan.token_budget,
    )


def speed_sample(texts: Sequence[str], tokens: Sequence[int]) -> list[str]:
    """Every n-th of the texts, about 4,096 tokens at most; the same repeated where they are below 2,048.

    ``tokens`` are the lengths of the texts.
    """
    step = math.ceil(sum(tokens) / MOST_TOKENS) or 1
    chosen = list(texts[::step])
    length = sum(tokens[::step])
    return chosen * math.ceil(LEAST_TOKENS / max(length, 1)) if length < LEAST_TOKENS else chosen


def _round(reference: Embedder, candidate: Embedder, texts: Sequence[str], *, swap: bool) -> float:
    if swap:
        fast = _seconds(candidate, texts)
        return _seconds(reference, texts) / fast
    return _seconds(reference, texts) / _seconds(candidate, texts)


def _seconds(embedder: Embedder, texts: Sequence[str]) -> float:
    start = time.perf_counter()
    embedder.embed(texts)
    return time.perf_counter() - start


def _check(reference: Embedder, candidate: Embedder, texts: Sequence[str], rounds: int) -> None:
    if reference.plan != candidate.plan:
        raise InvalidOptionError(
            "models of a speed ratio",
            expected=f"both with {reference.plan}",
            found=str(candidate.plan),
            remedy="Open both with the same profile, threads and max_memory_mb.",
        )
    if rounds < 1 or not texts:
        raise InvalidOptionError(
            "speed ratio",
            expected="at least 1 round and 1 text",
            found=f"{rounds} rounds, {len(texts)} texts",
            remedy="Give more.",
        )
