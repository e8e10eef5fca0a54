"""Entry point of ``qingyu`` and ``python -m qingyu``: parses, runs one command, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from qingyu import __version__
from qingyu.cli import (
    adapt,
    answer,
    bench,
    bundle,
    bundle_app,
    cache,
    classify,
    doctor,
    embed,
    evaluate,
    export,
    fill_mask,
    index,
    info,
    pull,
    quantize,
    rerank,
    search,
    serve,
    similarity,
    tag,
    unbundle,
    verify,
)
from qingyu.errors import QingyuError

COMMANDS = (
    embed,
    similarity,
    fill_mask,
    classify,
    tag,
    answer,
    rerank,
    index,
    search,
    serve,
    pull,
    export,
    quantize,
    verify,
    evaluate,
    adapt,
    info,
    bench,
    doctor,
    cache,
    bundle,
    unbundle,
    bundle_app,
)

EXIT_CODES = """\
exit codes:
  0    done
  2    wrong command line
  3    the input is wrong: a text, an option, a data file
  4    the model is wrong: damaged, inconsistent, or of a kind not handled
  5    the surroundings are wrong: no such model, the network, a missing package, memory, an unwritable path
  6    a quantized model is further from FP32 than allowed; nothing was written
  130  interrupted (Ctrl-C)
  141  whoever read the output closed it (broken pipe)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="qingyu",
        description="Chinese BERT-family models on ordinary CPUs.",
        epilog=EXIT_CODES + '\nexample:\n  qingyu embed --model out/e5 "今天天气真好"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qingyu {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one line on standard error, never a traceback."""
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _print_warning
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except QingyuError as error:
        print(f"qingyu {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The interpreter would flush the closed pipe again at exit and complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return code


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """``warnings.showwarning`` without the place in the code, which says nothing to a user."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
