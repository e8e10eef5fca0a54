"""``qingyu tag``: texts in, entities out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from qingyu.cli.common import add_opening_arguments, new_command, opening, print_report
from qingyu.cli.text_input import add_text_arguments, from_arguments

__all__ = ["add", "run"]

EXAMPLE = 'qingyu tag --model out/ner "张三在北京大学读书"'


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "tag", "find entities in texts", EXAMPLE)
    add_text_arguments(parser)
    add_opening_arguments(parser)
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Texts in, entities out; results are printed as they come."""
    from qingyu.runtime.task import Report
    from qingyu.runtime.token_classifier import TokenClassifier

    texts, _ = from_arguments(options)
    report = Report()
    with TokenClassifier.open(options.model, **opening(options)) as model:
        for found in model.tag_stream(texts, report=report):
            if options.json or not sys.stdout.isatty():
                row = {"text": found.text, "entities": [dataclasses.asdict(one) for one in found.entities]}
                print(json.dumps(row, ensure_ascii=False))
                continue
            print(found.text)
            for one in found.entities:
                print(f"  {one.start}-{one.end}  {one.label}  {one.score:.4f}  {one.text}")
        print_report(report, model.spec.max_tokens, refusable=False)
    return 0
