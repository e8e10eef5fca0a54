"""``qingyu export``: a checkpoint becomes a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import new_command
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.runtime.spec import ModelSpec

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu export checkpoints/bge-small-zh-v1.5 out/bge \\
    --prompt query=为这个句子生成表示以用于检索相关文章："""


# Those of qingyu.runtime.spec.Task (a test compares).
TASKS = ("embedding", "fill-mask", "classification", "tagging", "question-answering", "reranking")


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "make a model folder from a checkpoint (config.json, model.safetensors, tokenizer files)"
    parser = new_command(commands, "export", summary, EXAMPLE)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="model folder to make")
    parser.add_argument("--name", help="name in the manifest (default: the checkpoint folder's)")
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="what the model is for (default: embedding with sentence-transformers files, else what the "
        "checkpoint's architectures say)",
    )
    parser.add_argument(
        "--multi-label",
        action="store_true",
        help="classification: labels do not exclude each other (default: what the checkpoint says)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="add or replace a prompt; repeatable",
    )
    parser.add_argument(
        "--pooling",
        choices=("cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"),
        help="for checkpoints that do not say (default: what the checkpoint says, else mean)",
    )
    parser.add_argument("--hidden-states", action="store_true", help="also give every layer's token states")
    parser.add_argument(
        "--via",
        choices=("writer", "optimum"),
        default="writer",
        help="writer: no torch, BERT family; optimum: other architectures (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export, and say what was made."""
    from qingyu.models.export import export

    spec = export(
        options.checkpoint,
        options.output,
        name=options.name,
        task=options.task,
        multi_label=options.multi_label,
        hidden_states=options.hidden_states,
        prompts=dict(map(_named, options.prompt)),
        pooling=options.pooling,
        via=options.via,
        overwrite=options.overwrite,
    )
    if options.json:
        print(spec.to_json(), end="")
    else:
        size = spec.files[spec.graph].bytes / 1e6
        print(f"{options.output}: {spec.name}, {_made(spec)}, FP32, {size:.1f} MB")
    return 0


def _made(spec: ModelSpec) -> str:
    if spec.task == "embedding":
        return f"{spec.dim} dimensions"
    labels = f" of {len(spec.labels)} labels" if spec.task in ("classification", "tagging") else ""
    return f"{spec.task}{labels}"


def _named(pair: str) -> tuple[str, str]:
    name, separator, text = pair.partition("=")
    if not separator or not name:
        raise InvalidOptionError(
            "--prompt", expected="NAME=TEXT", found=repr(pair), remedy="For example query=查询："
        )
    return name, text
