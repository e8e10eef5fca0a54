"""``qingyu cache``: what was pulled, whether it is whole, and room for something else."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import new_command
from qingyu.errors import CorruptFileError, ModelNotFoundError

if TYPE_CHECKING:
    from qingyu.models.cache import Cache

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu cache list
qingyu cache verify
qingyu cache remove bge-small-zh-v1.5"""


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command and its own commands."""
    parser = new_command(commands, "cache", "list, verify or remove what is in $QINGYU_HOME", EXAMPLE)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    listing = new_command(kinds, "list", "show models, checkpoints and bundles", "qingyu cache list")
    listing.add_argument("--json", action="store_true", help="print it as JSON")
    listing.set_defaults(run=run, work=_list)
    verifying = new_command(kinds, "verify", "compare every file with its hash", "qingyu cache verify")
    verifying.add_argument(
        "names", nargs="*", metavar="NAME", help="a model, repository or label (default: all)"
    )
    verifying.set_defaults(run=run, work=_verify)
    removing = new_command(
        kinds, "remove", "remove models, checkpoints or bundles", "qingyu cache remove BAAI/bge-small-zh-v1.5"
    )
    removing.add_argument("names", nargs="+", metavar="NAME", help="a model, repository or label")
    removing.add_argument(
        "--records", action="store_true", help="also forget the hashes that the next download must have"
    )
    removing.set_defaults(run=run, work=_remove)


def run(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    from qingyu.models.cache import Cache
    from qingyu.runtime.home import qingyu_home

    code: int = options.work(options, Cache(qingyu_home()))
    return code


def _list(options: argparse.Namespace, cache: Cache) -> int:
    from qingyu.cli.table import render

    entries = cache.entries()
    if options.json:
        facts = [
            {
                "kind": entry.kind,
                "label": entry.label,
                "folder": str(entry.folder),
                "bytes": entry.bytes,
                "current": entry.current,
            }
            for entry in entries
        ]
        print(json.dumps(facts, ensure_ascii=False))
    elif not entries:
        print(f"nothing in {cache.home}")
    else:
        rows = [
            (entry.kind, entry.label, f"{entry.bytes / 1e6:,.1f}", "*" if entry.current else "")
            for entry in entries
        ]
        print(render(("kind", "name", "MB", "in use"), rows, right=frozenset({2})))
        print(f"\n{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB in {cache.home}")
    return 0


def _verify(options: argparse.Namespace, cache: Cache) -> int:
    """The exit code is 4 when anything is damaged."""
    entries = [entry for name in options.names for entry in cache.find(name)] or cache.entries()
    damaged = []
    for entry in entries:
        found = cache.damage(entry)
        damaged += found
        print(f"{entry.kind} {entry.label}: {'damaged' if found else 'whole'}")
        for error in found:
            print(f"  {error.problem}: expected {error.expected}, found {error.found}")
    if damaged:
        raise CorruptFileError(
            "the cache is damaged",
            expected="files with their hashes",
            found=f"{len(damaged)} without",
            remedy="Pull the model again, which replaces what is damaged; remove bundles, which unpack anew.",
        )
    return 0


def _remove(options: argparse.Namespace, cache: Cache) -> int:
    for name in options.names:
        forgotten = cache.forget(name) if options.records else []
        for label in forgotten:
            print(f"forgot the hashes of {label}")
        try:
            entries = cache.find(name)
        except ModelNotFoundError:
            if not forgotten:
                raise
            entries = []
        for entry in entries:
            cache.remove(entry)
            print(f"removed {entry.kind} {entry.label}, {entry.bytes / 1e6:,.1f} MB")
    return 0
