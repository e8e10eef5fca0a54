"""Real servers in processes of their own, on loopback or a unix socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

for package in ("uvicorn", "httptools", "orjson", "prometheus_client"):
    pytest.importorskip(package)

SECONDS = 60.0

# ``qingyu serve`` with models that take SLOW seconds for each micro-batch, or as long as there is no file GATE, and
# SLOW_START to open; on a system that gives no more threads while there is a file NO_THREADS, and whose clock is set
# by an hour and more, back and forth, whenever somebody reads it, with JUMPING_CLOCK.
SLOW = """
import os, sys, time
from qingyu.__main__ import main
from qingyu.runtime import embedder, task

if "SLOW" in os.environ:
    fast = task.TaskModel.run_rows

    def run_rows(self, rows):
        time.sleep(float(os.environ["SLOW"]))
        return fast(self, rows)

    task.TaskModel.run_rows = run_rows
if "GATE" in os.environ:
    ungated = task.TaskModel.run_rows

    def gated_rows(self, rows):
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
        return ungated(self, rows)

    task.TaskModel.run_rows = gated_rows
if "SLOW_START" in os.environ:
    load = task.TaskModel.load

    def slow_load(self):
        time.sleep(float(os.environ["SLOW_START"]))
        load(self)

    task.TaskModel.load = slow_load
if "NO_THREADS" in os.environ:
    import threading

    unlimited = threading.Thread.start

    def limited(self):
        if os.path.exists(os.environ["NO_THREADS"]):
            raise RuntimeError("can't start new thread")
        unlimited(self)

    threading.Thread.start = limited
if "JUMPING_CLOCK" in os.environ:
    import itertools

    true_time, jumps = time.time, itertools.cycle((0, 3600, -3600, 86400 * 366, -86400 * 366))
    time.time = lambda: true_time() + next(jumps)
    time.time_ns = lambda: int(1e9 * time.time())
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@dataclass
class Answer:
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass
class Server:
    """One server process, and what it logged."""

    process: subprocess.Popen[str]
    log: list[dict[str, Any]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.log.append(json.loads(line))
            else:
                self.other.append(line)

    def event(self, name: str, *, count: int = 1, **facts: object) -> dict[str, Any]:
        """The ``count``-th line of that event, once it was written."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            found = [
                line
                for line in self.log
                if line["event"] == name and all(line.get(key) == value for key, value in facts.items())
            ]
            if len(found) >= count:
                return found[count - 1]
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no event {name}: {self.log[-5:]} {''.join(self.other)[-2000:]}")

    @property
    def address(self) -> str:
        return str(self.event("listening")["address"])

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def connection(self) -> http.client.HTTPConnection:
        if self.address.startswith("unix:"):
            return UnixConnection(self.address.removeprefix("unix:"))
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode("utf-8")
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        connection = self.connection()
        try:
            connection.request(method, path, body, sent)  # type: ignore[arg-type]
            answer = connection.getresponse()
            headers_ = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers_, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def raw(self, data: bytes, *, seconds: float = 10.0) -> bytes:
        """What comes back for these bytes until the server closes, or says nothing more for so long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return received(connection)

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/stats").json
        return found

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first ``/stats`` of which ``condition`` is true."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            found = self.stats()
            if condition(found):
                return found
            time.sleep(0.01)
        raise AssertionError(found)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, after a signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def received(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def started(
    *arguments: str,
    ready: bool = True,
    slow: float | None = None,
    gate: Path | None = None,
    **environment: str,
) -> Iterator[Server]:
    """``qingyu serve`` with these arguments, on a free port unless they name a socket."""
    if "--unix-socket" not in arguments:
        arguments = ("--port", "0", *arguments)
    if gate is not None:
        gate.touch()
        environment["GATE"] = str(gate)
    if slow is not None:
        environment["SLOW"] = str(slow)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SLOW), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    server = Server(process)
    try:
        if ready:
            server.event("ready")
        if gate is not None:
            gate.unlink()  # from here on nothing is run until it is there again
        yield server
    finally:
        if gate is not None:
            gate.touch()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        server._reader.join(5)
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Starts a server, for a ``with`` statement."""
    return started


@pytest.fixture(scope="session")
def all_models(tiny_model: Path, head_model: Callable[..., Path]) -> dict[str, Path]:
    """A tiny model of every task."""
    return {
        "tiny": tiny_model,
        "words": head_model("fill-mask"),
        "mood": head_model("classification", ("好", "坏", "平")),
        "names": head_model("tagging", ("O", "B-人", "I-人")),
        "answers": head_model("question-answering"),
        "sorter": head_model("reranking"),
    }


@pytest.fixture(scope="session")
def server(all_models: dict[str, Path]) -> Iterator[Server]:
    """One server with a model of every task, for tests that leave it as it is."""
    arguments = [part for name, folder in all_models.items() for part in ("--model", f"{name}={folder}")]
    arguments += ["--max-inputs", "16", "--max-body", "100000", "--threads", "1"]
    arguments += ["--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "1"]
    with started(*arguments) as running:
        yield running
        assert running.end() == 0
    assert not running.other, "".join(running.other)
    assert not [line for line in running.log if line["event"] == "fault"]
