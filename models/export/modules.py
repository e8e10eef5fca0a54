"""What modules.json and the folders it names say: pooling, Dense layers, normalization, prompts.

The layouts of sentence-transformers 2 to 6, and plain Hugging Face folders, which sentence-transformers
gives mean pooling and no normalization. Not here: the encoder and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from qingyu.errors import UnsupportedModelError
from qingyu.models.export.files import (
    Document,
    is_unicode,
    read_json,
    read_object,
    read_optional,
    refuse,
    shown,
    within,
)
from qingyu.runtime.spec import Pooling

__all__ = ["POOLING_FLAGS", "DenseLayer", "Modules", "read_modules"]

POOLING_NAMES: Mapping[str, Pooling] = {
    # The names of sentence-transformers >= 5.5; before, one flag for each.
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
POOLING_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
DENSE_ACTIVATIONS: Mapping[str, str] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
}
TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
)
SENTENCE = "sentence_embedding"


@dataclass(frozen=True)
class DenseLayer:
    """One Dense module: its folder, its sizes, and its activation (``identity`` or ``tanh``)."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class Modules:
    """What surrounds the encoder, which is in the folder ``encoder`` with the settings ``transformer``."""

    encoder: Path
    transformer: Document
    pooling: Pooling = "mean"
    normalize: bool = False
    dense: tuple[DenseLayer, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def read_modules(folder: Path, *, pooling: Pooling | None = None) -> Modules:
    """The modules of a checkpoint folder; ``pooling`` replaces what the folder says."""
    if not (folder / "modules.json").exists():
        return Modules(folder, Document(folder / "(none)", {}), pooling or "mean")
    entries = _entries(folder / "modules.json")
    kinds = [kind for kind, _ in entries]
    _check_order(folder, kinds)
    by_kind = {kind: within(folder, path, folder / "modules.json") for kind, path in entries}
    encoder = by_kind["Transformer"]
    dense = tuple(_dense(within(folder, path, folder)) for kind, path in entries if kind == "Dense")
    prompts, default = _prompts(read_optional(folder / "config_sentence_transformers.json"))
    stated = _pooling(read_object(by_kind["Pooling"] / "config.json")) if pooling is None else pooling
    return Modules(encoder, _transformer(encoder), stated, "Normalize" in kinds, dense, prompts, default)


def _entries(path: Path) -> list[tuple[str, str]]:
    """(class name, folder) of every module, in order."""
    value = read_json(path)
    if not isinstance(value, list) or not value:
        refuse(f"{path} cannot be read", expected="a list of modules", found=shown(value))
    entries = []
    for item in value:
        if not isinstance(item, dict):
            refuse(f"{path} cannot be read", expected="a list of objects", found=shown(item))
        document = Document(path, item)
        kind = document.text("type")
        if not kind.startswith("sentence_transformers."):
            _unsupported(path, "modules of sentence-transformers", shown(kind))
        entries.append((kind.rpartition(".")[2], document.text("path")))
    return [entry for entry in entries if entry[0] != "Dropout"]  # which does nothing outside training


def _check_order(folder: Path, kinds: list[str]) -> None:
    tail = kinds[2:]
    if tail and tail[-1] == "Normalize":
        tail.pop()
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in tail):
        expected = "Transformer, Pooling, then Dense layers and Normalize where there are any"
        _unsupported(folder / "modules.json", expected, ", ".join(kinds))


def _pooling(config: Document) -> Pooling:
    if not config.flag("include_prompt", default=True):
        _unsupported(config.path, "pooling over the prompt too", "include_prompt false")
    modes = config.fields.get("pooling_mode")
    if modes is None:
        active = [flag for flag in POOLING_FLAGS if config.flag(flag, default=False)]
        found = [POOLING_FLAGS[flag] for flag in active] or ["mean"]
    else:
        names = modes if isinstance(modes, list) else [modes]
        if not names or not all(isinstance(name, str) and name in POOLING_NAMES for name in names):
            config.refuse("pooling_mode", f"one of {', '.join(POOLING_NAMES)}")
        found = [POOLING_NAMES[name] for name in names]
    if len(found) > 1:
        _unsupported(config.path, "one pooling", f"{len(found)} side by side: {', '.join(found)}")
    return found[0]


def _dense(folder: Path) -> DenseLayer:
    config = read_object(folder / "config.json")
    for name in ("module_input_name", "module_output_name"):
        if config.text(name, default=SENTENCE) != SENTENCE:
            _unsupported(config.path, f"{name} {SENTENCE}", shown(config.fields[name]))
    activation = config.text("activation_function", default="torch.nn.modules.activation.Tanh")
    if activation not in DENSE_ACTIVATIONS:
        _unsupported(config.path, "activation_function Tanh or Identity of torch.nn", shown(activation))
    return DenseLayer(
        folder,
        config.integer("in_features", 1, 1 << 16),
        config.integer("out_features", 1, 1 << 16),
        config.flag("bias", default=True),
        DENSE_ACTIVATIONS[activation],
    )


def _transformer(folder: Path) -> Document:
    for name in TRANSFORMER_CONFIGS:
        config = read_optional(folder / name)
        if config.fields:
            break
    task = config.text("transformer_task", default="feature-extraction")
    output = config.text("module_output_name", default="token_embeddings")
    if (task, output) != ("feature-extraction", "token_embeddings"):
        _unsupported(config.path, "feature-extraction giving token_embeddings", f"{task} giving {output}")
    return config


def _prompts(config: Document) -> tuple[dict[str, str], str | None]:
    prompts: dict[str, Any] = config.object("prompts")
    if not all(is_unicode(text) for pair in prompts.items() for text in pair):
        config.refuse("prompts", "an object of strings")
    default = config.fields.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        config.refuse("default_prompt_name", f"a name in prompts ({', '.join(prompts) or 'none'})")
    return prompts, default


def _unsupported(path: Path, expected: str, found: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{path} describes what this version does not do",
        expected=expected,
        found=found,
        remedy="Use another checkpoint; `qingyu export --via optimum` does not change these modules either.",
    )
