"""The scorecard's document is what its figures say, and every test that it names is there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from qingyu.bench import reliability, reliability_rows
from qingyu.bench.reliability_rows import ROWS, Found, Row, Setting
from qingyu.bench.threats import THREATS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "docs" / "reliability.json"


def names_of(path: Path) -> set[str]:
    """The tests of a file, as pytest names them without parameters."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(
                f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            )
    return found


def test_every_threat_has_a_test_a_row_or_a_reason_and_each_named_test_exists():
    numbers = [threat.number for threat in THREATS]
    wanted = [("A", 18), ("B", 9), ("C", 21), ("D", 15)]
    assert numbers == [f"{letter}{n}" for letter, most in wanted for n in range(1, most + 1)]
    for threat in THREATS:
        assert threat.tests or threat.rows or threat.reason, threat.number
        assert all(number in range(1, 25) for number in threat.rows)
        for test in threat.tests:
            file, _, name = test.partition("::")
            assert name in names_of(ROOT / file), test


def test_the_page_is_what_the_results_say():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == reliability.page(results)


def test_every_row_of_the_scorecard_is_in_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(range(1, 25))
    assert set(ROWS) == set(range(1, 25))


@pytest.fixture
def setting(tmp_path, tiny_int8, tiny_model):
    return Setting(tiny_int8, tiny_int8, tiny_model, tmp_path, ROOT, quick=True)


@pytest.mark.parametrize("number", [3, 10])
def test_a_quick_row_of_a_sound_machine_is_met(number, setting):
    found = ROWS[number].run(setting)
    assert found.met in (True, None), found
    if found.met is None:
        pytest.skip(found.figure)


def test_gunicorn_with_a_loaded_model_answers_reloads_and_ends(setting):
    pytest.importorskip("gunicorn")
    run = reliability_rows._gunicorn(setting)
    assert run["trouble"] == []
    assert run["exit_s"] < 10


def test_a_row_that_fails_is_a_line_that_says_so(setting, monkeypatch):
    def broken(setting):
        raise reliability_rows.OperatorError("it", expected="a", found="b", remedy="c")

    row = Row(1, "promise", "how", "bar", "gate", broken)
    result = reliability.run_row(row, setting)
    assert result["met"] is False
    assert "expected a, found b" in result["figure"]


def test_results_are_kept_beside_those_of_other_rows(setting, tmp_path):
    for number, met in ((8, True), (3, False), (8, None)):
        row = Row(number, "p", "h", "b", "gate", lambda _, met=met: Found("f", met))
        reliability._record(tmp_path, reliability.run_row(row, setting))
    results = json.loads((tmp_path / "reliability.json").read_text(encoding="utf-8"))
    assert {key: one["met"] for key, one in results.items()} == {"3": False, "8": None}
    page = (tmp_path / "reliability.md").read_text(encoding="utf-8")
    assert "| 3 | Nothing leaves the machine | f (quick) |" in page
    assert "Of the 24 rows 0 are met, 1 are not, and 23 were not tried." in page
