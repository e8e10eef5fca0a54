"""Threads that cannot be had: at the limit of threads a call ends in one of our errors, and no job is lost or kept.

Imported where the first thread is needed: ``concurrent.futures`` takes time, and a lone text needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

from qingyu.errors import ThreadLimitError

__all__ = ["Pool", "in_thread", "in_thread_or_here", "start"]

T = TypeVar("T")


class Pool(ThreadPoolExecutor):
    """A pool that goes on with fewer threads if it cannot have all; ``submit`` raises if it has none."""

    def _adjust_thread_count(self) -> None:
        # ThreadPoolExecutor calls this once the job is queued. Threads that are there take it; without any, it would
        # lie there until a later call starts one, although this one has failed.
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not _at_limit(error):
                raise
            if not self._threads:
                self._work_queue.get_nowait()
                raise _limit_error() from None


def start(thread: Thread) -> None:
    """Start a thread; raises ``ThreadLimitError`` if the system gives none."""
    try:
        thread.start()
    except RuntimeError as error:
        if not _at_limit(error):
            raise
        raise _limit_error() from None


async def in_thread(call: Callable[[], T]) -> T:
    """What ``call`` gives in a thread of its own, for what is done once; raises ``ThreadLimitError``."""
    pool = Pool(1, thread_name_prefix="qingyu-once")
    try:
        future = pool.submit(call)
    finally:
        pool.shutdown(wait=False)
    return await asyncio.wrap_future(future)


async def in_thread_or_here(call: Callable[[], T]) -> T:
    """The same for what frees something and cannot be refused: without a thread the caller's event loop waits."""
    try:
        return await in_thread(call)
    except ThreadLimitError:
        return call()


def _at_limit(error: RuntimeError) -> bool:
    return str(error) == "can't start new thread"  # another one is of an interpreter that ends


def _limit_error() -> ThreadLimitError:
    return ThreadLimitError(
        "no thread can be started",
        expected="another thread from the system",
        found="that it refuses one",
        remedy="Raise the limit of processes and threads (ulimit -u, or the container's), or use --threads 1.",
    )
