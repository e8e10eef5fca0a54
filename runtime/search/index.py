"""An index of documents: a model and a store of vectors, which together answer queries.

What is the same for all stores is here: cutting long documents, prompts, which documents are new or changed, fusing
and reranking. Not here: how vectors are kept and compared (the stores).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from qingyu.errors import DocumentError, InvalidOptionError, ModelNotFoundError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.onnxruntime_engine import Profile
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.reranker import Reranker
from qingyu.runtime.search.codes import Precision
from qingyu.runtime.search.contract import (
    Document,
    EmbeddedDocument,
    Filter,
    Hit,
    KeptStore,
    Metric,
    Span,
    TextStore,
    VectorSpace,
    VectorStore,
    check_k,
    check_space,
)
from qingyu.runtime.search.documents import BadRow
from qingyu.runtime.search.local import LocalStore
from qingyu.runtime.spec import ModelSpec
from qingyu.runtime.stores import create_store, is_uri, open_store
from qingyu.runtime.task import BUNDLED, find_model

__all__ = ["Mode", "Outcome", "Prompts", "SearchIndex", "fused", "space_of", "store_at"]

S = TypeVar("S", bound="SearchIndex")

Mode = Literal["vector", "words", "hybrid"]
MODES: tuple[Mode, ...] = ("vector", "words", "hybrid")
Rejected = Callable[[BadRow], None]

FRONT_END = ("special_tokens", "unicode_form", "script")  # options of a model that change what it reads

WINDOW = 512  # documents whose digests are looked up at once
MOST_CHARACTERS = 1_000_000  # of one document: a few hundred pages, minutes of embedding
CANDIDATES = 50  # of each ranking that is fused, and of what is reranked
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009)
MOST_HITS = 10_000  # looked at before less than k documents are given


class Prompts(NamedTuple):
    """What is put before queries and before documents: the texts, or the names that the model has for them."""

    query: str
    passage: str

    @classmethod
    def of(cls, spec: ModelSpec, *, query: str | None = None, passage: str | None = None) -> Prompts:
        """The texts of those given; else of the model's own for queries and passages; else of its default."""
        given = {"query": query, "passage": passage}
        named = {
            name: name if text is None and name in spec.prompts else text for name, text in given.items()
        }
        return cls(spec.prompt_text(named["query"]), spec.prompt_text(named["passage"]))


def space_of(embedder: Embedder, *, metric: Metric = "cosine", prompts: Prompts | None = None) -> VectorSpace:
    """The vector space of documents and queries that this embedder embeds with these prompts."""
    used = prompts or Prompts.of(embedder.spec)
    options = embedder.options
    query, passage = (
        fingerprint(
            embedder.spec,
            prompt=prompt,
            special_tokens=options.special_tokens,
            unicode_form=options.unicode_form,
            script=options.script,
        )
        for prompt in used
    )
    return VectorSpace(passage, query, embedder.dim, metric)


