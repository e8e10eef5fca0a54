"""Output files, each the vectors of one block: written under a temporary name, renamed when whole.

A part's name follows from its block alone, so that whoever writes it, and however often, there is one. The temporary
name says who is at it and which attempt that is: what a killed worker leaves is how the next one knows. Bad rows
and counts are in the part's own metadata, so that they appear with the vectors or not at all.

Not here: which blocks there are (``qingyu.runtime.bulk.blocks``).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qingyu.errors import OutputError
from qingyu.runtime import vectors as forms
from qingyu.runtime.bulk.blocks import Block
from qingyu.runtime.bulk.rows import BadRow, Rows
from qingyu.runtime.engine import Floats
from qingyu.runtime.task import Report

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "DataType",
    "PartFacts",
    "attempts_at",
    "new_attempt",
    "part_name",
    "read_facts",
    "table_of",
    "write_part",
]

DataType = Literal["float32", "float16", "int8", "binary"]
FACTS = b"qingyu"


@dataclass(frozen=True)
class PartFacts:
    """What a part says about its block: the rows embedded, those that could not be, and what was read."""

    rows: int
    bad: tuple[BadRow, ...]
    blank: int
    report: Report

    def to_json(self) -> str:
        """JSON text, which ``from_json`` reads back."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartFacts:
        """The facts that ``to_json`` wrote."""
        found = json.loads(text)
        bad = tuple(BadRow(**one) for one in found["bad"])
        return cls(found["rows"], bad, found["blank"], Report(**found["report"]))


def part_name(block: Block) -> str:
    """The name of a block's part, the same whatever other files a job has."""
    digest = hashlib.sha256(block.file.name.encode()).hexdigest()[:10]
    return f"part-{digest}-{block.number:06d}.parquet"


def attempts_at(folder: Path, block: Block) -> list[Path]:
    """What attempts at a block have left: those under way, and those whose worker died."""
    with write_failures(folder):
        return sorted(folder.glob(f".{part_name(block)}.attempt-*"))


def new_attempt(folder: Path, block: Block, number: int) -> Path:
    """An empty file that says that this process is at a block, for the ``number``-th time."""
    name = f".{part_name(block)}.attempt-{number}.{socket.gethostname()}.{os.getpid()}"
    path = folder / name
    with write_failures(folder):
        path.touch()
    return path


def write_part(attempt: Path, table: pa.Table, facts: PartFacts, folder: Path, block: Block) -> None:
    """Write a block's part under its attempt's name, and rename it when it is on the disk."""
    import pyarrow.parquet as pq

    kept = {**(table.schema.metadata or {}), FACTS: facts.to_json().encode()}
    with write_failures(folder):
        with attempt.open("wb") as stream:
            # Vectors do not compress, and a dictionary of them is larger than they are.
            plain = [name for name in table.schema.names if name not in ("vector", "scale")]
            pq.write_table(table.replace_schema_metadata(kept), stream, use_dictionary=plain)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            attempt.replace(folder / part_name(block))
        except FileNotFoundError:
            # Ray had given this worker up, another one did the block, and its attempts were cleared away.
            if not (folder / part_name(block)).exists():
                raise


def clear_attempts(folder: Path, block: Block) -> None:
    """Remove what attempts at a finished block have left."""
    for path in attempts_at(folder, block):
        with suppress(FileNotFoundError):
            path.unlink()


def read_facts(folder: Path, block: Block) -> PartFacts | None:
    """The facts of a block's part; ``None`` where there is no whole one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(folder / part_name(block)).metadata or {}
        return PartFacts.from_json(metadata[FACTS])
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None


def table_of(block: Block, rows: Rows, vectors: Floats, dtype: DataType) -> pa.Table:
    """The part's table: the fields kept, ``source``, ``row`` (from 1), ``vector`` and, for int8, ``scale``."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: rows.kept.column(name) for name in rows.kept.schema.names}
    columns["source"] = pa.array([block.file.name] * len(rows.texts), pa.string())
    columns["row"] = pa.array(rows.numbers, pa.int64())
    columns |= _stored(vectors, dtype)
    return pa.table(columns)


def _stored(vectors: Floats, dtype: DataType) -> dict[str, pa.Array]:
    import pyarrow as pa

    if dtype == "int8":
        codes, scales = forms.to_int8(vectors)
        return {"vector": _lists(codes), "scale": pa.array(scales)}
    if dtype == "binary":
        return {"vector": _lists(forms.to_binary(vectors))}
    return {"vector": _lists(forms.to_float16(vectors) if dtype == "float16" else vectors)}


def _lists(rows: Any) -> pa.Array:  # noqa: ANN401 - an array of any of the types
    """Rows as an Arrow array of lists of fixed size, without a copy."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


@contextmanager
def write_failures(folder: Path) -> Iterator[None]:
    """Turns what goes wrong in writing into ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write into {folder}",
            expected="a folder that every machine of the job can write into, with room",
            found=error.strerror or str(error),
            remedy="Make room or choose another --output; what is finished there is kept.",
        ) from None


def bad_lines(source: str, bad: Sequence[BadRow]) -> str:
    """Bad rows as JSON lines."""
    rows = ({"source": source, "row": one.row, "reason": one.reason} for one in bad)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
