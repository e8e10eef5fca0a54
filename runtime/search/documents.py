"""Documents from files of JSON lines or TSV, row by row; a row that is none is a ``BadRow``, and the rest is read.

Not here: what is done with bad rows.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from qingyu.errors import DataFileError, DocumentError, QingyuError
from qingyu.runtime.search.contract import Document

__all__ = ["BadRow", "read_documents"]

LONGEST_LINE = 64 << 20  # bytes; a longer line is no document, and would be held in memory whole


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be a document: its line, its id where that is known, and why."""

    line: int | None
    id: str | None
    error: QingyuError


def read_documents(
    source: str, *, id_field: str = "id", text_field: str = "text"
) -> Iterator[Document | BadRow]:
    """The documents of a UTF-8 file, and the rows that are none, in their order.

    Names ending in .tsv are TSV with a header line, all others ("-": standard input) JSON lines; .gz is read through
    gzip. An id is a string or a whole number. All other columns become fields. ``DataFileError`` for a file that
    cannot be read at all.
    """
    is_tsv = source.removesuffix(".gz").endswith(".tsv")
    header: list[str] | None = None
    with _opened(source) as stream:
        for number, raw in _lines(stream):
            if not raw.strip():
                continue
            try:
                line = _text(raw, number)
                if is_tsv and header is None:
                    header = line.split("\t")
                    continue
                row = _object(line) if header is None else _cells(line, header)
            except DocumentError as error:
                yield BadRow(number, None, error)
                continue
            yield _document(row, number, id_field, text_field)


def _document(row: Mapping[str, Any], number: int, id_field: str, text_field: str) -> Document | BadRow:
    name: str | None = None
    try:
        name = _id(row, id_field)
        fields = {key: value for key, value in row.items() if key not in (id_field, text_field)}
        return Document(name, _field(row, text_field), fields, line=number)
    except DocumentError as error:
        return BadRow(number, name, error)


def _id(row: Mapping[str, Any], field: str) -> str:
    value = _field(row, field)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        _refuse("an id is no name", "a string or a whole number", repr(value)[:80])
    return str(value)


def _field(row: Mapping[str, Any], field: str) -> Any:  # noqa: ANN401 - JSON values
    if field not in row:
        _refuse(
            f"a row lacks the field {field!r}",
            f"the field {field!r}",
            ", ".join(map(repr, row))[:200] or "none",
        )
    return row[field]


def _object(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse("a line is not JSON", "one JSON object a line", str(error))
    if not isinstance(row, dict):
        _refuse("a line is no JSON object", "one JSON object a line", type(row).__name__)
    return row


def _cells(line: str, header: list[str]) -> Mapping[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(header):
        _refuse("a line has not the columns of the header", str(len(header)), str(len(cells)))
    return dict(zip(header, cells, strict=True))


def _text(raw: bytes, number: int) -> str:
    if len(raw) >= LONGEST_LINE:
        _refuse("a line is too long", f"less than {LONGEST_LINE >> 20} MB", "more")
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        _refuse("a line is not text", "UTF-8", f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    return line.removesuffix("\n").removesuffix("\r")


def _refuse(problem: str, expected: str, found: str) -> NoReturn:
    raise DocumentError(problem, expected=expected, found=found, remedy="Repair the line, or leave it out.")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, of which one that is too long is cut, and its rest skipped."""
    number = 0
    while raw := stream.readline(LONGEST_LINE):
        number += 1
        yield number, raw
        while len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            raw = stream.readline(LONGEST_LINE)


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as stream:
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=stream)) if source.endswith(".gz") else stream
    except (OSError, EOFError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataFileError(
            f"cannot read {source}", expected="a readable file", found=found, remedy="Check the path."
        ) from None
