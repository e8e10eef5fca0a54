"""A checkpoint folder becomes a model folder, whole or not at all, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qingyu.errors import InvalidOptionError, MissingExtraError, OutputError, UnsupportedModelError
from qingyu.models.export import builder, export
from qingyu.runtime.spec import check_file, read_spec

TEXTS = ["今天天气真好", "abc Def，中国人！", "天", "好" * 100, ""]


def encode(folder, texts, spec):
    """Ids and mask of texts, cut to the model's maximum."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(spec.max_tokens)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(texts)
    ids, mask = ([getattr(each, part) for each in encodings] for part in ("ids", "attention_mask"))
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.int64)


def embed(folder, texts, run_graph):
    """What a runtime makes of a model folder: pooled vectors, of unit length where the manifest says so."""
    spec = read_spec(folder)
    vectors = run_graph(folder, *encode(folder, texts, spec))["pooled"]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if spec.normalize else vectors


def test_the_manifest_returned_is_the_one_written_with_true_hashes(make_checkpoint, tmp_path):
    spec = export(make_checkpoint(), tmp_path / "model", name="tiny")
    assert read_spec(tmp_path / "model") == spec
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.onnx",
        "qingyu.json",
        "tokenizer.json",
    ]
    assert sorted(spec.files) == ["model.onnx", "tokenizer.json"]
    for name, record in spec.files.items():
        check_file(tmp_path / "model", name, record)
    assert (spec.name, spec.precision, spec.task, spec.dim) == ("tiny", "fp32", "embedding", 16)
    assert (spec.inputs, spec.outputs) == (("input_ids", "attention_mask"), ("token_states", "pooled"))


def test_the_name_is_by_default_that_of_the_folder(make_checkpoint, tmp_path):
    assert export(make_checkpoint("my-model"), tmp_path / "model").name == "my-model"


def test_prompts_of_the_caller_are_added_and_win(make_checkpoint, as_sentence_transformers, tmp_path):
    folder = as_sentence_transformers(make_checkpoint(), settings={"prompts": {"query": "a", "passage": "b"}})
    spec = export(folder, tmp_path / "model", prompts={"query": "问：", "title": "c"})
    assert spec.prompts == {"query": "问：", "passage": "b", "title": "c"}


def test_the_real_e5_equals_sentence_transformers(sentence_transformers, shared_models, tmp_path, run_graph):
    source = shared_models / "multilingual-e5-small-zh"
    export(source, tmp_path / "e5")
    texts = ["query: 今天天气真好", "passage: iPhone 15 Pro，ＡＢＣ", "好" * 700, "[MASK] <mask> a"]
    reference = sentence_transformers.SentenceTransformer(
        str(source), device="cpu", model_kwargs={"dtype": "float32"}
    )
    np.testing.assert_allclose(embed(tmp_path / "e5", texts, run_graph), reference.encode(texts), atol=1e-6)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_tiny_bge_equals_sentence_transformers(
    lowercase, sentence_transformers, make_checkpoint, as_sentence_transformers, tmp_path, run_graph
):
    folder = as_sentence_transformers(make_checkpoint(), transformer={"do_lower_case": lowercase})
    export(folder, tmp_path / "model")
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(
        embed(tmp_path / "model", TEXTS, run_graph), reference.encode(TEXTS), atol=2e-6
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["Tanh", "Identity"])
def test_dense_layers_equal_sentence_transformers(
    bias, activation, torch, sentence_transformers, make_checkpoint, tmp_path, run_graph
):
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    activations = {"Tanh": torch.nn.Tanh(), "Identity": torch.nn.Identity()}
    modules = [
        Transformer(str(make_checkpoint())),
        Pooling(16, pooling_mode="mean"),
        Dense(16, 10, bias=bias, activation_function=activations[activation]),
        Dense(10, 6, bias=bias, activation_function=torch.nn.Tanh()),
    ]
    reference = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    reference.save(str(tmp_path / "saved"))
    spec = export(tmp_path / "saved", tmp_path / "model")
    assert (spec.dim, spec.normalize, spec.architecture.hidden_size) == (6, False, 16)
    np.testing.assert_allclose(
        embed(tmp_path / "model", TEXTS, run_graph), reference.encode(TEXTS), atol=2e-6
    )


@pytest.mark.parametrize(
    "dense", [{"activation_function": "torch.nn.modules.activation.ReLU"}, {"module_input_name": "x"}]
)
def test_other_dense_layers_are_refused(dense, make_checkpoint, as_sentence_transformers, tmp_path):
    folder = as_sentence_transformers(make_checkpoint(), modules=("Transformer", "Pooling", "Dense"))
    sizes = {"in_features": 16, "out_features": 4, "bias": True}
    (folder / "2_Dense" / "config.json").write_text(json.dumps({**sizes, **dense}))
    with pytest.raises(UnsupportedModelError, match="describes what this version does not do"):
        export(folder, tmp_path / "model")


BLOCKER = """
import sys
blocked = {blocked!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from pathlib import Path
from qingyu.models.export import export
"""


