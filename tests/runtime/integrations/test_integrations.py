"""Our models under the interfaces of other libraries, held against those libraries where they are installed."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import sys

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import InvalidOptionError, MissingExtraError
from qingyu.runtime.integrations.sentence_transformers import SentenceEncoder

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", ""]


@pytest.fixture(scope="module")
def embedder(tiny_model):
    """It has the prompt "query", and none for passages."""
    with Embedder.open(tiny_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(embedder):
    return embedder.embed(TEXTS), embedder.embed(TEXTS, prompt="query")


def test_langchain_gets_documents_and_queries_with_their_prompts(embedder, expected, tiny_model):
    base = pytest.importorskip("langchain_core.embeddings").Embeddings
    from qingyu.runtime.integrations.langchain import QingyuEmbeddings

    documents, queries = expected
    model = QingyuEmbeddings(tiny_model)
    assert isinstance(model, base)
    assert np.allclose(model.embed_documents(TEXTS), documents, atol=1e-6)
    assert np.allclose(model.embed_query(TEXTS[0]), queries[0], atol=1e-6)
    assert np.allclose(asyncio.run(model.aembed_documents(TEXTS)), documents, atol=1e-6)
    assert np.allclose(asyncio.run(model.aembed_query(TEXTS[3])), queries[3], atol=1e-6)
    assert model.embed_documents([]) == []
    assert json.dumps(model.embed_query("今天"))  # plain numbers
    both = QingyuEmbeddings(embedder, query_prompt="", passage_prompt="query")
    assert both.embedder is embedder
    assert np.allclose(both.embed_documents(TEXTS), queries, atol=1e-6)
    assert np.allclose(both.embed_query(TEXTS[0]), documents[0], atol=1e-6)


def test_langchain_s_own_vector_store_finds_with_it(embedder):
    stores = pytest.importorskip("langchain_core.vectorstores")
    from qingyu.runtime.integrations.langchain import QingyuEmbeddings

    store = stores.InMemoryVectorStore(QingyuEmbeddings(embedder, query_prompt=""))
    store.add_texts(TEXTS[:4])
    assert store.similarity_search(TEXTS[2], k=1)[0].page_content == TEXTS[2]


def test_llama_index_gets_texts_and_queries_with_their_prompts(embedder, expected, tiny_model):
    base = pytest.importorskip("llama_index.core.base.embeddings.base").BaseEmbedding
    from qingyu.runtime.integrations.llama_index import QingyuEmbedding

    documents, queries = expected
    model = QingyuEmbedding(tiny_model)
    assert isinstance(model, base)
    assert model.model_name == embedder.spec.name
    assert np.allclose(model.get_text_embedding_batch(TEXTS), documents, atol=1e-6)
    assert np.allclose(model.get_text_embedding(TEXTS[1]), documents[1], atol=1e-6)
    assert np.allclose(model.get_query_embedding(TEXTS[0]), queries[0], atol=1e-6)

    async def together():
        return (
            await model.aget_text_embedding_batch(TEXTS),
            await model.aget_text_embedding(TEXTS[1]),
            await model.aget_query_embedding(TEXTS[0]),
        )

    batch, text, query = asyncio.run(together())
    assert np.allclose(batch, documents, atol=1e-6)
    assert np.allclose(text, documents[1], atol=1e-6)
    assert np.allclose(query, queries[0], atol=1e-6)
    assert model.similarity(query, query) == pytest.approx(1)
    assert model.to_dict()["class_name"] == "QingyuEmbedding"


@pytest.mark.parametrize(
    ("module", "package"), [("langchain", "langchain_core"), ("llama_index", "llama_index")]
)
def test_without_its_library_an_integration_gives_the_command(module, package, monkeypatch):
    import importlib

    name = f"qingyu.runtime.integrations.{module}"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    extra = module.replace("_", "-")
    with pytest.raises(MissingExtraError, match=rf'pip install "qingyu\[{extra}\]"'):
        importlib.import_module(name)


def test_encode_gives_what_sentence_transformers_gives(tiny_checkpoint, embedder):
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(tiny_checkpoint), device="cpu", local_files_only=True
    )
    ours = SentenceEncoder(embedder)
    cases = [
        {},
        {"prompt_name": "query"},
        {"prompt": "说："},
        {"normalize_embeddings": True, "batch_size": 2},
        {"convert_to_numpy": False},
        {"convert_to_tensor": True},
        {"truncate_dim": 8, "normalize_embeddings": True},
    ]
    for options in cases:
        for sentences in (TEXTS, TEXTS[0]):
            found = ours.encode(sentences, show_progress_bar=False, **options)
            wanted = reference.encode(sentences, show_progress_bar=False, **options)
            if options.get("convert_to_numpy", True):  # as tensors, theirs come in a list
                assert type(found) is type(wanted)
            assert np.shape(found) == tuple(np.shape(wanted))
            assert np.allclose(np.stack(list(found)), np.stack(list(wanted)), atol=1e-5), options
    for precision in ("ubinary", "binary"):
        found, wanted = (one.encode(TEXTS, precision=precision) for one in (ours, reference))
        assert found.dtype == wanted.dtype
        assert (found == wanted).all()
    assert np.allclose(ours.encode_query(TEXTS), reference.encode_query(TEXTS), atol=1e-5)
    assert np.allclose(ours.encode_document(TEXTS), reference.encode_document(TEXTS), atol=1e-5)
    a, b = ours.encode(TEXTS[:3]), ours.encode(TEXTS[1:4])
    assert np.allclose(ours.similarity(a, b), reference.similarity(a, b), atol=1e-5)
    assert np.allclose(ours.similarity_pairwise(a, b), reference.similarity_pairwise(a, b), atol=1e-5)
    assert ours.max_seq_length == reference.max_seq_length
    assert ours.get_sentence_embedding_dimension() == reference.get_embedding_dimension()
    assert ours.default_prompt_name == reference.default_prompt_name


def test_encode_takes_the_arguments_of_sentence_transformers_in_their_order(tiny_model):
    """Those of both are in the same order, as some callers pass them by place."""
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer
    theirs = list(inspect.signature(reference.encode).parameters)
    ours = list(inspect.signature(SentenceEncoder.encode).parameters)
    assert [name for name in theirs if name in ours][1:] == ours[2:]


def test_encode_refuses_what_it_cannot_give(embedder):
    encoder = SentenceEncoder(embedder)
    with pytest.raises(InvalidOptionError, match="prompt_name: expected one of the model's prompts: 'query'"):
        encoder.encode(TEXTS, prompt_name="passage")
    with pytest.raises(InvalidOptionError, match="output_value"):
        encoder.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(InvalidOptionError, match="precision"):
        encoder.encode(TEXTS, precision="int8")


def test_mteb_runs_on_a_model_and_scores_as_we_do(embedder, tmp_path):
    pytest.importorskip("mteb")
    from scipy.stats import spearmanr

    from qingyu.bench.mteb_tasks import retrieval_task, run_tasks, sts_task
    from qingyu.runtime.integrations.mteb import MtebEncoder

    pairs = list(itertools.combinations(TEXTS[:4], 2))
    labels = [2, 0, 5, 3, 1, 4]
    lines = [f"{a}\t{b}\t{label}" for (a, b), label in zip(pairs, labels, strict=True)]
    (tmp_path / "pairs.tsv").write_text(
        "\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n", encoding="utf-8"
    )
    for name, texts in (("queries", TEXTS[:4]), ("corpus", TEXTS[:4])):
        rows = [json.dumps({"id": n, "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    qrels = [f"{n}\t{(n + 1) % 4}\t1" for n in range(4)]
    (tmp_path / "qrels.tsv").write_text("\n".join(["query_id\tdoc_id\trel", *qrels]) + "\n", encoding="utf-8")

    tasks = [sts_task("pairs", tmp_path / "pairs.tsv"), retrieval_task("own", tmp_path)]
    model = MtebEncoder(embedder)
    scores = run_tasks(tasks, model)
    vectors, queries = embedder.embed(TEXTS[:4]), embedder.embed(TEXTS[:4], prompt="query")
    cosines = (vectors @ vectors.T)[np.triu_indices(4, 1)]
    assert scores["pairs"] == pytest.approx(spearmanr(labels, cosines).statistic, abs=1e-4)
    ranks = [list(np.argsort(-row)).index((n + 1) % 4) + 1 for n, row in enumerate(queries @ vectors.T)]
    assert scores["own"] == pytest.approx(np.mean([1 / np.log2(1 + rank) for rank in ranks]), abs=1e-4)
    meta = model.mteb_model_meta
    assert meta.name == f"qingyu/{embedder.spec.name}"
    assert meta.revision.startswith("fp32-")
