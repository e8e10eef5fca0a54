"""A large graph in parts: cells lead to a few graphs, each small; one file holds all.

Searching takes the parts that the nearest cells belong to (``cells``), and the others only where more is wanted than
those hold. Its methods are those of one graph (``graph``); ``mapped`` and ``loaded`` open either.

The file: ``MAGIC``, the length of a JSON header (8 bytes, little endian), the header, and what it gives the places of:
the cells' parts, their means, and the bytes of each part's file, which start at multiples of 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.runtime.engine import Floats, Ids
from qingyu.runtime.search.cells import Cells, learn
from qingyu.runtime.search.graph import SEARCH_WIDTH, FileFacts, Graph, GraphShape, Near, reading, replacing
from qingyu.runtime.vectors import unit

__all__ = ["CUT", "PartedGraph", "cut_graph", "landmarks", "loaded", "mapped"]

CUT = 131_072  # entries above which a graph is cut; a hundred thousand are searched as well in one
PART = 32_768  # entries of a part when a graph is cut
CELL = 512  # entries of a cell: two thousand cells of a million entries
LANDMARK = 32  # entries for one that cells are learnt from
MOST_LANDMARKS = 65_536  # each is compared with each
MOST_PARTS = 8  # that are searched for what is near one vector

MAGIC = b"qingyu: parts 1\n"
ALIGNED = 64


def landmarks(entries: int) -> int:
    """How many vectors the cells of so many entries are learnt from."""
    return min(entries // LANDMARK, MOST_LANDMARKS)


def cut_graph(shape: GraphShape, sample: Floats, entries: int) -> PartedGraph:
    """A graph of nothing in the parts that ``entries`` such as a sample of them, (n, dim), are to be put into."""
    parts = max(2, entries // PART)
    cells = learn(unit(sample), cells=max(parts, entries // CELL), parts=parts)
    return PartedGraph(shape, cells, _Filling([Graph.empty(shape) for _ in range(parts)]))


def mapped(shape: GraphShape, path: Path, size: int) -> Graph | PartedGraph:
    """The graph of a file, in parts or not, which is mapped and not read; ``CorruptFileError`` for another."""
    if _is_parted(path, size):
        return PartedGraph.read(shape, path, size, mapped=True)
    return Graph.mapped(shape, path, size)


def loaded(shape: GraphShape, path: Path, size: int) -> Graph | PartedGraph:
    """The graph of a file, in parts or not, read into memory to be grown."""
    if _is_parted(path, size):
        return PartedGraph.read(shape, path, size, mapped=False)
    return Graph.loaded(shape, path, size)


class PartedGraph:
    """Graphs of the parts that cells belong to, mapped (and then only searched) or in memory."""

    def __init__(self, shape: GraphShape, cells: Cells, parts: _Filling | _Mapped) -> None:
        self._shape = shape
        self._cells = cells
        self._parts = parts

    @classmethod
    def read(cls, shape: GraphShape, path: Path, size: int, *, mapped: bool) -> PartedGraph:
        """The graph of a file of ``size`` bytes, mapped or read into memory; ``CorruptFileError`` for no such file."""
        with reading(path, size):
            data = np.memmap(path, dtype=np.uint8, mode="r").data
            start = len(MAGIC) + 8
            header = json.loads(
                bytes(data[start : start + int.from_bytes(data[len(MAGIC) : start], "little")])
            )
            numbers = np.frombuffer(_place(data, header["parts_of_cells"]), dtype="<i4")
            means = np.frombuffer(_place(data, header["means"]), dtype="<f4").reshape(len(numbers), shape.dim)
            whole = _Mapped(shape, path, data, header["parts"])
            parts = whole if mapped else _Filling([whole.loaded(n) for n in range(len(whole))])
            return cls(shape, Cells(means, numbers), parts)

    def __len__(self) -> int:
        return sum(self._parts.lengths())

    def add(self, keys: Ids, rows: Any, *, threads: int) -> None:  # noqa: ANN401 - an array of codes
        """Add rows of codes under keys that are not there."""
        parts = self._cells.part_of(self._shape.codes.decode(rows))
        for part in np.unique(parts).tolist():
            own = parts == part
            self._parts[part].add(keys[own], rows[own], threads=threads)

    def reconnect(self) -> int:
        """Add again what no path leads to in its part; how many there were. Of a graph in memory."""
        return sum(self._parts[part].reconnect() for part in range(len(self._parts)))

    def nearest(self, row: Any, count: int, *, width: int = SEARCH_WIDTH) -> Ids:  # noqa: ANN401
        """Keys of the ``count`` nearest to one row of codes that were found, nearest first: ``count``, or all."""
        lengths = self._parts.lengths()
        chosen = self._cells.parts_near(self._shape.codes.decode(row)[0], MOST_PARTS)
        if sum(lengths[part] for part in chosen) < count:
            chosen = [part for part, length in enumerate(lengths) if length]
        found = [self._parts[part].near(row, count, width=width) for part in chosen if lengths[part]]
        return found[0].keys if len(found) == 1 else _nearest_of(found, count)

    def keys(self) -> Ids:
        """All keys, ascending; of a graph in memory."""
        return np.sort(np.concatenate([self._parts[part].keys() for part in range(len(self._parts))]))

    def save(self, path: Path) -> FileFacts:
        """Write the graph to a temporary name, and rename; it is on the disk when this returns.

        Raises ``OutputError`` and then leaves nothing.
        """
        pieces = {
            "parts_of_cells": self._cells.parts.astype("<i4").tobytes(),
            "means": self._cells.means.astype("<f4").tobytes(),
        }
        graphs = [self._parts[part] for part in range(len(self._parts))]
        layout = _Layout.of({name: len(piece) for name, piece in pieces.items()}, graphs)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                stream.write(layout.head)
                for place, piece in zip(layout.places, _chain(pieces, graphs), strict=True):
                    stream.write(bytes(place - stream.tell()))
                    stream.write(piece)

        return replacing(path, layout.size, write)


class _Filling:
    """Parts in memory."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitem__(self, part: int) -> Graph:
        return self._graphs[part]

    def lengths(self) -> Sequence[int]:
        """Entries of each."""
        return [len(graph) for graph in self._graphs]


