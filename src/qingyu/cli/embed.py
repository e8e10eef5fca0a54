"""``qingyu embed``: texts in, vectors out."""

from __future__ import annotations

import argparse
from typing import Any

from qingyu.cli.common import (
    add_long_text_arguments,
    add_model_arguments,
    new_command,
    open_embedder,
    print_report,
)
from qingyu.cli.text_input import add_text_arguments, from_arguments
from qingyu.cli.vector_output import open_sink

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu embed --model out/e5 "今天天气真好" "外面阳光明媚"
qingyu embed --model out/e5 --input texts.txt --output vectors.npy
cat rows.jsonl | qingyu embed --model out/e5 --format jsonl --field title --prompt passage"""


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "embed", "turn texts into vectors", EXAMPLE)
    add_text_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help=".npy or .jsonl; default: standard output")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "int8", "binary"),
        default="float32",
        help="int8: codes with a scale for each text (beside a .npy, in NAME.scales.npy); binary: packed signs",
    )
    parser.add_argument("--dim", type=int, metavar="N", help="keep the first N values, then normalize")
    parser.add_argument(
        "--no-normalize",
        dest="normalize",
        action="store_false",
        default=None,
        help="leave lengths as they are",
    )
    add_long_text_arguments(parser)
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Embed the texts as a stream: memory does not grow with their number."""
    from qingyu.runtime.embedder import Block, Report
    from qingyu.runtime.progress import progress_bar

    texts, total = from_arguments(options)
    report = Report()
    with (
        open_embedder(options) as embedder,
        open_sink(options.output, options.dtype, json_lines=options.json) as sink,
    ):
        sink.write(
            Block([], embedder.embed([], dim=options.dim))
        )  # no texts give an array of no rows, not no file
        blocks = embedder.embed_stream(
            texts,
            prompt=options.prompt,
            dim=options.dim,
            normalize=options.normalize,
            long_text=options.long_text,
            overlap=options.overlap,
            report=report,
        )
        counted = ((len(block.texts), block) for block in blocks)
        # A bar beside a table or JSON lines on the same terminal would only tear both.
        for block in (
            progress_bar(counted, total=total) if options.output else (block for _, block in counted)
        ):
            sink.write(block)
    print_report(report, embedder.spec.max_tokens)
    return 0
