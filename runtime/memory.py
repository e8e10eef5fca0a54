"""How much memory a micro-batch takes, and the token budget and workers that a memory budget allows.

Not here: what the weights take, which is measured once they are loaded, and what the caller holds: its own texts
and the vectors that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qingyu.errors import MemoryBudgetError
from qingyu.runtime.spec import Architecture

__all__ = [
    "LAST_WINDOW",
    "MEGABYTE",
    "Plan",
    "activation_bytes",
    "plan",
    "resident_bytes",
    "unread_bytes",
    "window_bytes",
]

MEGABYTE = 1 << 20
LAST_WINDOW = 2048  # texts that are sorted together at the most; see ``qingyu.runtime.batching``
# Texts, ids and vectors of the two windows under way. Measured: 25 MB for windows of 2,048 texts of 700
# characters, which is the worst of 20 to 100,000 characters.
WINDOW_BYTES = 32 * MEGABYTE
# The part of it that does not shrink with the window: the first run in a worker's thread, modules loaded for it.
LEAST_BYTES = 4 * MEGABYTE
WINDOWS = (LAST_WINDOW, LAST_WINDOW // 4, LAST_WINDOW // 16, LAST_WINDOW // 32)
# By how much the size of the same loaded model differs between processes, generously.
LOADING_BYTES = MEGABYTE


@dataclass(frozen=True)
class Plan:
    """How many workers run at once, how many tokens (padding counted) each takes at a time, of how many texts."""

    workers: int
    token_budget: int
    window: int = LAST_WINDOW


def resident_bytes() -> int:
    """Resident memory of this process in bytes, what was freed given back to the operating system first.

    Without that the same model, just loaded, counts for 249 MB in one process and 301 MB in the next, as the C
    library keeps more or less of what loading freed; with it, for 221 MB (e5-small FP32, glibc 2.36).
    """
    import psutil  # 5 ms, and only needed for a memory budget

    give_back_freed()
    return int(psutil.Process().memory_info().rss)


def unread_bytes(path: Path) -> int:
    """How many bytes of a mapped file are not resident yet; all of them where that cannot be asked (not Linux)."""
    size, resident, inside = path.stat().st_size, 0, False
    try:
        with Path("/proc/self/smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                word = line.split(maxsplit=1)[0]
                if not word.endswith(":"):  # the first line of a mapping, which ends with its file's name
                    inside = line.rstrip("\n").endswith(f" {path}")
                elif inside and word == "Rss:":
                    resident += 1024 * int(line.split()[1])
    except OSError:
        return size
    return max(0, size - resident)


def give_back_freed() -> None:
    """Return freed memory to the system: glibc keeps what lies between blocks in use, tens of megabytes a model."""
    try:
        import ctypes

        trim = ctypes.CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError, TypeError):
        return  # a Python without ctypes, or another C library than glibc
    trim(ctypes.c_size_t(0))


def activation_bytes(sizes: Architecture, rows: int, tokens: int, *, heads: int | None = None) -> int:
    """The most memory that runs of (rows, tokens) hold besides the weights, in bytes.

    Numbers of float32 per token, whichever half of a layer takes more: in attention ten arrays of the hidden size
    (residual, query, key, value, their transposed copies, context) and the scores, heads x tokens; or in the
    feed-forward half nine of the hidden size and two and a half of the inner one (product, activation, and that
    quantized). A single run holds the scores twice, before and after softmax. They count three times here because
    onnxruntime's arena never returns memory: runs of changing shapes leave holes in it that the next one does
    not fit. ``heads`` is how many heads' scores are held at once; ``None`` is all.

    Measured with onnxruntime 1.32 on e5-small, bge-small and bert-base, FP32 and INT8, 512 to 4,096 tokens: the
    resident memory that sequences of mixed rectangles added was 0.47 to 0.98 of this, that of single runs of 512
    and more tokens 0.53 to 1.00.
    """
    attention = 10 * sizes.hidden_size + 3 * min(sizes.heads, heads or sizes.heads) * tokens
    feed_forward = 9 * sizes.hidden_size + 5 * sizes.intermediate_size // 2
    return 4 * rows * tokens * max(attention, feed_forward)


def window_bytes(texts: int) -> int:
    """What windows of so many texts, and a thousand characters for each, take."""
    return LEAST_BYTES + (WINDOW_BYTES - LEAST_BYTES) * texts // LAST_WINDOW


def plan(
    sizes: Architecture,
    *,
    max_tokens: int,
    workers: int,
    token_budget: int,
    free_bytes: int | None,
    heads: int | None = None,
) -> Plan:
    """The most workers, then the most tokens, whose runs fit into ``free_bytes``; ``None`` is no limit.

    Where that leaves no room beside windows of the usual size, one text of ``max_tokens`` at a time and smaller
    windows; ``MemoryBudgetError`` says how many megabytes are missing where even that does not fit. ``heads`` as in
    ``activation_bytes``.
    """
    if free_bytes is None:
        return Plan(workers, token_budget)
    longest = activation_bytes(sizes, 1, max_tokens, heads=heads)
    window = next((texts for texts in WINDOWS if longest + window_bytes(texts) <= free_bytes), None)
    if window is None:
        raise _too_small(longest, free_bytes, max_tokens)
    if window < LAST_WINDOW:
        return Plan(1, min(token_budget, max_tokens), window)
    room = free_bytes - window_bytes(window)
    workers = min(workers, room // longest)
    # Bytes per token never fall with length, so no rectangle of a budget takes more than rows of ``max_tokens``.
    return Plan(workers, min(token_budget, room // workers * max_tokens // longest))


def _too_small(longest: int, free_bytes: int, max_tokens: int) -> MemoryBudgetError:
    needed = longest + window_bytes(WINDOWS[-1])
    return MemoryBudgetError(
        "the memory budget is too small",
        expected=f"{_megabytes(needed)} MB beside the loaded model, for texts of {max_tokens} tokens",
        found=f"{free_bytes // MEGABYTE} MB" if free_bytes > 0 else "none",
        remedy=f"Raise max_memory_mb by {_megabytes(needed + LOADING_BYTES - free_bytes)} or use a smaller model.",
    )


def _megabytes(size: int) -> int:
    """Megabytes, rounded up."""
    return -(-size // MEGABYTE)
