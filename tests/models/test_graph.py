"""The written graph computes what transformers and sentence-transformers compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import GraphError
from qingyu.models.export import export
from qingyu.models.export.checkpoint import read_checkpoint
from qingyu.models.export.graph import (
    FloatLinear,
    FoldedWeights,
    linear_shapes,
    read_plan,
    read_weights,
    write_graph,
)
from qingyu.models.export.pooling import POOLINGS

POOLING_NAMES = {
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean",
    "last": "lasttoken",
}


def reference_states(torch, model, ids, mask):
    """Every hidden state of a transformers model, as a list of arrays."""
    with torch.no_grad():
        result = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
        )
    return [state.numpy() for state in result.hidden_states]


def load(torch, transformers, folder):
    return transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False, attn_implementation="eager"
    ).eval()


def assert_same_states(actual, expected, mask, limit=1e-5):
    difference = np.abs(actual - expected) * mask[:, :, None]
    assert difference.max() <= limit, f"largest difference {difference.max():.2e}"


def test_the_real_e5_equals_transformers_in_every_hidden_state(
    torch, transformers, shared_models, tmp_path, run_graph, random_batch
):
    source = shared_models / "multilingual-e5-small-zh"
    export(source, tmp_path / "e5", hidden_states=True)
    ids, mask = random_batch((64, 17, 3, 40), vocabulary=34_340, padding=1)
    outputs = run_graph(tmp_path / "e5", ids, mask)
    expected = reference_states(torch, load(torch, transformers, source), ids, mask)
    assert list(outputs) == ["token_states", "pooled", *(f"hidden_state_{n}" for n in range(13))]
    for number, state in enumerate(expected):
        assert_same_states(outputs[f"hidden_state_{number}"], state, mask)
    assert_same_states(outputs["token_states"], expected[-1], mask)


def random_model(torch, transformers, config):
    """A model whose every parameter is random, LayerNorm and biases too; nothing may hide behind 0 and 1.

    The spread is twice that of a fresh BERT. At 0.05 the twelve layers of 768 differ by 1.1e-5 between two FP32
    implementations through rounding alone: either is 5e-6 to 7e-6 away from the same model in float64.
    """
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(config, add_pooling_layer=False, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + 0.04 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("name", ["bge-small-zh-v1.5", "bert-base-chinese"])
def test_random_weights_of_a_true_shape_equal_transformers(
    name, torch, transformers, shared_models, tmp_path, run_graph, random_batch
):
    source, folder = shared_models / name, tmp_path / name
    model = random_model(torch, transformers, transformers.AutoConfig.from_pretrained(source))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    export(folder, tmp_path / "model")
    ids, mask = random_batch((48, 9, 1), vocabulary=21_128)
    expected = reference_states(torch, model, ids, mask)[-1]
    assert_same_states(run_graph(tmp_path / "model", ids, mask)["token_states"], expected, mask)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta_counts_positions_over_tokens_that_are_not_padding(
    model_type, torch, transformers, make_checkpoint, tmp_path, run_graph, random_batch
):
    config = {"model_type": model_type, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    folder = make_checkpoint(config={**config, "layer_norm_eps": 1e-5}, prefix="roberta.")
    export(folder, tmp_path / "model", hidden_states=True)
    ids, mask = random_batch((30, 7, 38), vocabulary=60, padding=1)
    ids[0, 5] = 1  # a padding token that was typed: it has position 1 and the next token continues the count
    outputs = run_graph(tmp_path / "model", ids, mask)
    expected = reference_states(torch, load(torch, transformers, folder), ids, mask)
    for number, state in enumerate(expected):
        assert_same_states(outputs[f"hidden_state_{number}"], state, mask)


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu", "silu", "swish", "tanh"]
)
def test_every_activation_equals_transformers(
    activation, torch, transformers, make_checkpoint, tmp_path, run_graph, random_batch
):
    folder = make_checkpoint(config={"hidden_act": activation})
    export(folder, tmp_path / "model")
    ids, mask = random_batch((20, 5), vocabulary=60)
    expected = reference_states(torch, load(torch, transformers, folder), ids, mask)[-1]
    assert_same_states(run_graph(tmp_path / "model", ids, mask)["token_states"], expected, mask)


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_pooling_equals_sentence_transformers(
    pooling, torch, sentence_transformers, make_checkpoint, tmp_path, run_graph, random_batch
):
    from sentence_transformers.sentence_transformer.modules import Pooling

    export(make_checkpoint(), tmp_path / "model", pooling=pooling)
    ids, mask = random_batch((12, 1, 30, 7), vocabulary=60)
    outputs = run_graph(tmp_path / "model", ids, mask)
    features = {
        "token_embeddings": torch.tensor(outputs["token_states"]),
        "attention_mask": torch.tensor(mask),
    }
    module = Pooling(16, pooling_mode=POOLING_NAMES.get(pooling, pooling))
    expected = module(features)["sentence_embedding"].numpy()
    np.testing.assert_allclose(outputs["pooled"], expected, atol=2e-6)


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_a_vector_does_not_depend_on_its_padding(pooling, make_checkpoint, tmp_path, run_graph, random_batch):
    export(make_checkpoint(), tmp_path / "model", pooling=pooling)
    ids, mask = random_batch((5, 40), vocabulary=60)
    together = run_graph(tmp_path / "model", ids, mask)
    alone = run_graph(tmp_path / "model", ids[:1, :5], mask[:1, :5])
    np.testing.assert_allclose(together["pooled"][:1], alone["pooled"], atol=1e-6)
    np.testing.assert_allclose(together["token_states"][:1, :5], alone["token_states"], atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter(make_checkpoint, tmp_path, run_graph, random_batch):
    export(make_checkpoint(), tmp_path / "model")
    ids, mask = random_batch((5, 40), vocabulary=60)
    other = np.where(mask == 1, ids, 17)
    first, second = (run_graph(tmp_path / "model", each, mask)["pooled"] for each in (ids, other))
    np.testing.assert_array_equal(first, second)


def test_only_standard_operators_are_used_and_the_checker_accepts_the_graph(make_checkpoint, tmp_path):
    import onnx

    export(make_checkpoint(), tmp_path / "model", hidden_states=True)
    model = onnx.load(tmp_path / "model" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 10


def test_initializers_carry_the_names_of_the_checkpoint_and_no_constant_is_stored_twice(
    make_checkpoint, tmp_path
):
    import onnx

    export(make_checkpoint(), tmp_path / "model", pooling="weighted_mean")
    tensors = onnx.load(tmp_path / "model" / "model.onnx").graph.initializer
    names = [tensor.name for tensor in tensors]
    assert "encoder.layer.0.attention.self.query.weight" in names
    assert len(set(names)) == len(names)
    constants = [
        (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        for tensor in tensors
        if "." not in tensor.name
    ]
    assert len(set(constants)) == len(constants)


def test_a_graph_read_back_is_written_again_byte_by_byte(make_checkpoint, tmp_path):
    spec = export(make_checkpoint(), tmp_path / "model", hidden_states=True, pooling="last")
    path = tmp_path / "model" / "model.onnx"
    plan = read_plan(path)
    assert (plan.architecture, plan.pooling, plan.hidden_states) == (spec.architecture, "last", True)
    assert write_graph(plan, read_weights(path), FloatLinear()) == path.read_bytes()


def test_folding_turns_linear_weights_and_scales_the_query(make_checkpoint):
    source = read_checkpoint(make_checkpoint())
    folded = FoldedWeights(source.architecture, source.weights)
    name = "encoder.layer.1.attention.self.{}.weight"
    np.testing.assert_array_equal(folded[name.format("key")], source.weights[name.format("key")].T)
    np.testing.assert_array_equal(folded[name.format("query")], source.weights[name.format("query")].T / 2)
    types = source.weights["embeddings.token_type_embeddings.weight"]
    positions = source.weights["embeddings.position_embeddings.weight"]
    np.testing.assert_array_equal(folded["embeddings.position_embeddings.weight"], positions + types[0])
    assert "embeddings.token_type_embeddings.weight" not in folded


class Recorder(FloatLinear):
    """A linear writer that notes what it is asked for."""

    def __init__(self):
        self.prepared, self.applied, self.tables = [], [], []

    def prepare(self, graph, activation, names):
        self.prepared.append(names)
        return super().prepare(graph, activation, names)

    def apply(self, graph, prepared, name, weight, bias):
        self.applied.append((name, weight.shape, bias.shape))
        return super().apply(graph, prepared, name, weight, bias)

    def lookup(self, graph, name, table, select):
        self.tables.append(name)
        return super().lookup(graph, name, table, select)


def test_a_linear_writer_sees_every_product_and_prepares_four_activations_a_layer(make_checkpoint, tmp_path):
    export(make_checkpoint(), tmp_path / "model")
    path, recorder = tmp_path / "model" / "model.onnx", Recorder()
    plan = read_plan(path)
    write_graph(plan, read_weights(path), recorder)
    expected = {
        name: shape for layer in range(2) for name, shape in linear_shapes(plan.architecture, layer).items()
    }
    assert {name: shape for name, shape, _ in recorder.applied} == expected
    assert all(bias == shape[1:] for _, shape, bias in recorder.applied)
    assert len(recorder.prepared) == 2 * 4  # query, key and value share one
    assert sorted(name for names in recorder.prepared for name in names) == sorted(expected)
    assert sorted(recorder.tables) == ["embeddings.position_embeddings", "embeddings.word_embeddings"]


def test_progress_counts_layers(make_checkpoint, tmp_path):
    seen = []
    export(make_checkpoint(), tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_foreign_graph_is_refused(tmp_path):
    import onnx

    path = tmp_path / "other.onnx"
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(GraphError, match=r"a graph with the metadata qingyu\.plan, found none"):
        read_weights(path)
    with pytest.raises(GraphError, match="qingyu export"):
        read_plan(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\xff" * 99])
def test_a_file_that_is_no_graph_is_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match="is not a graph that this can read"):
        read_weights(path)


def test_a_graph_whose_weights_are_not_fp32_is_refused(make_checkpoint, tmp_path):
    import onnx

    export(make_checkpoint(), tmp_path / "model")
    model = onnx.load(tmp_path / "model" / "model.onnx")
    for tensor in list(model.graph.initializer):
        if tensor.name == "encoder.layer.1.output.dense.weight":
            model.graph.initializer.remove(tensor)
    path = Path(tmp_path / "broken.onnx")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        GraphError, match=r"encoder\.layer\.1\.output\.dense\.weight of shape \(24, 16\), found no such"
    ):
        read_weights(path)
