"""The rows of a block: texts to embed, fields to carry along, and what is wrong with the others.

Not here: what becomes of them (``qingyu.runtime.bulk.worker``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from qingyu.errors import DataFileError, InvalidOptionError
from qingyu.runtime.bulk.blocks import Block, InputFile, open_lines, open_parquet

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["OWN_COLUMNS", "BadRow", "Rows", "kept_schema", "read_rows"]

OWN_COLUMNS = ("source", "row", "vector", "scale")
LOOKED_AT = 1000  # lines of JSON until a field's type is taken to be text
ARROW_BATCH = 8192


@dataclass(frozen=True)
class BadRow:
    """A row that has no text to embed; ``row`` counts from 1, like lines in an editor."""

    row: int
    reason: str


@dataclass
class Rows:
    """A block, read: ``numbers`` (from 1), ``texts`` and the table ``kept`` are of the same rows.

    ``blank`` counts empty lines, which are no rows.
    """

    numbers: list[int]
    texts: list[str]
    kept: pa.Table
    bad: list[BadRow]
    blank: int

    def drop(self, reasons: Mapping[int, str]) -> None:
        """Move the texts at these places to the bad rows."""
        self.bad += [BadRow(self.numbers[place], reason) for place, reason in reasons.items()]
        left = [place for place in range(len(self.texts)) if place not in reasons]
        self.numbers = [self.numbers[place] for place in left]
        self.texts = [self.texts[place] for place in left]
        self.kept = _taken(self.kept, left)


def kept_schema(files: Sequence[InputFile], text: str, keep: Sequence[str]) -> pa.Schema:
    """Names and types of the fields that are carried along, the same for every file; checks the text's own, too.

    JSON has no declared types: a field's is that of its first value, text where there is none. Objects and lists are
    carried as JSON text. Raises ``DataFileError`` for a Parquet file without a column, or with one of another type.
    """
    if clash := sorted({*keep} & {*OWN_COLUMNS}):
        raise InvalidOptionError(
            "keep",
            expected=f"no field of the names {', '.join(OWN_COLUMNS)}, which the output has itself",
            found=", ".join(clash),
            remedy="Rename the field in the input.",
        )
    schema: pa.Schema | None = None
    for file in files:
        if file.form == "parquet":
            found = _parquet_schema(file, text, keep)
            if schema is not None and found != schema:
                raise DataFileError(
                    f"{file.path} has other types",
                    expected=", ".join(f"{one.name} {one.type}" for one in schema),
                    found=", ".join(f"{one.name} {one.type}" for one in found),
                    remedy="Bring the files to one type, or embed them into folders of their own.",
                )
            schema = found
    return _json_schema(files, keep) if schema is None else schema


def _parquet_schema(file: InputFile, text: str, keep: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
    for name in (text, *keep):
        if name not in schema.names:
            raise DataFileError(
                f"{file.path} has no column {name!r}",
                expected="a column of that name",
                found=", ".join(map(repr, schema.names)) or "none",
                remedy="Name the text with --field, and others to carry along with --keep.",
            )
    kind = schema.field(text).type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise DataFileError(
            f"the column {text!r} of {file.path} is not text",
            expected="strings",
            found=str(kind),
            remedy="Name another column with --field.",
        )
    return pa.schema([pa.field(name, schema.field(name).type) for name in keep])


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(
        is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _json_schema(files: Sequence[InputFile], keep: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    types: dict[type, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    found: dict[str, pa.DataType] = {}
    if keep:
        for row in _first_objects(files):
            for name in keep:
                if name not in found and row.get(name) is not None:
                    found[name] = types.get(type(row[name]), pa.string())
    return pa.schema([pa.field(name, found.get(name, pa.string())) for name in keep])


def _first_objects(files: Sequence[InputFile]) -> Iterator[dict[str, Any]]:
    for file in files:
        with open_lines(file) as stream:
            for line in islice(stream, LOOKED_AT):
                row = _parsed(line, 1)
                if isinstance(row, dict):
                    yield row


def read_rows(block: Block, text: str, schema: pa.Schema) -> Rows:
    """The rows of a block. Raises ``DataFileError`` where the file is not what the block was cut from."""
    block.file.check_unchanged()
    read = _read_json if block.file.form == "jsonl" else _read_parquet
    found, kept = read(block, text, schema)
    if len(found) != block.rows:
        raise DataFileError(
            f"{block.file.path} does not hold its rows",
            expected=f"{block.rows:,} from row {block.first + 1:,} on",
            found=f"{len(found):,}",
            remedy="Make the file again.",
        )
    numbers = range(block.first + 1, block.first + 1 + len(found))
    places = [place for place, one in enumerate(found) if one.text is not None]
    return Rows(
        numbers=[numbers[place] for place in places],
        texts=[one.text for one in found if one.text is not None],
        kept=_taken(kept, places),
        bad=[BadRow(number, one.wrong) for number, one in zip(numbers, found, strict=True) if one.wrong],
        blank=sum(one == _BLANK for one in found),
    )


def _taken(table: pa.Table, places: Sequence[int]) -> pa.Table:
    import pyarrow as pa

    return table.take(pa.array(places, pa.int64()))  # an empty list alone would have no type


class _Found(NamedTuple):
    """What a row holds: a text, or what is wrong, or neither (an empty line)."""

    text: str | None
    wrong: str | None


_BLANK = _Found(None, None)


def _read_json(block: Block, text: str, schema: pa.Schema) -> tuple[list[_Found], pa.Table]:
    import pyarrow as pa

    with open_lines(block.file) as stream:
        stream.seek(block.offset)
        content = stream.read(block.bytes)
    lines = content.removesuffix(b"\n").split(b"\n")
    found, kept = [], []
    for number, line in enumerate(lines, start=block.first + 1):
        one, fields = _json_row(line, number, text, schema)
        found.append(one)
        kept.append(fields)
    return found, pa.Table.from_pylist(kept, schema=schema)


def _json_row(line: bytes, number: int, text: str, schema: pa.Schema) -> tuple[_Found, dict[str, Any]]:
    if not line.strip():
        return _BLANK, {}
    row = _parsed(line, number)
    if isinstance(row, str):
        return _Found(None, row), {}
    one = _text_in(row.get(text), text)
    kept = {}
    try:
        for column in schema:
            kept[column.name] = _kept(row.get(column.name), column.type)
    except TypeError:
        found = _shown(row[column.name])
        return _Found(None, f"the field {column.name!r} is {found}, not {column.type} like the first"), {}
    return one, kept


def _parsed(line: bytes, number: int) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"not a JSON object but {_shown(row)}"


def _text_in(value: object, name: str) -> _Found:
    if not isinstance(value, str):
        wrong = (
            f"no text in the field {name!r}" if value is None else f"the field {name!r} is {_shown(value)}"
        )
        return _Found(None, wrong)
    if not value.strip():
        return _Found(None, "an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return _Found(None, f"not Unicode text: a lone surrogate at character {error.start}")
    return _Found(value, None)


def _kept(value: Any, kind: pa.DataType) -> Any:  # noqa: ANN401 - whatever JSON holds
    """The value as the column has it; ``TypeError`` where it does not fit."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_string(kind) and isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        raise TypeError from None


