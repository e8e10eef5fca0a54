"""What HTTP costs: throughput of ``qingyu serve`` against the same model in process, one request, and overload.

    python -m qingyu.bench.serving out/bge-int8 --texts texts.txt

``throughput``: all texts in batches from concurrent clients, and in one call in process, in turn; the ratio.
``single``: one text at a time, over HTTP and in process, in turn; the difference of medians.
``overload``: an open loop at multiples of the highest rate that was answered; what is answered, and how fast the rest
is refused. Server and client share the machine's CPUs, so the client's own work counts against the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.bench.load import (
    Load,
    Pool,
    RunningServer,
    closed_loop,
    json_request,
    open_loop,
    run_loop,
    running_server,
)
from qingyu.runtime.embedder import Embedder, Report

MEASURES = ("throughput", "single", "overload")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a JSON line for each measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, help="one text a line; default: the sample in the package")
    parser.add_argument("--count", type=int, default=600, help="texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="texts of one request")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 10], help="of the highest rate")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each overload")
    parser.add_argument("--overload-batch", type=int, default=8, help="texts of one request under overload")
    parser.add_argument("--encoding", choices=("float", "base64"), default="float")
    parser.add_argument("--serve", nargs="*", default=[], metavar="FLAG", help="more flags of qingyu serve")
    options = parser.parse_args(arguments)
    texts = _texts(options.texts, options.count)
    print(json.dumps({"model": options.model.name, "texts": len(texts), "characters": sum(map(len, texts))}))
    model = f"bench={options.model}"
    if options.measures != ["overload"]:
        # Clients that wait for their answers are not overload, however many texts they send at once.
        with (
            Embedder.open(options.model) as embedder,
            running_server("--model", model, "--max-wait", "60", *options.serve) as server,
        ):
            embedder.embed(texts[:50])
            if "throughput" in options.measures:
                for batch in options.batches:
                    _print(throughput(server, embedder, texts, batch, options))
            if "single" in options.measures:
                _print(single(server, embedder, texts))
    if "overload" in options.measures:
        with running_server("--model", model, *options.serve) as server:
            overload(server, texts, options)
    return 0


def throughput(
    server: RunningServer, embedder: Embedder, texts: Sequence[str], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Texts a second over HTTP and in process: medians, and the median of the rounds' ratios."""
    requests = _requests(texts, batch, options.encoding)
    report = Report()
    embedder.embed(texts, report=report)
    over_http: list[float] = []
    in_process: list[float] = []
    server_cpu: list[float] = []
    for number in range(options.rounds):
        for http in (number % 2 == 0, number % 2 == 1):
            start = time.perf_counter()
            if http:
                cpu = server.cpu_seconds()
                load = run_loop(closed_loop(server.address, requests, clients=options.clients))
                if load.count(200) != len(requests):
                    raise RuntimeError(f"not all requests were answered: {load.summary()}")
                server_cpu.append(server.cpu_seconds() - cpu)
            else:
                embedder.embed(texts)
            (over_http if http else in_process).append(time.perf_counter() - start)
    ratios = [own / other for own, other in zip(in_process, over_http, strict=True)]
    return {
        "measure": "throughput",
        "texts_of_a_request": batch,
        "clients": options.clients,
        "tokens_of_a_text": round(report.tokens / len(texts), 1),
        "http_texts_per_second": round(len(texts) / statistics.median(over_http), 1),
        "in_process_texts_per_second": round(len(texts) / statistics.median(in_process), 1),
        "server_cpu_seconds": round(statistics.median(server_cpu), 2),
        "ratio": round(statistics.median(ratios), 3),
    }


def single(server: RunningServer, embedder: Embedder, texts: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of one text at a time: medians, and the median of the differences text by text."""
    requests = _requests(texts, 1, "float")

    async def measured() -> tuple[list[float], list[float]]:
        over_http, in_process = [], []
        pool = Pool(server.address)
        for request in requests[:20]:
            await pool.send(request, time.perf_counter())
        for text, request in zip(texts, requests, strict=True):
            start = time.perf_counter()
            embedder.embed([text])
            in_process.append(time.perf_counter() - start)
            outcome = await pool.send(request, time.perf_counter())
            assert outcome.status == 200
            over_http.append(outcome.seconds)
        pool.close()
        return over_http, in_process

    over_http, in_process = run_loop(measured())
    differences = [own - other for own, other in zip(over_http, in_process, strict=True)]
    return {
        "measure": "single",
        "requests": len(texts),
        "http_p50_ms": round(1e3 * statistics.median(over_http), 3),
        "in_process_p50_ms": round(1e3 * statistics.median(in_process), 3),
        "difference_p50_ms": round(1e3 * statistics.median(differences), 3),
    }


def overload(server: RunningServer, texts: Sequence[str], options: argparse.Namespace) -> None:
    """Print what an open loop at each multiple of the highest rate gives, that rate first."""
    requests = _requests(texts, options.overload_batch, options.encoding)
    peak = highest_rate(server, requests)
    _print(
        {
            "measure": "peak",
            "texts_of_a_request": options.overload_batch,
            "requests_per_second": round(peak, 1),
        }
    )
    for factor in options.factors:
        before = server.resident()
        load, live = run_loop(_loaded(server, requests, factor * peak, options.seconds))
        _print(
            {
                "measure": "overload",
                "factor": factor,
                **load.summary(),
                "goodput_of_peak": round(load.goodput / peak, 3),
                "live_p99_ms": live.summary()["p99_ms"],
                "resident_mb_more": round((server.resident() - before) / 1e6, 1),
            }
        )
        time.sleep(1.0)


async def _loaded(
    server: RunningServer, requests: Sequence[bytes], rate: float, seconds: float
) -> tuple[Load, Load]:
    """The load, and twenty questions a second whether the server is live beside it."""
    live = [b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"]
    both = await asyncio.gather(
        open_loop(server.address, requests, rate=rate, seconds=seconds),
        open_loop(server.address, live, rate=20, seconds=seconds),
    )
    return both[0], both[1]


def highest_rate(server: RunningServer, requests: Sequence[bytes], *, seconds: float = 3.0) -> float:
    """Requests a second that clients who always wait for their answers get: 16 of them, the best of three goes.

    Each takes about so many seconds. One go alone that others disturb would make every load after it look light.
    """
    once = run_loop(closed_loop(server.address, requests[: min(len(requests), 64)], clients=16))
    count = max(64, int(seconds * once.goodput))
    many = [requests[number % len(requests)] for number in range(count)]
    return max(run_loop(closed_loop(server.address, many, clients=16)).goodput for _ in range(3))


def _requests(texts: Sequence[str], batch: int, encoding: str) -> list[bytes]:
    return [
        json_request(
            "/v1/embeddings",
            {"input": list(texts[start : start + batch]), "model": "bench", "encoding_format": encoding},
        )
        for start in range(0, len(texts), batch)
    ]


def _texts(path: Path | None, count: int) -> list[str]:
    if path is None:
        from qingyu.quantize.texts import sample

        lines = [entry.text for entry in sample()]
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
    order = np.random.default_rng(0).permutation(len(lines))
    return [lines[order[n % len(lines)]] for n in range(count)]


def _print(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
