"""Terms: pairs of Chinese characters, words of other scripts, and queries of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qingyu.errors import InvalidOptionError, MissingExtraError
from qingyu.runtime.search.terms import bigrams, query_of, terms_for


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("重置密码", ["重置", "置密", "密码", "码"]),
        ("iPhone15手机", ["iphone15", "手机", "机"]),
        ("ＡＰＩ（接口）", ["api", "接口", "口"]),
        ("𠮷野家", ["𠮷野", "野家", "家"]),
        ("人々", ["人々", "々"]),
        ('a"b*c', ["a", "b", "c"]),
        ("_ ！？", []),
    ],
)
def test_a_text_gives_pairs_of_han_characters_and_words_of_other_scripts(text, terms):
    assert list(bigrams(text)) == terms


@pytest.mark.parametrize(
    ("text", "query"),
    [("重置密码", '"重置" OR "置密" OR "密码"'), ("码", '"码" *'), ("a 码", '"a"'), ("!", "")],
)
def test_a_query_leaves_single_characters_out_unless_there_is_nothing_else(text, query):
    assert query_of(text, bigrams) == query


@given(st.text())
def test_no_text_gives_a_query_that_fts5_cannot_read(text):
    import sqlite3

    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE terms USING fts5 (words, content='')")
    query = query_of(text, bigrams)
    if query:
        connection.execute("SELECT rowid FROM terms WHERE terms MATCH ?", (query,)).fetchall()
    connection.close()


@given(st.text(alphabet="怎么重置密码abc１２ ，。", max_size=20))
def test_every_text_is_found_by_itself_and_by_each_of_its_han_characters(text):
    import sqlite3

    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE terms USING fts5 (words, content='')")
    connection.execute("INSERT INTO terms (rowid, words) VALUES (1, ?)", (" ".join(bigrams(text)),))
    for query in {text, *text}:
        asked = query_of(query, bigrams)
        if asked and (len(query) > 1 or "一" <= query <= "鿿"):
            assert connection.execute("SELECT 1 FROM terms WHERE terms MATCH ?", (asked,)).fetchall(), query
    connection.close()


def test_an_unknown_way_is_refused_and_jieba_is_asked_for_at_the_door(monkeypatch):
    with pytest.raises(InvalidOptionError, match="bigrams, jieba"):
        terms_for("spaces")
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qingyu\[jieba\]"'):
        terms_for("jieba")


def test_jieba_gives_words():
    pytest.importorskip("jieba")
    assert list(terms_for("jieba")("怎么重置密码？")) == ["怎么", "重置", "密码"]
