"""``qingyu embed``: texts in, vectors out."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import (
    add_long_text_arguments,
    add_model_arguments,
    new_command,
    open_embedder,
    print_report,
)
from qingyu.cli.text_input import add_text_arguments, from_arguments
from qingyu.cli.vector_output import open_sink
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.runtime.bulk import BulkOptions

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu embed --model out/e5 "今天天气真好" "外面阳光明媚"
qingyu embed --model out/e5 --input texts.txt --output vectors.npy
cat rows.jsonl | qingyu embed --model out/e5 --format jsonl --field title --prompt passage
qingyu embed --model out/e5 --ray local --input "docs/*.jsonl" --output vectors/ --keep id"""
BLOCK_MB = 4.0
ATTEMPTS = 3


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "embed", "turn texts into vectors", EXAMPLE)
    add_text_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--output", metavar="FILE", help=".npy or .jsonl; default: standard output; with --ray, a folder"
    )
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
    _add_ray_arguments(parser)
    parser.set_defaults(run=run)


def _add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many files, many machines",
        "with --ray, --input is a path or a quoted glob of .jsonl, .jsonl.gz or .parquet files, --output a folder of "
        "Parquet files, --threads the cores of each worker (default: 1) and --max-memory-mb the memory of each; a run "
        "that was broken off goes on where it was",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help='HOST:PORT of a Ray cluster, "auto" for the one here, or "local" for a new one',
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="default: as many as the cluster has cores for"
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field to carry into the output; repeatable",
    )
    group.add_argument(
        "--block-mb",
        type=float,
        metavar="MB",
        help=f"of input for one output file, and what a worker that dies loses (default: {BLOCK_MB:g})",
    )
    group.add_argument(
        "--attempts", type=int, metavar="N", help=f"workers that may die at a block (default: {ATTEMPTS})"
    )


def run(options: argparse.Namespace) -> int:
    """Embed the texts here or, with --ray, on a cluster."""
    if options.ray is not None:
        return _run_on_ray(options)
    for name in ("workers", "block_mb", "attempts"):
        if getattr(options, name) is not None:
            raise _refused("--" + name.replace("_", "-"), "--ray beside it", "none", "Add --ray local.")
    if options.keep:
        raise _refused("--keep", "--ray beside it", "none", "Add --ray local.")
    return _run_here(options)


def _run_here(options: argparse.Namespace) -> int:
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


def _run_on_ray(options: argparse.Namespace) -> int:
    """Embed files into a folder of Parquet files; bad rows are an exit code in the end, and not before it."""
    from qingyu.runtime.bulk import bulk_embed
    from qingyu.runtime.spec import read_spec
    from qingyu.runtime.task import find_model

    if options.texts or not options.input or options.input == "-":
        raise _refused("--ray", "--input FILES", "no files", 'For example: --input "docs/*.jsonl"')
    if not options.output or Path(options.output).suffix in (".npy", ".jsonl", ".ndjson"):
        raise _refused("--ray", "--output FOLDER", repr(options.output), "Name a folder.")
    if options.format not in (None, "jsonl"):
        raise _refused("--format", "jsonl with --ray", options.format, "Leave it out.")
    # Ray prints to standard output when a worker has died, whatever its logging is set to.
    with redirect_stdout(sys.stderr):
        done = bulk_embed(
            options.input,
            options.output,
            model=options.model,
            address=options.ray,
            workers=options.workers,
            options=_bulk_options(options),
            progress=True,
        )
    there = f", {done.skipped:,} of them were there" if done.skipped else ""
    print(f"{done.rows:,} rows in {done.parts:,} part{'s' * (done.parts != 1)} in {done.output}{there}")
    print_report(done.report, read_spec(find_model(options.model)).max_tokens)
    done.check()
    return 0


def _bulk_options(options: argparse.Namespace) -> BulkOptions:
    from qingyu.runtime.bulk import BulkOptions

    return BulkOptions(
        field=options.field or "text",
        keep=tuple(options.keep),
        block_bytes=int((BLOCK_MB if options.block_mb is None else options.block_mb) * (1 << 20)),
        attempts=ATTEMPTS if options.attempts is None else options.attempts,
        threads=1 if options.threads is None else options.threads,
        dtype=options.dtype,
        prompt=options.prompt,
        dim=options.dim,
        normalize=options.normalize,
        long_text=options.long_text,
        overlap=options.overlap,
        profile=options.profile,
        max_memory_mb=options.max_memory_mb,
        special_tokens=options.special_tokens,
        unicode_form="NFKC" if options.nfkc else None,
        script=options.script,
    )


def _refused(option: str, expected: str, found: str, remedy: str) -> InvalidOptionError:
    return InvalidOptionError(option, expected=expected, found=found, remedy=remedy)
