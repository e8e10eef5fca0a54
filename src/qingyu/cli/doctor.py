"""``qingyu doctor``: what this machine gives, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from qingyu import __version__
from qingyu.cli.common import BUNDLED, new_command
from qingyu.cli.table import facts
from qingyu.errors import QingyuError

if TYPE_CHECKING:
    from qingyu.runtime.embedder import Embedder
    from qingyu.runtime.tuning import Tuning

__all__ = ["add", "run"]

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "psutil", "onnx", "safetensors")
TEXTS = ("今天天气真好", "怎么修改登录密码", "人工智能正在改变医疗、教育和交通。" * 4)
TOLERANCE = 1e-3  # cosine distance between a text alone and beside longer ones; the `dynamic` recipe has 1e-4


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "show versions, CPU, limits and threads, and check that this machine computes right"
    parser = new_command(commands, "doctor", summary, "qingyu doctor --model out/e5-int8")
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER",
        help="the model folder whose hashes to check and which to run (default: %(default)s)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure for 40 seconds, and keep what is best here for this model, to be used when it is opened",
    )
    parser.add_argument("--forget", action="store_true", help="drop what --measure kept for this model")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the facts; the exit code is that of the first check that failed."""
    report = {**_machine(), **_kernels()}
    failure: QingyuError | None = None
    try:
        report.update(_model(options.model))
        report["settings"] = _settings(options)
    except QingyuError as error:
        failure = error
        report["model check"] = f"FAILED: {error}"
    print(json.dumps(report, ensure_ascii=False) if options.json else facts(report))
    if failure is not None:
        return failure.exit_code
    return 5 if report["integer kernels"] == "wrong" else 0


def _settings(options: argparse.Namespace) -> str:
    """What was measured to be best here, measured or dropped first where that was asked for."""
    from qingyu.runtime.embedder import find_model
    from qingyu.runtime.spec import read_spec
    from qingyu.runtime.tuning import forget, recall, store

    spec = read_spec(find_model(options.model))
    if options.forget or options.measure:
        forget(spec)
    if options.measure:
        from qingyu.bench.on_device import is_disturbed, measure, tunings_of

        found = measure(options.model)
        if is_disturbed(found):
            return f"defaults; not measured, as others used {found['foreign_percent']:.0f} % of the machine meanwhile"
        best = tunings_of(found)
        if best and store(spec, best) is None:
            return f"{_said(best)} are best, but there is nowhere to keep it"
    kept = recall(spec)
    if not kept:
        return "defaults, measured to be best" if options.measure else "defaults"
    return f"{_said(kept)}, as measured here"


def _said(tunings: Mapping[str, Tuning]) -> str:
    return "; ".join(
        f"{profile}: {one.threads} threads, {one.token_budget} tokens" for profile, one in tunings.items()
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, object]:
    from qingyu.runtime.cpu import cgroup_report, choose_threads, cpu_flags, cpu_model

    group = cgroup_report()
    limit = group.memory_limit
    return {
        "qingyu": __version__,
        "python": f"{platform.python_version()} on {sys.platform}",
        **{package: _installed(package) for package in PACKAGES},
        "machine": platform.machine(),
        "cpu": cpu_model() or "unknown",
        "cpu flags": " ".join(cpu_flags()) or "none known",
        "cgroup": group.version or "none",
        "cpu quota": "none" if group.quota is None else f"{group.quota:g} CPUs",
        "memory limit": "none" if limit is None else f"{limit / (1 << 20):.0f} MB",
        "threads chosen": choose_threads(None),
    }


def _kernels() -> dict[str, object]:
    from qingyu.runtime.selftest import check_integer_kernels

    return {"integer kernels": check_integer_kernels().verdict}


def _model(name: str) -> dict[str, object]:
    from qingyu.runtime.embedder import Embedder
    from qingyu.runtime.spec import check_file

    with Embedder.open(name) as embedder:
        for file, record in embedder.spec.files.items():
            check_file(embedder.folder, file, record)
        checked = {f"sha256 {file}": record.sha256 for file, record in embedder.spec.files.items()}
        return {
            "model": repr(embedder),
            **checked,
            "self-check": _self_check(embedder),
            "model check": _neighbours(embedder),
        }


def _self_check(embedder: Embedder) -> str:
    found = embedder.self_check()
    if found.result == "none":
        return "no golden texts in the manifest"
    worst = min(found.cosines)
    return f"{found.result}: {len(found.cosines)} golden texts, worst cosine {worst:.5f}, {found.seconds * 1000:.0f} ms"


def _neighbours(embedder: Embedder) -> str:
    """Texts alone and together must give the same vectors; anything else is a kernel or a model gone wrong."""
    import numpy as np

    from qingyu.errors import GraphError
    from qingyu.runtime.vectors import cosine

    together = embedder.embed(TEXTS)
    alone = np.concatenate([embedder.embed(text) for text in TEXTS])
    distance = float(np.max(1 - np.diag(cosine(together, alone))))
    if distance > TOLERANCE:
        raise GraphError(
            "a text's vector depends on its neighbours",
            expected=f"cosine distance of at most {TOLERANCE:g} between alone and together",
            found=f"{distance:.2e}",
            remedy="Quantize the model again, or report this CPU and the versions above.",
        )
    return f"passed: {len(TEXTS)} texts alone and together, cosine distance {distance:.1e}"
