"""Checkpoints to measure on: random weights in the exact shape of a model, for anyone who has not the real ones.

Speed, memory and how far INT8 is from FP32 in operations depend on the shape; quality and fidelity of vectors do not
come from here, so results with these weights give none. The vocabulary is made up, too, where no tokenizer is given:
every ideograph of U+4E00 to U+9FA5 is a token of its own, as in the vocabulary of bert-base-chinese.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import CheckpointError
from qingyu.models.extras import require

__all__ = ["SHAPES", "Shape", "vocabulary", "write_checkpoint"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPREAD = 0.04  # of weights: texts stay apart, and INT8 close enough to FP32 to pass the gate
SEED = 11


@dataclass(frozen=True)
class Shape:
    """The sizes of a BERT encoder and how its vectors are pooled."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    pooling: str
    vocabulary: int = 21128
    positions: int = 512

    def config(self) -> dict[str, Any]:
        """As config.json of transformers."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": self.positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": self.vocabulary,
        }


SHAPES = {
    one.name: one
    for one in (
        Shape("bge-small-zh", hidden=512, layers=4, heads=8, inner=2048, pooling="cls"),
        Shape("bert-base-chinese", hidden=768, layers=12, heads=12, inner=3072, pooling="cls"),
    )
}


def vocabulary(size: int) -> list[str]:
    """``size`` tokens: the special ones, ASCII and its word pieces, Chinese punctuation, ideographs, then reserved.

    Raises ``CheckpointError`` where they do not fit.
    """
    ascii_ = [chr(code) for code in range(33, 127) if not 65 <= code <= 90]
    pieces = ["##" + one for one in ascii_ if one.isalnum()]
    chinese = [*"，。！？：；、“”‘’（）《》【】…—·", *(chr(code) for code in range(0x4E00, 0x9FA6))]
    tokens = [*SPECIAL, *ascii_, *pieces, *chinese]
    if len(tokens) > size:
        raise CheckpointError(
            "the vocabulary is too small",
            expected=f"room for {len(tokens)} tokens",
            found=f"vocab_size {size}",
            remedy="Use one of the shapes that are named.",
        )
    return [*tokens, *(f"[unused{n}]" for n in range(size - len(tokens)))]


def write_checkpoint(shape: Shape, folder: Path, *, like: Path | None = None) -> None:
    """Fill ``folder`` with a checkpoint in the layout of sentence-transformers, the same bytes every time.

    ``like`` is a folder whose configuration and tokenizer are taken over, without its weights.
    """
    require("export", "onnx", "safetensors")
    from safetensors.numpy import save_file

    config = shape.config()
    if like is not None:
        config |= json.loads((like / "config.json").read_text(encoding="utf-8"))
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (like / name).is_file():
                shutil.copy(like / name, folder / name)
    else:
        (folder / "vocab.txt").write_text("\n".join(vocabulary(shape.vocabulary)) + "\n", encoding="utf-8")
        _write(folder / "tokenizer_config.json", TOKENIZER)
        _write(folder / "special_tokens_map.json", dict(zip(NAMES, SPECIAL, strict=True)))
    config |= {"architectures": ["BertModel"], "model_type": "bert"}
    _write(folder / "config.json", config)
    for name, document in _modules(shape).items():
        _write(folder / name, document)
    random = np.random.default_rng(SEED)
    weights = {name: _tensor(name, size, random) for name, size in _sizes(config)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
TOKENIZER = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": 512,
    **dict(zip(NAMES, SPECIAL, strict=True)),
}


def _modules(shape: Shape) -> dict[str, object]:
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    pooling = {"word_embedding_dimension": shape.hidden, f"pooling_mode_{POOLING[shape.pooling]}": True}
    return {
        "modules.json": [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": False, **pooling},
        "sentence_bert_config.json": {"max_seq_length": shape.positions, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
    }


POOLING = {"cls": "cls_token", "mean": "mean_tokens"}


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    for name, rows in tables.items():
        yield f"embeddings.{name}_embeddings.weight", (config[rows], hidden)
    yield from _norm("embeddings", hidden)
    linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (hidden, hidden)}
    linear |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for name, size in linear.items():
            yield f"{prefix}.{name}.weight", size
            yield f"{prefix}.{name}.bias", size[:1]
        yield from _norm(f"{prefix}.attention.output", hidden)
        yield from _norm(f"{prefix}.output", hidden)
    yield "pooler.dense.weight", (hidden, hidden)
    yield "pooler.dense.bias", (hidden,)


def _norm(prefix: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.LayerNorm.weight", (hidden,)
    yield f"{prefix}.LayerNorm.bias", (hidden,)


def _tensor(name: str, size: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    drawn = random.normal(0, SPREAD, size).astype(np.float32)
    return drawn + np.float32(1) if name.endswith("LayerNorm.weight") else drawn


def _write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
