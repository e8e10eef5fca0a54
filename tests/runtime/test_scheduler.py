"""Calls of many, admitted by time, mixed by length; what nobody waits for is not run."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qingyu.errors import ClosedError, InvalidOptionError, OverloadedError
from qingyu.runtime.batching import Prepared
from qingyu.runtime.scheduler import SMALL_WASTE, WASTE, Lane, Scheduler, Timing, _Call, _Row, _Waiting

FIELDS = (None, len, [], 1, 0.0, 1)  # of a _Call, where only its rows matter


@dataclass(frozen=True)
class Item:
    """A row that stands for a number."""

    number: int
    tokens: int = 4

    @property
    def ids(self):
        return np.zeros(self.tokens, dtype=np.int64)


class Engine:
    """Runs rows by giving their numbers back, when it is let; remembers what it ran."""

    def __init__(self, *, open_: bool = True, bad: frozenset[int] = frozenset()):
        self.gate = threading.Event()
        self.bad = bad
        self.ran: list[list[int]] = []
        if open_:
            self.gate.set()

    def __call__(self, rows):
        numbers = [row.number for row in rows]
        self.ran.append(numbers)
        assert self.gate.wait(10)
        if self.bad & set(numbers):
            raise ValueError(f"bad row in {numbers}")
        return numbers

    @property
    def numbers(self):
        return [number for batch in self.ran for number in batch]


def call(*numbers, tokens=4):
    return Prepared([Item(number, tokens) for number in numbers], list)


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within ten seconds")


def scheduled(engine, *, slots=1, budget=64, **options):
    scheduler = Scheduler(slots, **options)
    return scheduler, scheduler.add(Lane("fake", engine, budget))


def test_one_slot_and_a_queue_of_eight_refuse_exactly_two_of_ten():
    """One slow call runs, ten more come: Triton's L0_model_queue."""
    engine = Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine, max_queue=8, max_wait=None)
        slow = asyncio.ensure_future(scheduler.run(lane, call(0)))
        await until(lambda: engine.ran)
        others = [asyncio.ensure_future(scheduler.run(lane, call(n))) for n in range(1, 11)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert scheduler.queued == 8
        engine.gate.set()
        found = await asyncio.gather(slow, *others, return_exceptions=True)
        refused = [one for one in found if isinstance(one, OverloadedError)]
        assert len(refused) == 2
        assert [one for one in found if not isinstance(one, OverloadedError)] == [[n] for n in range(9)]
        assert "expected at most 8 calls waiting, found 8" in str(refused[0])
        assert scheduler.queued == scheduler.queued_tokens == scheduler.running == 0
        await scheduler.close()

    asyncio.run(main())


def test_half_of_a_thousand_calls_cancelled_before_they_start_are_never_run():
    engine = Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine, slots=2, max_wait=None)
        tasks = [asyncio.ensure_future(scheduler.run(lane, call(n))) for n in range(1000)]
        await until(lambda: len(engine.ran) == 2)
        started = set(engine.numbers)
        cancelled = set(range(0, 1000, 2))
        for number in cancelled:
            tasks[number].cancel()
        engine.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for number, one in enumerate(found):
            assert isinstance(one, asyncio.CancelledError) if number in cancelled else one == [number]
        assert not set(engine.numbers) & (cancelled - started)
        assert lane.withdrawn == len(cancelled - started)
        assert lane.calls == scheduler.queued == scheduler.queued_tokens == scheduler.running == 0
        # No worker was lost: the next calls are served by both.
        engine.gate.clear()
        more = [asyncio.ensure_future(scheduler.run(lane, call(n, tokens=64))) for n in (1001, 1002)]
        await until(lambda: scheduler.running == 2)
        engine.gate.set()
        assert await asyncio.gather(*more) == [[1001], [1002]]
        await scheduler.close()

    asyncio.run(main())


