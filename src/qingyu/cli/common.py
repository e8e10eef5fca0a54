"""What several commands share: how a model is named and opened, and how help looks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qingyu.runtime.embedder import Embedder, Report

BUNDLED = "qingyu-mini-zh"  # qingyu.runtime.task's (a test compares), not imported to print a help page

__all__ = [
    "BUNDLED",
    "add_long_text_arguments",
    "add_model_arguments",
    "add_opening_arguments",
    "add_running_arguments",
    "new_command",
    "open_embedder",
    "opening",
    "place",
    "print_report",
]


STORES = ("milvus+", "qdrant+")  # how addresses of stores begin (a test compares with qingyu.runtime.stores)


def place(text: str) -> Path | str:
    """Where an index is: a folder, or the address of a store as it stands."""
    return text if text.startswith(STORES) else Path(text)


def new_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:  # noqa: ANN401
    """A sub-parser whose help ends in an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="example:\n  " + example.replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model and the options of ``Embedder.open``, and --prompt."""
    add_opening_arguments(parser, default=BUNDLED)
    parser.add_argument("--prompt", metavar="P", help="query, passage, or the text to put before each input")
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "text"),
        default="parse",
        help="whether a typed [MASK] is the special token, as in the reference, or plain text",
    )


def add_opening_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --model, required where there is no default, and the options that models of every task are opened with."""
    text = "a model folder, or a name in $QINGYU_HOME"
    parser.add_argument(
        "--model",
        default=default,
        required=default is None,
        metavar="FOLDER",
        help=text if default is None else f"{text} (default: {default}, which travels in the package)",
    )
    add_running_arguments(parser)


def add_running_arguments(parser: Any) -> None:  # noqa: ANN401 - a parser, or argparse's private groups
    """Add how models run and how they read text: what ``opening`` looks at."""
    parser.add_argument(
        "--profile",
        choices=("throughput", "latency", "edge"),
        default="throughput",
        help="throughput: many texts; latency: one text at a time; edge: least memory (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "onnxruntime", "openvino"),
        default="auto",
        help="auto: OpenVINO where the model has a file for it that was measured faster on such a CPU (default: "
        "%(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: what affinity and CPU quota allow")
    parser.add_argument(
        "--max-memory-mb", type=int, metavar="MB", help="resident memory that the process may reach"
    )
    parser.add_argument("--nfkc", action="store_true", help="fold full-width and compatibility forms first")
    parser.add_argument(
        "--script",
        choices=("simplified", "traditional"),
        help="read Chinese in this script, whatever it is written in (extra: opencc)",
    )


def open_embedder(options: argparse.Namespace) -> Embedder:
    """The embedder that the arguments of ``add_model_arguments`` describe."""
    from qingyu.runtime.embedder import Embedder

    return Embedder.open(options.model, special_tokens=options.special_tokens, **opening(options))


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of ``add_opening_arguments`` say, by the names that ``open`` gives them."""
    return {
        "profile": options.profile,
        "engine": options.engine,
        "threads": options.threads,
        "max_memory_mb": options.max_memory_mb,
        "unicode_form": "NFKC" if options.nfkc else None,
        "script": options.script,
    }


def add_long_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --long-text and --overlap, which ``long_text`` reads."""
    parser.add_argument(
        "--long-text",
        choices=("truncate", "error", "mean", "max"),
        default="truncate",
        help="for texts longer than the model reads; mean and max read them whole, in pieces (default: truncate, and "
        "say which)",
    )
    parser.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="tokens that pieces share (default: %(default)s)"
    )


def print_report(report: Report, max_tokens: int, *, refusable: bool = True) -> None:
    """Say on standard error what was cut or unknown; nothing where all was read."""
    if report.truncated:
        remedy = " (--long-text error refuses them, mean reads them whole)" if refusable else ""
        print(
            f"{report.truncated:,} of {report.texts:,} texts were cut at {max_tokens} tokens{remedy}; "
            f"{report.dropped:,} characters were not read{_cut_texts(report)}",
            file=sys.stderr,
        )
    if report.split:
        print(f"{report.split:,} of {report.texts:,} texts were read in pieces", file=sys.stderr)
    report.warn()


def _cut_texts(report: Report) -> str:
    named = [f"the last {dropped:,} of text {number:,}" for number, dropped in report.cut]
    if not named:
        return ""
    rest = report.truncated - len(named)
    return ": " + ", ".join(named) + (f", and those of {rest:,} more texts" if rest else "")
