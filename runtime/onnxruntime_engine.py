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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NoReturn

from qingyu.errors import CorruptFileError, GraphError
from qingyu.runtime.cpu import saturates_byte_products
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.external_data import refuse_external_data
from qingyu.runtime.graph_engine import (
    PROFILES,
    SESSIONS_CHANGE,
    VECTORS,
    GraphEngine,
    Profile,
    Settings,
    feeds_of,
    identity,
    output_shape,
    settings_of,
    typed,
)
from qingyu.runtime.memory import unread_bytes
from qingyu.runtime.spec import EdgeFile, ModelSpec, check_file, read_checked

__all__ = [
    "PROFILES",
    "OnnxRuntimeEngine",
    "Profile",
    "Settings",
    "TelemetryWarning",
    "feeds_of",
    "import_onnxruntime",
    "product_entries",
    "session_options",
    "typed",
]

PROVIDERS = ("CPUExecutionProvider",)
# Fused, it takes five times as long as Add and LayerNormalization: a quarter of an INT8 run.
SLOW_FUSIONS = ("SkipLayerNormFusion",)
TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
FATAL = 4  # onnxruntime's highest log severity: all it says otherwise arrives as an exception too

MODEL_FORMAT = "session.load_model_format"

SESSION_ENTRIES: Mapping[str, str] = {
    MODEL_FORMAT: "ONNX",  # whatever the bytes look like: the other format is a second parser
    # Threads that wait for work spin within a run and sleep after it: onnxruntime's own way costs 38 ms of CPU after
    # every request. Where waking them is slow, that is felt by the next request; see ``Settings.spinning_us``.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}

EXACT_PRODUCTS: Mapping[str, str] = {"session.x64quantprecision": "1"}


class TelemetryWarning(UserWarning):
    """onnxruntime was imported before qingyu could switch its telemetry off."""


class OnnxRuntimeEngine(GraphEngine):
    """Runs the graph of one model folder with onnxruntime.

    ``profile`` is a name in ``PROFILES``; ``threads``, ``None`` for the profile's own, may not exceed the
    CPUs that this process may use. Raises ``InvalidOptionError`` and ``CorruptFileError``.
    """

    library: ClassVar[str] = "onnxruntime"

    def __init__(
        self, folder: Path, spec: ModelSpec, *, profile: Profile = "throughput", threads: int | None = None
    ) -> None:
        settings = settings_of(profile)
        self._edge = spec.edge if settings.edge_file and not product_entries(spec.precision) else None
        self._options: tuple[Profile, int | None] = (profile, threads)
        file = spec.graph if self._edge is None else self._edge.file
        super().__init__(folder, spec, file=file, settings=settings, threads=threads)

    def version(self) -> str:
        """The version of onnxruntime."""
        return str(import_onnxruntime().__version__)

    @property
    def heads_at_once(self) -> int:
        """How many heads' attention scores a run holds at once."""
        some = None if self._edge is None else self._edge.heads_at_once
        return super().heads_at_once if some is None else some

    def unread_bytes(self) -> int:
        """What is left to be read of the mapped file: rows of the embedding table, mostly."""
        return 0 if self._edge is None else unread_bytes(self._path)

    def with_spec(self, spec: ModelSpec) -> OnnxRuntimeEngine:
        """A new engine for another graph of the same folder, with this one's profile and threads."""
        profile, threads = self._options
        return OnnxRuntimeEngine(self.folder, spec, profile=profile, threads=threads)

    def __reduce__(self) -> tuple[object, ...]:
        if self._closed:
            raise self._closed_error()
        return _reopen, (self.folder, self.spec, *self._options)

    def _load(self) -> Any:  # noqa: ANN401 - onnxruntime's class, not imported here
        """A session on the file, which is read twice: once to check it, once by onnxruntime.

        Handed the bytes, onnxruntime's session keeps them for good, and load takes twice the file more.
        """
        before = identity(self._path)
        self._check_content()
        onnxruntime = import_onnxruntime()
        options = session_options(
            onnxruntime,
            threads=self.settings.threads_of_one_run(self.threads),
            entries={
                **product_entries(self.spec.precision),
                **_spinning_entries(self.settings),
                **({} if self._edge is None else _edge_entries(self._edge)),
            },
        )
        with SESSIONS_CHANGE:
            session = onnxruntime.InferenceSession(
                str(self._path),
                options,
                providers=list(PROVIDERS),
                disabled_optimizers=list(SLOW_FUSIONS),
                enable_fallback=0,
            )
        if identity(self._path) != before:
            raise CorruptFileError(
                f"{self._path} was replaced while it was loaded",
                expected="the file whose hash was checked",
                found="another one",
                remedy="Open the model again once the folder is complete.",
            )
        check_signature(session, self.spec, str(self._path))
        return session

    def _infer(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        # The plain call: binding inputs and outputs measured no faster.
        values: list[Floats] = self._session.run(
            list(outputs), feeds_of(batch, self.spec.inputs), self._run_options(batch)
        )
        return values

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
        if batch.ids.size <= max(self.settings.token_budget, self.spec.max_tokens):
            return None
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options


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


def check_signature(session: Any, spec: ModelSpec, origin: str) -> None:  # noqa: ANN401
    """Raise ``GraphError`` unless the session's inputs and outputs are those of the spec.

    Names, element types and ranks are compared, and the sizes of last axes where the graph states them
    (every run checks them again). Rows and tokens must be free.
    """
    inputs = {
        name: _Tensor("tensor(int64)", (None,) if name in VECTORS else (None, None)) for name in spec.inputs
    }
    outputs = {
        name: _Tensor("tensor(float)", output_shape(name, spec, None, None, None)) for name in spec.outputs
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


def _refuse_graph(origin: str, what: str, expected: str, found: str) -> NoReturn:
    raise GraphError(
        f"{origin} is not the graph that the manifest describes: {what}",
        expected=expected,
        found=found,
        remedy="Export or quantize the model again.",
    )


def _edge_entries(edge: EdgeFile) -> dict[str, str]:
    return {**edge.session, MODEL_FORMAT: "ORT"}


def _spinning_entries(settings: Settings) -> Mapping[str, str]:
    if not settings.spinning_us:
        return {}
    return {
        "session.force_spinning_stop": "0",
        "session.intra_op.spin_duration_us": str(
            settings.spinning_us
        ),  # versions that do not know it spin for longer
    }


def product_entries(precision: str) -> Mapping[str, str]:
    """For a graph of this precision exact integer products where the CPU's fast ones saturate (docs/cpus.md).

    They are slower there, and right.

    onnxruntime changes the weights for it while it optimizes a graph, which it does not do with an edge file
    (measured: on an emulated Haswell its products saturate as before). So such CPUs are given the graph.
    """
    return EXACT_PRODUCTS if precision == "int8" and saturates_byte_products() else {}


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
