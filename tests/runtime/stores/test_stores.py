"""One suite for every store: the one on the device, Milvus Lite, Qdrant's local mode, and an exact one as oracle."""

from __future__ import annotations

import importlib.util
import itertools
import json
import socket
import sys
import threading
import time

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.__main__ import main
from qingyu.errors import (
    ClosedError,
    DocumentError,
    InvalidOptionError,
    MissingExtraError,
    StoreError,
    VectorSpaceError,
)
from qingyu.runtime.search.contract import (
    METRICS,
    Document,
    EmbeddedDocument,
    Hit,
    KeptStore,
    Span,
    VectorSpace,
    VectorStore,
    check_documents,
    check_k,
    check_query,
    matches,
    score,
)
from qingyu.runtime.search.index import SearchIndex, space_of
from qingyu.runtime.search.local import LocalStore
from qingyu.runtime.stores import create_store, is_uri, open_store, store_exists
from qingyu.runtime.stores.pieces import conditions_of, tags_of

DIM = 24
SPACE = VectorSpace("qy1-a", "qy1-b", DIM)


class ExactStore:
    """The contract in the fewest lines: everything in a dictionary, every vector compared."""

    def __init__(self, space):
        self.space = space
        self._kept = {}
        self._closed = False

    def _check(self):
        if self._closed:
            raise ClosedError("closed", expected="open", found="closed", remedy="Open it.")

    def put(self, documents):
        self._check()
        check_documents(documents, self.space)
        self._kept |= {one.document.id: one for one in documents}

    def delete(self, ids):
        self._check()
        return sum(self._kept.pop(name, None) is not None for name in set(ids))

    def digests(self, ids):
        self._check()
        return {name: self._kept[name].document.digest for name in ids if name in self._kept}

    def search(self, vector, *, k, where=None):
        self._check()
        check_k(k)
        query = check_query(vector, self.space)
        hits = []
        for one in self._kept.values():
            if matches(one.document.fields, where):
                for span, near in zip(one.spans, score(self.space.metric, query, one.vectors), strict=True):
                    text = one.document.text[span.start : span.stop]
                    hits.append(
                        Hit(one.document.id, float(near), text, span.start, span.stop, one.document.fields)
                    )
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    def count(self):
        self._check()
        return len(self._kept)

    def ids(self):
        yield from list(self._kept)

    def flush(self):
        pass

    @property
    def facts(self):
        return {}

    def close(self):
        self._closed = True


def on_device(folder, space):
    return LocalStore.create(folder / "kb", space, precision="float32")


def in_milvus(folder, space):
    return create_store(f"milvus+{folder}/milvus.db", space)


def in_qdrant(folder, space):
    return create_store(f"qdrant+{folder}/qdrant", space)


MAKERS = {
    "device": on_device,
    "milvus": in_milvus,
    "qdrant": in_qdrant,
    "exact": lambda _, space: ExactStore(space),
}
NEEDED = {
    "device": ("usearch",),
    "milvus": ("pymilvus", "milvus_lite"),
    "qdrant": ("qdrant_client",),
    "exact": (),
}
REMOTE = ("milvus", "qdrant")


def need(kind):
    for package in NEEDED[kind]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


@pytest.fixture(params=sorted(MAKERS))
def make(request, tmp_path):
    """A function that makes a new store of one kind, for a space."""
    need(request.param)
    made = []

    def maker(space=SPACE):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(MAKERS[request.param](folder, space))
        return made[-1]

    yield maker
    for store in made:
        store.close()


