"""Quantizing end to end: gate, auto, atomic output, verification."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.__main__ import main
from qingyu.errors import (
    CorruptFileError,
    FidelityError,
    InputError,
    InvalidOptionError,
    MismatchError,
    OutputError,
    UnsupportedModelError,
)
from qingyu.quantize import Gate, quantize, verify
from qingyu.quantize.certificate import Certificate
from qingyu.quantize.recipes import AUTO, RECIPES
from qingyu.runtime.spec import read_spec

TEXTS = [
    text * n + str(n)
    for text in (
        "今天天气真好",
        "外面阳光明媚。",
        "股票大跌",
        "怎么修改登录密码",
        "人工智能正在改变医疗、教育和交通。",
    )
    for n in range(1, 7)
]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_manifest_says_what_was_done_and_measured(tiny_model, tmp_path):
    before = hashes(tiny_model)
    outcome = quantize(tiny_model, tmp_path / "out", texts=TEXTS, calibration=TEXTS)
    spec = read_spec(tmp_path / "out")
    assert spec == outcome.spec
    assert (spec.precision, spec.recipe, spec.weight_bits) == ("int8", "rowwise", 8)
    certificate = Certificate.from_json(spec.certificate)
    assert certificate.texts.count == len(TEXTS)
    assert certificate.cosine.mean > 0.999
    assert certificate.speed is not None
    assert spec.golden is not None
    assert hashes(tiny_model) == before, "the input is never touched"
    assert set(hashes(tmp_path / "out")) == {"model.onnx", "tokenizer.json", "qingyu.json"}


# The tiny vocabulary knows few of the words.
@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_without_texts_the_built_in_sample_is_used(tiny_model, tmp_path):
    outcome = quantize(tiny_model, tmp_path / "out", speed_rounds=0, gate=Gate(0.5, 0.0))
    assert outcome.measured.certificate.texts.count > 500


def test_the_certificate_is_of_the_folder_that_was_written(tiny_model, tmp_path):
    outcome = quantize(tiny_model, tmp_path / "out", texts=TEXTS, speed_rounds=0)
    with Embedder.open(tiny_model) as fp32, Embedder.open(tmp_path / "out") as int8:
        cosines = (fp32.embed(TEXTS).astype(float) * int8.embed(TEXTS)).sum(axis=1)
    assert outcome.measured.certificate.cosine.mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert outcome.measured.certificate.cosine.minimum == pytest.approx(cosines.min(), abs=1e-6)


def test_a_model_that_misses_the_gate_is_not_written(tiny_model, tmp_path):
    with pytest.raises(FidelityError, match=r"expected cosine of at least 0\.9999999 on average") as refused:
        quantize(tiny_model, tmp_path / "out", texts=TEXTS, recipe="weights-4", gate=Gate(0.9999999, 0.9))
    assert "nothing was written" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_first_that_passes_and_says_why_others_did_not(tiny_model, tmp_path):
    easy = quantize(
        tiny_model, tmp_path / "easy", texts=TEXTS, recipe="auto", gate=Gate(0.5, 0.0), speed_rounds=0
    )
    assert easy.spec.recipe == AUTO[0]
    assert easy.passed_over == ()
    reached = {}
    for name in AUTO:
        outcome = quantize(
            tiny_model, tmp_path / name, texts=TEXTS, recipe=name, gate=Gate(0.5, 0.0), speed_rounds=0
        )
        reached[name] = outcome.measured.certificate.cosine.mean
    wanted = max(reached.values())
    hard = quantize(
        tiny_model, tmp_path / "hard", texts=TEXTS, recipe="auto", gate=Gate(wanted, 0.0), speed_rounds=0
    )
    first = next(name for name in AUTO if reached[name] >= wanted)
    assert hard.spec.recipe == first
    assert [over.recipe for over in hard.passed_over] == list(AUTO[: AUTO.index(first)])
    assert all("mean cosine" in over.reason for over in hard.passed_over)


def test_when_no_recipe_passes_auto_keeps_sensitive_layers_in_fp32(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("qingyu.quantize.recipes.AUTO", ("rowwise",))
    alone = quantize(tiny_model, tmp_path / "a", texts=TEXTS, speed_rounds=0).measured.certificate.cosine.mean
    gate = Gate(alone + (1 - alone) / 10, 0.0)
    outcome = quantize(tiny_model, tmp_path / "b", texts=TEXTS, recipe="auto", gate=gate, speed_rounds=0)
    assert outcome.spec.float_layers
    assert outcome.measured.certificate.cosine.mean >= gate.mean
    assert outcome.passed_over[0].recipe == "rowwise"


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_makes_a_folder_that_opens_and_is_certified(tiny_model, tmp_path, recipe):
    outcome = quantize(
        tiny_model,
        tmp_path / "out",
        texts=TEXTS,
        calibration=TEXTS,
        recipe=recipe,
        gate=Gate(0.8, 0.5),
        speed_rounds=0,
    )
    with Embedder.open(tmp_path / "out") as embedder:
        assert np.isfinite(embedder.embed(TEXTS)).all()
    assert outcome.spec.recipe == recipe
    assert (tmp_path / "out" / "model.onnx").stat().st_size < (tiny_model / "model.onnx").stat().st_size


def test_edge_fallback_and_report_are_made_when_asked_for(tiny_model, tmp_path):
    report = tmp_path / "report.html"
    outcome = quantize(tiny_model, tmp_path / "out", texts=TEXTS, edge=True, fallback=True, report=report)
    assert outcome.spec.edge is not None
    assert outcome.spec.fallback == "model.fp32.onnx"
    assert {"model.onnx", "model.ort", "model.fp32.onnx", "tokenizer.json"} == set(outcome.spec.files)
    page = report.read_text(encoding="utf-8")
    assert "Passed." in page
    assert "<svg" in page
    with Embedder.open(tmp_path / "out") as plain, Embedder.open(tmp_path / "out", profile="edge") as edge:
        assert (plain.embed(TEXTS) * edge.embed(TEXTS)).sum(axis=1).min() >= 0.999999


def test_a_refused_model_has_a_report_too(tiny_model, tmp_path):
    report = tmp_path / "report.html"
    with pytest.raises(FidelityError):
        quantize(
            tiny_model, tmp_path / "out", texts=TEXTS, recipe="weights-4", gate=Gate(1.0, 1.0), report=report
        )
    assert "Refused." in report.read_text(encoding="utf-8")
    assert not (tmp_path / "out").exists()


def test_verify_measures_the_same_again(tiny_model, tmp_path):
    made = quantize(tiny_model, tmp_path / "out", texts=TEXTS, speed_rounds=0).measured.certificate
    again = verify(tmp_path / "out", tiny_model, TEXTS, speed_rounds=0).certificate
    assert again.to_json() == made.to_json()


def test_verify_refuses_folders_of_different_models(tiny_model, tiny_int8, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    spec = read_spec(tmp_path / "other")
    changed = dataclasses.replace(spec, pooling="cls")
    (tmp_path / "other" / "qingyu.json").write_text(changed.to_json(), encoding="utf-8")
    with pytest.raises(MismatchError, match="pooling"):
        verify(tiny_int8, tmp_path / "other", TEXTS)
    with pytest.raises(MismatchError, match="FP32"):
        verify(tiny_int8, tiny_int8, TEXTS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": []}, InputError, "at least 2"),
        ({"texts": ["好"] * 9}, InputError, "different"),
        ({"calibration": ["好"] * 9}, InputError, "different"),
        ({"recipe": "int3"}, InvalidOptionError, "one of auto, rowwise"),
        ({"weight_bits": 1}, InvalidOptionError, "weight_bits"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tiny_model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        quantize(tiny_model, tmp_path / "out", **{"texts": TEXTS, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_quantized_input_is_refused(tiny_model, tiny_int8, tmp_path):
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        quantize(tiny_int8, tmp_path / "out", texts=TEXTS)
    shutil.copytree(tiny_model, tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.onnx").open("r+b") as stream:
        stream.seek(3000)
        stream.write(b"\0\1\2\3")
    with pytest.raises(CorruptFileError):
        quantize(tmp_path / "damaged", tmp_path / "out", texts=TEXTS)
    assert not (tmp_path / "out").exists()


def test_output_onto_the_input_is_refused(tiny_model):
    before = hashes(tiny_model)
    with pytest.raises(OutputError):
        quantize(tiny_model, tiny_model, texts=TEXTS, overwrite=True)
    assert hashes(tiny_model) == before


def test_overwriting_keeps_the_old_model_when_the_new_one_is_refused(tiny_model, tmp_path):
    quantize(tiny_model, tmp_path / "out", texts=TEXTS, speed_rounds=0)
    before = hashes(tmp_path / "out")
    with pytest.raises(FidelityError):
        quantize(
            tiny_model, tmp_path / "out", texts=TEXTS, recipe="weights-4", gate=Gate(1.0, 1.0), overwrite=True
        )
    assert hashes(tmp_path / "out") == before


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(
    shutil.which("mount") is None or os.geteuid() != 0, reason="needs root to mount a small disk"
)
def test_a_full_disk_is_said_and_leaves_nothing(tiny_model, tmp_path):
    with small_disk(tmp_path, 64):
        with pytest.raises(OutputError, match=r"No space left|bytes free"):
            quantize(tiny_model, tmp_path / "out", texts=TEXTS, fallback=True, edge=True)
        assert list(tmp_path.iterdir()) == []


def test_killed_half_way_no_output_stands_under_its_name(tiny_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "qingyu",
        "quantize",
        str(tiny_model),
        str(tmp_path / "out"),
        "--min-cosine",
        "0",
    ]
    for delay in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        if (tmp_path / "out").exists():  # then it was whole before the signal came
            with Embedder.open(tmp_path / "out") as embedder:
                embedder.embed("今天")
            break


def test_the_command_line_offers_every_recipe():
    from qingyu.cli.quantize import RECIPES as OFFERED

    assert list(OFFERED) == ["auto", *RECIPES]


def test_the_command_line_reports_and_refuses(tiny_model, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    common = ["--texts", str(tmp_path / "texts.txt"), "--speed-rounds", "1"]
    out = str(tmp_path / "out")
    assert main(["quantize", str(tiny_model), out, "--recipe", "auto", "--json", *common]) == 0
    assert json.loads(capsys.readouterr().out)["cosine"]["texts"] == len(TEXTS)
    assert main(["verify", out, "--against", str(tiny_model), *common]) == 0
    assert "The certificate in the manifest says the same." in capsys.readouterr().out
    assert main(["verify", out, "--against", str(tiny_model), "--min-cosine", "1", *common]) == 6
    assert "is too far from FP32" in capsys.readouterr().err
    bad = [*common, "--recipe", "weights-4", "--min-cosine", "0.9999999"]
    assert main(["quantize", str(tiny_model), str(tmp_path / "bad"), *bad]) == 6
    captured = capsys.readouterr()
    assert "mean cosine 0.9" in captured.err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "found none"), ("好\n好\n好\n".encode(), "different"), (b"\xc4\xe3\xba\xc3\n", "expected UTF-8")],
)
@pytest.mark.parametrize("option", ["--texts", "--calibration"])
def test_files_of_texts_that_cannot_serve_are_refused(tiny_model, tmp_path, capsys, content, message, option):
    (tmp_path / "texts.txt").write_bytes(content)
    code = main(["quantize", str(tiny_model), str(tmp_path / "out"), option, str(tmp_path / "texts.txt")])
    assert code == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
