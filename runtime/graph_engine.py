"""What every engine does with the graph of one model folder: lazily opened, thread-safe, fork-safe, values checked.

Not here: loading and running a graph with a library (``qingyu.runtime.onnxruntime_engine``, ``openvino_engine``).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from qingyu.errors import (
    ClosedError,
    CorruptFileError,
    GraphError,
    InvalidOptionError,
    ManifestError,
    MemoryBudgetError,
    QingyuError,
)
from qingyu.runtime.cpu import choose_threads
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.spec import ModelSpec

__all__ = [
    "PROFILES",
    "SESSIONS_CHANGE",
    "VECTORS",
    "GraphEngine",
    "Profile",
    "Settings",
    "feeds_of",
    "identity",
    "output_shape",
    "settings_of",
    "typed",
]

Profile = Literal["throughput", "latency", "edge"]

T = TypeVar("T")
E = TypeVar("E", bound="GraphEngine")

INPUTS: Mapping[str, Callable[[TokenBatch], Ids]] = {
    "input_ids": lambda batch: batch.ids,
    "attention_mask": lambda batch: batch.mask,
    "token_type_ids": lambda batch: np.zeros_like(batch.ids) if batch.types is None else batch.types,
    "mask_positions": lambda batch: np.zeros(1, dtype=np.int64) if batch.chosen is None else batch.chosen,
}
VECTORS = ("mask_positions",)  # inputs of one axis; the others have two


@dataclass(frozen=True)
class Settings:
    """How one profile uses the machine.

    ``one_thread_runs``: the caller runs several micro-batches at once, each in one thread, instead of one
    micro-batch in several threads. ``default_threads``: ``None`` is all CPUs this process may use.
    ``token_budget``: tokens of one micro-batch, padding counted; after a larger run the memory that it took
    is given back. ``edge_file``: the manifest's edge file is used instead of the ONNX graph, where it has one
    and the CPU computes exact products with it. ``spinning_us``: microseconds for which threads go on looking for work
    after a run, so that the next one need not wake them.
    """

    one_thread_runs: bool
    default_threads: int | None
    token_budget: int
    edge_file: bool = False
    spinning_us: int = 0

    def threads(self, requested: int | None) -> int:
        """Threads in all; raises ``InvalidOptionError`` for more than there are CPUs."""
        return choose_threads(self.default_threads if requested is None else requested)

    def workers(self, threads: int) -> int:
        """How many micro-batches the caller should run at once."""
        return threads if self.one_thread_runs else 1

    def threads_of_one_run(self, threads: int) -> int:
        """How many threads work on one micro-batch."""
        return 1 if self.one_thread_runs else threads


# Measured: 2 cores of an AMD EPYC with AVX512-VNNI, onnxruntime 1.32, row-wise INT8 graph of the
# bge-small-zh shape, tokens/s or median of a run, and resident memory.
# - The memory arena stays on: without it 26,000 instead of 29,000 tokens/s with two workers, 13,000 instead
#   of 17,000 with one, and more memory, not less (malloc keeps more than the arena). One batch of 16 x 512
#   tokens makes 195 MB 577 for good; given back after that run alone, 210. Given back after every run, many
#   large batches take a fifth longer, and small ones keep more memory, not less.
# - Pre-packed weights stay: without them one run of 12 tokens takes 1.66 instead of 0.74 ms, for 6 MB less.
#   An edge file says otherwise for itself.
# - Graph optimization levels differ by less than 3% in speed, so the default, all, stays.
PROFILES: Mapping[Profile, Settings] = {
    "throughput": Settings(one_thread_runs=True, default_threads=None, token_budget=512),
    "latency": Settings(one_thread_runs=False, default_threads=None, token_budget=1024, spinning_us=2000),
    "edge": Settings(one_thread_runs=False, default_threads=1, token_budget=256, edge_file=True),
}


def settings_of(profile: Profile) -> Settings:
    """The settings of a profile; ``InvalidOptionError`` for any other name."""
    if profile not in PROFILES:
        raise InvalidOptionError(
            "option profile",
            expected=f"one of {', '.join(PROFILES)}",
            found=repr(profile),
            remedy="Use throughput for many texts, latency for one at a time, edge for little memory.",
        )
    return PROFILES[profile]


class GraphEngine:
    """Runs the graph of one model folder; an ``Engine``, a context manager, and picklable.

    Constructing it reads nothing. The first ``run``, or ``open``, checks the file's hash and loads it. Any number of
    threads may call ``run`` at once. A forked child, and a process that unpickles an engine, load the graph anew when
    they first need it.
    """

    #: The name of the library that runs the graph.
    library: ClassVar[str]

    def __init__(
        self, folder: Path, spec: ModelSpec, *, file: str, settings: Settings, threads: int | None
    ) -> None:
        # A process that unpickles this may stand in another directory.
        self.folder = Path(folder).absolute()
        self.spec = spec
        #: The name of the file that is loaded.
        self.file = file
        self.settings = settings
        self.threads = settings.threads(threads)
        self._closed = False
        self._session: Any = None
        self._path = self.folder / file
        self._running_it = f"running {self._path}"
        self._start_afresh()
        _require(self._path, file, spec)
        _ENGINES.add(self)

    def _load(self) -> Any:  # noqa: ANN401 - a class of the library, which is not imported here
        """What runs the file, its content checked before."""
        raise NotImplementedError

    def _infer(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        """The named outputs, by ``_session``."""
        raise NotImplementedError

    def version(self) -> str:
        """The version of the library, which may import it."""
        raise NotImplementedError

    def with_spec(self, spec: ModelSpec) -> GraphEngine:
        """A new engine for another graph of the same folder, with this one's profile and threads."""
        raise NotImplementedError

    @property
    def workers(self) -> int:
        """How many threads should call ``run`` at once to use the machine as the profile means to."""
        return self.settings.workers(self.threads)

    @property
    def heads_at_once(self) -> int:
        """How many heads' attention scores a run holds at once."""
        return self.spec.architecture.heads

    def unread_bytes(self) -> int:
        """Of the memory that the loaded graph may take, what it has not taken yet."""
        return 0

    def open(self) -> None:
        """Check and load the graph now, if that has not been done.

        Raises ``CorruptFileError``, ``GraphError``, ``MemoryBudgetError`` and ``ClosedError``.
        """
        with self._in_use():
            pass

    def run(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        """The named outputs for one micro-batch, as the spec describes them, in the order asked for.

        Raises what ``open`` raises; ``InvalidOptionError`` for a name that the model does not give; and
        ``MemoryBudgetError`` when memory runs out, after which the engine is still good.
        """
        unknown = [name for name in outputs if name not in self.spec.outputs]
        if unknown or not outputs:
            raise InvalidOptionError(
                f"outputs of {self.spec.name}",
                expected=f"names among {', '.join(self.spec.outputs)}",
                found=", ".join(unknown) or "none",
                remedy="Export the model with the outputs that are needed.",
            )
        with self._in_use():
            values = typed(self._running_it, lambda: self._infer(batch, outputs))
        for name, value in zip(outputs, values, strict=True):
            self._check_value(name, value, batch)
        return values

    def close(self) -> None:
        """Wait for runs under way, then free the graph. May be called twice."""
        self._note_fork()
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
            with SESSIONS_CHANGE:
                self._session = None

    def __enter__(self: E) -> E:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Within the block ``_session`` is open. No other name may hold it, or ``close`` would not free it."""
        self._note_fork()
        with self._idle:
            if self._closed:
                raise self._closed_error()
            if self._session is None:
                self._session = typed(f"loading {self._path}", self._load)
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _check_value(self, name: str, value: Floats, batch: TokenBatch) -> None:
        masks = 1 if batch.chosen is None else len(batch.chosen)
        rows, tokens = batch.ids.shape
        shape = output_shape(name, self.spec, rows, tokens, masks)
        if value.shape != shape:
            self._refuse_value(name, f"shape {shape}", f"shape {value.shape}")
        if not np.isfinite(value).all():
            self._refuse_value(name, "finite numbers", "NaN or infinity")

    def _refuse_value(self, name: str, expected: str, found: str) -> None:
        raise GraphError(
            f"{self._path} gave a wrong {name}",
            expected=expected,
            found=found,
            remedy="Export or quantize the model again, and run `qingyu doctor` to test this machine.",
        )

    def _closed_error(self) -> ClosedError:
        return ClosedError(
            f"{self.spec.name} was closed",
            expected="an open engine",
            found="one after close()",
            remedy="Open the model again.",
        )

    def _note_fork(self) -> None:
        """Catch a child that was forked without Python's knowledge, where the hook below did not run."""
        if self._pid != os.getpid():
            with _CHILD:
                if self._pid != os.getpid():
                    self._abandon()

    def _abandon(self) -> None:
        """In a forked child: leave the parent's session alone and begin with nothing."""
        _keep_for_ever(self._session)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._idle = threading.Condition()
        self._session = None
        self._running = 0
        self._pid = os.getpid()


def output_shape(
    name: str, spec: ModelSpec, rows: int | None, tokens: int | None, masks: int | None
) -> tuple[int | None, ...]:
    """The shape of an output for so many rows, tokens and masks, ``None`` where they are not known."""
    return {
        "pooled": (rows, spec.dim),
        "logits": (rows, len(spec.labels)),
        "token_logits": (rows, tokens, len(spec.labels)),
        "mask_logits": (masks, spec.architecture.vocab_size),
        "chosen_states": (masks if "mask_positions" in spec.inputs else rows, spec.architecture.hidden_size),
    }.get(name, (rows, tokens, spec.architecture.hidden_size))


def identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the one that takes its place; the content is for the hash."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def feeds_of(batch: TokenBatch, inputs: Sequence[str]) -> dict[str, Ids]:
    """What a graph with these inputs is given for a micro-batch."""
    return {name: INPUTS[name](batch) for name in inputs}


def _require(path: Path, file: str, spec: ModelSpec) -> None:
    """Refuse at once what no run could use; the content is checked when it is loaded."""
    unknown = [name for name in spec.inputs if name not in INPUTS]
    if unknown or file not in spec.files:
        raise ManifestError(
            f"the manifest of {spec.name} cannot be used",
            expected=f"inputs among {', '.join(INPUTS)} and a record of {file}",
            found=f"inputs {', '.join(spec.inputs)}, files {', '.join(spec.files) or 'none'}",
            remedy="Export the model again.",
        )
    try:
        usable = path.is_file()
    except OSError:
        usable = False
    if not usable:
        raise CorruptFileError(
            f"no graph at {path}",
            expected="a file",
            found="something that is not a file" if os.path.lexists(path) else "nothing there",
            remedy="Export, quantize or copy the model again.",
        )


OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "cannot allocate memory")


