"""Texts from arguments, a file or standard input, one at a time, so that input of any length streams.

Text files hold one text a line (an empty line is an empty text: row n is line n), JSON lines one object a line
with the text in a named field, TSV files one row a line. A name ending in .gz is read through gzip.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

from qingyu.errors import DataFileError

__all__ = ["add_text_arguments", "from_arguments", "lines_of", "read_texts"]

Format = Literal["lines", "jsonl", "tsv"]
DEFAULT_FIELD = "text"


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add TEXT ..., --input, --format and --field."""
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts; without any, --input or standard input"
    )
    parser.add_argument("--input", metavar="FILE", help="read texts from FILE, - for standard input")
    add_file_arguments(parser)


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --format and --field, which say how a file of texts is read."""
    parser.add_argument(
        "--format",
        choices=("lines", "jsonl", "tsv"),
        help="of the input; by default from the file's name (.jsonl, .tsv, anything else: one text a line)",
    )
    parser.add_argument(
        "--field",
        metavar="NAME",
        help="JSON field, TSV column by name, or TSV column by number from 1 in a file without a header line "
        "(default: text; for TSV without such a column, the first)",
    )


def from_arguments(options: argparse.Namespace) -> tuple[Iterator[str], int | None]:
    """The texts that the arguments ask for, and how many there are if that is known beforehand."""
    if options.texts and options.input:
        raise DataFileError(
            "two sources of text",
            expected="texts as arguments or --input",
            found="both",
            remedy="Leave one of them out.",
        )
    if options.texts:
        return iter(options.texts), len(options.texts)
    if options.input is None and sys.stdin.isatty():
        raise DataFileError(
            "no text",
            expected="texts as arguments, --input FILE, or standard input from a pipe",
            found="none of them",
            remedy='For example: qingyu embed --model FOLDER "今天天气真好"',
        )
    return read_texts(options.input or "-", form=options.format, field=options.field), None


def read_texts(source: str, *, form: Format | None = None, field: str | None = None) -> Iterator[str]:
    """The texts of a file ("-": standard input); ``DataFileError`` names the line that cannot be read."""
    chosen = form or _form_of(source)
    with _opened(source) as stream:
        yield from _READERS[chosen](_lines(stream, source), source, field)


def lines_of(source: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file, gzipped or not; ``DataFileError`` names the line that is not text."""
    with _opened(source) as stream:
        yield from _lines(stream, source)


def _form_of(source: str) -> Format:
    name = source.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "tsv" if name.endswith(".tsv") else "lines"


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as stream:
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=stream)) if source.endswith(".gz") else stream
    except (OSError, EOFError) as error:
        if isinstance(error, BrokenPipeError):
            raise  # of the output, while this file was open
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataFileError(
            f"cannot read {source}", expected="a readable file", found=found, remedy="Check the path."
        ) from None


def _lines(stream: IO[bytes], source: str) -> Iterator[tuple[int, str]]:
    # Split at \n alone: U+2028 and its like may stand inside a text.
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataFileError(
                f"{source}, line {number} is not text",
                expected="UTF-8",
                found=f"byte 0x{raw[error.start]:02x} at column {error.start + 1}",
                remedy="Convert the file, for example with iconv -f GB18030 -t UTF-8.",
            ) from None
        yield number, line.removesuffix("\n").removesuffix("\r")


def _read_lines(lines: Iterable[tuple[int, str]], source: str, field: str | None) -> Iterator[str]:
    if field is not None:
        raise DataFileError(
            f"{source} has no fields",
            expected="JSON lines or TSV with --field",
            found="one text a line",
            remedy="Add --format jsonl or --format tsv, or leave --field out.",
        )
    for _, line in lines:
        yield line


def _read_jsonl(lines: Iterable[tuple[int, str]], source: str, field: str | None) -> Iterator[str]:
    name = field or DEFAULT_FIELD
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataFileError(
                f"{source}, line {number} is not JSON",
                expected="one JSON object a line",
                found=str(error),
                remedy="Repair the line, or read plain lines with --format lines.",
            ) from None
        text = row.get(name) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise DataFileError(
                f"{source}, line {number} has no text",
                expected=f"a string in the field {name!r}",
                found=found or "an empty object",
                remedy="Name the field with --field.",
            )
        yield text


def _read_tsv(lines: Iterable[tuple[int, str]], source: str, field: str | None) -> Iterator[str]:
    rows = ((number, line.split("\t")) for number, line in lines)
    if field is not None and field.isdecimal():
        column = int(field) - 1
    else:
        header = next(rows, (1, []))[1]
        column = _column(header, source, field)
    for number, cells in rows:
        if not 0 <= column < len(cells):
            raise DataFileError(
                f"{source}, line {number} is too short",
                expected=f"at least {column + 1} columns",
                found=str(len(cells)),
                remedy="Repair the line or choose another --field.",
            )
        yield cells[column]


def _column(header: list[str], source: str, field: str | None) -> int:
    if (field or DEFAULT_FIELD) in header:
        return header.index(field or DEFAULT_FIELD)
    if field is None:
        return 0
    raise DataFileError(
        f"{source} has no column {field!r}",
        expected="a name in its first line",
        found=", ".join(map(repr, header)),
        remedy="Use one of them, or a column number for a file without a header line.",
    )


_READERS: dict[Format, Callable[[Iterable[tuple[int, str]], str, str | None], Iterator[str]]] = {
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "tsv": _read_tsv,
}