class _Mapped:
    """Parts in a mapped file, each opened when it is first searched."""

    def __init__(
        self, shape: GraphShape, path: Path, data: memoryview, parts: Sequence[Sequence[int]]
    ) -> None:
        self._shape, self._path, self._data, self._places = shape, path, data, parts
        self._lengths = [entries for _, _, entries in parts]
        self._opened: dict[int, Graph] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, part: int) -> Graph:
        if part not in self._opened:
            self._opened[part] = self._read(part, mapped=True)
        return self._opened[part]

    def lengths(self) -> Sequence[int]:
        """Entries of each."""
        return self._lengths

    def loaded(self, part: int) -> Graph:
        """A part in memory."""
        return self._read(part, mapped=False)

    def _read(self, part: int, *, mapped: bool) -> Graph:
        start, size, _ = self._places[part]
        with reading(self._path, len(self._data)):
            return Graph.within(self._shape, _place(self._data, (start, size)), mapped=mapped)


@dataclass(frozen=True)
class _Layout:
    """Where everything stands in a file: the bytes it begins with, where what follows starts, and its size."""

    head: bytes
    places: Sequence[int]
    size: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], graphs: Sequence[Graph]) -> _Layout:
        """That of pieces of so many bytes, and graphs after them."""
        end, places = 0, []
        for size in (*sizes.values(), *(graph.size for graph in graphs)):
            start = -(-end // ALIGNED) * ALIGNED
            places.append((start, size))
            end = start + size

        def header(first: int) -> bytes:
            moved = [(start + first, size) for start, size in places]
            named = dict(zip(sizes, moved, strict=False))
            parts = [(*place, len(graph)) for place, graph in zip(moved[len(sizes) :], graphs, strict=True)]
            text = json.dumps({**named, "parts": parts}).encode("ascii")
            return MAGIC + len(text).to_bytes(8, "little") + text

        first = ALIGNED
        while len(header(first)) > first:
            first *= 2
        return cls(header(first), [start + first for start, _ in places], end + first)


def _chain(pieces: Mapping[str, bytes], graphs: Sequence[Graph]) -> Iterator[bytes]:
    """What follows the head, one after the other, so that one graph's bytes are held at a time."""
    yield from pieces.values()
    for graph in graphs:
        yield graph.data()


def _place(data: memoryview, place: Sequence[int]) -> memoryview:
    start, size = place
    if start + size > len(data):
        raise ValueError(f"{start + size} bytes are named, and {len(data)} are there")
    return data[start : start + size]


def _nearest_of(found: Sequence[Near], count: int) -> Ids:
    """Keys of the ``count`` nearest of all, nearest first."""
    distances = np.concatenate([one.distances for one in found])
    order = np.argsort(distances, kind="stable")[:count]
    keys: Ids = np.concatenate([one.keys for one in found])[order]
    return keys


def _is_parted(path: Path, size: int) -> bool:
    with reading(path, size), path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
