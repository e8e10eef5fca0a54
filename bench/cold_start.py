"""How long a fresh process takes to its first vector, where the time goes, and what memory it then holds.

    python -m qingyu.bench.cold_start MODEL --profile edge --runs 20

Prints one JSON line. Each run is a process of its own, timed from just before it is started, with a warm page cache
and compiled modules, as those of an installed package are. The first one timed, reported on its own, also makes the
self-check of a new machine. Memory is measured in a run more, because reading it takes time.

``private_mb`` are the dirty pages of the process and the clean ones that no other process maps, less the same after
importing numpy, onnxruntime and tokenizers. Pages of a mapped model count as long as only one process maps them.
Linux only. Not here: speed once the model is open.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["STEPS", "main", "measure"]

TEXT = "今天天气真好"
# What a process does in turn. "qingyu": importing our modules; "open": manifest and tokenizer; "load": hash, session
# and, on a new machine, the self-check.
STEPS = ("interpreter", "imports", "qingyu", "open", "load", "first_vector")

# Not a module of ours, as that would import more than what is measured.
CHILD = """
import time
marks = [time.perf_counter_ns()]
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
memory = sys.argv[3] == "memory"
def sizes(file="/proc/self/smaps_rollup"):
    pairs = (line.split() for line in open(file))
    return {pair[0][:-1]: int(pair[1]) for pair in pairs if len(pair) == 3 and pair[2] == "kB"}
import numpy, onnxruntime, tokenizers
marks.append(time.perf_counter_ns())
before = sizes() if memory else None
from qingyu import Embedder
Embedder
marks.append(time.perf_counter_ns())
embedder = Embedder.open(sys.argv[1], profile=sys.argv[2])
marks.append(time.perf_counter_ns())
embedder.load()
marks.append(time.perf_counter_ns())
embedder.embed(sys.argv[4])
marks.append(time.perf_counter_ns())
cpu = time.process_time()
result = {"marks": marks, "cpu": cpu}
if memory:
    result |= {"before": before, "after": sizes(), "peak": sizes("/proc/self/status")["VmHWM"]}
import json
print(json.dumps(result))
"""


def measure(model: Path, *, profile: str = "edge", runs: int = 20) -> dict[str, Any]:
    """Times in milliseconds and memory in MB of ``runs`` fresh processes."""
    with tempfile.TemporaryDirectory() as home:
        _run(model, profile, home, "memory")  # compiles every module, as installing a package does
        shutil.rmtree(Path(home, "selfcheck"), ignore_errors=True)
        first = _split(*_run(model, profile, home, "time"))
        timed = [_split(*_run(model, profile, home, "time")) for _ in range(runs)]
        _, child = _run(model, profile, home, "memory")
    return {
        "model": str(model),
        "profile": profile,
        "runs": runs,
        "first_on_machine_ms": round(first["total"], 1),
        "total_ms": _summary([split["total"] for split in timed]),
        "cpu_ms": _summary([split["cpu"] for split in timed]),
        "median_ms": {step: round(statistics.median(split[step] for split in timed), 1) for step in STEPS},
        "load_average": round(os.getloadavg()[0], 1),
        **_memory(child),
    }


def _run(model: Path, profile: str, home: str, what: str) -> tuple[int, dict[str, Any]]:
    """When the process was started, and what it printed; both clocks are the system's monotonic one."""
    command = [sys.executable, "-c", CHILD, str(model), profile, what, TEXT]
    environment = {**os.environ, "QINGYU_HOME": home, "PYTHONPYCACHEPREFIX": str(Path(home, "compiled"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter_ns()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return start, json.loads(done.stdout)


def _split(start: int, child: Mapping[str, Any]) -> dict[str, float]:
    marks = [start, *child["marks"]]
    steps = {step: (marks[n + 1] - marks[n]) / 1e6 for n, step in enumerate(STEPS)}
    return {**steps, "total": (marks[-1] - start) / 1e6, "cpu": 1e3 * child["cpu"]}


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(p95, 1),
        "least": round(ordered[0], 1),
    }


def _memory(child: Mapping[str, Any]) -> dict[str, float]:
    before, after = child["before"], child["after"]
    grown = {key: (after[key] - before[key]) / 1024 for key in ("Private_Clean", "Private_Dirty", "Rss")}
    return {
        "private_mb": round(grown["Private_Clean"] + grown["Private_Dirty"], 1),
        "private_clean_mb": round(grown["Private_Clean"], 1),
        "private_dirty_mb": round(grown["Private_Dirty"], 1),
        "resident_mb": round(grown["Rss"], 1),
        "peak_mb": round(child["peak"] / 1024, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.cold_start", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--profile", default="edge", help="as for Embedder.open (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="how many processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    result = measure(options.model, profile=options.profile, runs=options.runs)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
