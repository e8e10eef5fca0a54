"""Runs a model folder's OpenVINO file on the CPU, with the package ``openvino`` (extra ``openvino``).

The file is ONNX with quantized activations and weights marked as such (``qingyu.quantize.openvino``); OpenVINO makes
integer products with everything around them fused of it. It gives pooled vectors only.

OpenVINO prepares its kernels for each shape that it meets, which takes milliseconds and megabytes. So batches are
padded to one of about a hundred lengths. What they take cannot be bounded beforehand, which is why there is no
memory budget with this engine. Importing this module does not import openvino: ``import_openvino`` is the one door.

Not here: which engine a model is opened with (``qingyu.runtime.engines``).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from qingyu.errors import GraphError, MissingExtraError
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.external_data import refuse_external_data
from qingyu.runtime.graph_engine import SESSIONS_CHANGE, GraphEngine, Profile, feeds_of, settings_of
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import ModelSpec, read_checked

__all__ = ["OpenVinoEngine", "bucket", "import_openvino"]

OUTPUT = "pooled"
TELEMETRY = "openvino_telemetry"
# Prepared kernels that are kept, about twenty for each shape. What is beyond is prepared anew.
KERNELS = 4000
EXACT = 32  # tokens up to which every length is a shape of its own; above there are 16 to 32 an octave


class OpenVinoEngine(GraphEngine):
    """Runs the OpenVINO file of one model folder; ``spec`` is then that of the file.

    ``profile`` and ``threads`` as in ``OnnxRuntimeEngine``. Raises ``InvalidOptionError`` and ``CorruptFileError``, and
    ``MissingExtraError`` when it is first used without the package.
    """

    library: ClassVar[str] = "openvino"

    def __init__(
        self, folder: Path, spec: ModelSpec, *, profile: Profile = "throughput", threads: int | None = None
    ) -> None:
        self._options: tuple[Profile, int | None] = (profile, threads)
        self._given = spec
        own = _described(spec)
        super().__init__(folder, own, file=own.graph, settings=settings_of(profile), threads=threads)

    def version(self) -> str:
        """The version of openvino."""
        return str(import_openvino().__version__)

    def with_spec(self, spec: ModelSpec) -> GraphEngine:
        """An engine for another graph of the same folder, which only onnxruntime runs."""
        profile, threads = self._options
        whole = dataclasses.replace(spec, outputs=self._given.outputs)
        return OnnxRuntimeEngine(self.folder, whole, profile=profile, threads=threads)

    def __reduce__(self) -> tuple[object, ...]:
        if self._closed:
            raise self._closed_error()
        return _reopen, (self.folder, self._given, *self._options)

    def _load(self) -> Any:  # noqa: ANN401 - as in the base class
        data = read_checked(self.folder, self.file, self.spec.files[self.file])
        refuse_external_data(data, str(self._path))
        openvino = import_openvino()
        with SESSIONS_CHANGE:
            core = openvino.Core()
            model = core.read_model(data, b"")
            compiled = core.compile_model(model, "CPU", self._configuration())
        _check_signature(compiled, self.spec, str(self._path))
        return _Compiled(compiled)

    def _configuration(self) -> dict[str, Any]:
        streams = self.threads if self.settings.one_thread_runs else 1
        return {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # other processes and quotas decide where threads run
            "CPU_RUNTIME_CACHE_CAPACITY": str(KERNELS),
        }

    def _infer(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        vectors = self._session.run(feeds_of(_widened(batch), self.spec.inputs))
        return [vectors for _ in outputs]


@dataclass(frozen=True)
class _Compiled:
    """A compiled model and its requests that are not in use; each serves one run at a time."""

    model: Any
    free: deque[Any] = field(default_factory=deque)

    def run(self, feeds: dict[str, Any]) -> Floats:
        try:
            request = self.free.pop()
        except IndexError:
            request = self.model.create_infer_request()
        try:
            # The inputs are not copied; they live until the end of this call.
            result: Floats = request.infer(feeds, share_inputs=True)[self.model.output(OUTPUT)]
        finally:
            self.free.append(request)
        return result


def bucket(tokens: int) -> int:
    """The length that a batch of so many tokens is padded to: itself up to 32, above at most a sixteenth more.

    >>> [bucket(tokens) for tokens in (7, 32, 33, 48, 65, 500)]
    [7, 32, 34, 48, 68, 512]
    """
    step = 1 << max(0, (tokens - 1).bit_length() - (EXACT.bit_length() - 1))
    return -(-tokens // step) * step


def _widened(batch: TokenBatch) -> TokenBatch:
    rows, tokens = batch.ids.shape
    more = bucket(tokens) - tokens
    if not more:
        return batch
    ids, mask = (np.zeros((rows, tokens + more), dtype=np.int64) for _ in range(2))
    ids[:, :tokens], mask[:, :tokens] = batch.ids, batch.mask
    return dataclasses.replace(batch, ids=ids, mask=mask)


def import_openvino() -> ModuleType:
    """The module ``openvino``, imported without the package that sends its telemetry.

    When imported, openvino 2026 writes an identifier below the home folder and reports to a server that it was
    (measured: with openvino-telemetry 2025.2, opt-out by a file in the home folder). Without openvino-telemetry it
    works and does neither, so that package is hidden for the moment of the import.
    """
    try:
        if "openvino" not in sys.modules:
            with _IMPORT:
                _import_hidden()
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            "the extra 'openvino' is not installed",
            expected="the package openvino",
            found=str(error),
            remedy='Run: pip install "qingyu[openvino]", or use engine="onnxruntime".',
        ) from None
    return openvino  # type: ignore[no-any-return]


_IMPORT = threading.Lock()


def _import_hidden() -> None:
    hidden = TELEMETRY not in sys.modules
    if hidden:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment] # documented: importing it then fails
    try:
        import openvino  # noqa: F401
    finally:
        if hidden:
            sys.modules.pop(TELEMETRY, None)


def _described(spec: ModelSpec) -> ModelSpec:
    """The spec of the OpenVINO file of a model."""
    own = spec.openvino
    assert own is not None  # qingyu.runtime.engines asks before
    golden = spec.golden
    return dataclasses.replace(
        spec,
        graph=own.file,
        outputs=(OUTPUT,),
        edge=None,
        golden=None if golden is None else dataclasses.replace(golden, least_cosine=own.least_cosine),
        certificate=own.certificate,
    )


def _check_signature(compiled: Any, spec: ModelSpec, origin: str) -> None:  # noqa: ANN401 - openvino's class
    """Raise ``GraphError`` unless the inputs and outputs are those of the spec, by name and number of axes."""
    wanted = {"inputs": dict.fromkeys(spec.inputs, 2), "outputs": {OUTPUT: 2}}
    found = {
        kind: {_name(port, wanted[kind]): len(port.partial_shape) for port in getattr(compiled, kind)}
        for kind in wanted
    }
    for kind, ports in wanted.items():
        if found[kind] != ports:
            raise GraphError(
                f"{origin} is not the graph that the manifest describes: {kind}",
                expected=str(ports),
                found=str(found[kind]),
                remedy="Quantize the model again.",
            )


def _name(port: Any, wanted: Container[str]) -> str:  # noqa: ANN401 - openvino's class
    """The name of an input or output that is wanted, for it may have others too, or any."""
    names = sorted(port.get_names())
    return next((name for name in names if name in wanted), ", ".join(names))


def _reopen(folder: Path, spec: ModelSpec, profile: Profile, threads: int | None) -> OpenVinoEngine:
    return OpenVinoEngine(folder, spec, profile=profile, threads=threads)
