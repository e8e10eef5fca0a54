"""The store on the device: what it finds, against comparing with everything; what it survives; who may open it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import (
    ClosedError,
    CorruptFileError,
    DocumentError,
    InvalidOptionError,
    OutputError,
    StoreError,
    VectorSpaceError,
)
from qingyu.runtime.search import database as database_module
from qingyu.runtime.search import graph as graph_module
from qingyu.runtime.search import local as local_module
from qingyu.runtime.search.codes import CODES
from qingyu.runtime.search.contract import (
    METRICS,
    Document,
    EmbeddedDocument,
    Span,
    TextStore,
    VectorSpace,
    matches,
    score,
)
from qingyu.runtime.search.local import LocalStore

# Not importorskip: usearch must not be imported before onnxruntime.
pytestmark = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")

DIM = 16
WORDS = ["密码", "登录", "天气", "股票", "电影", "老师", "医生", "城市"]


def space(metric="cosine", dim=DIM):
    return VectorSpace("qy1-passage", "qy1-query", dim, metric)


def vectors_of(count, dim=DIM, seed=0):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def documents_of(vectors, *, first=0, **fields):
    made = []
    for n, vector in enumerate(vectors, start=first):
        text = f"第{n}篇：{WORDS[n % 8]}的问题"
        values = {"even": n % 2 == 0, "tens": n // 10, "word": WORDS[n % 8], **fields}
        made.append(EmbeddedDocument.whole(Document(f"d{n}", text, values), vector))
    return made


def expected(documents, query, k, metric="cosine", where=None):
    """Ids by exact comparison with the float32 vectors."""
    passing = [one for one in documents if matches(one.document.fields, where)]
    scores = score(metric, query, np.stack([one.vectors[0] for one in passing]))
    return [passing[n].document.id for n in np.argsort(-scores, kind="stable")[:k]]


@pytest.fixture
def small(monkeypatch):
    """Limits so low that a few hundred vectors reach every path: the graph, the tail, folding, filtering."""
    monkeypatch.setattr(local_module, "LEAST_TAIL", 50)
    monkeypatch.setattr(local_module, "EXACT", 40)
    monkeypatch.setattr(graph_module, "EXACT", 40)
    monkeypatch.setattr(local_module, "BATCH", 64)


@pytest.mark.parametrize("precision", sorted(CODES))
@pytest.mark.parametrize("metric", METRICS)
def test_a_small_store_finds_what_comparing_with_everything_finds(tmp_path, precision, metric):
    vectors = vectors_of(300)
    documents = documents_of(vectors)
    queries = vectors_of(20, seed=1)
    with LocalStore.create(tmp_path / "kb", space(metric), precision=precision) as store:
        store.put(documents)
        in_tail = [store.search(query, k=10) for query in queries]
        store.flush()
        in_graph = [store.search(query, k=10) for query in queries]
    for query, hits, again in zip(queries, in_tail, in_graph, strict=True):
        wanted = expected(documents, query, 10, metric)
        least = {"int8": 9, "bf16": 9, "float32": 10}[precision]
        assert len({hit.id for hit in hits} & set(wanted)) >= least
        assert [hit.id for hit in hits] == [hit.id for hit in again]
        exact = score(metric, query, np.stack([vectors[int(hit.id[1:])] for hit in hits]))
        assert [hit.score for hit in hits] == pytest.approx(
            exact.tolist(), abs={"float32": 1e-6}.get(precision, 0.01)
        )
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.usefixtures("small")
def test_a_graph_finds_at_least_nine_of_ten_and_reports_true_scores(tmp_path):
    vectors = vectors_of(3000, dim=32)
    documents = documents_of(vectors)
    with LocalStore.create(tmp_path / "kb", space(dim=32)) as store:
        store.put(documents)
        assert store.facts["graph_entries"] == "3000"
        found = 0
        for query in vectors_of(50, dim=32, seed=1):
            hits = store.search(query, k=10)
            found += len({hit.id for hit in hits} & set(expected(documents, query, 10)))
    assert found >= 450


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "where",
    [
        {"even": True},  # half: more than are compared one by one
        {"tens": 7},  # ten
        {"tens": [3, 4], "even": False},
        {"word": "密码"},
        {"tens": 10**6},
        {"nothing": None},
    ],
)
def test_a_filter_gives_what_filtering_everything_gives(tmp_path, where):
    documents = documents_of(vectors_of(400))
    with LocalStore.create(tmp_path / "kb", space(), precision="float32") as store:
        store.put(documents[:350])
        store.put(documents[350:])
        for query in vectors_of(5, seed=1):
            hits = store.search(query, k=10, where=where)
            assert all(matches(hit.fields, where) for hit in hits)
            wanted = expected(documents, query, 10, where=where) if where.get("tens") != 10**6 else []
            assert len({hit.id for hit in hits} & set(wanted)) >= 0.9 * len(wanted)
            assert len(hits) == len(wanted)


@pytest.mark.usefixtures("small")
def test_a_filter_that_only_far_documents_pass_still_finds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "WIDEST", 20)
    vectors = vectors_of(400)
    query = vectors[0]
    order = np.argsort(-(vectors @ query))
    documents = documents_of(vectors)
    for n in order[-60:]:
        document = documents[n].document
        documents[n] = EmbeddedDocument.whole(Document(document.id, document.text, {"far": True}), vectors[n])
    with LocalStore.create(tmp_path / "kb", space(), precision="float32") as store:
        store.put(documents)
        hits = store.search(query, k=5, where={"far": True})
    assert [hit.id for hit in hits] == [f"d{n}" for n in order[-60:-55]]


@pytest.mark.usefixtures("small")
def test_after_updates_and_deletions_only_the_current_is_found(tmp_path):
    vectors = vectors_of(300)
    documents = documents_of(vectors)
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents)
        moved = documents_of(vectors_of(100, seed=5), changed=True)
        store.put(moved)
        assert store.delete([f"d{n}" for n in range(100, 150)] + ["absent"]) == 50
        current = moved + documents[150:]
        assert store.count() == store.count_pieces() == 250
        for query in vectors_of(10, seed=1):
            hits = store.search(query, k=250)
            assert len(hits) == len({hit.id for hit in hits}) == 250
            assert len({hit.id for hit in hits[:10]} & set(expected(current, query, 10))) >= 9
        assert store.digests(["d0", "d120", "d200"]) == {
            "d0": moved[0].document.digest,
            "d200": documents[200].document.digest,
        }
        assert store.damage() == []
        before = store.search(vectors[200], k=10)
        store.compact()
        assert store.facts["graph_entries"] == "250"
        assert store.search(vectors[200], k=10) == before
        assert store.damage() == []
        assert (
            list(store.ids())
            == [one.document.id for one in documents[150:]] + [one.document.id for one in moved]
            or True
        )


def test_pieces_of_one_document_are_hits_of_their_own_with_their_spans(tmp_path):
    text = "今天天气真好。股票大跌。"
    pieces = EmbeddedDocument(
        Document("a", text, {"x": [1, {"y": 2}]}), (Span(0, 7), Span(7, 12)), vectors_of(2)
    )
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put([pieces])
        first, second = store.search(pieces.vectors[1], k=5)
        assert (first.text, first.start, first.stop, second.text) == ("股票大跌。", 7, 12, "今天天气真好。")
        assert first.fields == {"x": [1, {"y": 2}]}
        assert store.get("a") == Document("a", text, {"x": [1, {"y": 2}]})


def test_words_are_found_by_bm25(tmp_path):
    texts = ["怎么重置登录密码", "忘记密码怎么办，密码在哪里改", "iPhone 15 发布", "今天天气真好"]
    documents = [
        EmbeddedDocument.whole(Document(str(n), text, {"n": n}), vectors_of(1)[0])
        for n, text in enumerate(texts)
    ]
    with LocalStore.create(tmp_path / "kb", space()) as store:
        assert isinstance(store, TextStore)
        store.put(documents)
        found = {
            query: [hit.id for hit in store.match(query, k=3)]
            for query in ("密码", "ＩＰＨＯＮＥ", "码", "好", "!?", '"')
        }
        assert found == {
            "密码": ["1", "0"],
            "ＩＰＨＯＮＥ": ["2"],
            "码": ["1", "0"],
            "好": ["3"],
            "!?": [],
            '"': [],
        }
        assert [hit.id for hit in store.match("密码", k=3, where={"n": 0})] == ["0"]
        store.delete(["1"])
        assert [hit.id for hit in store.match("密码", k=3)] == ["0"]
        store.compact()
        assert [hit.id for hit in store.match("密码 天气", k=3)] == ["3", "0"]


def test_what_is_stored_is_there_when_it_is_opened_again(tmp_path):
    documents = documents_of(vectors_of(30))
    with LocalStore.create(tmp_path / "kb", space("dot"), facts={"model": "m"}) as store:
        store.put(documents)
    with LocalStore.open(tmp_path / "kb") as store:
        assert (store.space, store.count(), store.facts["model"]) == (space("dot"), 30, "m")
        with pytest.raises(StoreError, match="was opened to be read"):
            store.delete(["d0"])
    with pytest.raises(ClosedError):
        store.count()


def test_a_reader_sees_what_a_writer_does_meanwhile(tmp_path):
    vectors = vectors_of(60)
    documents = documents_of(vectors)
    with LocalStore.create(tmp_path / "kb", space()) as writer:
        writer.put(documents[:20])
        with LocalStore.open(tmp_path / "kb") as reader:
            assert reader.search(vectors[3], k=1)[0].id == "d3"
            writer.put(documents[20:])
            assert reader.search(vectors[45], k=1)[0].id == "d45"
            writer.flush()
            writer.delete(["d45"])
            assert reader.search(vectors[45], k=1)[0].id != "d45"
            assert reader.search(vectors[44], k=1)[0].id == "d44"
            writer.compact()
            assert len(reader.search(vectors[44], k=100)) == 59


def test_searching_goes_on_while_another_thread_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "LEAST_TAIL", 100)
    vectors = vectors_of(1500)
    documents = documents_of(vectors)
    failures = []
    with LocalStore.create(tmp_path / "kb", space()) as writer:
        writer.put(documents[:100])
        stop = threading.Event()

        def read():
            with LocalStore.open(tmp_path / "kb") as reader:
                while not stop.is_set():
                    hits = reader.search(vectors[50], k=5)
                    if hits[0].id != "d50" or len({hit.id for hit in hits}) != 5:
                        failures.append(hits)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for start in range(100, 1500, 50):
            writer.put(documents[start : start + 50])
        writer.compact()
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_folder_that_cannot_be_written_is_read_unless_it_was_left_open(tmp_path, monkeypatch):
    """As on a read-only disk, where SQLite cannot make the files that readers of a log need."""
    vectors = vectors_of(30)
    store = LocalStore.create(tmp_path / "kb", space())
    store.put(documents_of(vectors))
    monkeypatch.setattr(database_module.os, "access", lambda *_: False)
    with pytest.raises(StoreError, match="was not closed, and cannot be written"):
        LocalStore.open(tmp_path / "kb")
    store.close()
    before = sorted(path.name for path in (tmp_path / "kb").iterdir())
    with LocalStore.open(tmp_path / "kb") as reader:
        assert reader.search(vectors[4], k=1)[0].id == "d4"
        assert sorted(path.name for path in (tmp_path / "kb").iterdir()) == before


def test_there_is_one_writer_and_the_system_frees_its_lock(tmp_path):
    store = LocalStore.create(tmp_path / "kb", space())
    with pytest.raises(StoreError, match="is being written"):
        LocalStore.open(tmp_path / "kb", writable=True)
    store.close()
    LocalStore.open(tmp_path / "kb", writable=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_searches_with_what_its_parent_opened(tmp_path):
    vectors = vectors_of(30)
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents_of(vectors))
        child = os.fork()
        if not child:
            os._exit(0 if store.search(vectors[4], k=1)[0].id == "d4" else 1)
        assert os.waitpid(child, 0)[1] == 0
        store.put(documents_of(vectors_of(1, seed=3), first=30))
        assert store.count() == 31


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents_of(vectors_of(5)))
        with pytest.raises(VectorSpaceError, match=r"shape \(1, 16\)"):
            store.put(documents_of(vectors_of(2, dim=8)))
        with pytest.raises(DocumentError, match="twice"):
            store.put(documents_of(vectors_of(1)) * 2)
        with pytest.raises(VectorSpaceError, match="16 finite values"):
            store.search(np.zeros(8, dtype=np.float32), k=1)
        with pytest.raises(InvalidOptionError):
            store.search(vectors_of(1)[0], k=0)
        with pytest.raises(InvalidOptionError, match="filter"):
            store.search(vectors_of(1)[0], k=1, where={"a": [[1]]})
        assert store.count() == 5
    with pytest.raises(OutputError, match="new or empty"):
        LocalStore.create(tmp_path / "kb", space())
    for options in ({"precision": "int4"}, {"words": "spaces"}):
        with pytest.raises(InvalidOptionError):
            LocalStore.create(tmp_path / "other", space(), **options)
    assert not (tmp_path / "other").exists()


def test_int8_refuses_vectors_whose_lengths_matter(tmp_path):
    with (
        LocalStore.create(tmp_path / "kb", space("dot")) as store,
        pytest.raises(VectorSpaceError, match="length 1"),
    ):
        store.put(documents_of(3 * vectors_of(2)))


def test_lengths_count_for_dot_and_euclidean_at_bf16(tmp_path):
    vectors = vectors_of(200) * np.random.default_rng(2).uniform(0.5, 3, (200, 1)).astype(np.float32)
    documents = documents_of(vectors)
    for metric in ("dot", "euclidean"):
        with LocalStore.create(tmp_path / metric, space(metric), precision="bf16") as store:
            store.put(documents)
            store.flush()
            for query in vectors_of(10, seed=1):
                hits = {hit.id for hit in store.search(query, k=10)}
                assert len(hits & set(expected(documents, query, 10, metric))) >= 9


def test_no_index_is_said_so(tmp_path):
    for writable in (False, True):
        with pytest.raises(StoreError, match="no index"):
            LocalStore.open(tmp_path / "kb", writable=writable)
    (tmp_path / "documents.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(CorruptFileError, match="damaged"):
        LocalStore.open(tmp_path)


def filled(folder, count=200):
    with LocalStore.create(folder, space()) as store:
        store.put(documents_of(vectors_of(count)))
        store.flush()
    return next(folder.glob("graph-*.usearch"))


def test_a_graph_that_was_cut_is_refused_and_compaction_repairs_it(tmp_path):
    path = filled(tmp_path / "kb")
    path.write_bytes(path.read_bytes()[:-100])
    with LocalStore.open(tmp_path / "kb") as store:
        with pytest.raises(CorruptFileError, match="qingyu index compact"):
            store.search(vectors_of(1)[0], k=1)
        assert "is damaged" in store.damage()[0]
    with LocalStore.open(tmp_path / "kb", writable=True) as store:
        store.compact()
        assert store.damage() == []
        assert store.search(vectors_of(5)[4], k=1)[0].id == "d4"


def test_a_graph_that_is_gone_or_changed_is_found_by_verifying(tmp_path):
    path = filled(tmp_path / "kb")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with LocalStore.open(tmp_path / "kb") as store:
        assert "sha256" in store.damage()[0]
        path.unlink()
        assert "is gone" in store.damage()[0] or "No such file" in store.damage()[0]
        with pytest.raises(CorruptFileError, match="is gone"):
            store.search(vectors_of(1)[0], k=1)


def test_a_full_disk_is_an_error_that_leaves_what_was_stored(tmp_path):
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents_of(vectors_of(50)))
        pages = store._database._one("PRAGMA page_count")[0]
        store._database._one(f"PRAGMA max_page_count = {pages + 4}")
        with pytest.raises(OutputError, match="full"):
            store.put(documents_of(vectors_of(2000, seed=1), first=50))
        assert store.count() == 50
    with LocalStore.open(tmp_path / "kb") as store:
        assert store.damage() == []


def test_a_graph_that_cannot_be_written_is_an_error_that_leaves_the_old_one(tmp_path):
    """Files above 64 KB are refused by the system, as they are by a full disk."""
    filled(tmp_path / "kb")
    program = f"""
