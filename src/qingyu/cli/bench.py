"""``qingyu bench``: how fast a model is on this machine, and with which settings it is fastest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from qingyu.cli.common import BUNDLED, new_command
from qingyu.cli.table import facts

__all__ = ["add", "as_facts", "run"]


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "measure throughput, latency and memory of a model here, and its best threads and token budget"
    parser = new_command(commands, "bench", summary, "qingyu bench out/e5-int8 --seconds 30")
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED,
        metavar="FOLDER",
        help="a model folder, or a name in $QINGYU_HOME (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what was measured."""
    from qingyu.bench.on_device import is_disturbed, measure

    found = measure(options.model, seconds=options.seconds)
    found["disturbed"] = is_disturbed(found)
    print(json.dumps(found, ensure_ascii=False) if options.json else facts(as_facts(found)))
    return 0


def as_facts(found: Mapping[str, Any]) -> dict[str, object]:
    """What ``measure`` found, as lines of a table."""
    best = found["best"]
    lines: dict[str, object] = {
        "model": f"{found['model']} {found['precision']}",
        "cpu": f"{found['cpu']}, {found['cpus']} CPUs",
        "texts": f"{found['texts']:,} of mixed lengths, {found['tokens']:,} tokens",
    }
    for row in found["settings"]:
        name = f"{row['threads']} threads, {row['token_budget']} tokens"
        marks = [mark for mark, one in (("default", found["default"]), ("best", best)) if one == row]
        lines[name] = (
            f"{row['tokens_per_second']:,} tokens/s, {row['times_default']:.2f} times the default"
            + (f" ({', '.join(marks)})" if marks else "")
        )
    for profile, row in found["latency"].items():
        lines[f"one query, {profile}"] = ", ".join(
            f"{name.removesuffix('_ms')} {value:.2f} ms" for name, value in row.items()
        )
    for row in found["lone"]:
        lines[f"one query, latency, {row['threads']} threads"] = (
            f"p50 {row['p50_ms']:.2f} ms, {row['times_default']:.2f} times the default's speed"
        )
    for profile, row in found["memory"].items():
        lines[f"memory, {profile}"] = (
            f"{row['opened_mb']:.0f} MB open, {row['after_mb']:.0f} MB after the texts"
        )
    if found["disturbed"]:
        lines["mind"] = (
            f"others used {found['foreign_percent']:.0f} % of the machine meanwhile; measure again when it is idle"
        )
    return lines
