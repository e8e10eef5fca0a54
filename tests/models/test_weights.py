"""Weights come out of safetensors as exact float32, and out of nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qingyu.errors import CheckpointError
from qingyu.models.export import export
from qingyu.models.export.checkpoint import read_checkpoint
from qingyu.models.export.weights import open_weights

safetensors = pytest.importorskip("safetensors.numpy", reason="writes checkpoints")

QUERY = "encoder.layer.0.attention.self.query.weight"


def rewrite(folder, change):
    """Rewrite model.safetensors with what ``change`` makes of its tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    safetensors.save_file(change(tensors), path)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "float32"])
def test_every_precision_equals_the_float_of_torch(kind, torch, tmp_path):
    from safetensors.torch import save_file

    values = torch.randn(37, 5, generator=torch.Generator().manual_seed(1))
    tricky = torch.tensor([0.0, -0.0, 1e-7, 6e4, -6e4, 1 / 3]).repeat(2, 1)
    tensors = {"first": values.to(getattr(torch, kind)), "second": tricky.to(getattr(torch, kind))}
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_weights(tmp_path)
    for name, tensor in tensors.items():
        assert read[name].dtype == np.float32
        assert read[name].tobytes() == tensor.float().numpy().tobytes()
        assert read.shape(name) == tuple(tensor.shape)


def test_shards_are_read_through_their_index(make_checkpoint):
    folder = make_checkpoint()
    whole = dict(open_weights(folder))
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        safetensors.save_file({name: whole[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    sharded = open_weights(folder)
    assert sorted(sharded) == names
    assert all(np.array_equal(sharded[name], whole[name]) for name in names)


def test_shards_that_transformers_wrote_are_read(torch, transformers, make_checkpoint, tmp_path):
    folder = make_checkpoint()
    model = transformers.AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded, whole = open_weights(tmp_path / "sharded"), open_weights(folder)
    assert set(whole) <= set(sharded)
    assert all(np.array_equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_names_with_and_without_the_prefix_of_a_task_head_give_the_same_graph(
    prefix, make_checkpoint, tmp_path
):
    export(make_checkpoint("plain"), tmp_path / "expected")
    folder = make_checkpoint("headed", prefix=prefix)
    rewrite(folder, lambda tensors: {**tensors, "cls.predictions.bias": np.zeros(3, np.float32)})
    export(folder, tmp_path / "model")
    expected = (tmp_path / "expected" / "model.onnx").read_bytes()
    assert (tmp_path / "model" / "model.onnx").read_bytes() == expected


def test_the_gamma_and_beta_of_old_checkpoints_are_weight_and_bias(make_checkpoint, tmp_path):
    export(make_checkpoint("plain"), tmp_path / "expected")
    folder = make_checkpoint("old", prefix="bert.")

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, lambda tensors: {old(name): value for name, value in tensors.items()})
    export(folder, tmp_path / "model")
    expected = (tmp_path / "expected" / "model.onnx").read_bytes()
    assert (tmp_path / "model" / "model.onnx").read_bytes() == expected


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "bert.ckpt", "tf_model.h5", "pytorch_model-00001-of-00002.bin"]
)
def test_a_pickle_is_refused_unopened_with_the_way_out(name, make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert "holds weights only in a format that can run code when opened" in str(caught.value)
    assert f"expected model.safetensors, found {name}" in str(caught.value)
    assert "save_pretrained('OUT')" in caught.value.remedy


def test_a_pickle_beside_safetensors_is_left_alone(make_checkpoint):
    folder = make_checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert QUERY in read_checkpoint(folder).weights


def test_a_folder_without_weights_lists_what_it_holds(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*, found config\.json"):
        read_checkpoint(folder)


def test_a_missing_tensor_is_named(make_checkpoint):
    folder = make_checkpoint()
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if name != QUERY})
    with pytest.raises(CheckpointError, match=rf"weight {QUERY}: expected shape \(16, 16\), found no such"):
        read_checkpoint(folder)


def test_a_tensor_of_another_shape_is_named(make_checkpoint):
    folder = make_checkpoint()
    rewrite(folder, lambda tensors: {**tensors, QUERY: tensors[QUERY][:, :8].copy()})
    with pytest.raises(
        CheckpointError, match=rf"weight {QUERY}: expected shape \(16, 16\), found shape \(16, 8\)"
    ):
        read_checkpoint(folder)


def test_token_types_of_another_width_are_refused(make_checkpoint):
    folder, name = make_checkpoint(), "embeddings.token_type_embeddings.weight"
    rewrite(folder, lambda tensors: {**tensors, name: np.zeros((2, 9), np.float32)})
    with pytest.raises(
        CheckpointError, match=rf"weight {name}: expected shape \(types, 16\), found shape \(2, 9\)"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_left(value, make_checkpoint, tmp_path):
    folder = make_checkpoint()

    def spoil(tensors):
        tensors[QUERY][3, 4] = value
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=rf"tensor {QUERY}: expected finite numbers"):
        export(folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_integer_weights_are_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    rewrite(folder, lambda tensors: {**tensors, QUERY: tensors[QUERY].astype(np.int8)})
    with pytest.raises(CheckpointError, match=r"expected a type among F32, F16, BF16, F64, found 'I8'"):
        export(folder, tmp_path / "model")


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text", "huge header"])
def test_a_damaged_file_is_one_error(damage, make_checkpoint):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "truncated": whole[:-100],
        "header": whole[:8] + b"\xff" * 64 + whole[72:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "huge header": b"\xff" * 8 + whole[8:],
    }
    path.write_bytes(contents[damage])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"]
)
def test_an_index_cannot_name_a_file_outside_its_folder(name, make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QUERY: name}}))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, {QUERY: 3}, {QUERY: "model.bin"}, [1]])
def test_an_index_without_safetensors_names_is_refused(weight_map, make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="field 'weight_map'"):
        read_checkpoint(folder)


def test_a_missing_shard_is_named(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QUERY: "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names a missing file: expected a\.safetensors"):
        read_checkpoint(folder)
