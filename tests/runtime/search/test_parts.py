"""A graph in parts: cells find the groups that are there, and lead to what comparing with all finds."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest

from qingyu.errors import CorruptFileError, OutputError, StoreError
from qingyu.runtime.search import local as local_module
from qingyu.runtime.search import parts as parts_module
from qingyu.runtime.search.cells import Cells, learn
from qingyu.runtime.search.codes import CODES
from qingyu.runtime.search.contract import Document, EmbeddedDocument, VectorSpace
from qingyu.runtime.search.graph import Graph, GraphShape
from qingyu.runtime.search.local import LocalStore
from qingyu.runtime.search.parts import MAGIC, PartedGraph, cut_graph, loaded, mapped
from qingyu.runtime.vectors import unit

DIM = 64
GROUPS = 40
EACH = 50

# Not importorskip: usearch must not be imported before onnxruntime.
needs_usearch = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")


def grouped(count, seed=0, groups=GROUPS):
    """Unit vectors near ``groups`` centres that have nothing in common, and the number of each one's centre."""
    centres = np.linalg.qr(np.random.default_rng(99).normal(size=(DIM, DIM)))[0][:groups].astype(np.float32)
    random = np.random.default_rng(seed)
    own = np.arange(count) % groups
    noise = random.normal(size=(count, DIM)).astype(np.float32) * np.float32(0.6 / np.sqrt(DIM))
    return unit(centres[own] + noise), own


@pytest.fixture
def small(monkeypatch):
    """Limits so low that two thousand vectors are cut into parts."""
    monkeypatch.setattr(parts_module, "PART", 250)
    monkeypatch.setattr(parts_module, "CELL", 50)
    monkeypatch.setattr(parts_module, "LANDMARK", 4)
    monkeypatch.setattr(local_module, "CUT", 500)
    monkeypatch.setattr(local_module, "LEAST_TAIL", 100)
    monkeypatch.setattr(local_module, "BATCH", 300)
    monkeypatch.setattr(local_module, "EXACT", 40)


# Cells.


def test_cells_are_the_groups_that_are_there():
    vectors, _ = grouped(GROUPS * 20)
    cells = learn(vectors, cells=GROUPS, parts=1)
    others, numbers = grouped(400, seed=1)
    nearest = (others @ cells.means.T).argmax(axis=1)
    assert len(cells.means) == GROUPS
    assert all(len(set(nearest[numbers == n])) == 1 for n in range(GROUPS))
    assert len(set(nearest)) == GROUPS
    assert np.allclose(np.linalg.norm(cells.means, axis=1), 1, atol=1e-5)


