"""Which linear layers a recipe harms most, found by leaving each in FP32 in turn and measuring.

Not here: deciding how many to leave (``pipeline``), and the drift after each encoder layer (``layers``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.graph import narrowed, read_plan, read_weights
from qingyu.quantize.inputs import linear_groups
from qingyu.quantize.recipes import Recipe, write_quantized
from qingyu.quantize.statistics import Statistics, token_batches
from qingyu.quantize.texts import calibration_texts, checked_texts
from qingyu.runtime.cpu import choose_threads
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    import_onnxruntime,
    product_entries,
    session_options,
    typed,
)
from qingyu.runtime.spec import check_file, read_spec
from qingyu.runtime.vectors import unit

__all__ = ["sensitive_layers"]

TEXTS = 32  # one graph is written and run for each group of layers, 48 for a BERT of 12
TOKEN_BUDGET = 512

Floats = NDArray[np.float32]


def sensitive_layers(
    model: Path,
    recipe: Recipe,
    statistics: Statistics | None,
    *,
    texts: Sequence[str] | None = None,
    smoothing: float | None = None,
    weight_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, float]]:
    """Every linear layer of the FP32 folder ``model`` with the mean cosine gained by leaving it in FP32, best first.

    Query, key and value share an input, so they are left together and have the same gain. ``texts`` are what is
    measured on, a part of the built-in sample unless given; a gain can be negative. ``progress`` is called with
    the number of groups done and their total. Raises what ``write_quantized`` raises.
    """
    chosen = checked_texts(calibration_texts(TEXTS) if texts is None else texts, least=2)
    spec = read_spec(model)
    check_file(model, spec.graph, spec.files[spec.graph])
    path = model / spec.graph
    plan, weights = narrowed(read_plan(path)), read_weights(path)
    batches = list(token_batches(model, spec, chosen, token_budget=TOKEN_BUDGET))
    reference = _pooled(path.read_bytes(), batches)

    def closeness(kept: Sequence[str]) -> float:
        graph = write_quantized(
            recipe,
            plan,
            weights,
            statistics=statistics,
            smoothing=smoothing,
            weight_bits=weight_bits,
            keep_float=kept,
        )
        return _mean_cosine(reference, _pooled(graph, batches))

    groups = linear_groups(plan)
    base = closeness(())
    gains: list[tuple[str, float]] = []
    for number, group in enumerate(groups, start=1):
        gain = closeness(group) - base
        gains += [(name, gain) for name in group]
        if progress is not None:
            progress(number, len(groups))
    return sorted(gains, key=lambda pair: -pair[1])


def _mean_cosine(a: Floats, b: Floats) -> float:
    return float(np.einsum("nd,nd->n", unit(a), unit(b), dtype=np.float64).mean())


def _pooled(graph: bytes, batches: Sequence[TokenBatch]) -> Floats:
    session = typed("loading a graph to measure", lambda: _session(graph))
    results = []
    for batch in batches:
        feeds = {"input_ids": batch.ids, "attention_mask": batch.mask}
        results.append(_run(session, feeds))
    return np.concatenate(results)


def _run(session: Any, feeds: Mapping[str, NDArray[np.int64]]) -> Floats:  # noqa: ANN401
    outputs: list[Floats] = typed("running a graph to measure", lambda: session.run(["pooled"], feeds))
    return outputs[0]


def _session(graph: bytes) -> Any:  # noqa: ANN401 - onnxruntime's class
    onnxruntime = import_onnxruntime()
    return onnxruntime.InferenceSession(
        graph,
        session_options(onnxruntime, threads=choose_threads(None), entries=product_entries("int8")),
        providers=list(PROVIDERS),
        disabled_optimizers=list(SLOW_FUSIONS),
    )
