"""Input files cut into blocks: the unit that is embedded, retried and written as one file.

A block is a run of consecutive rows of one file, about ``block_bytes`` of it, because bytes of text are close to
tokens and so to work. JSON lines are cut at lines and Parquet files by rows, both without embedding anything.

Not here: who embeds which block (``qingyu.runtime.bulk.job``).
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

from qingyu.errors import DataFileError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = [
    "Block",
    "Form",
    "InputFile",
    "find_inputs",
    "open_lines",
    "open_parquet",
    "read_failures",
    "split",
]

Form = Literal["jsonl", "parquet"]
FORMS: dict[str, Form] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
# A Parquet column of few different values takes few bytes, so bytes alone would not bound a block.
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the job was planned. ``name`` is its path below the glob's fixed part."""

    path: str
    name: str
    form: Form
    bytes: int
    modified_ns: int

    def check_unchanged(self) -> None:
        """Raise ``DataFileError`` for a file that is not what was planned with, or not seen from this machine."""
        with read_failures(self.path):
            now = os.stat(self.path)  # noqa: PTH116 - a Path for each block buys nothing
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.modified_ns):
            raise DataFileError(
                f"{self.path} has changed",
                expected=f"{self.bytes:,} bytes, as when the job was planned",
                found=f"{now.st_size:,} bytes, modified since",
                remedy="Leave inputs alone while a job runs, and start it again into a new folder.",
            )


@dataclass(frozen=True)
class Block:
    """Rows ``first`` to ``first + rows`` of a file (from 0), the ``number``-th block of it.

    ``offset`` and ``bytes`` say where the lines are in a file of JSON lines (unpacked, if it is gzipped).
    """

    file: InputFile
    number: int
    first: int
    rows: int
    offset: int = 0
    bytes: int = 0


def find_inputs(pattern: str) -> list[InputFile]:
    """The files that a glob (or a plain path) names, sorted; ``DataFileError`` for none, or one of another kind."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    paths = sorted(path for path in found if Path(path).is_file())
    if not paths:
        raise DataFileError(
            f"no input {pattern}",
            expected="at least one file",
            found="none",
            remedy="Check the path. Quote a glob, so that it is not the shell that expands it.",
        )
    root = _fixed_part(pattern)
    return [_input_file(Path(path), root) for path in paths]


def _fixed_part(pattern: str) -> Path:
    """The folder that names are relative to, so that they do not change with the current folder."""
    parts = Path(pattern).parts
    fixed = [part for n, part in enumerate(parts) if not any(glob.has_magic(one) for one in parts[: n + 1])]
    return Path(*fixed) if len(fixed) < len(parts) else Path(pattern).parent


def _input_file(path: Path, root: Path) -> InputFile:
    name = path.relative_to(root).as_posix()
    form = FORMS.get(Path(name.removesuffix(".gz")).suffix)
    if form is None or (form == "parquet" and name.endswith(".gz")):
        raise DataFileError(
            f"cannot tell the format of {path}",
            expected="names ending in .jsonl, .jsonl.gz or .parquet",
            found=path.name,
            remedy="Rename it, or give a narrower --input.",
        )
    with read_failures(str(path)):
        status = path.stat()
    return InputFile(str(path.resolve()), name, form, status.st_size, status.st_mtime_ns)


def split(file: InputFile, block_bytes: int, field: str) -> list[Block]:
    """A file's blocks in order; every row is in exactly one. A file of no rows has none."""
    cuts = _line_cuts(file, block_bytes) if file.form == "jsonl" else _row_cuts(file, block_bytes, field)
    return [Block(file, number, *cut) for number, cut in enumerate(cuts)]


def _line_cuts(file: InputFile, block_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, offset, bytes) of each block of lines; reads the file once."""
    first = offset = rows = size = 0
    with open_lines(file) as stream:
        for line in stream:
            rows += 1
            size += len(line)
            if size >= block_bytes:
                yield first, rows, offset, size
                first, offset, rows, size = first + rows, offset + size, 0, 0
    if rows:
        yield first, rows, offset, size


def _row_cuts(file: InputFile, block_bytes: int, field: str) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each block of a Parquet file; reads its footer only."""
    first = rows = 0
    size = 0.0
    for count, width in _row_widths(file, field):
        while count:
            room = min(BLOCK_ROWS - rows, max(1, int((block_bytes - size) / max(width, 1e-9))))
            taken = min(count, room)
            rows, size, count = rows + taken, size + taken * width, count - taken
            if size + width > block_bytes or rows == BLOCK_ROWS:
                yield first, rows
                first, rows, size = first + rows, 0, 0.0
    if rows:
        yield first, rows


def _row_widths(file: InputFile, field: str) -> Iterator[tuple[int, float]]:
    """(rows, unpacked bytes of the text in each) of the row groups."""
    with open_parquet(file) as parquet:
        column = parquet.schema_arrow.names.index(field) if field in parquet.schema_arrow.names else None
        path = None if column is None else parquet.schema_arrow.names[column]
        for number in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(number)
            chunks = (group.column(n) for n in range(group.num_columns))
            size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == path)
            if group.num_rows:
                yield group.num_rows, size / group.num_rows


@contextmanager
def open_lines(file: InputFile) -> Iterator[IO[bytes]]:
    """The bytes of a file of lines, unpacked if it is gzipped."""
    with read_failures(file.path), Path(file.path).open("rb") as stream:
        yield cast("IO[bytes]", gzip.GzipFile(fileobj=stream)) if file.name.endswith(".gz") else stream


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """A Parquet file, opened."""
    import pyarrow.parquet as pq

    with read_failures(file.path), pq.ParquetFile(file.path) as parquet:
        yield parquet


@contextmanager
def read_failures(path: str) -> Iterator[None]:
    """Turns what goes wrong in reading a file into ``DataFileError``."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        found = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        )
        raise DataFileError(
            f"cannot read {path}",
            expected="a whole file that can be read from every machine of the job",
            found=found or type(error).__name__,
            remedy="Check the path and the file.",
        ) from None
