"""What forms of a graph are worth: whole and narrow, by several recipes, in onnxruntime and OpenVINO, one thread.

    python -m qingyu.bench.graph_forms FP32_FOLDER

Prints one JSON line for each form and shape: CPU time (other processes share the machine), how many times as fast as
the first form in the same interleaved run, and the least cosine to FP32 of random tokens. OpenVINO runs where it is
installed. Not here: tokenizing and batching (``qingyu.bench.batching``), fidelity on texts (``qingyu.bench.recipes``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.models.export.graph import FloatLinear, narrowed, read_plan, read_weights, write_graph
from qingyu.quantize.openvino import MARKED
from qingyu.quantize.recipes import RECIPES, Recipe, write_quantized
from qingyu.quantize.statistics import collect
from qingyu.quantize.texts import calibration_texts
from qingyu.runtime.engine import Floats
from qingyu.runtime.engines import openvino_installed
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    import_onnxruntime,
    product_entries,
    session_options,
)
from qingyu.runtime.spec import read_spec

__all__ = ["main"]

SHAPES = ("1x20", "16x20", "8x64", "1x512")
RECIPES_SHOWN = ("rowwise", "hybrid")
CALIBRATION_TEXTS = 64

Run = Callable[[Mapping[str, Any]], Floats]


def by_onnxruntime(graph: bytes) -> Run:
    """A function that runs the graph on its inputs, one thread."""
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(
        graph,
        session_options(onnxruntime, threads=1, entries=product_entries("int8")),
        providers=list(PROVIDERS),
        disabled_optimizers=list(SLOW_FUSIONS),
    )
    return lambda feeds: session.run(["pooled"], feeds)[0]


def by_openvino(graph: bytes) -> Run:
    """The same by OpenVINO."""
    from qingyu.runtime.openvino.engine import import_openvino

    core = import_openvino().Core()
    compiled = core.compile_model(
        core.read_model(graph, b""), "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    )
    request = compiled.create_infer_request()
    return lambda feeds: request.infer(feeds)[compiled.output("pooled")]


def forms(folder: Path) -> dict[str, Run]:
    """Every form of the FP32 folder's graph by its name, the whole row-wise one first."""
    path = folder / read_spec(folder).graph
    plan, weights = read_plan(path), read_weights(path)
    found = collect(folder, calibration_texts(CALIBRATION_TEXTS))
    plans = {"whole": plan, "narrow": narrowed(plan)}

    def quantized(recipe: Recipe, form: str) -> bytes:
        return write_quantized(recipe, plans[form], weights, statistics=found)

    runs = {
        f"onnxruntime {name}, {form}": by_onnxruntime(quantized(RECIPES[name], form))
        for name in RECIPES_SHOWN
        for form in plans
    }
    for form in plans:
        runs[f"onnxruntime fp32, {form}"] = by_onnxruntime(write_graph(plans[form], weights, FloatLinear()))
        if openvino_installed():
            runs[f"openvino 8 bits, {form}"] = by_openvino(quantized(MARKED, form))
    return runs


def measure(runs: Mapping[str, Run], feeds: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Figures of each form for one shape; all take turns within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    vectors: dict[str, Floats] = {}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            start = time.process_time()
            vectors[name] = runs[name](feeds)
            if number > 1:  # the first two warm up
                seconds[name].append(time.process_time() - start)
    first = next(iter(runs))
    exact = vectors["onnxruntime fp32, whole"]
    return {
        name: {
            "ms": round(1e3 * statistics.median(own), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds[first], own, strict=True)), 3),
            "least cosine": round(float(_cosines(exact, vectors[name]).min()), 6),
        }
        for name, own in seconds.items()
    }


def _cosines(a: Floats, b: Floats) -> Floats:
    cosines: Floats = np.einsum("nd,nd->n", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a JSON line for each form and shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="FP32_FOLDER")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxTOKENS")
    options = parser.parse_args(arguments)
    runs = forms(options.model)
    words = read_spec(options.model).architecture.vocab_size
    for shape in options.shapes:
        rows, tokens = map(int, shape.split("x"))
        ids = np.random.default_rng(0).integers(5, words, (rows, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name, figures in measure(runs, feeds, options.rounds).items():
            print(json.dumps({"shape": shape, "form": name, **figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
