"""A model and a store together: cutting, prompts, what is new, fusing, reranking, and who may open what."""

from __future__ import annotations

import itertools
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from qingyu import Embedder, Reranker
from qingyu.errors import (
    DocumentError,
    InvalidOptionError,
    ModelNotFoundError,
    OutputError,
    StoreError,
    VectorSpaceError,
)
from qingyu.runtime.search import index as module
from qingyu.runtime.search.contract import Document, Hit
from qingyu.runtime.search.index import Prompts, SearchIndex, fused, space_of
from qingyu.runtime.search.local import LocalStore

# Not importorskip: usearch must not be imported before onnxruntime.
pytestmark = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")

TEXTS = [
    "怎么修改登录密码",
    "忘记密码了怎么办",
    "今天天气真好，外面阳光明媚",
    "股票大跌",
    "我爱吃中国的饭",
    "老师和学生读书",
]
LONG = "今天天气真好。外面阳光明媚！股票大跌了吗？我们去城市看电影；你说呢。" * 8


def documents(texts=TEXTS, **fields):
    return [Document(f"d{n}", text, {"n": n, **fields}) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def embedder(tiny_model):
    with Embedder.open(tiny_model) as opened:
        yield opened


class Counting:
    """An embedder that counts what it embeds."""

    def __init__(self, embedder):
        self._embedder = embedder
        self.texts = []

    def __getattr__(self, name):
        return getattr(self._embedder, name)

    def embed_stream(self, texts, **options):
        for block in self._embedder.embed_stream(texts, **options):
            self.texts += block.texts
            yield block


def open_counting(folder, embedder):
    """An index to write whose embedder counts."""
    index = SearchIndex.open(folder, embedder, writable=True)
    index.embedder = Counting(embedder)
    return index


def test_a_query_is_answered_as_comparing_all_vectors_would(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder, precision="float32") as index:
        assert vars(index.build(documents())) == {
            "added": 6,
            "updated": 0,
            "unchanged": 0,
            "deleted": 0,
            "rejected": 0,
        }
        vectors = embedder.embed(TEXTS)  # the tiny model has a prompt for queries and none for passages
        for query in ("密码忘记了", "天气"):
            scores = vectors @ embedder.embed(query, prompt="query")[0]
            hits = index.search(query, k=3)
            assert [hit.id for hit in hits] == [f"d{n}" for n in np.argsort(-scores)[:3]]
            assert [hit.score for hit in hits] == pytest.approx(np.sort(-scores)[:3] * -1, abs=1e-5)
            assert [hit.id for hit in index.search(embedder.embed(query, prompt="query")[0], k=3)] == [
                h.id for h in hits
            ]
            assert hits[0].text == TEXTS[int(hits[0].id[1:])]
        assert [hit.id for hit in index.search("密码", k=3, where={"n": [1, 3]})] in (
            ["d1", "d3"],
            ["d3", "d1"],
        )


def test_only_new_and_changed_documents_are_embedded(tmp_path, embedder):
    SearchIndex.create(tmp_path / "kb", embedder).close()
    with open_counting(tmp_path / "kb", embedder) as index:
        index.build(documents())
        assert len(index.embedder.texts) == 6
        changed = [*documents()[1:], Document("new", "新的城市"), Document("d2", "今天下雨", {"n": 2})]
        del changed[1]
        outcome = index.build(changed)
        assert vars(outcome) == {"added": 1, "updated": 1, "unchanged": 4, "deleted": 1, "rejected": 0}
        assert index.embedder.texts[6:] == ["新的城市", "今天下雨"]
        assert sorted(index.store.ids()) == ["d1", "d2", "d3", "d4", "d5", "new"]
        assert index.store.get("d2").text == "今天下雨"


def test_a_build_that_was_stopped_goes_on_and_embeds_nothing_twice(tmp_path, embedder):
    texts = [f"{TEXTS[n % 6]}{n}" for n in range(1500)]

    def stopped():
        yield from documents(texts)[:1200]
        raise KeyboardInterrupt

    SearchIndex.create(tmp_path / "kb", embedder).close()
    with open_counting(tmp_path / "kb", embedder) as index:
        with pytest.raises(KeyboardInterrupt):
            index.build(stopped())
        done = index.store.count()
        assert 0 < done < 1200
    with open_counting(tmp_path / "kb", embedder) as index:
        outcome = index.build(documents(texts))
        assert (outcome.unchanged, outcome.added, len(index.embedder.texts)) == (
            done,
            1500 - done,
            1500 - done,
        )
        assert index.store.damage() == []
        assert index.store.count() == index.store.count_pieces() == 1500


class Keeping:
    """A store that keeps blocks, and refuses the empty one."""

    def __init__(self):
        self.blocks = []

    def put(self, block):
        if not block:
            raise OutputError("disk full", expected="room", found="none", remedy="Free space.")
        self.blocks.append(block)


def test_all_that_was_embedded_before_an_error_is_stored_in_order():
    def embedded():
        yield from ([1], [2], [3])
        raise DocumentError("bad", expected="a text", found="none", remedy="Leave it out.")

    store = Keeping()
    with pytest.raises(DocumentError, match="bad"):
        list(module._put_behind(store, embedded()))
    assert store.blocks == [[1], [2], [3]]


def test_a_block_that_cannot_be_stored_is_an_error_and_ends_the_stream():
    given = []

    def embedded():
        for block in ([1], [], [3], [4], [5]):
            given.append(block)
            yield block

    store = Keeping()
    with pytest.raises(OutputError, match="disk full"):
        list(module._put_behind(store, embedded()))
    assert store.blocks == [[1]]
    assert given == [[1], [], [3]]


def test_adding_refuses_what_is_there_and_updating_replaces_it(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder) as index:
        index.add(documents())
        with pytest.raises(DocumentError, match=r"is there already.*'d0'"):
            index.add(documents()[:1])
        bad = []
        outcome = index.add([*documents()[:2], Document("x", "中国")], rejected=bad.append)
        assert (outcome.added, outcome.rejected, [row.id for row in bad]) == (1, 2, ["d0", "d1"])
        outcome = index.update([*documents(), Document("x", "北京"), Document("y", "上海")])
        assert (outcome.unchanged, outcome.updated, outcome.added) == (6, 1, 1)
        assert index.delete(["x", "absent"]) == 1
        assert index.store.count() == 7


def test_bad_documents_are_rejected_and_the_rest_is_stored(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder) as index:
        index.build(documents())
        rows = [*documents()[:3], Document("d1", "又一个"), Document("d3", "长" * 1_000_001, line=9)]
        bad = []
        outcome = index.build(rows, rejected=bad.append)
        assert vars(outcome) == {"added": 0, "updated": 0, "unchanged": 3, "deleted": 2, "rejected": 2}
        assert [(row.id, row.line, row.error.problem) for row in bad] == [
            ("d1", None, "an id occurs twice"),
            ("d3", 9, "a document is too long"),
        ]
        assert sorted(index.store.ids()) == ["d0", "d1", "d2", "d3"]  # d3 keeps what it had
        with pytest.raises(DocumentError, match="occurs twice"):
            index.build(rows)


def test_long_documents_are_cut_at_ends_of_sentences_with_their_spans(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder, chunk_tokens=24, overlap=8) as index:
        index.build([Document("long", LONG), Document("short", "今天天气真好。")])
        hits = sorted(
            (hit for hit in index.search("电影", k=100, pieces=True) if hit.id == "long"),
            key=lambda h: h.start,
        )
        assert len(hits) > 5
        assert all(hit.text == LONG[hit.start : hit.stop] and hit.text[-1] in "。！？；" for hit in hits)
        assert hits[0].start == 0
        assert hits[-1].stop == len(LONG)
        assert all(a.start < b.start <= a.stop for a, b in itertools.pairwise(hits))
        assert any(b.start < a.stop for a, b in itertools.pairwise(hits))
        assert all(len(embedder.tokenize(hit.text).ids) <= 24 + 2 for hit in hits)
        assert [hit.id for hit in index.search("电影", k=5)] in (["long", "short"], ["short", "long"])


def test_an_index_is_opened_with_its_own_model_and_refuses_any_other(
    tmp_path, tiny_model, tiny_int8, embedder
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with SearchIndex.create(tmp_path / "kb", model, chunk_tokens=20) as index:
        index.build(documents())
        before = index.search("密码")
    with SearchIndex.open(tmp_path / "kb") as index:
        assert index.search("密码") == before
        assert index.facts["model"] == str(model.resolve())
    for other, options in (
        (tiny_int8, {}),
        (embedder, {"query_prompt": "问："}),
        (embedder, {"passage_prompt": "query"}),
        ("qingyu-mini-zh", {}),
    ):
        with pytest.raises(VectorSpaceError, match="another vector space"):
            SearchIndex.open(tmp_path / "kb", other, **options)
    with pytest.raises(VectorSpaceError), Embedder.open(tiny_model, unicode_form="NFKC") as folding:
        SearchIndex.open(tmp_path / "kb", folding)
    model.rename(tmp_path / "moved")
    with pytest.raises(ModelNotFoundError, match="--model FOLDER"):
        SearchIndex.open(tmp_path / "kb")
    with SearchIndex.open(tmp_path / "kb", tmp_path / "moved") as index:
        assert index.search("密码") == before


def test_the_bundled_model_is_remembered_by_its_name(tmp_path):
    SearchIndex.create(tmp_path / "kb").close()
    with LocalStore.open(tmp_path / "kb") as store:
        assert store.facts["model"] == "qingyu-mini-zh"


def test_prompts_are_the_models_own_unless_given(embedder):
    assert Prompts.of(embedder.spec) == ("查询：", "")
    assert Prompts.of(embedder.spec, query="问：", passage="query") == ("问：", "查询：")
    own = space_of(embedder)
    assert own.query != own.fingerprint == space_of(embedder, prompts=Prompts("x", "")).fingerprint


def test_words_and_meanings_are_fused_by_reciprocal_rank(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder) as index:
        index.build(documents())
        by_words = index.search("密码", k=6, mode="words")
        assert {hit.id for hit in by_words} == {"d0", "d1"}
        by_meaning = index.search("密码", k=6)
        ranks = {name: 1 / (61 + n) for n, name in enumerate(hit.id for hit in by_meaning)}
        for n, hit in enumerate(by_words):
            ranks[hit.id] += 1 / (61 + n)
        both = index.search("密码", k=6, mode="hybrid")
        assert {hit.id: hit.score for hit in both} == pytest.approx(ranks)
        assert [hit.score for hit in both] == sorted(ranks.values(), reverse=True)
        assert index.search("？！", k=3, mode="words") == []
        assert len(index.search("？！", k=3, mode="hybrid")) == 3


def test_fusing_keeps_pieces_of_one_document_apart():
    a, b, c = (Hit("d", 1.0, "", start, start + 1) for start in range(3))
    assert [(hit.start, hit.score) for hit in fused([[a, b], [b, c]])] == [
        (1, pytest.approx(1 / 62 + 1 / 61)),
        (0, pytest.approx(1 / 61)),
        (2, pytest.approx(1 / 62)),
    ]


def test_a_reranker_decides_the_order(tmp_path, embedder, head_model):
    with (
        Reranker.open(head_model("reranking")) as reranker,
        SearchIndex.create(tmp_path / "kb", embedder) as index,
    ):
        index.build(documents())
        hits = index.search("密码", k=3, reranker=reranker)
        ranked = reranker.rank("密码", TEXTS)
        assert [hit.id for hit in hits] == [f"d{one.index}" for one in ranked[:3]]
        assert [hit.score for hit in hits] == pytest.approx([one.score for one in ranked[:3]], abs=1e-4)


def test_what_cannot_be_asked_is_refused(tmp_path, embedder):
    with SearchIndex.create(tmp_path / "kb", embedder) as index:
        assert index.search("密码") == []
        for options in ({"k": 0}, {"mode": "both"}):
            with pytest.raises(InvalidOptionError):
                index.search("密码", **options)
        with pytest.raises(InvalidOptionError, match="query that is a vector"):
            index.search(np.zeros(32, dtype=np.float32), mode="hybrid")
    for options in (
        {"chunk_tokens": 1000},
        {"chunk_tokens": 10, "overlap": 9},
        {"precision": "int2"},
        {"metric": "l1"},
    ):
        with pytest.raises(InvalidOptionError):
            SearchIndex.create(tmp_path / "other", embedder, **options)
    with pytest.raises(StoreError, match="no index"):
        SearchIndex.open(tmp_path / "absent", embedder)


def test_blank_stretches_of_a_document_are_no_pieces_of_it(tmp_path, embedder):
    text = "今天天气真好。" + "\n" * 500 + "股票大跌。"
    with SearchIndex.create(tmp_path / "kb", embedder, chunk_tokens=8) as index:
        index.build([Document("a", text)])
        assert all(hit.text.strip() for hit in index.search("天气", k=100, pieces=True))


def test_other_stores_can_take_the_place_of_the_folder(embedder):
    """The contract is enough: a store of a few lines that compares with everything."""

    class Memory:
        def __init__(self, space):
            self.space, self.documents = space, {}

        def put(self, documents):
            self.documents |= {one.document.id: one for one in documents}

        def delete(self, ids):
            return sum(self.documents.pop(name, None) is not None for name in ids)

        def digests(self, ids):
            return {name: self.documents[name].document.digest for name in ids if name in self.documents}

        def search(self, vector, *, k, where=None):
            hits = [
                Hit(
                    name, float(one.vectors[n] @ vector), one.document.text[s.start : s.stop], s.start, s.stop
                )
                for name, one in self.documents.items()
                for n, s in enumerate(one.spans)
            ]
            return sorted(hits, key=lambda hit: -hit.score)[:k]

        def count(self):
            return len(self.documents)

        def close(self):
            pass

    index = SearchIndex(Memory(space_of(embedder)), embedder)
    index.add(documents())
    assert len(index.search("密码", k=3)) == 3
    with pytest.raises(InvalidOptionError, match="in a folder"):
        index.build(documents())
    with pytest.raises(InvalidOptionError, match="search them by words"):
        index.search("密码", mode="words")
    with pytest.raises(VectorSpaceError):
        SearchIndex(Memory(space_of(embedder, prompts=Prompts("x", "y"))), embedder)


def test_a_text_that_needs_no_cutting_and_one_that_does_have_their_spans(embedder):
    assert embedder.spans("今天") == [(0, 2)]
    assert embedder.spans("") == [(0, 0)]
    spans = embedder.spans(LONG, most=24, overlap=8)
    assert all(LONG[stop - 1] in "。！？；" for _, stop in spans)
    with pytest.raises(InvalidOptionError, match="pieces of a text"):
        embedder.spans("今天", most=63)
    assert json.dumps(spans) == json.dumps(embedder.spans(LONG, most=24, overlap=8))
    assert module.MODES == ("vector", "words", "hybrid")
