"""Which engine opens a model, without OpenVINO at hand: what auto takes, and what is refused with its remedy."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from qingyu import Embedder
from qingyu.errors import InvalidOptionError, ManifestError, MissingExtraError, UnsupportedModelError
from qingyu.runtime import engines
from qingyu.runtime.cpu import cpu_flags, cpu_model
from qingyu.runtime.hidden_states import HiddenStates
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import ModelSpec, OpenVinoFile, read_spec

HERE = {"environment": {"cpu": cpu_model(), "cpu_flags": list(cpu_flags())}}


class FakeEngine:
    """Stands for OpenVINO, and notes what it was given."""

    def __init__(self, folder, spec, *, profile, threads):
        self.given = (folder, spec, profile, threads)


@pytest.fixture
def with_openvino(monkeypatch):
    """As if the package were installed."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "fake_openvino_engine", module)
    monkeypatch.setattr(engines, "OPENVINO", ("fake_openvino_engine", "FakeEngine"))
    monkeypatch.setattr(engines, "openvino_installed", lambda: True)


@pytest.fixture
def spec(tiny_int8):
    found = read_spec(tiny_int8)
    return dataclasses.replace(found, openvino=OpenVinoFile(found.graph, 0.99, HERE, 1.3))


def choose(folder, spec, **options):
    defaults = {"engine": "auto", "profile": "throughput", "threads": 1, "max_memory_mb": None}
    return engines.choose_engine(folder, spec, **{**defaults, "runs_openvino": True, **options})


def test_auto_takes_openvino_where_it_was_measured_faster_on_such_a_cpu(tiny_int8, spec, with_openvino):
    engine = choose(tiny_int8, spec)
    assert isinstance(engine, FakeEngine)
    assert engine.given == (tiny_int8, spec, "throughput", 1)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "latency"},
        {"profile": "edge"},
        {"max_memory_mb": 4000},
        {"runs_openvino": False},
        {"engine": "onnxruntime"},
    ],
    ids=str,
)
def test_auto_takes_onnxruntime_for_anything_else(tiny_int8, spec, with_openvino, options):
    assert isinstance(choose(tiny_int8, spec, **options), OnnxRuntimeEngine)


@pytest.mark.parametrize(
    "changes",
    [
        {"speed": None},
        {"speed": 1.05},
        {"certificate": None},
        {"certificate": {"environment": {"cpu": "another", "cpu_flags": list(cpu_flags())}}},
        {"certificate": {"environment": {"cpu": cpu_model(), "cpu_flags": ["avx2"]}}},
        {"certificate": {"environment": None}},
    ],
    ids=str,
)
def test_auto_takes_onnxruntime_where_nothing_says_that_openvino_is_worth_it(
    tiny_int8, spec, with_openvino, changes
):
    record = dataclasses.replace(spec.openvino, **changes)
    assert isinstance(choose(tiny_int8, dataclasses.replace(spec, openvino=record)), OnnxRuntimeEngine)


def test_auto_takes_onnxruntime_where_openvino_is_not_installed(tiny_int8, spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert isinstance(choose(tiny_int8, spec), OnnxRuntimeEngine)


def test_openvino_that_is_not_installed_is_an_error_with_the_pip_command(tiny_int8, spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingExtraError, match=r'pip install "qingyu\[openvino\]", or use engine="onnxruntime"'
    ):
        choose(tiny_int8, spec, engine="openvino")


def test_a_folder_without_a_file_for_openvino_is_refused(tiny_int8, with_openvino):
    with pytest.raises(UnsupportedModelError, match="Make one with `qingyu quantize --openvino`"):
        Embedder.open(tiny_int8, engine="openvino")


def test_other_tasks_than_embedding_are_refused(head_model, tiny_model, with_openvino):
    from qingyu import Classifier

    with pytest.raises(UnsupportedModelError, match="found the task classification"):
        Classifier.open(head_model("classification"), engine="openvino")
    assert HiddenStates.RUNS_OPENVINO is False


def test_options_that_openvino_does_not_have_are_refused(tiny_int8):
    with pytest.raises(
        InvalidOptionError, match="one of 'auto', 'onnxruntime', 'openvino', found 'tensorrt'"
    ):
        Embedder.open(tiny_int8, engine="tensorrt")
    with pytest.raises(InvalidOptionError, match="found the profile edge"):
        Embedder.open(tiny_int8, engine="openvino", profile="edge")
    with pytest.raises(InvalidOptionError, match=r"found max_memory_mb=900\. .*engine=\"onnxruntime\""):
        Embedder.open(tiny_int8, engine="openvino", max_memory_mb=900)


def test_the_manifest_keeps_the_record_and_refuses_a_wrong_one(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec
    absent = dataclasses.replace(spec, openvino=dataclasses.replace(spec.openvino, file="other.onnx"))
    with pytest.raises(ManifestError, match=r"a record of other\.onnx"):
        ModelSpec.from_json(absent.to_json())
    lax = dataclasses.replace(spec, openvino=dataclasses.replace(spec.openvino, least_cosine=0.1))
    with pytest.raises(ManifestError, match=r"openvino\.least_cosine"):
        ModelSpec.from_json(lax.to_json())


def test_only_the_latency_profile_keeps_its_threads_awake_and_for_two_milliseconds(tiny_int8, monkeypatch):
    """By default onnxruntime's would burn tens of milliseconds of CPU after every request."""
    from qingyu.runtime import onnxruntime_engine

    seen = {}
    real = onnxruntime_engine.session_options

    def note(onnxruntime, *, threads, entries=None):
        options = real(onnxruntime, threads=threads, entries=entries)
        seen[profile] = [
            options.get_session_config_entry(name)
            for name in ("session.force_spinning_stop", "session.intra_op.spin_duration_us")
            if name in {**onnxruntime_engine.SESSION_ENTRIES, **(entries or {})}
        ]
        return options

    monkeypatch.setattr(onnxruntime_engine, "session_options", note)
    for profile in ("throughput", "latency", "edge"):
        with OnnxRuntimeEngine(tiny_int8, read_spec(tiny_int8), profile=profile) as engine:
            engine.open()
    assert seen == {"throughput": ["1"], "latency": ["0", "2000"], "edge": ["1"]}
