"""A file of JSON lines that every measurement is appended to, so that a run can be split, resumed and merged."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qingyu.errors import DataFileError

__all__ = ["FORMAT", "KINDS", "Row", "Session", "read_rows"]

Row = dict[str, Any]

FORMAT = 1
# What others used of the machine meanwhile, what the process did, and what nobody did.
DISTURBED = frozenset({"foreign", "own", "idle"})
COMMON = frozenset({"kind", "session"})
# Kind of a row -> the fields that it has besides "kind" and "session".
KINDS: dict[str, frozenset[str]] = {
    "session": frozenset({"format", "machine", "quick", "cores", "started"}),
    "facts": frozenset({"model", "contender", "versions", "installed_mb", "title", "precision", "how"}),
    "model": frozenset({"model", "title", "real", "operations_per_token"}),
    "skipped": frozenset({"model", "contender", "reason"}),
    "round": frozenset(
        {"model", "contender", "cores", "workload", "round", "texts", "tokens", "cpu_seconds"}
    ),
    "wall": frozenset({"model", "cores", "round", "gops"}) | DISTURBED,
    "cold": frozenset({"model", "contender", "cores", "round", "milliseconds", "private", "peak"})
    | DISTURBED,
    "memory": frozenset({"model", "contender", "cores", "opened", "largest", "idle"}),
    "growth": frozenset({"model", "contender", "cores", "round", "texts", "seconds", "samples", "streamed"}),
    "fidelity": frozenset({"model", "contender", "cosine", "centred_cosine", "top_10_overlap", "texts"}),
}


class Session:
    """Rows of one run: written as they are measured, so that what is measured is not lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = uuid.uuid4().hex[:8]
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, row: Row) -> None:
        """Append one row."""
        line = json.dumps({"kind": kind, "session": self.name, **row}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files in order; raises ``DataFileError`` for what is no such file."""
    rows = [row for path in paths for row in _rows(path)]
    if not rows:
        raise DataFileError(
            "nothing has been measured",
            expected="rows in " + ", ".join(map(str, paths)),
            found="none",
            remedy="Measure first: python -m qingyu.bench compare",
        )
    return rows


def _rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, str(error)) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _refused(path, f"line {number}: {error}") from error
        missing = COMMON - set(row) if isinstance(row, dict) else frozenset({"an object"})
        if not missing:
            missing = KINDS.get(row["kind"], frozenset({"a known kind"})) - set(row)
        if missing:
            raise _refused(path, f"line {number} without {', '.join(sorted(missing))}")
        yield row


def _refused(path: Path, found: str) -> DataFileError:
    return DataFileError(
        f"{path} is no file of measurements",
        expected="what `python -m qingyu.bench compare` appends to",
        found=found,
        remedy="Name another file, or measure into another folder.",
    )
