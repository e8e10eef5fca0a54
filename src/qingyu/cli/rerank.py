"""``qingyu rerank``: a query and documents in, the documents by how well they fit it out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from qingyu.cli.common import add_opening_arguments, new_command, opening, print_report
from qingyu.cli.text_input import add_text_arguments, from_arguments

__all__ = ["add", "run"]

EXAMPLE = 'qingyu rerank --model out/reranker --query 怎么改密码 "如何修改登录密码" "股票大跌"'


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "rerank", "sort documents by how well they fit a query", EXAMPLE)
    add_text_arguments(parser)
    add_opening_arguments(parser)
    parser.add_argument("--query", required=True, metavar="Q", help="what the documents are to fit")
    parser.add_argument("--top-k", type=int, metavar="N", help="the best N documents (default: all)")
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """A query and documents in, the documents by how well they fit it out; results are printed as they come."""
    from qingyu.runtime.reranker import Reranker
    from qingyu.runtime.task import Report

    documents, _ = from_arguments(options)
    report = Report()
    with Reranker.open(options.model, **opening(options)) as model:
        ranked = model.rank(options.query, documents, top_k=options.top_k, report=report)
        for one in ranked:
            if options.json or not sys.stdout.isatty():
                print(json.dumps(dataclasses.asdict(one), ensure_ascii=False))
            else:
                print(f"{one.score:.4f}  {one.index}  {one.text}")
        print_report(report, model.spec.max_tokens, refusable=False)
    return 0
