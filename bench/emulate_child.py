"""What runs on each emulated CPU: embeds given texts with given models and tests the integer kernels.

    python -m qingyu.bench.emulate_child JOB.json

``qingyu.bench.emulate`` starts it. It needs nothing but the runtime, so that it also runs where only that is
installed. Beside the job it writes ``vectors-0.npy`` for the first model and so on, and ``report.json``.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.errors import QingyuError
from qingyu.runtime import onnxruntime_engine
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.selftest import check_integer_kernels

__all__ = ["main", "run"]


def run(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the vectors of ``job["texts"]`` for each of ``job["models"]`` to ``folder``; gives the report.

    ``job["session_entries"]`` are session entries of onnxruntime to try with the models, on top of the engine's
    own; the kernels are tested without them.
    """
    kernels = _kernels()
    # Under an emulator /proc/cpuinfo is still the host's: what the kernels do stands in for the CPU's flags.
    vars(onnxruntime_engine)["saturates_byte_products"] = lambda: kernels == "saturates"
    entries = {**onnxruntime_engine.SESSION_ENTRIES, **job["session_entries"]}
    onnxruntime_engine.SESSION_ENTRIES = entries
    for number, model in enumerate(job["models"]):
        with Embedder.open(Path(model)) as embedder:
            np.save(folder / f"vectors-{number}.npy", embedder.embed(job["texts"]))
    return {
        "kernels": kernels,
        "machine": platform.machine(),
        "onnxruntime": onnxruntime_engine.import_onnxruntime().__version__,
    }


def _kernels() -> str:
    try:
        return check_integer_kernels().verdict
    except QingyuError as error:
        return f"not tested: {error.problem}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    job = Path(path)
    report = run(json.loads(job.read_text(encoding="utf-8")), job.parent)
    (job.parent / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
