"""The file of an HNSW graph: searched by mapping it, grown in memory, and written whole or not at all.

The graph is usearch's. Its keys are those of the pieces, ascending and never used twice. Not here: what is newer than
the file, or was deleted since (``local``).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from qingyu.errors import CorruptFileError, OutputError
from qingyu.models.extras import require
from qingyu.runtime.engine import Floats, Ids
from qingyu.runtime.onnxruntime_engine import import_onnxruntime
from qingyu.runtime.search.codes import Codes
from qingyu.runtime.search.contract import Metric

if TYPE_CHECKING:
    from usearch.index import Index

__all__ = [
    "EXACT",
    "SEARCH_WIDTH",
    "FileFacts",
    "Graph",
    "GraphShape",
    "Near",
    "damaged",
    "reading",
    "replacing",
]

# A hundred thousand clustered vectors of 512 dimensions: a build width of 64 finds 0.996 of the ten nearest at a search
# width of 64 (bench/search.py), so a wider build, which takes in proportion longer, is not worth its time.
NEIGHBOURS = 16
BUILD_WIDTH = 64
SEARCH_WIDTH = 64

# The first entries are added by one thread: threads that begin together do not see each other's, and leave some without
# any link to them (17 of 20,000 random vectors with two threads, none with one).
ALONE = 1024

EXACT = 10_000  # entries up to which comparing with all takes less than a millisecond

# Codes of int8 keep directions only, so they are compared by cosine whatever the metric of the space.
KINDS = {"cosine": "cos", "dot": "ip", "euclidean": "l2sq"}


@dataclass(frozen=True)
class GraphShape:
    """What a graph holds: vectors of so many values, kept as codes, near by a metric."""

    dim: int
    codes: Codes
    metric: Metric

    @property
    def by_direction(self) -> bool:
        """Whether what is near depends on directions alone."""
        return self.codes.scalar == "i8" or self.metric == "cosine"

    def index(self, **options: Any) -> Index:  # noqa: ANN401 - usearch's own
        """A usearch index of this shape."""
        return _index_class()(
            ndim=self.dim,
            metric="cos" if self.by_direction else KINDS[self.metric],
            dtype=self.codes.scalar,
            connectivity=NEIGHBOURS,
            expansion_add=BUILD_WIDTH,
            expansion_search=SEARCH_WIDTH,
            **options,
        )


def _index_class() -> type[Index]:
    """Usearch's index, imported after onnxruntime: the other way round onnxruntime 1.32 ends in a segmentation fault.

    usearch loads a library with its symbols open to all; among them are those of libstdc++, which onnxruntime then
    mixes with its own.
    """
    require("search", "usearch")
    import_onnxruntime()
    from usearch.index import Index

    kind: type[Index] = Index
    return kind


class Near(NamedTuple):
    """What is near, nearest first: keys int64 (n,), and the graph's distances float32 (n,)."""

    keys: Ids
    distances: Floats


