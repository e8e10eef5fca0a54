"""The file of a model folder for OpenVINO: written beside the other graph, measured, and certified like it.

Fixed scales for every input, smoothed as in the recipe ``static``: OpenVINO makes one kernel of a product, its bias,
the activation function and the rounding of what comes out, which no scale that is found at run time allows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.errors import FidelityError, UnsupportedModelError
from qingyu.models.extras import require
from qingyu.quantize.recipes import STATIC, Recipe
from qingyu.quantize.speed import measure_speed, speed_sample
from qingyu.runtime.spec import LEAST_COSINES, MANIFEST, ModelSpec, OpenVinoFile

if TYPE_CHECKING:
    from qingyu.quantize.fidelity import Reference
    from qingyu.quantize.pipeline import Gate, PreparedSource

__all__ = ["MARKED", "OPENVINO_FILE", "write_openvino"]

OPENVINO_FILE = "model.openvino.onnx"
MARKED = Recipe(
    "openvino",
    "8-bit products, smoothed, fixed scales, for OpenVINO",
    products="marked",
    scales=STATIC,
    smoothing=0.8,
)


def write_openvino(
    folder: Path, spec: ModelSpec, source: PreparedSource, reference: Reference, gate: Gate, *, rounds: int
) -> ModelSpec:
    """Add the file for OpenVINO to a finished model folder, measured against FP32; the new spec, written.

    Its speed is measured against the folder's other graph. Raises ``FidelityError`` when it misses the gate,
    ``MissingExtraError`` and ``UnsupportedModelError``.
    """
    from qingyu.quantize.golden import make_golden
    from qingyu.runtime.embedder import Embedder

    require("openvino", "openvino")
    if "hidden_state_0" in spec.outputs:
        raise UnsupportedModelError(
            f"{spec.name} gives its hidden states",
            expected="a model exported without --hidden-states",
            found=", ".join(spec.outputs),
            remedy="Export it without, or leave out --openvino.",
        )
    (folder / OPENVINO_FILE).write_bytes(_pooled_alone(source.graph(MARKED)))
    draft = dataclasses.replace(spec, openvino=OpenVinoFile(OPENVINO_FILE, LEAST_COSINES[0]))
    _write(folder, draft)
    with (
        Embedder.open(folder, engine="openvino", self_check=False) as model,
        Embedder.open(folder, engine="onnxruntime", self_check=False) as other,
    ):
        measured = reference.measure(model, rounds=rounds)
        missed = gate.missed(measured.certificate)
        if missed is not None:
            raise FidelityError(
                f"{spec.name} quantized for OpenVINO is too far from FP32",
                expected=f"cosine of at least {gate.mean} on average and {gate.minimum} at worst",
                found=f"{missed}; nothing was written",
                remedy="Leave out --openvino, or allow more loss with --min-cosine.",
            )
        least = make_golden(model, reference.embedder).least_cosine
        sample = speed_sample(reference.texts, reference.tokens)
        speed = measure_speed(other, model, sample, rounds=rounds).ratio if rounds else None
    record = OpenVinoFile(OPENVINO_FILE, least, measured.certificate.to_json(), speed)
    return _write(folder, dataclasses.replace(spec, openvino=record))


def _pooled_alone(graph: bytes) -> bytes:
    """The graph with pooled vectors as its only output: others would be copied after every run."""
    import onnx

    model = onnx.load_from_string(graph)
    for value in [value for value in model.graph.output if value.name != "pooled"]:
        model.graph.output.remove(value)
    return model.SerializeToString()  # type: ignore[no-any-return]


def _write(folder: Path, spec: ModelSpec) -> ModelSpec:
    from qingyu.models.export.folder import write_manifest

    (folder / MANIFEST).unlink()
    return write_manifest(folder, spec)
