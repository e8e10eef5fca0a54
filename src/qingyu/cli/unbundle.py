"""``qingyu unbundle``: the model folder that a bundle holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qingyu.cli.common import new_command

__all__ = ["add", "run"]


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(
        commands, "unbundle", "write the model folder of a bundle", "qingyu unbundle bge.qingyu out/bge"
    )
    parser.add_argument("bundle", metavar="FILE", type=Path, help="a file that `qingyu bundle` wrote")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="model folder to make")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Unpack, every file checked."""
    from qingyu.runtime.bundle import unbundle

    spec = unbundle(options.bundle, options.output)
    print(f"{options.output}: {spec.name}, {spec.dim} dimensions, {spec.precision}")
    return 0
