"""Attention a few heads at a time gives the same bits in less memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest

from qingyu.errors import ManifestError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.onnxruntime_engine import PROVIDERS, import_onnxruntime, product_entries, session_options
from qingyu.runtime.spec import MANIFEST, read_spec

onnx = pytest.importorskip("onnx")

from qingyu.quantize.attention import split_heads  # noqa: E402 - needs onnx
from qingyu.quantize.edge import add_edge  # noqa: E402


def pooled(model, ids):
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        session_options(onnxruntime, threads=1, entries=product_entries("int8")),
        providers=list(PROVIDERS),
    )
    mask = (np.arange(ids.shape[1]) < ids.shape[1] - 2).astype(np.int64)[None, :].repeat(len(ids), axis=0)
    feeds = {"input_ids": ids, "attention_mask": mask}
    return session.run(["pooled"], {one.name: feeds[one.name] for one in session.get_inputs()})[0]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("folder", ["tiny_model", "tiny_int8"])
def test_the_numbers_do_not_change_by_a_bit(folder, most, request):
    """Four heads in groups of 1, 2, and of 3 and 1; padded rows."""
    path = request.getfixturevalue(folder)
    spec = read_spec(path)
    whole, split = onnx.load(path / spec.graph), onnx.load(path / spec.graph)
    assert split_heads(split, spec.architecture.heads, most=most) == spec.architecture.layers
    onnx.checker.check_model(split)
    before, after = ([node.op_type for node in one.graph.node] for one in (whole, split))
    groups = -(-4 // most)
    assert after.count("Softmax") == groups * before.count("Softmax")
    ids = np.random.default_rng(2).integers(5, 60, (3, 17))
    assert np.array_equal(pooled(split, ids), pooled(whole, ids))


def test_a_graph_of_few_heads_or_of_another_form_stays_as_it_is(tiny_model):
    model = onnx.load(tiny_model / "model.onnx")
    before = model.SerializeToString()
    assert split_heads(model, 4, most=4) == 0
    assert model.SerializeToString() == before
    for node in model.graph.node:  # softmax over another axis order: what is second is not the heads
        if node.op_type == "Transpose":
            for one in node.attribute:
                one.ints[:] = [0, 1, 2, 3]
    assert split_heads(model, 4, most=1) == 0


def test_the_manifest_says_how_many_heads_an_edge_file_takes_at_once(tiny_int8, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    shutil.copytree(tiny_int8, whole)
    add_edge(whole)
    assert read_spec(whole).edge.heads_at_once is None  # 4 are not split
    monkeypatch.setattr("qingyu.quantize.edge.HEADS_AT_ONCE", 2)
    # A CPU whose products saturate would be given the graph instead; how right they are is nothing to this test.
    monkeypatch.setattr("qingyu.runtime.onnxruntime_engine.saturates_byte_products", lambda: False)
    split = tmp_path / "split"
    shutil.copytree(tiny_int8, split)
    add_edge(split)
    assert read_spec(split).edge.heads_at_once == 2
    assert sorted(path.name for path in split.iterdir()) == sorted(path.name for path in whole.iterdir())
    texts = ["今天天气真好", "外面阳光明媚" * 20, ""]
    edge = partial(Embedder.open, profile="edge", self_check=False)
    with edge(whole) as one, edge(split) as other:
        assert (one._engine.heads_at_once, other._engine.heads_at_once) == (4, 2)
        assert one.embed(texts).tobytes() == other.embed(texts).tobytes()


def test_a_manifest_of_no_heads_at_once_is_refused(tiny_int8, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_int8, folder)
    spec = add_edge(folder)
    bad = dataclasses.replace(spec, edge=dataclasses.replace(spec.edge, heads_at_once=0))
    (folder / MANIFEST).write_text(bad.to_json(), encoding="utf-8")
    with pytest.raises(ManifestError, match=r"edge\.heads_at_once"):
        read_spec(folder)
    assert json.loads(bad.to_json())["edge"]["heads_at_once"] == 0
