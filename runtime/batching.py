"""From encoded texts to micro-batches, from micro-batches to results in the caller's order.

Texts are sorted by token count within a window and cut into micro-batches of least cost within a budget of tokens,
padding counted, because small rectangles that stay in a core's cache are faster than large ones. Windows follow each
other without a gap: while the workers run one, the caller's thread already tokenizes the next.

Not here: what a graph computes, and how much memory it needs (``qingyu.runtime.memory``).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import ClosedError
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.memory import LAST_WINDOW
from qingyu.runtime.tokenizer import EncodedText

if TYPE_CHECKING:
    from concurrent.futures import Future

    from qingyu.runtime.threads import Pool

__all__ = ["Batcher", "ItemBatcher", "Prepared", "Sequenced", "Workers", "micro_batches", "weakly", "windows"]

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")

# A window grows from the first to the last size: the workers get their first batches early, and a long
# input still sorts over enough texts that padding stays small.
FIRST_WINDOW = 64
TEXT_CHARACTERS = 1 << 10  # of a text in a window, in the mean: longer ones make a window of fewer
# What a micro-batch takes besides its tokens, in tokens: 1 x 20 took 4.1 ms, 16 x 20 27.0 (qingyu.bench.graph_forms).
BATCH_TOKENS = 30


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[NDArray[np.intp]]:
    """Positions of texts grouped at the least cost so that rows x longest <= ``token_budget``, longest texts first.

    A micro-batch costs its tokens, padding counted, and ``BATCH_TOKENS``: so one is ended early where filling it up
    would pad too much. A text longer than the budget is a micro-batch of its own. Longest first, so that the last
    ones to run are small and the workers end together.

    >>> [group.tolist() for group in micro_batches([3, 9, 4, 4], token_budget=12)]
    [[1], [2, 3, 0]]
    """
    if len(lengths) == 1:
        return [np.zeros(1, dtype=np.intp)]
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    groups = []
    start = 0
    for rows in _rows_of_least_cost([lengths[n] for n in order], token_budget):
        groups.append(order[start : start + rows])
        start += rows
    return groups


def _rows_of_least_cost(longest_first: Sequence[int], token_budget: int) -> list[int]:
    """How many rows each micro-batch has: dynamic programming from the end, linear in the number of texts."""
    count = len(longest_first)
    rows = np.arange(1, count + 1)
    cost = np.zeros(count + 1, dtype=np.int64)  # of all texts from here on
    chosen = [0] * count
    for start in range(count - 1, -1, -1):
        longest = max(1, longest_first[start])
        most = min(max(1, token_budget // longest), count - start)
        costs = rows[:most] * longest + cost[start + 1 : start + most + 1]
        chosen[start] = int(costs.argmin()) + 1
        cost[start] = costs[chosen[start] - 1] + BATCH_TOKENS
    found = []
    start = 0
    while start < count:
        found.append(chosen[start])
        start += chosen[start]
    return found


def windows(texts: Iterable[T], most: int = LAST_WINDOW) -> Iterator[list[T]]:
    """The texts, or tuples of texts, in lists of growing size, each bounded in texts and in characters.

    >>> [len(window) for window in windows(["轻语"] * 200)]
    [64, 128, 8]
    """
    size, characters = min(FIRST_WINDOW, most), 0
    window: list[T] = []
    for text in texts:
        window.append(text)
        # Anything that is not a text is refused when the window is encoded, not here.
        parts = text if isinstance(text, tuple) else (text,)
        characters += sum(len(part) for part in parts if isinstance(part, str))
        if len(window) >= size or characters >= most * TEXT_CHARACTERS:
            yield window
            size, characters, window = min(2 * size, most), 0, []
    if window:
        yield window


def weakly(method: Callable[[T], R]) -> Callable[[T], R]:
    """A bound method that does not keep its object: for what the object itself keeps.

    Otherwise a model that nobody uses any more, with megabytes of tokenizer, stays until Python looks for cycles.
    """
    known = WeakMethod(method)

    def call(argument: T) -> R:
        found = known()
        assert found is not None  # whoever waits for the result holds the object
        return found(argument)

    return call


class Workers:
    """At most ``count`` jobs at once, however many threads ask; usable in a forked child."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._closed = False
        self._renew()

    def _renew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.count)
        self._pool: Pool | None = None

    def _own(self) -> None:
        if self._pid != os.getpid():
            self._renew()  # the parent's threads and held locks do not exist in a child
        if self._closed:
            raise ClosedError(
                "the model is closed", expected="an open model", found="a closed one", remedy="Open it again."
            )

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run ``job`` in a worker thread; raises ``ThreadLimitError`` if there is none and none can be started."""
        self._own()
        with self._lock:
            if self._pool is None:
                from qingyu.runtime.threads import Pool  # with logging; a lone text needs no pool

                self._pool = Pool(self.count, thread_name_prefix="qingyu")
            return self._pool.submit(self._limited, job)

    def run_here(self, job: Callable[[], T]) -> T:
        """Run ``job`` in this thread, which saves a lone short job the change of threads."""
        self._own()
        return self._limited(job)

    def _limited(self, job: Callable[[], T]) -> T:
        with self._slots:
            return job()

    def close(self) -> None:
        """Let the jobs under way end, drop those that wait, and refuse new ones."""
        self._closed = True
        if self._pid == os.getpid() and self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Sequenced(Protocol):
    """Anything that is run as one row of token ids, int64 (tokens,)."""

    @property
    def ids(self) -> Ids:
        """The row."""
        ...


S = TypeVar("S", bound=Sequenced)


@dataclass(frozen=True)
class Prepared(Generic[S, V, R]):
    """A call's rows to run, in any order and any company, and what makes the caller's result of theirs.

    ``finish`` takes one value a row, in the order of ``rows``. Both may be called in any thread.
    """

    rows: Sequence[S]
    finish: Callable[[Sequence[V]], R]


@dataclass
class _Running(Generic[T, R]):
    """One window under way: its result fills while its jobs end."""

    window: T
    result: R
    jobs: list[Future[None]]

    def wait(self) -> tuple[T, R]:
        try:
            for job in self.jobs:
                job.result()
        except BaseException:
            self.cancel()
            raise
        return self.window, self.result

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


class _Sorted(Generic[S, R]):
    """What every batcher does; how results are held is left to ``_empty`` and ``_fill``."""

    workers: Workers
    token_budget: int

    def run_windows(self, encoded: Iterable[tuple[T, Sequence[S]]]) -> Iterator[tuple[T, R]]:
        """For each (window, its encoded texts) the window and its results, in the order given.

        ``encoded`` is advanced in the caller's thread while the workers run the window before; two windows are
        under way at most. An error in a job or in ``encoded`` drops what has not begun and is raised here.
        """
        pending: deque[_Running[T, R]] = deque()
        try:
            for window, texts in encoded:
                pending.append(self._start(window, texts))
                if len(pending) > 1:
                    yield pending.popleft().wait()
            while pending:
                yield pending.popleft().wait()
        finally:
            for running in pending:
                running.cancel()

    def _start(self, window: T, texts: Sequence[S]) -> _Running[T, R]:
        result = self._empty(len(texts))
        groups = micro_batches([len(text.ids) for text in texts], self.token_budget)
        jobs = [partial(self._fill, result, [texts[n] for n in group], group) for group in groups]
        if len(jobs) == 1:  # a lone short job is over sooner here than in another thread
            self.workers.run_here(jobs[0])
            jobs = []
        return _Running(window, result, [self.workers.submit(job) for job in jobs])

    def _empty(self, count: int) -> R:
        """Room for the results of ``count`` texts."""
        raise NotImplementedError

    def _fill(self, result: R, texts: Sequence[S], rows: NDArray[np.intp]) -> None:
        """Run one micro-batch, and put its results at ``rows``."""
        raise NotImplementedError

    def run_rows(self, texts: Sequence[S]) -> Sequence[Any]:
        """Run one micro-batch in this thread: a value for each row, in their order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Batcher(_Sorted[EncodedText, Floats]):
    """How encoded texts reach the graph: ``run`` gives (rows, dim) for one micro-batch, a window (n, dim)."""

    run: Callable[[TokenBatch], Floats]
    workers: Workers
    dim: int
    token_budget: int
    pad_id: int

    def _empty(self, count: int) -> Floats:
        return np.empty((count, self.dim), dtype=np.float32)

    def _fill(self, result: Floats, texts: Sequence[EncodedText], rows: NDArray[np.intp]) -> None:
        result[rows] = self.run_rows(texts)

    def run_rows(self, texts: Sequence[EncodedText]) -> Any:  # noqa: ANN401 - an array is its rows, if no Sequence
        """The same, as an array (rows, dim)."""
        return self.run(TokenBatch.pad([text.ids for text in texts], self.pad_id))


@dataclass(frozen=True)
class ItemBatcher(_Sorted[S, list[V]]):
    """The same for results of any kind: ``run`` gives one for each item of a micro-batch, in their order."""

    run: Callable[[Sequence[S]], Sequence[V]]
    workers: Workers
    token_budget: int

    def _empty(self, count: int) -> list[V]:
        return [None] * count  # type: ignore[list-item] # every one is replaced before a window is given out

    def _fill(self, result: list[V], texts: Sequence[S], rows: NDArray[np.intp]) -> None:
        for row, value in zip(rows, self.run_rows(texts), strict=True):
            result[row] = value

    def run_rows(self, texts: Sequence[S]) -> Sequence[V]:
        """The same."""
        return self.run(texts)
