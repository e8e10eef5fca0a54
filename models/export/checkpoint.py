"""A checkpoint folder, read: sizes, pooling, prompts, limits, front end, and weights by name.

Everything comes from the checkpoint's own files. Layouts: sentence-transformers (modules.json) and plain
Hugging Face. Not here: writing (``graph.py``, ``folder.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import ModelNotFoundError
from qingyu.models.export.config import (
    check_supported,
    model_type,
    padding_id,
    read_architecture,
    read_config,
)
from qingyu.models.export.files import Document, refuse
from qingyu.models.export.frontend import FrontEnd, read_front_end
from qingyu.models.export.graph import linear_shapes, weight_shapes
from qingyu.models.export.modules import DenseLayer, Modules, read_modules
from qingyu.models.export.weights import TensorFiles, open_weights
from qingyu.runtime.spec import Architecture, Pooling, Source

__all__ = [
    "Checkpoint",
    "CheckpointWeights",
    "check_folder",
    "maximum_tokens",
    "read_checkpoint",
    "read_source",
]

TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder.

    ``weights`` gives float32 arrays under the names of BertModel, linear ones (out, in), and Dense layers
    as ``head.<n>.weight`` and ``head.<n>.bias``; each access reads from the disk. ``padding_id`` is as in
    ``GraphPlan``.
    """

    folder: Path
    encoder_folder: Path
    architecture: Architecture
    pooling: Pooling
    normalize: bool
    head: tuple[DenseLayer, ...]
    prompts: Mapping[str, str]
    default_prompt: str | None
    max_tokens: int
    padding_id: int | None
    front_end: FrontEnd
    source: Source
    weights: CheckpointWeights

    @property
    def dim(self) -> int:
        """Width of the pooled vector."""
        return self.head[-1].out_features if self.head else self.architecture.hidden_size


