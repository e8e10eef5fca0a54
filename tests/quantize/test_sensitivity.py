"""Sensitive layers are found by measuring."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from qingyu.errors import InputError, InvalidOptionError
from qingyu.models.export.graph import FloatLinear, read_plan, read_weights, write_graph
from qingyu.quantize.inputs import linear_names
from qingyu.quantize.recipes import RECIPES
from qingyu.quantize.sensitivity import sensitive_layers
from qingyu.quantize.statistics import collect
from qingyu.quantize.texts import calibration_texts
from qingyu.runtime.spec import FileRecord, read_spec, sha256_of

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码"]
WORST = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def lopsided(tiny_model, tmp_path_factory):
    """The tiny model with a layer that blocks of weights store badly: one weight in each block is 50 times as large."""
    folder = tmp_path_factory.mktemp("lopsided") / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "model.onnx"
    weights = dict(read_weights(path))
    wide = weights[f"{WORST}.weight"].copy()
    wide[3] = 50 * np.abs(wide).max() * np.where(np.arange(wide.shape[1]) % 2, 1, -1)
    norm = "encoder.layer.1.attention.output.LayerNorm"
    weights[f"{WORST}.weight"] = wide
    for kind in ("weight", "bias"):  # what the large weights read is 0, so in FP32 they do not matter
        weights[f"{norm}.{kind}"] = np.where(np.arange(32) == 3, 0, weights[f"{norm}.{kind}"]).astype(
            np.float32
        )
    path.write_bytes(write_graph(read_plan(path), weights, FloatLinear()))
    spec = read_spec(folder)
    record = FileRecord(path.stat().st_size, sha256_of(path))
    spec = dataclasses.replace(spec, files={**spec.files, "model.onnx": record})
    (folder / "qingyu.json").write_text(spec.to_json(), encoding="utf-8")
    return folder


def test_the_layer_that_is_stored_badly_comes_first(lopsided):
    found = sensitive_layers(lopsided, RECIPES["weights-4"], None, texts=TEXTS)
    assert found[0][0] == WORST
    assert found[0][1] > 3 * found[1][1]
    assert sorted(name for name, _ in found) == sorted(linear_names(read_plan(lopsided / "model.onnx")))
    gains = [gain for _, gain in found]
    assert gains == sorted(gains, reverse=True)


def test_query_key_and_value_have_the_same_gain_and_stand_together(tiny_model):
    found = sensitive_layers(
        tiny_model, RECIPES["rowwise"], collect(tiny_model, calibration_texts(16)), texts=TEXTS
    )
    names = [name.rpartition(".")[2] for name, _ in found]
    first = names.index("query")
    assert names[first : first + 3] == ["query", "key", "value"]
    assert len({gain for _, gain in found[first : first + 3]}) == 1


def test_ranks_are_repeatable_and_progress_ends_with_all_groups(tiny_model):
    calls = []
    run = [
        sensitive_layers(
            tiny_model, RECIPES["dynamic"], None, texts=TEXTS, progress=lambda *c: calls.append(c)
        )
        for _ in range(2)
    ]
    assert run[0] == run[1]
    assert calls == [(n, 8) for n in range(1, 9)] * 2


def test_what_cannot_be_measured_is_refused(tiny_model):
    with pytest.raises(InputError, match="too few texts"):
        sensitive_layers(tiny_model, RECIPES["dynamic"], None, texts=["雨"])
    with pytest.raises(InvalidOptionError, match="recipe rowwise: expected statistics"):
        sensitive_layers(tiny_model, RECIPES["rowwise"], None, texts=TEXTS)