@dataclass
class Outcome:
    """How many documents were added, changed, found as they were, deleted, and rejected."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0
    rejected: int = 0

    @property
    def seen(self) -> int:
        """How many were read."""
        return self.added + self.updated + self.unchanged + self.rejected


class SearchIndex:
    """Documents that are found by what they mean, by their words, or by both; a context manager.

    Make one in a folder with ``create``, open it with ``open``, or pair any store with the embedder of its vectors.
    """

    def __init__(
        self,
        store: VectorStore,
        embedder: Embedder,
        *,
        prompts: Prompts | None = None,
        chunk_tokens: int | None = None,
        overlap: int = 0,
        most_characters: int = MOST_CHARACTERS,
    ) -> None:
        """Raises ``VectorSpaceError`` for a store of vectors that this embedder does not give with these prompts.

        Documents of more than ``chunk_tokens`` tokens (``None``: more than the model reads) are cut at the ends of
        sentences into pieces that share at most ``overlap`` tokens.
        """
        self.store = store
        self.embedder = embedder
        self._prompts = prompts or Prompts.of(embedder.spec)
        self._chunk_tokens = chunk_tokens
        self._overlap = overlap
        self._most_characters = most_characters
        self._owned: list[VectorStore | Embedder] = []
        metric = store.space.metric
        check_space(
            store.space, space_of(embedder, metric=metric, prompts=self._prompts), place=str(_place(store))
        )
        embedder.spans(
            "", prompt=self._prompts.passage, most=chunk_tokens, overlap=overlap
        )  # refuses bad options

    @classmethod
    def create(
        cls: type[S],
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str] | Embedder = BUNDLED,
        *,
        metric: Metric = "cosine",
        precision: Precision = "int8",
        words: str = "bigrams",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        chunk_tokens: int | None = None,
        overlap: int = 0,
    ) -> S:
        """An index of no documents in a new or empty folder, with a ``LocalStore``; ``close()`` closes what it opened.

        ``folder`` may be the address of a store, too (``qingyu.runtime.stores``); it keeps vectors as it does, so that
        ``precision`` and ``words`` are for folders alone.
        ``model`` is a model folder or name, or an embedder, which is left open. Prompts are those of the model unless
        given. Raises what ``Embedder.open`` and ``LocalStore.create`` raise.
        """
        embedder = model if isinstance(model, Embedder) else Embedder.open(model)
        try:
            prompts = Prompts.of(embedder.spec, query=query_prompt, passage=passage_prompt)
            embedder.spans("", prompt=prompts.passage, most=chunk_tokens, overlap=overlap)
            facts = {
                "model": _name_of(embedder),
                "query_prompt": prompts.query,
                "passage_prompt": prompts.passage,
                "chunk_tokens": "" if chunk_tokens is None else str(chunk_tokens),
                "overlap": str(overlap),
                **{name: getattr(embedder.options, name) or "" for name in FRONT_END},
            }
            space = space_of(embedder, metric=metric, prompts=prompts)
            store = _new_store(folder, space, facts, precision, words)
            return cls._with(store, embedder, facts, prompts, opened=embedder is not model)
        except BaseException:
            if embedder is not model:
                embedder.close()
            raise

    @classmethod
    def open(
        cls: type[S],
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str] | Embedder | None = None,
        *,
        writable: bool = False,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        profile: Profile = "latency",
        threads: int | None = None,
        max_memory_mb: int | None = None,
    ) -> S:
        """The index in a folder, or at the address of a store, with the model that it was made with.

        ``model`` is needed where that has moved; another one, or other prompts, are refused with ``VectorSpaceError``.
        ``profile``, ``threads`` and ``max_memory_mb`` are those of ``Embedder.open``. Raises what
        ``LocalStore.open`` and ``Embedder.open`` raise.
        """
        store = store_at(folder, writable=writable)
        embedder = None
        try:
            facts = store.facts
            if isinstance(model, Embedder):
                embedder = model
            else:
                front_end: dict[str, Any] = {name: facts[name] or None for name in FRONT_END}
                with _found(model, facts["model"], folder) as name:
                    embedder = Embedder.open(
                        name,
                        profile=profile,
                        threads=threads,
                        max_memory_mb=max_memory_mb,
                        **front_end,
                    )
            prompts = Prompts(
                facts["query_prompt"] if query_prompt is None else embedder.spec.prompt_text(query_prompt),
                facts["passage_prompt"]
                if passage_prompt is None
                else embedder.spec.prompt_text(passage_prompt),
            )
            return cls._with(store, embedder, facts, prompts, opened=embedder is not model)
        except BaseException:
            store.close()
            if embedder is not None and embedder is not model:
                embedder.close()
            raise

    @classmethod
    def _with(
        cls: type[S],
        store: KeptStore,
        embedder: Embedder,
        facts: Mapping[str, str],
        prompts: Prompts,
        *,
        opened: bool,
    ) -> S:
        index = cls(
            store,
            embedder,
            prompts=prompts,
            chunk_tokens=int(facts["chunk_tokens"]) if facts["chunk_tokens"] else None,
            overlap=int(facts["overlap"]),
        )
        index._owned = [store, embedder] if opened else [store]
        return index

    # What changes it.

    def add(
        self,
        documents: Iterable[Document | BadRow],
        *,
        rejected: Rejected | None = None,
        progress: bool = False,
    ) -> Outcome:
        """Embed and store new documents, as a stream; an id that is there already is refused.

        ``rejected`` is given each document that is refused, and the rest is stored; ``None`` raises ``DocumentError``
        at the first. What was stored before an error stays stored. ``progress`` draws a bar on a terminal.
        """
        return self._stored(documents, rejected, progress, replace_known=False)

    def update(
        self,
        documents: Iterable[Document | BadRow],
        *,
        rejected: Rejected | None = None,
        progress: bool = False,
    ) -> Outcome:
        """Embed and store documents that are new or have changed; options as for ``add``."""
        return self._stored(documents, rejected, progress, replace_known=True)

    def build(
        self,
        documents: Iterable[Document | BadRow],
        *,
        rejected: Rejected | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Outcome:
        """Make the index hold these documents and no others; only new and changed ones are embedded.

        After a kill, the same call goes on where the last one was. Documents that are not among these are deleted at
        the end; one that is refused leaves what was there under its id. Options as for ``add``; ``total`` is how many
        documents there are, for the bar. The store must be a ``KeptStore``, which can list its ids.
        """
        store = self.store
        if not isinstance(store, KeptStore):
            raise InvalidOptionError(
                "build",
                expected="an index in a folder, or another store that lists its documents",
                found=type(store).__name__,
                remedy="Use add and update.",
            )
        seen: set[str] = set()
        outcome = self._stored(documents, rejected, progress, replace_known=True, total=total, seen=seen)
        gone = [name for name in store.ids() if name not in seen]
        for start in range(0, len(gone), WINDOW):
            outcome.deleted += store.delete(gone[start : start + WINDOW])
        store.flush()
        return outcome

    def delete(self, ids: Collection[str]) -> int:
        """Remove documents; how many of these there were."""
        return self.store.delete(ids)

    def _stored(
        self,
        documents: Iterable[Document | BadRow],
        rejected: Rejected | None,
        progress: bool,
        *,
        replace_known: bool,
        total: int | None = None,
        seen: set[str] | None = None,
    ) -> Outcome:
        outcome = Outcome()
        steps = self._steps(
            documents, _Rules(outcome, rejected, replace_known, set() if seen is None else seen)
        )
        for _ in progress_bar(steps, total=total, unit="documents") if progress else steps:
            pass
        return outcome

    def _steps(self, documents: Iterable[Document | BadRow], rules: _Rules) -> Iterator[tuple[int, None]]:
        """Store the documents; how many were dealt with, after each block that was."""
        reported = 0
        put = _put_behind if isinstance(self.store, LocalStore) else _put  # others need not be thread-safe
        for _ in put(self.store, self._embedded(self._wanted(documents, rules))):
            yield rules.outcome.seen - reported, None
            reported = rules.outcome.seen
        yield rules.outcome.seen - reported, None

    def _wanted(self, documents: Iterable[Document | BadRow], rules: _Rules) -> Iterator[Document]:
        """Those documents that must be embedded."""
        stream = iter(documents)
        while window := list(itertools.islice(stream, WINDOW)):
            admitted = (rules.admitted(one, self._most_characters) for one in window)
            sound = [one for one in admitted if one is not None]
            known = self.store.digests([one.id for one in sound])
            for document in sound:
                if rules.changes(document, known.get(document.id)):
                    yield document

    def _embedded(self, documents: Iterable[Document]) -> Iterator[list[EmbeddedDocument]]:
        """The documents with the vectors of their pieces, in blocks."""
        waiting: deque[tuple[Document, tuple[Span, ...]]] = deque()

        def texts() -> Iterator[str]:
            for document in documents:
                spans = self._spans(document.text)
                waiting.append((document, spans))
                yield from (document.text[span.start : span.stop] for span in spans)

        ready: list[Floats] = []
        for block in self.embedder.embed_stream(texts(), prompt=self._prompts.passage):
            ready.append(block.vectors)
            vectors, used, made = np.concatenate(ready), 0, []
            while waiting and used + len(waiting[0][1]) <= len(vectors):
                document, spans = waiting.popleft()
                made.append(EmbeddedDocument(document, spans, vectors[used : used + len(spans)]))
                used += len(spans)
            ready = [vectors[used:]]
            if made:
                yield made

    def _spans(self, text: str) -> tuple[Span, ...]:
        most = self._chunk_tokens
        found = self.embedder.spans(text, prompt=self._prompts.passage, most=most, overlap=self._overlap)
        # Blanks between sentences can be a piece of their own, which says nothing.
        spans = tuple(Span(start, stop) for start, stop in found if text[start:stop].strip())
        return spans or (Span(0, len(text)),)

    # What asks it.

    def search(
        self,
        query: str | Floats,
        *,
        k: int = 5,
        where: Filter | None = None,
        mode: Mode = "vector",
        reranker: Reranker | None = None,
        candidates: int = CANDIDATES,
        pieces: bool = False,
    ) -> list[Hit]:
        """The best piece of each of the ``k`` best documents, best first; with ``pieces``, the ``k`` best pieces.

        ``mode``: "vector" compares meanings; "words" scores by BM25; "hybrid" fuses the ``candidates`` best of both by
        reciprocal rank. ``reranker`` reads the query with each of the ``candidates`` best, and its order is what
        counts. ``where``: fields and the value, or the values, that they may have. A query that is a vector, float32
        (dim,), can be searched by meaning only. Raises ``InvalidOptionError`` and ``VectorSpaceError``.
        """
        check_k(k)
        if mode not in MODES:
            raise InvalidOptionError(
                "mode", expected=f"one of {', '.join(MODES)}", found=repr(mode), remedy="Use one of them."
            )
        if not isinstance(query, str) and (mode != "vector" or reranker is not None):
            raise InvalidOptionError(
                "a query that is a vector",
                expected="the mode vector, and no reranker",
                found=f"the mode {mode}" if mode != "vector" else "a reranker",
                remedy="Pass the query's text.",
            )
        wanted = k if reranker is None else max(k, candidates)
        found = self._ranked(query, wanted, where, mode, candidates, pieces)
        if reranker is not None and isinstance(query, str):
            ranked = reranker.rank(query, [hit.text for hit in found])
            found = [replace(found[one.index], score=one.score) for one in ranked]
        return found[:k]

    def _ranked(
        self, query: str | Floats, k: int, where: Filter | None, mode: Mode, candidates: int, pieces: bool
    ) -> list[Hit]:
        vector = None if mode == "words" else self._vector(query)
        count = k if mode != "hybrid" else max(k, candidates)
        while True:
            rankings = []
            if vector is not None:
                rankings.append(self.store.search(vector, k=count, where=where))
            if isinstance(query, str) and mode != "vector":
                rankings.append(self._texts().match(query, k=count, where=where))
            hits = rankings[0] if len(rankings) == 1 else fused(rankings)
            if pieces:
                return hits[:k]
            best = _one_each(hits)
            if len(best) >= k or all(len(ranking) < count for ranking in rankings) or count >= MOST_HITS:
                return best[:k]
            count *= 2

    def _vector(self, query: str | Floats) -> Floats:
        if not isinstance(query, str):
            return query
        vector: Floats = self.embedder.embed(query, prompt=self._prompts.query)[0]
        return vector

    def _texts(self) -> TextStore:
        if not isinstance(self.store, TextStore):
            raise InvalidOptionError(
                "mode",
                expected="vector, for this store",
                found="a search by words",
                remedy="Keep the documents in a folder to search them by words, too.",
            )
        return self.store

    @property
    def facts(self) -> Mapping[str, str]:
        """What an index was made with; nothing for stores that do not keep it."""
        return self.store.facts if isinstance(self.store, KeptStore) else {}

    def close_too(self, embedder: Embedder) -> None:
        """Let ``close()`` close this embedder, too."""
        self._owned.append(embedder)

    def close(self) -> None:
        """Close what was opened for this index."""
        for one in self._owned:
            one.close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _put(store: VectorStore, blocks: Iterable[list[EmbeddedDocument]]) -> Iterator[None]:
    """Store the blocks, one at a time."""
    for block in blocks:
        store.put(block)
        yield


def _put_behind(store: VectorStore, blocks: Iterable[list[EmbeddedDocument]]) -> Iterator[None]:
    """Store each block while the next one is embedded, so that the model does not wait for the disk.

    All that was embedded is stored when this ends, with an error, too.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="qingyu-store") as writer:
        before: Future[None] | None = None
        for block in blocks:
            if before is not None:
                before.result()
                yield
            before = writer.submit(store.put, block)
        if before is not None:
            before.result()
            yield