class CheckpointWeights(Mapping[str, NDArray[np.float32]]):
    """Encoder and Dense weights under one set of names, read when asked for."""

    def __init__(self, encoder: TensorFiles, head: tuple[TensorFiles, ...] = ()) -> None:
        self._parts: dict[str, tuple[TensorFiles, str]] = {name: (encoder, name) for name in encoder}
        for number, files in enumerate(head):
            for name in files:
                self._parts[f"head.{number}.{name.removeprefix('linear.')}"] = (files, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        files, stored = self._parts[name]
        return files.shape(stored)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        files, stored = self._parts[name]
        return files[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def read_checkpoint(
    folder: Path, *, pooling: Pooling | None = None, any_architecture: bool = False
) -> Checkpoint:
    """The checkpoint in a folder; ``pooling`` replaces what its files say.

    ``any_architecture`` leaves out the check that the graph writer knows the model, and that of its weights.
    Raises ``ModelNotFoundError`` where there is no such folder, ``UnsupportedModelError`` for a kind of
    model that the graph writer does not know, ``CheckpointError`` for anything missing or damaged,
    ``TokenizerError`` for an unusable tokenizer. Weights are checked for presence and shape, not read.
    """
    check_folder(folder)
    modules = read_modules(folder, pooling=pooling)
    config = effective_config(modules)
    if not any_architecture:
        check_supported(config)
    architecture = read_architecture(config)
    kind = model_type(config)
    weights = CheckpointWeights(
        open_weights(modules.encoder, prefix=kind.prefix),
        tuple(open_weights(dense.folder) for dense in modules.dense),
    )
    encoder = {} if any_architecture else _encoder_shapes(architecture)
    _check_weights(folder, {**encoder, **_head_shapes(architecture, modules.dense)}, weights)
    if not any_architecture:
        _check_token_types(folder, architecture, weights)
    skipped = padding_id(config)
    usable = architecture.max_positions - (0 if skipped is None else skipped + 1)
    front_end = read_front_end(modules.encoder, config, modules.transformer, kind.tokenizer_class)
    return Checkpoint(
        folder=folder,
        encoder_folder=modules.encoder,
        architecture=architecture,
        pooling=modules.pooling,
        normalize=modules.normalize,
        head=modules.dense,
        prompts=modules.prompts,
        default_prompt=modules.default_prompt,
        max_tokens=maximum_tokens(modules.transformer, front_end, usable),
        padding_id=skipped,
        front_end=front_end,
        source=read_source(folder, config),
        weights=weights,
    )


def check_folder(folder: Path) -> None:
    """Raise ``ModelNotFoundError`` unless there is a folder with a config.json or modules.json."""
    remedy = "Name the folder of a downloaded checkpoint (config.json, model.safetensors, tokenizer files)."
    problem = f"no checkpoint at {folder}"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise ModelNotFoundError(problem, expected="a checkpoint folder", found=found, remedy=remedy)
    if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
        raise ModelNotFoundError(problem, expected="config.json or modules.json", found=found, remedy=remedy)


def effective_config(modules: Modules) -> Document:
    """config.json with what sentence-transformers' settings put over it."""
    config = read_config(modules.encoder)
    for name in ("config_args", "config_kwargs"):
        config = config.updated(modules.transformer.object(name))
    return config


def maximum_tokens(transformer: Document, front_end: FrontEnd, usable: int) -> int:
    """The tokens of the longest text, special tokens counted, as sentence-transformers would cut it.

    That is max_seq_length where it is stated, else the tokenizer's model_max_length. Neither may exceed the
    positions that the model has, where sentence-transformers would fail.
    """
    stated = front_end.model_max_length
    if front_end.overrides_length:
        return min(stated, usable)
    if transformer.fields.get("max_seq_length") is not None:
        stated = transformer.integer("max_seq_length", 3, 1 << 30)
    return min(stated, usable)


def _encoder_shapes(sizes: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of the encoder's weights as checkpoints hold them: linear ones (out, in)."""
    shapes = weight_shapes(sizes)
    for number in range(sizes.layers):
        for name, shape in linear_shapes(sizes, number).items():
            shapes[f"{name}.weight"] = shape[::-1]
    return shapes


def _head_shapes(sizes: Architecture, head: tuple[DenseLayer, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    dim = sizes.hidden_size
    for number, dense in enumerate(head):
        shapes[f"head.{number}.weight"] = (dense.out_features, dim)
        if dense.bias:
            shapes[f"head.{number}.bias"] = (dense.out_features,)
        dim = dense.out_features
    return shapes


def _check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]], weights: CheckpointWeights) -> None:
    for name, wanted in expected.items():
        found = f"shape {weights.shape(name)}" if name in weights else "no such weight"
        if found != f"shape {wanted}":
            refuse(f"{folder}: weight {name}", expected=f"shape {wanted}", found=found)


def _check_token_types(folder: Path, sizes: Architecture, weights: CheckpointWeights) -> None:
    # Only row 0 is used, so any number of rows will do.
    shape = weights.shape(TOKEN_TYPES) if TOKEN_TYPES in weights else ()
    if len(shape) != 2 or shape[0] < 1 or shape[1] != sizes.hidden_size:
        expected = f"shape (types, {sizes.hidden_size})"
        refuse(
            f"{folder}: weight {TOKEN_TYPES}",
            expected=expected,
            found=f"shape {shape}" if shape else "no such weight",
        )


def read_source(folder: Path, config: Document) -> Source:
    """Repository and licence, where the checkpoint's own files name them."""
    named = config.fields.get("_name_or_path")
    is_repository = isinstance(named, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named)
    return Source(repository=named if is_repository else None, license=_license(folder / "README.md"))


def _license(readme: Path) -> str | None:
    """The ``license:`` of a model card's front matter."""
    try:
        with readme.open(encoding="utf-8", errors="replace") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", head, re.DOTALL)
    found = (
        re.search(r"^license:[ \t]*[\"']?([A-Za-z0-9][\w.+-]*)", front.group(1), re.MULTILINE)
        if front
        else None
    )
    return found.group(1) if found else None
