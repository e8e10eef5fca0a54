"""Edge files: a model folder's graph in onnxruntime's own format, which is mapped into memory instead of read.

The graph is optimized to the "extended" level only. The next one chooses memory layouts for the CPU at hand, and the
file must run on any. Attention works on a few heads at a time (``qingyu.quantize.attention``). onnxruntime reads files
of older versions than itself, not of newer ones: write it with the oldest version that it will meet.

On CPUs whose fast integer products saturate, AVX2 without VNNI, the ``edge`` profile opens the graph of an INT8 model
instead: only there can onnxruntime be asked for exact products.

Measured on 2 cores of an AMD EPYC with AVX512-VNNI that others used too, onnxruntime 1.32, one thread, bge-small-zh
shape; private memory (dirty pages, and pages of the file that no other process maps) over that of the imports, after
a text of 12 tokens; then the best of 9 runs:

    ======= ======================== ========== ========== ========== ===========
    graph   file and options         session ms private MB 12 tokens  60 tokens
    ======= ======================== ========== ========== ========== ===========
    INT8    .onnx                    172        32.3       1.6 ms     9.6 ms
    INT8    .ort mapped              60-87      39.7       1.4-1.6 ms 7.5-8.8 ms
    INT8    the same, not pre-packed 12-30      27.6       2.5 ms     8.5-13 ms
    FP32    .onnx                    391        120.8      9 ms       23 ms
    FP32    .ort mapped              117        124.8      9 ms       23 ms
    FP32    the same, not pre-packed 19         76.7       19 ms      34 ms
    ======= ======================== ========== ========== ========== ===========

So integer products are left unpacked, which costs a millisecond a text; FP32 ones would take twice as long. Of the
27.6 MB, 23 are pages of the file, which processes share and the system can take back.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import onnx

from qingyu.errors import GraphError, OutputError, UnsupportedModelError
from qingyu.quantize.attention import HEADS_AT_ONCE, split_heads
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.external_data import refuse_external_data
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    OnnxRuntimeEngine,
    import_onnxruntime,
    session_options,
    typed,
)
from qingyu.runtime.selfcheck import probe
from qingyu.runtime.spec import MANIFEST, EdgeFile, FileRecord, ModelSpec, read_checked, read_spec, sha256_of

__all__ = ["EDGE_FILE", "add_edge", "write_edge"]

EDGE_FILE = "model.ort"

MAPPED = {
    "session.use_memory_mapped_ort_model": "1",
    "session.use_ort_model_bytes_for_initializers": "1",  # else the weights are copied out of the mapping
}
UNPACKED = {"session.disable_prepacking": "1"}
# Recipes of integer products. The kernels of other recipes need packed weights to be of any use.
UNPACKED_RECIPES = ("rowwise", "hybrid", "dynamic", "static", "static-percentile", "static-entropy")

# Vectors of both files on the machine that writes them; a different order of float32 sums is all that may differ.
LEAST_COSINE = 0.999999
PROBE_LENGTHS = (3, 17, 64)
FIRST_WORD = 1000  # ids of ordinary words, in all vocabularies that are larger


def add_edge(folder: Path) -> ModelSpec:
    """Add an edge file to a finished model folder, or replace the one that it has; the new spec.

    The manifest is replaced last, so a folder is never without one that fits its files. Raises what ``read_spec`` and
    ``write_edge`` raise.
    """
    spec = write_edge(folder, read_spec(folder))
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        temporary.write_text(spec.to_json(), encoding="utf-8")
        temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise _cannot_write(folder, str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return spec


def write_edge(folder: Path, spec: ModelSpec) -> ModelSpec:
    """Write ``model.ort`` beside the graph of a model folder; the spec that names it, not yet written.

    The new file must give the vectors of the graph, cosine at least 0.999999, or it is removed. Raises
    ``CorruptFileError``, ``GraphError``, ``OutputError``, and ``UnsupportedModelError`` for a model whose manifest
    already names another edge file.
    """
    if spec.edge is not None and spec.edge.file != EDGE_FILE:
        raise UnsupportedModelError(
            f"{spec.name} has an edge file of another name",
            expected=EDGE_FILE,
            found=spec.edge.file,
            remedy="Quantize the model again.",
        )
    source = folder / spec.graph
    data = read_checked(folder, spec.graph, spec.files[spec.graph])
    refuse_external_data(data, str(source))
    _check_space(folder, 2 * len(data) + len(data) // 8)  # two files at once
    del data
    temporary = folder / f".{EDGE_FILE}.{os.getpid()}"
    split = folder / f".{spec.graph}.{os.getpid()}"
    try:
        heads = _write_split(source, split, spec)
        _convert(split, temporary)
        edge = EdgeFile(EDGE_FILE, _options_for(spec), heads)
        _compare(folder, spec, dataclasses.replace(edge, file=temporary.name))
        record = FileRecord(temporary.stat().st_size, sha256_of(temporary))
        temporary.replace(folder / EDGE_FILE)
    except OSError as error:
        raise _cannot_write(folder, str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
        split.unlink(missing_ok=True)
    return dataclasses.replace(spec, edge=edge, files={**spec.files, EDGE_FILE: record})


def _options_for(spec: ModelSpec) -> dict[str, str]:
    return {**MAPPED, **(UNPACKED if spec.recipe in UNPACKED_RECIPES else {})}


def _write_split(source: Path, target: Path, spec: ModelSpec) -> int | None:
    """The graph with its attention a few heads at a time; how many, ``None`` where nothing was split."""
    model = onnx.load(source)
    count = split_heads(model, spec.architecture.heads, most=HEADS_AT_ONCE)
    onnx.save(model, target)
    return HEADS_AT_ONCE if count else None


def _convert(source: Path, target: Path) -> None:
    target.touch()  # a folder that cannot be written says so here, as itself and not through onnxruntime
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=1, entries={"session.save_model_format": "ORT"})
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    typed(
        f"converting {source}",
        lambda: onnxruntime.InferenceSession(
            str(source),
            options,
            providers=list(PROVIDERS),
            disabled_optimizers=list(SLOW_FUSIONS),
            enable_fallback=0,
        ),
    )


def _compare(folder: Path, spec: ModelSpec, edge: EdgeFile) -> None:
    """Raise ``GraphError`` unless the edge file gives the graph's vectors."""
    record = FileRecord((folder / edge.file).stat().st_size, sha256_of(folder / edge.file))
    candidate = dataclasses.replace(spec, edge=edge, files={**spec.files, edge.file: record})
    batches = [_probe(spec, tokens) for tokens in PROBE_LENGTHS]
    expected, found = (_vectors(folder, which, batches) for which in (spec, candidate))
    least = float(np.min(np.einsum("nd,nd->n", expected, found)))
    if not least >= LEAST_COSINE:
        raise GraphError(
            f"the edge file of {folder / spec.graph} differs from it",
            expected=f"vectors with a cosine of at least {LEAST_COSINE}",
            found=f"{least:.7f}",
            remedy="Report the versions that `qingyu doctor` prints, and leave out --edge.",
        )


