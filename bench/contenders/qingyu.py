"""qingyu itself: FP32, INT8 in each profile, and the OpenVINO engine where this version and machine have it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qingyu.bench.contenders.contract import Contender, Files, Opened, require_checkpoint
from qingyu.errors import UnsupportedModelError

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]

ONNXRUNTIME = "onnxruntime"


def _open(files: Files, threads: int, *, precision: str, profile: str, engine: str) -> Opened:
    from qingyu.runtime.embedder import Embedder

    folder = files.int8 if precision == "int8" else files.fp32
    if folder is None:
        require_checkpoint(files)
    options: dict[str, Any] = {"profile": profile}
    if profile != "edge":  # whose point is one thread
        options["threads"] = threads
    if _has_engines():
        options["engine"] = engine
    elif engine != ONNXRUNTIME:
        raise _without_engines(engine)
    embedder = Embedder.open(str(folder), **options)

    def stream(texts: Sequence[str]) -> Iterator[Floats]:
        for block in embedder.embed_stream(texts, normalize=True):
            yield block.vectors

    return Opened(partial(embedder.embed, normalize=True), stream)


def _has_engines() -> bool:
    from qingyu.runtime.embedder import Embedder

    return "engine" in inspect.signature(Embedder.open).parameters


def _without_engines(engine: str) -> UnsupportedModelError:
    from qingyu import __version__

    return UnsupportedModelError(
        f"no engine {engine!r}",
        expected="a version of qingyu with a choice of engines",
        found=f"qingyu {__version__}, which has {ONNXRUNTIME} only",
        remedy="Leave this contender out.",
    )


def _one(
    name: str,
    title: str,
    precision: str,
    profile: str,
    how: str,
    *,
    engine: str = ONNXRUNTIME,
    needs: tuple[str, ...] = (),
) -> Contender:
    return Contender(
        name=name,
        title=title,
        precision=precision,
        needs=("numpy", ONNXRUNTIME, "tokenizers", *needs),
        distributions=("qingyu", *needs),
        how=how,
        open=partial(_open, precision=precision, profile=profile, engine=engine),
        compiles_shapes=engine != ONNXRUNTIME,
    )


CONTENDERS = {
    one.name: one
    for one in (
        _one(
            "qingyu-int8", "qingyu INT8", "int8", "throughput", "`Embedder.open(folder)`, the default recipe"
        ),
        _one(
            "qingyu-int8-latency",
            "qingyu INT8, profile latency",
            "int8",
            "latency",
            '`Embedder.open(folder, profile="latency")`',
        ),
        _one(
            "qingyu-int8-edge",
            "qingyu INT8, profile edge",
            "int8",
            "edge",
            '`Embedder.open(folder, profile="edge")`, one thread, memory-mapped',
        ),
        _one(
            "qingyu-fp32", "qingyu FP32", "fp32", "throughput", "`Embedder.open(folder)` of the FP32 folder"
        ),
        _one(
            "qingyu-openvino",
            "qingyu INT8, OpenVINO",
            "int8",
            "throughput",
            '`Embedder.open(folder, engine="openvino")`',
            engine="openvino",
            needs=("openvino",),
        ),
        _one(
            "qingyu-openvino-latency",
            "qingyu INT8, OpenVINO, latency",
            "int8",
            "latency",
            '`Embedder.open(folder, engine="openvino", profile="latency")`',
            engine="openvino",
            needs=("openvino",),
        ),
    )
}
