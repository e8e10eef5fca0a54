"""``qingyu evaluate``: what models are worth on the user's own sets, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import new_command
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.quantize.measures import Figure
    from qingyu.runtime.embedder import Embedder

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu evaluate out/bge out/bge-int8 --sts sts.tsv --retrieval questions
qingyu evaluate qingyu-mini-zh --classification reviews.tsv --json"""

KINDS = ("sts", "retrieval", "classification", "clustering")


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "evaluate", "measure models on sets of your own, side by side", EXAMPLE)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model folders or names; the first is the measure"
    )
    helps = {
        "sts": "FILE with sentence1, sentence2, label: Spearman's correlation",
        "retrieval": "FOLDER of queries.jsonl, corpus.jsonl, qrels.tsv: recall@1, @5, @10, nDCG@10, MRR@10",
        "classification": "FILE with text, label, or FOLDER of train and test: logistic regression (extra: evaluate)",
        "clustering": "FILE with text, label: v-measure of k-means (extra: evaluate)",
    }
    for kind in KINDS:
        form, _, text = helps[kind].partition(" ")
        parser.add_argument(
            f"--{kind}", action="append", default=[], type=Path, metavar=form, help=f"{text}; repeatable"
        )
    parser.add_argument(
        "--prompt", metavar="P", help="for sts, classification and clustering (default: the model's own)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="most rows of classification and clustering (default: all)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: what affinity and CPU quota allow")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure each model on all sets, and print the table."""
    from qingyu.runtime.embedder import Embedder

    if not any(getattr(options, kind) for kind in KINDS):
        raise InvalidOptionError(
            "nothing to measure on",
            expected=f"at least one of --{', --'.join(KINDS)}",
            found="none",
            remedy="Name a file or folder.",
        )
    if options.limit is not None and options.limit < 2:
        raise InvalidOptionError(
            "--limit", expected="at least 2", found=str(options.limit), remedy="Allow more."
        )
    measuring = list(_measuring(options))  # reads all files before any model is run
    found = []
    for name in options.models:
        with Embedder.open(name, threads=options.threads) as embedder:
            figures = [figure for measure in measuring for figure in measure(embedder)]
            found.append((name, f"{embedder.spec.name} {embedder.spec.precision}", figures))
        if options.json:
            for figure in figures:
                print(
                    json.dumps({"model": name, **dataclasses.asdict(figure)}, ensure_ascii=False), flush=True
                )
    if not options.json:
        _print(found)
    return 0


def _measuring(options: argparse.Namespace) -> Iterator[Callable[[Embedder], list[Figure]]]:
    """A function for each set that measures a model on it."""
    from qingyu.models.extras import require
    from qingyu.quantize.evaluation import RetrievalSet, SimilaritySet
    from qingyu.quantize.measures import retrieval_figures, similarity_figures
    from qingyu.quantize.probes import LabelledSet, ProbeSet, clustering_figures, probe_figures

    if options.classification or options.clustering:
        require("evaluate", "sklearn")
    for path in options.sts:
        yield partial(similarity_figures, pairs=SimilaritySet.read(path), prompt=options.prompt)
    for path in options.retrieval:
        yield partial(retrieval_figures, retrieval=RetrievalSet.read(path))
    for path in options.classification:
        labelled = ProbeSet.read(path, limit=options.limit)
        yield partial(probe_figures, labelled=labelled, prompt=options.prompt)
    for path in options.clustering:
        sample = LabelledSet.read(path).sample(options.limit)
        yield partial(clustering_figures, labelled=sample, prompt=options.prompt)


def _print(found: Sequence[tuple[str, str, Sequence[Figure]]]) -> None:
    """One row a measure, one column a model; those after the first with their difference to it."""
    from qingyu.cli.table import render

    header = ["set", "measure", "items", *(f"{name} ({kind})" for name, kind, _ in found)]
    first = found[0][2]
    rows = []
    for number, figure in enumerate(first):
        others = [figures[number].value for _, _, figures in found[1:]]
        cells = [f"{value:.2f} ({value - figure.value:+.2f})" for value in others]
        rows.append([figure.measured_on, figure.measure, f"{figure.items:,}", f"{figure.value:.2f}", *cells])
    print(render(header, rows, right=frozenset(range(2, len(header)))))
    if len(found) > 1:
        print("\nin brackets: points more or less than the first model", file=sys.stderr)
