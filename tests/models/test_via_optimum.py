"""Export through optimum keeps the contract, and agrees with the graph writer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from qingyu.errors import InvalidOptionError, UnsupportedModelError
from qingyu.models.export import export

pytest.importorskip("optimum.exporters.onnx", reason="exports through optimum")

pytestmark = pytest.mark.usefixtures("transformers")


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"])
def test_both_ways_give_the_same_outputs(pooling, make_checkpoint, tmp_path, run_graph, random_batch):
    folder = make_checkpoint()
    specs = [export(folder, tmp_path / via, via=via, pooling=pooling) for via in ("writer", "optimum")]
    assert specs[0].architecture == specs[1].architecture
    assert (specs[0].inputs, specs[0].outputs, specs[0].dim) == (
        specs[1].inputs,
        specs[1].outputs,
        specs[1].dim,
    )
    ids, mask = random_batch((20, 1, 9), vocabulary=60)
    ours, theirs = (run_graph(tmp_path / via, ids, mask) for via in ("writer", "optimum"))
    assert list(ours) == list(theirs) == ["token_states", "pooled"]
    np.testing.assert_allclose(theirs["pooled"], ours["pooled"], atol=1e-5)
    difference = np.abs(ours["token_states"] - theirs["token_states"]) * mask[:, :, None]
    assert difference.max() <= 1e-5


OTHERS = {
    "electra": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}


@pytest.mark.parametrize("model_type", list(OTHERS))
def test_an_architecture_that_the_writer_refuses_equals_transformers(
    model_type, torch, transformers, make_checkpoint, tmp_path, run_graph, random_batch
):
    plain, folder = make_checkpoint("plain"), tmp_path / model_type
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=123, max_position_embeddings=40, initializer_range=0.3, **OTHERS[model_type]
    )
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    shutil.copy(plain / "vocab.txt", folder)
    with pytest.raises(UnsupportedModelError, match="qingyu export --via optimum"):
        export(folder, tmp_path / "model")
    spec = export(folder, tmp_path / "model", via="optimum")
    assert (spec.architecture.model_type, spec.architecture.layers, spec.max_tokens) == (model_type, 2, 40)
    ids, mask = random_batch((20, 1, 9), vocabulary=123)
    outputs = run_graph(tmp_path / "model", ids, mask)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()
    assert (np.abs(outputs["token_states"] - states) * mask[:, :, None]).max() <= 1e-5
    mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(outputs["pooled"], mean, atol=1e-5)


def test_an_architecture_that_optimum_refuses_is_one_error(make_checkpoint, tmp_path):
    folder = make_checkpoint(config={"model_type": "no-such-model"})
    with pytest.raises(UnsupportedModelError, match="cannot be exported via optimum"):
        export(folder, tmp_path / "model", via="optimum")
    assert not (tmp_path / "model").exists()


def test_hidden_states_are_refused(make_checkpoint, tmp_path):
    with pytest.raises(InvalidOptionError, match="hidden_states"):
        export(make_checkpoint(), tmp_path / "model", via="optimum", hidden_states=True)
