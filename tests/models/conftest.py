"""Checkpoints made on the spot, references to compare with, and a runner of exported graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZé"
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气真好中国人，。！?", *LETTERS]
TOKENS += [f"##{letter}" for letter in LETTERS]

SIZES = {
    "model_type": "bert",
    "vocab_size": len(TOKENS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """torch, with which checkpoints in other precisions are written and references are run."""
    return pytest.importorskip("torch", reason="compares with torch")


@pytest.fixture(scope="session")
def transformers(torch: ModuleType) -> ModuleType:
    """transformers, the reference of encoders and tokenizers."""
    module = pytest.importorskip("transformers", reason="compares with transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="session")
def sentence_transformers(transformers: ModuleType) -> ModuleType:
    """sentence-transformers, the reference of pooling, prompts and lower-casing."""
    return pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")


def encoder_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (sizes[rows], hidden) for name, rows in tables.items()
    }
    linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (hidden, hidden)}
    linear |= {"intermediate.dense": (wide, hidden), "output.dense": (hidden, wide)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for name, shape in linear.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    return shapes | {f"{norm}.{kind}": (hidden,) for norm in norms for kind in ("weight", "bias")}


def random_weights(shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights large enough that a wrong bias, scale or order shows in the output."""
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


Maker = Callable[..., Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Maker:
    """A function that writes a plain BERT checkpoint, tiny and random, and returns its folder."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="writes checkpoints")

    def make(
        name: str = "checkpoint",
        *,
        config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        prefix: str = "",
        seed: int = 0,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        sizes = {**SIZES, **(config or {})}
        write_json(folder / "config.json", sizes)
        write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **(tokenizer_config or {})}
        )
        (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        shapes = encoder_shapes(
            {**SIZES, **{k: v for k, v in sizes.items() if k in SIZES and type(v) is int and 0 < v < 999}}
        )
        weights = random_weights(shapes, seed=seed)
        safetensors.save_file(
            {prefix + key: value for key, value in weights.items()}, folder / "model.safetensors"
        )
        return folder

    return make


@pytest.fixture
def as_sentence_transformers() -> Callable[..., Path]:
    """A function that adds modules.json and its folders to a plain checkpoint."""

    def add(
        folder: Path,
        *,
        pooling: Mapping[str, Any] | None = None,
        modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
        transformer: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        paths = ["" if kind == "Transformer" else f"{number}_{kind}" for number, kind in enumerate(modules)]
        entries = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(zip(modules, paths, strict=True))
        ]
        write_json(folder / "modules.json", entries)
        sizes = json.loads((folder / "config.json").read_text())
        default = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        width = {"word_embedding_dimension": sizes["hidden_size"]}
        for kind, path in zip(modules, paths, strict=True):
            (folder / path).mkdir(exist_ok=True)
            if kind == "Pooling":
                write_json(
                    folder / path / "config.json", {**width, **(default if pooling is None else pooling)}
                )
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32, **(transformer or {})})
        write_json(folder / "config_sentence_transformers.json", dict(settings or {}))
        return folder

    return add


Runner = Callable[[Path, np.ndarray, np.ndarray], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def run_graph() -> Runner:
    """A function that runs the graph of a model folder on ids and mask and returns its outputs by name."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")

    def run(folder: Path, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],
        )
        assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask}), strict=True))

    return run


Batch = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="session")
def random_batch() -> Batch:
    """A function that makes ids and mask for rows of the given lengths, padded on the right."""

    def batch(
        lengths: tuple[int, ...], *, vocabulary: int, padding: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(11)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        ids = random.integers(5, vocabulary, mask.shape)
        return np.where(mask == 1, ids, padding), mask

    return batch