def run_blocked(code, *blocked):
    """Run code in a Python in which some packages cannot be imported."""
    script = BLOCKER.format(blocked=set(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_export_needs_no_torch_and_no_transformers(make_checkpoint, tmp_path):
    code = f"export(Path({str(make_checkpoint())!r}), Path({str(tmp_path / 'model')!r}))"
    done = run_blocked(code, "torch", "transformers", "sentence_transformers", "optimum", "onnxruntime")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_spec(tmp_path / "model").dim == 16


def test_export_loads_neither_torch_nor_transformers_where_they_are(make_checkpoint, tmp_path):
    code = f"export(Path({str(make_checkpoint())!r}), Path({str(tmp_path / 'model')!r}))\n"
    code += "print([name for name in ('torch', 'transformers', 'onnxruntime') if name in sys.modules])"
    assert run_blocked(code).stdout == "[]\n"


@pytest.mark.parametrize("package", ["onnx", "safetensors"])
def test_a_missing_extra_is_one_error_with_the_command(package, make_checkpoint, tmp_path):
    code = f"""
from qingyu.errors import MissingExtraError
try:
    export(Path({str(make_checkpoint())!r}), Path({str(tmp_path / "model")!r}))
except MissingExtraError as error:
    print(error)
"""
    done = run_blocked(code, package)
    assert f"found no {package}" in done.stdout
    assert 'pip install "qingyu[export]"' in done.stdout
    assert not (tmp_path / "model").exists()


def test_an_empty_folder_is_filled(make_checkpoint, tmp_path):
    (tmp_path / "model").mkdir()
    export(make_checkpoint(), tmp_path / "model")
    assert read_spec(tmp_path / "model").dim == 16


def test_missing_parents_are_made(make_checkpoint, tmp_path):
    export(make_checkpoint(), tmp_path / "a" / "b" / "model")
    assert read_spec(tmp_path / "a" / "b" / "model").dim == 16


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("checkpoint", "expected a folder outside the checkpoint, found the checkpoint or a folder in it"),
        ("checkpoint/out", "expected a folder outside the checkpoint"),
        ("link/out", "expected a folder outside the checkpoint"),
        (".", "expected a folder beside the checkpoint, found a folder that holds it"),
        ("file", "expected a new folder, found a file"),
        ("full", "expected a new or empty folder, found a folder with files in it"),
        ("file/model", "expected a place that can be written"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_would_destroy_something_is_refused(
    output, message, overwrite, make_checkpoint, tmp_path
):
    folder = make_checkpoint()
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    if overwrite and output == "full":
        message = "expected a model folder to replace, found a folder of something else"
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=message):
        export(folder, tmp_path / output, overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(make_checkpoint, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="expected a place that can be written"):
        export(make_checkpoint(), tmp_path / "locked" / "model")


def test_overwriting_replaces_a_model_folder_and_leaves_nothing_else(make_checkpoint, tmp_path):
    folder, output = make_checkpoint(), tmp_path / "model"
    export(folder, output, name="old")
    (output / "leftover.txt").write_text("x")
    with pytest.raises(OutputError):
        export(folder, output, name="new")
    assert read_spec(output).name == "old"
    export(folder, output, name="new", overwrite=True)
    assert read_spec(output).name == "new"
    assert sorted(path.name for path in output.iterdir()) == ["model.onnx", "qingyu.json", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_the_old_model_stays_when_the_new_one_fails(make_checkpoint, tmp_path, monkeypatch):
    folder, output = make_checkpoint(), tmp_path / "model"
    export(folder, output)
    before = tree(output)
    monkeypatch.setattr(builder, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(
        UnsupportedModelError, match=r"expected less than 2 GiB of weights, found \d+ bytes at"
    ):
        export(folder, output, overwrite=True)
    assert tree(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_an_interrupted_export_leaves_nothing(make_checkpoint, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(make_checkpoint(), tmp_path / "model", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_checkpoint_is_not_touched(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    export(folder, tmp_path / "model")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_two_exports_of_one_checkpoint_are_equal(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    first, second = (export(folder, tmp_path / name) for name in ("first", "second"))
    assert first == second


def test_a_model_folder_has_the_permissions_of_any_new_folder(make_checkpoint, tmp_path):
    export(make_checkpoint(), tmp_path / "model")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    "options",
    [
        {"via": "magic"},
        {"pooling": "median"},
        {"prompts": {"query": 3}},
        {"prompts": {"query": "\ud800"}},
        {"name": "\udcff"},
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options, make_checkpoint, tmp_path):
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        export(make_checkpoint(), tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_the_extra_of_optimum_is_checked(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum", None)
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qingyu\[optimum\]"'):
        export(make_checkpoint(), tmp_path / "model", via="optimum")


def test_a_half_precision_checkpoint_is_exported_as_fp32(torch, make_checkpoint, tmp_path, run_graph):
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint()
    path = folder / "model.safetensors"
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file({name: tensor.float() for name, tensor in halves.items()}, path)
    expected = export(folder, tmp_path / "expected")
    save_file(halves, path)
    assert export(folder, tmp_path / "model") == expected
