"""The least memory that a model embeds in, and whether budgets are kept: a process for each budget.

    python -m qingyu.bench.memory_budgets MODEL --budgets 64 96 128 192 256

Prints a JSON line for each budget: refused with which error, or the plan, the peak of resident memory while loading and
while embedding texts of several shapes one after the other (200 of mixed lengths, short ones, long ones, mixed ones
again, and some of 100,000 characters), and the time. Then one line with the least budget that is accepted,
found to the megabyte. Exits with 1 when a peak exceeds its budget. Linux only: the peak is the kernel's.
Not here: a hard limit (a cgroup's), which counts pages of mapped files differently from one kernel to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["least_budget", "main", "row_of"]

SECONDS = 300
MOST = 4096  # megabytes; a model that needs more is none for a board

CHILD = """
import json, os, random, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
from pathlib import Path
from qingyu import Embedder
from qingyu.errors import QingyuError
def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 1)
model, profile, budget, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
source = random.Random(3)
words = "今天气真好外面阳光明媚股票大跌怎么修改登录密码人工智能正在变医疗教育和交通"
book = "".join(source.choices(words, k=1000)) * 101
def text(length):  # made without memory of its own
    start = source.randrange(1000)
    return book[start : start + length]
mixed = [min(900, int(source.lognormvariate(3.4, 1.1)) + 1) for _ in range(count)]
short = [source.randint(1, 30) for _ in range(count)]
long = [source.randint(500, 900) for _ in range(count // 4)]
shapes = {"mixed": mixed, "short": short, "long": long, "again": mixed[::-1], "books": [100_000] * (count // 20)}
try:
    embedder = Embedder.open(model, profile=profile, max_memory_mb=budget)
except QingyuError as error:
    print(json.dumps({"budget_mb": budget, "refused": type(error).__name__, "said": str(error)}))
    raise SystemExit
loading = memory("VmHWM:")
start = time.perf_counter()
peaks = {}
for shape, lengths in shapes.items():
    Path("/proc/self/clear_refs").write_text("5")
    for block in embedder.embed_stream(text(length) for length in lengths):
        pass
    peaks[shape] = memory("VmHWM:")
seconds = time.perf_counter() - start
plan = embedder.plan
print(json.dumps({
    "budget_mb": budget, "workers": plan.workers, "token_budget": plan.token_budget, "window": plan.window,
    "loading_peak_mb": loading, "peak_mb": max(peaks.values()), "peaks_mb": peaks, "seconds": round(seconds, 2),
}))
"""


def row_of(model: Path, budget: int, *, profile: str = "edge", texts: int = 200) -> dict[str, Any]:
    """What one budget, in megabytes, gives in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(model), profile, str(budget), str(texts)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True
    )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def least_budget(model: Path, *, profile: str = "edge") -> int:
    """The least budget that is accepted, in megabytes; one less is refused."""
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if "refused" in row_of(model, middle, profile=profile, texts=1) else (low, middle)
        )
    return high


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 when more memory was taken than allowed."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.memory_budgets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="a model folder, or a name")
    parser.add_argument("--profile", default="edge", help="as for Embedder.open (default: %(default)s)")
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 96, 128, 192, 256], metavar="MB")
    parser.add_argument("--texts", type=int, default=200, help="how many mixed texts (default: %(default)s)")
    options = parser.parse_args(arguments)
    exceeded = False
    for budget in options.budgets:
        row = row_of(options.model, budget, profile=options.profile, texts=options.texts)
        exceeded |= row.get("peak_mb", 0) > budget
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    least = least_budget(options.model, profile=options.profile)
    last = row_of(options.model, least, profile=options.profile, texts=options.texts)
    sys.stdout.write(json.dumps({"least": True, **last}, ensure_ascii=False) + "\n")
    return 1 if exceeded or last.get("peak_mb", 0) > least else 0


if __name__ == "__main__":
    raise SystemExit(main())
