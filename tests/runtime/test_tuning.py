"""What was measured best is used, for just the machine and model that it was measured with, and never harms."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from qingyu.runtime import tuning
from qingyu.runtime.cpu import available_cpus
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import read_spec
from qingyu.runtime.tuning import Tuning, forget, recall, store


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def spec(tiny_model):
    return read_spec(tiny_model)


BEST = {"throughput": Tuning(1, 96)}


def only_file(home):
    (path,) = (home / "tuned").iterdir()
    return path


def test_what_is_stored_is_used_when_a_model_is_opened_and_dropped_when_forgotten(home, spec, tiny_model):
    assert recall(spec) == {}
    with Embedder.open(tiny_model) as embedder:
        default = embedder.plan
        expected = embedder.embed(["今天天气真好", "股票大跌"] * 30)
    path = store(spec, BEST)
    assert path == only_file(home)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with Embedder.open(tiny_model) as embedder:
        assert (embedder.plan.workers, embedder.plan.token_budget) == (1, 96)
        assert embedder.embed(["今天天气真好", "股票大跌"] * 30) == pytest.approx(expected, abs=1e-6)
    assert forget(spec)
    assert not forget(spec)
    with Embedder.open(tiny_model) as embedder:
        assert embedder.plan == default


def test_each_profile_has_its_own(home, spec, tiny_model):
    with Embedder.open(tiny_model, profile="latency") as embedder:
        default = embedder.plan.token_budget
    store(spec, BEST)
    with Embedder.open(tiny_model, profile="latency") as embedder:
        assert embedder.plan.token_budget == default != 96
    store(spec, {**BEST, "latency": Tuning(1, 77)})
    with Embedder.open(tiny_model, profile="latency") as embedder:
        assert embedder.plan.token_budget == 77
        assert embedder._engine._engine.threads == 1
    with Embedder.open(tiny_model) as embedder:
        assert embedder.plan.token_budget == 96


@pytest.mark.parametrize(
    "options",
    [{"threads": 1}, {"profile": "edge"}, {"engine": "onnxruntime"}],
    ids=lambda one: next(iter(one)),
)
def test_options_that_decide_are_not_overruled(home, spec, tiny_model, options):
    with Embedder.open(tiny_model, **options) as embedder:
        default = embedder.plan
    store(spec, {"throughput": Tuning(1, 77), "latency": Tuning(1, 78)})
    with Embedder.open(tiny_model, **options) as embedder:
        assert embedder.plan == default


def test_a_memory_budget_still_bounds_what_is_stored(home, spec, tiny_model):
    store(spec, {"throughput": Tuning(1, 1 << 16)})
    with Embedder.open(tiny_model, max_memory_mb=1 << 20) as embedder:
        assert embedder.plan.token_budget == 1 << 16
    with Embedder.open(tiny_model) as embedder:
        embedder.load()
        held = tuning_free(embedder)
    with Embedder.open(tiny_model, max_memory_mb=held) as embedder:
        assert embedder.plan.token_budget < 1 << 16


def tuning_free(embedder):
    """Megabytes that hold the process as it is, and a little more."""
    from qingyu.runtime.memory import MEGABYTE, resident_bytes

    return resident_bytes() // MEGABYTE + 60


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_model", "another"), ("cpu_flags", ("none",)), ("available_cpus", 1 << 10), ("_versions", {})],
)
def test_another_machine_or_library_does_not_use_it(home, spec, monkeypatch, name, value):
    store(spec, BEST)
    assert recall(spec) == BEST
    monkeypatch.setattr(tuning, name, lambda: value)
    assert recall(spec) == {}


def test_another_graph_does_not_use_it(home, spec):
    store(spec, BEST)
    record = replace(spec.files[spec.graph], sha256="0" * 64)
    assert recall(replace(spec, files={**spec.files, spec.graph: record})) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 0},
        {"threads": True},
        {"threads": available_cpus() + 1},
        {"threads": "1"},
        {"token_budget": 31},
        {"token_budget": 1 << 20},
        {"token_budget": 96.0},
        {"token_budget": None},
        {"workers": 1},
        {"format": 1},
        {"profiles": {"edge": {"threads": 1, "token_budget": 96}}},
        {"profiles": [1]},
        {"facts": {}},
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_not_used(home, spec, tiny_model, change):
    path = store(spec, BEST)
    document = json.loads(path.read_text())
    settings = {"throughput": {**document["profiles"]["throughput"], **change}}
    changed = change if set(change) <= set(document) else {"profiles": settings}
    path.write_text(json.dumps({**document, **changed}))
    assert recall(spec) == {}
    Embedder.open(tiny_model).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * 20_000], ids=len)
def test_a_damaged_file_is_as_good_as_none(home, spec, content):
    store(spec, BEST).write_bytes(content)
    assert recall(spec) == {}


def test_what_makes_no_sense_is_not_stored(home, spec):
    assert store(spec, {"throughput": Tuning(available_cpus() + 1, 96)}) is None
    assert store(spec, {"latency": Tuning(1, 1)}) is None
    assert store(spec, {"edge": Tuning(1, 96)}) is None
    assert store(spec, {}) is None
    assert not home.exists()


def test_where_nothing_can_be_written_nothing_is_stored(home, spec, monkeypatch):
    home.write_text("a file, not a folder")
    assert store(spec, BEST) is None
    assert recall(spec) == {}
    assert not forget(spec)
    monkeypatch.setenv("QINGYU_HOME", "relative")
    assert store(spec, BEST) is None
    assert recall(spec) == {}
    assert not forget(spec)


def test_a_home_that_everybody_may_write_to_is_neither_read_nor_written(home, spec):
    path = store(spec, BEST)
    home.chmod(0o777)
    assert recall(spec) == {}
    assert store(spec, BEST) is None
    assert not forget(spec)
    assert path.is_file()
    home.chmod(0o700)
    assert recall(spec) == BEST


def test_nothing_half_written_is_left(home, spec, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    assert store(spec, BEST) is None
    assert list((home / "tuned").iterdir()) == []
    assert os.environ["QINGYU_HOME"] == str(home)
