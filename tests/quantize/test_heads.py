"""Models with a head quantized: one word table, decisions kept, the certificate, the gate, the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qingyu import FillMask
from qingyu.__main__ import main
from qingyu.errors import FidelityError, InputError, ManifestError, UnsupportedModelError
from qingyu.quantize import TaskCertificate, TaskGate, quantize, quantize_task, verify_task
from qingyu.quantize.recipes import RECIPES
from qingyu.runtime.spec import read_spec
from qingyu.runtime.task import open_model

TEXTS = [
    "今天天气真好，外面阳光明媚。",
    "怎么修改登录密码",
    "人工智能正在改变医疗、教育和交通。",
    "股票大跌",
    "我们在北京",
]
LABELS = {"tagging": ("O", "B-人", "I-人")}
ANY = TaskGate(0.0)


def quantized(folder, output, **options):
    defaults = {"texts": TEXTS, "calibration": TEXTS, "speed_rounds": 0, "gate": ANY}
    return quantize_task(folder, output, **{**defaults, **options})


@pytest.mark.parametrize(
    "task", ["fill-mask", "classification", "tagging", "question-answering", "reranking"]
)
def test_every_task_is_quantized_and_decides_nearly_as_before(head_model, tmp_path, task):
    folder = head_model(task, LABELS.get(task, ()))
    outcome = quantized(folder, tmp_path / "int8")
    certificate = outcome.certificate
    assert outcome.spec.precision == "int8"
    assert certificate.agreement >= 0.8  # random weights decide nothing clearly
    assert certificate.decisions >= 5
    assert 0 < certificate.mean_difference <= certificate.largest_difference < 0.2
    assert TaskCertificate.from_json(json.loads(json.dumps(outcome.spec.certificate))).task == task
    with open_model(tmp_path / "int8") as model:
        assert model.self_check().result == "passed"
    again = verify_task(tmp_path / "int8", folder, TEXTS, speed_rounds=0)
    assert again.agreement == pytest.approx(certificate.agreement)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_keeps_one_word_table_and_close_scores(head_model, tmp_path, recipe):
    import onnx

    folder = head_model("fill-mask")
    spec = quantized(folder, tmp_path / "small", recipe=recipe).spec
    graph = onnx.load(tmp_path / "small" / spec.graph).graph
    sizes = spec.architecture
    large = [t for t in graph.initializer if int(np.prod(t.dims)) == sizes.vocab_size * sizes.hidden_size]
    assert [t.data_type for t in large] == [10 if recipe == "fp16" else 3]  # float16, int8
    with FillMask.open(folder) as fp32, FillMask.open(tmp_path / "small") as model:
        pairs = (
            {one.id: one.score for one in each.fill("今天[MASK]气", top_k=999)[0].masks[0]}
            for each in (fp32, model)
        )
        wanted, found = (np.array([scores[n] for n in range(sizes.vocab_size)]) for scores in pairs)
    # Unrelated scores would differ by 1 to 2. Fixed scales and 4 bits cost most, as everywhere.
    limit = 0.35 if recipe == "weights-4" else 0.15 if recipe.startswith("static") else 0.06
    assert np.abs(found - wanted).sum() < limit


def test_seven_bit_weights_make_a_table_of_seven_bits(head_model, tmp_path):
    """Which is what CPUs without VNNI need, of the decoder as of every product."""
    import onnx

    quantized(head_model("fill-mask"), tmp_path / "model", weight_bits=7)
    graph = onnx.load(tmp_path / "model" / "model.onnx").graph
    codes = next(t for t in graph.initializer if t.name == "embeddings.word_embeddings.weight.codes")
    assert np.abs(onnx.numpy_helper.to_array(codes)).max() == 63


def test_an_edge_file_and_a_fallback_are_written_on_request(head_model, tmp_path):
    spec = quantized(head_model("fill-mask"), tmp_path / "model", edge=True, fallback=True).spec
    assert {"model.ort", "model.fp32.onnx"} <= spec.files.keys()
    with (
        FillMask.open(tmp_path / "model") as model,
        FillMask.open(tmp_path / "model", profile="edge") as edge,
    ):
        wanted, found = (each.fill("今天[MASK]气")[0].masks[0] for each in (model, edge))
        assert [one.id for one in wanted] == [one.id for one in found]
        assert [one.score for one in wanted] == pytest.approx([one.score for one in found], abs=1e-4)


def test_a_model_that_decides_otherwise_is_refused_and_nothing_is_written(head_model, tmp_path):
    with pytest.raises(FidelityError, match="expected the same decision in 101% of cases"):
        quantized(head_model("fill-mask"), tmp_path / "model", gate=TaskGate(1.01))
    with pytest.raises(FidelityError, match=r"hybrid: agreement .*rowwise: agreement .*weights-8: agreement"):
        quantized(head_model("fill-mask"), tmp_path / "model", gate=TaskGate(1.01), recipe="auto")
    assert list(tmp_path.iterdir()) == []


def test_each_kind_of_model_has_its_own_function(head_model, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"gives no embeddings: .* found the task fill-mask"):
        quantize(head_model("fill-mask"), tmp_path / "model", texts=TEXTS)


def test_texts_without_anything_to_decide_are_refused(head_model, tmp_path):
    with pytest.raises(InputError):
        quantized(head_model("fill-mask"), tmp_path / "model", texts=["今", "今"])


def test_a_certificate_with_an_impossible_share_is_refused(head_model, tmp_path):
    document = quantized(head_model("tagging"), tmp_path / "model").certificate.to_json()
    with pytest.raises(ManifestError, match=r"agreement: expected 0 to 1, found 1\.5"):
        TaskCertificate.from_json({**document, "agreement": 1.5})


def test_the_commands_quantize_verify_and_describe_such_a_model(head_model, tmp_path, capsys):
    folder, output = str(head_model("fill-mask")), str(tmp_path / "int8")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    measuring = ["--texts", str(tmp_path / "texts.txt"), "--speed-rounds", "1", "--min-agreement", "0"]
    calibration = ["--calibration", str(tmp_path / "texts.txt")]
    assert main(["quantize", folder, output, *measuring, *calibration]) == 0
    assert "same decision as FP32" in capsys.readouterr().out
    assert main(["verify", output, "--against", folder, *measuring, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "fill-mask"
    assert main(["info", output]) == 0
    assert "same decision as FP32" in capsys.readouterr().out
    refused = ["quantize", folder, str(tmp_path / "x"), "--similarity", "x.tsv"]
    assert main(refused) == 3
    assert read_spec(tmp_path / "int8").task == "fill-mask"
