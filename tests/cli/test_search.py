"""``qingyu index`` and ``qingyu search``, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from qingyu.__main__ import main
from qingyu.cli import index as module
from qingyu.runtime.search.database import FILE

pytestmark = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")

TEXTS = ["怎么修改登录密码", "忘记密码了怎么办", "今天天气真好", "股票大跌", "我爱吃中国的饭"]


@pytest.fixture
def rows(tmp_path):
    def write(rows, name="documents.jsonl"):
        lines = [
            row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows
        ]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


def documents(count=5):
    return [
        {
            "id": n,
            "text": TEXTS[n % 5] + ("" if n < 5 else str(n)),
            "type": "faq" if n % 2 else "manual",
            "year": 2020 + n,
        }
        for n in range(count)
    ]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_build_search_change_and_look(tmp_path, rows, tiny_model, capsys):
    kb, model = tmp_path / "out" / "kb", ("--model", tiny_model)
    assert run("index", "build", rows(documents()), kb, *model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["added"] == 5
    assert run("search", kb, "密码", "-k", 2, "--mode", "words") == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {hit["id"] for hit in hits} == {"0", "1"}
    assert hits[0].keys() == {"id", "score", "text", "start", "stop", "fields"}
    assert (
        run("search", kb, "密码", "--filter", "type=manual", "--filter", "year=2020", "--filter", "year=2024")
        == 0
    )
    assert {json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()} == {"0", "4"}

    changed = [*documents()[:2], {"id": 9, "text": "新的问题"}]
    assert run("index", "update", rows(changed), kb) == 0
    assert capsys.readouterr().out == f"{kb}: 1 added, 2 unchanged\n"
    assert run("index", "add", rows([{"id": "x", "text": "上海"}]), kb) == 0
    assert run("index", "delete", kb, "x", "9") == 0
    assert run("index", "delete", kb, "x") == 3
    assert "not all documents were there" in capsys.readouterr().err
    assert run("index", "compact", kb) == 0
    assert run("index", "verify", kb) == 0
    assert capsys.readouterr().out.endswith(f"{kb}: whole, 5 documents\n")
    assert run("index", "info", kb, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["documents"], info["pieces"], info["dim"], info["precision"]) == (5, 5, "32", "int8")
    assert info["model"] == str(tiny_model)
    assert run("index", "info", kb) == 0


def test_building_again_follows_the_file(tmp_path, rows, tiny_model, capsys):
    kb, model = tmp_path / "kb", ("--model", tiny_model)
    run("index", "build", rows(documents()), kb, *model)
    run("index", "build", rows([*documents()[1:], {"id": 1000, "text": "新"}]), kb)
    assert capsys.readouterr().out.splitlines()[1] == f"{kb}: 1 added, 4 unchanged, 1 deleted"
    assert run("index", "build", rows(documents()), kb, "--precision", "bf16") == 3
    assert "expected int8, found bf16" in capsys.readouterr().err
    assert run("index", "build", rows(documents()), kb, "--nfkc") == 3
    assert run("index", "build", rows(documents()), kb, "--model", "qingyu-mini-zh") == 3
    assert "another vector space" in capsys.readouterr().err


def test_bad_rows_are_listed_in_a_file_and_the_rest_is_indexed(tmp_path, rows, tiny_model, capsys):
    bad = [b"\xff\xfe", b"{", {"id": 3}, {"text": "a"}, {"id": 1, "text": "again"}, {"id": 7, "text": " "}]
    bad.append({"id": 8, "text": "长" * 3_400_000})  # ten megabytes
    kb = tmp_path / "kb"
    assert (
        run("index", "build", rows([*documents(3), *bad, *documents()[4:]]), kb, "--model", tiny_model) == 3
    )
    out, err = capsys.readouterr()
    assert out == f"{kb}: 4 added, 7 rejected\n"
    assert err.endswith(f"7 rows were rejected; see {kb / 'rejected.jsonl'}\n")
    listed = [json.loads(line) for line in (kb / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(row["line"], row["id"]) for row in listed] == [
        (4, None), (5, None), (6, "3"), (7, None), (8, "1"), (9, "7"), (10, "8"),
    ]  # fmt: skip
    assert all(row["problem"] and row["expected"] and row["found"] and row["remedy"] for row in listed)
    # Told once: the next run without bad rows leaves no list.
    assert run("index", "build", rows(documents()), kb) == 0
    assert not (kb / "rejected.jsonl").exists()


def test_what_cannot_be_done_has_its_exit_code(tmp_path, rows, tiny_model, capsys):
    kb = tmp_path / "kb"
    assert run("search", kb, "密码") == 5
    assert "no index" in capsys.readouterr().err
    assert run("index", "build", tmp_path / "absent.jsonl", kb, "--model", tiny_model) == 3
    assert run("index", "build", rows(documents()), kb) == 0
    assert run("search", kb, "密码", "--filter", "type") == 3
    assert run("search", kb, "密码", "-k", "0") == 3
    assert run("search", kb, "密码", "--query-prompt", "别的") == 3
    (next(kb.glob("graph-*"))).write_bytes(b"")
    assert run("search", kb, "密码") == 4
    assert run("index", "verify", kb) == 4
    assert run("index", "compact", kb) == 0
    assert run("search", kb, "密码") == 0
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    assert run("index", "build", rows(documents()), occupied, "--model", tiny_model) == 5


def test_reranking_and_tables_for_people(tmp_path, rows, tiny_model, head_model, capsys, monkeypatch):
    kb = tmp_path / "kb"
    run("index", "build", rows(documents()), kb, "--model", tiny_model, "--chunk-tokens", 8, "--overlap", 2)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    capsys.readouterr()
    assert run("search", kb, "密码", "--rerank", head_model("reranking"), "-k", 2, "--candidates", 4) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run("search", kb, "密码", "--filter", "type=none") == 0
    assert capsys.readouterr().out == "nothing found\n"
    assert run("search", kb, "密码", "--mode", "hybrid", "--pieces", "--json") == 0
    assert all(json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())


def test_the_name_of_the_database_is_the_same_for_the_command_line():
    assert module.DATABASE == FILE


def test_a_build_killed_by_the_system_goes_on_when_it_is_given_again(tmp_path, rows, tiny_model, capsys):
    """Three kills of the whole command at different times; every other point is tested in test_local.py."""
    source, kb = rows(documents(3000)), tmp_path / "kb"
    command = [sys.executable, "-m", "qingyu", "index", "build", source, str(kb), "--model", str(tiny_model)]
    for wait in (0.0, 0.15, 0.3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (kb / FILE).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (kb / FILE).exists():
            assert run("index", "verify", kb) == 0
    assert run(*command[3:]) == 0
    assert run("index", "verify", kb) == 0
    assert capsys.readouterr().out.endswith("whole, 3,000 documents\n")
