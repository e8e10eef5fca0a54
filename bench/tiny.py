"""A BERT so small that a million texts take minutes: for trials of everything but the vectors' meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qingyu.models.extras import require

__all__ = ["tiny_checkpoint", "tiny_model"]

HIDDEN, WIDE, LAYERS, LENGTH = 32, 64, 2, 64
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
HAN = "今天气真好外面阳光明媚股票大跌怎么修改登录密码人工智能正在变医疗教育和交通北京的学生上海老师看电影池用多久"


def tiny_checkpoint(folder: Path) -> None:
    """Writes a two-layer BERT with random weights, always the same, as transformers saves one."""
    require("export", "onnx", "safetensors")
    from safetensors.numpy import save_file

    words = [*SPECIALS, *"，。！？：；、-+.", *LETTERS, *("##" + c for c in LETTERS), *sorted(set(HAN))]
    source = np.random.default_rng(7)

    def normal(*shape: int) -> object:
        return source.normal(0, 0.3, shape).astype(np.float32)

    weights = {
        "embeddings.word_embeddings.weight": normal(len(words), HIDDEN),
        "embeddings.position_embeddings.weight": normal(LENGTH, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
    }
    linear = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (WIDE, HIDDEN),
        "output.dense": (HIDDEN, WIDE),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}"
        for name, shape in linear.items():
            weights[f"{prefix}.{name}.weight"] = normal(*shape)
            weights[f"{prefix}.{name}.bias"] = normal(shape[0])
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    for norm in norms:
        weights[f"{norm}.weight"] = np.ones(HIDDEN, np.float32)
        weights[f"{norm}.bias"] = np.zeros(HIDDEN, np.float32)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": WIDE,
        "hidden_act": "gelu",
        "max_position_embeddings": LENGTH,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def tiny_model(folder: Path) -> None:
    """Writes ``folder/fp32`` and, with an edge file, ``folder/int8``."""
    from qingyu.models.export import export
    from qingyu.quantize import quantize
    from qingyu.quantize.edge import add_edge

    tiny_checkpoint(folder / "checkpoint")
    export(folder / "checkpoint", folder / "fp32", name="tiny-zh")
    quantize(
        folder / "fp32",
        folder / "int8",
        texts=["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码"],
    )
    add_edge(folder / "int8")
