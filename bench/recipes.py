"""Every recipe on one FP32 model: fidelity on a file of texts, size, and speed in one interleaved run.

    python -m qingyu.bench.recipes FP32_FOLDER --texts FILE

Prints one JSON line a recipe. Speed is of the graph alone, one thread, on rectangles of random tokens: CPU time
of FP32 and of the dynamic recipe divided by the recipe's own. Scales are calibrated on the built-in sample, not on
FILE. Fidelity says something only with real weights, speed with any weights of the shape in question. Not here: the
certificate of a model folder (``qingyu quantize``), and tokenizing and batching (``qingyu.bench.batching``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.bench.texts import varied_texts
from qingyu.models.export.graph import read_plan, read_weights
from qingyu.quantize.certificate import compare
from qingyu.quantize.recipes import RECIPES, write_quantized
from qingyu.quantize.statistics import collect, token_batches
from qingyu.quantize.texts import calibration_texts
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    import_onnxruntime,
    product_entries,
    session_options,
)
from qingyu.runtime.spec import ModelSpec, read_spec

__all__ = ["main"]

SHAPES = ((8, 32), (4, 64), (2, 128), (1, 256))
CALIBRATION_TEXTS = 128
TOKEN_BUDGET = 512
FP32 = "fp32"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{name: {} for name in RECIPES},
    "rowwise, no smoothing": {"smoothing": 0.0},
    "rowwise, 7-bit weights": {"weight_bits": 7},
    "hybrid, 7-bit weights": {"weight_bits": 7},
    "dynamic, smoothing": {"smoothing": 0.7},
    "static, no smoothing": {"smoothing": 0.0},
}


def fidelity(graphs: Mapping[str, bytes], batches: Sequence[TokenBatch]) -> dict[str, dict[str, Any]]:
    """Cosines to FP32 and neighbours kept, by recipe."""
    reference = _pooled(graphs[FP32], batches)
    lengths = np.concatenate([batch.mask.sum(axis=1) for batch in batches]).tolist()
    figures = {}
    for name, graph in graphs.items():
        found = compare(reference, _pooled(graph, batches), lengths)
        figures[name] = {
            "cosine": _figures(found.cosine),
            "centred cosine": _figures(found.centred_cosine),
            "top-10 overlap": None if found.top_10_overlap is None else round(found.top_10_overlap, 4),
        }
        print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr)
    return figures


def _figures(cosines: Any) -> dict[str, float]:  # noqa: ANN401 - the certificate's, whose fields may grow
    names = ("mean", "percentile_1", "minimum")
    return {name: round(float(getattr(cosines, name)), 6) for name in names}


def _pooled(graph: bytes, batches: Sequence[TokenBatch]) -> Floats:
    run = _session(graph, threads=2).run
    feeds = ({"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches)
    return np.concatenate([run(["pooled"], feed)[0] for feed in feeds])


def speed(graphs: Mapping[str, bytes], spec: ModelSpec, *, rounds: int) -> dict[str, dict[str, float]]:
    """CPU time of FP32 and of dynamic divided by each recipe's: the geometric mean over shapes of medians.

    CPU time and not the clock's, since other processes share the machine. All take turns within a round.
    """
    sessions = {name: _session(graph, threads=1) for name, graph in graphs.items()}
    ratios: dict[str, dict[str, list[float]]] = {name: {FP32: [], "dynamic": []} for name in graphs}
    for rows, tokens in SHAPES:
        shape = (rows, min(tokens, spec.max_tokens))
        ids = np.random.default_rng(0).integers(5, spec.architecture.vocab_size, shape)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        seconds = _rounds(sessions, feeds, rounds)
        for name, found in ratios.items():
            for base, values in found.items():
                pairs = zip(seconds[base], seconds[name], strict=True)
                values.append(statistics.median(was / now for was, now in pairs))
    return {
        name: {f"speed to {base}": round(_geometric_mean(values), 2) for base, values in found.items()}
        for name, found in ratios.items()
    }


def _rounds(
    sessions: Mapping[str, Any], feeds: Mapping[str, NDArray[np.int64]], rounds: int
) -> dict[str, list[float]]:
    calls = {name: partial(session.run, ["pooled"], feeds) for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls) if number % 2 else reversed(calls):
            start = time.process_time()
            calls[name]()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _session(graph: bytes, *, threads: int) -> Any:  # noqa: ANN401 - onnxruntime's class
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=threads, entries=product_entries("int8"))
    return onnxruntime.InferenceSession(
        graph, options, providers=list(PROVIDERS), disabled_optimizers=list(SLOW_FUSIONS)
    )


def write_all(model: Path, variants: Sequence[str]) -> dict[str, bytes]:
    """The FP32 graph and the graph of each variant, by name."""
    path = model / read_spec(model).graph
    plan, weights = read_plan(path), read_weights(path)
    found = collect(model, calibration_texts(CALIBRATION_TEXTS))
    graphs = {FP32: path.read_bytes()}
    for name in variants:
        recipe = RECIPES[name.split(",")[0]]
        graphs[name] = write_quantized(recipe, plan, weights, statistics=found, **VARIANTS[name])
    return graphs


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON line for FP32 and one for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="FP32_FOLDER")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts to measure fidelity on")
    parser.add_argument("--count", type=int, default=2000, help="of texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of speed; 0 for none (default: %(default)s)")
    parser.add_argument(
        "--recipes", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    options = parser.parse_args(arguments)
    spec = read_spec(options.model)
    graphs = write_all(options.model, ["dynamic", *(n for n in options.recipes if n != "dynamic")])
    figures: dict[str, dict[str, Any]] = {name: {} for name in graphs}
    if options.texts is not None:
        texts = varied_texts(options.texts, options.count)
        batches = list(token_batches(options.model, spec, texts, token_budget=TOKEN_BUDGET))
        figures = fidelity(graphs, batches)
    speeds = speed(graphs, spec, rounds=options.rounds) if options.rounds else {}
    for name, graph in graphs.items():
        size = {"megabytes": round(len(graph) / 1e6, 2)}
        line = {"model": spec.name, "recipe": name, **figures[name], **size, **speeds.get(name, {})}
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
