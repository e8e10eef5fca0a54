"""config.json of a checkpoint as an ``Architecture``, for the model types that the graph writer knows.

What differs between model types is one row of a table. Not here: weights, tokenizers, sentence-transformers
files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qingyu.errors import UnsupportedModelError
from qingyu.models.export.files import Document, is_unicode, read_object, refuse, shown
from qingyu.models.export.graph import ACTIVATIONS
from qingyu.runtime.spec import Architecture

__all__ = [
    "MODEL_TYPES",
    "ModelType",
    "check_supported",
    "labels_of",
    "model_type",
    "padding_id",
    "read_architecture",
    "read_config",
]

VIA_OPTIMUM = "Use `qingyu export --via optimum`, which needs the extra 'optimum'."


@dataclass(frozen=True)
class ModelType:
    """What sets one model type apart.

    ``prefix`` stands before the weight names of checkpoints that were saved with a task head.
    ``positions_skip_padding``: positions count the tokens that are not padding, from the padding id + 1.
    """

    prefix: str
    positions_skip_padding: bool
    default_padding_id: int
    tokenizer_class: str


MODEL_TYPES: Mapping[str, ModelType] = {
    "bert": ModelType("bert.", False, 0, "BertTokenizer"),
    "roberta": ModelType("roberta.", True, 1, "RobertaTokenizer"),
    "xlm-roberta": ModelType("roberta.", True, 1, "XLMRobertaTokenizer"),
}

# What is taken as true of model types that only optimum exports; camembert and mpnet count as RoBERTa does.
_OTHER = {
    "camembert": ModelType("", True, 1, "CamembertTokenizer"),
    "mpnet": ModelType("", True, 1, "MPNetTokenizer"),
    "distilbert": ModelType("", False, 0, "DistilBertTokenizer"),
    "electra": ModelType("", False, 0, "ElectraTokenizer"),
    "convbert": ModelType("", False, 0, "ConvBertTokenizer"),
}
_UNKNOWN = ModelType("", False, 0, "")

_LIMITS: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    # Field of Architecture: its names in config.json, least, most. The limits are those of the manifest.
    "layers": (("num_hidden_layers", "n_layers"), 1, 1000),
    "hidden_size": (("hidden_size", "dim"), 1, 1 << 16),
    "heads": (("num_attention_heads", "n_heads"), 1, 1 << 10),
    "intermediate_size": (("intermediate_size", "hidden_dim"), 1, 1 << 20),
    "vocab_size": (("vocab_size",), 1, 1 << 24),
    "max_positions": (("max_position_embeddings",), 3, 1 << 20),
}

_REQUIRED: Mapping[str, object] = {
    # Fields of config.json whose other values change what the encoder computes; absent means this value.
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def read_config(folder: Path) -> Document:
    """The config.json of a checkpoint folder."""
    return read_object(folder / "config.json")


def check_supported(config: Document) -> None:
    """Raise ``UnsupportedModelError`` unless the graph writer knows this kind of model."""
    kind = config.text("model_type")
    if kind not in MODEL_TYPES:
        _unsupported(config, "model_type", f"one of {', '.join(MODEL_TYPES)}", shown(kind))
    for name, expected in _REQUIRED.items():
        found = config.fields.get(name)
        if found is not None and found != expected:
            _unsupported(config, name, shown(expected), shown(found))
    activation = config.text("hidden_act", default="gelu")
    if activation not in ACTIVATIONS:
        _unsupported(config, "hidden_act", f"one of {', '.join(ACTIVATIONS)}", shown(activation))
    if "AutoModel" in config.object("auto_map"):
        _unsupported(config, "auto_map", "a model of transformers itself", "code of the checkpoint's own")


def _unsupported(config: Document, name: str, expected: str, found: str) -> None:
    raise UnsupportedModelError(
        f"{config.path}: {name} is not supported", expected=expected, found=found, remedy=VIA_OPTIMUM
    )


def read_architecture(config: Document) -> Architecture:
    """The sizes that config.json states, within the limits of the manifest."""
    sizes = {}
    for field, (names, least, most) in _LIMITS.items():
        name = next((name for name in names if name in config.fields), names[0])
        sizes[field] = config.integer(name, least, most)
    if sizes["hidden_size"] % sizes["heads"]:
        found = f"{sizes['hidden_size']} and {sizes['heads']}"
        refuse(f"{config.path}: sizes", expected="hidden_size divisible by num_attention_heads", found=found)
    return Architecture(
        model_type=config.text("model_type"),
        activation=config.text("hidden_act", default=config.text("activation", default="gelu")),
        layer_norm_eps=config.number("layer_norm_eps", default=1e-12),
        **sizes,
    )


def labels_of(config: Document) -> tuple[str, ...]:
    """The labels of a classifier in the order of its logits: id2label, or LABEL_0 and so on, 2 by default."""
    stated = config.object("id2label")
    if not stated:
        count = config.integer("num_labels", 1, 1 << 16, default=2)
        return tuple(f"LABEL_{number}" for number in range(count))
    found = [stated.get(str(number)) for number in range(len(stated))]
    if not all(is_unicode(label) for label in found):
        config.refuse("id2label", "a label for each number from 0 on")
    return tuple(map(str, found))


def model_type(config: Document) -> ModelType:
    """What sets the checkpoint's model type apart, and nothing for a type that is not in the tables."""
    return {**MODEL_TYPES, **_OTHER}.get(config.text("model_type"), _UNKNOWN)


def padding_id(config: Document) -> int | None:
    """The token id that positions skip, or ``None`` where positions count from 0."""
    kind = model_type(config)
    if not kind.positions_skip_padding:
        return None
    most = config.integer("max_position_embeddings", 3, 1 << 20) - 4  # at least three positions must be left
    return config.integer("pad_token_id", 0, most, default=kind.default_padding_id)
