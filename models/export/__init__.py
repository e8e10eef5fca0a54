"""A checkpoint folder becomes a model folder: graph, tokenizer and manifest.

Needs the extra ``export`` (onnx, safetensors) and no torch; ``via="optimum"`` needs the extra ``optimum``.
Importing this loads none of them. Not here: downloading, and quantization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from qingyu.errors import CheckpointError, InvalidOptionError
from qingyu.models.export.checkpoint import Checkpoint, default_task, read_checkpoint
from qingyu.models.export.files import is_unicode, shown
from qingyu.models.export.folder import check_output, new_folder, write_manifest
from qingyu.models.export.graph import (
    FloatLinear,
    FoldedWeights,
    GraphPlan,
    input_names,
    output_names,
    write_graph,
)
from qingyu.models.export.pooling import POOLINGS
from qingyu.models.extras import require
from qingyu.runtime.spec import ModelSpec, Pooling, Task

__all__ = ["export"]

GRAPH = "model.onnx"
TOKENIZER = "tokenizer.json"


def export(
    checkpoint: Path,
    output: Path,
    *,
    name: str | None = None,
    task: Task | None = None,
    multi_label: bool = False,
    hidden_states: bool = False,
    prompts: Mapping[str, str] | None = None,
    pooling: Pooling | None = None,
    via: Literal["writer", "optimum"] = "writer",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelSpec:
    """Write the model folder of a checkpoint, whole or not at all, and return its manifest.

    ``name`` is by default that of the checkpoint folder. ``task``: ``None`` is embedding for checkpoints with
    sentence-transformers' files, and else what config.json's ``architectures`` name. ``multi_label`` makes a
    classifier's labels independent of each other also where config.json's problem_type does not. ``prompts``
    are added to those of the checkpoint and win over them; ``pooling`` replaces the checkpoint's; both are for
    embeddings only. ``hidden_states`` adds every layer's states to the outputs. ``via="optimum"`` lets
    optimum-onnx and torch write the encoder, for architectures that are not BERT's, and for embeddings only.
    ``overwrite`` replaces a model folder, and nothing else, once the new one is whole.
    ``progress`` is called with the layers written and their total. Weights of any precision are written as
    FP32.

    Raises ``ModelNotFoundError``, ``CheckpointError``, ``UnsupportedModelError``, ``TokenizerError``,
    ``OutputError``, ``MissingExtraError``, and ``InvalidOptionError`` for an option that makes no sense.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_options(name, pooling, prompts, via)
    require("export", "onnx", "safetensors")
    chosen = _task(checkpoint, task, embedding=via == "optimum" or pooling is not None or bool(prompts))
    _check_option(
        "multi_label", True, not multi_label or chosen == "classification", "only for classification"
    )
    if via == "optimum":
        from qingyu.models.export.via_optimum import graph_via_optimum

        graph = partial(graph_via_optimum, hidden_states=hidden_states)
    else:
        graph = partial(_graph, hidden_states=hidden_states, progress=progress)
    source = _read(checkpoint, pooling, chosen, any_architecture=via == "optimum", multi_label=multi_label)
    check_output(output, checkpoint, overwrite=overwrite)
    with new_folder(output) as folder:
        content, outputs = graph(source)
        (folder / GRAPH).write_bytes(content)
        (folder / TOKENIZER).write_bytes(source.front_end.tokenizer)
        spec = dataclasses.replace(
            _spec(source, chosen, outputs),
            name=name or checkpoint.resolve().name,
            prompts={**source.prompts, **(prompts or {})},
        )
        return write_manifest(folder, spec)


def _task(checkpoint: Path, task: Task | None, *, embedding: bool) -> Task:
    """The task asked for, or that of the checkpoint; ``embedding``: an option that only embeddings have was given."""
    _check_option("task", task, task is None or task in get_args(Task), ", ".join(get_args(Task)))
    if embedding:
        _check_option("task", task, task in (None, "embedding"), "embedding, with these options")
        return "embedding"
    return default_task(checkpoint) if task is None else task


def _read(
    checkpoint: Path, pooling: Pooling | None, task: Task, *, any_architecture: bool, multi_label: bool
) -> Checkpoint:
    try:
        return read_checkpoint(
            checkpoint, pooling=pooling, any_architecture=any_architecture, task=task, multi_label=multi_label
        )
    except OSError as error:
        remedy = "Mend the permissions, or copy the checkpoint to a disk that can be read."
        raise CheckpointError(
            f"{checkpoint} cannot be read", expected="a readable folder", found=str(error), remedy=remedy
        ) from None


def _graph(
    source: Checkpoint, *, hidden_states: bool, progress: Callable[[int, int], None] | None
) -> tuple[bytes, tuple[str, ...]]:
    """The graph of a checkpoint, by the graph writer, and the names of its outputs."""
    plan = GraphPlan(
        architecture=source.architecture,
        pooling=source.pooling,
        hidden_states=hidden_states,
        padding_id=source.padding_id,
        head=tuple(dense.activation for dense in source.head),
        task_head=source.task_head,
    )
    types = source.task_head is not None and source.task_head.token_types
    weights = FoldedWeights(source.architecture, source.weights, token_types=types)
    return write_graph(plan, weights, FloatLinear(), progress=progress), output_names(plan)


def _spec(source: Checkpoint, task: Task, outputs: tuple[str, ...]) -> ModelSpec:
    return ModelSpec(
        name=source.folder.name,
        task=task,
        architecture=source.architecture,
        dim=source.dim,
        max_tokens=source.max_tokens,
        pooling=source.pooling,
        normalize=source.normalize,
        lowercase=source.front_end.lowercase,
        graph=GRAPH,
        inputs=input_names(source.task_head),
        outputs=outputs,
        precision="fp32",
        prompts=source.prompts,
        default_prompt=source.default_prompt,
        source=source.source,
        labels=source.labels,
        scores=source.scores,
    )


def _check_options(
    name: str | None, pooling: Pooling | None, prompts: Mapping[str, str] | None, via: str
) -> None:
    _check_option("via", via, via in ("writer", "optimum"), "writer or optimum")
    _check_option("pooling", pooling, pooling is None or pooling in POOLINGS, ", ".join(POOLINGS))
    _check_option("name", name, name is None or is_unicode(name), "Unicode text")
    for key, text in (prompts or {}).items():
        _check_option("prompts", {key: text}, is_unicode(key) and is_unicode(text), "names and Unicode texts")


def _check_option(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        remedy = f"Give another value for {option}."
        raise InvalidOptionError(option, expected=expected, found=shown(value), remedy=remedy)
