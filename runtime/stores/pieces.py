"""What Milvus and Qdrant have in common: a row for each piece of a document, and filters as tags.

Every piece is a row under a key made of its document's id and its number. A row carries the document's digest and how
many pieces it has, so that a document which was stored in part, because the client died, is seen to be and is stored
again. A field with a plain value is a tag, its name and value as JSON; so filters mean the same in every store,
whatever its own rules for comparing JSON are.

Not here: how a store is asked (``qingyu.runtime.stores.milvus`` and ``qdrant``).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

from qingyu.errors import ClosedError, DocumentError, StoreError
from qingyu.runtime.engine import Floats
from qingyu.runtime.search.contract import (
    EmbeddedDocument,
    Filter,
    Hit,
    VectorSpace,
    check_documents,
    check_k,
    check_query,
)
from qingyu.runtime.stores.reach import is_server

__all__ = [
    "Condition",
    "Found",
    "PieceStore",
    "Row",
    "Stub",
    "conditions_of",
    "rows_of",
    "space_facts",
    "tags_of",
]

S = TypeVar("S", bound="PieceStore")
T = TypeVar("T")

WRITTEN = 256  # rows sent at once: a megabyte or two
ASKED = 500  # ids in one question
LONGEST_TAG = 200  # bytes; a longer one is replaced by its hash, which compares alike
FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Row:
    """A piece as it is stored. ``text`` is the piece's own, ``fields`` JSON; ``vector`` is float32 (dim,)."""

    key: str
    document: str
    piece: int
    pieces: int
    digest: str
    text: str
    start: int
    stop: int
    fields: str
    tags: list[str]
    vector: Floats


class Stub(NamedTuple):
    """The part of a row that says what document is stored, and whether all of it."""

    document: str
    digest: str
    pieces: int


class Found(NamedTuple):
    """A row that is near a query, by the store's own measure turned so that larger is nearer."""

    score: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """What a row's tags must satisfy: one of ``tags`` is there or, unless it is ``None``, ``absent`` is not."""

    tags: tuple[str, ...]
    absent: str | None


def rows_of(documents: Iterable[EmbeddedDocument]) -> Iterator[Row]:
    """The rows of the documents' pieces."""
    for one in documents:
        document = one.document
        fields = json.dumps(dict(document.fields), ensure_ascii=False)
        tags = tags_of(document.fields)
        for number, (span, vector) in enumerate(zip(one.spans, one.vectors, strict=True)):
            yield Row(
                key=f"{document.id}#{number}",
                document=document.id,
                piece=number,
                pieces=len(one.spans),
                digest=document.digest,
                text=document.text[span.start : span.stop],
                start=span.start,
                stop=span.stop,
                fields=fields,
                tags=tags,
                vector=vector,
            )


def tags_of(fields: Mapping[str, Any]) -> list[str]:
    """A tag for each field that has a value, and one for the value where it is plain.

    >>> tags_of({"year": 2024.0, "open": True, "who": None})
    ['has:year', '["year",2024]', 'has:open', '["open",true]']
    """
    tags = []
    for name, value in fields.items():
        if value is not None:
            tags.append(_short(f"has:{name}"))
            if isinstance(value, (str, int, float)):
                tags.append(_tag(name, value))
    return tags


def _tag(name: str, value: object) -> str:
    # Values are compared as JSON numbers: 1 is 1.0.
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    return _short(json.dumps([name, plain], ensure_ascii=True, separators=(",", ":")))


def _short(tag: str) -> str:
    content = tag.encode("utf-8")
    return tag if len(content) <= LONGEST_TAG else f"sha256:{hashlib.sha256(content).hexdigest()}"


def conditions_of(where: Filter | None) -> list[Condition]:
    """A filter as conditions on tags, all of which must hold; what they mean is what ``contract.matches`` says."""
    conditions = []
    for name, value in (where or {}).items():
        options = [value] if value is None or isinstance(value, (str, int, float)) else value
        tags = tuple(dict.fromkeys(_tag(name, one) for one in options if one is not None))
        conditions.append(Condition(tags, _short(f"has:{name}") if None in options else None))
    return conditions


