"""The models of a server: opened, checked and warmed up before they are used, replaced without a gap.

A request keeps the ``Served`` that it began with, so an answer never mixes two versions of a model; the old one is
freed when its last request is answered. Not here: HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qingyu.errors import QingyuError
from qingyu.runtime.async_embedder import Preparer
from qingyu.runtime.batching import Prepared
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.fill_mask import FillMask
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.question_answerer import QuestionAnswerer
from qingyu.runtime.scheduler import Lane, Scheduler, Timing
from qingyu.runtime.sequences import SequenceModel
from qingyu.runtime.serve.telemetry import Telemetry
from qingyu.runtime.spec import Task
from qingyu.runtime.task import OpenOptions, TaskModel, find_model, open_model
from qingyu.runtime.threads import in_thread, in_thread_or_here
from qingyu.runtime.token_classifier import TokenClassifier
from qingyu.runtime.wire import RefusedError, no_model

__all__ = ["Configuration", "Reloaded", "Served", "Service"]

WARM_UP = "今天天气真好，我们去公园散步吧。" * 4
REPLACED_SECONDS = 0.2


@dataclass(frozen=True)
class Configuration:
    """What a server holds, and how much of it at once; the limits are those of the command line."""

    models: Mapping[str, str]  # name -> folder, bundle, or name of a model
    options: OpenOptions = field(default_factory=OpenOptions)
    max_wait: float = 1.0
    max_queue: int | None = 1024
    max_delay: float = 0.0
    max_inputs: int = 256
    max_body: int = 2_000_000
    keyed: bool = False


@dataclass(eq=False)
class Served:
    """One opened model, its lanes, and how many requests use it."""

    name: str
    model: TaskModel
    lane: Lane
    states: Lane | None
    users: int = 0
    retired: bool = False
    known: dict[tuple[str | None, int | None, bool | None], str] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What it does."""
        return self.model.spec.task

    def join(self, scheduler: Scheduler) -> None:
        """Have the rows of its requests run."""
        for lane in self._lanes:
            scheduler.add(lane)

    def leave(self, scheduler: Scheduler) -> None:
        """The opposite, when it has no requests."""
        for lane in self._lanes:
            scheduler.remove(lane)

    @property
    def _lanes(self) -> list[Lane]:
        return [lane for lane in (self.lane, self.states) if lane is not None]

    def fingerprint(
        self, *, prompt: str | None = None, dim: int | None = None, normalize: bool | None = None
    ) -> str:
        """The name of the vector space that these options give, with this model as it runs."""
        key = (prompt, dim, normalize)
        if key not in self.known:
            options = self.model.options
            found = fingerprint(
                self.model.running_spec,
                prompt=prompt,
                dim=dim,
                normalize=normalize,
                special_tokens=options.special_tokens,
                unicode_form=options.unicode_form,
                script=options.script,
            )
            if len(self.known) >= 64:  # prompts may be any text
                return found
            self.known[key] = found
        return self.known[key]


@dataclass(frozen=True)
class Reloaded:
    """What came of opening a model anew: ``error`` when the old one goes on."""

    name: str
    changed: bool
    error: QingyuError | None = None


