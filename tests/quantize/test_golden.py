from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import FidelityError, InvalidOptionError
from qingyu.quantize import golden as module
from qingyu.quantize.golden import GOLDEN_TEXTS, make_golden
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import MANIFEST, ModelSpec, decode_vector


def test_the_vectors_are_those_of_the_fp32_model(tiny_model: Path, tiny_int8: Path) -> None:
    with Embedder.open(tiny_model) as fp32, Embedder.open(tiny_int8) as int8:
        golden = make_golden(int8, fp32)
        with pytest.warns(match="unknown"):
            expected = np.concatenate([fp32.embed(text) for text in golden.texts])
    found = [decode_vector(vector, fp32.dim) for vector in golden.vectors]
    assert golden.texts == GOLDEN_TEXTS
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_four_times_the_loss_of_quantization_is_allowed(
    tiny_model: Path, tiny_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_ALLOWED", 0.0)
    with Embedder.open(tiny_model) as fp32, Embedder.open(tiny_int8) as int8:
        golden = make_golden(int8, fp32)
        with pytest.warns(match="unknown"):
            pairs = [(int8.embed(text)[0], fp32.embed(text)[0]) for text in golden.texts]
    distance = max(1 - float(a.astype(np.float64) @ b) for a, b in pairs)
    assert 1 - golden.least_cosine == pytest.approx(4 * distance, rel=0.02)


def test_a_model_passes_its_own_golden_texts(tiny_model: Path, tiny_int8: Path, tmp_path: Path) -> None:
    import shutil

    with Embedder.open(tiny_model) as fp32, Embedder.open(tiny_int8) as int8:
        spec = dataclasses.replace(int8.spec, golden=make_golden(int8, fp32))
    shutil.copytree(tiny_int8, tmp_path / "model")
    (tmp_path / "model" / MANIFEST).write_text(spec.to_json(), encoding="utf-8")
    assert ModelSpec.from_json(spec.to_json()) == spec
    with Embedder.open(tmp_path / "model") as embedder:
        found = embedder.self_check()
    assert found.result == "passed"
    assert min(found.cosines) < 0.99999  # it is INT8 that was compared with FP32


def test_an_fp32_model_may_be_its_own_reference(tiny_model: Path) -> None:
    with Embedder.open(tiny_model) as model:
        assert make_golden(model, model).least_cosine == 0.9995


def test_a_model_far_from_fp32_has_none(
    tiny_model: Path, tiny_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALLOWANCE", 1e6)
    with (
        Embedder.open(tiny_model) as fp32,
        Embedder.open(tiny_int8) as int8,
        pytest.raises(FidelityError, match="too far from FP32"),
    ):
        make_golden(int8, fp32)


def test_the_texts_differ_in_length_and_nfkc_leaves_them_alone() -> None:
    lengths = [len(text) for text in GOLDEN_TEXTS]
    assert lengths == sorted(set(lengths))
    assert all(unicodedata.normalize("NFKC", text) == text for text in GOLDEN_TEXTS)


@pytest.mark.parametrize("texts", [[], ["轻语"] * 17, ["你好，世界"], ["[MASK]"]])
def test_texts_that_cannot_be_used_are_refused(tiny_model: Path, texts: list[str]) -> None:
    with Embedder.open(tiny_model) as model, pytest.raises(InvalidOptionError, match="golden texts"):
        make_golden(model, model, texts=texts)