def space_facts(space: VectorSpace, facts: Mapping[str, str]) -> str:
    """What a collection says about itself, as JSON; ``facts_of`` reads it."""
    own = {"format": FORMAT, "fingerprint": space.fingerprint, "query": space.query}
    return json.dumps(
        {**own, "dim": space.dim, "metric": space.metric, "facts": dict(facts)}, ensure_ascii=False
    )


def facts_of(text: object, place: str) -> tuple[VectorSpace, Mapping[str, str]]:
    """The space and the facts that ``space_facts`` wrote; ``StoreError`` for a collection that others made."""
    try:
        found = json.loads(str(text))
        if found["format"] != FORMAT:
            raise ValueError(found["format"])
        space = VectorSpace(found["fingerprint"], found["query"], int(found["dim"]), found["metric"])
        return space, dict(found["facts"])
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{place} was not made by qingyu",
            expected=f"a collection that says its vector space, in format {FORMAT}",
            found="none of that",
            remedy="Name another collection.",
        ) from None


class PieceStore:
    """A ``VectorStore`` over a collection of pieces: open one with ``open``, make one with ``create``.

    An address is http(s)://HOST:PORT, or the path of a file or folder. What differs between kinds of stores is in the
    methods at the end.
    """

    KIND: ClassVar[str]  # the word before the address

    @classmethod
    def exists(cls, address: str, *, collection: str, timeout: float) -> bool:
        """Whether there is such a collection."""
        place = cls._place(address, collection)
        client = cls._connected(address, place, timeout)
        try:
            with cls._failures(place):
                return collection in cls._collections(client)
        finally:
            client.close()

    @classmethod
    def open(cls: type[S], address: str, *, collection: str, timeout: float) -> S:
        """The collection at an address, or ``StoreError``."""
        return cls._opened(address, collection, timeout, lambda client, place: None)

    @classmethod
    def create(
        cls: type[S],
        address: str,
        space: VectorSpace,
        *,
        facts: Mapping[str, str],
        collection: str,
        timeout: float,
    ) -> S:
        """A new collection for vectors of a space; ``StoreError`` where there is one of that name."""

        def make(client: Any, place: str) -> None:  # noqa: ANN401
            if collection in cls._collections(client):
                raise StoreError(
                    f"cannot make {place}",
                    expected="no collection of that name",
                    found="one",
                    remedy="Name another, or open it.",
                )
            cls._make(client, collection, space, space_facts(space, facts), server=is_server(address))

        return cls._opened(address, collection, timeout, make)

    @classmethod
    def _opened(
        cls: type[S], address: str, collection: str, timeout: float, prepare: Callable[[Any, str], None]
    ) -> S:
        place = cls._place(address, collection)
        client = cls._connected(address, place, timeout)
        try:
            with cls._failures(place):
                prepare(client, place)
                there = cls._collections(client)
            if collection not in there:
                raise StoreError(
                    f"no collection at {place}",
                    expected="one of that name",
                    found=", ".join(sorted(there)[:8]) or "no collections",
                    remedy="Make one with `qingyu index build`.",
                )
            return cls(client, collection, place)
        except BaseException:
            client.close()
            raise

    @classmethod
    def _place(cls, address: str, collection: str) -> str:
        return f"{cls.KIND}+{address}?collection={collection}"

    def __init__(self, client: Any, collection: str, place: str) -> None:  # noqa: ANN401
        self.place = place
        self._client = client
        self._collection = collection
        with self._failures(place):
            note = self._note()
        space, facts = facts_of(note, place)
        self.facts = {
            **facts,
            "fingerprint": space.fingerprint,
            "query_fingerprint": space.query,
            "dim": str(space.dim),
            "metric": space.metric,
        }
        self._space = space
        self._closed = False

    @property
    def space(self) -> VectorSpace:
        """The vector space of everything in the store."""
        return self._space

    def put(self, documents: Sequence[EmbeddedDocument]) -> None:
        """Store these documents in place of any with the same ids; see ``VectorStore.put``.

        A reader may see pieces of the old and of the new document meanwhile.
        """
        self._check_open()
        check_documents(documents, self._space)
        rows = list(rows_of(documents))
        for row in rows:
            self._check_row(row)
        for part in _parts(rows, WRITTEN):
            self._upsert(part)
        new = {one.document.id: one.document.digest for one in documents}
        for ids in _parts(list(new), ASKED):
            stale = [stub for stub in self._stubs(ids) if stub.digest != new[stub.document]]
            for digest in {stub.digest for stub in stale}:
                self._remove({stub.document for stub in stale if stub.digest == digest}, digest)

    def delete(self, ids: Collection[str]) -> int:
        """Remove the documents with these ids; how many there were."""
        self._check_open()
        found: set[str] = set()
        for part in _parts(list(dict.fromkeys(ids)), ASKED):
            there = {stub.document for stub in self._stubs(part)}
            if there:
                self._remove(there, None)
            found |= there
        return len(found)

    def digests(self, ids: Collection[str]) -> Mapping[str, str]:
        """``Document.digest`` of those of these documents that are in the store whole, by id."""
        self._check_open()
        stubs: dict[str, list[Stub]] = defaultdict(list)
        for part in _parts(list(dict.fromkeys(ids)), ASKED):
            for stub in self._stubs(part):
                stubs[stub.document].append(stub)
        whole = (found for found in stubs.values() if len(set(found)) == 1 and len(found) == found[0].pieces)
        return {found[0].document: found[0].digest for found in whole}

    def search(self, vector: Floats, *, k: int, where: Filter | None = None) -> list[Hit]:
        """The ``k`` nearest pieces; see ``VectorStore.search``."""
        self._check_open()
        check_k(k)
        query = check_query(vector, self._space)
        conditions = conditions_of(where)
        if not all(one.tags or one.absent for one in conditions):
            return []  # a field that may have none of no values
        return [_hit(found) for found in self._nearest(query, k, conditions)]

    def count(self) -> int:
        """How many documents there are."""
        self._check_open()
        return self._count()

    def ids(self) -> Iterator[str]:
        """The ids of all documents, in no order."""
        self._check_open()
        yield from self._ids()

    def flush(self) -> None:
        """Nothing: what ``put`` stored is stored."""

    def close(self) -> None:
        """Free the connection."""
        if not self._closed:
            self._closed = True
            self._client.close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return self.place

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(
                f"{self.place} is closed",
                expected="an open store",
                found="a closed one",
                remedy="Open it again.",
            )

    def _refuse(self, row: Row, what: str, most: int, found: int, remedy: str) -> DocumentError:
        return DocumentError(
            f"document {row.document!r} does not fit into {self.place}",
            expected=f"{what} of at most {most:,} bytes",
            found=f"{found:,}",
            remedy=remedy,
        )

    # How a client is had, and what a server is asked. All raise ``StoreError``.

    @staticmethod
    def _connected(address: str, place: str, timeout: float) -> Any:  # noqa: ANN401
        raise NotImplementedError

    @staticmethod
    def _failures(place: str) -> AbstractContextManager[None]:
        """A context that turns errors of the client into ``StoreError``."""
        raise NotImplementedError

    @staticmethod
    def _collections(client: Any) -> list[str]:  # noqa: ANN401
        raise NotImplementedError

    @staticmethod
    def _make(client: Any, collection: str, space: VectorSpace, facts: str, *, server: bool) -> None:  # noqa: ANN401
        """Make a collection that keeps ``facts``."""
        raise NotImplementedError

    def _note(self) -> object:
        """The ``facts`` that the collection was made with; it is ready to be asked then."""
        raise NotImplementedError

    def _check_row(self, row: Row) -> None:
        """Raise ``DocumentError`` for a row that the server would refuse."""

    def _upsert(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def _stubs(self, ids: Sequence[str]) -> Iterable[Stub]:
        """One for each row of these documents."""
        raise NotImplementedError

    def _remove(self, ids: Collection[str], digest: str | None) -> None:
        """Remove the rows of these documents; of the one digest only, unless it is ``None``."""
        raise NotImplementedError

    def _nearest(self, query: Floats, k: int, conditions: Sequence[Condition]) -> Iterable[Found]:
        raise NotImplementedError

    def _count(self) -> int:
        raise NotImplementedError

    def _ids(self) -> Iterable[str]:
        raise NotImplementedError


def _hit(found: Found) -> Hit:
    row = found.row
    return Hit(
        id=row["document"],
        score=float(found.score),
        text=row["text"],
        start=int(row["start"]),
        stop=int(row["stop"]),
        fields=json.loads(row["fields"]),
    )


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
