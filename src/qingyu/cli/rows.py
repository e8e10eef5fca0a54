"""Rows of named fields from TSV files with a header line and from JSON lines, gzipped or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qingyu.cli.text_input import lines_of
from qingyu.errors import DataFileError

__all__ = ["read_rows"]


def read_rows(source: str, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row) for each row that is not blank; every row has all of ``fields``.

    Names ending in .jsonl or .ndjson (and .gz) are JSON lines, all others TSV. ``DataFileError`` names the line.
    """
    is_json = source.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    header: list[str] | None = None
    for number, line in lines_of(source):
        if not line.strip():
            continue
        if is_json:
            row = _object(source, number, line)
        elif header is None:
            header = line.split("\t")
            _check(source, number, header, fields)
            continue
        else:
            row = _cells(source, number, line, header)
        _check(source, number, row, fields)
        yield number, row


def _object(source: str, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataFileError(
            f"{source}, line {number} is not JSON",
            expected="one JSON object a line",
            found=str(error),
            remedy="Repair the line.",
        ) from None
    if not isinstance(row, dict):
        raise DataFileError(
            f"{source}, line {number}",
            expected="a JSON object",
            found=type(row).__name__,
            remedy="Repair the line.",
        )
    return row


def _cells(source: str, number: int, line: str, header: Sequence[str]) -> Mapping[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(header):
        raise DataFileError(
            f"{source}, line {number} has not the columns of the header",
            expected=str(len(header)),
            found=str(len(cells)),
            remedy="Repair the line: a text must not hold a tab.",
        )
    return dict(zip(header, cells, strict=True))


def _check(source: str, number: int, found: Sequence[str] | Mapping[str, Any], fields: Sequence[str]) -> None:
    missing = [name for name in fields if name not in found]
    if missing:
        raise DataFileError(
            f"{source}, line {number} lacks {', '.join(map(repr, missing))}",
            expected=f"the fields {', '.join(map(repr, fields))}",
            found=", ".join(map(repr, found)) or "none",
            remedy="Rename the columns.",
        )
