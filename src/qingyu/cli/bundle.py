"""``qingyu bundle``: a model folder becomes one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qingyu.cli.common import new_command

__all__ = ["add", "run"]


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(
        commands,
        "bundle",
        "write a model folder as one file, which every --model takes",
        "qingyu bundle out/bge-int8 bge.qingyu\nqingyu embed --model bge.qingyu 今天天气真好",
    )
    parser.add_argument("model", metavar="FOLDER", help="a model folder, or a name in $QINGYU_HOME")
    parser.add_argument("output", metavar="FILE", type=Path, help="file to write, for example bge.qingyu")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the bundle, and print its size and hash."""
    from qingyu.runtime.bundle import bundle
    from qingyu.runtime.embedder import find_model

    digest = bundle(find_model(options.model), options.output, overwrite=options.overwrite)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
    return 0
