"""The commands of models with a head: JSON lines and terminal output, files, refusals."""

from __future__ import annotations

import json
import sys
from typing import get_args

import pytest

from qingyu.__main__ import main
from qingyu.cli.export import TASKS
from qingyu.runtime.spec import Task

LABELS = {"classification": ("好", "坏"), "tagging": ("O", "B-地", "I-地")}
COMMANDS = {
    # Command: task, options, texts, fields of a line.
    "fill-mask": ("fill-mask", [], ["今天[MASK]气真好"], {"text", "masks"}),
    "classify": ("classification", [], ["今天天气真好", "股票大跌"], {"text", "labels"}),
    "tag": ("tagging", [], ["我们在北京"], {"text", "entities"}),
    "answer": ("question-answering", ["--question", "今天"], ["天气真好"], {"text", "answers"}),
    "rerank": ("reranking", ["--query", "今天"], ["天气真好", "股票大跌"], {"index", "score", "text"}),
}


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def call(head_model):
    def run(command: str, *more: str) -> int:
        task, options, _, _ = COMMANDS[command]
        return main([command, "--model", str(head_model(task, LABELS.get(task, ()))), *options, *more])

    return run


def test_the_tasks_of_the_command_line_are_those_of_the_manifest():
    assert get_args(Task) == TASKS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_gives_a_json_line_for_each_text(call, capsys, command, tmp_path):
    _, _, texts, fields = COMMANDS[command]
    assert call(command, "--json", *texts) == 0
    found = lines(capsys)
    assert len(found) == len(texts)
    assert all(line.keys() == fields for line in found)
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    assert call(command, "--input", str(tmp_path / "texts.txt")) == 0
    assert lines(capsys) == found


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_on_a_terminal_each_command_is_for_people(call, capsys, command, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    texts = COMMANDS[command][2]
    assert call(command, *texts) == 0
    shown = capsys.readouterr().out
    assert not shown.startswith("{")
    assert command == "answer" or texts[0] in shown


def test_options_of_fill_mask(call, capsys):
    assert call("fill-mask", "--top-k", "2", "今天[MASK]气") == 0
    assert len(lines(capsys)[0]["masks"][0]) == 2
    assert call("fill-mask", "--candidates", "天,电影", "今天[MASK]气") == 0
    assert {one["token"] for one in lines(capsys)[0]["masks"][0]} == {"天", "电影"}
    assert call("fill-mask", "今天天气") == 3
    assert "has no [MASK]" in capsys.readouterr().err
    assert call("fill-mask", "[MASK]" + "今天" * 40) == 0
    said = "1 of 1 texts were cut at 64 tokens; 19 characters were not read: the last 19 of text 0\n"
    assert said in capsys.readouterr().err


def test_options_of_the_other_commands(call, capsys):
    assert call("classify", "--pairs", "--top-k", "1", "今天\t天气") == 0
    (found,) = lines(capsys)
    assert (found["text"], len(found["labels"])) == (["今天", "天气"], 1)
    assert call("classify", "--pairs", "今天天气") == 3
    assert call("classify", "--top-k", "0", "今天天气") == 3
    assert call("rerank", "--top-k", "1", "今天", "天气") == 0
    capsys.readouterr()
    assert call("answer", "--allow-none", "--top-k", "50", "天气") == 0
    assert "" in [one["text"] for one in lines(capsys)[0]["answers"]]


def test_a_model_of_another_task_is_one_line_of_error(head_model, capsys):
    assert main(["embed", "--model", str(head_model("fill-mask")), "今天"]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Open it with FillMask" in error


def test_export_says_what_it_made(head_checkpoint, tmp_path, capsys):
    assert main(["export", str(head_checkpoint("tagging")), str(tmp_path / "a")]) == 0
    assert "tagging of 2 labels, FP32" in capsys.readouterr().out
    folder = str(head_checkpoint("classification"))
    assert main(["export", folder, str(tmp_path / "b"), "--multi-label", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == "sigmoid"
    assert main(["info", str(tmp_path / "b")]) == 0
    assert "sigmoid" in capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "c"), "--task", "fill-mask"]) == 3


@pytest.mark.parametrize("command", ["classify", "tag", "fill-mask", "rerank"])
def test_every_command_says_which_texts_it_cut_and_by_how_much(call, capsys, command):
    start = "[MASK]" if command == "fill-mask" else ""
    options = ["--query", "今"] if command == "rerank" else []
    assert call(command, *options, start + "今天", start + "今天天气" * 20, start + "今天") == 0
    err = capsys.readouterr().err
    # Beside [CLS] and [SEP] there is room for 62 tokens; the mask is one, and a query with its [SEP] two.
    left = 80 - 62 + {"fill-mask": 1, "rerank": 2}.get(command, 0)
    assert (
        f"1 of 3 texts were cut at 64 tokens; {left} characters were not read: the last {left} of text 1\n"
        in err
    )


def test_a_long_context_is_read_to_its_end_and_a_long_question_refused(call, capsys):
    """Answering cuts nothing: contexts are read in windows."""
    assert call("answer", "--question", "今天", "今天天气" * 100) == 0
    assert capsys.readouterr().err == ""
    assert call("answer", "--question", "今天" * 40, "今天") == 3
    assert "question 0 is too long" in capsys.readouterr().err