def typed(doing: str, call: Callable[[], T]) -> T:
    """The call's value; whatever a lower library raises becomes one of ours.

    Ours is raised outside the ``except`` block: as its context the other would keep the session alive.
    """
    try:
        return call()
    except QingyuError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no base but Exception
        failure = _translate(doing, error)
    raise failure


def _translate(doing: str, error: Exception) -> QingyuError:
    said = " ".join(str(error).split())[:400] or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in said.lower() for sign in OUT_OF_MEMORY):
        return MemoryBudgetError(
            f"memory ran out while {doing}",
            expected="enough for this micro-batch",
            found=said,
            remedy="Set or lower max_memory_mb, or shorten the texts.",
        )
    return GraphError(
        f"failed {doing}",
        expected="a graph that this onnxruntime can run",
        found=said,
        remedy="Export or quantize the model again.",
    )


# Forking. A session that a child inherits must be neither used nor destroyed there: its threads do not exist
# in the child (microsoft/onnxruntime#31961).
_ENGINES: weakref.WeakSet[GraphEngine] = weakref.WeakSet()
_ABANDONED: list[object] = []
_CHILD = threading.Lock()
# Held while a session is made or freed: making several at once is not promised to be safe
# (microsoft/onnxruntime#27089), and a fork in the middle would leave locks of the library taken in the child.
SESSIONS_CHANGE = threading.RLock()


def _keep_for_ever(session: object | None) -> None:
    """Leak a session, also beyond the clearing of modules when Python exits."""
    if session is None:
        return
    _ABANDONED.append(session)
    try:
        import ctypes
    except ImportError:
        return  # a Python without it: kept until the modules are cleared
    for part in (session, getattr(session, "_sess", None)):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))


def _after_fork_in_child() -> None:
    global _CHILD
    _CHILD = threading.Lock()
    for engine in list(_ENGINES):
        engine._abandon()
    SESSIONS_CHANGE.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=SESSIONS_CHANGE.acquire,
        after_in_parent=SESSIONS_CHANGE.release,
        after_in_child=_after_fork_in_child,
    )