RANDOM = np.random.default_rng(5)
VECTORS = RANDOM.normal(size=(400, DIM)).astype(np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
FIELDS = [
    {"year": 2024, "kind": "faq"},
    {"year": 2024.0, "kind": "手册", "open": True},
    {"year": "2024", "open": False, "tags": ["a", "b"]},
    {"year": None, "open": 1, "note": '引号"与\\'},
    {"kind": "很长" * 200, "size": 1e300, "nested": {"a": [1, None]}},
    {},
]


def embedded(number, pieces=1, *, vectors=UNIT, name=None, text=None):
    """A document with ``pieces`` vectors of the table, each with a stretch of its text."""
    whole = text or f"第{number}篇。" + "内容。" * pieces
    cuts = np.linspace(0, len(whole), pieces + 1).astype(int)
    spans = tuple(Span(int(a), int(b)) for a, b in itertools.pairwise(cuts))
    document = Document(name or f"文档-{number}", whole, FIELDS[number % len(FIELDS)])
    return EmbeddedDocument(document, spans, vectors[number : number + pieces])


def shown(hits):
    return [(hit.id, hit.start, hit.stop, hit.text, dict(hit.fields)) for hit in hits]


@pytest.mark.parametrize("metric", METRICS)
def test_every_store_finds_what_comparing_every_vector_finds(make, metric):
    space = VectorSpace("a", "b", DIM, metric)
    store, exact = make(space), ExactStore(space)
    vectors = UNIT if metric == "cosine" else VECTORS
    documents = [embedded(n, 1 + n % 3, vectors=vectors) for n in range(0, 360, 3)]
    for one in (store, exact):
        one.put(documents)
    for query in RANDOM.normal(size=(12, DIM)).astype(np.float32):
        found, wanted = (one.search(query, k=7) for one in (store, exact))
        assert shown(found) == shown(wanted)
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=2e-4)
    assert len(store.search(VECTORS[0], k=1000)) == sum(len(one.spans) for one in documents)


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"year": 2024},
        {"year": 2024.0},
        {"year": "2024"},
        {"year": [2024, "2024"]},
        {"year": None},
        {"year": [None, "2024"]},
        {"year": []},
        {"open": True},
        {"open": 1},
        {"open": [True, False]},
        {"kind": "faq", "year": 2024},
        {"kind": "很长" * 200},
        {"size": 1e300},
        {"note": '引号"与\\'},
        {"tags": "a"},
        {"nested": None},
        {"absent": None},
        {"absent": "x"},
    ],
    ids=str,
)
def test_filters_mean_the_same_in_every_store(filled, where):
    for kind, store in filled.items():
        found = {hit.id for hit in store.search(VECTORS[1], k=100, where=where)}
        assert found == {hit.id for hit in filled["exact"].search(VECTORS[1], k=100, where=where)}, kind


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Every kind of store that can be had here, with the same documents; read them, never change them."""
    stores = {}
    for kind, maker in MAKERS.items():
        if all(importlib.util.find_spec(package) for package in NEEDED[kind]):
            stores[kind] = maker(tmp_path_factory.mktemp(kind), SPACE)
            stores[kind].put([embedded(n) for n in range(24)])
    assert len(set(stores) - {"exact"}) > 0
    yield stores
    for store in stores.values():
        store.close()


def test_fields_that_pass_are_those_that_matches_says():
    """The tags alone, against the contract's own meaning of a filter."""
    values = [None, True, False, 0, 1, 1.0, 1.5, -0.0, "1", "true", "", "has:x", 10**30, 1e30, [1], {"a": 1}]
    for value, asked in itertools.product(values, values[:-2]):
        for fields in ({"x": value}, {"y": value}):
            for where in ({"x": asked}, {"x": [asked, "zz"]}):
                tags = set(tags_of(fields))
                passes = all(
                    bool(tags & set(one.tags)) or (one.absent is not None and one.absent not in tags)
                    for one in conditions_of(where)
                )
                assert passes == matches(fields, where), (fields, where)


def test_a_document_replaces_the_one_with_its_id_with_all_pieces(make):
    store = make()
    store.put([embedded(0, 3), embedded(5, 2)])
    assert store.count() == 2
    fewer = embedded(10, 1, name="文档-0")
    store.put([fewer])
    assert store.count() == 2
    assert store.digests(["文档-0", "文档-5", "none"]) == {
        "文档-0": fewer.document.digest,
        "文档-5": embedded(5, 2).document.digest,
    }
    hits = store.search(UNIT[0], k=50)
    assert sorted((hit.id, hit.text) for hit in hits) == sorted(
        [("文档-0", fewer.document.text)]
        + [("文档-5", embedded(5, 2).document.text[s.start : s.stop]) for s in embedded(5, 2).spans]
    )
    store.put([fewer])  # the same again
    assert len(store.search(UNIT[0], k=50)) == 3


