"""Texts to distil on, and the teacher's vectors of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import InputError, InvalidOptionError, InvalidTextError, OutputError
from qingyu.models.adapt import teacher, training_texts, vocabulary_words
from qingyu.models.adapt.teacher import teacher_vectors, texts_digest

PARAGRAPHS = [
    f"第{n}条：今天天气真好，外面阳光明媚。股票在第{n}天大跌！怎么修改登录密码{n}？" for n in range(100)
]


def test_the_given_texts_are_all_there_once():
    made = training_texts([*PARAGRAPHS, *PARAGRAPHS])
    assert set(PARAGRAPHS) <= set(made)
    assert len(made) == len(set(made))


def test_sentences_are_parts_of_a_text_and_passages_join_neighbours():
    made = training_texts(PARAGRAPHS, sentences=1.0, passages=0.5)
    others = [text for text in made if text not in PARAGRAPHS]
    sentences = [text for text in others if any(text in paragraph for paragraph in PARAGRAPHS)]
    passages = [text for text in others if any(paragraph in text for paragraph in PARAGRAPHS)]
    assert len(sentences) == 100
    assert all(6 <= len(sentence) <= 120 for sentence in sentences)
    assert len(passages) > 20
    assert set(others) == {*sentences, *passages}
    joined = "".join(PARAGRAPHS)
    assert all(passage in joined for passage in passages)
    lengths = [len(passage) for passage in passages]
    assert min(lengths) < 250
    assert 500 < max(lengths) < 800 + len(PARAGRAPHS[0])


def test_the_same_seed_gives_the_same_texts_and_a_limit_their_first():
    assert training_texts(PARAGRAPHS, seed=1) == training_texts(PARAGRAPHS, seed=1)
    assert training_texts(PARAGRAPHS, seed=1) != training_texts(PARAGRAPHS, seed=2)
    assert training_texts(PARAGRAPHS, limit=70) == training_texts(PARAGRAPHS)[:70]


def test_variants_are_short_texts_with_words_of_others():
    short = [f"{who}在{where}{what}" for who in "你我他她" for where in "家路店校" for what in "吃喝跑唱走"]
    made = training_texts([*short, *PARAGRAPHS], sentences=0, passages=0, variants=1.0)
    others = [text for text in made if text not in short and text not in PARAGRAPHS]
    assert 40 < len(others) <= 180  # those that are one of the given texts again are not counted twice
    assert set("".join(others)) <= set("".join([*short, *PARAGRAPHS]))
    assert max(len(text) for text in others) < 130
    lengths = {len(text) for text in others}
    assert {2, 3} <= lengths  # words left out
    assert any(len(text) == 4 for text in others)  # words replaced


def test_variants_change_whole_words():
    """Each word of a variant is one that the function gave, so that no word is cut in two."""
    texts = [f"<{n}><{n + 1}><{n + 2}>" for n in range(0, 300, 3)]
    made = training_texts(
        texts, sentences=0, passages=0, variants=2.0, words=lambda text: re.findall("<[0-9]+>", text)
    )
    assert len(made) > 200
    assert all(re.fullmatch("(<[0-9]+>)+", text) for text in made)


def test_words_of_a_vocabulary_make_up_the_text(tiny_checkpoint):
    words = vocabulary_words(tiny_checkpoint)
    for text in ["今天天气真好", "ai2 在  中国。", "𫠠未知字", ""]:
        assert "".join(words(text)) == text
    assert words("今天天气") == list("今天天气")


@pytest.mark.parametrize(
    ("texts", "options", "error"),
    [
        (PARAGRAPHS[:5], {}, InputError),
        ([], {}, InputError),
        ([PARAGRAPHS[0]] * 500, {"sentences": 0, "passages": 0}, InputError),
        ([*PARAGRAPHS, 3], {}, InvalidTextError),
        (PARAGRAPHS, {"sentences": -1}, InvalidOptionError),
        (PARAGRAPHS, {"variants": 11}, InvalidOptionError),
        (PARAGRAPHS, {"limit": 3}, InvalidOptionError),
    ],
)
def test_texts_that_cannot_train_are_refused(texts, options, error):
    with pytest.raises(error):
        training_texts(texts, **options)


def test_teacher_vectors_are_the_embedders_and_are_not_computed_twice(tiny_model, tmp_path, monkeypatch):
    vectors = teacher_vectors(tiny_model, PARAGRAPHS, tmp_path, prompt="query")
    with Embedder.open(tiny_model) as embedder:
        wanted = embedder.embed(PARAGRAPHS, prompt="query", normalize=True)
    assert np.abs(vectors.astype(np.float32) - wanted).max() < 1e-3
    monkeypatch.setattr(Embedder, "embed", None)
    again = teacher_vectors(tiny_model, PARAGRAPHS, tmp_path, prompt="query")
    assert np.array_equal(vectors, again)


def test_teacher_vectors_go_on_after_a_kill(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "CHUNK", 16)
    embed = Embedder.embed
    counted = []

    def dying(self, texts, **options):
        counted.append(len(texts))
        if len(counted) == 4:
            raise KeyboardInterrupt
        return embed(self, texts, **options)

    monkeypatch.setattr(Embedder, "embed", dying)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(tiny_model, PARAGRAPHS, tmp_path)
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 48
    counted[:] = [0] * 10
    vectors = teacher_vectors(tiny_model, PARAGRAPHS, tmp_path)
    assert sum(counted) == len(PARAGRAPHS) - 48
    assert np.abs(np.linalg.norm(vectors.astype(np.float32), axis=1) - 1).max() < 1e-2


def test_vectors_of_other_texts_are_computed_anew(tiny_model, tmp_path):
    first = np.array(teacher_vectors(tiny_model, PARAGRAPHS, tmp_path))
    second = teacher_vectors(tiny_model, PARAGRAPHS[::-1], tmp_path)
    assert np.array_equal(first[::-1], second)


def test_vectors_that_cannot_be_kept_are_one_typed_error(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="teacher's vectors"):
        teacher_vectors(tiny_model, PARAGRAPHS, tmp_path / "file" / "below")


def test_a_digest_tells_texts_apart_by_their_bounds():
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"])
