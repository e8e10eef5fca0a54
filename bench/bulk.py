"""How much faster two workers on Ray are than one, and how two processes without Ray, in one interleaved run.

``python -m qingyu.bench.bulk "docs/*.jsonl" --model FOLDER`` embeds the files with each number of workers in turn, one
core each, on Ray and then in plain processes that are handed the same blocks, and prints a JSON line for each run.
``seconds`` is the whole job, start of the workers included; ``steady`` the rate between the first part and the last, in
which no worker starts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from qingyu.runtime.bulk import BulkOptions, bulk_embed, cluster
from qingyu.runtime.bulk.blocks import Block
from qingyu.runtime.bulk.worker import Outcome, Recipe, Worker
from qingyu.runtime.task import BUNDLED

__all__ = ["main", "steady_rate", "without_ray"]


def steady_rate(ends: list[tuple[float, int]], workers: int) -> float:
    """Tokens per second after every worker's first block: what ended later, over the time that this took.

    ``ends`` are (second, tokens) of the blocks in any order.

    >>> steady_rate([(10.0, 50), (11.0, 50), (20.0, 100), (21.0, 120)], workers=2)
    22.0
    """
    ordered = sorted(ends)
    later = ordered[workers:]
    if not later:
        return 0.0
    return sum(tokens for _, tokens in later) / (later[-1][0] - ordered[workers - 1][0])


@contextmanager
def without_ray() -> Iterator[None]:
    """Within the block, jobs hand their blocks to processes of this machine instead."""
    with (
        patch.object(cluster, "connected", lambda address: nullcontext()),
        patch.object(cluster, "places", lambda threads, workers: workers),
        patch.object(cluster, "outcomes", _outcomes_of_processes),
    ):
        yield


def _outcomes_of_processes(blocks: Sequence[Block], recipe: Recipe, workers: int) -> Iterator[Outcome]:
    # Forked, they would share what this process has loaded, which workers on Ray do not.
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (recipe,)) as pool:
        yield from pool.imap_unordered(_process, blocks)


_worker: list[Worker] = []  # one, in a process of the pool


def _begin(recipe: Recipe) -> None:
    _worker.append(Worker(recipe))


def _process(block: Block) -> Outcome:
    return _worker[0].process(block)


# How workers are run -> what is around the runs of a round.
KINDS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "ray": lambda: cluster.connected("local"),
    "processes": without_ray,
}
RATES = {"whole": "texts_per_second", "steady": "steady_tokens_per_second"}


def measured(pattern: str, model: str, workers: int, block_bytes: int) -> dict[str, float]:
    """One run into a folder that is then removed."""
    import pyarrow.parquet as pq

    from qingyu.runtime.bulk.parts import FACTS, PartFacts

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = bulk_embed(
            pattern, folder, model=model, workers=workers, options=BulkOptions(block_bytes=block_bytes)
        )
        seconds = time.perf_counter() - start
        done.check()
        ends = []
        for part in Path(folder).glob("part-*"):
            facts = PartFacts.from_json(pq.read_metadata(part).metadata[FACTS])
            ends.append((part.stat().st_mtime, facts.report.tokens))
    return {
        "workers": workers,
        "parts": done.parts,
        "texts": done.rows,
        "tokens": done.report.tokens,
        "seconds": round(seconds, 2),
        "texts_per_second": round(done.rows / seconds, 1),
        "steady_tokens_per_second": round(steady_rate(ends, workers)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each run, and one with the ratios of two workers to one, on Ray and without."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.bulk", description=__doc__)
    parser.add_argument("input")
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--block-kb", type=int, default=64)
    options = parser.parse_args(arguments)
    runs = []
    for _ in range(options.rounds):
        for kind, around in KINDS.items():
            with around():
                for workers in (1, 2):
                    found = measured(options.input, options.model, workers, options.block_kb << 10)
                    runs.append({"kind": kind, **found})
                    print(json.dumps(runs[-1]), flush=True)
    print(json.dumps({"two_workers_to_one": {kind: _ratios(runs, kind) for kind in KINDS}}))
    return 0


def _ratios(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    def middle(key: str, workers: int) -> float:
        return float(median(run[key] for run in runs if (run["kind"], run["workers"]) == (kind, workers)))

    return {name: round(middle(key, 2) / middle(key, 1), 3) for name, key in RATES.items()}


if __name__ == "__main__":
    sys.exit(main())
