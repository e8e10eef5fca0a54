"""Model folders against each other on the same texts, from text to vectors, in one interleaved run.

    python -m qingyu.bench.side_by_side out/e5-int8 out/mini --texts texts.txt --rounds 5

Prints one JSON line a model: texts and tokens a second at the median round, and how many times as fast as the first
model it is (the median of the rounds' ratios, which is what a drifting machine leaves standing). Without --texts the
built-in sample is used. Not here: other libraries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qingyu.bench.rounds import medians, ratios_to, time_rounds
from qingyu.quantize.texts import calibration_texts
from qingyu.runtime.embedder import Embedder, Report

__all__ = ["compare", "main"]


def compare(
    models: Sequence[Path], texts: Sequence[str], *, rounds: int, threads: int | None
) -> list[dict[str, Any]]:
    """A row for each model, the first of which the ratios are to."""
    embedders = {str(model): Embedder.open(model, threads=threads) for model in models}
    seconds = time_rounds({name: partial(one.embed, texts) for name, one in embedders.items()}, rounds=rounds)
    middle, ratios = medians(seconds), ratios_to(seconds, str(models[0]))
    return [
        {
            "model": name,
            "texts_per_second": round(len(texts) / middle[name], 1),
            "tokens_per_second": round(_tokens(embedder, texts) / middle[name]),
            "times_the_first": round(ratios[name], 2),
            "rounds": rounds,
            "texts": len(texts),
            "workers": embedder.plan.workers,
        }
        for name, embedder in embedders.items()
    ]


def _tokens(embedder: Embedder, texts: Sequence[str]) -> int:
    report = Report()
    embedder.embed(texts, report=report)
    return report.tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.side_by_side", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model folders")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="one text a line (default: the built-in sample)"
    )
    parser.add_argument("--count", type=int, default=500, help="how many texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: what affinity and CPU quota allow)")
    options = parser.parse_args(arguments)
    lines = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else calibration_texts()
    texts = list(itertools.islice(lines, options.count))
    for row in compare(options.models, texts, rounds=options.rounds, threads=options.threads):
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
