"""Long texts in pieces: cut at sentence ends, read whole, and what becomes of their vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qingyu import Embedder
from qingyu.errors import InvalidOptionError
from qingyu.runtime.embedder import Report
from qingyu.runtime.long_text import pieces, sentences


def characters(parts):
    return [len(part) for part in parts]


def test_sentences_end_with_their_marks():
    text = "今天下雨。带伞吗？！好；走吧\n第二段,没完"
    assert sentences(text) == ["今天下雨。", "带伞吗？！", "好；", "走吧\n", "第二段,没完"]


@given(st.text(alphabet="甲乙。？\n a", max_size=200), st.integers(1, 30))
def test_pieces_joined_are_the_text_and_none_is_too_long(text, most):
    made = pieces(text, characters, most=most)
    assert "".join(made) == text
    assert all(0 < len(piece) <= most for piece in made)


@given(st.lists(st.booleans(), max_size=150), st.integers(2, 30), st.integers(0, 15))
def test_pieces_overlap_by_whole_sentences_and_lose_nothing(ends, most, overlap):
    text = "".join(
        chr(0x4E00 + n) + "。" * end for n, end in enumerate(ends)
    )  # no character twice but the marks
    made = pieces(text, characters, most=most, overlap=min(overlap, most // 2))
    assert all(0 < len(piece) <= most for piece in made)
    at = 0
    for piece in made:
        start = text.find(piece, max(0, at - overlap))
        assert 0 <= start <= at
        at = start + len(piece)
    assert at == len(text)


def test_pieces_are_cut_at_sentence_ends_where_that_is_possible():
    text = "一二三。四五六。七八九。十"
    assert pieces(text, characters, most=9) == ["一二三。四五六。", "七八九。十"]
    assert pieces(text, characters, most=9, overlap=4) == ["一二三。四五六。", "四五六。七八九。十"]
    assert pieces("一二三四五六七八", characters, most=5) == ["一二三四", "五六七八"]


def test_a_count_that_is_too_large_to_say_is_split_further():
    def count(parts):
        return [len(part) if len(part) < 4 else None for part in parts]

    assert pieces("一二三四五六七", count, most=3) == ["一二三", "四五", "六七"]


SENTENCES = ["今天天气真好。", "外面阳光明媚。", "怎么修改登录密码？", "股票大跌！"]
LONG = "".join(SENTENCES[n % 4] for n in range(40))


@pytest.fixture(scope="module")
def embedder(tiny_model):
    with Embedder.open(tiny_model) as opened:
        yield opened


def own_pieces(embedder, text, overlap=0):
    def count(parts):
        return [len(embedder.tokenize(part).ids) - 2 for part in parts]

    return pieces(text, count, most=embedder.spec.max_tokens - 2, overlap=overlap)


@pytest.mark.parametrize("overlap", [0, 20])
def test_mean_and_max_combine_the_vectors_of_the_pieces(embedder, overlap):
    parts = own_pieces(embedder, LONG, overlap)
    assert len(parts) > 3
    vectors = embedder.embed(parts)
    tokens = np.array([len(embedder.tokenize(part).ids) for part in parts])
    mean = np.average(vectors, axis=0, weights=tokens)
    wanted = {
        "mean": mean / np.linalg.norm(mean),
        "max": vectors.max(axis=0) / np.linalg.norm(vectors.max(axis=0)),
    }
    for rule, vector in wanted.items():
        found = embedder.embed([SENTENCES[0], LONG, SENTENCES[1]], long_text=rule, overlap=overlap)
        assert np.abs(found[1] - vector).max() < 1e-5
        assert np.abs(found[[0, 2]] - embedder.embed(SENTENCES[:2])).max() < 1e-6


def test_the_end_of_a_long_text_counts(embedder):
    other = LONG + "人工智能正在变。" * 40
    assert np.array_equal(embedder.embed(LONG), embedder.embed(other))
    assert (
        np.abs(embedder.embed(LONG, long_text="mean") - embedder.embed(other, long_text="mean")).max() > 0.01
    )


def test_texts_that_fit_are_not_touched(embedder):
    for rule in ("mean", "max"):
        assert np.array_equal(embedder.embed(SENTENCES, long_text=rule), embedder.embed(SENTENCES))


def test_the_report_counts_what_was_split_and_that_nothing_was_dropped(embedder):
    report = Report()
    embedder.embed([LONG, SENTENCES[0]], long_text="mean", report=report)
    assert (report.texts, report.split, report.truncated) == (2, 1, 0)
    assert (report.dropped, report.cut) == (0, [])
    tokens = sum(len(embedder.tokenize(part).ids) for part in [*own_pieces(embedder, LONG), SENTENCES[0]])
    assert report.tokens == tokens


def test_a_prompt_stands_before_every_piece(embedder):
    report = Report()
    embedder.embed(LONG, prompt="query", long_text="mean", report=report)
    assert report.truncated == 0
    plain = embedder.embed(LONG, long_text="mean")
    assert np.abs(plain - embedder.embed(LONG, prompt="query", long_text="mean")).max() > 1e-3


def test_streams_split_long_texts_in_their_place(embedder):
    texts = [SENTENCES[n % 4] if n % 5 else LONG for n in range(150)]
    blocks = list(embedder.embed_stream(texts, long_text="mean"))
    assert [text for block in blocks for text in block.texts] == texts
    found = np.concatenate([block.vectors for block in blocks])
    assert np.abs(found[0] - embedder.embed(LONG, long_text="mean")[0]).max() < 1e-5
    assert np.abs(found[1] - embedder.embed(SENTENCES[1])[0]).max() < 1e-6


@pytest.mark.parametrize("options", [{"long_text": "middle"}, {"overlap": -1}, {"overlap": 1000}])
def test_options_out_of_range_are_refused(embedder, options):
    with pytest.raises(InvalidOptionError):
        embedder.embed("今天", **options)


def test_counts_of_another_report_are_added_and_its_numbers_left(embedder):
    first, second = Report(), Report()
    embedder.embed([SENTENCES[0], LONG], report=first)
    embedder.embed([LONG, LONG], report=second)
    kept = list(first.cut)
    dropped = first.dropped
    first.include(second)
    assert (first.texts, first.truncated, first.dropped) == (4, 3, 3 * dropped)
    assert first.cut == kept == [(1, dropped)]
