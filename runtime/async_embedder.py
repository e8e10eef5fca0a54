"""Sentence embeddings for asyncio: calls of many tasks share micro-batches; what would wait too long is refused.

Not here: how rows are mixed and admitted (``qingyu.runtime.scheduler``), and HTTP (``qingyu.runtime.serve``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, TypeVar

from qingyu.runtime.embedder import BUNDLED, Embedder, LongText
from qingyu.runtime.engine import Floats
from qingyu.runtime.engines import EngineName
from qingyu.runtime.onnxruntime_engine import Profile
from qingyu.runtime.scheduler import Lane, Scheduler, Timing
from qingyu.runtime.scripts import Script
from qingyu.runtime.spec import ModelSpec
from qingyu.runtime.task import Report, listed
from qingyu.runtime.threads import Pool, in_thread, in_thread_or_here
from qingyu.runtime.vectors import cosine

__all__ = ["AsyncEmbedder", "Preparer"]

T = TypeVar("T")

# Texts of fewer characters in all are tokenized in the event loop's thread: about a microsecond each.
INLINE_CHARACTERS = 2000
WARM_UP = "今天天气真好，我们去公园散步吧。" * 4


class Preparer:
    """Tokenizes what is long in a thread of its own, and what is short at once, so that an event loop never waits."""

    def __init__(self) -> None:
        self._thread = Pool(1, thread_name_prefix="qingyu-prepare")

    async def __call__(self, characters: int, prepare: Callable[[], T]) -> T:
        """What ``prepare`` gives for texts of so many ``characters``."""
        if characters <= INLINE_CHARACTERS:
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._thread, prepare)

    def close(self) -> None:
        """Drop what waits; what is under way ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class AsyncEmbedder:
    """``Embedder`` for one event loop; a call that is cancelled before it started is never computed.

    Open one with ``await AsyncEmbedder.open(...)``, or give an opened ``Embedder``, which it then owns. Use it as an
    asynchronous context manager, or ``await aclose()``.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_wait: float | None = 1.0,
        max_queue: int | None = None,
        max_delay: float = 0.0,
    ) -> None:
        self._embedder = embedder
        self._prepare = Preparer()
        self._scheduler = Scheduler(
            embedder.plan.workers, max_wait=max_wait, max_queue=max_queue, max_delay=max_delay
        )
        self._lane = self._scheduler.add(
            Lane(embedder.spec.name, embedder.run_rows, embedder.plan.token_budget)
        )

    @classmethod
    async def open(
        cls,
        name_or_folder: str | os.PathLike[str] = BUNDLED,
        *,
        profile: Profile = "throughput",
        threads: int | None = None,
        max_memory_mb: int | None = None,
        special_tokens: Literal["parse", "text"] = "parse",
        unicode_form: Literal["NFKC"] | None = None,
        script: Script | None = None,
        self_check: bool = True,
        engine: EngineName = "auto",
        max_wait: float | None = 1.0,
        max_queue: int | None = None,
        max_delay: float = 0.0,
    ) -> AsyncEmbedder:
        """An embedder that is ready: loaded, checked and warm. The event loop goes on meanwhile.

        ``max_wait``: a call is refused with ``OverloadedError`` while what waits would take more seconds than this,
        at the rate lately measured; ``None`` lets any amount wait. ``max_queue`` bounds the calls that wait.
        ``max_delay``: seconds that a text may wait for others to share its micro-batch while the machine is idle. The
        other options, and errors, are those of ``Embedder.open``.
        """

        def opened() -> AsyncEmbedder:
            embedder = Embedder.open(
                name_or_folder,
                profile=profile,
                threads=threads,
                max_memory_mb=max_memory_mb,
                special_tokens=special_tokens,
                unicode_form=unicode_form,
                script=script,
                self_check=self_check,
                engine=engine,
            )
            try:
                own = cls(embedder, max_wait=max_wait, max_queue=max_queue, max_delay=max_delay)
                embedder.load()
                rows = embedder.prepare([WARM_UP]).rows
                embedder.run_rows(rows)  # slower than any other
                for _ in range(3):
                    own._lane.measure(rows)
            except BaseException:
                embedder.close()
                raise
            return own

        return await in_thread(opened)

    @property
    def spec(self) -> ModelSpec:
        """The model's manifest."""
        return self._embedder.spec

    @property
    def scheduler(self) -> Scheduler:
        """What waits, and how long it will take."""
        return self._scheduler

    async def embed(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        long_text: LongText = "truncate",
        overlap: int = 0,
        report: Report | None = None,
        timing: Timing | None = None,
    ) -> Floats:
        """The vectors of the texts in their order, float32 (n, dim), as ``Embedder.embed`` gives them.

        ``timing`` is told how long the call waited and ran. Raises what ``Embedder.embed`` raises,
        ``OverloadedError`` at once when too much waits already, and ``ClosedError``.
        """
        self._scheduler.admit()
        given = listed(texts)
        counted = Report() if report is None else report
        prepare = partial(
            self._embedder.prepare,
            given,
            prompt=prompt,
            dim=dim,
            normalize=normalize,
            long_text=long_text,
            overlap=overlap,
            report=counted,
        )
        ready = await self._prepare(_characters(given), prepare)
        vectors = await self._scheduler.run(self._lane, ready, timing=timing)
        counted.warn()
        return vectors

    async def similarity(
        self, a: str | Iterable[str], b: str | Iterable[str], *, prompt: str | None = None
    ) -> Floats:
        """Cosine similarities, float32 (len(a), len(b)); raises what ``embed`` raises."""
        left, right = listed(a), listed(b)
        both = await self.embed([*left, *right], prompt=prompt)
        return cosine(both[: len(left)], both[len(left) :])

    async def aclose(self) -> None:
        """Wait for what runs, fail what waits with ``ClosedError``, and free the graph. May be called twice."""
        self._prepare.close()
        await self._scheduler.close()
        await in_thread_or_here(self._embedder.close)

    async def __aenter__(self) -> AsyncEmbedder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Async{repr(self._embedder)[1:]}"


def _characters(texts: Sequence[str]) -> int:
    # Anything that is not a text is refused by the tokenizer, not here.
    return sum(len(text) for text in texts if isinstance(text, str))
