"""The rows of the reliability scorecard that need the HTTP server: cancelling, stopping, overload, bad clients, swaps.

Load stays on loopback and is bounded in requests and time (``load``). The clients share the machine's CPUs with the
server. Not here: the other rows (``reliability_rows``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import signal
import socket
import statistics
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qingyu.bench.load import (
    Load,
    RunningServer,
    closed_loop,
    json_request,
    open_loop,
    run_loop,
    running_server,
)
from qingyu.bench.reliability_rows import Found, Setting, row, tests
from qingyu.bench.serving import highest_rate

__all__ = ["beside_bad", "metric", "server_errors"]

MEGABYTE = 1_000_000
TEXT = "今天天气真好，我们去公园散步，然后看电影。" * 6


def _body(texts: Sequence[str]) -> bytes:
    return json_request(
        "/v1/embeddings", {"input": list(texts), "model": "bench", "encoding_format": "base64"}
    )


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric's values over its labels, as the server tells them."""
    text = server.get("/metrics").decode("utf-8")
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
    return math.fsum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


def _place(server: RunningServer) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(server.address)
    return str(parts.hostname), int(parts.port or 0)


def _connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(_place(server), timeout=20)


@row(
    15,
    "Cancelled work is not done",
    "tests of 1,000 tasks of which half are cancelled; over HTTP 100 requests of 32 texts, 80 of whose clients leave "
    "while they wait: texts that were run for them all the same",
    "< 1 % run after cancelling before they start; 0 tasks left",
)
def cancelled(setting: Setting) -> Found:
    found = tests(setting, "tests/runtime/test_scheduler.py", "tests/runtime/test_async_embedder.py")
    request = _body([TEXT + str(n) for n in range(32)])
    with running_server("--model", f"bench={setting.model}", "--max-wait", "600") as server:
        run_loop(closed_loop(server.address, [_body([TEXT])] * 4, clients=1))
        before = metric(server, "qingyu_texts_total")
        clients = [_connect(server) for _ in range(100)]
        for client in clients:
            client.sendall(request)
        time.sleep(0.3)
        started = metric(server, "qingyu_texts_total") - before
        for client in clients[20:]:
            client.close()
        for client in clients[:20]:
            client.settimeout(300)
            while not client.recv(1 << 16):
                break
        deadline = time.monotonic() + 120
        while (
            metric(server, "qingyu_queued_requests") + metric(server, "qingyu_running_batches")
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        for client in clients[:20]:
            client.close()
        time.sleep(0.5)
        run = metric(server, "qingyu_texts_total") - before
        gone = metric(server, "qingyu_cancelled_total")
        withdrawn = metric(server, "qingyu_withdrawn_rows")
    wanted = 20 * 32
    # What had been started when clients left, or was in a micro-batch then, is no work after cancelling.
    extra = max(0.0, run - wanted - started)
    share = extra / (80 * 32)
    figure = (
        f"{found.figure}; {gone:.0f} of 80 leavers noticed, {100 * share:.1f} % of their 2,560 texts were run after "
        "they left"
    )
    facts = {"run": run, "started_before": started, "withdrawn": withdrawn, "cancelled": gone}
    return Found(figure, found.met is not False and share < 0.01 and gone > 0, {**found.facts, **facts})


@row(
    16,
    "Graceful stop",
    "SIGTERM with 50 requests of 4 texts in flight, and with 100 idle connections; five times each",
    "0 answers lost; exit 0 within the grace of 30 s, and with idle connections within 1 s",
)
def graceful(setting: Setting) -> Found:
    repeats = 2 if setting.quick else 5
    stops = [_stop_under_load(setting) for _ in range(repeats)]
    idles = [_stop_idle(setting) for _ in range(repeats)]
    lost = sum(one["lost"] for one in stops)
    answered = sum(one["answered"] for one in stops)
    slowest, idle = max(one["exit_s"] for one in stops), max(one["exit_s"] for one in idles)
    codes = {one["code"] for one in (*stops, *idles)}
    figure = (
        f"{answered} answered, {lost} lost; slowest exit {slowest:.2f} s under load, {idle:.2f} s with 100 idle "
        f"connections; exit codes {sorted(codes)}"
    )
    met = lost == 0 and answered > 0 and codes == {0} and slowest <= 30 and idle < 1
    return Found(figure, met, {"load": stops, "idle": idles})


def _stop_under_load(setting: Setting) -> dict[str, Any]:
    with running_server("--model", f"bench={setting.model}", "--max-wait", "60") as server:
        run_loop(closed_loop(server.address, [_body([TEXT])] * 4, clients=1))
        found = run_loop(_terminated(server))
        code = server.process.wait(40)
        took = time.monotonic() - found.pop("told")
    return {**found, "exit_s": round(took, 2), "code": code}


async def _terminated(server: RunningServer) -> dict[str, Any]:
    """50 requests on connections that the server knows, SIGTERM once it says it has them, and what was answered."""
    pairs = [await asyncio.open_connection(*_place(server)) for _ in range(50)]
    for reader, writer in pairs:
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await _head(reader)
    request = _body([TEXT] * 4)
    for _, writer in pairs:
        writer.write(request)
    in_flight = 0.0
    for _ in range(40):
        await asyncio.sleep(0.005)
        in_flight = max(in_flight, await asyncio.to_thread(metric, server, "qingyu_in_flight"))
        if in_flight >= 40:
            break
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    heads = await asyncio.gather(*(_head(reader) for reader, _ in pairs), return_exceptions=True)
    for _, writer in pairs:
        writer.close()
    statuses = [head.split()[1] if isinstance(head, str) else type(head).__name__ for head in heads]
    lost = {status: statuses.count(status) for status in sorted({*statuses} - {"200"})}
    return {
        "in_flight": in_flight,
        "answered": statuses.count("200"),
        "lost": len(statuses) - statuses.count("200"),
        "instead": lost,
        "told": told,
    }


async def _head(reader: asyncio.StreamReader) -> str:
    """The headers of an answer, its body read and dropped."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode("latin-1")
    await reader.readexactly(int(re.findall(r"(?i)^content-length: (\d+)", head, re.MULTILINE)[0]))
    return head


def _stop_idle(setting: Setting) -> dict[str, Any]:
    with running_server("--model", f"bench={setting.model}") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_connect(server)) for _ in range(100)]
        for client in clients[:50]:  # half of them have asked something before
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.recv(1 << 16)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(40)
        return {"exit_s": round(time.monotonic() - start, 2), "code": code}


# Of the rates before and after a load, the larger to the smaller: with more the machine was another one.
STEADY = 1.15
TRIES = 4


@row(
    17,
    "Overload sheds, never collapses",
    "an open loop of 8 texts a request for 60 s at 1, 2 and 10 times the highest rate that 16 clients got before it; "
    f"that rate measured before and after each, and the load repeated, up to {TRIES} times in all, where the two "
    f"differ by more than {STEADY - 1:.0%}",
    "goodput >= 90 % of that rate; p99 accepted <= 1 s + service; p99 of refusals < 50 ms; memory flat (+ 32 MB)",
)
def overload(setting: Setting) -> Found:
    seconds = 5.0 if setting.quick else 60.0
    requests = [_body([f"{TEXT}{n}{m}" for m in range(8)]) for n in range(40)]
    with running_server("--model", f"bench={setting.model}") as server:
        rows = {f"{factor}x": _steady_load(server, requests, factor, seconds) for factor in (1, 2, 10)}
        alive = server.process.poll() is None
    ten = rows["10x"]
    shares = [rows[factor]["of_peak"] for factor in ("2x", "10x")]
    refused = ten["refused_p99_ms"] or math.inf
    broken = ten["statuses"].get("0", 0)
    figure = (
        f"goodput at 1, 2, 10 times {[one['of_peak'] for one in rows.values()]} of the peak, "
        f"{[round(statistics.mean(one['peaks'])) for one in rows.values()]} requests/s; "
        f"at 10 times p99 accepted {ten['p99_ms']} ms, p99 refused {ten['refused_p99_ms']} ms, "
        f"{broken} without an answer, {ten['resident_mb_more']:+} MB"
    )
    met = alive and min(shares) >= 0.9 and (ten["p99_ms"] or math.inf) <= 1500 and refused < 50
    return Found(figure, met and ten["resident_mb_more"] <= 32 and not broken, rows)


def _steady_load(
    server: RunningServer, requests: Sequence[bytes], factor: int, seconds: float
) -> dict[str, Any]:
    before = highest_rate(server, requests)
    for tries in range(1, TRIES + 1):
        resident = server.resident()
        load: Load = run_loop(open_loop(server.address, requests, rate=factor * before, seconds=seconds))
        more = (server.resident() - resident) / MEGABYTE
        time.sleep(2)
        after = highest_rate(server, requests)
        found = {
            **load.summary(),
            "peaks": [round(before, 1), round(after, 1)],
            "of_peak": round(load.goodput / statistics.mean((before, after)), 3),
            "resident_mb_more": round(more, 1),
            "tries": tries,
        }
        if max(before, after) <= STEADY * min(before, after):
            break
        before = after
    return found


@row(
    18,
    "Bad clients cannot hurt good ones",
    "a good client at a tenth of the highest rate, alone and beside 200 connections that send a byte a second, 20 that "
    "never read, bodies declared as 1 GB, bodies without end, and broken requests",
    "good p99 +- 20 % (or within 20 ms); memory + 8 MB; no 5xx",
)
def bad_clients(setting: Setting) -> Found:
    seconds = 5.0 if setting.quick else 20.0
    requests = [_body([f"{TEXT}{n}"]) for n in range(40)]
    with running_server("--model", f"bench={setting.model}") as server:
        rate = highest_rate(server, requests) / 10
        run_loop(open_loop(server.address, requests, rate=rate, seconds=2))
        alone = run_loop(open_loop(server.address, requests, rate=rate, seconds=seconds))
        before = server.resident()
        beside, bad = run_loop(beside_bad(server, requests, rate, seconds))
        more = (server.resident() - before) / MEGABYTE
        wrong = server_errors(server)
    first, second = 1e3 * alone.percentile(0.99, 200), 1e3 * beside.percentile(0.99, 200)
    lost = len(beside.outcomes) - beside.count(200)
    figure = (
        f"p99 {first:.1f} ms alone, {second:.1f} ms beside {bad['connections']} bad connections; {lost} of "
        f"{len(beside.outcomes)} good requests lost; {more:+.1f} MB; {wrong:.0f} answers of 5xx; bad ones answered "
        f"{bad['statuses']}"
    )
    steady = second <= max(1.2 * first, first + 20)
    facts = {"alone": alone.summary(), "beside": beside.summary(), **bad}
    return Found(figure, steady and more <= 8 and not wrong and not lost, facts)


def server_errors(server: RunningServer, statuses: str = r"5\d\d") -> float:
    """How many answers had a status of this pattern; without one every 5xx counts, refusals of 503 included."""
    pattern = rf'^qingyu_requests_total\{{[^}}]*status="{statuses}"[^}}]*\}} (\S+)$'
    text = server.get("/metrics").decode("utf-8")
    return math.fsum(float(number) for number in re.findall(pattern, text, re.MULTILINE))


BROKEN = (
    b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    + b"[" * 100_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
)


@dataclass
class _Bad:
    """Clients that mean no good, until ``end``; each method is one of them."""

    host: str
    port: int
    end: float
    statuses: dict[str, int] = field(default_factory=dict)

    async def drip(self) -> None:
        """Headers at a byte a second."""
        async with self._connection() as (_, writer):
            for byte in b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)

    async def deaf(self) -> None:
        """Requests of large answers, which are never read."""
        async with self._connection(limit=1) as (_, writer):
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
            await asyncio.sleep(max(0.0, self.end - time.monotonic()))

    async def endless(self) -> None:
        """A body of 32 MB in pieces, whose size is not told."""
        async with self._connection() as (_, writer):
            writer.write(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(2000):
                writer.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)

    async def broken(self) -> None:
        """Each of the broken requests, again and again; the statuses of the answers are counted."""
        while time.monotonic() < self.end:
            for request in BROKEN:
                status = await self._status(request)
                self.statuses[status] = self.statuses.get(status, 0) + 1
            await asyncio.sleep(0.2)

    async def _status(self, request: bytes) -> str:
        try:
            async with self._connection() as (reader, writer):
                writer.write(request)
                line = await asyncio.wait_for(reader.readline(), 5)
        except (OSError, asyncio.TimeoutError) as error:
            return type(error).__name__
        words = line.decode("latin-1").split()
        return words[1] if len(words) > 1 else "closed"

    @contextlib.asynccontextmanager
    async def _connection(
        self, *, limit: int = 1 << 16
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=limit)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def beside_bad(
    server: RunningServer, requests: Sequence[bytes], rate: float, seconds: float
) -> tuple[Load, dict[str, Any]]:
    """A load beside connections that mean no good; its outcome, and how many those were and how they were answered."""
    bad = _Bad(*_place(server), time.monotonic() + seconds)
    kinds = [*[bad.drip] * 200, *[bad.deaf] * 20, *[bad.endless] * 5, bad.broken]
    running = [asyncio.ensure_future(kind()) for kind in kinds]
    await asyncio.sleep(0.5)
    load = await open_loop(server.address, requests, rate=rate, seconds=seconds)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return load, {"connections": len(kinds), "statuses": dict(sorted(bad.statuses.items()))}


@row(
    19,
    "Hot swap without loss",
    "20 swaps (SIGHUP) under 4 clients: a model folder replaced by one of another precision and back, and every fifth "
    "time by a damaged one, which must not be taken; resident memory after the last swap against the fifth",
    "0 failed, 0 mixed answers; memory + 32 MB",
)
def swaps(setting: Setting) -> Found:
    count = 4 if setting.quick else 20
    place = setting.scratch / "swapped"
    place.mkdir()
    for name, origin in (("a", setting.model), ("b", setting.tiny)):
        shutil.copytree(origin, place / name)
    shutil.copytree(setting.model, place / "bad")
    damaged = bytearray((place / "bad" / "model.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (place / "bad" / "model.onnx").write_bytes(damaged)
    link = place / "live"
    link.symlink_to("a")
    with running_server("--model", f"bench={link}", "--max-wait", "60") as server:
        found = run_loop(_swapping(server, link, count))
        wrong = server_errors(server)
        reloads = metric(server, "qingyu_reloads_total")
    shutil.rmtree(place)
    memory = found["resident_mb"]
    more = memory[-1] - memory[min(4, count - 1)]  # by then both models were there once
    figure = (
        f"{found['answers']} answers, {found['failed']} failed, {found['mixed']} mixed, {wrong:.0f} of 5xx; "
        f"{reloads:.0f} reloads of {count}, vectors of {found['dims']} values seen; {more:+.1f} MB"
    )
    met = (
        not found["failed"]
        and not found["mixed"]
        and not wrong
        and reloads == count
        and len(found["dims"]) == 2
        and more <= 32
    )
    return Found(figure, met and found["answers"] > 0, found)


async def _swapping(server: RunningServer, link: Path, count: int) -> dict[str, Any]:
    host, port = _place(server)
    request = json_request("/v1/embeddings", {"input": [TEXT] * 4, "model": "bench"})
    seen = {"answers": 0, "failed": 0, "mixed": 0}
    memory: list[float] = []
    dims: set[int] = set()
    named: dict[str, int] = {}
    stop = asyncio.Event()

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        while not stop.is_set():
            writer.write(request)
            status, fingerprint, document = await _answer(reader)
            widths = {len(one["embedding"]) for one in document.get("data", [])}
            seen["answers"] += 1
            seen["failed"] += status != 200
            # One model's vectors, and its own name on them.
            seen["mixed"] += len(widths) > 1 or any(named.setdefault(fingerprint, w) != w for w in widths)
            dims.update(widths)
        writer.close()

    clients = [asyncio.ensure_future(client()) for _ in range(4)]
    for number in range(count):
        await asyncio.sleep(0.3)
        _relink(link, "bad" if number % 5 == 4 else "ab"[number % 2 == 0])
        before = metric(server, "qingyu_reloads_total")
        server.process.send_signal(signal.SIGHUP)
        for _ in range(200):
            await asyncio.sleep(0.05)
            if await asyncio.to_thread(metric, server, "qingyu_reloads_total") > before:
                break
        memory.append(round(server.resident() / MEGABYTE, 1))
    stop.set()
    await asyncio.gather(*clients)
    return {**seen, "dims": sorted(dims), "resident_mb": memory}


def _relink(link: Path, name: str) -> None:
    new = link.with_name(".new")
    new.symlink_to(name)
    new.replace(link)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str, dict[str, Any]]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode("latin-1")
    length = int(re.findall(r"(?i)^content-length: (\d+)", head, re.MULTILINE)[0])
    body = await reader.readexactly(length)
    fingerprint = re.findall(r"(?i)^x-qingyu-fingerprint: (\S+)", head, re.MULTILINE)
    return int(head.split()[1]), "".join(fingerprint), json.loads(body)