def test_a_call_cancelled_while_it_runs_leaves_its_company_unharmed():
    engine = Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine)
        one, other = (asyncio.ensure_future(scheduler.run(lane, call(n))) for n in (1, 2))
        await until(lambda: engine.ran == [[1, 2]])
        one.cancel()
        engine.gate.set()
        assert await other == [2]
        with pytest.raises(asyncio.CancelledError):
            await one
        assert lane.withdrawn == 0
        await scheduler.close()

    asyncio.run(main())


def test_a_call_is_refused_when_what_waits_would_take_longer_than_it_may():
    engine = Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine, max_wait=1.0)
        lane.rate.add(100, 1.0)  # tokens, seconds
        tasks = [asyncio.ensure_future(scheduler.run(lane, call(0, tokens=40)))]
        await until(lambda: engine.ran)
        tasks += [asyncio.ensure_future(scheduler.run(lane, call(n, tokens=40))) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        # 40 run, 120 wait: 1.2 s, and half of 0.4 s.
        assert scheduler.expected_wait() == pytest.approx(1.4)
        with pytest.raises(OverloadedError, match=r"at most 1 s of work waiting, found 1\.40 s"):
            await scheduler.run(lane, call(9))
        with pytest.raises(OverloadedError):
            scheduler.admit()
        assert scheduler.retry_after() == 1
        tasks[3].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        scheduler.admit()  # 80 wait: 1.0 s
        engine.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.close()
        assert 9 not in engine.numbers

    asyncio.run(main())


def test_what_was_never_measured_is_admitted_and_then_measured():
    engine = Engine()

    async def main():
        scheduler, lane = scheduled(engine)
        assert scheduler.rate() == scheduler.expected_wait() == 0
        timing = Timing()
        await scheduler.run(lane, call(1, 2), timing=timing)
        assert scheduler.rate() > 0
        assert timing.waited >= 0
        assert timing.ran > 0
        await scheduler.close()

    asyncio.run(main())


def test_rows_that_fail_in_company_are_run_again_without_it():
    engine = Engine(open_=False, bad=frozenset({2}))

    async def main():
        scheduler, lane = scheduled(engine)
        tasks = [asyncio.ensure_future(scheduler.run(lane, call(n, n + 10))) for n in (1, 2, 3)]
        await until(lambda: engine.ran)
        engine.gate.set()
        one, two, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert (one, three) == ([1, 11], [3, 13])
        assert isinstance(two, ValueError)
        assert engine.ran[0] == [1, 11, 2, 12, 3, 13]
        assert sorted(map(sorted, engine.ran[1:])) == [[1, 11], [2, 12], [3, 13]]
        assert lane.calls == scheduler.queued == scheduler.queued_tokens == 0
        await scheduler.close()

    asyncio.run(main())


def test_a_call_that_fails_takes_its_waiting_rows_along():
    engine = Engine(bad=frozenset({0}))

    async def main():
        scheduler, lane = scheduled(engine, budget=8)
        with pytest.raises(ValueError, match="bad row"):
            await scheduler.run(lane, call(*range(100)))
        assert scheduler.queued == scheduler.queued_tokens == 0
        assert await scheduler.run(lane, call(7)) == [7]
        assert len(engine.numbers) < 20
        await scheduler.close()

    asyncio.run(main())


def test_calls_of_one_turn_of_the_loop_meet_in_a_micro_batch():
    engine = Engine()

    async def main():
        scheduler, lane = scheduled(engine)
        await asyncio.gather(*(scheduler.run(lane, call(n)) for n in range(5)))
        await scheduler.close()

    asyncio.run(main())
    assert engine.ran == [[0, 1, 2, 3, 4]]


def test_a_delay_lets_later_calls_join_until_a_micro_batch_is_full():
    engine = Engine()

    async def main():
        scheduler, lane = scheduled(engine, max_delay=5.0, budget=8)
        first = asyncio.ensure_future(scheduler.run(lane, call(1)))
        await asyncio.sleep(0.05)
        assert engine.ran == []
        start = time.monotonic()
        assert await scheduler.run(lane, call(2)) == [2]
        assert await first == [1]
        assert time.monotonic() - start < 4
        scheduler.max_delay = 0.02
        assert await scheduler.run(lane, call(3)) == [3]  # nobody joins, and it starts nonetheless
        await scheduler.close()

    asyncio.run(main())
    assert engine.ran == [[1, 2], [3]]


def test_idle_slots_share_what_waits():
    engine = Engine()

    async def main():
        scheduler, lane = scheduled(engine, slots=2, budget=1024)
        await scheduler.run(lane, call(*range(8), tokens=64))
        await scheduler.close()

    asyncio.run(main())
    assert sorted(map(len, engine.ran)) == [4, 4]


def test_two_lanes_take_turns_by_age():
    engine, other = Engine(open_=False), Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine, budget=4)
        second = scheduler.add(Lane("other", other, 4))
        tasks = [asyncio.ensure_future(scheduler.run(second if n % 2 else lane, call(n))) for n in range(6)]
        engine.gate.set()
        other.gate.set()
        await asyncio.gather(*tasks)
        assert (engine.ran, other.ran) == ([[0], [2], [4]], [[1], [3], [5]])
        await scheduler.drained()
        scheduler.remove(second)
        await scheduler.close()

    asyncio.run(main())


