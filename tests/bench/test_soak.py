"""A soak's rounds note what a real server holds and answers, and growth is told from noise of the beginning."""

from __future__ import annotations

import doctest
import json

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

from qingyu.bench import soak
from qingyu.bench.load import running_server


def test_growth_leaves_out_the_beginning():
    assert doctest.testmod(soak).failed == 0
    assert soak.growth([100.0, 150, 150, 150, 150]) == 0
    assert soak.growth([7.0]) == 0


def test_requests_have_many_sizes_and_some_are_wrong():
    requests = soak.mixed_requests()
    assert len({len(one) for one in requests}) > 40
    routes = {one.split(b" ")[1] for one in requests}
    assert routes == {b"/v1/embeddings", b"/embed", b"/tokenize"}


def test_two_short_rounds(tiny_int8):
    with running_server("--model", f"bench={tiny_int8}") as server:
        first, second = soak.minutes(server, count=2, seconds=3.0)
    assert (first["minute"], second["minute"]) == (1, 2)
    for line in (first, second):
        assert line["reloaded"]
        assert line["failures"] == 0
        assert line["resident_mb"] > 10
        assert line["open_files"] > 3
        assert line["answers"]["200"] > 0
        assert {"400", "404", "422"} & set(line["answers"])


def test_the_last_line_is_the_growth_and_a_failure_is_an_exit_of_one(tiny_int8, monkeypatch, capsys):
    rows = [{"resident_mb": 100.0 + n, "open_files": 9, "threads": 5, "failures": 1} for n in range(4)]
    monkeypatch.setattr(soak, "minutes", lambda server, count: iter(rows))
    assert soak.main([str(tiny_int8), "--minutes", "4"]) == 1
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["grown_in_an_hour"] == {"resident_mb": 60.0, "open_files": 0, "threads": 0}
    assert (last["minutes"], last["failures"], last["exit_code"]) == (4, 1, 0)