def test_deleted_documents_are_gone_and_counted_once(make):
    store = make()
    store.put([embedded(n, 2) for n in range(0, 20, 2)])
    assert store.delete(["文档-0", "文档-2", "文档-2", "none"]) == 2
    assert store.delete(["文档-0"]) == 0
    assert store.delete([]) == 0
    assert store.count() == 8
    assert {hit.id for hit in store.search(UNIT[0], k=100)} == {f"文档-{n}" for n in range(4, 20, 2)}
    assert set(store.ids()) == {f"文档-{n}" for n in range(4, 20, 2)}


def test_an_empty_store_finds_nothing(make):
    store = make()
    assert store.search(UNIT[0], k=5) == []
    assert (store.count(), list(store.ids()), dict(store.digests(["a"]))) == (0, [], {})
    store.put([])


def test_vectors_that_do_not_fit_are_refused_and_none_is_stored(make):
    store = make()
    short = EmbeddedDocument(embedded(1).document, embedded(1).spans, UNIT[:1, :5])
    bad = UNIT[:1].copy()
    bad[0, 0] = np.nan
    for wrong in (short, EmbeddedDocument(embedded(1).document, embedded(1).spans, bad)):
        with pytest.raises(VectorSpaceError):
            store.put([embedded(0), wrong])
    assert store.count() == 0
    for vector in (UNIT[0, :5], np.full(DIM, np.inf, np.float32)):
        with pytest.raises(VectorSpaceError, match=f"expected {DIM} finite values"):
            store.search(vector, k=1)
    with pytest.raises(DocumentError, match="occurs twice"):
        store.put([embedded(0), embedded(0)])
    with pytest.raises(InvalidOptionError, match="k"):
        store.search(UNIT[0], k=0)


def test_a_closed_store_says_so(make):
    store = make()
    store.put([embedded(0)])
    store.close()
    store.close()
    for use in (
        store.count,
        lambda: store.search(UNIT[0], k=1),
        lambda: store.put([embedded(1)]),
        lambda: store.delete(["a"]),
        lambda: store.digests(["a"]),
    ):
        with pytest.raises(ClosedError):
            use()


def test_more_documents_than_are_asked_for_at_once_go_in_and_come_out(make, monkeypatch):
    from qingyu.runtime.stores import pieces, qdrant

    for module, name, size in ((pieces, "WRITTEN", 16), (pieces, "ASKED", 32), (qdrant, "PAGE", 9)):
        monkeypatch.setattr(module, name, size)
    store = make()
    store.put([embedded(n, 2, name=f"d{n}") for n in range(100)])
    assert store.count() == 100
    assert len(store.digests([f"d{n}" for n in range(120)])) == 100
    assert set(store.ids()) == {f"d{n}" for n in range(100)}
    assert store.delete([f"d{n}" for n in range(0, 100, 2)]) == 50
    assert store.count() == 50
    assert len(store.search(UNIT[0], k=200)) == 100


def test_every_store_is_what_the_contract_asks_for(make):
    store: VectorStore = make()
    assert isinstance(store, KeptStore)
    assert store.space == SPACE


# Stores by their address.


@pytest.fixture(params=REMOTE)
def uri(request, tmp_path):
    need(request.param)
    return {"milvus": f"milvus+{tmp_path}/m.db", "qdrant": f"qdrant+{tmp_path}/q"}[request.param]


