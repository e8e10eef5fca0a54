"""The table of recipes names every recipe and measures what it says."""

from __future__ import annotations

import gzip
import json

import pytest

from qingyu.bench.recipes import VARIANTS, main, varied_texts
from qingyu.errors import DataFileError
from qingyu.quantize.recipes import RECIPES

SENTENCES = {
    "news": ["股票大跌", "今天天气真好", "北京的学生和上海的老师看电影"],
    "chat": ["怎么修改登录密码", "我们吃", "想看电影"],
}


@pytest.fixture
def texts(tmp_path):
    lines = [f"{source}\t{text}" for source, own in SENTENCES.items() for text in own]
    path = tmp_path / "texts.tsv.gz"
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    return path


def test_texts_are_of_all_lengths_and_sources_and_repeatable(texts):
    found = varied_texts(texts, 60)
    assert found == varied_texts(texts, 60)
    assert found != varied_texts(texts, 60, seed=1)
    lengths = sorted(map(len, found))
    assert lengths[0] < 8
    assert lengths[-1] > 350
    assert 20 < lengths[30] < 140  # evenly over the logarithm
    assert sum(text[0] in "股今北" for text in found) == 30


def test_a_file_without_texts_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    with pytest.raises(DataFileError, match="has no texts"):
        varied_texts(path, 3)


def test_every_recipe_is_in_the_table():
    assert set(RECIPES) <= set(VARIANTS)


def test_the_table_holds_one_line_a_recipe_with_its_figures(texts, tiny_model, capsys):
    arguments = ["--texts", str(texts), "--count", "30", "--rounds", "2", "--recipes", "rowwise", "fp16"]
    assert main([str(tiny_model), *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    table = {line["recipe"]: line for line in lines}
    assert list(table) == ["fp32", "dynamic", "rowwise", "fp16"]
    assert table["fp32"]["cosine"] == {"mean": 1.0, "percentile_1": 1.0, "minimum": 1.0}
    assert table["fp32"]["speed to fp32"] == table["dynamic"]["speed to dynamic"] == 1.0
    assert 0.99 < table["rowwise"]["cosine"]["mean"] < 1
    assert table["fp16"]["megabytes"] < table["fp32"]["megabytes"]
    assert table["rowwise"]["speed to fp32"] > 0
