"""Where the time of embedding goes: tokenizing, padding, each operator of the graph, and what lies between them.

    python -m qingyu.bench.stages out/bge-int8

Prints one JSON line. One thread does everything in turn, so that shares add up; with several workers tokenizing
overlaps with running. Texts of the workloads "single" and "arrivals" are run one by one. Operators are timed by
onnxruntime's own profiler in another pass, which costs a few percent, or a few microseconds an operator. Not here:
other engines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qingyu.bench.texts import read_sources
from qingyu.bench.wall import Ceiling, operations_per_token
from qingyu.bench.workloads import WORKLOADS, workload
from qingyu.runtime.batching import micro_batches
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import (
    PROFILES,
    PROVIDERS,
    SLOW_FUSIONS,
    feeds_of,
    import_onnxruntime,
    product_entries,
    session_options,
)
from qingyu.runtime.spec import ModelSpec, read_spec
from qingyu.runtime.task import find_model
from qingyu.runtime.tokenizer import Tokenizer

__all__ = ["main", "measure"]


def measure(
    model: str, *, name: str = "mixed", count: int | None = None, texts: Path | None = None, rounds: int = 5
) -> dict[str, Any]:
    """Milliseconds of each stage for the texts of a workload, at the median round, and the operators' shares."""
    folder = find_model(model)
    spec = read_spec(folder)
    one = workload(name)
    given = one.sample(read_sources(texts), one.texts if count is None else count)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", max_tokens=spec.max_tokens)
    budget = PROFILES["throughput"].token_budget
    alone = one.kind in ("single", "arrivals")
    encoding: list[float] = []
    padding: list[float] = []
    running: list[float] = []
    session = _session(folder / spec.graph)
    batches: list[TokenBatch] = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        ids = [text.ids for text in tokenizer.encode(given)]
        encoded = time.perf_counter()
        groups = [[n] for n in range(len(ids))] if alone else micro_batches([len(row) for row in ids], budget)
        batches = [TokenBatch.pad([ids[n] for n in group], tokenizer.pad_id) for group in groups]
        padded = time.perf_counter()
        for batch in batches:
            session.run(["pooled"], feeds_of(batch, spec.inputs))
        if number:  # the first round warms up
            encoding.append(1e3 * (encoded - start))
            padding.append(1e3 * (padded - encoded))
            running.append(1e3 * (time.perf_counter() - padded))
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    cells = sum(batch.mask.size for batch in batches)
    stages = {"tokenizing": encoding, "batching": padding, "graph": running}
    middle = {stage: statistics.median(values) for stage, values in stages.items()}
    operators, inside = _operators(folder / spec.graph, spec, batches)
    ceiling = Ceiling(spec.architecture, 1).measure()["onnxruntime"]
    least = 1e3 * tokens * operations_per_token(spec.architecture) / (1e9 * ceiling)
    return {
        "model": spec.name,
        "precision": spec.precision,
        "workload": name,
        "texts": len(given),
        "tokens": tokens,
        "padding_percent": round(100 * (1 - tokens / cells), 2),
        "milliseconds": {stage: round(value, 2) for stage, value in middle.items()},
        "share_percent": _shares(middle),
        "operators_percent": operators,
        "operators_of_graph_percent": round(100 * inside / middle["graph"], 1),
        "bare_products_milliseconds": round(least, 2),
        "bare_products_percent": round(100 * least / sum(middle.values()), 1),
    }


def _shares(values: dict[str, float]) -> dict[str, float]:
    whole = sum(values.values())
    return {name: round(100 * value / whole, 1) for name, value in values.items()}


def _session(graph: Path, profile: Path | None = None) -> Any:  # noqa: ANN401 - onnxruntime's class
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=1, entries=product_entries("int8"))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(
        str(graph), options, providers=list(PROVIDERS), disabled_optimizers=list(SLOW_FUSIONS)
    )


def _operators(graph: Path, spec: ModelSpec, batches: Sequence[TokenBatch]) -> tuple[dict[str, float], float]:
    """The share of each operator, the largest first, and the milliseconds of all in one pass."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(graph, Path(folder, "profile"))
        for batch in batches:
            session.run(["pooled"], feeds_of(batch, spec.inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    took: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            took[event["args"]["op_name"]] += event["dur"]
    whole = sum(took.values())
    return {name: round(100 * value / whole, 1) for name, value in took.most_common(12)}, whole / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.stages", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a model folder, or a name")
    parser.add_argument("--workload", default="mixed", choices=[one.name for one in WORKLOADS.values()])
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="as for compare (default: the built-in sample)"
    )
    parser.add_argument("--count", type=int, help="how many texts (default: the workload's)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    found = measure(
        options.model,
        name=options.workload,
        count=options.count,
        texts=options.texts,
        rounds=options.rounds,
    )
    print(json.dumps(found, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