def test_what_was_stored_is_there_when_the_store_is_opened_again(uri):
    assert not store_exists(uri)
    with create_store(uri, SPACE, facts={"model": "模型"}) as store:
        store.put([embedded(n, 2) for n in range(0, 40, 2)])
        wanted = store.search(UNIT[3], k=5)
    assert store_exists(uri)
    with open_store(uri) as store:
        assert store.space == SPACE
        assert store.facts["model"] == "模型"
        assert store.count() == 20
        assert shown(store.search(UNIT[3], k=5)) == shown(wanted)
        assert str(store) == uri + "?collection=qingyu"


def test_collections_of_one_server_are_stores_of_their_own(uri):
    with create_store(uri + "?collection=one", SPACE) as store:
        store.put([embedded(0)])
    with create_store(uri + "?collection=two", VectorSpace("x", "y", 3)) as store:
        assert store.count() == 0
    with open_store(uri + "?collection=one") as store:
        assert store.count() == 1
    with pytest.raises(
        StoreError, match=r"no collection at .*three: expected one of that name, found one, two"
    ):
        open_store(uri + "?collection=three")
    with pytest.raises(StoreError, match=r"cannot make .*: expected no collection of that name, found one"):
        create_store(uri + "?collection=one", SPACE)


def test_a_document_that_was_stored_in_part_is_not_said_to_be_there(uri, monkeypatch):
    """As after a client was killed between two requests; the next build stores it again."""
    from qingyu.runtime.stores import pieces

    monkeypatch.setattr(pieces, "WRITTEN", 2)
    with create_store(uri, SPACE) as store:
        store.put([embedded(0, 5)])
        upsert, calls = store._upsert, []

        def dies(rows):
            calls.append(rows)
            if len(calls) == 2:
                raise KeyboardInterrupt
            upsert(rows)

        monkeypatch.setattr(store, "_upsert", dies)
        changed = embedded(20, 4, name="文档-0")
        for documents in ([changed], [embedded(7, 3)]):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                store.put(documents)
        assert dict(store.digests(["文档-0", "文档-7"])) == {}
        monkeypatch.undo()
        store.put([changed, embedded(7, 3)])
        assert set(store.digests(["文档-0", "文档-7"])) == {"文档-0", "文档-7"}
        assert len(store.search(UNIT[0], k=100)) == 7


def test_what_does_not_fit_into_milvus_is_said_before_anything_is_stored(tmp_path):
    need("milvus")
    with create_store(f"milvus+{tmp_path}/m.db", SPACE) as store:
        for document, message in (
            (embedded(1, text="文" * 30_000), "a piece of at most 65,535 bytes, found 90,000. Cut documents"),
            (embedded(1, name="名" * 200), "an id of at most 512 bytes, found 600"),
        ):
            with pytest.raises(DocumentError, match=message):
                store.put([embedded(0), document])
        assert store.count() == 0


def test_a_collection_of_others_is_not_touched(uri):
    create_store(uri, SPACE).close()
    if uri.startswith("milvus"):
        from pymilvus import MilvusClient

        client = MilvusClient(uri.removeprefix("milvus+"))
        client.create_collection("other", dimension=4)
    else:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=uri.removeprefix("qdrant+"))
        client.create_collection("other", vectors_config=models.VectorParams(size=4, distance="Dot"))
    client.close()
    with pytest.raises(StoreError, match="was not made by qingyu"):
        open_store(uri + "?collection=other")


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_is_not_there_is_a_typed_error_at_once(kind):
    need(kind)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"{kind}.http://127.0.0.1:{port}.collection=qingyu cannot be used"):
        open_store(f"{kind}+http://127.0.0.1:{port}?timeout=2")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_takes_connections_and_says_nothing_is_given_up(kind):
    need(kind)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        taken = []
        thread = threading.Thread(target=lambda: taken.append(silent.accept()), daemon=True)
        thread.start()
        started = time.monotonic()
        with pytest.raises(StoreError, match="cannot be used"):
            open_store(f"{kind}+http://127.0.0.1:{port}?timeout=2")
        assert time.monotonic() - started < 40
        thread.join()
        for connection, _ in taken:
            connection.close()


