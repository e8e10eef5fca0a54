"""What a store of vectors is: the documents that go in, the hits that come out, and what every store promises.

A store keeps documents with the vectors of their pieces; it neither embeds nor cuts. Whatever is the same for all
stores (chunking, prompts, which documents are new, reranking) is done once, by ``qingyu.runtime.search.collection``.

Not here: any store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import numpy as np

from qingyu.errors import DocumentError, InvalidOptionError, VectorSpaceError
from qingyu.runtime.engine import Floats

__all__ = [
    "METRICS",
    "Document",
    "EmbeddedDocument",
    "Filter",
    "Hit",
    "KeptStore",
    "Metric",
    "Scalar",
    "Span",
    "TextStore",
    "VectorSpace",
    "VectorStore",
    "check_documents",
    "check_k",
    "check_query",
    "check_space",
    "matches",
    "score",
]

Metric = Literal["cosine", "dot", "euclidean"]
METRICS: tuple[Metric, ...] = ("cosine", "dot", "euclidean")

Scalar = str | int | float | bool | None
# Field -> the value it must have, or a list of those it may have. All fields must hold.
Filter = Mapping[str, Scalar | Sequence[Scalar]]


@dataclass(frozen=True)
class Document:
    """A text under an id of its own, and fields of any JSON values to filter by and to give back.

    ``line`` is where it stood in its file, for messages.
    """

    id: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            _refuse("a document has no id", "a string that is not empty", repr(self.id), "Give each its own.")
        if not isinstance(self.text, str) or not self.text.strip():
            found = "nothing but blanks" if isinstance(self.text, str) else type(self.text).__name__
            _refuse(f"document {self.id!r} has no text", "a text", found, "Leave it out.")
        try:
            self.id.encode("utf-8")
            self._content()
        except (TypeError, ValueError, RecursionError) as error:
            _refuse(
                f"document {self.id!r} cannot be stored",
                "Unicode text and JSON values",
                str(error),
                "Repair it.",
            )

    @property
    def digest(self) -> str:
        """32 hex digits that are the same where text and fields are the same."""
        return hashlib.sha256(self._content()).hexdigest()[:32]

    def _content(self) -> bytes:
        """Text and fields as bytes, or an error for what has none."""
        fields = dict(self.fields)
        written = json.dumps(fields, ensure_ascii=False, allow_nan=False, sort_keys=True) if fields else ""
        return b"\0".join((self.text.encode("utf-8"), written.encode("utf-8")))


@dataclass(frozen=True)
class Span:
    """A piece of a document's text: ``text[start:stop]``."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class EmbeddedDocument:
    """A document, the pieces of its text that were embedded, and their vectors, float32 (len(spans), dim).

    A document that was not cut has one piece, which is all of its text.
    """

    document: Document
    spans: tuple[Span, ...]
    vectors: Floats

    @classmethod
    def whole(cls, document: Document, vector: Floats) -> EmbeddedDocument:
        """A document in one piece; ``vector`` is float32 (dim,)."""
        return cls(document, (Span(0, len(document.text)),), vector[None])


@dataclass(frozen=True)
class Hit:
    """A piece that was found: its document's id and fields, its text, and where in the document it stands.

    ``score`` is larger for what is nearer: the cosine, the inner product, or minus the Euclidean distance; of hybrid
    and reranked hits, what fused or reranked them. ``text`` is ``document.text[start:stop]``.
    """

    id: str
    score: float
    text: str
    start: int
    stop: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VectorSpace:
    """What vectors must have in common to be compared.

    ``fingerprint`` is that of the stored vectors (``qingyu.runtime.fingerprint``, passage prompt), ``query`` that of
    the vectors they are searched with (query prompt).
    """

    fingerprint: str
    query: str
    dim: int
    metric: Metric = "cosine"


class VectorStore(Protocol):
    """Documents with the vectors of their pieces, all of one vector space; a context manager.

    Every method raises ``StoreError`` for a store that cannot be reached, and ``ClosedError`` after ``close()``.
    Whoever makes a store checks with ``check_space`` that what is there is of the space asked for.
    """

    @property
    def space(self) -> VectorSpace:
        """The vector space of everything in the store."""
        ...

    def put(self, documents: Sequence[EmbeddedDocument]) -> None:
        """Store these documents in place of any with the same ids, pieces and all.

        When it returns, they are durable and are found. Ids must differ. Raises ``VectorSpaceError`` for vectors of
        another dimension, and then has stored none.
        """
        ...

    def delete(self, ids: Collection[str]) -> int:
        """Remove the documents with these ids; how many there were."""
        ...

    def digests(self, ids: Collection[str]) -> Mapping[str, str]:
        """``Document.digest`` of those of these documents that are in the store, by id."""
        ...

    def search(self, vector: Floats, *, k: int, where: Filter | None = None) -> list[Hit]:
        """The ``k`` nearest pieces of documents that ``where`` holds for, nearest first; fewer if there are fewer.

        ``vector`` is float32 (dim,). Pieces are hits of their own: two may be of one document. Raises
        ``VectorSpaceError`` and ``InvalidOptionError``.
        """
        ...

    def count(self) -> int:
        """How many documents there are."""
        ...

    def close(self) -> None:
        """Free what is held; what was put stays."""
        ...


