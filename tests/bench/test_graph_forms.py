"""The comparison of graph forms runs on any embedding model and names what it compares."""

from __future__ import annotations

import json

from qingyu.bench.graph_forms import main
from qingyu.models.export import export


def test_every_form_is_measured_against_the_first(tiny_checkpoint, tmp_path, capsys):
    export(tiny_checkpoint, tmp_path / "model", pooling="cls")
    assert main([str(tmp_path / "model"), "--rounds", "2", "--shapes", "1x5", "3x8"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    forms = {row["form"] for row in rows}
    assert {f"onnxruntime rowwise, {form}" for form in ("whole", "narrow")} <= forms
    assert {row["shape"] for row in rows} == {"1x5", "3x8"}
    assert all(row["ratio"] == 1 for row in rows if row["form"] == "onnxruntime rowwise, whole")
    assert all(row["least cosine"] > 0.99 for row in rows)
