"""How much memory a micro-batch takes, and the token budget and workers that a memory budget allows."""

from __future__ import annotations

from dataclasses import dataclass

from qingyu.errors import MemoryBudgetError
from qingyu.runtime.spec import Architecture

__all__ = ["Plan", "activation_bytes", "plan", "resident_bytes"]

MEGABYTE = 1 << 20
# Texts, ids and vectors of the two windows under way, outside the graph.
WINDOW_BYTES = 16 * MEGABYTE


@dataclass(frozen=True)
class Plan:
    """How many workers run at once, and how many tokens (padding counted) each takes at a time."""

    workers: int
    token_budget: int


def resident_bytes() -> int:
    """Resident memory of this process in bytes, as the operating system counts it."""
    import psutil  # 5 ms, and only needed for a memory budget

    return int(psutil.Process().memory_info().rss)


def activation_bytes(sizes: Architecture, rows: int, tokens: int) -> int:
    """The most memory that one run of (rows, tokens) holds besides the weights, in bytes.

    float32 throughout: eight arrays of the hidden size (residual, query, key, value, their transposed copies,
    context), two and a half of the feed-forward size (product, activation and its quantized form), and the
    attention scores before and after softmax, rows x heads x tokens^2. Checked against measured peaks in
    tests/runtime/test_memory.py.
    """
    per_token = 8 * sizes.hidden_size + 5 * sizes.intermediate_size // 2
    scores = 2 * sizes.heads * tokens
    return 4 * rows * tokens * (per_token + scores)


def plan(
    sizes: Architecture,
    *,
    max_tokens: int,
    workers: int,
    token_budget: int,
    free_bytes: int | None,
) -> Plan:
    """The most workers, then the most tokens, whose runs fit into ``free_bytes``; ``None`` is no limit.

    One row of ``max_tokens`` must fit, or ``MemoryBudgetError`` says how many megabytes are missing.
    """
    if free_bytes is None:
        return Plan(workers, token_budget)
    room = free_bytes - WINDOW_BYTES
    longest = activation_bytes(sizes, 1, max_tokens)
    if room < longest:
        missing = -(-(longest - room) // MEGABYTE)
        raise MemoryBudgetError(
            "the memory budget is too small",
            expected=f"{longest // MEGABYTE + 1} MB free for one text of {max_tokens} tokens",
            found=f"{max(0, room) // MEGABYTE} MB free once the model is loaded",
            remedy=f"Raise max_memory_mb by {missing} or use a smaller model.",
        )
    workers = min(workers, room // longest)
    return Plan(workers, _largest_budget(sizes, max_tokens, token_budget, room // workers))


def _largest_budget(sizes: Architecture, max_tokens: int, wanted: int, room: int) -> int:
    """The largest token budget up to ``wanted`` of which every rectangle fits into ``room``."""
    budget = wanted
    while budget > max_tokens and _worst(sizes, max_tokens, budget) > room:
        budget -= max(1, budget // 8)
    return budget if budget > max_tokens or wanted <= max_tokens else max_tokens


def _worst(sizes: Architecture, max_tokens: int, budget: int) -> int:
    """Bytes of the most expensive rectangle of ``budget`` tokens: the fewest rows, since scores grow squared."""
    tokens = min(max_tokens, budget)
    return activation_bytes(sizes, max(1, budget // tokens), tokens)