def test_with_fewer_cells_than_groups_no_group_is_torn():
    vectors, _ = grouped(GROUPS * 20)
    cells = learn(vectors, cells=GROUPS // 2, parts=4)
    others, numbers = grouped(400, seed=1)
    nearest = (others @ cells.means.T).argmax(axis=1)
    assert len(cells.means) == GROUPS // 2
    assert np.mean([len(set(nearest[numbers == n])) == 1 for n in range(GROUPS)]) >= 0.9


def test_parts_hold_about_as_much_each():
    vectors, _ = grouped(GROUPS * 20)
    cells = learn(vectors, cells=2 * GROUPS, parts=7)
    held = np.bincount(cells.part_of(vectors), minlength=7)
    assert len(held) == 7
    assert held.min() > 0.5 * held.mean()
    assert held.max() < 1.6 * held.mean()


def test_vectors_that_are_all_the_same_make_cells_too():
    cells = learn(np.tile(unit(np.ones((1, DIM), dtype=np.float32)), (50, 1)), cells=5, parts=3)
    assert len(cells.means) == 5
    assert np.isin(cells.part_of(np.eye(DIM, dtype=np.float32)[:9]), [0, 1, 2]).all()


def test_near_parts_begin_with_that_of_the_nearest_cell_and_leave_out_what_is_far():
    means = unit(np.float32([[1, 0, 0], [1, 0.3, 0], [0, 1, 0], [0, 0, 1]]))
    cells = Cells(means, np.int32([2, 0, 1, 3]))
    assert cells.parts_near(np.float32([1, 0.1, 0]), 4) == [2]
    assert cells.parts_near(np.float32([10, 1.5, 0]), 4) == [0, 2]
    assert cells.parts_near(unit(np.ones((1, 3), np.float32))[0], 4)[0] == 0
    assert len(cells.parts_near(np.float32([-1, -1, -1]), 3)) == 3
    assert cells.parts_near(np.zeros(3, np.float32), 1) in ([0], [1], [2], [3])


# The graph of parts.


@pytest.fixture(params=sorted(CODES))
def shape(request):
    return GraphShape(DIM, CODES[request.param], "cosine")


def cut(shape, vectors):
    chosen = np.random.default_rng(3).permutation(len(vectors))[: len(vectors) // 2]
    graph = cut_graph(shape, vectors[chosen], len(vectors))
    keys = np.arange(10, 10 + len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), 500):
        rows = shape.codes.encode(vectors[start : start + 500])
        graph.add(keys[start : start + 500], rows, threads=2)
    return graph, keys


@needs_usearch
@pytest.mark.usefixtures("small")
def test_what_is_near_is_found_in_memory_mapped_and_read_again(shape, tmp_path):
    vectors, _ = grouped(GROUPS * EACH)
    graph, keys = cut(shape, vectors)
    facts = graph.save(tmp_path / "graph")
    assert facts.size == (tmp_path / "graph").stat().st_size
    graphs = [
        graph,
        mapped(shape, tmp_path / "graph", facts.size),
        loaded(shape, tmp_path / "graph", facts.size),
    ]
    queries, _ = grouped(100, seed=5)
    right = [0, 0, 0]
    for query in queries:
        wanted = set(keys[np.argsort(-(vectors @ query))[:10]].tolist())
        for n, one in enumerate(graphs):
            assert isinstance(one, PartedGraph)
            found = one.nearest(shape.codes.encode(query[None]), 10, width=64)
            assert len(found) == 10
            right[n] += len(wanted & set(found.tolist()))
    assert min(right) >= 950
    assert right[0] == right[1] == right[2]
    assert np.array_equal(graphs[2].keys(), keys)
    assert [len(one) for one in graphs] == [len(keys)] * 3


@needs_usearch
@pytest.mark.usefixtures("small")
def test_more_than_the_near_parts_hold_is_taken_from_the_others(shape):
    vectors, _ = grouped(1000)
    graph, keys = cut(shape, vectors)
    for wanted in (600, 1000, 5000):
        found = graph.nearest(shape.codes.encode(vectors[:1]), wanted)
        assert len(found) == len(set(found.tolist())) == min(wanted, 1000)
    assert np.array_equal(np.sort(found), keys)
    assert found[0] == 10


@needs_usearch
@pytest.mark.usefixtures("small")
def test_a_part_of_nothing_is_written_and_read(tmp_path):
    shape = GraphShape(DIM, CODES["int8"], "cosine")
    vectors, _ = grouped(600)
    graph = cut_graph(shape, vectors, len(vectors))
    graph.add(np.int64([7]), shape.codes.encode(vectors[:1]), threads=1)
    size = graph.save(tmp_path / "graph").size
    for one in (graph, mapped(shape, tmp_path / "graph", size), loaded(shape, tmp_path / "graph", size)):
        assert len(one) == 1
        assert one.nearest(shape.codes.encode(vectors[3:4]), 5).tolist() == [7]
    assert graph.reconnect() == 0


@needs_usearch
@pytest.mark.usefixtures("small")
def test_a_graph_in_one_is_opened_as_before(tmp_path):
    shape = GraphShape(DIM, CODES["int8"], "cosine")
    graph = Graph.empty(shape)
    graph.add(np.arange(5), shape.codes.encode(grouped(5)[0]), threads=1)
    size = graph.save(tmp_path / "graph").size
    assert isinstance(mapped(shape, tmp_path / "graph", size), Graph)
    assert isinstance(loaded(shape, tmp_path / "graph", size), Graph)


@needs_usearch
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", [len(MAGIC), len(MAGIC) + 9, len(MAGIC) + 20])
def test_a_head_that_was_changed_is_refused(tmp_path, place):
    shape = GraphShape(DIM, CODES["int8"], "cosine")
    graph, _ = cut(shape, grouped(600)[0])
    size = graph.save(tmp_path / "graph").size
    data = bytearray((tmp_path / "graph").read_bytes())
    data[place : place + 3] = b"\xff\xff\xff"
    (tmp_path / "graph").write_bytes(data)
    with pytest.raises(CorruptFileError, match="is damaged"):
        mapped(shape, tmp_path / "graph", size)


# In a store.


def documents_of(vectors, first=0):
    return [
        EmbeddedDocument.whole(Document(f"d{n}", f"第{n}篇"), vector)
        for n, vector in enumerate(vectors, start=first)
    ]


def space(metric="cosine"):
    return VectorSpace("qy1-passage", "qy1-query", DIM, metric)


def recall(store, vectors, names, count=60):
    queries, _ = grouped(count, seed=7)
    right = 0
    for query in queries:
        wanted = {names[n] for n in np.argsort(-(vectors @ query))[:10]}
        right += len(wanted & {hit.id for hit in store.search(query, k=10)})
    return right / (10 * count)


@needs_usearch
@pytest.mark.usefixtures("small")
def test_a_store_that_outgrows_one_graph_is_cut_and_again_when_it_has_doubled(tmp_path):
    vectors, _ = grouped(2400)
    documents, cuts = documents_of(vectors), []
    with LocalStore.create(tmp_path / "kb", space()) as store:
        assert store.facts["format"] == "1"
        for start in range(0, 2400, 200):
            store.put(documents[start : start + 200])
            cuts.append(int(store.facts["graph_cut_for"]))
        store.flush()
        names = [one.document.id for one in documents]
        assert recall(store, vectors, names) >= 0.95
        assert store.facts["format"] == "2"
        assert store.damage() == []
    assert cuts[0] == cuts[1] == 0
    assert sorted(cuts) == cuts
    assert all(b == a or b >= 2 * a for a, b in itertools.pairwise(cuts))
    with LocalStore.open(tmp_path / "kb", writable=True) as store:
        assert recall(store, vectors, names) >= 0.95
        assert store.delete(names[600:]) == 1800
        store.compact()
        assert (store.facts["graph_cut_for"], store.facts["format"]) == ("600", "2")
        store.delete(names[100:600])
        store.compact()
        assert (store.facts["graph_cut_for"], store.facts["format"]) == ("0", "1")
        assert recall(store, vectors[:100], names[:100]) >= 0.95
        assert store.damage() == []


@needs_usearch
@pytest.mark.usefixtures("small")
def test_a_reader_follows_the_cut(tmp_path):
    vectors, _ = grouped(1200)
    documents = documents_of(vectors)
    with LocalStore.create(tmp_path / "kb", space()) as writer:
        writer.put(documents[:400])
        with LocalStore.open(tmp_path / "kb") as reader:
            assert reader.search(vectors[3], k=1)[0].id == "d3"
            writer.put(documents[400:])
            assert int(writer.facts["graph_cut_for"]) == 1200
            assert reader.search(vectors[900], k=1)[0].id == "d900"


@needs_usearch
@pytest.mark.usefixtures("small")
def test_lengths_matter_to_other_metrics_and_so_their_graph_stays_in_one(tmp_path):
    vectors, _ = grouped(1000)
    with LocalStore.create(tmp_path / "kb", space("dot"), precision="bf16") as store:
        store.put(documents_of(vectors * 2))
        store.flush()
        assert store.facts["graph_cut_for"] == "0"


@needs_usearch
@pytest.mark.usefixtures("small")
def test_parts_that_cannot_be_written_leave_the_old_graph(tmp_path, monkeypatch):
    vectors, _ = grouped(900)
    documents = documents_of(vectors)
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents[:450])
        before = store.facts["generation"]

        def full(_self):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Graph, "data", full)
            with pytest.raises(OutputError, match="No space left"):
                store.put(documents[450:])
        assert store.facts["generation"] == before
        assert store.count() == 900
        assert store.search(vectors[800], k=1)[0].id == "d800"
        store.flush()
        assert store.facts["graph_cut_for"] == "900"
        assert store.damage() == []
    assert len(list((tmp_path / "kb").glob("*graph-*"))) == 1


@needs_usearch
def test_a_format_that_is_not_known_is_refused(tmp_path):
    with LocalStore.create(tmp_path / "kb", space()) as store, store._database.changing():
        store._database.set_facts({"format": "3"})
    with pytest.raises(StoreError, match="format 3"):
        LocalStore.open(tmp_path / "kb")
