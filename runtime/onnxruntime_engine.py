"""Runs a model folder's graph with onnxruntime on the CPU: lazily opened, thread-safe, fork-safe, offline.

Not here: tokenizing, padding and the order of batches (``qingyu.runtime.batching``), and what the vectors
mean (``qingyu.runtime.embedder``). Importing this module does not import onnxruntime: ``import_onnxruntime``
is the one door to it, because its telemetry can only be switched off before it is first imported.

The ``edge`` profile maps the manifest's ``.ort`` file into memory. Its hash is checked when it is opened; whoever
writes into it afterwards changes the weights of a running process, and whoever truncates it kills the process by
SIGBUS, as with any mapped file. So replace a model folder by renaming, as ``qingyu export`` and ``quantize`` do:
the file that is mapped then lives on, unnamed, until it is closed.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, NoReturn, TypeVar

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
from qingyu.runtime.cpu import choose_threads, saturates_byte_products
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.external_data import refuse_external_data
from qingyu.runtime.spec import EdgeFile, ModelSpec, check_file, read_checked

__all__ = [
    "PROFILES",
    "OnnxRuntimeEngine",
    "Profile",
    "Settings",
    "TelemetryWarning",
    "feeds_of",
    "import_onnxruntime",
]

Profile = Literal["throughput", "latency", "edge"]

T = TypeVar("T")

PROVIDERS = ("CPUExecutionProvider",)
# Fused, it takes five times as long as Add and LayerNormalization: a quarter of an INT8 run.
SLOW_FUSIONS = ("SkipLayerNormFusion",)
TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
FATAL = 4  # onnxruntime's highest log severity: all it says otherwise arrives as an exception too

MODEL_FORMAT = "session.load_model_format"

SESSION_ENTRIES: Mapping[str, str] = {
    MODEL_FORMAT: "ONNX",  # whatever the bytes look like: the other format is a second parser
    # Threads that wait for work spin within a run and sleep after it. On two threads, 32 tokens took 1.25 ms,
    # as with spinning always on, which costs 38 ms of CPU after every request; without any spinning 1.80 ms.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}

EXACT_PRODUCTS: Mapping[str, str] = {"session.x64quantprecision": "1"}

INPUTS: Mapping[str, Callable[[TokenBatch], Ids]] = {
    "input_ids": lambda batch: batch.ids,
    "attention_mask": lambda batch: batch.mask,
    "token_type_ids": lambda batch: np.zeros_like(batch.ids) if batch.types is None else batch.types,
    "mask_positions": lambda batch: np.zeros(1, dtype=np.int64) if batch.chosen is None else batch.chosen,
}
VECTORS = ("mask_positions",)  # inputs of one axis; the others have two


class TelemetryWarning(UserWarning):
    """onnxruntime was imported before qingyu could switch its telemetry off."""


@dataclass(frozen=True)
class Settings:
    """How one profile uses the machine.

    ``one_thread_runs``: the caller runs several micro-batches at once, each in one thread, instead of one
    micro-batch in several threads. ``default_threads``: ``None`` is all CPUs this process may use.
    ``token_budget``: tokens of one micro-batch, padding counted; after a larger run the memory that it took
    is given back. ``edge_file``: the manifest's edge file is used instead of the ONNX graph, where it has one
    and the CPU computes exact products with it.
    """

    one_thread_runs: bool
    default_threads: int | None
    token_budget: int
    edge_file: bool = False

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
    "latency": Settings(one_thread_runs=False, default_threads=None, token_budget=1024),
    "edge": Settings(one_thread_runs=False, default_threads=1, token_budget=256, edge_file=True),
}


class OnnxRuntimeEngine:
    """Runs the graph of one model folder; an ``Engine``, a context manager, and picklable.

    Constructing it finds the graph file and reads nothing. The first ``run``, or ``open``, checks the file's
    hash and loads it. Any number of threads may call ``run`` at once. A forked child, and a process that
    unpickles an engine, load the graph anew when they first need it.

    ``profile`` is a name in ``PROFILES``; ``threads``, ``None`` for the profile's own, may not exceed the
    CPUs that this process may use. Raises ``InvalidOptionError`` and ``CorruptFileError``.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, *, profile: Profile = "throughput", threads: int | None = None
    ) -> None:
        if profile not in PROFILES:
            raise InvalidOptionError(
                "option profile",
                expected=f"one of {', '.join(PROFILES)}",
                found=repr(profile),
                remedy="Use throughput for many texts, latency for one at a time, edge for little memory.",
            )
        # A process that unpickles this may stand in another directory.
        self.folder = Path(folder).absolute()
        self.spec = spec
        self.settings = PROFILES[profile]
        self._edge = spec.edge if self.settings.edge_file and not _product_entries(spec) else None
        #: The name of the file that is loaded.
        self.file = spec.graph if self._edge is None else self._edge.file
        self.threads = self.settings.threads(threads)
        self._options: tuple[Profile, int | None] = (profile, threads)
        self._closed = False
        self._session: Any = None
        self._start_afresh()
        _require(self._path, self.file, spec)
        _ENGINES.add(self)

    @property
    def workers(self) -> int:
        """How many threads should call ``run`` at once to use the machine as the profile means to."""
        return self.settings.workers(self.threads)

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
        feeds = feeds_of(batch, self.spec.inputs)
        with self._in_use():
            values: list[Floats] = typed(
                f"running {self._path}",
                # The plain call: binding inputs and outputs measured no faster.
                lambda: self._session.run(list(outputs), feeds, self._run_options(batch)),
            )
        for name, value in zip(outputs, values, strict=True):
            self._check_value(name, value, batch)
        return values

    def with_spec(self, spec: ModelSpec) -> OnnxRuntimeEngine:
        """A new engine for another graph of the same folder, with this one's profile and threads."""
        profile, threads = self._options
        return OnnxRuntimeEngine(self.folder, spec, profile=profile, threads=threads)

    def close(self) -> None:
        """Wait for runs under way, then free the graph. May be called twice."""
        self._note_fork()
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
            with _SESSIONS_CHANGE:
                self._session = None

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        if self._closed:
            raise self._closed_error()
        return _reopen, (self.folder, self.spec, *self._options)

    @property
    def _path(self) -> Path:
        return self.folder / self.file

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

    def _load(self) -> Any:  # noqa: ANN401 - onnxruntime's class, not imported here
        """A session on the file, which is read twice: once to check it, once by onnxruntime.

        Handed the bytes, onnxruntime's session keeps them for good, and load takes twice the file more.
        """
        before = _identity(self._path)
        self._check_content()
        onnxruntime = import_onnxruntime()
        options = session_options(
            onnxruntime,
            threads=self.settings.threads_of_one_run(self.threads),
            entries={
                **_product_entries(self.spec),
                **({} if self._edge is None else _edge_entries(self._edge)),
            },
        )
        with _SESSIONS_CHANGE:
            session = onnxruntime.InferenceSession(
                str(self._path),
                options,
                providers=list(PROVIDERS),
                disabled_optimizers=list(SLOW_FUSIONS),
                enable_fallback=0,
            )
        if _identity(self._path) != before:
            raise CorruptFileError(
                f"{self._path} was replaced while it was loaded",
                expected="the file whose hash was checked",
                found="another one",
                remedy="Open the model again once the folder is complete.",
            )
        check_signature(session, self.spec, str(self._path))
        return session

    def _check_content(self) -> None:
        record = self.spec.files[self.file]
        if self._edge is not None:
            # In pieces, so that the file is never in memory of this process alone. No tensor of this format can
            # name another file.
            check_file(self.folder, self.file, record)
            return
        refuse_external_data(read_checked(self.folder, self.file, record), str(self._path))

    def _run_options(self, batch: TokenBatch) -> Any:  # noqa: ANN401
        """Give memory back after a run beyond the token budget, unless it is one text of ordinary length.

        After every run it would cost a fifth of the speed on large batches, and after none one large batch
        would stay in memory for good.
        """
        options = import_onnxruntime().RunOptions()
        if batch.ids.size > max(self.settings.token_budget, self.spec.max_tokens):
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _check_value(self, name: str, value: Floats, batch: TokenBatch) -> None:
        masks = 1 if batch.chosen is None else len(batch.chosen)
        rows, tokens = batch.ids.shape
        shape = _output_shape(name, self.spec, rows, tokens, masks)
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


