"""qingyu against what one would use instead, side by side on this machine, with the same weights and texts.

    python -m qingyu.bench compare --quick
    python -m qingyu.bench compare --out DIR --model bge-small-zh --workload mixed short
    python -m qingyu.bench compare --out DIR --only report

Contenders that are not installed are listed with the pip command. --quick ends in under five minutes, what has to be
prepared once included. Every run appends to DIR/rounds.jsonl, so that a long one can be split; the report is made of
all of it: DIR/benchmarks.json, DIR/benchmarks.md and charts. Absolute figures drift on shared machines; ratios within a
run are what counts. Linux only.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qingyu.bench.contenders import MODULES, contender
from qingyu.bench.measure import Comparison, Settings
from qingyu.bench.prepare import MODELS, model, prepare_model, write_texts
from qingyu.bench.records import Session, read_rows
from qingyu.bench.seats import check_cores
from qingyu.bench.workloads import GROWTH, WORKLOADS, workload
from qingyu.errors import InvalidOptionError, OperatorError, QingyuError
from qingyu.runtime.cpu import available_cpus

__all__ = ["main"]

ROWS = "rounds.jsonl"
QUICK_SECONDS = (
    200.0  # for rounds; preparing what needs no conversion and the report fit into what is left of 300
)
QUICK_WORKLOADS = ("short", "mixed", "documents", "single", "cold")
QUICK_ROUNDS, ROUNDS = 3, 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m qingyu.bench compare", description=__doc__)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--quick", action="store_true", help="the main figures in under five minutes")
    found.add_argument("--model", nargs="+", metavar="NAME", help=f"of {', '.join(MODELS)}")
    found.add_argument("--workload", nargs="+", metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    found.add_argument("--contender", nargs="+", metavar="NAME", help=f"of {', '.join(MODULES)}")
    found.add_argument("--cores", nargs="+", type=int, metavar="N", help="CPUs to run on (default: all)")
    found.add_argument("--rounds", type=int, help=f"(default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
    found.add_argument("--seconds", type=float, help="begin no further round after so long")
    found.add_argument(
        "--most-texts", type=int, default=GROWTH[-1], metavar="N", help="of growth (default: %(default)s)"
    )
    found.add_argument(
        "--texts", type=Path, metavar="FILE", help="lines of SOURCE TAB TEXT, or of text; or .gz"
    )
    found.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="MODEL=FOLDER",
        help="the weights of a model, or the tokenizer of one with random weights",
    )
    found.add_argument(
        "--python", action="append", default=[], metavar="CONTENDER=FILE", help="another Python that has it"
    )
    found.add_argument(
        "--out", type=Path, default=Path("bench-out"), metavar="DIR", help="(default: %(default)s)"
    )
    found.add_argument(
        "--note", default="", metavar="TEXT", help="what a reader of the page has to know besides"
    )
    found.add_argument(
        "--only", choices=("prepare", "measure", "report"), help="one step (default: all three)"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is that of an error of qingyu's, which is one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except QingyuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Prepare, measure, report."""
    options.out = options.out.resolve()
    if options.only != "report":
        _measure(options)
    if options.only in (None, "report"):
        from qingyu.bench.report import write_report

        rows = read_rows([options.out / ROWS])
        print(write_report(rows, options.out, note=options.note))
    return 0


def _measure(options: argparse.Namespace) -> None:
    _check_platform()
    names = options.contender or list(MODULES)
    pythons = _pairs("python", options.python)
    checkpoints = _pairs("checkpoint", options.checkpoint)
    for name in [*names, *pythons]:
        contender(name)
    for name in checkpoints:
        model(name)
    settings = _settings(options, pythons)
    default = ["bge-small-zh"] if options.quick else list(MODELS)
    models = [model(name) for name in options.model or default]
    texts = write_texts(options.out, options.texts, settings.workloads, quick=options.quick)
    comparison = Comparison(Session(options.out / ROWS), options.out, texts, settings, _say)
    for one in models:
        given = checkpoints.get(one.name)
        try:
            prepared = prepare_model(one, options.out, checkpoint=None if given is None else Path(given))
        except OperatorError as error:
            if options.model:  # asked for by name
                raise
            _say(f"without {one.name}: {error}")
            continue
        ready = names if options.only == "measure" else comparison.prepare(prepared, names)
        if options.only != "prepare":
            comparison.measure(prepared, ready)


def _settings(options: argparse.Namespace, pythons: dict[str, str]) -> Settings:
    default = QUICK_WORKLOADS if options.quick else tuple(WORKLOADS)
    for name in options.workload or ():
        workload(name)
    cores = tuple(options.cores or [available_cpus()])
    for count in cores:
        check_cores(count)
    rounds = (QUICK_ROUNDS if options.quick else ROUNDS) if options.rounds is None else options.rounds
    if rounds < 1:
        raise InvalidOptionError(
            "option rounds", expected="at least 1", found=str(rounds), remedy="Measure more of them."
        )
    seconds = QUICK_SECONDS if options.quick and options.seconds is None else options.seconds
    return Settings(
        tuple(options.workload or default),
        rounds,
        cores,
        options.quick,
        seconds,
        options.most_texts,
        pythons,
    )


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise InvalidOptionError(
                f"option {option}", expected="NAME=VALUE", found=name + sign + value, remedy="Write both."
            )
    return {name: value for name, _, value in pairs}


def _check_platform() -> None:
    if sys.platform != "linux":
        raise OperatorError(
            "no comparison on this system",
            expected="Linux, whose processes can be stopped and bound to CPUs",
            found=sys.platform,
            remedy="Measure a model of yours with `qingyu bench`.",
        )


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files are cleared away
    raise SystemExit(main())
