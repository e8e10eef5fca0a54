"""FP32 model folders become INT8 ones, each with a certificate of what that cost (extra ``quantize``).

Importing this package loads neither onnx nor onnxruntime; quantizing does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.errors import InputError, InvalidOptionError, UnsupportedModelError
from qingyu.models.extras import require
from qingyu.runtime.spec import ModelSpec, check_file, read_spec

if TYPE_CHECKING:
    from qingyu.quantize.certificate import Certificate

__all__ = ["quantize"]

RECIPE = "rowwise"


def quantize(model: Path, output: Path, *, texts: Sequence[str], overwrite: bool = False) -> ModelSpec:
    """Write the FP32 model folder ``model`` as INT8 to ``output``; the new spec, certificate included.

    The recipe is row-wise: 8-bit weights with a scale for each output channel, 8-bit activations with a scale for
    each token. ``texts``, at least two different ones, are embedded with both models; the certificate reports
    cosines. ``output`` appears whole or not at all, and ``model`` is not touched.

    Raises ``MissingExtraError``, ``InputError``, ``UnsupportedModelError`` (not FP32, or a graph that
    ``qingyu export`` did not write), ``CorruptFileError`` or ``OutputError``.
    """
    require("quantize", "onnx")
    from qingyu.models.export.folder import check_output, new_folder, write_manifest

    spec = _readable(model)
    _check_texts(texts)
    check_output(output, model, overwrite=overwrite)
    with new_folder(output) as folder:
        (folder / spec.graph).write_bytes(_int8_graph(model / spec.graph))
        (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        draft = dataclasses.replace(spec, precision="int8", recipe=RECIPE)
        write_manifest(folder, draft)
        certificate = measure(model, folder, texts).to_json()
        (folder / "qingyu.json").unlink()
        return write_manifest(folder, dataclasses.replace(draft, certificate=certificate))


def measure(reference: Path, candidate: Path, texts: Sequence[str]) -> Certificate:
    """The certificate of the model folder ``candidate`` against the FP32 folder ``reference`` on these texts."""
    from qingyu.quantize.certificate import compare
    from qingyu.runtime.embedder import Embedder

    with Embedder.open(reference) as fp32, Embedder.open(candidate) as int8:
        tokens = [len(fp32.tokenize(text).ids) for text in texts]
        return compare(fp32.embed(texts), int8.embed(texts, progress=True), tokens)


def _readable(model: Path) -> ModelSpec:
    spec = read_spec(model)
    if spec.precision != "fp32":
        raise UnsupportedModelError(
            f"{model} is already quantized",
            expected="an FP32 model folder",
            found=f"{spec.precision}, recipe {spec.recipe}",
            remedy="Quantize the FP32 folder that it was made from.",
        )
    for name, record in spec.files.items():
        check_file(model, name, record)
    return spec


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InvalidOptionError(
            "texts", expected="a list of texts", found="one str", remedy="Put it in a list."
        )
    different = len(set(texts))
    if different < 2:
        raise InputError(
            "too few texts to measure on",
            expected="at least 2 different texts",
            found=str(different),
            remedy="Give texts like those that the model will read.",
        )


def _int8_graph(path: Path) -> bytes:
    from qingyu.models.export.graph import read_plan, read_weights, write_graph
    from qingyu.quantize.rowwise import MICROSOFT, RowwiseLinear

    return write_graph(read_plan(path), read_weights(path), RowwiseLinear(), domains=(MICROSOFT,))
