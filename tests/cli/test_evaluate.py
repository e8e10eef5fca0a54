"""``qingyu evaluate``, as a user calls it."""

from __future__ import annotations

import json

import pytest

from qingyu.__main__ import main

SENTENCES = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", "忘记密码了怎么办"]


@pytest.fixture
def sets(tmp_path):
    rows = [f"{a}\t{b}\t{(n * 7 + m) % 6}" for n, a in enumerate(SENTENCES) for m, b in enumerate(SENTENCES)]
    (tmp_path / "sts.tsv").write_text("sentence1\tsentence2\tlabel\n" + "\n".join(rows), encoding="utf-8")
    rows = [
        {"text": f"{text}{n}", "label": number % 2}
        for number, text in enumerate(SENTENCES)
        for n in range(10)
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("queries", "corpus"):
        rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(SENTENCES)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "qrels.tsv").write_text("query_id\tdoc_id\trel\n0\t1\t1\n3\t4\t2\n", encoding="utf-8")
    return tmp_path


def test_two_models_stand_side_by_side_in_a_table(sets, tiny_model, tiny_int8, capsys):
    pytest.importorskip("sklearn")
    arguments = ["--sts", sets / "sts.tsv", "--retrieval", sets / "questions"]
    arguments += [
        "--classification",
        sets / "labels.jsonl",
        "--clustering",
        sets / "labels.jsonl",
        "--limit",
        30,
    ]
    assert main(["evaluate", str(tiny_model), str(tiny_int8), *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(tiny_model) in lines[0]
    assert str(tiny_int8) in lines[0]
    measures = [line.split()[1] for line in lines[2:]]
    assert measures == [
        "Spearman", "recall@1", "recall@5", "recall@10", "nDCG@10", "MRR@10", "accuracy", "macro", "v-measure",
    ]  # fmt: skip
    assert all("(" in line for line in lines[2:])


def test_json_lines_hold_the_same_figures_and_a_model_beside_itself_differs_by_nothing(
    sets, tiny_model, capsys
):
    arguments = ["evaluate", str(tiny_model), str(tiny_model), "--sts", str(sets / "sts.tsv")]
    assert main([*arguments, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    assert first.keys() == {"model", "measured_on", "measure", "items", "value"}
    assert main(arguments) == 0
    assert f"{first['value']:.2f} (+0.00)" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_before_any_model_is_opened(sets, tmp_path, capsys):
    assert main(["evaluate", "absent"]) == 3
    assert "nothing to measure on" in capsys.readouterr().err
    assert main(["evaluate", "absent", "--sts", str(tmp_path / "absent.tsv")]) == 3
    assert main(["evaluate", "absent", "--sts", str(sets / "sts.tsv"), "--limit", "1"]) == 3
    assert main(["evaluate", "absent", "--sts", str(sets / "sts.tsv")]) == 5


def test_the_extra_is_asked_for_with_its_command(sets, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert main(["evaluate", "qingyu-mini-zh", "--clustering", str(sets / "labels.jsonl")]) == 5
    assert 'pip install "qingyu[evaluate]"' in capsys.readouterr().err
