"""From nothing to folders that every contender can open: checkpoints, our model folders, the contenders' own files.

All of it is made once in a working folder, and found there by later runs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.bench.contenders.contract import Files, installed, write_once
from qingyu.bench.shapes import SHAPES, write_checkpoint
from qingyu.bench.texts import read_sources, varied_texts
from qingyu.bench.workloads import WORKLOADS
from qingyu.errors import InvalidOptionError, ModelNotFoundError

if TYPE_CHECKING:
    from qingyu.runtime.spec import Architecture

__all__ = ["FIDELITY", "MODELS", "Model", "Prepared", "model", "prepare_model", "write_texts"]

FIDELITY = "fidelity"
FIDELITY_TEXTS = 400
CERTIFIED_TEXTS = 96


@dataclass(frozen=True)
class Model:
    """A model to measure with. ``shape``: random weights; ``bundled``: in the package; else the user names a folder.

    ``real``: its weights are, so that how close vectors are to FP32's means something.
    """

    name: str
    title: str
    real: bool
    shape: bool = False
    bundled: bool = False
    prompt: str = ""


MODELS = {
    one.name: one
    for one in (
        Model("bge-small-zh", "shape of bge-small-zh-v1.5, random weights", real=False, shape=True),
        Model("bert-base-chinese", "shape of bert-base-chinese, random weights", real=False, shape=True),
        Model(
            "multilingual-e5-small-zh",
            "multilingual-e5-small, Chinese vocabulary, real weights",
            real=True,
            prompt="passage: ",
        ),
        Model("qingyu-mini-zh", "qingyu-mini-zh, in the package as INT8 only", real=True, bundled=True),
    )
}


@dataclass(frozen=True)
class Prepared:
    """A model's files, its sizes, and the prompt that stands before each text."""

    model: Model
    files: Files
    sizes: Architecture


def model(name: str) -> Model:
    """The model of a name, or ``InvalidOptionError`` with the names there are."""
    if name not in MODELS:
        raise InvalidOptionError(
            "unknown model",
            expected=f"one of {', '.join(MODELS)}",
            found=repr(name),
            remedy="Name one of them; your own model folder can be measured with `qingyu bench FOLDER`.",
        )
    return MODELS[name]


def prepare_model(one: Model, folder: Path, *, checkpoint: Path | None = None) -> Prepared:
    """Our folders of a model, made if they are not there: checkpoint, FP32, INT8 with its edge file.

    ``checkpoint`` gives the weights of a model that is not random, and the tokenizer of one that is. Raises
    ``ModelNotFoundError`` where it is needed and missing, and what ``export`` and ``quantize`` raise.
    """
    from qingyu.runtime.spec import read_spec
    from qingyu.runtime.task import BUNDLED, find_model

    root = folder / "models" / one.name
    fp32: Path | None = None
    source: Path | None = None
    if one.bundled:
        int8 = find_model(BUNDLED)
    else:
        source = _checkpoint(one, root, checkpoint)
        fp32 = write_once(root / "fp32", partial(_export, source))
        int8 = write_once(root / "int8", partial(_quantize, fp32))
    spec = read_spec(int8)
    files = Files(
        model=one.name,
        checkpoint=source,
        fp32=fp32,
        int8=int8,
        own=root,
        pooling=spec.pooling,
        dim=spec.dim,
        max_tokens=spec.max_tokens,
        prompt=one.prompt,
    )
    return Prepared(one, files, spec.architecture)


def _checkpoint(one: Model, root: Path, given: Path | None) -> Path:
    if one.shape:
        return write_once(
            root / "checkpoint", lambda part: write_checkpoint(SHAPES[one.name], part, like=given)
        )
    if given is None or not given.is_dir():
        raise ModelNotFoundError(
            f"no weights of {one.name}",
            expected="its checkpoint folder",
            found="none" if given is None else f"nothing at {given}",
            remedy=f"Give it with --checkpoint {one.name}=FOLDER, or leave the model out.",
        )
    return given.resolve()


def _export(checkpoint: Path, folder: Path) -> None:
    from qingyu.models.export import export

    folder.rmdir()  # export writes a folder that is not there yet
    export(checkpoint, folder)


def _quantize(fp32: Path, folder: Path) -> None:
    from qingyu.quantize import quantize
    from qingyu.quantize.texts import calibration_texts

    folder.rmdir()
    options: dict[str, Any] = {"edge": True, "speed_rounds": 0}
    if "openvino" in inspect.signature(quantize).parameters and installed("openvino"):
        options["openvino"] = True
    # Its own certificate is not what is read here, so a few texts will do.
    quantize(fp32, folder, texts=calibration_texts(CERTIFIED_TEXTS), **options)


def write_texts(folder: Path, texts: Path | None, names: Sequence[str], *, quick: bool) -> dict[str, Path]:
    """A JSON file with the texts of each workload, and one with those that fidelity is measured on."""
    sources = read_sources(texts)
    found = {}
    for name in names:
        one = WORKLOADS[name]
        found[name] = _write_texts(
            folder / "texts" / f"{name}.json", one.sample(sources, one.quick if quick else one.texts)
        )
    found[FIDELITY] = _write_texts(
        folder / "texts" / f"{FIDELITY}.json", varied_texts(texts, FIDELITY_TEXTS, seed=1)
    )
    return found


def _write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    beside.rename(path)
    return path
