"""Documents, pieces, their vectors and their terms in one SQLite file: what an index holds, and all that it must.

Everything else (the graph) can be made anew from it. Write-ahead logging lets any number read while one writes;
every change is one transaction, on the disk when it returns. Not here: what is near (``local``).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qingyu.errors import CorruptFileError, InvalidOptionError, OutputError, StoreError
from qingyu.runtime.search.contract import Document, EmbeddedDocument, Filter, Scalar
from qingyu.runtime.search.terms import Words, query_of

__all__ = ["FILE", "FORMATS", "Database", "Piece"]

FILE = "documents.sqlite"
FORMATS = ("1", "2")  # the second: the graph is in parts, which versions that knew only the first cannot read
APPLICATION = 0x71696E67  # "qing", so that `file` and we can tell it from other SQLite files

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, text TEXT NOT NULL,
    fields TEXT NOT NULL
);
CREATE TABLE pieces (
    key INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents, start INTEGER NOT NULL,
    stop INTEGER NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX pieces_of_document ON pieces (document);
CREATE TABLE fields (
    name TEXT NOT NULL, value TEXT NOT NULL, document INTEGER NOT NULL, PRIMARY KEY (name, value, document)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE terms USING fts5 (words, content='', tokenize="unicode61 remove_diacritics 0");
"""

MAPPED = 1 << 31  # bytes of the file that are read by mapping; SQLite takes what it was built to take at most
MOST_PARAMETERS = 500  # of one statement; SQLite's own limit was 999 for long
INTEGERS = 1 << 63
LONGEST_VALUE = 64  # characters of a field's value that stand in its index; longer ones are hashed


class Piece(NamedTuple):
    """A piece as it is stored: key, document's id, text and place there, the document's fields as JSON."""

    key: int
    id: str
    text: str
    start: int
    stop: int
    fields: str


