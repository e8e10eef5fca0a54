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

from qingyu.errors import InvalidOptionError, ModelNotFoundError
from qingyu.models.export.config import (
    check_supported,
    labels_of,
    model_type,
    padding_id,
    read_architecture,
    read_config,
)
from qingyu.models.export.files import Document, refuse
from qingyu.models.export.frontend import FrontEnd, read_front_end
from qingyu.models.export.graph import WORDS, linear_shapes, weight_shapes
from qingyu.models.export.heads import (
    HeadLayout,
    TaskHead,
    head_shapes,
    layout_of,
    task_of_architecture,
)
from qingyu.models.export.modules import DenseLayer, Modules, read_modules
from qingyu.models.export.weights import TensorFiles, open_weights
from qingyu.runtime.spec import Architecture, Pooling, ScoreFunction, Source, Task

__all__ = [
    "Checkpoint",
    "CheckpointWeights",
    "check_folder",
    "default_task",
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
    ``GraphPlan``. A ``task_head`` has its weights under ``task_head``, and ``labels`` and ``scores`` as in
    ``ModelSpec``.
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
    task_head: TaskHead | None = None
    labels: tuple[str, ...] = ()
    scores: ScoreFunction = "softmax"

    @property
    def dim(self) -> int:
        """Width of the pooled vector."""
        return self.head[-1].out_features if self.head else self.architecture.hidden_size


class CheckpointWeights(Mapping[str, NDArray[np.float32]]):
    """Encoder and Dense weights under one set of names, read when asked for.

    ``task_head`` maps names that begin with ``task_head.`` to the encoder file's own.
    """

    def __init__(
        self,
        encoder: TensorFiles,
        head: tuple[TensorFiles, ...] = (),
        task_head: Mapping[str, str] | None = None,
    ) -> None:
        self._parts: dict[str, tuple[TensorFiles, str]] = {name: (encoder, name) for name in encoder}
        self._parts |= {name: (encoder, stored) for name, stored in (task_head or {}).items()}
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


def default_task(folder: Path) -> Task:
    """What a checkpoint is for: embeddings where it has modules.json, else what its first architecture names."""
    check_folder(folder)
    if (folder / "modules.json").exists():
        return "embedding"
    config = read_config(folder)
    named = config.fields.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str):
        return "embedding"
    task = task_of_architecture(first, 2)
    return task if task != "classification" else task_of_architecture(first, len(labels_of(config)))


def read_checkpoint(
    folder: Path,
    *,
    pooling: Pooling | None = None,
    any_architecture: bool = False,
    task: Task = "embedding",
    multi_label: bool = False,
) -> Checkpoint:
    """The checkpoint in a folder, for one ``task``; ``pooling`` replaces what its files say.

    For other tasks than embeddings sentence-transformers' files are not read. ``multi_label`` makes a classifier's
    labels independent whatever config.json says.
    ``any_architecture`` leaves out the check that the graph writer knows the model, and that of its weights.
    Raises ``ModelNotFoundError`` where there is no such folder, ``UnsupportedModelError`` for a kind of
    model that the graph writer does not know, ``CheckpointError`` for anything missing or damaged,
    ``TokenizerError`` for an unusable tokenizer. Weights are checked for presence and shape, not read.
    """
    check_folder(folder)
    modules = read_modules(folder, pooling=pooling) if task == "embedding" else _plain(folder, task)
    config = effective_config(modules)
    if not any_architecture:
        check_supported(config)
    architecture = read_architecture(config)
    kind = model_type(config)
    files = open_weights(modules.encoder, prefix=kind.prefix)
    task_head = None if task == "embedding" else _task_head(folder, config, architecture, files, task)
    weights = CheckpointWeights(
        files,
        tuple(open_weights(dense.folder) for dense in modules.dense),
        None
        if task_head is None
        else _head_names(files, layout_of(architecture.model_type, task), task_head),
    )
    encoder = {} if any_architecture else _encoder_shapes(architecture)
    _check_weights(folder, {**encoder, **_head_shapes(architecture, modules.dense)}, weights)
    _check_task_head(folder, task_head, architecture, weights)
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
        task_head=task_head,
        labels=() if task_head is None or task == "fill-mask" else _labels(config, task),
        scores=score_function(config, task, multi_label=multi_label),
    )


def _plain(folder: Path, task: Task) -> Modules:
    return Modules(folder, Document(folder / "(none)", {}), _head_pooling(folder, task))


