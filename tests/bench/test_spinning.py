"""Each length of spinning answers the same texts in turns, and the profile is what it was afterwards."""

from __future__ import annotations

import json

import pytest

from qingyu.bench import spinning
from qingyu.runtime.graph_engine import PROFILES


def test_a_line_for_each_length_and_pause(tiny_int8):
    before = dict(PROFILES)
    lines = list(
        spinning.measure(
            str(tiny_int8),
            rounds=2,
            characters=(4, 9),
            microseconds=(0, 300),
            pauses={"none": lambda: None},
            repeats=3,
        )
    )
    assert [(line["characters"], line["pause"]) for line in lines] == [(4, "none"), (9, "none")]
    for line in lines:
        assert set(line["ms"]) == set(line["cpu_ms"]) == {"0", "300", "one thread"}
        assert min(line["ms"].values()) > 0
        assert line["speed"]["300"] == 1
    assert before == PROFILES


def test_the_embedders_that_are_compared_differ_in_their_spinning(tiny_int8, monkeypatch):
    opened = {}

    def one(embedder, text, pause, repeats):
        opened[embedder._engine.settings.one_thread_runs, embedder._engine.settings.spinning_us] = text
        return 1.0, 2.0

    monkeypatch.setattr(spinning, "_one", one)
    (line,) = spinning.measure(
        str(tiny_int8), rounds=1, characters=(3,), microseconds=(0, 150), pauses={"none": lambda: None}
    )
    assert opened == {(False, 0): "今天天", (False, 150): "今天天", (True, 0): "今天天"}
    assert line["cpu_ms"] == {"0": 2000.0, "150": 2000.0, "one thread": 2000.0}


def test_the_command_prints_json_lines(tiny_int8, monkeypatch, capsys):
    monkeypatch.setattr(spinning, "measure", lambda model, rounds: [{"model": model, "rounds": rounds}])
    assert spinning.main([str(tiny_int8), "--rounds", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tiny_int8), "rounds": 3}


@pytest.mark.parametrize("name", list(spinning.PAUSES))
def test_pauses_end(name):
    spinning.PAUSES[name]()
