"""The stages of embedding add up, and every operator of the graph is among those that are timed."""

from __future__ import annotations

import json

import pytest

from qingyu.bench import wall
from qingyu.bench.stages import main, measure


def test_shares_add_up_and_operators_are_the_graphs(tiny_int8, monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(wall, "SECONDS", 0.01)
    found = measure(str(tiny_int8), name="short", count=24, rounds=2)
    assert found["texts"] == 24
    assert set(found["milliseconds"]) == {"tokenizing", "batching", "graph"}
    assert sum(found["share_percent"].values()) == pytest.approx(100, abs=0.2)
    assert 0 <= found["padding_percent"] < 50
    assert "MatMulIntegerToFloat" in found["operators_percent"]
    graph = onnx.load(tiny_int8 / "model.onnx").graph
    own = {node.op_type for node in graph.node}
    assert {"MatMulIntegerToFloat", "LayerNormalization"} <= own & set(found["operators_percent"])
    assert sum(found["operators_percent"].values()) <= 101


def test_the_command_prints_one_json_line(tiny_model, monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.setattr(wall, "SECONDS", 0.01)
    assert main([str(tiny_model), "--workload", "short", "--count", "8", "--rounds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "fp32"


def test_queries_are_run_one_by_one(tiny_int8, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(wall, "SECONDS", 0.01)
    assert measure(str(tiny_int8), name="single", count=12, rounds=1)["padding_percent"] == 0
