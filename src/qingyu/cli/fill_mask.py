"""``qingyu fill-mask``: texts with [MASK] in, likely words out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import add_opening_arguments, new_command, opening, print_report
from qingyu.cli.text_input import add_text_arguments, from_arguments

if TYPE_CHECKING:
    from qingyu.runtime.fill_mask import FilledText

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu fill-mask --model out/bert "巴黎是[MASK]国的首都。"
qingyu fill-mask --model out/bert --candidates 法,德,美 "巴黎是[MASK]国的首都。"
qingyu fill-mask --model out/bert --input texts.txt --top-k 1 --json"""


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "fill-mask", "predict the words behind [MASK]", EXAMPLE)
    add_text_arguments(parser)
    add_opening_arguments(parser)
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="words for each mask (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", metavar="A,B,...", help="rank these words, of any length, instead of the vocabulary"
    )
    parser.add_argument(
        "--scoring",
        choices=("left_to_right", "mean_pll", "pll"),
        default="left_to_right",
        help="of candidates of several tokens: the product of their tokens' probabilities from left to right, or the "
        "mean or product of those of each token masked alone (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fill the texts as a stream: memory does not grow with their number."""
    from qingyu.runtime.fill_mask import FillMask
    from qingyu.runtime.task import Report

    texts, _ = from_arguments(options)
    candidates = None if options.candidates is None else [w for w in options.candidates.split(",") if w]
    report = Report()
    write = _as_json if options.json or not sys.stdout.isatty() else _as_lines
    with FillMask.open(options.model, **opening(options)) as model:
        filled_texts = model.fill_stream(
            texts,
            top_k=options.top_k,
            candidates=candidates,
            scoring=options.scoring,
            report=report,
        )
        for filled in filled_texts:
            write(filled)
        print_report(report, model.spec.max_tokens, refusable=False)
    return 0


def _as_json(filled: FilledText) -> None:
    print(json.dumps(dataclasses.asdict(filled), ensure_ascii=False))


def _as_lines(filled: FilledText) -> None:
    print(filled.text)
    for number, predictions in enumerate(filled.masks, start=1):
        for one in predictions:
            print(f"  {number}  {one.score:.6f}  {one.token}  {one.text}")
