"""A store of vectors in one folder, on the device: SQLite for what is kept, a mapped HNSW graph for what is near.

The database is the truth. It names the graph's file by a generation number, and the largest key that the file holds;
pieces with larger keys are the *tail*, which is compared with one by one. A graph that has taken in the tail is
written beside the old one, and becomes the graph by one transaction. So a process may be killed anywhere: what is
opened afterwards is the last state that was committed, and a piece is in the graph or in the tail, never in both.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np

from qingyu.errors import (
    ClosedError,
    CorruptFileError,
    InvalidOptionError,
    OutputError,
    StoreError,
    VectorSpaceError,
)
from qingyu.models.extras import require
from qingyu.runtime.cpu import choose_threads
from qingyu.runtime.engine import Floats, Ids
from qingyu.runtime.search.codes import Precision, codes_for
from qingyu.runtime.search.contract import (
    METRICS,
    Document,
    EmbeddedDocument,
    Filter,
    Hit,
    VectorSpace,
    check_documents,
    check_k,
    check_query,
    score,
)
from qingyu.runtime.search.database import FILE, FORMATS, Database, Piece
from qingyu.runtime.search.graph import EXACT, SEARCH_WIDTH, FileFacts, Graph, GraphShape, damaged
from qingyu.runtime.search.parts import CUT, PartedGraph, cut_graph, landmarks, loaded, mapped
from qingyu.runtime.search.terms import terms_for

__all__ = ["LocalStore"]

S = TypeVar("S", bound="LocalStore")

LOCK = "lock"
LEAST_TAIL = 4096  # pieces that are compared one by one in less than a millisecond
MOST_TAIL = 65_536  # above this a reader would wait too long, however large the graph
TAIL_SHARE = 4  # in between, a graph is written again when the tail is a quarter of it
BATCH = 8192  # rows read from the database at once
SPARE = 10  # candidates beyond k, for what exact scores put in another order
REMOVED_SHARE = 0.3  # of the pieces ever stored: from here on a new graph is made without the removed ones
MENDED = 200_000  # entries up to which what nothing links to is added again at every write
GROWN = 2.0  # a graph in parts is cut anew when it has so many times the pieces that it was cut for
GROWN_AT_END = 1.25  # the same where a build ends, which is the time to spend on searches
WIDEST = 4096  # of a search in the graph, before all pieces are compared instead


@dataclass(frozen=True)
class _Tail:
    """Pieces that are not in the graph's file: keys ascending, int64 (n,), and rows of codes."""

    keys: Ids
    rows: Any


@dataclass(frozen=True)
class _View:
    """What is searched: the graph of one generation, and what came after it."""

    generation: int
    graph: Graph | PartedGraph | None
    tail: _Tail