def _probe(spec: ModelSpec, tokens: int) -> TokenBatch:
    """One row of ids spread over the vocabulary."""
    tokens = min(tokens, spec.max_tokens)
    most = spec.architecture.vocab_size
    first = FIRST_WORD if most > 2 * FIRST_WORD else 0
    ids = np.linspace(first, most - 1, tokens).astype(np.int64)
    return TokenBatch(ids[None, :], np.ones((1, tokens), dtype=np.int64))


def _vectors(folder: Path, spec: ModelSpec, batches: list[TokenBatch]) -> Floats:
    # Taken for FP32, the edge file is opened also on a CPU whose integer products saturate, which they then do alike.
    with OnnxRuntimeEngine(folder, dataclasses.replace(spec, precision="fp32"), profile="edge") as engine:
        pooled = np.concatenate([probe(engine, batch) for batch in batches]).astype(np.float64)
    unit: Floats = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return unit


def _check_space(folder: Path, needed: int) -> None:
    """A write that onnxruntime could not finish raises nothing, so there must be room before."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(folder, str(error)) from None
    if free < needed:
        raise _cannot_write(folder, f"{free} bytes free of {needed}")


def _cannot_write(folder: Path, found: str) -> OutputError:
    return OutputError(
        f"cannot write {folder / EDGE_FILE}",
        expected="a folder that can be written, with room for the file",
        found=found,
        remedy="Free space there, or mend its permissions.",
    )
