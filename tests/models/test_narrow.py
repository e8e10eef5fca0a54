"""A narrow graph gives the result of the whole one, and computes the last layer for what the result is made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qingyu.models.export import export
from qingyu.models.export.graph import (
    FloatLinear,
    input_names,
    narrow_names,
    narrowed,
    output_names,
    read_plan,
    read_weights,
    write_graph,
)
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import feeds_of

HEADS = ("classification", "reranking", "fill-mask")


def outputs_of(graph: bytes, batch: TokenBatch) -> dict[str, np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feeds = feeds_of(batch, [value.name for value in session.get_inputs()])
    return dict(zip(names, session.run(names, feeds), strict=True))


def both(folder):
    path = folder / "model.onnx"
    plan, weights = read_plan(path), read_weights(path)
    narrow = narrowed(plan)
    assert narrow != plan
    return narrow, path.read_bytes(), write_graph(narrow, weights, FloatLinear())


@pytest.mark.parametrize("config", [{}, {"model_type": "xlm-roberta", "num_attention_heads": 2}])
def test_a_cls_vector_is_that_of_the_whole_graph(make_checkpoint, as_sentence_transformers, tmp_path, config):
    prefix = "roberta." if config else ""
    modules = ("Transformer", "Pooling", "Normalize")
    checkpoint = as_sentence_transformers(make_checkpoint(config=config, prefix=prefix), modules=modules)
    export(checkpoint, tmp_path / "model")
    narrow, whole_graph, narrow_graph = both(tmp_path / "model")
    random = np.random.default_rng(0)
    rows = [random.integers(5, 60, length) for length in (17, 1, 30, 4)]
    batch = TokenBatch.pad(rows, 0)
    wanted, found = outputs_of(whole_graph, batch), outputs_of(narrow_graph, batch)
    assert list(found) == list(output_names(narrow)) == ["pooled"]
    np.testing.assert_allclose(found["pooled"], wanted["pooled"], atol=1e-5)
    alone = [outputs_of(narrow_graph, TokenBatch.pad([row], 0))["pooled"] for row in rows]
    np.testing.assert_allclose(np.concatenate(alone), found["pooled"], atol=1e-5)
    assert len(narrow_graph) == pytest.approx(len(whole_graph), rel=0.1)  # no weight is stored twice


@pytest.mark.parametrize("task", HEADS)
def test_logits_are_those_of_the_whole_graph(head_model, task):
    narrow, whole_graph, narrow_graph = both(head_model(task))
    random = np.random.default_rng(0)
    rows = [random.integers(5, 90, length) for length in (9, 20, 3)]
    types = [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in rows]
    batch = TokenBatch.pad(rows, 0, types=types, chosen=[[2, 8], [], [1]])
    wanted, found = outputs_of(whole_graph, batch), outputs_of(narrow_graph, batch)
    logits = output_names(narrow)[1]
    assert list(found) == ["chosen_states", logits]
    np.testing.assert_allclose(found[logits], wanted[logits], atol=2e-5)
    states = wanted["token_states"]
    places = (batch.chosen // 20, batch.chosen % 20) if task == "fill-mask" else (slice(None), 0)
    np.testing.assert_allclose(found["chosen_states"], states[places], atol=1e-5)
    assert input_names(narrow.task_head) == input_names(read_plan_of(whole_graph).task_head)


def read_plan_of(graph):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.onnx").write_bytes(graph)
        return read_plan(Path(place) / "model.onnx")


def test_plans_whose_result_is_made_of_all_tokens_stay_as_they_are(tiny_model, head_model):
    mean = read_plan(tiny_model / "model.onnx")
    assert narrowed(mean) is mean
    states = dataclasses.replace(mean, pooling="cls", hidden_states=True)
    assert narrowed(states) is states
    for task in ("tagging", "question-answering"):
        plan = read_plan(head_model(task) / "model.onnx")
        assert narrowed(plan) is plan
    assert narrow_names(mean) == frozenset()


def test_narrow_layers_are_those_of_the_last_layer_that_read_chosen_states(tiny_model, head_model):
    last = "encoder.layer.1."
    cls = narrowed(dataclasses.replace(read_plan(tiny_model / "model.onnx"), pooling="cls"))
    few = narrow_names(cls)
    assert few == {
        name
        for name in linear_names_of(cls)
        if name.startswith(last) and "key" not in name and "value" not in name
    }
    masks = narrow_names(narrowed(read_plan(head_model("fill-mask") / "model.onnx")))
    assert masks == few - {f"{last}attention.self.query"}


def linear_names_of(plan):
    from qingyu.models.export.graph import linear_shapes

    sizes = plan.architecture
    return [name for layer in range(sizes.layers) for name in linear_shapes(sizes, layer)]
