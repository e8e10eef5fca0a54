"""Quantized graphs leave out what no result is made of, and lose no more than whole ones."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import FallbackWarning
from qingyu.models.export import export
from qingyu.models.export.graph import narrowed, read_plan, read_weights
from qingyu.quantize import quantize
from qingyu.quantize.recipes import RECIPES, write_quantized
from qingyu.quantize.statistics import collect
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import import_onnxruntime, product_entries, session_options
from qingyu.runtime.spec import read_spec

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", "人工智能正在改变医疗和教育" * 3]


@pytest.fixture(scope="module")
def cls_model(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cls") / "model"
    export(tiny_checkpoint, folder, pooling="cls")
    return folder


def vectors(graph, rows):
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=1, entries=product_entries("int8"))
    session = onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )
    batch = TokenBatch.pad(rows, 0)
    return session.run(["pooled"], {"input_ids": batch.ids, "attention_mask": batch.mask})[0]


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_narrow_graph_loses_no_more_by_any_recipe_and_mixes_no_rows(name, cls_model):
    path = cls_model / "model.onnx"
    plan, weights = read_plan(path), read_weights(path)
    found = collect(cls_model, TEXTS)
    random = np.random.default_rng(0)
    rows = [random.integers(5, 90, length) for length in (31, 5, 12, 1, 20, 8)]
    wanted = vectors(path.read_bytes(), rows)
    whole, narrow = (
        write_quantized(RECIPES[name], each, weights, statistics=found) for each in (plan, narrowed(plan))
    )
    lost = [1 - cosines(wanted, vectors(graph, rows)).mean() for graph in (whole, narrow)]
    assert lost[1] <= 1.2 * lost[0] + 1e-7
    assert len(narrow) <= 1.1 * len(whole)
    if name != "dynamic":
        alone = np.concatenate([vectors(narrow, [row]) for row in rows])
        assert cosines(alone, vectors(narrow, rows)).min() >= 0.9999999


def test_a_folder_with_cls_pooling_names_what_its_graph_gives_and_opens_everywhere(cls_model, tmp_path):
    spec = quantize(cls_model, tmp_path / "int8", texts=TEXTS, edge=True, fallback=True, speed_rounds=0).spec
    assert (read_spec(cls_model).outputs, spec.outputs) == (("token_states", "pooled"), ("pooled",))
    with Embedder.open(cls_model) as model:
        wanted = model.embed(TEXTS)
    for profile in ("throughput", "edge"):
        with Embedder.open(tmp_path / "int8", profile=profile) as model:
            assert model.self_check().result == "passed"
            assert (wanted * model.embed(TEXTS)).sum(1).min() > 0.999


def test_the_fallback_of_a_narrow_graph_gives_the_vectors_of_fp32(cls_model, tmp_path):
    quantize(cls_model, tmp_path / "int8", texts=TEXTS, fallback=True, speed_rounds=0)
    manifest = tmp_path / "int8" / "qingyu.json"
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["golden"]["least_cosine"] = 0.99999  # which 8 bits do not reach
    manifest.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    with Embedder.open(cls_model) as model:
        wanted = model.embed(TEXTS)
    with Embedder.open(tmp_path / "int8") as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert (wanted * model.embed(TEXTS)).sum(1).min() > 0.9999999
        assert model.self_check().result == "fallback"
