"""A progress bar on standard error, shown only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

__all__ = ["progress_bar"]

T = TypeVar("T")
INTERVAL = 0.1  # seconds between two drawings: often enough to look alive, rare enough to cost nothing
WIDTH = 30


def progress_bar(
    blocks: Iterable[tuple[int, T]], *, total: int | None, unit: str = "texts", stream: TextIO | None = None
) -> Iterator[T]:
    """The items of ``blocks``, a bar drawn while they pass; each comes with how many units it holds.

    Draws nothing unless the stream (standard error) is a terminal. ``total`` ``None`` counts without a bar.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty():
        for _, item in blocks:
            yield item
        return
    start = last = time.monotonic()
    done = 0
    try:
        for count, item in blocks:
            yield item
            done += count
            now = time.monotonic()
            if now - last >= INTERVAL:
                last = now
                out.write("\r" + _line(done, total, now - start, unit))
                out.flush()
        out.write("\r" + _line(done, total, time.monotonic() - start, unit) + "\n")
    except BaseException:
        out.write("\n")
        raise
    finally:
        out.flush()


def _line(done: int, total: int | None, seconds: float, unit: str) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    if not total:
        return f"{done:,} {unit}  {rate:,.0f} {unit}/s  {_clock(seconds)}"
    filled = WIDTH * min(done, total) // total
    bar = "█" * filled + "░" * (WIDTH - filled)
    left = (total - done) / rate if rate > 0 else 0.0
    return f"{bar} {done:,}/{total:,}  {rate:,.0f} {unit}/s  {_clock(left)} left "


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
