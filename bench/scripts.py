"""What a model makes of traditional Chinese, as it is written and read as simplified.

    python -m qingyu.bench.scripts MODEL ... --data DATA

Prints one JSON line a model: recall@10 from question to passage (DATA/cmrc2018), times 100, with the questions in
simplified characters, in traditional ones, and in traditional ones read with ``script="simplified"``, the passages
simplified; the mean cosine of a question's vector with that of its simplified form; and the share of unknown tokens.
Traditional questions are made by OpenCC (s2t) from simplified ones, so they are simplified Chinese in other characters:
words of Taiwan or Hong Kong are not measured, and converting them back is easier than it is for what people write.

Needs the extra ``opencc``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.quantize.evaluation import RetrievalSet, recall_at
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.scripts import Script, converter
from qingyu.runtime.task import Report

__all__ = ["main", "measure"]


def measure(model: str | Path, data: Path) -> dict[str, Any]:
    """The figures of one model folder."""
    questions = RetrievalSet.read(data / "cmrc2018")
    traditional = list(map(converter("traditional"), questions.queries))
    with Embedder.open(model) as embedder:
        prompts = embedder.spec.prompts
        corpus = embedder.embed(questions.corpus, prompt="passage" if "passage" in prompts else None)
        name = f"{embedder.spec.name} {embedder.spec.precision}"
    forms: tuple[tuple[str, Sequence[str], Script | None], ...] = (
        ("simplified", questions.queries, None),
        ("traditional", traditional, None),
        ("converted", traditional, "simplified"),
    )
    figures: dict[str, Any] = {"model": name}
    plain = None
    for form, texts, script in forms:
        report = Report()
        with Embedder.open(model, script=script) as embedder:
            vectors = embedder.embed(texts, prompt="query" if "query" in prompts else None, report=report)
        plain = vectors if plain is None else plain
        figures[form] = {
            "recall@10": round(100 * recall_at(10, vectors, corpus, questions.relevant), 1),
            "cosine": round(float((vectors * plain).sum(axis=1).mean(dtype=np.float64)), 4),
            "unknown": round(100 * report.unknown_rate, 2),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qingyu.bench.scripts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model folder, or a name")
    parser.add_argument("--data", type=Path, required=True, help="folder of cmrc2018")
    options = parser.parse_args(arguments)
    for model in options.models:
        print(json.dumps(measure(model, options.data), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
