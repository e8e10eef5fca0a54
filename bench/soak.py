"""What a server keeps of hours of work: memory, open files and threads, minute by minute.

    python -m qingyu.bench.soak [MODEL] --minutes 60 > soak.jsonl

Each minute has 30 s of requests of many sizes at half the highest rate (embedding, tokenizing, and some that are
wrong), 12 s of a light load beside bad clients (slow, deaf, endless and broken ones), 12 s of three times the highest
rate, and a reload of the model (SIGHUP); then the server is left alone for 3 s and what it holds is noted, a JSON line
a minute. The last line has the growth in an hour, by least squares over all minutes but the first fifth, and how the
server ended. It exits with 1 if the server ended before or gave another answer of 5xx than a refusal.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from qingyu.bench.load import Load, RunningServer, json_request, open_loop, run_loop, running_server
from qingyu.bench.reliability_server import MEGABYTE, beside_bad, metric, server_errors
from qingyu.bench.serving import highest_rate
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.task import BUNDLED, find_model

__all__ = ["growth", "main", "minutes", "mixed_requests"]

# Shares of a minute: at half the highest rate, beside bad clients, at three times the highest rate, alone.
WORK, BAD, OVER, REST = 0.5, 0.2, 0.2, 0.05
RELOAD_SECONDS = 20.0
NOT_REFUSED = r"5(?!03)\d\d"  # statuses of failures
HELD = ("resident_mb", "open_files", "threads")
TEXT = "今天天气真好，我们去公园散步，然后看电影。"


def mixed_requests() -> list[bytes]:
    """Requests of one to 32 texts of 5 to 600 characters, of routes of both kinds, one of eight of them wrong."""
    found = []
    for number in range(64):
        texts = [
            f"{number}{TEXT * 30}"[: 5 + 37 * ((number + place) % 17)] for place in range(1 + number % 32)
        ]
        bodies: tuple[tuple[str, object], ...] = (
            (
                "/v1/embeddings",
                {"input": texts, "model": "bench", "encoding_format": ("float", "base64")[number % 2]},
            ),
            ("/embed", {"inputs": texts[:8]}),
            ("/tokenize", {"inputs": texts[:4]}),
            (
                "/v1/embeddings",
                ({"input": []}, {"input": texts, "model": "nobody"}, {"input": [1.5]})[number % 3],
            ),
        )
        found.append(json_request(*bodies[3 if number % 8 == 7 else number % 3]))
    return found


def minutes(server: RunningServer, *, count: int, seconds: float = 60.0) -> Iterator[dict[str, Any]]:
    """A line for each of ``count`` rounds of so many ``seconds``: what the server holds after it, and its answers."""
    requests = mixed_requests()
    rate = highest_rate(server, requests, seconds=min(3.0, seconds / 10))
    for number in range(1, count + 1):
        loads = [run_loop(open_loop(server.address, requests, rate=rate / 2, seconds=WORK * seconds))]
        beside, bad = run_loop(beside_bad(server, requests, rate / 10, BAD * seconds))
        loads += [
            beside,
            run_loop(open_loop(server.address, requests, rate=3 * rate, seconds=OVER * seconds)),
        ]
        if server.process.poll() is not None:
            return
        reloaded = _reload(server)
        time.sleep(REST * seconds)
        yield {
            "minute": number,
            **_held(server),
            "answers": _statuses(loads),
            "bad_clients": bad["statuses"],
            "reloaded": reloaded,
            "failures": int(server_errors(server, NOT_REFUSED)),
        }


def _reload(server: RunningServer) -> bool:
    before = metric(server, "qingyu_reloads_total")
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + RELOAD_SECONDS
    while time.monotonic() < end:
        time.sleep(0.05)
        if metric(server, "qingyu_reloads_total") > before:
            return True
    return False


def _held(server: RunningServer) -> dict[str, float]:
    process = psutil.Process(server.process.pid)
    resident = round(server.resident() / MEGABYTE, 1)
    return dict(zip(HELD, (resident, process.num_fds(), process.num_threads()), strict=True))


def _statuses(loads: Sequence[Load]) -> dict[str, int]:
    counts = Counter(one.status for load in loads for one in load.outcomes)
    return {str(status): counts[status] for status in sorted(counts)}


def growth(values: Sequence[float]) -> float:
    """What is added in an hour, by least squares over values of each minute without the first fifth.

    >>> growth([100, 120, 121, 122, 123])
    60.0
    """
    settled = values[len(values) // 5 :]
    if len(settled) < 2:
        return 0.0
    slope = np.polyfit(np.arange(len(settled)), np.asarray(settled, dtype=float), 1)[0]
    return round(float(slope) * 60, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=BUNDLED, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=60, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with running_server("--model", f"bench={find_model(options.model)}") as server:
        lines = ((1, line) for line in minutes(server, count=options.minutes))
        for line in progress_bar(lines, total=options.minutes, unit="minutes"):
            rows.append(line)
            print(json.dumps(line), flush=True)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(40)
    grown = {name: growth([row[name] for row in rows]) for name in HELD}
    failures = rows[-1]["failures"] if rows else 0
    whole = len(rows) == options.minutes
    print(
        json.dumps({"minutes": len(rows), "grown_in_an_hour": grown, "failures": failures, "exit_code": code})
    )
    return int(code != 0 or failures > 0 or not whole)


if __name__ == "__main__":
    sys.exit(main())
