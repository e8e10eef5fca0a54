"""Checkpoints made of model folders: the same vectors, from FP32 and from INT8."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import CorruptFileError, OutputError, UnsupportedModelError
from qingyu.models.adapt import unpack
from qingyu.models.export import export

TEXTS = ["今天天气真好", "外面阳光明媚，怎么修改登录密码？", "股票大跌", "ai2 在中国"]


def vectors(folder):
    with Embedder.open(folder) as embedder:
        return embedder.embed(TEXTS)


def unpacked(model, tmp_path):
    unpack(model, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again")
    return tmp_path / "again"


def test_an_fp32_folder_gives_a_checkpoint_with_its_vectors(tiny_model, tmp_path):
    assert np.abs(vectors(unpacked(tiny_model, tmp_path)) - vectors(tiny_model)).max() <= 1e-5


def test_an_int8_folder_gives_a_checkpoint_of_its_weights(tiny_int8, tmp_path):
    """What is left is the rounding of activations, which is less than that of both against FP32."""
    cosines = (vectors(unpacked(tiny_int8, tmp_path)) * vectors(tiny_int8)).sum(axis=1)
    assert cosines.min() >= 0.9995


def test_a_narrow_graph_gives_the_keys_and_values_that_it_keeps_by_head(tiny_checkpoint, tmp_path):
    from qingyu.quantize import quantize

    export(tiny_checkpoint, tmp_path / "fp32", pooling="cls")
    spec = quantize(tmp_path / "fp32", tmp_path / "int8", texts=TEXTS, speed_rounds=0).spec
    assert spec.outputs == ("pooled",)
    cosines = (vectors(unpacked(tmp_path / "int8", tmp_path)) * vectors(tmp_path / "int8")).sum(axis=1)
    assert cosines.min() >= 0.9995


def test_the_bundled_model_comes_back_with_tokenizer_prompts_and_pooling(tmp_path):
    again = unpacked("qingyu-mini-zh", tmp_path)
    with Embedder.open() as before, Embedder.open(again) as after:
        assert after.spec.architecture == before.spec.architecture
        assert after.spec.source.license == before.spec.source.license == "apache-2.0"
        for name in ("pooling", "normalize", "max_tokens", "prompts", "default_prompt"):
            assert getattr(after.spec, name) == getattr(before.spec, name)
        assert after.tokenize("用 Python 读 CSV") == before.tokenize("用 Python 读 CSV")
        assert (after.embed(TEXTS) * before.embed(TEXTS)).sum(axis=1).min() >= 0.999


def test_the_checkpoint_is_one_of_sentence_transformers(tiny_model, tmp_path):
    reference = pytest.importorskip("sentence_transformers")
    unpack(tiny_model, tmp_path / "checkpoint")
    model = reference.SentenceTransformer(str(tmp_path / "checkpoint"), device="cpu")
    assert np.abs(model.encode(TEXTS) - vectors(tiny_model)).max() <= 1e-5


def test_a_recipe_that_stores_weights_otherwise_is_refused(tiny_model, tmp_path):
    from qingyu.quantize import quantize

    quantize(tiny_model, tmp_path / "blocks", texts=TEXTS, recipe="weights-8", speed_rounds=0)
    with pytest.raises(UnsupportedModelError, match="cannot be unpacked"):
        unpack(tmp_path / "blocks", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_recipe_that_divides_activations_is_refused(tiny_model, tmp_path):
    """Its weights hold factors that only the graph takes back."""
    from qingyu.quantize import quantize

    quantize(tiny_model, tmp_path / "static", texts=TEXTS, recipe="static", speed_rounds=0)
    with pytest.raises(UnsupportedModelError, match="scales other activations"):
        unpack(tmp_path / "static", tmp_path / "checkpoint")


def test_the_dynamic_recipe_is_unpacked_too(tiny_model, tmp_path):
    from qingyu.quantize import quantize

    quantize(tiny_model, tmp_path / "dynamic", texts=TEXTS, recipe="dynamic", speed_rounds=0)
    again = unpacked(tmp_path / "dynamic", tmp_path)
    assert (vectors(again) * vectors(tmp_path / "dynamic")).sum(axis=1).min() >= 0.995


def test_a_model_with_a_head_is_refused(head_model, tmp_path):
    with pytest.raises(UnsupportedModelError, match="an embedding model"):
        unpack(head_model("fill-mask"), tmp_path / "checkpoint")


def test_a_damaged_graph_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    graph = tmp_path / "model" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[-100] ^= 1
    graph.write_bytes(data)
    with pytest.raises(CorruptFileError):
        unpack(tmp_path / "model", tmp_path / "checkpoint")


def test_a_folder_with_files_in_it_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("mine")
    with pytest.raises(OutputError):
        unpack(tiny_model, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "mine").read_text() == "mine"
