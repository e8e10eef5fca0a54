"""``qingyu answer``: a question and texts in, the stretches of them that answer it out."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from typing import Any

from qingyu.cli.common import add_opening_arguments, new_command, opening
from qingyu.cli.text_input import add_text_arguments, from_arguments

__all__ = ["add", "run"]

EXAMPLE = 'qingyu answer --model out/qa --question 密码怎么改 "登录后在设置里选择修改密码。"'


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "answer", "answer a question from texts", EXAMPLE)
    add_text_arguments(parser)
    add_opening_arguments(parser)
    parser.add_argument("--question", required=True, metavar="Q", help="asked of each text")
    parser.add_argument(
        "--top-k", type=int, default=1, metavar="N", help="answers for each text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-answer-tokens", type=int, default=15, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--allow-none", action="store_true", help='let "no answer" be one of them')
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """A question and texts in, the stretches of them that answer it out; results are printed as they come."""
    from qingyu.runtime.question_answerer import QuestionAnswerer

    contexts, asked = itertools.tee(from_arguments(options)[0])
    with QuestionAnswerer.open(options.model, **opening(options)) as model:
        found = model.answer_stream(
            ((options.question, context) for context in asked),
            top_k=options.top_k,
            max_answer_tokens=options.max_answer_tokens,
            allow_none=options.allow_none,
        )
        for context, answers in zip(contexts, found, strict=True):
            if options.json or not sys.stdout.isatty():
                row = {"text": context, "answers": [dataclasses.asdict(one) for one in answers]}
                print(json.dumps(row, ensure_ascii=False))
                continue
            for one in answers:
                print(f"{one.score:.4f}  {one.start}-{one.end}  {one.text or '(no answer)'}")
    return 0