class Database:
    """One connection to an index's SQLite file. Not thread-safe, and not to be taken into a forked child."""

    def __init__(self, folder: Path, *, writable: bool) -> None:
        self.path = folder / FILE
        if not self.path.is_file():
            raise StoreError(
                f"no index at {folder}",
                expected=f"a folder with {FILE}",
                found="nothing there" if not folder.exists() else "a folder without it",
                remedy="Make one with `qingyu index build DOCUMENTS FOLDER`.",
            )
        with _reported(self.path):
            self._connection = _connect(self.path, writable=writable)
            if self._connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise sqlite3.DatabaseError("another kind of SQLite file")
        found = self.fact("format")
        if found not in FORMATS:
            raise StoreError(
                f"{folder} was made by another version",
                expected=f"format {' or '.join(FORMATS)}",
                found=f"format {found}",
                remedy="Use the version of qingyu that made it, or build it anew.",
            )

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, str]) -> Database:
        """A database of no documents, with these facts, in a folder that is there."""
        for path in filter(cls.is_leftover, folder.iterdir()):
            path.unlink()
        path, temporary = folder / FILE, folder / f".{FILE}.new"
        with _reported(path):
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                connection.executescript(f"BEGIN; PRAGMA application_id = {APPLICATION}; {SCHEMA}")
                connection.executemany(
                    "INSERT INTO facts VALUES (?, ?)", {"format": FORMATS[0], **facts}.items()
                )
                connection.execute("COMMIT")
            finally:
                connection.close()
            temporary.rename(path)
        return cls(folder, writable=True)

    @staticmethod
    def is_leftover(path: Path) -> bool:
        """Whether a file is what ``create`` leaves behind when it is killed."""
        return path.name.startswith(f".{FILE}.new")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One transaction: all that is done inside is kept, or nothing."""
        with _reported(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def looking(self) -> Iterator[None]:
        """One state of the database for everything read inside."""
        with _reported(self.path):
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")

    def look_again(self) -> None:
        """Go on, inside ``looking``, with the newest state."""
        self._connection.execute("ROLLBACK")
        self._connection.execute("BEGIN")

    def version(self) -> int:
        """A number that changes when another connection has changed anything."""
        with _reported(self.path):
            number: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        return number

    def fact(self, name: str) -> str | None:
        """A fact about the index, or ``None``."""
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row[0])

    def facts(self) -> dict[str, str]:
        """All of them."""
        return dict(self._rows("SELECT name, value FROM facts"))

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Add or replace facts."""
        self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def put(self, documents: Sequence[EmbeddedDocument], vectors: Iterable[bytes], words: Words) -> None:
        """Store documents, and the bytes of all their vectors in order; those with the same ids must be removed first.

        Numbers and keys go on from the largest ever given, as AUTOINCREMENT does, so that rows can be stored in bulk.
        """
        number, key = self._last("documents"), self._last("pieces")
        rows, values, pieces, terms = [], [], [], []
        stored = iter(vectors)
        for one in documents:
            number += 1
            document = one.document
            fields = json.dumps(dict(document.fields), ensure_ascii=False)
            rows.append((number, document.id, document.digest, document.text, fields))
            values += [(name, value, number) for name, value in _indexed(document.fields)]
            for span in one.spans:
                key += 1
                pieces.append((key, number, span.start, span.stop, next(stored)))
                terms.append((key, " ".join(words(document.text[span.start : span.stop]))))
        insert = self._connection.executemany
        insert("INSERT INTO documents (number, id, digest, text, fields) VALUES (?, ?, ?, ?, ?)", rows)
        insert("INSERT INTO fields VALUES (?, ?, ?)", values)
        insert("INSERT INTO pieces (key, document, start, stop, vector) VALUES (?, ?, ?, ?, ?)", pieces)
        insert("INSERT INTO terms (rowid, words) VALUES (?, ?)", terms)

    def _last(self, table: str) -> int:
        """The largest number that a row of the table ever had."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = ?", table)
        return 0 if row is None else int(row[0])

    def remove(self, ids: Collection[str]) -> int:
        """Remove documents; their terms stay until the next compaction, and are found by no search."""
        removed = 0
        for part in _parts(list(ids)):
            rows = self._rows(f"SELECT number, fields FROM documents WHERE id IN ({_marks(part)})", *part)
            for number, fields in rows:
                values = [(name, value, number) for name, value in _indexed(json.loads(fields))]
                self._connection.executemany(
                    "DELETE FROM fields WHERE name = ? AND value = ? AND document = ?", values
                )
                self._connection.execute("DELETE FROM pieces WHERE document = ?", (number,))
                self._connection.execute("DELETE FROM documents WHERE number = ?", (number,))
            removed += len(rows)
        return removed

    def digests(self, ids: Collection[str]) -> dict[str, str]:
        """Digests by id of those documents that are there."""
        found: dict[str, str] = {}
        for part in _parts(list(ids)):
            found.update(self._rows(f"SELECT id, digest FROM documents WHERE id IN ({_marks(part)})", *part))
        return found

    def ids(self) -> Iterator[str]:
        """The ids of all documents, in the order in which they were stored."""
        last = 0
        while rows := self._rows(
            "SELECT number, id FROM documents WHERE number > ? ORDER BY number LIMIT 1000", last
        ):
            yield from (name for _, name in rows)
            last = rows[-1][0]

    def document(self, name: str) -> Document | None:
        """The document with this id."""
        row = self._one("SELECT id, text, fields FROM documents WHERE id = ?", name)
        return None if row is None else Document(row[0], row[1], json.loads(row[2]))

    def count(self, table: str) -> int:
        """How many rows a table has."""
        row = self._one(f"SELECT count(*) FROM {table}")  # the names are ours
        assert row is not None
        return int(row[0])

    def count_above(self, key: int) -> int:
        """How many pieces have larger keys."""
        row = self._one("SELECT count(*) FROM pieces WHERE key > ?", key)
        assert row is not None
        return int(row[0])

    def vectors(self, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """Keys and bytes of the first ``limit`` pieces with keys above ``after``, by key."""
        return self._rows("SELECT key, vector FROM pieces WHERE key > ? ORDER BY key LIMIT ?", after, limit)

    def keys(self) -> list[int]:
        """The keys of all pieces, ascending."""
        return [row[0] for row in self._rows("SELECT key FROM pieces ORDER BY key")]

    def vectors_of(self, keys: Sequence[int], where: Filter | None) -> list[tuple[int, bytes]]:
        """Keys and bytes of those of the pieces that are there and pass the filter, in no particular order."""
        condition, values = _condition(where, column="document")
        found: list[tuple[int, bytes]] = []
        for part in _parts(keys):
            query = f"SELECT key, vector FROM pieces WHERE key IN ({_marks(part)}){condition}"
            found += self._rows(query, *part, *values)
        return found

    def pieces(self, keys: Sequence[int]) -> dict[int, Piece]:
        """Those of the pieces that are there, by key."""
        found: dict[int, Piece] = {}
        for part in _parts(keys):
            rows = self._rows(
                "SELECT key, id, substr(text, start + 1, stop - start), start, stop, fields "
                f"FROM pieces JOIN documents ON number = document WHERE key IN ({_marks(part)})",
                *part,
            )
            found.update((row[0], Piece._make(row)) for row in rows)
        return found

    def passing(self, where: Filter, *, limit: int) -> list[tuple[int, bytes]]:
        """Keys and bytes of at most ``limit`` pieces whose documents pass the filter."""
        condition, values = _condition(where, column="document")
        return self._rows(f"SELECT key, vector FROM pieces WHERE 1{condition} LIMIT ?", *values, limit)

    def batches(self, where: Filter | None, *, size: int) -> Iterator[list[tuple[int, bytes]]]:
        """Keys and bytes of all pieces whose documents pass the filter, in batches."""
        condition, values = _condition(where, column="document")
        last = 0
        while rows := self._rows(
            f"SELECT key, vector FROM pieces WHERE key > ?{condition} ORDER BY key LIMIT ?",
            last,
            *values,
            size,
        ):
            yield rows
            last = rows[-1][0]

    def match(self, text: str, words: Words, *, k: int, where: Filter | None) -> list[tuple[int, float]]:
        """Keys of the ``k`` best pieces by BM25, best first, with scores that are larger for better ones."""
        query = query_of(text, words)
        if not query:
            return []
        condition, values = _condition(where, column="document")
        rows = self._rows(
            "SELECT terms.rowid, bm25(terms) AS badness FROM terms JOIN pieces ON key = terms.rowid "
            f"WHERE terms MATCH ?{condition} ORDER BY badness, terms.rowid LIMIT ?",
            query,
            *values,
            k,
        )
        return [(key, -badness) for key, badness in rows]

    def rebuild_terms(self, words: Words) -> None:
        """Make the terms anew, without those of pieces that were removed."""
        self._connection.execute("INSERT INTO terms (terms) VALUES ('delete-all')")
        rows = self._connection.execute(
            "SELECT key, substr(text, start + 1, stop - start) FROM pieces JOIN documents ON number = document"
        )
        added = ((key, " ".join(words(text))) for key, text in rows)
        self._connection.executemany("INSERT INTO terms (rowid, words) VALUES (?, ?)", added)

    def damage(self) -> list[str]:
        """What SQLite's own check finds wrong, and what our tables contradict each other in."""
        found = [row[0] for row in self._rows("PRAGMA integrity_check(10)") if row[0] != "ok"]
        contradictions = {
            "pieces of no document": "SELECT count(*) FROM pieces WHERE document NOT IN (SELECT number FROM documents)",
            "documents without pieces": "SELECT count(*) FROM documents WHERE number NOT IN "
            "(SELECT document FROM pieces)",
            "fields of no document": "SELECT count(*) FROM fields WHERE document NOT IN (SELECT number FROM documents)",
            "pieces without terms": "SELECT count(*) FROM pieces WHERE key NOT IN (SELECT id FROM terms_docsize)",
        }
        for what, query in contradictions.items():
            row = self._one(query)
            if row is not None and row[0]:
                found.append(f"{row[0]} {what}")
        return found

    def vacuum(self) -> None:
        """Give the room of removed rows back to the file system."""
        with _reported(self.path):
            self._connection.execute("VACUUM")

    def close(self) -> None:
        """Close the connection; the last one to close puts the log into the file."""
        self._connection.close()

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with _reported(self.path):
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = self._rows(query, *values)
        return rows[0] if rows else None


