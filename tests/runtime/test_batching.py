"""Micro-batches, windows and workers: order, budgets, overlap, errors."""

from __future__ import annotations

import itertools
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qingyu.errors import ClosedError
from qingyu.runtime.batching import (
    BATCH_TOKENS,
    FIRST_WINDOW,
    LAST_WINDOW,
    Batcher,
    Workers,
    micro_batches,
    windows,
)
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.tokenizer import EncodedText


def encoded(length: int, first: int = 1) -> EncodedText:
    return EncodedText(ids=np.arange(first, first + length, dtype=np.int64), unknown=0, truncated=False)


def sums(batch: TokenBatch) -> np.ndarray:
    """A stand-in for a graph: each row's sum of ids and its number of tokens."""
    return np.stack([(batch.ids * batch.mask).sum(1), batch.mask.sum(1)], axis=1).astype(np.float32)


def batcher(workers: Workers, run=sums, budget: int = 64) -> Batcher:
    return Batcher(run=run, workers=workers, dim=2, token_budget=budget, pad_id=0)


@given(st.lists(st.integers(1, 600), max_size=200), st.integers(1, 2048))
def test_every_text_is_in_one_micro_batch_and_padding_counts_towards_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[n] for n in group)
        assert len(group) == 1 or len(group) * longest <= budget


def test_sorting_leaves_little_padding_on_mixed_lengths():
    lengths = np.random.default_rng(0).lognormal(np.log(48), 0.8, 2048).clip(3, 512).astype(int).tolist()
    padded = sum(len(g) * max(lengths[n] for n in g) for g in micro_batches(lengths, 512))
    assert padded / sum(lengths) < 1.03


def test_few_texts_of_mixed_lengths_are_padded_little_too():
    lengths = np.random.default_rng(0).lognormal(np.log(48), 0.9, 192).clip(3, 512).astype(int).tolist()
    groups = micro_batches(lengths, 512)
    padded = sum(len(g) * max(lengths[n] for n in g) for g in groups)
    assert padded / sum(lengths) < 1.03
    assert len(groups) < 1.2 * sum(lengths) / 512 + 5  # not by one text a micro-batch


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 80))
def test_no_other_cut_of_sorted_texts_costs_less(lengths, budget):
    ordered = sorted(lengths, reverse=True)

    def cost(groups):
        return sum(len(group) * group[0] + BATCH_TOKENS for group in groups)

    def cuts(texts):
        if not texts:
            yield []
        for rows in range(1, len(texts) + 1):
            if rows == 1 or rows * texts[0] <= budget:
                yield from ([texts[:rows], *rest] for rest in cuts(texts[rows:]))

    found = [[lengths[n] for n in group] for group in micro_batches(lengths, budget)]
    assert cost(found) == min(map(cost, cuts(ordered)))


def test_windows_keep_order_and_grow_to_their_bound():
    texts = [str(n) for n in range(10_000)]
    sizes = []
    for window, expected in zip(windows(texts), itertools.count(), strict=False):
        assert window[0] == texts[sum(sizes)], expected
        sizes.append(len(window))
    assert sizes[0] == FIRST_WINDOW
    assert max(sizes) == LAST_WINDOW
    assert sum(sizes) == len(texts)


def test_a_window_of_long_texts_is_bounded_in_characters():
    longest = "长" * 1_000_000
    assert [len(window) for window in windows([longest] * 5)] == [3, 2]


def test_windows_are_made_only_when_asked_for():
    taken = []
    stream = windows(taken.append(n) or str(n) for n in range(1000))
    next(stream)
    assert len(taken) == FIRST_WINDOW


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_stand_in_the_order_of_the_texts(count):
    random = np.random.default_rng(count)
    source = []
    for window in range(5):
        texts = [encoded(int(n), first=window * 1000 + i) for i, n in enumerate(random.integers(1, 40, 37))]
        source.append((window, texts))
    workers = Workers(count)
    for (window, texts), (seen, result) in zip(source, batcher(workers).run_windows(source), strict=True):
        assert seen == window
        assert result[:, 0].tolist() == [float(text.ids.sum()) for text in texts]
        assert result[:, 1].tolist() == [len(text.ids) for text in texts]
    workers.close()


def test_the_next_window_is_encoded_while_this_one_runs():
    second_encoded = threading.Event()

    def source():
        yield 0, [encoded(30) for _ in range(8)]
        second_encoded.set()
        yield 1, [encoded(30) for _ in range(8)]

    def run(batch: TokenBatch) -> np.ndarray:
        assert second_encoded.wait(10), "the first window ended before the second was encoded"
        return sums(batch)

    workers = Workers(2)
    assert [window for window, _ in batcher(workers, run).run_windows(source())] == [0, 1]
    workers.close()


def test_at_most_count_jobs_run_at_once_whoever_asks():
    running, most = 0, 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    workers = Workers(2)
    futures = [workers.submit(job) for _ in range(20)]
    threads = [threading.Thread(target=workers.run_here, args=(job,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future in futures:
        future.result()
    workers.close()
    assert most == 2


def test_an_error_in_a_run_is_raised_and_drops_what_waits():
    calls = []

    def run(batch: TokenBatch) -> np.ndarray:
        calls.append(1)
        time.sleep(0.005)  # or the worker is through both windows before anybody looks
        raise ValueError("broken")

    workers = Workers(1)
    source = ((n, [encoded(60) for _ in range(50)]) for n in range(100))
    with pytest.raises(ValueError, match="broken"):
        list(batcher(workers, run).run_windows(source))
    workers.close()
    assert len(calls) < 100


def test_an_error_in_the_source_is_raised_as_it_is():
    def source():
        yield 0, [encoded(30) for _ in range(8)]
        raise KeyError("gone")

    workers = Workers(1)
    with pytest.raises(KeyError, match="gone"):
        list(batcher(workers).run_windows(source()))
    workers.close()


def test_closing_the_iterator_early_drops_what_has_not_begun():
    started = []

    def run(batch: TokenBatch) -> np.ndarray:
        started.append(1)
        time.sleep(0.005)
        return sums(batch)

    workers = Workers(1)
    stream = batcher(workers, run).run_windows((n, [encoded(60) for _ in range(20)]) for n in range(50))
    next(stream)
    stream.close()
    workers.close()
    assert len(started) < 60


def test_closed_workers_refuse_jobs():
    workers = Workers(1)
    workers.close()
    workers.close()
    with pytest.raises(ClosedError, match="Open it again"):
        workers.submit(lambda: None)
    with pytest.raises(ClosedError):
        workers.run_here(lambda: None)


def test_a_forked_child_gets_workers_of_its_own():
    workers = Workers(2)
    assert workers.submit(lambda: 1).result() == 1
    pid = os.fork()
    if pid == 0:
        os._exit(0 if workers.submit(lambda: 7).result(timeout=5) == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    workers.close()