def _shown(value: object) -> str:
    return {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}.get(
        type(value), "a string" if isinstance(value, str) else "null"
    )


def _read_parquet(block: Block, text: str, schema: pa.Schema) -> tuple[list[_Found], pa.Table]:
    """Row groups before the block are not read."""
    import pyarrow as pa

    names = list(dict.fromkeys((text, *schema.names)))
    found, kept, left = [], [schema.empty_table()], block.rows
    with open_parquet(block.file) as parquet:
        groups, before = _groups_from(parquet.metadata, block.first)
        for batch in parquet.iter_batches(ARROW_BATCH, row_groups=groups, columns=names):
            own = batch.slice(before, left)
            before = max(0, before - batch.num_rows)
            found += [_text_in(value, text) for value in own.column(text).to_pylist()]
            kept.append(pa.Table.from_batches([own]).select(schema.names).cast(schema))
            left -= own.num_rows
            if left == 0:
                break
    return found, pa.concat_tables(kept)


def _groups_from(metadata: Any, first: int) -> tuple[list[int], int]:  # noqa: ANN401 - pyarrow is untyped
    """The row groups from the one that holds row ``first`` on, and how many rows of it come before."""
    passed = 0
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        if passed + rows > first:
            return list(range(number, metadata.num_row_groups)), first - passed
        passed += rows
    return [], 0
