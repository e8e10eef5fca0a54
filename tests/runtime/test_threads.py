"""A process that may start no more threads: its calls end in one of our errors, and later ones go on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest

from qingyu.errors import ThreadLimitError
from qingyu.runtime.async_embedder import AsyncEmbedder
from qingyu.runtime.batching import Workers
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.threads import Pool, in_thread, in_thread_or_here, start

MANY = ["今天天气真好" * n for n in range(1, 60)]
SECONDS = 60.0
REFUSED = "no thread can be started: expected another thread from the system, found that it refuses one"


class Limit:
    """Threads that the process may still start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        begin = threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if self.left <= 0:
                raise RuntimeError("can't start new thread")
            self.left -= 1
            begin(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.fixture
def limit(monkeypatch):
    return Limit(monkeypatch)


def test_the_first_thread_is_refused_and_its_job_is_not_run_later(limit):
    ran = []
    with Pool(2) as pool:
        with pytest.raises(ThreadLimitError, match=REFUSED):
            pool.submit(ran.append, "refused")
        limit.left = 2
        assert pool.submit(ran.append, "taken").result(SECONDS) is None
    assert ran == ["taken"]


def test_with_fewer_threads_than_wanted_every_job_is_done(limit):
    limit.left = 1
    together = threading.Event()
    with Pool(4) as pool:
        jobs = [pool.submit(together.wait, SECONDS), *[pool.submit(int, n) for n in range(20)]]
        together.set()
        assert [job.result(SECONDS) for job in jobs] == [True, *range(20)]
        assert len(pool._threads) == 1


def test_workers_go_on_when_threads_can_be_had_again(limit):
    workers = Workers(2)
    with pytest.raises(ThreadLimitError):
        workers.submit(lambda: 1)
    assert workers.run_here(lambda: 2) == 2
    limit.left = 2
    assert workers.submit(lambda: 3).result(SECONDS) == 3
    workers.close()


def test_other_errors_of_starting_are_left_as_they_are(monkeypatch):
    thread = threading.Thread(target=int)
    start(thread)
    with pytest.raises(RuntimeError, match="only be started once"):
        start(thread)
    thread.join()


def test_an_embedder_refuses_what_needs_threads_and_answers_what_needs_none(limit, tiny_model):
    with Embedder.open(tiny_model, threads=1) as embedder:
        expected = embedder.embed("今天天气真好")
        with pytest.raises(ThreadLimitError):
            embedder.embed(MANY)
        np.testing.assert_array_equal(embedder.embed("今天天气真好"), expected)
        limit.left = 10
        assert embedder.embed(MANY).shape == (len(MANY), embedder.spec.dim)


def test_asynchronous_calls_are_each_told_and_none_waits_for_ever(limit, tiny_model):
    """Ten calls meet in one micro-batch that no thread runs; then the same calls with a thread."""

    async def main():
        embedder = AsyncEmbedder(Embedder.open(tiny_model, threads=1))
        refused = await asyncio.gather(*map(embedder.embed, MANY[:10]), return_exceptions=True)
        left = (embedder.scheduler.running, embedder.scheduler.queued, embedder.scheduler.queued_tokens)
        limit.left = 1
        answered = await asyncio.gather(*map(embedder.embed, MANY[:10]))
        with pytest.raises(ThreadLimitError):
            await embedder.embed("今天天气真好" * 1000)  # long enough for a thread that tokenizes
        await embedder.aclose()
        return refused, left, answered

    refused, left, answered = asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert [type(error) for error in refused] == [ThreadLimitError] * 10
    assert left == (0, 0, 0)
    with Embedder.open(tiny_model, threads=1) as embedder:
        limit.left = 10
        np.testing.assert_allclose(np.concatenate(answered), embedder.embed(MANY[:10]), atol=1e-6)


def test_opening_beside_the_loop_is_refused_and_closing_happens_here(limit, tiny_model):
    async def main():
        with pytest.raises(ThreadLimitError):
            await AsyncEmbedder.open(tiny_model)
        with pytest.raises(ThreadLimitError):
            await in_thread(int)
        here = await in_thread_or_here(threading.current_thread)
        limit.left = 1
        return here, await in_thread(threading.current_thread)

    here, there = asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert here is threading.current_thread()
    assert there is not here


AT_THE_LIMIT = """
import concurrent.futures.thread, os, resource, sys
from qingyu import Embedder
from qingyu.errors import ThreadLimitError
from qingyu.runtime import threads
texts = ["今天天气真好" * n for n in range(1, 60)]
embedder = Embedder.open(sys.argv[1], threads=1)
embedder.embed("今天")
if os.geteuid() == 0:  # and so after what reads modules and files, which the other user may not
    os.setuid(65534)  # the limit does not bind root
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
print(embedder.embed("今天").shape[0])
try:
    embedder.embed(texts)
    print("taken")
except ThreadLimitError:
    print("refused")
resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
print(embedder.embed(texts).shape[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count and limit threads in other ways")
def test_the_limit_of_the_system_is_the_same_error(tiny_model):
    """Not imitated: RLIMIT_NPROC."""
    command = [sys.executable, "-W", "ignore", "-c", AT_THE_LIMIT, str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    assert done.stdout.split() == ["1", "refused", "59"], done.stderr
