"""Many callers' rows through one machine: admitted by waiting time, mixed by length, dropped when nobody waits.

A *call* is what one caller wants: rows to run and what is made of them (``Prepared``). Rows of different calls to one
model join micro-batches: the row that has waited longest and those nearest to it in length, within the token budget. A
micro-batch starts as soon as one of the ``slots`` is free, so waiting is what makes micro-batches large, and an idle
machine answers at once; ``max_delay`` makes it wait for company nonetheless.

A call is refused (``OverloadedError``) when what waits already would take longer than ``max_wait`` seconds: the waiting
tokens by the rate at which the machine did work lately. A bound on their number would say nothing about time.

All state belongs to one event loop, and its thread; only the runs are in other threads. Not here: what models
compute, and HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from qingyu.errors import ClosedError, InvalidOptionError, OverloadedError, QingyuError
from qingyu.runtime.batching import Prepared, Sequenced, Workers
from qingyu.runtime.threads import in_thread_or_here

__all__ = ["Batch", "Lane", "Scheduler", "Timing"]

R = TypeVar("R")

# Rows are padded to the longest of their micro-batch, which may waste this share of it, or this many tokens.
WASTE = 0.15
SMALL_WASTE = 32
# With idle slots, waiting rows are shared out among them in micro-batches of at least this many tokens.
LEAST_SHARE = 128
# What a micro-batch leaves of the weight of those before it in the measured rate: the last 20 or so count.
MEMORY = 0.95


@dataclass
class Timing:
    """How a call's time went, in seconds: waiting for its last row to start, and until its end from then on."""

    waited: float = 0.0
    ran: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch that was run: for metrics. ``tokens`` without padding, ``calls`` whose rows it held."""

    lane: Lane
    rows: int
    calls: int
    tokens: int
    padded: int
    seconds: float


@dataclass(eq=False)
class _Call:
    """One caller's rows under way."""

    future: asyncio.Future[Any]
    finish: Callable[[Sequence[Any]], Any]
    values: list[Any]
    left: int
    arrived: float
    unstarted: int
    started: float = 0.0


@dataclass(eq=False)
class _Row:
    """One row of a call, and its place there. ``taken`` once it is in a micro-batch, or not wanted any more."""

    item: Sequenced
    tokens: int
    number: int
    call: _Call
    place: int
    taken: bool = False


class _Waiting:
    """Rows that wait, to be had by age and by length."""

    def __init__(self) -> None:
        self.tokens = 0
        self._by_age: deque[_Row] = deque()
        self._by_length: list[tuple[int, int, _Row]] = []  # the number keeps rows from being compared

    def __len__(self) -> int:
        return len(self._by_length)

    def put(self, row: _Row) -> None:
        self._by_age.append(row)
        insort(self._by_length, (row.tokens, row.number, row))
        self.tokens += row.tokens

    def oldest(self) -> _Row | None:
        while self._by_age and self._by_age[0].taken:
            self._by_age.popleft()
        return self._by_age[0] if self._by_age else None

    def take(self, budget: int) -> list[_Row]:
        """The oldest row and its nearest in length, so that rows x longest <= ``budget`` and little is padding."""
        oldest = self.oldest()
        if oldest is None:
            return []
        rows = self._by_length
        low = bisect_left(rows, (oldest.tokens, oldest.number))
        high = low + 1
        total = longest = oldest.tokens
        while low > 0 or high < len(rows):
            below = rows[low - 1][0] if low > 0 else None
            above = rows[high][0] if high < len(rows) else None
            up = below is None or (above is not None and above - longest < rows[low][0] - below)
            tokens = above if up else below
            assert tokens is not None
            size = (high - low + 1) * max(longest, tokens)
            if size > budget or size - total - tokens > max(SMALL_WASTE, WASTE * size):
                break
            low, high = (low, high + 1) if up else (low - 1, high)
            longest, total = max(longest, tokens), total + tokens
        taken = [row for _, _, row in rows[low:high]]
        del rows[low:high]
        self.tokens -= total
        for row in taken:
            row.taken = True
        return taken

    def drop(self, unwanted: Iterable[_Row]) -> int:
        """Leave these out, if they still wait; how many did."""
        count = 0
        for row in unwanted:
            if not row.taken:
                row.taken = True
                del self._by_length[bisect_left(self._by_length, (row.tokens, row.number))]
                self.tokens -= row.tokens
                count += 1
        return count


