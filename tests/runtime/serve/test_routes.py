"""Every route gives what the models give in Python, in the form of the API that it is from."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest

from qingyu import Classifier, Embedder, FillMask, QuestionAnswerer, Reranker, TokenClassifier
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.spec import read_spec

TEXTS = ["今天天气真好", "股票大跌", "怎么修改登录密码"]


@pytest.fixture(scope="module")
def expected(tiny_model):
    with Embedder.open(tiny_model) as embedder:
        yield embedder


def close(found, wanted):
    np.testing.assert_allclose(np.array(found, dtype=np.float32), wanted, atol=1e-6)


def test_openai_embeddings_as_numbers_and_as_base64(server, expected, tiny_model):
    vectors = expected.embed(TEXTS)
    for encoding in ("float", "base64"):
        answer = server.post("/v1/embeddings", {"input": TEXTS, "model": "tiny", "encoding_format": encoding})
        assert answer.status == 200
        found = answer.json
        rows = [one["embedding"] for one in found["data"]]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
        close(rows, vectors)
        assert [one["index"] for one in found["data"]] == [0, 1, 2]
        assert found["model"] == "tiny"
        tokens = sum(len(expected.tokenize(text).ids) for text in TEXTS)
        assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert found["fingerprint"] == answer.headers["x-qingyu-fingerprint"]
        assert found["fingerprint"] == fingerprint(read_spec(tiny_model))


def test_the_official_openai_client_works(server, expected):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.address + "/v1", api_key="unused", max_retries=0) as client:
        found = client.embeddings.create(model="tiny", input=TEXTS)  # base64 underneath
        close([one.embedding for one in found.data], expected.embed(TEXTS))
        assert found.usage.prompt_tokens > 0
        short = client.embeddings.create(model="tiny", input="今天", dimensions=8, encoding_format="float")
        close([short.data[0].embedding], expected.embed("今天", dim=8))
        with_prompt = client.embeddings.create(model="tiny", input="今天", extra_body={"prompt": "query"})
        close([with_prompt.data[0].embedding], expected.embed("今天", prompt="query"))
        assert [one.id for one in client.models.list()] == [
            "tiny",
            "words",
            "mood",
            "names",
            "answers",
            "sorter",
        ]
        assert client.models.retrieve("tiny").owned_by == "qingyu"
        with pytest.raises(openai.NotFoundError, match="expected one of tiny, words"):
            client.embeddings.create(model="text-embedding-3-small", input="今天")
        with pytest.raises(openai.BadRequestError, match="token ids are not taken"):
            client.embeddings.create(model="tiny", input=[1, 2, 3])


def test_embed(server, expected):
    answer = server.post("/embed", {"inputs": TEXTS})
    close(answer.json, expected.embed(TEXTS))
    close(
        server.post("/embed", {"inputs": TEXTS[0], "normalize": False}).json,
        expected.embed(TEXTS[0], normalize=False),
    )
    close(
        server.post("/embed", {"inputs": TEXTS[0], "prompt_name": "query", "dimensions": 4}).json,
        expected.embed(TEXTS[0], prompt="query", dim=4),
    )
    assert float(answer.headers["x-qingyu-run-ms"]) > 0
    assert "x-qingyu-truncated" not in answer.headers


def test_numbers_read_back_to_the_same_float32(server, expected):
    found = server.post("/embed", {"inputs": ["今天天气真好"]}).json[0]
    again = server.post("/v1/embeddings", {"input": "今天天气真好", "encoding_format": "base64"}).json
    wanted = np.frombuffer(base64.b64decode(again["data"][0]["embedding"]), dtype="<f4")
    assert np.array(found, dtype=np.float32).tobytes() == wanted.tobytes()


def test_a_text_that_is_too_long_is_cut_and_told_or_refused(server):
    long = "天气" * 200
    cut = server.post("/embed", {"inputs": [long, "短"], "truncate": True})
    assert (cut.status, cut.headers["x-qingyu-truncated"]) == (200, "1")
    assert server.post("/v1/embeddings", {"input": long}).status == 200
    for path, body in (
        ("/embed", {"inputs": long}),
        ("/embed_all", {"inputs": long}),
        ("/v1/embeddings", {"input": long, "truncate": False}),
        ("/predict", {"inputs": long, "model": "mood"}),
        ("/rerank", {"query": "天", "texts": [long]}),
    ):
        assert server.post(path, body).status == 413, path
    assert server.post("/rerank", {"query": "天", "texts": [long], "truncate": True}).status == 200


def test_embed_all_gives_a_vector_for_each_token(server, expected):
    found = server.post("/embed_all", {"inputs": TEXTS}).json
    for text, rows in zip(TEXTS, found, strict=True):
        assert np.array(rows).shape == (len(expected.tokenize(text).ids), 32)
    # The tiny model pools by the mean.
    pooled = np.array(found[0]).mean(axis=0)
    close(pooled / np.linalg.norm(pooled), expected.embed(TEXTS[0])[0])


def test_rerank(server, all_models):
    with Reranker.open(all_models["sorter"]) as model:
        ranked = model.rank("密码", TEXTS)
    found = server.post("/rerank", {"query": "密码", "texts": TEXTS, "return_text": True}).json
    assert [one["index"] for one in found] == [one.index for one in ranked]
    assert [one["text"] for one in found] == [one.text for one in ranked]
    np.testing.assert_allclose([one["score"] for one in found], [one.score for one in ranked], atol=1e-6)
    raw = server.post("/rerank", {"query": "密码", "texts": TEXTS, "raw_scores": True}).json
    for one, other in zip(raw, found, strict=True):
        assert 1 / (1 + math.exp(-one["score"])) == pytest.approx(other["score"], abs=1e-6)
        assert "text" not in one


def test_predict(server, all_models):
    with Classifier.open(all_models["mood"]) as model:
        single, pair = model.classify([TEXTS[0], (TEXTS[0], TEXTS[1])])

    def same(found, wanted):
        assert [one["label"] for one in found] == [one.label for one in wanted.labels]
        np.testing.assert_allclose(
            [one["score"] for one in found], [one.score for one in wanted.labels], atol=1e-6
        )

    same(server.post("/predict", {"inputs": TEXTS[0], "model": "mood"}).json, single)
    same(server.post("/predict", {"inputs": [TEXTS[0]], "model": "mood"}).json, single)
    same(server.post("/predict", {"inputs": TEXTS[:2], "model": "mood"}).json, pair)
    several = server.post("/predict", {"inputs": [[TEXTS[0]], TEXTS[:2]], "model": "mood"}).json
    same(several[0], single)
    same(several[1], pair)


def test_fill_mask(server, all_models):
    with FillMask.open(all_models["words"]) as model:
        wanted = model.fill("今天[MASK]气真好", top_k=3)[0]
        chosen = model.fill("今天[MASK]气真好", candidates=["天", "人", "天气"])[0]
    found = server.post("/fill-mask", {"inputs": "今天[MASK]气真好", "top_k": 3}).json
    assert [one["id"] for one in found[0]["masks"][0]] == [one.id for one in wanted.masks[0]]
    assert found[0]["masks"][0][0]["text"] == wanted.masks[0][0].text
    found = server.post(
        "/fill-mask", {"inputs": ["今天[MASK]气真好"], "candidates": ["天", "人", "天气"]}
    ).json
    assert [one["token"] for one in found[0]["masks"][0]] == [one.token for one in chosen.masks[0]]
    assert server.post("/fill-mask", {"inputs": "今天"}).json["error_type"] == "invalid_text"


def test_tag_and_answer(server, all_models):
    with TokenClassifier.open(all_models["names"]) as model:
        wanted = model.tag(TEXTS[0])[0]
    found = server.post("/tag", {"inputs": TEXTS[0]}).json
    assert [(e["label"], e["start"], e["end"]) for e in found[0]["entities"]] == [
        (e.label, e.start, e.end) for e in wanted.entities
    ]
    with QuestionAnswerer.open(all_models["answers"]) as model:
        answers = model.answer("天气", "今天天气真好", top_k=2)
    found = server.post("/answer", {"question": "天气", "context": "今天天气真好", "top_k": 2}).json
    assert [(one["start"], one["end"]) for one in found] == [(one.start, one.end) for one in answers]


def test_tokenize(server, expected):
    found = server.post("/tokenize", {"inputs": TEXTS[0]}).json[0]
    wanted = expected.tokenize(TEXTS[0])
    assert [one["id"] for one in found] == list(wanted.ids)
    assert [(one["start"], one["stop"]) for one in found] == list(wanted.offsets)
    bare = server.post("/tokenize", {"inputs": [TEXTS[0]], "add_special_tokens": False}).json[0]
    assert bare == found[1:-1]


def test_info_models_and_health(server):
    info = server.get("/info").json
    assert info["model_id"] == "tiny"
    assert info["max_client_batch_size"] == 16
    assert [one["task"] for one in info["models"]] == [
        "embedding",
        "fill-mask",
        "classification",
        "tagging",
        "question-answering",
        "reranking",
    ]
    assert info["models"][1]["mask_token"] == "[MASK]"
    for path in ("/live", "/ready", "/health"):
        assert server.get(path).status == 200
    assert server.ask("HEAD", "/health").body == b""
    assert server.get("/v1/models/none").status == 404


def test_metrics_count_what_was_done(server):
    from prometheus_client.parser import text_string_to_metric_families

    def value(name, **labels):
        families = text_string_to_metric_families(server.get("/metrics").body.decode())
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    before = value("qingyu_texts_total", model="tiny"), value("qingyu_tokens_total", model="tiny")
    server.post("/embed", {"inputs": TEXTS})
    assert value("qingyu_texts_total", model="tiny") == before[0] + 3
    assert value("qingyu_tokens_total", model="tiny") > before[1]
    assert value("qingyu_requests_total", route="/embed", status="200") >= 1
    assert value("qingyu_model", model="tiny", precision="fp32") == 1
    assert value("qingyu_queued_tokens") == 0
    assert value("qingyu_resident_bytes") > 1e7
    server.get("/no/such/path/" + "x" * 50)
    assert value("qingyu_requests_total", route="(none)") >= 1


def test_a_model_of_another_task_is_refused(server):
    answer = server.post("/embed", {"inputs": "天", "model": "words"})
    assert answer.status == 422
    assert "expected one for embedding, found one for fill-mask" in answer.json["error"]


def test_the_log_has_a_line_for_each_request_and_no_text(server):
    server.post("/embed", {"inputs": ["秘密的句子", "secret sentence"]}, X_Request_Id="line-1")
    line = server.event("request", id="line-1")
    assert (line["route"], line["status"], line["texts"], line["model"]) == ("/embed", 200, 2, "tiny")
    server.post("/embed", {"inputs": [1, "秘密"], "秘密": "秘密"}, X_Request_Id="line-2")
    server.post("/no/%E7%A7%98%E5%AF%86", {"inputs": "secret"})
    server.event("request", id="line-2", status=422)
    assert "秘密" not in str(server.log)
    assert "secret" not in str(server.log)


def test_a_request_id_comes_back_only_if_it_is_plain(server):
    assert server.get("/live", X_Request_Id="a-1").headers["x-request-id"] == "a-1"
    for strange in ("a b", "x" * 200, "é"):
        assert len(server.get("/live", X_Request_Id=strange).headers["x-request-id"]) == 16