def import_onnxruntime() -> ModuleType:
    """The module ``onnxruntime``, imported with its telemetry off unless the environment says otherwise.

    Since 1.29 it starts an uploading thread when imported, which keeps a device id under the home folder
    and makes the exit of a forked child hang. ``TelemetryWarning``, once, when somebody else imported it
    first and may have left it on: no call switches it off afterwards.
    """
    module = sys.modules.get("onnxruntime")
    if hasattr(module, "InferenceSession") and TELEMETRY_SWITCH not in os.environ:
        _warn_of_telemetry(str(getattr(module, "__version__", "")))
    # For this process, or where that is too late for those that it starts. A user's own value stands.
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    try:
        import onnxruntime
    except ImportError as error:
        # Ctrl-C while the extension module starts arrives as an ImportError caused by it.
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise

    return onnxruntime  # type: ignore[no-any-return]


def feeds_of(batch: TokenBatch, inputs: Sequence[str]) -> dict[str, Ids]:
    """What a graph with these inputs is given for a micro-batch."""
    return {name: INPUTS[name](batch) for name in inputs}


def check_signature(session: Any, spec: ModelSpec, origin: str) -> None:  # noqa: ANN401
    """Raise ``GraphError`` unless the session's inputs and outputs are those of the spec.

    Names, element types and ranks are compared, and the sizes of last axes where the graph states them
    (every run checks them again). Rows and tokens must be free.
    """
    inputs = {
        name: _Tensor("tensor(int64)", (None,) if name in VECTORS else (None, None)) for name in spec.inputs
    }
    outputs = {
        name: _Tensor("tensor(float)", _output_shape(name, spec, None, None, None)) for name in spec.outputs
    }
    _compare("inputs", inputs, session.get_inputs(), origin)
    _compare("outputs", outputs, session.get_outputs(), origin)


