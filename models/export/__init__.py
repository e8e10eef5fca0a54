"""A checkpoint folder becomes a model folder: graph, tokenizer and manifest.

Needs the extra ``export`` (onnx, safetensors) and no torch; ``via="optimum"`` needs the extra ``optimum``.
Importing this loads none of them. Not here: downloading, and quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from qingyu.errors import InvalidOptionError
from qingyu.models.export.checkpoint import Checkpoint, read_checkpoint
from qingyu.models.export.folder import check_output, new_folder, write_manifest
from qingyu.models.export.graph import (
    INPUTS,
    FloatLinear,
    FoldedWeights,
    GraphPlan,
    output_names,
    write_graph,
)
from qingyu.models.export.pooling import POOLINGS
from qingyu.models.extras import require
from qingyu.runtime.spec import ModelSpec, Pooling

__all__ = ["export"]

GRAPH = "model.onnx"
TOKENIZER = "tokenizer.json"


def export(
    checkpoint: Path,
    output: Path,
    *,
    name: str | None = None,
    hidden_states: bool = False,
    prompts: Mapping[str, str] | None = None,
    pooling: Pooling | None = None,
    via: Literal["writer", "optimum"] = "writer",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelSpec:
    """Write the model folder of a checkpoint, whole or not at all, and return its manifest.

    ``name`` is by default that of the checkpoint folder. ``prompts`` are added to those of the checkpoint
    and win over them; ``pooling`` replaces the checkpoint's. ``hidden_states`` adds every layer's states to
    the outputs. ``via="optimum"`` lets optimum-onnx and torch write the encoder, for architectures that are
    not BERT's. ``overwrite`` replaces a model folder, and nothing else, once the new one is whole.
    ``progress`` is called with the layers written and their total. Weights of any precision are written as
    FP32.

    Raises ``ModelNotFoundError``, ``CheckpointError``, ``UnsupportedModelError``, ``TokenizerError``,
    ``OutputError``, ``MissingExtraError``, and ``InvalidOptionError`` for an option that makes no sense.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_options(pooling, prompts, via)
    require("export", "onnx", "safetensors")
    if via == "optimum":
        from qingyu.models.export.via_optimum import export_via_optimum

        return export_via_optimum(
            checkpoint, output, name=name, hidden_states=hidden_states, prompts=prompts, pooling=pooling,
            overwrite=overwrite,
        )  # fmt: skip
    source = read_checkpoint(checkpoint, pooling=pooling)
    check_output(output, checkpoint, overwrite=overwrite)
    plan = GraphPlan(
        architecture=source.architecture,
        pooling=source.pooling,
        hidden_states=hidden_states,
        padding_id=source.padding_id,
        head=tuple(dense.activation for dense in source.head),
    )
    weights = FoldedWeights(source.architecture, source.weights)
    with new_folder(output) as folder:
        graph = write_graph(plan, weights, FloatLinear(), progress=progress)
        (folder / GRAPH).write_bytes(graph)
        (folder / TOKENIZER).write_bytes(source.front_end.tokenizer)
        spec = _spec(source, plan, name or checkpoint.resolve().name, {**source.prompts, **(prompts or {})})
        return write_manifest(folder, spec)


def _spec(source: Checkpoint, plan: GraphPlan, name: str, prompts: Mapping[str, str]) -> ModelSpec:
    return ModelSpec(
        name=name,
        task="embedding",
        architecture=source.architecture,
        dim=source.dim,
        max_tokens=source.max_tokens,
        pooling=source.pooling,
        normalize=source.normalize,
        lowercase=source.front_end.lowercase,
        graph=GRAPH,
        inputs=INPUTS,
        outputs=output_names(plan),
        precision="fp32",
        prompts=prompts,
        default_prompt=source.default_prompt,
        source=source.source,
    )


def _check_options(pooling: Pooling | None, prompts: Mapping[str, str] | None, via: str) -> None:
    if via not in ("writer", "optimum"):
        raise InvalidOptionError(
            "via", expected="writer or optimum", found=repr(via), remedy="Choose one of them."
        )
    if pooling is not None and pooling not in POOLINGS:
        known = ", ".join(POOLINGS)
        raise InvalidOptionError("pooling", expected=known, found=repr(pooling), remedy="Choose one of them.")
    for key, text in (prompts or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            found = f"{key!r}: {text!r}"
            remedy = "Give the text that is put before each input."
            raise InvalidOptionError("prompts", expected="names and texts", found=found, remedy=remedy)
