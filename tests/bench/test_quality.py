"""The quality bench on sets small enough to know the answers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qingyu.bench.quality import Contender, character_tfidf, main, measure, token_mean
from qingyu.models.adapt import prune_vocabulary


@pytest.fixture
def data(tmp_path):
    """Three sets in which a text's letters say everything."""
    folder = tmp_path / "data"
    (folder / "sts-b-zh").mkdir(parents=True)
    pairs = [
        ("甲乙丙", "甲乙丙", 5),
        ("丁戊己", "丁戊庚", 3),
        ("辛壬癸", "子丑寅", 0),
        ("甲丁辛", "甲丁辛", 5),
    ]
    lines = ["sentence1\tsentence2\tlabel", *("\t".join(map(str, pair)) for pair in pairs)]
    (folder / "sts-b-zh" / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("cmrc2018", "csl"):
        (folder / name).mkdir()
        texts = ["甲乙丙丁", "戊己庚辛", "壬癸子丑"]
        rows = [json.dumps({"id": n, "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
        for part in ("queries.jsonl", "corpus.jsonl"):
            (folder / name / part).write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / name / "qrels.tsv").write_text("query_id\tdoc_id\trel\n0\t0\t1\n1\t1\t1\n2\t2\t1\n")
    return folder


def letters(texts, role):
    table = np.zeros((len(texts), 0x5000), dtype=np.float32)
    for row, text in enumerate(texts):
        for letter in text:
            table[row, ord(letter) - 0x4E00] += 1
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def test_a_perfect_contender_has_perfect_figures(data):
    found = measure(Contender("letters", "", letters), data)
    assert found["sts-b-dev"] == 100.0
    assert found["cmrc2018-recall@1"] == found["csl-recall@10"] == 100.0
    assert found["related"]["median"] == 1.0
    assert found["unrelated"]["median"] < 0.5


def test_a_contender_that_sees_nothing_has_bad_ones(data):
    def same(texts, role):
        return np.ones((len(texts), 4), dtype=np.float32) / 2

    found = measure(Contender("same", "", same), data)
    assert found["sts-b-dev"] == 0.0
    assert found["overlap"] == 100.0


def test_the_baselines_give_unit_vectors(data, tiny_checkpoint, tmp_path):
    pytest.importorskip("sklearn")
    prune_vocabulary(
        tiny_checkpoint, tmp_path / "cut", ["今天天气真好"], size=120
    )  # which writes a tokenizer.json
    for contender, texts in (
        (character_tfidf(data), ["甲乙丙丁", "戊己"]),
        (token_mean(tmp_path / "cut"), ["今天", "天气"]),
    ):
        vectors = contender.embed(texts, "query")
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_the_command_prints_a_line_a_contender(data, tiny_model, capsys):
    pytest.importorskip("sklearn")
    main([str(tiny_model), "--data", str(data), "--teacher", str(tiny_model)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["note"] for row in rows][:2] == ["the model", "its teacher"]
    assert rows[0]["sts-b-dev"] == rows[1]["sts-b-dev"]