def _connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    # A reader needs to write beside the log, too; where it cannot, nobody else can be writing.
    frozen = not writable and not os.access(path.parent, os.W_OK)
    # Characters that mean something in a URI are quoted.
    address = f"{path.resolve().as_uri()}?{'mode=ro&immutable=1' if frozen else 'mode=rw'}"
    log = path.with_name(path.name + "-wal")
    if frozen and log.is_file() and log.stat().st_size:
        raise StoreError(
            f"{path.parent} was not closed, and cannot be written",
            expected="a folder that was closed before it was made read-only",
            found=f"changes in {log.name}",
            remedy="Open it once where it can be written, for example with `qingyu index info`.",
        )
    connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=10, check_same_thread=False)
    if not frozen:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA mmap_size = {MAPPED}")
    if not writable:
        connection.execute("PRAGMA query_only = 1")
    return connection


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, by who must act."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        said = str(error)
        if name in ("SQLITE_FULL", "SQLITE_READONLY") or name.startswith("SQLITE_IOERR") or "full" in said:
            raise OutputError(
                f"cannot write {path}",
                expected="a folder that can be written, with room",
                found=said,
                remedy="Free space or choose another folder; what was stored before is still there.",
            ) from None
        if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB") or "another kind" in said:
            raise CorruptFileError(
                f"{path} is damaged",
                expected="the database of an index",
                found=said,
                remedy="Restore it from a copy, or build the index anew.",
            ) from None
        raise StoreError(
            f"cannot use {path}",
            expected="a database that can be opened",
            found=said,
            remedy="See that nothing else holds it, and that this user may read and write its folder.",
        ) from None


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), MOST_PARAMETERS):
        yield values[start : start + MOST_PARAMETERS]


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


