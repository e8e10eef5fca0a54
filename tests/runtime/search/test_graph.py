"""The graph's file: whatever threads do, every entry can be found."""

from importlib.util import find_spec

import numpy as np
import pytest

from qingyu.runtime.search import graph as graph_module
from qingyu.runtime.search.codes import CODES
from qingyu.runtime.search.graph import Graph, GraphShape, Near

# Not importorskip: usearch must not be imported before onnxruntime.
pytestmark = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")

DIM = 32
COUNT = 3000


@pytest.fixture(autouse=True)
def approximate(monkeypatch):
    """No graph is so small that it is compared with entry by entry."""
    monkeypatch.setattr(graph_module, "EXACT", 0)


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=sorted(CODES))
def shape(request):
    return GraphShape(DIM, CODES[request.param], "cosine")


def grown(shape, vectors, *, threads=4):
    graph = Graph.empty(shape)
    keys = np.arange(10, 10 + len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), 500):
        rows = shape.codes.encode(vectors[start : start + 500])
        graph.add(keys[start : start + 500], rows, threads=threads)
    return graph, keys


def test_all_are_found_when_all_are_wanted(shape):
    vectors = unit(COUNT)
    graph, keys = grown(shape, vectors)
    found = graph.nearest(shape.codes.encode(vectors[:1]), COUNT + 5)
    assert np.array_equal(np.sort(found), keys)
    assert found[0] == 10


def test_a_search_that_the_graph_does_not_lead_far_enough_compares_with_all(shape, monkeypatch):
    """As with entries that nothing links to: the search in the graph gives fewer than are wanted."""
    vectors = unit(COUNT)
    graph, _ = grown(shape, vectors)
    row = shape.codes.encode(vectors[7:8])
    exactly, whole = [], Graph._found

    def blind(self, code, count, *, width, exact):
        exactly.append(exact)
        found = whole(self, code, count, width=width, exact=exact)
        return found if exact else Near(found.keys[:-1], found.distances[:-1])

    monkeypatch.setattr(Graph, "_found", blind)
    found = graph.nearest(row, 20)
    assert exactly == [False, True]
    assert len(found) == 20
    assert found[0] == 17


def test_what_nothing_leads_to_is_added_again_with_its_own_vector(shape, monkeypatch):
    vectors = unit(COUNT)
    graph, keys = grown(shape, vectors)
    lost, whole = keys[[3, 999, 2500]], Graph._found

    def blind(self, code, count, *, width, exact):
        found = whole(self, code, count, width=width, exact=exact)
        kept = ~np.isin(found.keys, lost)
        return Near(found.keys[kept], found.distances[kept])

    with monkeypatch.context() as patched:
        patched.setattr(Graph, "_found", blind)
        assert graph.reconnect() >= 3
    assert np.array_equal(graph.keys(), keys)
    for key in lost:
        row = shape.codes.encode(vectors[key - 10 : key - 9])
        assert graph.nearest(row, 1)[0] == key


def test_reconnecting_leaves_next_to_nothing_unreachable(shape):
    vectors = unit(COUNT)
    graph, _ = grown(shape, vectors)
    graph.reconnect()
    # Not none: an entry all of whose neighbours have better ones stays without a link.
    assert graph.reconnect() <= COUNT // 1000
    assert len(graph) == COUNT


def test_an_empty_graph_has_nothing_to_reconnect(shape):
    assert Graph.empty(shape).reconnect() == 0
