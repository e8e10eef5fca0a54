"""A student made of its teacher: chosen layers and tokens, as a checkpoint that can be trained or exported.

Not here: training.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import CheckpointError, InvalidOptionError, UnsupportedModelError
from qingyu.models.adapt.vocabulary import chosen_tokens, read_vocabulary, tokenizer_text
from qingyu.models.export.folder import check_output, new_folder
from qingyu.models.export.weights import open_weights
from qingyu.models.extras import require

__all__ = ["checked_config", "cut_checkpoint", "prune_vocabulary"]

LAYER = re.compile(r"^(?P<before>(?:\w+\.)?encoder\.layer\.)(?P<number>\d+)(?P<after>\..+)$")
BY_TOKEN = re.compile(
    r"(word_embeddings\.weight|predictions\.bias|predictions\.decoder\.(weight|bias)|lm_head\.(bias|decoder\.(weight|bias)))$"
)
COPIED = ("modules.json", "sentence_bert_config.json", "special_tokens_map.json", "tokenizer_config.json")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
LAID_OUT_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "electra")


def cut_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    layers: Sequence[int] | None = None,
    vocabulary: int | None = None,
    texts: Iterable[str] = (),
    words: Iterable[str] = (),
    prompts: bool = True,
    dropout: float | None = None,
) -> None:
    """Write to the folder ``output`` a checkpoint with only ``layers`` and the ``vocabulary`` most useful tokens.

    Layers count from 0 and keep their order; ``None`` keeps all. Tokens are chosen on ``texts`` and
    ``words`` (see ``chosen_tokens``). ``prompts=False`` drops the prompts, ``dropout`` replaces the rates. Pooling and
    normalization stay as they are.

    Raises ``CheckpointError``, ``TokenizerError``, ``UnsupportedModelError`` or ``InvalidOptionError``.
    """
    from safetensors.numpy import save_file

    config = checked_config(checkpoint)
    tensors = dict(open_weights(checkpoint))
    output.mkdir(parents=True, exist_ok=True)
    _copy_settings(checkpoint, output, prompts=prompts)
    if layers is not None:
        _check_layers(layers, int(config["num_hidden_layers"]))
        tensors = _with_layers(tensors, layers)
        config["num_hidden_layers"] = len(layers)
    if vocabulary is None:
        (output / "tokenizer.json").write_text(tokenizer_text(checkpoint), encoding="utf-8")
    else:
        config, tensors = _with_tokens(checkpoint, output, config, tensors, texts, words, vocabulary)
    if dropout is not None:
        config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config["torch_dtype"] = "float32"
    save_file(dict(tensors), output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def prune_vocabulary(
    checkpoint: Path, output: Path, texts: Iterable[str], *, size: int, words: Iterable[str] = ()
) -> int:
    """Write the checkpoint ``output``: that of ``checkpoint`` with the ``size`` tokens ``texts`` needs most.

    Returns how many tokens it has. Raises as ``cut_checkpoint`` does, and ``OutputError`` where the folder is not
    new or cannot be written.
    """
    require("export", "safetensors")
    check_output(output, checkpoint, overwrite=False)
    with new_folder(output) as made:
        cut_checkpoint(checkpoint, made, vocabulary=size, texts=texts, words=words)
        return int(json.loads((made / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def checked_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of a checkpoint of the BERT family; ``CheckpointError`` or ``UnsupportedModelError``."""
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be used",
            expected="the config.json of a checkpoint",
            found=f"{type(error).__name__}: {error}",
            remedy="Name the folder of a checkpoint as transformers saves it.",
        ) from None
    if kind not in LAID_OUT_LIKE_BERT:
        raise UnsupportedModelError(
            f"{checkpoint} cannot be adapted",
            expected=f"a model of the BERT family ({', '.join(LAID_OUT_LIKE_BERT)})",
            found=repr(kind),
            remedy="Use another checkpoint.",
        )
    found: dict[str, Any] = config
    return found


def _check_layers(layers: Sequence[int], count: int) -> None:
    fine = bool(layers) and all(0 <= number < count for number in layers)
    if not fine or list(layers) != sorted(set(layers)):
        raise InvalidOptionError(
            "layers",
            expected=f"ascending numbers from 0 to {count - 1}",
            found=",".join(map(str, layers)) or "none",
            remedy="For example --layers 0,3,7,11.",
        )


def _with_layers(
    tensors: Mapping[str, NDArray[np.float32]], layers: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    new = {old: position for position, old in enumerate(layers)}
    kept = {}
    for name, tensor in tensors.items():
        match = LAYER.match(name)
        if match is None:
            kept[name] = tensor
        elif int(match["number"]) in new:
            kept[f"{match['before']}{new[int(match['number'])]}{match['after']}"] = tensor
    return kept


def _with_tokens(
    checkpoint: Path,
    output: Path,
    config: dict[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    texts: Iterable[str],
    words: Iterable[str],
    size: int,
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    vocabulary = read_vocabulary(checkpoint)
    kept = chosen_tokens(vocabulary, texts, size, words=words)
    (output / "tokenizer.json").write_text(vocabulary.keeping(kept), encoding="utf-8")
    if (checkpoint / "vocab.txt").exists():
        lines = "".join(f"{vocabulary.pieces[number]}\n" for number in kept)
        (output / "vocab.txt").write_text(lines, encoding="utf-8")
    new_id = {old: new for new, old in enumerate(kept)}
    config = {**config, "vocab_size": len(kept)}
    for name in TOKEN_IDS:
        if config.get(name) in new_id:
            config[name] = new_id[config[name]]
    cut = {
        name: np.ascontiguousarray(tensor[kept]) if BY_TOKEN.search(name) else tensor
        for name, tensor in tensors.items()
    }
    return config, cut


def _copy_settings(checkpoint: Path, output: Path, *, prompts: bool) -> None:
    for name in COPIED:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, output / name)
    for folder in checkpoint.glob("[0-9]*_*"):
        if folder.is_dir():
            shutil.copytree(folder, output / folder.name, dirs_exist_ok=True)
    path = checkpoint / "config_sentence_transformers.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not prompts:
            settings |= {"prompts": {}, "default_prompt_name": None}
        (output / path.name).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