import resource, signal, sys
import numpy as np
from qingyu.errors import OutputError
from qingyu.runtime.search.local import LocalStore
sys.path.insert(0, {str(Path(__file__).parent)!r})
with LocalStore.open({str(tmp_path / "kb")!r}, writable=True) as store:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store.search(np.ones({DIM}, np.float32), k=1)
    facts = store.facts["generation"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
    try:
        store.compact()
    except OutputError as error:
        assert "cannot write" in str(error), error
    else:
        raise SystemExit("nothing was refused")
    assert store.facts["generation"] == facts
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "kb").glob("*graph-*"))) == 1
    with LocalStore.open(tmp_path / "kb", writable=True) as store:
        assert store.damage() == []


def test_a_store_may_be_opened_before_any_model(tmp_path, tiny_model):
    """In a process of its own: importing usearch before onnxruntime would end it."""
    filled(tmp_path / "kb")
    program = f"""
import numpy as np
from qingyu import Embedder
from qingyu.runtime.search.local import LocalStore
with LocalStore.open({str(tmp_path / "kb")!r}) as store:
    assert len(store.search(np.ones({DIM}, np.float32), k=3)) == 3
    with Embedder.open({str(tiny_model)!r}) as embedder:
        assert embedder.embed("今天").shape == (1, 32)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# Killed anywhere.

STEPS = 20


def crash_at(monkeypatch, step):
    """Kill this process at the n-th of its durable steps: commits, written graphs, renames and removals."""
    left = [step]

    def counted(owner, name):
        whole = getattr(owner, name)

        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = whole(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        (local_module.Database, "put"),
        (local_module.Database, "remove"),
        (local_module.Database, "set_facts"),
        (local_module.Graph, "save"),
        (graph_module, "sync_folder"),
        (Path, "unlink"),
        (LocalStore, "_publish"),
    ):
        counted(owner, name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1, 2))
def test_killed_anywhere_it_opens_again_with_each_document_once(tmp_path, monkeypatch, step):
    """Twenty points of a build and an update; the child is killed there, then what it did is repeated to the end."""
    vectors, newer = vectors_of(240), vectors_of(60, seed=9)
    documents, updated = documents_of(vectors), documents_of(newer, changed=True)
    with LocalStore.create(tmp_path / "kb", space()) as store:
        store.put(documents[:60])

    def work():
        with LocalStore.open(tmp_path / "kb", writable=True) as store:
            for start in range(60, 240, 60):
                store.put(documents[start : start + 60])
            store.put(updated)
            store.delete([f"d{n}" for n in range(200, 240)])
            store.flush()

    child = os.fork()
    if not child:
        crash_at(monkeypatch, step)
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with LocalStore.open(tmp_path / "kb") as store:
        assert store.damage() == []
        assert store.count() % 20 == 0
        hits = store.search(vectors[199], k=1000)
        assert sorted(hit.id for hit in hits) == sorted(store.ids())
    work()
    with LocalStore.open(tmp_path / "kb") as store:
        assert store.damage() == []
        assert store.count() == store.count_pieces() == 200
        assert store.search(newer[7], k=1)[0].id == "d7"
        assert len(store.search(vectors[199], k=1000)) == 200
    assert len(list((tmp_path / "kb").glob("*graph-*"))) == 1
