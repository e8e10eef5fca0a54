"""The measurement of one model: what it holds, and what `qingyu bench` and `qingyu doctor` make of it."""

from __future__ import annotations

import json
import warnings

import pytest

from qingyu.__main__ import main
from qingyu.bench import on_device
from qingyu.bench.on_device import measure, tunings_of
from qingyu.errors import InvalidOptionError
from qingyu.runtime.cpu import available_cpus
from qingyu.runtime.tuning import Tuning

pytestmark = pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")


@pytest.fixture(scope="module")
def found(tiny_int8):
    """Little of everything: how fast it is does not matter here."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(on_device, "BUDGETS", (64, 512))
        patch.setattr(on_device, "LEAST_SECONDS", 0.01)
        return measure(str(tiny_int8), seconds=0.1)


def test_every_setting_is_measured_in_every_round_and_the_best_is_one_of_them(found):
    json.dumps(found, allow_nan=False)
    settings = found["settings"]
    assert found["best"] in settings
    assert found["default"]["times_default"] == 1.0
    assert found["best"]["times_default"] == max(row["times_default"] for row in settings)
    assert {row["token_budget"] for row in settings} == {64, 512}
    assert {row["threads"] for row in settings} >= {1, available_cpus()}
    assert all(row["rounds"] >= on_device.LEAST_ROUNDS for row in settings)
    assert set(found["latency"]) == set(found["memory"]) == {"throughput", "latency", "edge"}
    for row in found["latency"].values():
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert found["lone"][0]["times_default"] == 1.0
    assert {row["threads"] for row in found["lone"]} >= {1, available_cpus()}
    assert all(row["p50_ms"] > 0 and row["rounds"] >= on_device.LEAST_ROUNDS for row in found["lone"])
    assert all(row["opened_mb"] > 10 for row in found["memory"].values())
    assert 0 <= found["foreign_percent"] <= 100


def test_too_short_a_time_is_an_error(tiny_int8):
    with pytest.raises(InvalidOptionError, match="at least 5, found 1"):
        measure(str(tiny_int8), seconds=1)


def test_only_a_clear_gain_is_worth_keeping():
    row = {"threads": 1, "token_budget": 256}
    slow, fast = {**row, "times_default": 1.01}, {**row, "times_default": 1.2}
    lone = [{**row, "threads": 2, "times_default": 1.0}, {**row, "times_default": 1.3}]
    alone = {"foreign_percent": 1.0, "lone": lone[:1]}
    assert tunings_of({"best": slow, **alone}) == {}
    assert tunings_of({"best": fast, **alone}) == {"throughput": Tuning(1, 256)}
    assert tunings_of({"best": slow, **alone, "lone": lone}) == {"latency": Tuning(1, 256)}
    assert tunings_of({"best": fast, **alone, "foreign_percent": 30.0}) == {}


def test_what_others_use_is_what_is_busy_beside_this_process():
    assert on_device._foreign((0.0, 0.0, 0.0), (200.0, 150.0, 100.0)) == 25.0
    assert on_device._foreign((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)) == 0.0
    whole, busy, own = on_device._ticks()
    assert whole >= busy >= own > 0


def test_the_command_prints_a_table_or_json(found, monkeypatch, capsys):
    load = {"foreign_percent": 40.0}
    monkeypatch.setattr(on_device, "measure", lambda _model, *, seconds: {**found, **load, "asked": seconds})
    assert main(["bench"]) == 0
    table = capsys.readouterr().out
    assert "others used 40 % of the machine meanwhile" in table
    load["foreign_percent"] = 1.0
    assert main(["bench"]) == 0
    assert "others used" not in capsys.readouterr().out
    assert "default" in table
    assert "best" in table
    assert "one query, latency" in table
    assert main(["bench", "some-model", "--seconds", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**found, **load, "asked": 7.0, "disturbed": False}


def test_an_unknown_model_is_an_error(capsys):
    assert main(["bench", "no-such-model"]) == 5
    assert "no model 'no-such-model'" in capsys.readouterr().err


def test_doctor_keeps_what_it_measured_and_forgets_it(tiny_int8, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path))
    best = {"threads": 1, "token_budget": 128, "times_default": 1.5}
    load = {"foreign_percent": 0.0}
    lone = [{"threads": 1, "token_budget": 64, "times_default": 1.0}]
    monkeypatch.setattr(on_device, "measure", lambda _model: {"best": best, "lone": lone, **load})

    def settings(*options):
        assert main(["doctor", "--model", str(tiny_int8), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["settings"]

    assert settings() == "defaults"
    assert settings("--measure") == settings() == "throughput: 1 threads, 128 tokens, as measured here"
    lone[0]["times_default"] = 2.0
    assert settings("--measure") == (
        "throughput: 1 threads, 128 tokens; latency: 1 threads, 64 tokens, as measured here"
    )
    best["times_default"] = lone[0]["times_default"] = 1.0
    assert settings("--measure") == "defaults, measured to be best"
    best["times_default"] = 1.5
    load["foreign_percent"] = 40.0
    assert settings("--measure").startswith("defaults; not measured, as others used 40 %")
    assert settings() == "defaults"
    load["foreign_percent"] = 0.0
    settings("--measure")
    assert settings("--forget") == settings() == "defaults"
    (tmp_path / "tuned").rmdir()
    (tmp_path / "tuned").write_text("")
    assert "nowhere to keep it" in settings("--measure")
