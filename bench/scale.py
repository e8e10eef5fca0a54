"""The arithmetic of many documents: time and cost of embedding, bytes of vectors, time to build an index.

``python -m qingyu.bench.scale --measure-index 80000`` times insertions into the HNSW graph of ``qingyu index`` here, at
growing sizes. ``python -m qingyu.bench.scale`` with rates, measured elsewhere or here, prints a Markdown table.
What is not measured is an argument: the price of a core, the length of a text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qingyu.runtime.vectors import unit

__all__ = ["Assumed", "embedding_rows", "index_seconds", "main", "storage_rows"]

COUNTS = (10**6, 10**8, 10**9)
PER_CLUSTER = 100  # vectors; embeddings of texts lie in clusters, and random ones would be the worst case
BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}


@dataclass(frozen=True)
class Assumed:
    """Rates of one core, and what they are multiplied by."""

    tokens_per_second: float
    tokens_per_text: float
    core_hour: float
    cores: int


def embedding_rows(assumed: Assumed) -> Iterator[tuple[str, ...]]:
    """(documents, core-hours, hours on so many cores, cost) for each number of documents.

    >>> list(embedding_rows(Assumed(10_000, 360, 0.05, 100)))[0]
    ('1,000,000', '10.0', '0.10', '0.50')
    """
    for count in COUNTS:
        hours = count * assumed.tokens_per_text / assumed.tokens_per_second / 3600
        yield (
            f"{count:,}",
            f"{hours:,.1f}",
            f"{hours / assumed.cores:,.2f}",
            f"{hours * assumed.core_hour:,.2f}",
        )


def storage_rows(dim: int, graph_bytes: float) -> Iterator[tuple[str, ...]]:
    """(documents, GB of each form, GB of the graph's links); int8 with its scale of 4 bytes.

    >>> list(storage_rows(512, 150))[0]
    ('1,000,000', '2.05', '1.02', '0.52', '0.06', '0.15')
    """
    each = [dim * size + (4 if name == "int8" else 0) for name, size in BYTES.items()]
    for count in COUNTS:
        yield (f"{count:,}", *(f"{count * size / 1e9:,.2f}" for size in (*each, graph_bytes)))


def index_seconds(count: int, rate: float, measured_at: int) -> float:
    """Seconds for one core to insert ``count`` vectors, if an insertion costs as the logarithm of the size.

    ``rate`` is insertions per second around the size ``measured_at``. The sum of log n over n is n (log n - 1).
    """
    return count * (math.log(count) - 1) / (rate * math.log(measured_at))


def measure_index(count: int, dim: int, steps: int = 4) -> Iterator[dict[str, float]]:
    """Insertions per second with one thread, as the graph grows, and bytes of its file beside the codes."""
    from qingyu.runtime.search.codes import codes_for
    from qingyu.runtime.search.graph import Graph, GraphShape

    random = np.random.default_rng(0)
    centres = random.normal(size=(max(1, count // PER_CLUSTER), dim)).astype(np.float32)
    noise = random.normal(size=(count, dim)).astype(np.float32) * 0.7
    vectors = unit(centres[random.integers(0, len(centres), count)] + noise)
    codes = codes_for("int8")
    graph = Graph.empty(GraphShape(dim, codes, "cosine"))
    step = count // steps
    for start in range(0, count, step):
        rows = codes.encode(vectors[start : start + step])
        begin = time.perf_counter()
        graph.add(np.arange(start, start + len(rows)), rows, threads=1)
        seconds = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            size = graph.save(Path(folder) / "graph").size
        yield {
            "size": len(graph),
            "insertions_per_second": round(len(rows) / seconds),
            "link_bytes": round(size / len(graph) - dim, 1),
        }


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [header, tuple("---:" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Print measurements as JSON lines, or the tables."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.scale", description=__doc__)
    parser.add_argument("--measure-index", type=int, metavar="N")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tokens-per-second", type=float, default=10_000, help="of one core")
    parser.add_argument("--tokens-per-text", type=float, default=200)
    parser.add_argument(
        "--core-hour", type=float, default=0.04, help="price of a core for an hour: an assumption"
    )
    parser.add_argument("--cores", type=int, default=64)
    parser.add_argument("--insertions-per-second", type=float, default=2000, help="of one core")
    parser.add_argument("--measured-at", type=int, default=80_000, help="vectors in the graph at that rate")
    parser.add_argument("--link-bytes", type=float, default=180)
    options = parser.parse_args(arguments)
    if options.measure_index:
        for found in measure_index(options.measure_index, options.dim):
            print(json.dumps(found), flush=True)
        return 0
    assumed = Assumed(options.tokens_per_second, options.tokens_per_text, options.core_hour, options.cores)
    print(
        table(("documents", "core-hours", f"hours on {options.cores} cores", "cost"), embedding_rows(assumed))
    )
    forms = (*(f"{name}, GB" for name in BYTES), "links of HNSW, GB")
    print(table(("documents", *forms), storage_rows(options.dim, options.link_bytes)))
    hours = (
        (
            f"{count:,}",
            f"{index_seconds(count, options.insertions_per_second, options.measured_at) / 3600:,.1f}",
        )
        for count in COUNTS
    )
    print(table(("documents", "core-hours to build HNSW"), hours))
    return 0


if __name__ == "__main__":
    sys.exit(main())
