"""How much faster two workers on Ray are than one, in one interleaved run.

``python -m qingyu.bench.bulk "docs/*.jsonl" --model FOLDER`` embeds the files with each number of workers in turn, one
core each, and prints a JSON line for each run. ``seconds`` is the whole job, start of the workers included;
``steady`` the rate between the first part and the last, in which no worker starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from qingyu.runtime.bulk import BulkOptions, bulk_embed
from qingyu.runtime.bulk.cluster import connected
from qingyu.runtime.task import BUNDLED

__all__ = ["main", "steady_rate"]


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
    """Print a line for each run, and one with the ratios of two workers to one."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.bulk", description=__doc__)
    parser.add_argument("input")
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--block-kb", type=int, default=64)
    options = parser.parse_args(arguments)
    runs = []
    with connected("local"):
        for _ in range(options.rounds):
            for workers in (1, 2):
                runs.append(measured(options.input, options.model, workers, options.block_kb << 10))
                print(json.dumps(runs[-1]), flush=True)
    ratios = {"whole": "texts_per_second", "steady": "steady_tokens_per_second"}
    found = {
        name: round(
            median(run[key] for run in runs if run["workers"] == 2)
            / median(run[key] for run in runs if run["workers"] == 1),
            3,
        )
        for name, key in ratios.items()
    }
    print(json.dumps({"two_workers_to_one": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