@runtime_checkable
class KeptStore(VectorStore, Protocol):
    """A store that an index is kept in: it knows what it was made with, and which documents it holds."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What the store was made with, as it was given."""
        ...

    def ids(self) -> Iterator[str]:
        """The ids of all documents."""
        ...

    def flush(self) -> None:
        """Do now what makes searches fast, if anything is left to do."""
        ...


@runtime_checkable
class TextStore(Protocol):
    """A store that finds pieces by their words, too."""

    def match(self, text: str, *, k: int, where: Filter | None = None) -> list[Hit]:
        """The ``k`` best pieces by BM25, best first; ``score`` is larger for what fits better."""
        ...


def matches(fields: Mapping[str, Any], where: Filter | None) -> bool:
    """Whether a document with these fields passes a filter; the meaning of ``where`` for every store.

    Values are compared as JSON: 1 is 1.0, and neither is "1" or true. A field that is absent is ``None``.

    >>> matches({"year": 2024, "type": "faq"}, {"year": [2023, 2024]})
    True
    """
    return all(
        any(_same(fields.get(name), one) for one in _options(value)) for name, value in (where or {}).items()
    )


def _options(value: Scalar | Sequence[Scalar]) -> Sequence[Scalar]:
    return [value] if isinstance(value, (str, int, float, type(None))) else value


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def score(metric: Metric, query: Floats, vectors: Floats) -> Floats:
    """``Hit.score`` of each vector, float32 (n,), computed exactly; the meaning of a metric for every store."""
    return _SCORES[metric](query.astype(np.float32, copy=False), vectors.astype(np.float32, copy=False))


def _cosines(query: Floats, vectors: Floats) -> Floats:
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors)) * np.sqrt(query @ query)
    found: Floats = (vectors @ query) / np.maximum(lengths, 1e-12)
    return found


def _products(query: Floats, vectors: Floats) -> Floats:
    found: Floats = vectors @ query
    return found


def _distances(query: Floats, vectors: Floats) -> Floats:
    difference = vectors - query
    found: Floats = -np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return found


_SCORES = {"cosine": _cosines, "dot": _products, "euclidean": _distances}


def check_space(found: VectorSpace, wanted: VectorSpace, *, place: str) -> None:
    """Raise ``VectorSpaceError`` unless a store at ``place`` is of the wanted space."""
    if found.metric != wanted.metric:
        raise InvalidOptionError(
            f"{place} has another metric",
            expected=wanted.metric,
            found=found.metric,
            remedy=f"Ask for {found.metric}, or build it anew.",
        )
    for what in ("dim", "fingerprint", "query"):
        if getattr(found, what) != getattr(wanted, what):
            raise VectorSpaceError(
                f"{place} is of another vector space",
                expected=f"{_SAID[what]} {getattr(wanted, what)}",
                found=str(getattr(found, what)),
                remedy="Open it with the model, precision and prompts that it was built with, or build it anew.",
            )


_SAID = {"dim": "dimensions", "fingerprint": "vectors with fingerprint", "query": "queries with fingerprint"}


def check_query(vector: Floats, space: VectorSpace) -> Floats:
    """The vector as float32 (dim,), or ``VectorSpaceError`` where it has another shape or is not finite."""
    array: Floats = np.asarray(vector, dtype=np.float32)
    if array.shape != (space.dim,) or not np.isfinite(array).all():
        found = f"shape {array.shape}" if array.shape != (space.dim,) else "values that are not finite"
        raise VectorSpaceError(
            "a query's vector does not fit",
            expected=f"{space.dim} finite values",
            found=found,
            remedy="Embed it with the model that the documents were embedded with.",
        )
    return array


def check_documents(documents: Iterable[EmbeddedDocument], space: VectorSpace) -> None:
    """Raise ``VectorSpaceError`` for vectors that do not fit, and ``DocumentError`` for an id that occurs twice."""
    seen: set[str] = set()
    for one in documents:
        if one.vectors.shape != (len(one.spans), space.dim) or not np.isfinite(one.vectors).all():
            raise VectorSpaceError(
                f"the vectors of document {one.document.id!r} do not fit",
                expected=f"shape ({len(one.spans)}, {space.dim}), finite values",
                found=f"shape {one.vectors.shape}",
                remedy="Embed documents with the model that the store was made for.",
            )
        if one.document.id in seen:
            _refuse(
                "a document occurs twice",
                "an id of its own for each",
                repr(one.document.id),
                "Leave one out.",
            )
        seen.add(one.document.id)


def check_k(k: int) -> None:
    """Raise ``InvalidOptionError`` for a number of hits below 1."""
    if k < 1:
        raise InvalidOptionError("k", expected="at least 1", found=str(k), remedy="Ask for 5 or 10.")


def _refuse(problem: str, expected: str, found: str, remedy: str) -> NoReturn:
    raise DocumentError(problem, expected=expected, found=found, remedy=remedy)