@dataclass(frozen=True)
class _Tensor:
    """An input or output: element type and sizes, ``None`` for an axis of any size."""

    type: str
    sizes: tuple[int | None, ...]

    def admits(self, other: _Tensor) -> bool:
        """Whether a graph that declares ``other`` can be used where this is wanted."""
        pairs = zip(self.sizes, other.sizes, strict=False)
        return (
            self.type == other.type
            and len(self.sizes) == len(other.sizes)
            and all(found is None or found == wanted for wanted, found in pairs)
        )

    def __str__(self) -> str:
        return f"{self.type} of shape ({', '.join('any' if n is None else str(n) for n in self.sizes)})"


def _compare(kind: str, wanted: Mapping[str, _Tensor], declared: Sequence[Any], origin: str) -> None:
    found = {
        node.name: _Tensor(node.type, tuple(n if isinstance(n, int) else None for n in node.shape))
        for node in declared
    }
    if wanted.keys() != found.keys():
        _refuse_graph(origin, kind, ", ".join(wanted), ", ".join(found) or "none")
    for name, tensor in wanted.items():
        if not tensor.admits(found[name]):
            _refuse_graph(origin, f"{kind} {name}", str(tensor), str(found[name]))


def _output_shape(
    name: str, spec: ModelSpec, rows: int | None, tokens: int | None, masks: int | None
) -> tuple[int | None, ...]:
    return {
        "pooled": (rows, spec.dim),
        "logits": (rows, len(spec.labels)),
        "token_logits": (rows, tokens, len(spec.labels)),
        "mask_logits": (masks, spec.architecture.vocab_size),
        "chosen_states": (masks if "mask_positions" in spec.inputs else rows, spec.architecture.hidden_size),
    }.get(name, (rows, tokens, spec.architecture.hidden_size))


def _refuse_graph(origin: str, what: str, expected: str, found: str) -> NoReturn:
    raise GraphError(
        f"{origin} is not the graph that the manifest describes: {what}",
        expected=expected,
        found=found,
        remedy="Export or quantize the model again.",
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the one that takes its place; the content is for the hash."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


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


def _edge_entries(edge: EdgeFile) -> dict[str, str]:
    return {**edge.session, MODEL_FORMAT: "ORT"}


def _product_entries(spec: ModelSpec) -> Mapping[str, str]:
    """Exact integer products where the CPU's fast ones saturate: slower there, and right (docs/cpus.md).

    onnxruntime changes the weights for it while it optimizes a graph, which it does not do with an edge file
    (measured: on an emulated Haswell its products saturate as before). So such CPUs are given the graph.
    """
    return EXACT_PRODUCTS if spec.precision == "int8" and saturates_byte_products() else {}


def session_options(
    onnxruntime: ModuleType, *, threads: int, entries: Mapping[str, str] | None = None
) -> Any:  # noqa: ANN401
    """The options of every session: ``threads`` work on one run, and nothing is written to stderr.

    ``entries`` are configuration entries besides ``SESSION_ENTRIES``, or instead of those of the same name.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    # Stated even where it is 1: left out, onnxruntime takes all cores and binds threads to them.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans for one shape, and ours vary
    for key, value in {**SESSION_ENTRIES, **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    return options


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


def _warn_of_telemetry(version: str) -> None:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= (1, 29):
        warnings.warn(
            f"onnxruntime was imported before qingyu without {TELEMETRY_SWITCH}=1 in the environment, so its "
            "telemetry may be on in this process. Set the variable, or open a model before that import.",
            TelemetryWarning,
            stacklevel=3,
        )


def _reopen(folder: Path, spec: ModelSpec, profile: Profile, threads: int | None) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(folder, spec, profile=profile, threads=threads)


# Forking. A session that a child inherits must be neither used nor destroyed there: its threads do not exist
# in the child (microsoft/onnxruntime#31961).
_ENGINES: weakref.WeakSet[OnnxRuntimeEngine] = weakref.WeakSet()
_ABANDONED: list[object] = []
_CHILD = threading.Lock()
# Held while a session is made or freed: making several at once is not promised to be safe
# (microsoft/onnxruntime#27089), and a fork in the middle would leave locks of the library taken in the child.
_SESSIONS_CHANGE = threading.RLock()


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
    _SESSIONS_CHANGE.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_SESSIONS_CHANGE.acquire,
        after_in_parent=_SESSIONS_CHANGE.release,
        after_in_child=_after_fork_in_child,
    )