class Service:
    """All models of a server, one scheduler for all of them, and whether it is ready, or about to end."""

    def __init__(self, configuration: Configuration, telemetry: Telemetry) -> None:
        self.configuration = configuration
        self.telemetry = telemetry
        telemetry.service = self
        self.draining = False
        self.scheduler: Scheduler | None = None
        self.started = time.monotonic()
        self.on_freed: Callable[[str], None] = lambda name: None
        self._served: dict[str, Served] = {}
        self._prepare = Preparer()
        self._changing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, checked and warm, and the end has not begun."""
        return self.scheduler is not None and not self.draining

    @property
    def models(self) -> Sequence[Served]:
        """What is served, in the order of the command line."""
        return tuple(self._served.values())

    async def open(self) -> None:
        """Open every model; raises what opening one raises."""
        opened = []
        for name, source in self.configuration.models.items():
            opened.append((name, await in_thread(partial(self._opened, source))))
        slots = min(model.plan.workers for _, model in opened)
        scheduler = Scheduler(
            slots,
            max_wait=self.configuration.max_wait,
            max_queue=self.configuration.max_queue,
            max_delay=self.configuration.max_delay,
            on_batch=self.telemetry.batch,
        )
        for name, model in opened:
            served = await in_thread(partial(_warm, name, model))
            served.join(scheduler)
            self._served[name] = served
        self.scheduler = scheduler

    async def reload(self) -> list[Reloaded]:
        """Open every configured path again, and serve what is there now; a model that fails is not replaced."""
        async with self._changing:
            return [await self._replace(name) for name in list(self._served)]

    async def close(self) -> None:
        """Wait for the runs under way, and free every model."""
        self._prepare.close()
        if self.scheduler is not None:
            await self.scheduler.close()
        for served in self.models:
            await in_thread_or_here(served.model.close)
        self._served.clear()
        await asyncio.gather(*self._closing)

    def find(self, name: str | None, tasks: Sequence[Task]) -> Served:
        """The model of that name, or the first for one of these tasks."""
        if not self.ready:
            code = "draining" if self.draining else "not_ready"
            raise RefusedError(code, "the server is ending" if self.draining else "models are being loaded")
        if name is None:
            found = next((one for one in self.models if one.task in tasks), None)
            if found is None:
                raise RefusedError("model_not_found", f"no model for {' or '.join(tasks)} is served")
            return found
        if name not in self._served:
            raise no_model(name, self._served)
        found = self._served[name]
        if found.task not in tasks:
            raise RefusedError(
                "invalid_request",
                f"model: expected one for {' or '.join(tasks)}, found one for {found.task}",
                parameter="model",
            )
        return found

    def admit(self) -> None:
        """Raise ``RefusedError`` or ``OverloadedError`` if no work would be taken on now."""
        if self.draining:
            raise RefusedError("draining", "the server is ending")
        if self.scheduler is None:
            raise RefusedError("not_ready", "models are being loaded")
        self.scheduler.admit()

    async def prepare(self, characters: int, prepare: Callable[[], Any]) -> Any:  # noqa: ANN401
        """What ``prepare`` gives, in another thread if the texts are long."""
        return await self._prepare(characters, prepare)

    async def run(self, served: Served, prepared: Prepared[Any, Any, Any], timing: Timing) -> Any:  # noqa: ANN401
        """A model's results of prepared rows; raises what ``Scheduler.run`` raises."""
        assert self.scheduler is not None
        return await self.scheduler.run(served.lane, prepared, timing=timing)

    async def run_states(self, served: Served, prepared: Prepared[Any, Any, Any], timing: Timing) -> Any:  # noqa: ANN401
        """The same for states of tokens."""
        assert self.scheduler is not None
        assert served.states is not None
        return await self.scheduler.run(served.states, prepared, timing=timing)

    def leave(self, served: Served) -> None:
        """A request ends; the last one of a retired model frees it."""
        served.users -= 1
        self._free_if_unused(served)

    def _opened(self, source: str) -> TaskModel:
        model = open_model(find_model(source), self.configuration.options)
        try:
            model.load()
        except BaseException:
            model.close()
            raise
        return model

    async def _replace(self, name: str) -> Reloaded:
        assert self.scheduler is not None
        old = self._served[name]
        try:
            model = await self._reopened(self.configuration.models[name])
            if model.spec.task != old.task:
                await in_thread_or_here(model.close)
                return Reloaded(name, changed=False, error=_another_task(name, old.task, model.spec.task))
            new = await in_thread(partial(_warm, name, model))
        except QingyuError as error:
            return Reloaded(name, changed=False, error=error)
        new.join(self.scheduler)
        self._served[name] = new
        old.retired = True
        self._free_if_unused(old)
        return Reloaded(name, changed=new.fingerprint() != old.fingerprint())

    async def _reopened(self, source: str) -> TaskModel:
        try:
            return await in_thread(partial(self._opened, source))
        except QingyuError:
            await asyncio.sleep(REPLACED_SECONDS)  # the folder may have been replaced in between
            return await in_thread(partial(self._opened, source))

    async def _freed(self, served: Served) -> None:
        await in_thread_or_here(served.model.close)
        self.on_freed(served.name)

    def _free_if_unused(self, served: Served) -> None:
        if not served.retired or served.users > 0 or self.scheduler is None:
            return
        served.leave(self.scheduler)
        served.retired = False  # once
        task = asyncio.ensure_future(self._freed(served))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _warm(name: str, model: TaskModel) -> Served:
    """The model, having run; closed if it cannot."""
    lane = Lane(name, model.run_rows, model.plan.token_budget)
    states = None
    if isinstance(model, Embedder) and "token_states" in model.spec.outputs:
        states = Lane(name, model.run_token_states, model.plan.token_budget, rate=lane.rate)
    try:
        rows = _sample(model)
        model.run_rows(rows)  # slower than any other
        for _ in range(3):
            lane.measure(rows)
    except BaseException:
        model.close()
        raise
    return Served(name, model, lane, states)


def _another_task(name: str, expected: Task, found: Task) -> QingyuError:
    from qingyu.errors import UnsupportedModelError

    return UnsupportedModelError(
        f"the new model {name!r} is of another kind",
        expected=f"the task {expected}",
        found=found,
        remedy="Start the server again to change what a model does.",
    )


def _sample(model: TaskModel) -> Sequence[Any]:
    """Rows of about one text of ordinary length."""
    if isinstance(model, Embedder):
        return model.prepare([WARM_UP]).rows
    if isinstance(model, FillMask):
        return model.prepare([model.mask_token + WARM_UP]).rows
    if isinstance(model, QuestionAnswerer):
        return model.prepare([("天气怎么样", WARM_UP)]).rows
    if isinstance(model, (SequenceModel, TokenClassifier)):
        return model.prepare([WARM_UP]).rows
    raise AssertionError(f"no sample for {model!r}")