class LocalStore:
    """A folder of documents, vectors and terms; ``VectorStore`` and ``TextStore``, thread-safe, fork-safe.

    One process may write, any number may read meanwhile; a reader sees what was stored when its search begins. Make
    one with ``create``, open it with ``open``.
    """

    def __init__(self, folder: Path, *, writable: bool) -> None:
        self.folder = folder
        self._writable = writable
        self._lock = _writer_lock(folder) if writable else None
        try:
            self._begin()
        except BaseException:
            _unlock(self._lock)
            raise

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        space: VectorSpace,
        *,
        precision: Precision = "int8",
        words: str = "bigrams",
        facts: Mapping[str, str] | None = None,
    ) -> LocalStore:
        """A store of no documents in a folder that is new or empty, opened to be written.

        ``precision`` is that of the stored vectors; "int8" keeps their directions to about 0.4 degrees, and is refused
        later for vectors of other lengths than 1 unless the metric is the cosine. ``words`` cuts texts into terms:
        "bigrams", or "jieba" (a package of its own). ``facts`` are kept as they are. Raises ``OutputError``.
        """
        require("search", "usearch")
        codes_for(precision)
        terms_for(words)
        if space.metric not in METRICS:
            raise InvalidOptionError(
                "metric", expected=f"one of {', '.join(METRICS)}", found=repr(space.metric), remedy="Use one."
            )
        place = Path(folder)
        if place.exists() and not (place.is_dir() and all(map(Database.is_leftover, place.iterdir()))):
            raise OutputError(
                f"cannot make an index at {place}",
                expected="a new or empty folder",
                found="something that is there",
                remedy="Name another folder.",
            )
        own = {"precision": precision, "words": words, "generation": "0", "indexed_to": "0"}
        own |= {"graph_entries": "0", "graph_bytes": "0", "graph_sha256": "", "graph_cut_for": "0"}
        described = {
            "fingerprint": space.fingerprint,
            "query_fingerprint": space.query,
            "dim": str(space.dim),
            "metric": space.metric,
        }
        _make_folder(place)
        Database.create(place, {**(facts or {}), **described, **own}).close()
        return cls(place, writable=True)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, writable: bool = False) -> LocalStore:
        """The store in a folder. Raises ``StoreError`` for none, or where another process writes already."""
        require("search", "usearch")
        return cls(Path(folder), writable=writable)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._closed = False
        self._growing: Graph | PartedGraph | None = None
        self._view: _View | None = None
        self._seen = -1
        self._tail_length = 0
        self._database = Database(self.folder, writable=self._writable)
        facts = self._database.facts()
        self._space = VectorSpace(
            facts["fingerprint"],
            facts["query_fingerprint"],
            int(facts["dim"]),
            facts["metric"],  # type: ignore[arg-type]
        )
        self.precision = facts["precision"]
        self._codes = codes_for(self.precision)
        self._words = terms_for(facts["words"])
        self._shape = GraphShape(self._space.dim, self._codes, self._space.metric)
        if self._writable:
            self._clean(self._database)

    @property
    def space(self) -> VectorSpace:
        """The vector space of everything in the store."""
        return self._space

    @property
    def facts(self) -> Mapping[str, str]:
        """What the store was made with."""
        with self._using() as database:
            return database.facts()

    def put(self, documents: Sequence[EmbeddedDocument]) -> None:
        """Store these documents in place of any with the same ids, in one transaction.

        Raises ``VectorSpaceError``, ``DocumentError`` or, for a full disk, ``OutputError``, and then stored none.
        """
        check_documents(documents, self._space)
        self._check_lengths(documents)
        with self._using(to_write=True) as database:
            with database.changing():
                database.remove([one.document.id for one in documents])
                database.put(documents, self._bytes(documents), self._words)
            self._seen = -1
            self._tail_length += sum(len(one.spans) for one in documents)
            self._fold_if_long(database)

    def delete(self, ids: Collection[str]) -> int:
        """Remove the documents with these ids; how many there were."""
        with self._using(to_write=True) as database:
            with database.changing():
                removed = database.remove(ids)
            self._seen = -1
        return removed

    def digests(self, ids: Collection[str]) -> Mapping[str, str]:
        """``Document.digest`` of those of these documents that are in the store, by id."""
        with self._using() as database:
            return database.digests(ids)

    def ids(self) -> Iterator[str]:
        """The ids of all documents, in the order in which they were stored."""
        with self._using() as database:
            yield from database.ids()

    def get(self, name: str) -> Document | None:
        """The document with this id, or ``None``."""
        with self._using() as database:
            return database.document(name)

    def count(self) -> int:
        """How many documents there are."""
        with self._using() as database:
            return database.count("documents")

    def count_pieces(self) -> int:
        """How many pieces, and so vectors, there are."""
        with self._using() as database:
            return database.count("pieces")

    def search(
        self, vector: Floats, *, k: int, where: Filter | None = None, width: int = SEARCH_WIDTH
    ) -> list[Hit]:
        """The ``k`` nearest pieces of documents that ``where`` holds for, nearest first.

        Scores are of the vector as given with the stored vectors. ``width`` is how many candidates the search in the
        graph keeps at once: more bring recall, and take time. Raises ``VectorSpaceError`` and ``InvalidOptionError``.
        """
        check_k(k)
        query = check_query(vector, self._space)
        with self._looking() as database:
            found = None if where is None else self._among(database, query, k, where)
            if found is None:
                found = self._near(database, query, k, where, width)
            return _hits(database, found[:k])

    def match(self, text: str, *, k: int, where: Filter | None = None) -> list[Hit]:
        """The ``k`` best pieces by BM25, best first; none for a text without any letter or digit."""
        check_k(k)
        with self._looking() as database:
            return _hits(database, database.match(text, self._words, k=k, where=where))

    def flush(self) -> None:
        """Take the tail into the graph's file, whatever its length."""
        with self._using(to_write=True) as database:
            self._fold(database, thorough=True)

    def compact(self) -> None:
        """Make the graph and the terms anew, without what was removed, and give the room back."""
        with self._using(to_write=True) as database:
            self._fold(database, anew=True, thorough=True)
            database.vacuum()

    def damage(self) -> list[str]:
        """What is wrong with the files, nothing where all is well; reads all of them."""
        with self._looking() as database:
            found = database.damage()
            facts = database.facts()
            try:
                self._check_graph(database, facts)
            except (CorruptFileError, FileNotFoundError) as error:
                found.append(str(error))
        return found

    def close(self) -> None:
        """Free what is held; what was put stays."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._view = self._growing = None
            if self._pid == os.getpid():
                self._database.close()
                _unlock(self._lock)

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _using(self, *, to_write: bool = False) -> Iterator[Database]:
        if self._pid != os.getpid():
            self._after_fork()
        with self._mutex:
            if self._closed:
                _refuse_closed(self.folder)
            if to_write and not self._writable:
                raise StoreError(
                    f"{self.folder} was opened to be read",
                    expected="a store opened to be written",
                    found="a reader",
                    remedy="Open it with writable=True.",
                )
            yield self._database

    @contextmanager
    def _looking(self) -> Iterator[Database]:
        with self._using() as database, database.looking():
            yield database

    def _after_fork(self) -> None:
        """A child reads through a connection of its own; the lock to write stays its parent's."""
        closed = self._closed
        _unlock(self._lock)  # the child's handle alone: the parent's still holds it
        self._writable, self._lock = False, None
        self._inherited = self._database  # never closed here: SQLite forbids it across a fork
        self._begin()
        self._closed = closed

    # What is searched; all of it inside ``_looking``.

    def _current(self, database: Database) -> _View:
        version = database.version()
        if self._view is None or version != self._seen:
            self._view = self._refreshed(database)
            self._seen = version
        return self._view

    def _refreshed(self, database: Database) -> _View:
        for _ in range(3):  # a writer may replace the file between the look into the database and the opening
            with suppress(FileNotFoundError):
                return self._look(database)
            database.look_again()
        return _refuse_lost(self.folder)

    def _look(self, database: Database) -> _View:
        facts = database.facts()
        generation, indexed_to = int(facts["generation"]), int(facts["indexed_to"])
        old = self._view
        graph = old.graph if old is not None and old.generation == generation else self._mapped(facts)
        kept = _Tail(np.empty(0, dtype=np.int64), self._codes.unpack([], self._space.dim))
        if old is not None and old.generation == generation:
            kept = old.tail
        after = int(kept.keys[-1]) if len(kept.keys) else indexed_to
        keys, rows = [kept.keys], [kept.rows]
        for new_keys, new_rows in self._stored(database, after):
            keys.append(new_keys)
            rows.append(new_rows)
        return _View(generation, graph, _Tail(np.concatenate(keys), np.concatenate(rows)))

    def _mapped(self, facts: Mapping[str, str]) -> Graph | PartedGraph | None:
        generation = int(facts["generation"])
        if int(facts["graph_entries"]) == 0:
            return None
        return mapped(self._shape, self._graph_path(generation), int(facts["graph_bytes"]))

    def _stored(self, database: Database, after: int) -> Iterator[tuple[Ids, Any]]:
        """Keys and codes of the pieces with keys above ``after``, in batches."""
        while rows := database.vectors(after=after, limit=BATCH):
            keys = np.array([key for key, _ in rows], dtype=np.int64)
            yield keys, self._codes.unpack([vector for _, vector in rows], self._space.dim)
            after = int(keys[-1])

    def _near(
        self, database: Database, query: Floats, k: int, where: Filter | None, width: int
    ) -> list[tuple[int, float]]:
        """Search the graph and the tail; wider, as long as too many of what is found was removed or filtered out."""
        view = self._current(database)
        row = self._codes.encode(query[None])
        wanted = k + SPARE
        while True:
            parts = (_nearest_in(view.graph, row, wanted, width), self._nearest_of(view.tail, query, wanted))
            found = self._scored(query, database.vectors_of(np.concatenate(parts).tolist(), where))
            alive = {key for key, _ in found}
            # Each part must give k by itself, or all it has: else the other's worse ones would fill the places.
            if all(len(keys) < wanted or len(alive.intersection(keys.tolist())) >= k for keys in parts):
                return found
            if wanted >= WIDEST:
                return self._all(database, query, k, where)
            wanted *= 4

    def _among(
        self, database: Database, query: Floats, k: int, where: Filter
    ) -> list[tuple[int, float]] | None:
        """Compare with all pieces that pass the filter, if they are few; else ``None``."""
        rows = database.passing(where, limit=EXACT + 1)
        return None if len(rows) > EXACT else self._best(database, query, k, [rows])

    def _all(
        self, database: Database, query: Floats, k: int, where: Filter | None
    ) -> list[tuple[int, float]]:
        """Compare with all pieces: for filters that many pass, none of which are near."""
        return self._best(database, query, k, database.batches(where, size=BATCH))

    def _best(
        self, database: Database, query: Floats, k: int, batches: Iterable[Sequence[tuple[int, bytes]]]
    ) -> list[tuple[int, float]]:
        best: list[tuple[int, float]] = []
        for rows in batches:
            best = sorted(best + self._scored(query, rows, most=k), key=_rank)[:k]
        return best

    def _nearest_of(self, tail: _Tail, query: Floats, count: int) -> Ids:
        scores = [
            score(self._space.metric, query, self._codes.decode(tail.rows[start : start + LEAST_TAIL]))
            for start in range(0, len(tail.keys), LEAST_TAIL)
        ]
        if not scores:
            return tail.keys
        return tail.keys[_largest(np.concatenate(scores), count)]

    def _scored(
        self, query: Floats, rows: Sequence[tuple[int, bytes]], *, most: int | None = None
    ) -> list[tuple[int, float]]:
        """Keys and scores of the ``most`` best rows (``None``: of all), best first; of equal ones the older first.

        ``rows`` are keys and the bytes of vectors.
        """
        if not rows:
            return []
        keys, vectors = zip(*rows, strict=True)
        codes = self._codes.unpack(vectors, self._space.dim)
        scores = score(self._space.metric, query, self._codes.decode(codes))
        best = _largest(scores, len(rows) if most is None else most).tolist()
        return sorted(((keys[n], float(scores[n])) for n in best), key=_rank)

    # What is written.

    def _bytes(self, documents: Sequence[EmbeddedDocument]) -> list[bytes]:
        if not documents:
            return []
        return [
            row.tobytes() for row in self._codes.encode(np.concatenate([one.vectors for one in documents]))
        ]

    def _check_lengths(self, documents: Sequence[EmbeddedDocument]) -> None:
        if self.precision != "int8" or self._space.metric == "cosine" or not documents:
            return
        lengths = np.linalg.norm(np.concatenate([one.vectors for one in documents]), axis=1)
        if np.abs(lengths - 1).max(initial=0) > 1e-3:
            raise VectorSpaceError(
                f"vectors for {self.folder} are not of length 1",
                expected=f"unit vectors, for the metric {self._space.metric} at int8",
                found=f"lengths from {lengths.min():.3g} to {lengths.max():.3g}",
                remedy="Normalize them, use the metric cosine, or make the index with precision bf16.",
            )

    def _fold_if_long(self, database: Database) -> None:
        inside = int(database.fact("graph_entries") or 0)
        if self._tail_length >= min(MOST_TAIL, max(LEAST_TAIL, inside // TAIL_SHARE)):
            self._fold(database)

    def _fold(self, database: Database, *, anew: bool = False, thorough: bool = False) -> None:
        """Write a graph that has the tail in it, and make it the graph; ``thorough`` mends and cuts large ones, too."""
        facts = database.facts()
        anew = anew or self._wasteful(database, facts)
        if anew:
            with database.changing():
                database.rebuild_terms(self._words)
        try:
            if anew or self._outgrown(database, facts, GROWN_AT_END if thorough else GROWN):
                cut_for = self._cut_for(database)
                self._growing, after = self._emptied(database, cut_for), 0
            else:
                cut_for, after = int(facts.get("graph_cut_for", 0)), int(facts["indexed_to"])
            graph, last = self._grown(database, facts, after)
            if last is not None or anew:
                if thorough or len(graph) <= MENDED:
                    graph.reconnect()
                self._publish(database, graph, int(facts["generation"]), last or 0, cut_for)
        except BaseException:
            self._growing = None  # it may hold what the file does not
            raise

    def _outgrown(self, database: Database, facts: Mapping[str, str], times: float) -> bool:
        """Whether the graph is to be in parts and is not, or was cut for far fewer pieces."""
        wanted = self._cut_for(database)
        return wanted > 0 and wanted >= times * int(facts.get("graph_cut_for", 0))

    def _cut_for(self, database: Database) -> int:
        """For how many pieces a graph is to be cut into parts; 0 where it is one."""
        count = database.count("pieces") if self._shape.by_direction else 0
        return count if count > CUT else 0

    def _emptied(self, database: Database, cut_for: int) -> Graph | PartedGraph:
        """A graph of nothing for all pieces."""
        if not cut_for:
            return Graph.empty(self._shape)
        chosen = np.random.default_rng(0).choice(database.keys(), landmarks(cut_for), replace=False)
        rows = [vector for _, vector in database.vectors_of(np.sort(chosen).tolist(), None)]
        sample = self._codes.decode(self._codes.unpack(rows, self._space.dim))
        return cut_graph(self._shape, sample, cut_for)

    def _wasteful(self, database: Database, facts: Mapping[str, str]) -> bool:
        """Whether much of the graph is of pieces that were removed."""
        inside = int(facts["graph_entries"])
        removed = inside + self._tail_length - database.count("pieces")
        return inside > EXACT and removed > REMOVED_SHARE * inside

    def _grown(
        self, database: Database, facts: Mapping[str, str], after: int
    ) -> tuple[Graph | PartedGraph, int | None]:
        """The graph in memory with all pieces above ``after``, and the last key, or ``None`` if there were none."""
        last = None
        for keys, rows in self._stored(database, after):
            if self._growing is None:
                self._growing = self._loaded(facts)
            self._growing.add(keys, rows, threads=choose_threads(None))
            last = int(keys[-1])
        return self._growing or Graph.empty(self._shape), last

    def _loaded(self, facts: Mapping[str, str]) -> Graph | PartedGraph:
        if int(facts["graph_entries"]) == 0:
            return Graph.empty(self._shape)
        path = self._graph_path(int(facts["generation"]))
        try:
            return loaded(self._shape, path, int(facts["graph_bytes"]))
        except FileNotFoundError:
            _refuse_lost(self.folder)

    def _publish(
        self, database: Database, graph: Graph | PartedGraph, generation: int, last: int, cut_for: int
    ) -> None:
        path = self._graph_path(generation + 1)
        written = graph.save(path) if len(graph) else FileFacts(0, "")
        with database.changing():
            database.set_facts(
                {
                    "generation": str(generation + 1),
                    "indexed_to": str(last),
                    "graph_entries": str(len(graph)),
                    "graph_bytes": str(written.size),
                    "graph_sha256": written.sha256,
                    "graph_cut_for": str(cut_for),
                    "format": FORMATS[cut_for > 0],
                }
            )
        self._seen, self._tail_length = -1, 0
        self._graph_path(generation).unlink(missing_ok=True)  # who has it mapped keeps it

    def _graph_path(self, generation: int) -> Path:
        return self.folder / f"graph-{generation}.usearch"

    def _clean(self, database: Database) -> None:
        """Remove what killed writers left, and count the tail."""
        facts = database.facts()
        current = self._graph_path(int(facts["generation"]))
        for path in [*self.folder.glob("graph-*.usearch"), *self.folder.glob(".graph-*.usearch.*")]:
            if path != current:
                path.unlink(missing_ok=True)
        self._tail_length = database.count_above(int(facts["indexed_to"]))

    def _check_graph(self, database: Database, facts: Mapping[str, str]) -> None:
        """Raise ``CorruptFileError`` unless the graph's file is what was written, and holds every piece once."""
        if int(facts["graph_entries"]) == 0:
            return
        path = self._graph_path(int(facts["generation"]))
        found = FileFacts.of(path)
        if found != FileFacts(int(facts["graph_bytes"]), facts["graph_sha256"]):
            damaged(path, f"sha256 {facts['graph_sha256']}", f"sha256 {found.sha256}")
        keys = loaded(self._shape, path, found.size).keys()
        indexed = np.array(database.keys(), dtype=np.int64)
        indexed = indexed[indexed <= int(facts["indexed_to"])]
        if len(np.unique(keys)) != len(keys) or not np.isin(indexed, keys).all():
            damaged(path, "every piece once", "pieces that are absent, or there twice")


def _nearest_in(graph: Graph | PartedGraph | None, row: Any, count: int, width: int) -> Ids:  # noqa: ANN401 - codes
    return np.empty(0, dtype=np.int64) if graph is None else graph.nearest(row, count, width=width)


def _largest(scores: Floats, count: int) -> Ids:
    """Positions of the ``count`` largest, the largest first."""
    if len(scores) <= count:
        return np.argsort(-scores, kind="stable")
    some = np.sort(np.argpartition(-scores, count - 1)[:count])
    ordered: Ids = some[np.argsort(-scores[some], kind="stable")]
    return ordered


def _rank(one: tuple[int, float]) -> tuple[float, int]:
    """Best first, of equal ones the older: a key and its score."""
    key, value = one
    return -value, key


def _hits(database: Database, found: Sequence[tuple[int, float]]) -> list[Hit]:
    """The pieces with these keys and scores."""
    pieces = database.pieces([key for key, _ in found])
    return [_hit(pieces[key], value) for key, value in found]


def _hit(piece: Piece, value: float) -> Hit:
    return Hit(piece.id, value, piece.text, piece.start, piece.stop, json.loads(piece.fields))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {folder}",
            expected="a folder that can be made",
            found=error.strerror or str(error),
            remedy="Name another folder.",
        ) from None


def _writer_lock(folder: Path) -> int | None:
    """The lock that the one writer of a folder holds; the system frees it when the process ends, however it does."""
    if not (folder / FILE).is_file():
        return None  # the database's own message is the better one
    import fcntl

    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}",
            expected="a folder that can be written",
            found=error.strerror or str(error),
            remedy="Make it writable for this user.",
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StoreError(
            f"{folder} is being written",
            expected="one writer at a time",
            found="another one",
            remedy="Wait for it to end; searching is possible meanwhile.",
        ) from None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _refuse_closed(folder: Path) -> NoReturn:
    raise ClosedError(
        f"the index {folder} is closed", expected="an open one", found="a closed one", remedy="Open it again."
    )


def _refuse_lost(folder: Path) -> NoReturn:
    raise CorruptFileError(
        f"the graph of {folder} is gone",
        expected="the file that the database names",
        found="no such file",
        remedy="Run `qingyu index compact FOLDER`, which makes it anew from the vectors in documents.sqlite.",
    )
