"""``qingyu quantize``: an FP32 model folder becomes a quantized one, if it stays close enough."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.certificate import (
    add_gate,
    add_measuring,
    as_text,
    first_texts,
    refuse_embedding_options,
    retrieval_sets,
    similarity_sets,
    task_as_text,
    texts_of,
)
from qingyu.cli.common import new_command
from qingyu.cli.text_input import read_texts

if TYPE_CHECKING:
    from qingyu.quantize import Outcome
    from qingyu.quantize.tasks import TaskOutcome

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu quantize out/e5 out/e5-int8
qingyu quantize out/e5 out/e5-int8 --recipe auto --texts sentences.txt --edge --report report.html"""

# Those of qingyu.quantize.recipes (a test compares), which is not imported to print a help page.
RECIPES = (
    "auto",
    "rowwise",
    "hybrid",
    "dynamic",
    "static",
    "static-percentile",
    "static-entropy",
    "weights-8",
    "weights-4",
    "fp16",
)
CALIBRATION_TEXTS = 512  # of a file; statistics change little with more


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "make an INT8 (or smaller) model folder, measured against FP32 and refused if too far from it"
    parser = new_command(commands, "quantize", summary, EXAMPLE)
    parser.add_argument("model", metavar="FOLDER", type=Path, help="FP32 model folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="model folder to make")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="rowwise",
        help="auto tries from the fastest to the most faithful (default: %(default)s)",
    )
    add_measuring(parser)
    add_gate(parser)
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help=f"texts to set scales with, the first {CALIBRATION_TEXTS} (default: the built-in sample)",
    )
    parser.add_argument("--weight-bits", type=int, metavar="N", help="7 for CPUs without VNNI")
    parser.add_argument(
        "--edge", action="store_true", help="also write a memory-mapped file for the edge profile"
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="also keep the FP32 graph, for machines that fail the self-check",
    )
    parser.add_argument(
        "--openvino",
        action="store_true",
        help="also write a file for OpenVINO, measured and certified like the other",
    )
    parser.add_argument("--report", type=Path, metavar="HTML", help="write charts of what was measured")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Quantize, and print the certificate."""
    from qingyu.quantize import Gate, quantize
    from qingyu.runtime.spec import read_spec

    task = read_spec(options.model).task
    if task != "embedding":
        return _run_task(options, task)
    outcome = quantize(
        options.model,
        options.output,
        recipe=options.recipe,
        texts=texts_of(options),
        calibration=_calibration(options.calibration),
        gate=Gate(options.min_cosine, options.min_worst_cosine),
        retrieval=retrieval_sets(options),
        similarity=similarity_sets(options),
        weight_bits=options.weight_bits,
        edge=options.edge,
        fallback=options.fallback,
        openvino=options.openvino,
        report=options.report,
        speed_rounds=options.speed_rounds,
        overwrite=options.overwrite,
        progress=True,
    )
    if options.json:
        print(json.dumps(outcome.spec.certificate, ensure_ascii=False))
    else:
        print(_described(outcome, options))
    return 0


def _run_task(options: argparse.Namespace, task: str) -> int:
    from qingyu.quantize import TaskGate, quantize_task

    refuse_embedding_options(options, task)
    outcome = quantize_task(
        options.model,
        options.output,
        recipe=options.recipe,
        texts=texts_of(options),
        calibration=_calibration(options.calibration),
        gate=TaskGate(options.min_agreement),
        weight_bits=options.weight_bits,
        edge=options.edge,
        fallback=options.fallback,
        speed_rounds=options.speed_rounds,
        overwrite=options.overwrite,
    )
    if options.json:
        print(json.dumps(outcome.spec.certificate, ensure_ascii=False))
    else:
        print(_task_described(outcome, options))
    return 0


def _task_described(outcome: TaskOutcome, options: argparse.Namespace) -> str:
    spec = outcome.spec
    over = [f"passed over {name}: {reason}" for name, reason in outcome.passed_over]
    made = f"{options.output}: {spec.name}, {spec.recipe}, {spec.files[spec.graph].bytes / 1e6:.1f} MB"
    return "\n".join([*over, made, "", task_as_text(outcome.certificate)])


def _calibration(source: str | None) -> list[str] | None:
    if source is None:
        return None
    return first_texts(read_texts(source), CALIBRATION_TEXTS, f"--calibration {source}")


def _described(outcome: Outcome, options: argparse.Namespace) -> str:
    spec = outcome.spec
    size = spec.files[spec.graph].bytes / 1e6
    over = [f"passed over {candidate.recipe}: {candidate.reason}" for candidate in outcome.passed_over]
    kept = [f"kept in FP32: {', '.join(spec.float_layers)}"] if spec.float_layers else []
    report = [f"report: {options.report}"] if options.report else []
    made = f"{options.output}: {spec.name}, {spec.recipe}, {size:.1f} MB"
    return "\n".join([*over, made, *kept, *report, "", as_text(outcome.measured.certificate)])
