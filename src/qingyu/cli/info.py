"""``qingyu info``: what a model folder is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qingyu.cli.certificate import as_text, task_as_text
from qingyu.cli.common import BUNDLED, new_command
from qingyu.cli.table import facts

if TYPE_CHECKING:
    from qingyu.runtime.spec import ModelSpec

__all__ = ["add", "run"]

SHOWN_LABELS = 20


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "info", "describe a model folder", "qingyu info out/e5-int8")
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED,
        metavar="FOLDER",
        help="a model folder, or a name in $QINGYU_HOME (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the manifest as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the manifest's facts; the files themselves are checked by `qingyu doctor --model`."""
    from qingyu.runtime.embedder import find_model
    from qingyu.runtime.spec import read_spec

    spec = read_spec(find_model(options.model))
    if options.json:
        print(json.dumps(json.loads(spec.to_json()), ensure_ascii=False))
        return 0
    print(facts(_facts(spec)))
    if spec.certificate is not None:
        print(f"\n{_certificate(spec)}")
    return 0


def _certificate(spec: ModelSpec) -> str:
    if spec.task != "embedding":
        from qingyu.quantize.tasks import TaskCertificate

        return task_as_text(TaskCertificate.from_json(spec.certificate))
    from qingyu.quantize.certificate import Certificate

    return as_text(Certificate.from_json(spec.certificate))


def _gives(spec: ModelSpec) -> dict[str, object]:
    """What comes out: vectors, labels or words."""
    if spec.task == "embedding":
        length = "length 1" if spec.normalize else "not normalized"
        return {"vectors": f"{spec.dim} dimensions, {spec.pooling} pooling, {length}"}
    if spec.task == "fill-mask":
        return {"words": f"{spec.architecture.vocab_size:,}"}
    shown = ", ".join(spec.labels[:SHOWN_LABELS]) + (", …" if len(spec.labels) > SHOWN_LABELS else "")
    return {"labels": f"{len(spec.labels)}: {shown}", "scores": spec.scores}


def _facts(spec: ModelSpec) -> dict[str, object]:
    sizes = spec.architecture
    layers = f"{sizes.layers} layers, hidden {sizes.hidden_size}, {sizes.heads} heads"
    return {
        "name": spec.name,
        "task": spec.task,
        "model": f"{sizes.model_type}: {layers}, vocabulary {sizes.vocab_size:,}",
        **_gives(spec),
        "reads": f"at most {spec.max_tokens} tokens, {'lower-cased' if spec.lowercase else 'case kept'}",
        "prompts": dict(spec.prompts) or "none",
        "default prompt": spec.default_prompt or "none",
        "precision": spec.precision + (f", recipe {spec.recipe}" if spec.recipe else ""),
        "licence": spec.source.license or "not stated by the checkpoint",
        "source": spec.source.repository or "not stated by the checkpoint",
        **{f"file {name}": f"{record.bytes / 1e6:.2f} MB" for name, record in spec.files.items()},
        "kept in FP32": ", ".join(spec.float_layers) or "none",
        "self-check": f"{len(spec.golden.texts)} golden texts" if spec.golden else "none",
        "certificate": "below" if spec.certificate else "none",
    }