@dataclass
class _Rules:
    """Which documents of a stream are stored, and the count of what became of them."""

    outcome: Outcome
    rejected: Rejected | None
    replace_known: bool
    seen: set[str]

    def admitted(self, one: Document | BadRow, most_characters: int) -> Document | None:
        """The document, if it can be stored; a bad one is rejected."""
        if isinstance(one, BadRow):
            self._reject(one)
        elif one.id in self.seen:
            self._refuse(
                one, "an id occurs twice", "an id of its own for each document", "Leave one of them out."
            )
        elif len(one.text) > most_characters:
            wanted = f"at most {most_characters:,} characters"
            self._refuse(one, "a document is too long", wanted, "Split it.", found=f"{len(one.text):,}")
        else:
            self.seen.add(one.id)
            return one
        return None

    def changes(self, document: Document, known: str | None) -> bool:
        """Whether it must be embedded; one that is known is rejected, where known ones are not replaced."""
        if known is None:
            self.outcome.added += 1
            return True
        if not self.replace_known:
            self._refuse(document, "a document is there already", "an id that is not", "Use update.")
            return False
        if known == document.digest:
            self.outcome.unchanged += 1
            return False
        self.outcome.updated += 1
        return True

    def _refuse(
        self, document: Document, problem: str, expected: str, remedy: str, *, found: str | None = None
    ) -> None:
        error = DocumentError(problem, expected=expected, found=found or repr(document.id), remedy=remedy)
        self._reject(BadRow(document.line, document.id, error))

    def _reject(self, row: BadRow) -> None:
        if self.rejected is None:
            raise row.error
        if row.id is not None:
            self.seen.add(row.id)
        self.outcome.rejected += 1
        self.rejected(row)