class _Rate:
    """Tokens a second of one slot, lately; 0 before anything ran."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens = MEMORY * self._tokens + tokens
        self._seconds = MEMORY * self._seconds + seconds

    @property
    def value(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


@dataclass(eq=False)
class Lane:
    """One model's rows: what waits, what came of it, and how to run them.

    ``run`` is called in a worker's thread with rows of at most ``token_budget`` tokens, padding counted, or with one
    row, and gives a value for each in their order.
    """

    name: str
    run: Callable[[Sequence[Any]], Sequence[Any]]
    token_budget: int
    waiting: _Waiting = field(default_factory=_Waiting)
    again: deque[list[_Row]] = field(default_factory=deque)  # rows whose company failed, one call's at a time
    rate: _Rate = field(default_factory=_Rate)
    calls: int = 0  # under way, waiting or running
    running: int = 0  # tokens in micro-batches that run
    withdrawn: int = 0  # rows that were not run, as nobody waited for them any more

    def measure(self, rows: Sequence[Sequenced]) -> None:
        """Run rows now, in this thread, so that the rate is known before the first call."""
        start = time.perf_counter()
        self.run(rows)
        self.rate.add(sum(len(row.ids) for row in rows), time.perf_counter() - start)

    def head(self) -> _Row | None:
        """The row that has waited longest."""
        return self.again[0][0] if self.again else self.waiting.oldest()

    def take(self, budget: int) -> list[_Row]:
        """The next micro-batch."""
        return self.again.popleft() if self.again else self.waiting.take(budget)


class Scheduler:
    """Runs calls of any number of models on ``slots`` threads; belongs to the event loop of its first call.

    ``max_wait``: seconds that what waits may take when another call is admitted; ``None`` admits all. ``max_queue``:
    calls that may wait, ``None`` for any number. ``max_delay``: seconds that a row may wait for company while a slot is
    idle. ``on_batch`` is told of every micro-batch, in the loop's thread.
    """

    def __init__(
        self,
        slots: int,
        *,
        max_wait: float | None = 1.0,
        max_queue: int | None = None,
        max_delay: float = 0.0,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        _check_bounds(max_wait, max_queue, max_delay)
        self.slots = slots
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.max_delay = max_delay
        self.on_batch = on_batch
        self._lanes: list[Lane] = []
        self._workers = Workers(slots)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = 0
        self._unstarted = 0
        self._number = 0
        self._due: asyncio.TimerHandle | asyncio.Handle | None = None
        self._idle: asyncio.Event | None = None
        self._closed = False

    def add(self, lane: Lane) -> Lane:
        """From now on, run the lane's rows."""
        self._lanes.append(lane)
        return lane

    def remove(self, lane: Lane) -> None:
        """Forget a lane that has no calls."""
        self._lanes.remove(lane)

    @property
    def queued(self) -> int:
        """How many calls wait, with no row or not every row started."""
        return self._unstarted

    @property
    def queued_tokens(self) -> int:
        """How many tokens wait."""
        return sum(lane.waiting.tokens for lane in self._lanes)

    @property
    def running(self) -> int:
        """How many micro-batches run."""
        return self._running

    def rate(self) -> float:
        """Tokens a second of all slots, lately, over the lanes that did anything; 0 before that."""
        rates = [lane.rate.value for lane in self._lanes if lane.rate.value > 0]
        return self.slots * sum(rates) / len(rates) if rates else 0.0

    def expected_wait(self) -> float:
        """How many seconds what waits, and half of what runs, will take; 0 for a lane that never ran."""
        return sum(
            (lane.waiting.tokens + lane.running / 2) / (self.slots * lane.rate.value)
            for lane in self._lanes
            if lane.waiting.tokens and lane.rate.value > 0
        )

    def retry_after(self) -> int:
        """In how many whole seconds a refused call may be admitted."""
        return max(1, math.ceil(self.expected_wait() - (self.max_wait or 0.0)))

    def admit(self) -> None:
        """Raise ``OverloadedError`` if a call would be refused now: before work is done for it."""
        if self._closed:
            raise _closed_error()
        if self.max_queue is not None and self._unstarted >= self.max_queue:
            raise _overloaded(f"at most {self.max_queue} calls waiting", f"{self._unstarted}")
        if self.max_wait is not None:
            wait = self.expected_wait()
            if wait > self.max_wait:
                raise _overloaded(f"at most {self.max_wait:g} s of work waiting", f"{wait:.2f} s")

    async def run(self, lane: Lane, prepared: Prepared[Any, Any, R], *, timing: Timing | None = None) -> R:
        """A call's result. Cancelling it drops the rows that have not started; the others' results are dropped.

        Raises ``OverloadedError`` at once, ``ClosedError``, and what running its own rows raises: rows that fail in
        company are run again without it.
        """
        loop = self._own_loop()
        self.admit()
        if not prepared.rows:
            return prepared.finish([])
        count = len(prepared.rows)
        call = _Call(loop.create_future(), prepared.finish, [None] * count, count, time.perf_counter(), count)
        rows = [self._row(item, call, place) for place, item in enumerate(prepared.rows)]
        for row in rows:
            lane.waiting.put(row)
        self._unstarted += 1
        lane.calls += 1
        self._wake()
        try:
            result: R = await call.future
        finally:
            if call.unstarted > 0:  # cancelled, or failed by its first rows
                lane.withdrawn += lane.waiting.drop(rows)
                self._unstarted -= 1
            lane.calls -= 1
            self._note_idle()
        if timing is not None:
            timing.waited = call.started - call.arrived
            timing.ran = time.perf_counter() - call.started
        return result

    async def drained(self) -> None:
        """Return when no call is under way."""
        self._own_loop()
        while any(lane.calls for lane in self._lanes):
            self._idle = asyncio.Event()
            await self._idle.wait()

    async def close(self) -> None:
        """Refuse new calls, fail those that wait with ``ClosedError``, and wait for the runs under way."""
        self._closed = True
        for lane in self._lanes:
            while rows := lane.take(lane.token_budget):
                for row in rows:
                    if not row.call.future.done():
                        row.call.future.set_exception(_closed_error())
        await in_thread_or_here(self._workers.close)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise InvalidOptionError(
                "the event loop",
                expected="the one of the first call",
                found="another",
                remedy="Open one for each event loop, or keep to one loop.",
            )
        return loop

    def _row(self, item: Sequenced, call: _Call, place: int) -> _Row:
        self._number += 1
        return _Row(item, len(item.ids), self._number, call, place)

    def _note_idle(self) -> None:
        if self._idle is not None:
            self._idle.set()

    def _wake(self) -> None:
        """Start micro-batches at the end of this turn of the loop, so that calls of one turn meet."""
        if self._running < self.slots and (self._due is None or isinstance(self._due, asyncio.TimerHandle)):
            assert self._loop is not None
            if self._due is not None:
                self._due.cancel()
            self._due = self._loop.call_soon(self._start_all)

    def _start_all(self) -> None:
        assert self._loop is not None
        if self._due is not None:
            self._due.cancel()
            self._due = None
        while self._running < self.slots:
            ready = [(head.number, lane) for lane in self._lanes if (head := lane.head()) is not None]
            if not ready:
                return
            _, lane = min(ready, key=lambda one: one[0])
            delay = self._delay(lane)
            if delay > 0:
                self._due = self._loop.call_later(delay, self._start_all)
                return
            taken = lane.take(self._share(lane))
            rows = [row for row in taken if not row.call.future.done()]
            lane.withdrawn += len(taken) - len(rows)
            if rows:
                self._start(lane, rows)

    def _delay(self, lane: Lane) -> float:
        """How long to wait for company for the oldest row."""
        oldest = lane.waiting.oldest()
        if self.max_delay <= 0 or lane.again or oldest is None or lane.waiting.tokens >= lane.token_budget:
            return 0.0
        return oldest.call.arrived + self.max_delay - time.perf_counter()

    def _share(self, lane: Lane) -> int:
        idle = self.slots - self._running
        return min(lane.token_budget, max(LEAST_SHARE, math.ceil(lane.waiting.tokens / idle)))

    def _start(self, lane: Lane, rows: list[_Row]) -> None:
        now = time.perf_counter()  # a loop's own time may count in whole milliseconds, as uvloop's does
        for row in rows:
            call = row.call
            call.unstarted -= 1
            if call.unstarted == 0:
                call.started = now
                self._unstarted -= 1
        self._running += 1
        lane.running += sum(row.tokens for row in rows)
        job = self._submitted(partial(_timed, lane.run, [row.item for row in rows]))
        job.add_done_callback(partial(self._tell, lane, rows))

    def _submitted(self, run: Callable[[], Any]) -> Future[Any]:
        """The job under way, or one that has failed: without a thread its calls are told so, and others go on."""
        try:
            return self._workers.submit(run)
        except QingyuError as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _tell(self, lane: Lane, rows: list[_Row], job: Future[Any]) -> None:
        """Of a worker's end, in its thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._ended, lane, rows, job)
        except RuntimeError:
            return  # the loop was closed, and with it everybody who waited

    def _ended(self, lane: Lane, rows: list[_Row], job: Future[Any]) -> None:
        self._running -= 1
        lane.running -= sum(row.tokens for row in rows)
        error = job.exception() if not job.cancelled() else _closed_error()
        if error is None:
            values, seconds = job.result()
            self._record(lane, rows, seconds)
            for row, value in zip(rows, values, strict=True):
                _fulfil(row, value)
        else:
            self._failed(lane, rows, error)
        self._start_all()

    def _record(self, lane: Lane, rows: list[_Row], seconds: float) -> None:
        tokens = sum(row.tokens for row in rows)
        lane.rate.add(tokens, seconds)
        if self.on_batch is not None:
            calls = len({id(row.call) for row in rows})
            padded = len(rows) * max(row.tokens for row in rows)
            self.on_batch(Batch(lane, len(rows), calls, tokens, padded, seconds))

    def _failed(self, lane: Lane, rows: list[_Row], error: BaseException) -> None:
        """Fail the call, or find out whose rows it was by running each call's without the others'."""
        calls: dict[int, list[_Row]] = {}
        for row in rows:
            if not row.call.future.done():
                calls.setdefault(id(row.call), []).append(row)
        if len(calls) == 1:
            for own in calls.values():
                own[0].call.future.set_exception(error)
        for own in calls.values() if len(calls) > 1 else ():
            call = own[0].call
            if call.unstarted == 0:
                self._unstarted += 1
            call.unstarted += len(own)
            lane.again.append(own)


def _timed(
    run: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]
) -> tuple[Sequence[Any], float]:
    start = time.perf_counter()
    values = run(items)
    return values, time.perf_counter() - start


def _fulfil(row: _Row, value: object) -> None:
    call = row.call
    call.values[row.place] = value
    call.left -= 1
    if call.left == 0 and not call.future.done():
        try:
            call.future.set_result(call.finish(call.values))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
            call.future.set_exception(error)


def _check_bounds(max_wait: float | None, max_queue: int | None, max_delay: float) -> None:
    for option, value, least in (
        ("max_wait", max_wait, 0.0),
        ("max_queue", max_queue, 1),
        ("max_delay", max_delay, 0.0),
    ):
        if value is not None and not value >= least:
            raise InvalidOptionError(
                option, expected=f"at least {least:g}", found=repr(value), remedy="Raise it, or leave it out."
            )


def _closed_error() -> ClosedError:
    return ClosedError(
        "the model is closed", expected="an open model", found="a closed one", remedy="Open it again."
    )


def _overloaded(expected: str, found: str) -> OverloadedError:
    return OverloadedError(
        "more work waits than can be done in time",
        expected=expected,
        found=found,
        remedy="Try again a little later, with fewer calls at once, or raise the limit.",
    )
