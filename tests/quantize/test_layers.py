from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import GraphError, MismatchError
from qingyu.quantize.layers import LayerError, graph_with_hidden_states, layer_errors, single_batches
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import TokenBatch

TEXTS = ["今天天气真好", "我们看电影，你听音乐吗？", "股票大跌"]

onnx = pytest.importorskip("onnx")


class Shifted:
    """A linear writer whose weights in the layers named are doubled; everywhere else it is exact."""

    def __init__(self, prefix: str) -> None:
        from qingyu.models.export.graph import FloatLinear

        self._exact, self._prefix = FloatLinear(), prefix
        self.prepare, self.lookup = self._exact.prepare, self._exact.lookup

    def apply(self, graph, prepared, name, weight, bias):
        return self._exact.apply(graph, prepared, name, weight * (2 if self._prefix in name else 1), bias)


def batch() -> TokenBatch:
    return TokenBatch.pad([np.array([2, 9, 8, 7, 3]), np.array([2, 11, 3])], pad_id=0)


def states(graph: bytes, tokens: TokenBatch) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [f"hidden_state_{n}" for n in range(3)]
    return session.run(names, {"input_ids": tokens.ids, "attention_mask": tokens.mask})


def test_a_graph_against_itself_has_no_error(tiny_model: Path) -> None:
    graph = graph_with_hidden_states(tiny_model / "model.onnx")
    found = layer_errors(graph, graph, [batch()])
    assert [error.layer for error in found] == [0, 1, 2]
    assert all(error.relative_error == 0.0 for error in found)
    assert all(error.cosine_minimum == pytest.approx(1.0, abs=1e-12) for error in found)


def test_the_last_state_is_that_of_the_model_folder(tiny_model: Path) -> None:
    tokens = batch()
    with Embedder.open(tiny_model) as model:
        expected = model._engine.run(tokens, ("token_states",))[0]
    last = states(graph_with_hidden_states(tiny_model / "model.onnx"), tokens)[-1]
    np.testing.assert_allclose(last, expected, atol=1e-5)


def test_errors_begin_at_the_layer_that_errs(tiny_model: Path) -> None:
    path = tiny_model / "model.onnx"
    exact, wrong = graph_with_hidden_states(path), graph_with_hidden_states(path, Shifted("layer.1."))
    found = layer_errors(exact, wrong, [batch()])
    assert [error.relative_error == 0.0 for error in found] == [True, True, False]
    assert found[2].cosine_minimum < found[2].cosine_mean < 1.0


def test_figures_are_those_of_the_tokens_without_padding(tiny_model: Path) -> None:
    path, tokens = tiny_model / "model.onnx", batch()
    graphs = graph_with_hidden_states(path), graph_with_hidden_states(path, Shifted("layer.0."))
    a, b = (states(graph, tokens)[2][tokens.mask == 1].astype(np.float64) for graph in graphs)
    assert len(a) == 8
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = layer_errors(*graphs, [tokens])[2]
    assert found.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
    assert found.cosine_mean == pytest.approx(cosines.mean(), rel=1e-5)
    assert found.cosine_minimum == pytest.approx(cosines.min(), rel=1e-5)


def test_batches_add_up(tiny_model: Path) -> None:
    path = tiny_model / "model.onnx"
    graphs = graph_with_hidden_states(path), graph_with_hidden_states(path, Shifted("layer.0."))
    with Embedder.open(tiny_model) as model:
        apart = list(single_batches(model, TEXTS))
        assert [b.mask.sum() for b in apart] == [b.ids.size for b in apart]  # nothing is padded
        together = TokenBatch.pad([b.ids[0] for b in apart], pad_id=0)
    for one, other in zip(layer_errors(*graphs, apart), layer_errors(*graphs, [together]), strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, abs=1e-5)
        assert one.cosine_minimum == pytest.approx(other.cosine_minimum, abs=1e-5)


def test_no_batch_gives_no_figures(tiny_model: Path) -> None:
    graph = graph_with_hidden_states(tiny_model / "model.onnx")
    assert layer_errors(graph, graph, []) == []


def test_a_quantized_graph_is_measured_against_fp32(tiny_model: Path) -> None:
    from qingyu.quantize.integer import MICROSOFT, IntegerLinear

    path = tiny_model / "model.onnx"
    rowwise = IntegerLinear(
        dict.fromkeys(("attention", "context", "intermediate", "output"), "row"), ranges={}
    )
    int8 = graph_with_hidden_states(path, rowwise, domains=(MICROSOFT,))
    found = layer_errors(graph_with_hidden_states(path), int8, [batch()])
    assert all(0 < error.relative_error < 0.1 for error in found)
    assert all(isinstance(error, LayerError) for error in found)


def test_graphs_without_hidden_states_are_refused(tiny_model: Path) -> None:
    path = tiny_model / "model.onnx"
    with pytest.raises(GraphError, match="a graph has no hidden states: expected outputs hidden_state_0"):
        layer_errors(graph_with_hidden_states(path), path.read_bytes(), [batch()])


def test_graphs_of_different_depth_are_refused(tiny_model: Path) -> None:
    graph = graph_with_hidden_states(tiny_model / "model.onnx")
    model = onnx.load_from_string(graph)
    del model.graph.output[-1]
    with pytest.raises(MismatchError, match="expected 3 hidden states, found 2"):
        layer_errors(graph, model.SerializeToString(), [batch()])


def test_bytes_that_are_no_graph_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    graph = graph_with_hidden_states(tiny_model / "model.onnx")
    with pytest.raises(GraphError):
        layer_errors(graph, b"not a graph", [batch()])
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(GraphError, match="is not a graph that this can read"):
        graph_with_hidden_states(tmp_path / "model.onnx")
