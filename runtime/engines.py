"""Which engine a model is opened with: onnxruntime, or OpenVINO where that is installed and was measured faster.

``auto`` takes OpenVINO for the throughput profile if the folder has a file for it (``qingyu quantize --openvino``),
the package is installed, no memory budget is set, and the measure that the manifest holds says on a CPU like this
one that it is faster by more than a tenth. It starts slower and takes more memory, so that it has to be worth it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from qingyu.errors import InvalidOptionError, MissingExtraError, UnsupportedModelError
from qingyu.runtime.cpu import cpu_flags, cpu_model
from qingyu.runtime.graph_engine import GraphEngine, Profile
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import ModelSpec, OpenVinoFile

__all__ = ["EngineName", "check_engine", "choose_engine", "openvino_installed"]

EngineName = Literal["auto", "onnxruntime", "openvino"]
# Where the engine is that needs an extra: nothing of the runtime but this imports it.
OPENVINO = ("qingyu.runtime.openvino.engine", "OpenVinoEngine")
WORTH_IT = 1.1  # times onnxruntime's speed


def check_engine(engine: str, *, profile: Profile, max_memory_mb: int | None) -> None:
    """Raise ``InvalidOptionError`` for a name that is no engine, or options that it does not have."""
    if engine not in get_args(EngineName):
        raise InvalidOptionError(
            "engine",
            expected=f"one of {', '.join(map(repr, get_args(EngineName)))}",
            found=repr(engine),
            remedy="Use one of them.",
        )
    if engine == "openvino" and (profile == "edge" or max_memory_mb is not None):
        raise InvalidOptionError(
            "engine 'openvino'",
            expected="the profile throughput or latency, and no max_memory_mb",
            found=f"the profile {profile}" if profile == "edge" else f"max_memory_mb={max_memory_mb}",
            remedy='Use engine="onnxruntime", whose memory can be bounded.',
        )


def choose_engine(
    folder: Path,
    spec: ModelSpec,
    *,
    engine: EngineName,
    profile: Profile,
    threads: int | None,
    max_memory_mb: int | None,
    runs_openvino: bool,
) -> GraphEngine:
    """The engine for a model folder; ``runs_openvino`` is whether its task can do with pooled vectors alone.

    Raises ``UnsupportedModelError`` when OpenVINO is asked for and the folder has no file for it, and
    ``MissingExtraError`` when it is not installed.
    """
    record = spec.openvino if runs_openvino else None
    if engine == "openvino" and record is None:
        raise UnsupportedModelError(
            f"{folder} cannot be run by OpenVINO",
            expected="an embedding model with a file for OpenVINO, opened for its vectors",
            found=f"the task {spec.task}, files {', '.join(spec.files)}",
            remedy='Make one with `qingyu quantize --openvino`, or use engine="onnxruntime".',
        )
    wanted = engine == "openvino" or (
        engine == "auto"
        and record is not None
        and profile == "throughput"
        and max_memory_mb is None
        and _faster_here(record)
    )
    if not wanted:
        return OnnxRuntimeEngine(folder, spec, profile=profile, threads=threads)
    if not openvino_installed():
        if engine == "openvino":
            raise MissingExtraError(
                "the extra 'openvino' is not installed",
                expected="the package openvino",
                found="no openvino",
                remedy='Run: pip install "qingyu[openvino]", or use engine="onnxruntime".',
            )
        return OnnxRuntimeEngine(folder, spec, profile=profile, threads=threads)
    module, name = OPENVINO
    opened: GraphEngine = getattr(import_module(module), name)(folder, spec, profile=profile, threads=threads)
    return opened


def openvino_installed() -> bool:
    """Whether the package openvino can be found; does not load it."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"] is not None
    return find_spec("openvino") is not None


def _faster_here(record: OpenVinoFile) -> bool:
    """Whether the file was measured to be worth it on a CPU like this one."""
    if record.speed is None or record.speed < WORTH_IT or record.certificate is None:
        return False
    measured: Any = record.certificate.get("environment")
    if not isinstance(measured, dict):
        return False
    return (measured.get("cpu"), measured.get("cpu_flags")) == (cpu_model(), list(cpu_flags()))
