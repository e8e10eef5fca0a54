"""AsyncEmbedder gives what Embedder gives, to many at once."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from qingyu import AsyncEmbedder, Embedder
from qingyu.errors import (
    ClosedError,
    InvalidOptionError,
    InvalidTextError,
    ModelNotFoundError,
    TextTooLongError,
)
from qingyu.runtime.scheduler import Timing
from qingyu.runtime.task import Report

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "", "怎么修改登录密码" * 20, "abc 123"] * 8


def run(tiny_model, work, **options):
    async def main():
        async with await AsyncEmbedder.open(tiny_model, **options) as embedder:
            return await work(embedder)

    return asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "query"},
        {"dim": 8, "normalize": False},
        {"long_text": "mean", "overlap": 4},
        {"long_text": "max"},
    ],
)
def test_vectors_are_those_of_embedder_one_by_one_and_together(tiny_model, options):
    with Embedder.open(tiny_model) as embedder:
        expected = embedder.embed(TEXTS, **options)

    async def work(embedder):
        apart = await asyncio.gather(*(embedder.embed(text, **options) for text in TEXTS))
        return np.concatenate(apart), await embedder.embed(TEXTS, **options)

    for found in run(tiny_model, work, max_wait=None):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_call_reports_what_it_read_and_how_its_time_went(tiny_model):
    async def work(embedder):
        report, timing = Report(), Timing()
        await embedder.embed(TEXTS, report=report, timing=timing)
        return report, timing

    report, timing = run(tiny_model, work)
    assert (report.texts, report.truncated) == (len(TEXTS), 8)
    assert timing.ran > 0


def test_none_and_similarity(tiny_model):
    async def work(embedder):
        assert (await embedder.embed([])).shape == (0, embedder.spec.dim)
        return await embedder.similarity("今天天气真好", ["今天天气真好", "股票大跌"])

    table = run(tiny_model, work)
    assert table.shape == (1, 2)
    assert table[0, 0] == pytest.approx(1.0, abs=1e-6)


def test_half_of_a_thousand_cancelled_calls_are_not_computed_and_the_rest_is_right(tiny_model):
    texts = [TEXTS[n % len(TEXTS)] for n in range(1000)]
    with Embedder.open(tiny_model) as embedder:
        expected = embedder.embed(texts)

    async def work(embedder):
        ran = []
        embedder.scheduler.on_batch = lambda batch: ran.append(batch.rows)
        tasks = [asyncio.ensure_future(embedder.embed(text)) for text in texts]
        await asyncio.sleep(0)  # every one has been handed in, few have started
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        scheduler = embedder.scheduler
        assert scheduler.queued == scheduler.queued_tokens == 0
        return found, sum(ran), embedder._lane.withdrawn

    found, ran, withdrawn = run(tiny_model, work, max_wait=None)
    assert ran + withdrawn == 1000
    assert withdrawn > 250
    assert all(isinstance(one, asyncio.CancelledError) for one in found[::2])
    np.testing.assert_allclose(np.concatenate(found[1::2]), expected[1::2], atol=1e-6)


def test_long_texts_are_tokenized_beside_the_loop(tiny_model):
    """A megabyte of text is prepared in another thread, and the loop goes on meanwhile."""

    async def work(embedder):
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        await embedder.embed(["天气真好" * 5000] * 200, long_text="truncate")
        counting.cancel()
        return turns

    assert run(tiny_model, work) > 10


def test_errors_are_those_of_embedder(tiny_model):
    async def work(embedder):
        with pytest.raises(InvalidTextError, match="text 1 is not text"):
            await embedder.embed(["a", None])
        with pytest.raises(TextTooLongError):
            await embedder.embed("天" * 1000, long_text="error")
        with pytest.raises(InvalidOptionError):
            await embedder.embed("天", dim=0)
        assert embedder.scheduler.queued == 0

    run(tiny_model, work)
    with pytest.raises(ModelNotFoundError):
        run("no-such-model", work)


def test_after_closing_twice_a_call_is_refused(tiny_model):
    async def main():
        embedder = await AsyncEmbedder.open(tiny_model)
        assert repr(embedder).startswith("<AsyncEmbedder tiny")
        await embedder.aclose()
        await embedder.aclose()
        with pytest.raises(ClosedError):
            await embedder.embed("天")

    asyncio.run(main())
