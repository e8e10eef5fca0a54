"""``qingyu verify``: a quantized model folder measured again, here, against its FP32 folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.certificate import (
    add_gate,
    add_measuring,
    as_text,
    refuse_embedding_options,
    retrieval_sets,
    similarity_sets,
    task_as_text,
    texts_of,
)
from qingyu.cli.common import new_command
from qingyu.errors import FidelityError

if TYPE_CHECKING:
    from qingyu.quantize.certificate import Certificate
    from qingyu.runtime.spec import ModelSpec

__all__ = ["add", "run"]

EXAMPLE = "qingyu verify out/e5-int8 --against out/e5 --texts sentences.txt"


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "measure a quantized model folder against its FP32 folder on this machine"
    parser = new_command(commands, "verify", summary, EXAMPLE)
    parser.add_argument("model", metavar="FOLDER", type=Path, help="quantized model folder")
    parser.add_argument("--against", required=True, metavar="FP32", type=Path, help="FP32 model folder")
    add_measuring(parser)
    add_gate(parser)
    parser.add_argument(
        "--engine",
        choices=("onnxruntime", "openvino"),
        default="onnxruntime",
        help="what runs the quantized model (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the certificate; the exit code is 6 when it misses the gate."""
    from qingyu.quantize import Gate, verify
    from qingyu.quantize.texts import calibration_texts
    from qingyu.runtime.spec import read_spec

    spec = read_spec(options.model)
    if spec.task != "embedding":
        return _run_task(options, spec.task)
    texts = texts_of(options)
    certificate = verify(
        options.model,
        options.against,
        calibration_texts() if texts is None else texts,
        retrieval=retrieval_sets(options),
        similarity=similarity_sets(options),
        engine=options.engine,
        speed_rounds=options.speed_rounds,
        progress=True,
    ).certificate
    print(json.dumps(certificate.to_json(), ensure_ascii=False) if options.json else as_text(certificate))
    if not options.json:
        print(f"\n{_against_stored(_stored(spec, options.engine), certificate)}")
    missed = Gate(options.min_cosine, options.min_worst_cosine).missed(certificate)
    if missed:
        raise FidelityError(
            f"{options.model} is too far from FP32",
            expected=f"a mean cosine of {options.min_cosine:g}, {options.min_worst_cosine:g} at worst",
            found=missed,
            remedy="Quantize again with a more faithful recipe.",
        )
    return 0


def _run_task(options: argparse.Namespace, task: str) -> int:
    from qingyu.quantize import TaskGate, verify_task

    refuse_embedding_options(options, task)
    certificate = verify_task(
        options.model, options.against, texts_of(options), speed_rounds=options.speed_rounds
    )
    print(
        json.dumps(certificate.to_json(), ensure_ascii=False) if options.json else task_as_text(certificate)
    )
    missed = TaskGate(options.min_agreement).missed(certificate)
    if missed:
        raise FidelityError(
            f"{options.model} is too far from FP32",
            expected=f"the same decision in {options.min_agreement:.0%} of cases",
            found=missed,
            remedy="Quantize again with a more faithful recipe.",
        )
    return 0


def _stored(spec: ModelSpec, engine: str) -> Mapping[str, Any] | None:
    """The certificate in the manifest of what this engine runs."""
    if engine == "onnxruntime":
        return spec.certificate
    return None if spec.openvino is None else spec.openvino.certificate


def _against_stored(kept: Mapping[str, Any] | None, certificate: Certificate) -> str:
    from qingyu.quantize.certificate import Certificate, differences

    if kept is None:
        return "The manifest has no certificate to compare with."
    stored = Certificate.from_json(kept)
    if stored.texts != certificate.texts:
        return "The certificate in the manifest was measured on other texts."
    found = differences(stored, certificate)
    if not found:
        return "The certificate in the manifest says the same."
    changes = [f"{change.figure} {change.stored:.5f} -> {change.recomputed:.5f}" for change in found]
    return "The certificate in the manifest says otherwise: " + ", ".join(changes)