class Graph:
    """An HNSW graph, mapped (and then only searched) or in memory."""

    def __init__(self, shape: GraphShape, index: Index) -> None:
        self._shape = shape
        self._index = index

    @classmethod
    def empty(cls, shape: GraphShape) -> Graph:
        """A graph of nothing, in memory."""
        return cls(shape, shape.index())

    @classmethod
    def mapped(cls, shape: GraphShape, path: Path, size: int) -> Graph:
        """The graph of a file, which is mapped and not read; ``CorruptFileError`` unless it has ``size`` bytes."""
        with reading(path, size):
            return cls(shape, shape.index(enable_key_lookups=False, path=path, view=True))

    @classmethod
    def loaded(cls, shape: GraphShape, path: Path, size: int) -> Graph:
        """The graph of a file, read into memory to be grown."""
        with reading(path, size):
            return cls(shape, shape.index(path=path, view=False))

    @classmethod
    def within(cls, shape: GraphShape, data: memoryview, *, mapped: bool) -> Graph:
        """The graph whose file's bytes these are; ``mapped`` is only searched, and reads them where they are."""
        index = shape.index(enable_key_lookups=not mapped)
        if mapped:
            index.view(data)
        else:
            index.load(data)
        return cls(shape, index)

    def __len__(self) -> int:
        return len(self._index)

    def add(self, keys: Ids, rows: Any, *, threads: int) -> None:  # noqa: ANN401 - an array of codes
        """Add rows of codes under keys that are not there."""
        codes, first = self._shape.codes.searched(rows), max(0, ALONE - len(self))
        names = keys.astype(np.uint64)
        self._index.add(names[:first], codes[:first], threads=1)
        self._index.add(names[first:], codes[first:], threads=threads)

    def reconnect(self) -> int:
        """Add again what no path leads to, so that it can be found; how many there were. Of a graph in memory.

        A search as wide as the graph reaches all that any search can reach. Its time grows faster than the graph: a
        fortieth of that of adding at some ten thousand entries, about a minute at a million.
        """
        if not len(self):
            return 0
        keys = self.keys()
        start = self._index.get(np.uint64(keys[-1]))
        lost = np.setdiff1d(keys, self._found(start, len(self), width=len(self), exact=False).keys)
        if len(lost):
            names = lost.astype(np.uint64)
            rows = np.stack(self._index.get(names))  # of bf16 it gives a tuple
            self._index.remove(names)
            self._index.add(names, rows, threads=1)
        return len(lost)

    def nearest(self, row: Any, count: int, *, width: int = SEARCH_WIDTH) -> Ids:  # noqa: ANN401
        """Keys of the ``count`` nearest to one row of codes, nearest first: ``count``, or all there are.

        Exact among ``EXACT`` and fewer, and where so many are wanted that the search in the graph does not find them.
        """
        return self.near(row, count, width=width, exact=len(self) <= EXACT).keys

    def near(self, row: Any, count: int, *, width: int, exact: bool = False) -> Near:  # noqa: ANN401
        """The ``count`` nearest to one row of codes, or all; exact where the search in the graph finds fewer."""
        if not len(self):
            return Near(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
        code, wanted = self._shape.codes.searched(row)[0], min(count, len(self))
        found = self._found(code, wanted, width=max(width, count), exact=exact)
        return found if len(found.keys) == wanted else self._found(code, wanted, width=width, exact=True)

    def _found(self, code: Any, count: int, *, width: int, exact: bool) -> Near:  # noqa: ANN401 - a row of codes
        self._index.expansion_search = width
        found = self._index.search(code, count, exact=exact, threads=1)
        return Near(found.keys.astype(np.int64), found.distances)

    def keys(self) -> Ids:
        """All keys, ascending; of a graph in memory, for usearch has no list of them for a mapped one."""
        return np.sort(np.asarray(self._index.keys).astype(np.int64))  # one by one they take quadratic time

    @property
    def size(self) -> int:
        """Bytes that its file has."""
        size: int = self._index.serialized_length
        return size

    def data(self) -> bytes:
        """The bytes of its file."""
        data: bytes = self._index.save()
        return data

    def save(self, path: Path) -> FileFacts:
        """Write the graph to a temporary name, and rename; it is on the disk when this returns.

        Raises ``OutputError`` and then leaves nothing.
        """
        return replacing(path, self.size, self._index.save)


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Those of a file that is there."""
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        return cls(path.stat().st_size, digest.hexdigest())


def replacing(path: Path, size: int, write: Callable[[Path], object]) -> FileFacts:
    """Have a file of ``size`` bytes written to a temporary name, and rename it; ``OutputError`` leaves nothing."""
    with writing(path), _temporary(path) as temporary:
        write(temporary)
        facts = FileFacts.of(temporary)
        if facts.size != size:
            raise OSError(f"{facts.size} of {size} bytes were written")
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    return facts


@contextmanager
def reading(path: Path, size: int) -> Iterator[None]:
    """What goes wrong while reading a file of ``size`` bytes is ``CorruptFileError``, unless it is not there."""
    found = path.stat().st_size  # FileNotFoundError is the caller's: a writer may have replaced the file
    if found != size:
        damaged(path, f"{size} bytes", f"{found} bytes")
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, OSError) as error:
        damaged(path, "a graph of usearch", str(error) or type(error).__name__)


def damaged(path: Path, expected: str, found: str) -> NoReturn:
    """Raise ``CorruptFileError`` for a graph's file."""
    raise CorruptFileError(
        f"{path} is damaged",
        expected=expected,
        found=found,
        remedy="Run `qingyu index compact FOLDER`, which makes it anew from the vectors in documents.sqlite.",
    )


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while writing is ``OutputError``; usearch says it with a ``RuntimeError``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(
            f"cannot write {path}",
            expected="a folder that can be written, with room",
            found=found,
            remedy="Free space or choose another folder; what was stored before is still there.",
        ) from None


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