def test_closing_fails_what_waits_and_awaits_what_runs():
    engine = Engine(open_=False)

    async def main():
        scheduler, lane = scheduled(engine, budget=4)
        tasks = [asyncio.ensure_future(scheduler.run(lane, call(n))) for n in (1, 2)]
        await until(lambda: engine.ran)
        closing = asyncio.ensure_future(scheduler.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        engine.gate.set()
        await closing
        one, two = await asyncio.gather(*tasks, return_exceptions=True)
        assert one == [1]
        assert isinstance(two, ClosedError)
        with pytest.raises(ClosedError):
            await scheduler.run(lane, call(3))

    asyncio.run(main())


def test_no_rows_are_finished_at_once():
    async def main():
        scheduler, lane = scheduled(Engine())
        assert await scheduler.run(lane, Prepared([], lambda values: ("done", list(values)))) == ("done", [])
        await scheduler.close()

    asyncio.run(main())


def test_another_event_loop_is_refused():
    scheduler, lane = scheduled(Engine())
    asyncio.run(scheduler.run(lane, call(1)))
    with pytest.raises(InvalidOptionError, match="the event loop: expected the one of the first call"):
        asyncio.run(scheduler.run(lane, call(2)))


@pytest.mark.parametrize("options", [{"max_wait": -1}, {"max_queue": 0}, {"max_delay": float("nan")}])
def test_limits_that_nothing_could_pass_are_refused(options):
    with pytest.raises(InvalidOptionError, match="at least"):
        Scheduler(1, **options)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    budget=st.integers(1, 1024),
    dropped=st.sets(st.integers(0, 59)),
)
def test_micro_batches_hold_every_wanted_row_once_within_the_budget_oldest_first(lengths, budget, dropped):
    waiting = _Waiting()
    rows = [_Row(Item(n, length), length, n, _Call(*FIELDS), 0) for n, length in enumerate(lengths)]
    for row in rows:
        waiting.put(row)
    unwanted = [rows[n] for n in dropped if n < len(rows)]
    assert waiting.drop(unwanted) == len(unwanted)
    left = [row for row in rows if row not in unwanted]
    while batch := waiting.take(budget):
        oldest = min(left, key=lambda row: row.number)
        assert oldest in batch
        size = len(batch) * max(row.tokens for row in batch)
        assert len(batch) == 1 or size <= budget
        assert len(batch) == 1 or size - sum(row.tokens for row in batch) <= max(SMALL_WASTE, WASTE * size)
        left = [row for row in left if row not in batch]
        assert waiting.tokens == sum(row.tokens for row in left)
    assert not left
    assert len(waiting) == 0