NO_VALUE = "[]"  # of a list or an object, which is there and equals no value that can be asked for


def _indexed(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that can be filtered by, with the form of their values that equal values share."""
    for name, value in fields.items():
        if isinstance(value, (str, int, float)):
            yield name, _canonical(value)
        elif value is not None:
            yield name, NO_VALUE


def _canonical(value: str | int | float) -> str:
    """Equal for values that are equal as JSON: 1 and 1.0, but neither "1" nor true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = json.dumps(value, ensure_ascii=False)
    return (
        text
        if len(text) <= LONGEST_VALUE
        else "#" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    )


def _condition(where: Filter | None, *, column: str = "number") -> tuple[str, list[str]]:
    """A filter as a condition on documents' numbers, and its parameters."""
    condition, values = "", []
    for name, value in (where or {}).items():
        options = [value] if isinstance(value, (str, int, float, type(None))) else list(value)
        _check_options(name, options)
        given = [_canonical(one) for one in options if one is not None]
        parts = []
        if given:
            parts.append(
                f"{column} IN (SELECT document FROM fields WHERE name = ? AND value IN ({_marks(given)}))"
            )
            values += [name, *given]
        if None in options:
            parts.append(f"{column} NOT IN (SELECT document FROM fields WHERE name = ?)")
            values.append(name)
        condition += f" AND ({' OR '.join(parts)})" if parts else " AND 0"
    return condition, values


def _check_options(name: str, options: Sequence[Scalar]) -> None:
    wrong = [one for one in options if not isinstance(one, (str, int, float, type(None)))]
    if wrong or len(options) > MOST_PARAMETERS:
        raise InvalidOptionError(
            f"the filter on {name!r}",
            expected=f"a text, number, truth value or null, or at most {MOST_PARAMETERS} of them",
            found=type(wrong[0]).__name__ if wrong else str(len(options)),
            remedy="Filter by fields with single values.",
        )