def _head_pooling(folder: Path, task: Task) -> Pooling:
    """What the head of a sequence reads; ``classifier_pooling`` is ModernBERT's name, and ``adapt classify``'s."""
    config = read_config(folder)
    if task not in ("classification", "reranking") or "classifier_pooling" not in config.fields:
        return "cls"
    found = config.fields["classifier_pooling"]
    pooling = next((one for one in HEAD_POOLINGS if one == found), None)
    if pooling is None:
        refuse(f"{config.path}: classifier_pooling", expected=" or ".join(HEAD_POOLINGS), found=repr(found))
    return pooling


def _task_head(
    folder: Path, config: Document, sizes: Architecture, files: TensorFiles, task: Task
) -> TaskHead:
    layout = layout_of(sizes.model_type, task)
    has_dense = layout.dense is not None
    return TaskHead(
        task=task,
        labels=sizes.vocab_size if task == "fill-mask" else len(_labels(config, task)),
        activation=(layout.activation or sizes.activation) if has_dense else None,
        norm=layout.norm is not None,
        tied=task == "fill-mask" and _tied(folder, config, files, layout),
        # Fill-mask and tagging read one text, whose types are 0.
        token_types=task in _PAIRS and _token_types(files) > 1,
    )


HEAD_POOLINGS: tuple[Pooling, ...] = ("cls", "mean")
_PAIRS: tuple[Task, ...] = ("classification", "reranking", "question-answering")


def _token_types(files: TensorFiles) -> int:
    return files.shape(TOKEN_TYPES)[0] if TOKEN_TYPES in files and files.shape(TOKEN_TYPES) else 0


def _tied(folder: Path, config: Document, files: TensorFiles, layout: HeadLayout) -> bool:
    """Whether the decoder is the word embedding; as transformers 5, a decoder that differs from it stands."""
    stored = f"{layout.output}.weight"
    if stored in files:
        words = f"{WORDS}.weight"
        return words in files and bool(np.array_equal(files[stored], files[words]))
    if not config.flag("tie_word_embeddings", default=True):
        refuse(f"{folder}: weight {stored}", expected="a decoder, as it is not tied", found="no such weight")
    return True


def _head_names(files: TensorFiles, layout: HeadLayout, head: TaskHead) -> dict[str, str]:
    """The head's weights under our names, with the checkpoint's own; as many as the checkpoint has."""
    biases = [*layout.biases, f"{layout.output}.bias"]
    names = {"task_head.output.bias": next((name for name in biases if name in files), biases[-1])}
    if not head.tied:
        names["task_head.output.weight"] = f"{layout.output}.weight"
    parts = (("task_head.dense", layout.dense), ("task_head.LayerNorm", layout.norm))
    for name, stored in parts:
        if stored is not None:
            names |= {f"{name}.{kind}": f"{stored}.{kind}" for kind in ("weight", "bias")}
    return {name: stored for name, stored in names.items() if stored in files}


def _check_task_head(
    folder: Path, head: TaskHead | None, sizes: Architecture, weights: CheckpointWeights
) -> None:
    if head is None:
        return
    shapes = head_shapes(head, sizes)
    if not any(name in weights for name in shapes):
        raise InvalidOptionError(
            f"{folder} has no head for {head.task}",
            expected=f"a checkpoint that was trained for {head.task}",
            found="weights of the encoder alone",
            remedy="Choose another --task, such as embedding, or another checkpoint.",
        )
    linear = {name for name in shapes if name.endswith(".weight")}
    _check_weights(
        folder, {name: shape[::-1] if name in linear else shape for name, shape in shapes.items()}, weights
    )


def _labels(config: Document, task: Task) -> tuple[str, ...]:
    labels = labels_of(config)
    wanted = {"reranking": 1, "question-answering": 2}.get(task, len(labels))
    if task == "question-answering":
        return ("start", "end")
    if len(labels) != wanted:
        raise InvalidOptionError(
            f"{config.path} describes no model for {task}",
            expected=f"{wanted} label",
            found=f"{len(labels)}",
            remedy="Export it with --task classification.",
        )
    return labels


_IDENTITIES = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")


def score_function(config: Document, task: Task, *, multi_label: bool) -> ScoreFunction:
    """How logits become scores, by the rules of transformers' pipelines and of sentence-transformers' CrossEncoder."""
    if multi_label:
        return "sigmoid"
    if task == "reranking":
        settings = config.object("sentence_transformers")
        named = settings.get("activation_fn", config.fields.get("sbert_ce_default_activation_function"))
        return "none" if named in _IDENTITIES else "sigmoid"
    if task != "classification":
        return "softmax"
    problem = config.fields.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or len(labels_of(config)) == 1 else "softmax"


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
