"""``qingyu adapt``: what its files must hold; the training itself is tested with the functions."""

from __future__ import annotations

import argparse
import gzip
import json

import pytest

from qingyu.__main__ import main
from qingyu.cli.adapt import _examples, _labelled, _scored, _tagged, _texts, _untangled
from qingyu.errors import DataFileError, InvalidOptionError
from qingyu.models.adapt import Entity, Example, LabelledText, ScoredPair, TaggedText


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_examples_come_from_tsv_and_json_lines_alike(tmp_path):
    tsv = write(tmp_path / "a.tsv", "anchor\tpositive", "问\t答", "", "再问\t再答")
    jsonl = write(
        tmp_path / "a.jsonl", '{"anchor": "问", "positive": "答"}', '{"anchor": "再问", "positive": "再答"}'
    )
    assert list(_examples(tsv)) == list(_examples(jsonl)) == [Example("问", "答"), Example("再问", "再答")]
    with_negative = write(tmp_path / "b.tsv", "anchor\tpositive\tnegative", "问\t答\t反")
    assert list(_examples(with_negative)) == [Example("问", "答", "反")]


def test_scores_of_any_scale_become_shares(tmp_path):
    source = write(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel", "甲\t乙\t5", "丙\t丁\t1", "戊\t己\t2")
    assert list(_scored(source)) == [
        ScoredPair("甲", "乙", 1.0),
        ScoredPair("丙", "丁", 0.0),
        ScoredPair("戊", "己", 0.25),
    ]


def test_labels_and_both_forms_of_entities_are_read(tmp_path):
    labels = write(tmp_path / "a.jsonl", '{"text": "好", "label": 1}')
    assert list(_labelled(labels)) == [LabelledText("好", "1")]
    spans = '{"text": "张三来了", "entities": [{"start": 0, "end": 2, "label": "name"}]}'
    cluener = '{"text": "张三来了", "label": {"name": {"张三": [[0, 1]]}}}'
    wanted = TaggedText("张三来了", (Entity(0, 2, "name"),))
    assert list(_tagged(write(tmp_path / "b.jsonl", spans, cluener))) == [wanted, wanted]


def test_the_longest_of_entities_that_overlap_stays_and_the_others_are_counted(tmp_path, capsys):
    entities = [(0, 2, "a"), (1, 5, "b"), (4, 6, "c"), (5, 7, "d"), (6, 8, "e")]
    row = {
        "text": "今天天气真好吗啊",
        "entities": [dict(zip(("start", "end", "label"), e, strict=True)) for e in entities],
    }
    source = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))
    options = argparse.Namespace(overlaps="longest")
    [kept] = _untangled(source, options)
    assert kept.entities == (Entity(1, 5, "b"), Entity(5, 7, "d"))
    assert capsys.readouterr().err == f"{source}: 3 entities overlap a longer one and are left out\n"
    options.overlaps = "error"
    assert len(_untangled(source, options)[0].entities) == 5  # refused where they are trained on


def test_a_field_is_named_behind_the_file(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress("法律\t第一条\n对话\t你好\n".encode()))
    assert list(_texts(f"{path}#2")) == ["第一条", "你好"]
    assert list(_texts(write(tmp_path / "with#mark.txt", "甲"))) == ["甲"]


@pytest.mark.parametrize(
    ("reader", "name", "lines", "error", "message"),
    [
        (_examples, "a.tsv", ["question\tpositive", "问\t答"], DataFileError, "line 1 lacks 'anchor'"),
        (_examples, "a.tsv", ["anchor\tpositive", "问"], DataFileError, "line 2 has not the columns"),
        (_examples, "a.jsonl", ['{"anchor": "问"}'], DataFileError, "line 1 lacks 'positive'"),
        (_examples, "a.jsonl", ['{"anchor": "问", "positive": 3}'], DataFileError, "expected a string"),
        (_examples, "a.jsonl", ["{"], DataFileError, "line 1 is not JSON"),
        (_examples, "a.jsonl", ["[1]"], DataFileError, "expected a JSON object"),
        (
            _scored,
            "a.tsv",
            ["sentence1\tsentence2\tlabel", "甲\t乙\thigh"],
            DataFileError,
            "a number as label",
        ),
        (_scored, "a.tsv", ["sentence1\tsentence2\tlabel"], DataFileError, "is empty"),
        (
            _scored,
            "a.tsv",
            ["sentence1\tsentence2\tlabel", "甲\t乙\t3"],
            InvalidOptionError,
            "two different labels",
        ),
        (_tagged, "a.jsonl", ['{"text": "甲"}'], DataFileError, "no entities"),
        (_tagged, "a.jsonl", ['{"text": "甲", "entities": [{"start": 0}]}'], DataFileError, "no entities"),
        (_labelled, "a.tsv", ["text", "甲"], DataFileError, "lacks 'label'"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line(tmp_path, reader, name, lines, error, message):
    with pytest.raises(error, match=message):
        list(reader(write(tmp_path / name, *lines)))


def test_bad_files_end_the_command_with_one_line_and_no_folder(tmp_path, tiny_checkpoint, capsys):
    pairs = write(tmp_path / "pairs.tsv", "question\tanswer", "问\t答")
    pytest.importorskip("peft")
    code = main(["adapt", "contrast", str(tiny_checkpoint), str(tmp_path / "run"), "--pairs", pairs])
    assert code == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_prune_vocab_writes_a_checkpoint(tmp_path, tiny_checkpoint, capsys):
    corpus = write(tmp_path / "corpus.txt", "今天天气真好", "外面阳光明媚")
    arguments = [
        "prune-vocab",
        str(tiny_checkpoint),
        str(tmp_path / "cut"),
        "--texts",
        corpus,
        "--size",
        "120",
    ]
    assert main(["adapt", *arguments]) == 0
    assert "120 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["vocab_size"] == 120


def test_without_the_extra_the_pip_command_is_said(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    pairs = write(tmp_path / "pairs.tsv", "anchor\tpositive", "问\t答")
    assert main(["adapt", "contrast", str(tiny_checkpoint), str(tmp_path / "run"), "--pairs", pairs]) == 5
    assert 'pip install "qingyu[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["distil", "contrast", "classify", "tag", "prune-vocab"])
def test_each_kind_has_help_with_an_example(kind, capsys):
    with pytest.raises(SystemExit) as done:
        main(["adapt", kind, "--help"])
    assert done.value.code == 0
    assert f"qingyu adapt {kind} " in capsys.readouterr().out