@pytest.mark.parametrize(
    "uri",
    [
        "milvus+",
        "redis+http://a",
        "milvus+http://a?collection=a-b",
        "qdrant+http://a?timeout=soon",
        "qdrant+http://a?timeout=-1",
        "milvus+http://a?token=secret",
    ],
)
def test_addresses_of_another_form_are_refused(uri):
    with pytest.raises(InvalidOptionError, match="the address of a store"):
        open_store(uri)


def test_the_command_line_knows_addresses_as_the_stores_do():
    from qingyu.cli.common import STORES
    from qingyu.runtime.stores.uri import KINDS

    assert tuple(f"{kind}+" for kind in KINDS) == STORES
    assert not is_uri("kb/milvus+x")


@pytest.mark.parametrize(("kind", "package"), [("milvus", "pymilvus"), ("qdrant", "qdrant_client")])
def test_without_the_extra_the_error_gives_the_command(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "qingyu\[{kind}\]"'):
        open_store(f"{kind}+{tmp_path}/x.db")


# With a model.

TEXTS = {
    "密码": "怎么修改登录密码？在设置里。",
    "天气": "今天天气真好，阳光明媚。",
    "股票": "股票大跌，怎么办？",
}


def test_an_index_over_a_store_answers_as_one_in_a_folder_does(uri, tiny_model, tmp_path):
    need("device")
    more = "外面阳光明媚，人工智能正在改变医疗。"
    documents = [
        Document(name, text + more[: 9 * n], {"n": n}) for n, (name, text) in enumerate(TEXTS.items())
    ]
    with Embedder.open(tiny_model) as embedder:
        answers = []
        for place, more in ((uri, {}), (tmp_path / "kb", {"precision": "float32"})):
            with SearchIndex.create(place, embedder, chunk_tokens=20, **more) as index:
                index.build(documents)
                answers.append(
                    [index.search("怎么修改密码", k=3), index.search("天气", k=3, where={"n": [0, 2]})]
                )
        for found, wanted in zip(*answers, strict=True):
            assert shown(found) == shown(wanted)
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


def test_another_model_or_prompt_is_refused_by_fingerprint(uri, tiny_model, tiny_int8):
    SearchIndex.create(uri, str(tiny_model)).close()
    with pytest.raises(
        VectorSpaceError, match="is of another vector space: expected vectors with fingerprint"
    ):
        SearchIndex.open(uri, str(tiny_int8))
    with pytest.raises(VectorSpaceError, match="expected queries with fingerprint"):
        SearchIndex.open(uri, str(tiny_model), query_prompt="找：")
    with SearchIndex.open(uri, str(tiny_model)) as index:
        assert index.store.space == space_of(index.embedder)


def test_the_commands_take_an_address_where_they_take_a_folder(
    uri, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"id": name, "text": text, "n": 1}, ensure_ascii=False) for name, text in TEXTS.items()
    ]
    (tmp_path / "d.jsonl").write_text("\n".join([*lines, '{"id": "x"}']) + "\n", encoding="utf-8")
    build = ["index", "build", "d.jsonl", uri, "--model", str(tiny_model)]
    assert main([*build, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) | {"seen": 0} == {
        "added": 3,
        "updated": 0,
        "unchanged": 0,
        "deleted": 0,
        "rejected": 1,
        "seen": 0,
    }
    assert json.loads((tmp_path / "rejected.jsonl").read_text("utf-8"))["id"] == "x"
    (tmp_path / "d.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    assert main([*build, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == 1
    assert main(["search", uri, TEXTS["密码"], "-k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] in ("密码", "天气")  # the model's weights are random
    assert main(["index", "info", uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    assert main(["index", "delete", uri, "密码"]) == 0
    for refused in (["index", "verify", uri], ["index", "compact", uri], [*build, "--metric", "dot"]):
        assert main(refused) == 3
    assert main(["index", "build", "d.jsonl", uri + "?collection=b", "--words", "bigrams"]) == 3
    assert "--words: expected an index in a folder" in capsys.readouterr().err
    assert main(["search", uri, "密码", "--mode", "words"]) == 3
