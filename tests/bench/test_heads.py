"""The bench of heads on answers that are known."""

from __future__ import annotations

import json

import pytest

from qingyu.bench.heads import class_figures, entity_figures, main, read_entities, read_labelled
from qingyu.errors import DataFileError, UnsupportedModelError


def test_f1_of_classes_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    wanted, found = list("aabbcca"), list("abbbcaa")
    figures = class_figures(found, wanted)
    assert figures["f1"] == round(100 * metrics.f1_score(wanted, found, average="macro"), 1)
    assert figures["accuracy"] == round(100 * metrics.accuracy_score(wanted, found), 1)


def test_an_entity_counts_only_with_its_kind_and_both_ends():
    wanted = [{(0, 2, "name"), (4, 6, "city")}, {(1, 3, "name")}]
    found = [{(0, 2, "name"), (4, 5, "city")}, {(1, 3, "city")}]
    figures = entity_figures(found, wanted)
    assert figures["precision"] == figures["recall"] == figures["f1"] == 33.3
    assert figures["by_kind"] == {"city": 0.0, "name": 66.7}


def test_both_forms_of_entities_are_read_alike(tmp_path):
    ours = {"text": "张三去了北京", "entities": [{"start": 0, "end": 2, "label": "name"}]}
    cluener = {"text": "张三去了北京", "label": {"name": {"张三": [[0, 1]]}}}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (ours, cluener))), encoding="utf-8")
    texts, spans = read_entities(tmp_path / "rows.jsonl")
    assert texts == ["张三去了北京"] * 2
    assert spans == [{(0, 2, "name")}] * 2


def test_a_file_without_the_columns_is_refused(tmp_path):
    (tmp_path / "rows.tsv").write_text("sentence\tclass\n好\t1\n", encoding="utf-8")
    with pytest.raises(DataFileError, match="text and label"):
        read_labelled(tmp_path / "rows.tsv")


def test_a_classifier_and_its_baseline_print_a_line_each(head_model, tmp_path, capsys):
    pytest.importorskip("sklearn")
    rows = [f"今天天气真好{n}\t好\n股票大跌{n}\t坏" for n in range(8)]
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    model = head_model("classification", ("好", "坏"))
    arguments = [str(model), "--test", str(tmp_path / "rows.tsv"), "--train", str(tmp_path / "rows.tsv")]
    assert main(arguments) == 0
    own, baseline = map(json.loads, capsys.readouterr().out.splitlines())
    assert own["texts"] == baseline["texts"] == 16
    assert baseline["accuracy"] == 100.0


def test_a_tagger_prints_a_line(head_model, tmp_path, capsys):
    row = {"text": "学生来上海", "entities": [{"start": 0, "end": 2, "label": "人"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert (
        main([str(head_model("tagging", ("O", "B-人", "I-人"))), "--test", str(tmp_path / "rows.jsonl")]) == 0
    )
    assert set(json.loads(capsys.readouterr().out)) >= {"precision", "recall", "f1", "by_kind"}


def test_a_model_of_another_task_is_refused(tiny_model, tmp_path):
    with pytest.raises(UnsupportedModelError, match="classification or tagging"):
        main([str(tiny_model), "--test", str(tmp_path / "none")])