def fused(rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
    """One ranking of several, by reciprocal rank: the score of a piece is the sum of 1 / (60 + its rank) in each."""
    scores: dict[tuple[str, int, int], float] = {}
    hits: dict[tuple[str, int, int], Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            place = (hit.id, hit.start, hit.stop)
            hits.setdefault(place, hit)
            scores[place] = scores.get(place, 0.0) + 1 / (RANK_CONSTANT + rank)
    order = sorted(scores, key=lambda place: -scores[place])
    return [replace(hits[place], score=scores[place]) for place in order]


def _one_each(hits: Iterable[Hit]) -> list[Hit]:
    """The first hit of each document."""
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.id, hit)
    return list(best.values())


def _new_store(
    place: str | os.PathLike[str],
    space: VectorSpace,
    facts: Mapping[str, str],
    precision: Precision,
    words: str,
) -> KeptStore:
    if is_uri(place):
        return create_store(str(place), space, facts=facts)
    return LocalStore.create(place, space, precision=precision, words=words, facts=facts)


def store_at(place: str | os.PathLike[str], *, writable: bool) -> KeptStore:
    """The store in a folder, or at an address."""
    return open_store(str(place)) if is_uri(place) else LocalStore.open(place, writable=writable)


def _place(store: VectorStore) -> Any:  # noqa: ANN401 - a path, or what the store says of itself
    return getattr(store, "folder", store)


def _name_of(embedder: Embedder) -> str:
    """What to open the model by again: its name, where a name finds it; else its absolute path."""
    place = embedder.origin.resolve()
    for name in (BUNDLED, place.name):
        with suppress(ModelNotFoundError):
            if find_model(name).resolve() == place and not Path(name).exists():
                return name
    return str(place)


@contextmanager
def _found(
    model: str | os.PathLike[str] | None, fact: str, folder: str | os.PathLike[str]
) -> Iterator[str | os.PathLike[str]]:
    """The model to open; that it is gone is said with what to do, where nobody named one."""
    try:
        yield fact if model is None else model
    except ModelNotFoundError as error:
        if model is not None:
            raise
        raise ModelNotFoundError(
            f"the model of {folder} is not where it was",
            expected=f"a model at {fact}",
            found=error.found,
            remedy="Name the place where it is now: --model FOLDER.",
        ) from None
