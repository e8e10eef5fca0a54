"""What profiles, workers and token budgets give on this machine, with one model and real lengths of text.

    python -m qingyu.bench.batching out/bge-int8 --texts texts.txt

Every setting runs once a round, in turn; the figures are medians, and ratios to the first setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from qingyu.bench.rounds import medians, ratios_to, time_rounds
from qingyu.runtime.embedder import Embedder, Report

BUDGETS = (128, 256, 512, 1024, 2048)


def with_budget(model: Path, profile: str, budget: int, *, threads: int | None = None) -> Embedder:
    """An embedder whose micro-batches take ``budget`` tokens."""
    embedder = Embedder.open(model, profile=profile, threads=threads)  # type: ignore[arg-type] # argparse has checked it
    embedder._batcher = dataclasses.replace(embedder._batcher, token_budget=budget)
    return embedder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a JSON line for each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="one text a line")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profiles", nargs="+", default=["throughput", "latency"])
    options = parser.parse_args(arguments)
    lines = options.texts.read_text(encoding="utf-8").split("\n")
    chosen = np.random.default_rng(0).permutation(len(lines))[: options.count]
    texts = [lines[n] for n in chosen]
    contenders: dict[str, Callable[[], object]] = {}
    for profile in options.profiles:
        for budget in BUDGETS:
            embedder = with_budget(options.model, profile, budget)
            contenders[f"{profile} {budget}"] = partial(embedder.embed, texts)
    report = Report()
    with_budget(options.model, options.profiles[0], 512).embed(texts, report=report)
    seconds = time_rounds(contenders, rounds=options.rounds)
    ratios = ratios_to(seconds, next(iter(contenders)))
    for name, value in medians(seconds).items():
        row = {"setting": name, "tokens/s": round(report.tokens / value), "ratio": round(ratios[name], 3)}
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
