"""``qingyu classify``: texts in, labels out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from qingyu.cli.common import add_opening_arguments, new_command, opening, print_report
from qingyu.cli.text_input import add_text_arguments, from_arguments
from qingyu.errors import InvalidOptionError, InvalidTextError

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu classify --model out/sentiment "这家酒店很干净" "房间太吵了"
qingyu classify --model out/nli --pairs --input pairs.txt --json"""


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "classify", "label texts, or pairs of texts", EXAMPLE)
    add_text_arguments(parser)
    add_opening_arguments(parser)
    parser.add_argument(
        "--pairs", action="store_true", help="each text is two, with a tab between: read both together"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="labels for each text (default: all)")
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Texts in, labels out; results are printed as they come."""
    from qingyu.runtime.classifier import Classifier
    from qingyu.runtime.task import Report

    texts, _ = from_arguments(options)
    if options.top_k is not None and options.top_k < 1:
        raise InvalidOptionError(
            "--top-k", expected="at least 1", found=str(options.top_k), remedy="Leave it out for all labels."
        )
    report = Report()
    with Classifier.open(options.model, **opening(options)) as model:
        rows = map(_pair, texts) if options.pairs else texts
        for found in model.classify_stream(rows, report=report):
            labels = found.labels[: options.top_k]
            if options.json or not sys.stdout.isatty():
                row = {"text": found.text, "labels": [dataclasses.asdict(label) for label in labels]}
                print(json.dumps(row, ensure_ascii=False))
            else:
                scores = "  ".join(f"{one.label} {one.score:.4f}" for one in labels)
                shown = found.text if isinstance(found.text, str) else " | ".join(found.text)
                print(f"{shown}\n  {scores}")
        print_report(report, model.spec.max_tokens, refusable=False)
    return 0


def _pair(text: str) -> tuple[str, str]:
    first, separator, second = text.partition("\t")
    if not separator:
        raise InvalidTextError(
            "a text is no pair",
            expected="two texts with a tab between",
            found=repr(text[:40]),
            remedy="Leave out --pairs, or add the second text.",
        )
    return first, second
