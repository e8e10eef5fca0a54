"""A load of HTTP requests on a server of this machine, at a fixed rate or from a fixed number of clients.

At a fixed rate a request is sent when it is due, whether or not others were answered, and its time counts from then on:
a client that waits for answers would slow down with the server and hide the waiting ("coordinated omission").

Only loopback addresses and unix sockets are taken, and a run is bounded in requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httptools
import numpy as np
import psutil

from qingyu.errors import InvalidOptionError

__all__ = [
    "Load",
    "Outcome",
    "Pool",
    "RunningServer",
    "closed_loop",
    "json_request",
    "open_loop",
    "run_loop",
    "running_server",
]

T = TypeVar("T")

MOST_REQUESTS = 200_000
STARTING_SECONDS = 60.0
LATE_SECONDS = 30.0  # an answer that takes longer is none


@dataclass(frozen=True)
class Outcome:
    """One request: seconds from when it was due, and the status of its answer, 0 where the connection broke."""

    due: float
    seconds: float
    status: int
    retry_after: bool


@dataclass(frozen=True)
class Load:
    """What came of many requests in ``seconds``."""

    seconds: float
    outcomes: Sequence[Outcome] = field(repr=False)

    def count(self, *statuses: int) -> int:
        """How many answers had one of these statuses."""
        return sum(one.status in statuses for one in self.outcomes)

    @property
    def goodput(self) -> float:
        """Answers of 200 a second."""
        return self.count(200) / self.seconds

    def percentile(self, share: float, *statuses: int) -> float:
        """Seconds within which this share of the answers of these statuses came; NaN without any."""
        times = [one.seconds for one in self.outcomes if one.status in statuses]
        return float(np.percentile(times, 100 * share)) if times else float("nan")

    def summary(self) -> dict[str, Any]:
        """The figures, in milliseconds."""
        statuses = sorted({one.status for one in self.outcomes})
        refused = [one for one in self.outcomes if one.status in (429, 503)]

        def milliseconds(share: float, *of: int) -> float | None:
            value = 1e3 * self.percentile(share, *of)
            return None if np.isnan(value) else round(value, 2)

        return {
            "seconds": round(self.seconds, 2),
            "requests": len(self.outcomes),
            "statuses": {str(status): self.count(status) for status in statuses},
            "goodput": round(self.goodput, 1),
            "p50_ms": milliseconds(0.5, 200),
            "p99_ms": milliseconds(0.99, 200),
            "refused_p50_ms": milliseconds(0.5, 429, 503),
            "refused_p99_ms": milliseconds(0.99, 429, 503),
            "refused_without_retry_after": sum(not one.retry_after for one in refused),
        }


def json_request(path: str, document: object, *, headers: Sequence[str] = ()) -> bytes:
    """The bytes of a POST with a JSON body."""
    body = json.dumps(document, ensure_ascii=False).encode("utf-8")
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body


class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.alive = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bool]] | None = None
        self._renew()

    def _renew(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._retry_after = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport, self.alive = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.alive = False
        self._settle((0, False))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._retry_after |= name.lower() == b"retry-after"

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        status, retry_after = self._parser.get_status_code(), self._retry_after
        self._renew()
        self._settle((status, retry_after))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bool]]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self.alive = False
        if self._transport is not None:
            self._transport.close()

    def _settle(self, answer: tuple[int, bool]) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)


class Pool:
    """Idle connections to one address, the last used first."""

    def __init__(self, address: str) -> None:
        self._host, self._port, self._path = _parsed(address)
        self._idle: deque[_Connection] = deque()
        self._all: set[_Connection] = set()

    async def send(self, request: bytes, due: float) -> Outcome:
        """One request, now; ``due`` is when it should have been."""
        status, retry_after = 0, False
        try:
            connection = await self._connection()
            status, retry_after = await asyncio.wait_for(connection.ask(request), LATE_SECONDS)
            if connection.alive:
                self._idle.append(connection)
            else:
                self._all.discard(connection)
        except (OSError, asyncio.TimeoutError):
            pass
        return Outcome(due, time.perf_counter() - due, status, retry_after)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection
        loop = asyncio.get_running_loop()
        if self._path is not None:
            _, connection = await loop.create_unix_connection(_Connection, self._path)
        else:
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        self._all.add(connection)
        return connection

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.close()


async def open_loop(address: str, requests: Sequence[bytes], *, rate: float, seconds: float) -> Load:
    """The requests in turn, ``rate`` a second for so many ``seconds``, however they are answered."""
    count = int(rate * seconds)
    _check_count(count)
    pool = Pool(address)
    start = time.perf_counter()
    tasks: list[asyncio.Task[Outcome]] = []
    for number in range(count):
        due = start + number / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.ensure_future(pool.send(requests[number % len(requests)], due)))
    outcomes = await asyncio.gather(*tasks)
    pool.close()
    return Load(max(seconds, max(one.due + one.seconds for one in outcomes) - start), outcomes)


async def closed_loop(address: str, requests: Sequence[bytes], *, clients: int) -> Load:
    """Every request once, each of the clients sending its next when its last was answered."""
    _check_count(len(requests))
    pool = Pool(address)
    waiting = iter(requests)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for request in waiting:
            outcomes.append(await pool.send(request, time.perf_counter()))  # noqa: PERF401 - one list of all clients

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    pool.close()
    return Load(seconds, outcomes)


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, in the fastest loop that is installed: a client costs the server's CPU."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    result: T = uvloop.run(main)
    return result


@dataclass(frozen=True)
class RunningServer:
    """A server in a process of its own."""

    address: str
    process: subprocess.Popen[str]

    def resident(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def cpu_seconds(self) -> float:
        """The CPU time that it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def get(self, path: str) -> bytes:
        """The body of an answer to GET, whatever its status."""
        import http.client

        parts = urllib.parse.urlsplit(self.address)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextlib.contextmanager
def running_server(*arguments: str) -> Iterator[RunningServer]:
    """``qingyu serve`` with these arguments on a free port, ready; it is told to end afterwards."""
    command = [sys.executable, "-m", "qingyu", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stderr is not None
        lines = []
        address = ""
        deadline = time.monotonic() + STARTING_SECONDS
        for line in process.stderr:
            lines.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            address = event.get("address", address)
            if event.get("event") == "ready" or time.monotonic() > deadline:
                break
        if not address or process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{''.join(lines)}")
        # Nobody reads on: the server drops log lines rather than wait.
        yield RunningServer(address, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _parsed(address: str) -> tuple[str, int, str | None]:
    """Host, port and path of a unix socket."""
    if address.startswith("unix:"):
        return "", 0, address.removeprefix("unix:")
    parts = urllib.parse.urlsplit(address)
    host = "127.0.0.1" if parts.hostname == "localhost" else str(parts.hostname)
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback or parts.port is None:
        raise InvalidOptionError(
            "address",
            expected="http://127.0.0.1:PORT or unix:PATH",
            found=repr(address),
            remedy="Load is for servers of this machine only.",
        )
    return host, parts.port, None


def _check_count(count: int) -> None:
    if not 1 <= count <= MOST_REQUESTS:
        raise InvalidOptionError(
            "requests of a load",
            expected=f"1 to {MOST_REQUESTS}",
            found=str(count),
            remedy="Lower the rate or the seconds.",
        )
