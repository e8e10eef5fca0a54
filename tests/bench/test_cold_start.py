from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qingyu.bench import cold_start


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_steps_make_up_the_total_and_memory_is_counted(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cold_start.main([str(tiny_model), "--profile", "edge", "--runs", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["median_ms"].values()) == pytest.approx(result["total_ms"]["median"], abs=1)
    assert tuple(result["median_ms"]) == cold_start.STEPS
    assert all(milliseconds > 0 for milliseconds in result["median_ms"].values())
    assert 0 < result["private_mb"] < result["peak_mb"]


def test_a_summary_is_of_the_sorted_values() -> None:
    assert cold_start._summary([3.0, 1.0, 2.0]) == {"median": 2.0, "p95": 3.0, "least": 1.0}
    assert cold_start._summary([float(n) for n in range(1, 21)])["p95"] == 20.0


def test_a_cold_start_imports_nothing_that_one_text_does_not_need() -> None:
    """They took 18 of the 250 ms that a process may take to its first vector."""
    program = """
import sys, numpy
before = set(sys.modules)
from qingyu import Embedder
Embedder
wanted = {"psutil", "concurrent.futures", "importlib.metadata", "tempfile", "onnxruntime", "tokenizers"}
print(sorted(wanted & (set(sys.modules) - before)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
