"""The process: sockets, signals, the order of starting and of ending.

It listens at once and is live; it is ready when every model was loaded, checked and run. SIGTERM or SIGINT: not ready
any more, new requests are refused with 503, those under way are answered, and the process ends with 0; after ``grace``
seconds, or a second signal, it ends anyway. SIGHUP opens every model again and serves what is there now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
import warnings
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from qingyu.errors import ListenError, QingyuError
from qingyu.runtime.serve.app import App, Keys
from qingyu.runtime.serve.hosts import Hosts
from qingyu.runtime.serve.protocol import Gate, LimitedProtocol
from qingyu.runtime.serve.service import Configuration, Served, Service
from qingyu.runtime.serve.telemetry import Log, LogHandler, Telemetry

__all__ = ["ServerSettings", "serve"]

UNANSWERED = 1  # the exit code when the grace ended before the last answer
# The interpreter lets another thread in that often at least: the loop must not wait 5 ms for a tokenizing thread.
SWITCH_SECONDS = 0.001
CLOSING_SECONDS = 2  # for answers that are written but not read when the process ends


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, and what it allows its clients; times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: str | None = None
    allowed_hosts: Sequence[str] | None = None
    keys: Sequence[str] = field(default=(), repr=False)
    grace: float = 30.0
    keep_alive: float = 75.0  # longer than the 60 s of usual load balancers, which must be the ones to close
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    max_connections: int = 1000


def serve(configuration: Configuration, settings: ServerSettings) -> int:
    """Serve until a signal, and return the exit code; raises what opening the models and the socket raises."""
    listener = _unix_listener(settings.unix_socket) if settings.unix_socket else _listener(settings)
    sys.setswitchinterval(SWITCH_SECONDS)
    log = Log()
    handler = LogHandler(log)
    logging.getLogger().addHandler(handler)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are of each bad request
    warnings.showwarning = lambda message, *_, **__: log("warning", level="warning", message=str(message))
    try:
        return _run(_Process(configuration, settings, listener, log).run())
    finally:
        listener.close()
        if settings.unix_socket:
            Path(settings.unix_socket).unlink(missing_ok=True)
        logging.getLogger().removeHandler(handler)
        log.close()


class _Process:
    """One run of the server in its event loop."""

    def __init__(
        self, configuration: Configuration, settings: ServerSettings, listener: socket.socket, log: Log
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._log = log
        self._telemetry = Telemetry()
        self._service = Service(configuration, self._telemetry)
        self._service.on_freed = lambda name: log("freed", model=name)
        app = App(self._service, self._telemetry, log, Keys(settings.keys), _hosts(settings, listener))
        app.gate = Gate(
            max_body=configuration.max_body,
            header_seconds=settings.header_timeout,
            body_seconds=settings.body_timeout,
            write_seconds=settings.write_timeout,
            max_connections=settings.max_connections,
            refused=self._telemetry.refused,
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                interface="asgi3",
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type] # any number of seconds
                timeout_graceful_shutdown=CLOSING_SECONDS,
                backlog=2048,
            )
        )
        self._telemetry.connections = lambda: len(self._server.server_state.connections)
        self._signals = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Until the end; the exit code."""
        self._listen_to_signals()
        self._log("listening", address=address_of(self._listener), pid=os.getpid())
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        opening = asyncio.ensure_future(self._open())
        try:
            await asyncio.wait({serving, opening}, return_when=asyncio.FIRST_EXCEPTION)
            if opening.done():
                opening.result()
            await serving
        finally:
            self._server.should_exit = True
            opening.cancel()
            await asyncio.gather(serving, opening, return_exceptions=True)
            await self._service.close()
        self._log("stopped", code=0)
        return 0

    async def _open(self) -> None:
        await self._service.open()
        for served in self._service.models:
            self._log("serving", **_facts(served))
        self._log("ready")

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._on_signal(loop, number, self._end)
        if hasattr(signal, "SIGHUP"):
            self._on_signal(loop, signal.SIGHUP, self._reload)

    def _on_signal(self, loop: asyncio.AbstractEventLoop, number: int, call: Callable[[int], None]) -> None:
        try:
            loop.add_signal_handler(number, call, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(call, number))

    def _end(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            self._log("forced", level="warning", signal=number, unanswered=self._telemetry.in_flight)
            self._leave(128 + number)
        self._service.draining = True
        self._log("draining", signal=number, unanswered=self._telemetry.in_flight)
        self._keep(self._drain())

    async def _drain(self) -> None:
        """Let what was accepted be answered; idle connections are closed at once."""
        for connection in list(self._server.server_state.connections):
            connection.shutdown()
        end = asyncio.get_running_loop().time() + self._settings.grace
        while self._telemetry.in_flight > 0:
            if asyncio.get_running_loop().time() >= end:
                self._log("grace ended", level="error", unanswered=self._telemetry.in_flight)
                self._leave(UNANSWERED)
            await asyncio.sleep(0.01)
        self._server.should_exit = True

    def _leave(self, code: int) -> None:
        """End now: a run under way cannot be interrupted, and may never end."""
        if self._settings.unix_socket:
            Path(self._settings.unix_socket).unlink(missing_ok=True)
        self._log.close()
        os._exit(code)

    def _reload(self, number: int) -> None:
        self._keep(self._open_again())

    async def _open_again(self) -> None:
        if not self._service.ready:
            self._log("not reloaded", level="warning", reason="the server is not ready")
            return
        for one in await self._service.reload():
            result = "failed" if one.error is not None else "changed" if one.changed else "same"
            self._telemetry.reloaded(one.name, result)
            if one.error is not None:
                self._log("reload", level="error", model=one.name, result=result, error=str(one.error))
            else:
                served = next(known for known in self._service.models if known.name == one.name)
                self._log("reload", result=result, **_facts(served))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us: its own way ends with the signal instead of exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield


def _facts(served: Served) -> dict[str, Any]:
    spec = served.model.running_spec
    return {
        "model": served.name,
        "task": spec.task,
        "precision": spec.precision,
        "folder": str(served.model.folder),
        "fingerprint": served.fingerprint(),
    }


def _run(main: Coroutine[Any, Any, int]) -> int:
    """The result of ``main`` in a loop of its own (``asyncio.Runner`` is newer than the oldest Python here)."""
    loop = _new_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop where that is installed, which takes less time for a request."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _hosts(settings: ServerSettings, listener: socket.socket) -> Hosts:
    """The names that requests may come by; no browser reaches a unix socket."""
    if settings.unix_socket:
        return Hosts(None)
    return Hosts.of(listener.getsockname()[0], settings.allowed_hosts)


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as a client writes it."""
    if hasattr(socket, "AF_UNIX") and listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listener(settings: ServerSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(f"{settings.host}:{settings.port}", error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _cannot_listen(f"{settings.host}:{settings.port}", error) from None
    return listener


def _unix_listener(path: str) -> socket.socket:
    """A socket that only this user may use. One that a killed server left is replaced, a living one is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError("something that is not a socket is there")
            if _answers(path):
                raise OSError("another server listens there")
            os.unlink(path)  # noqa: PTH108 - beside its companions
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _cannot_listen(path, error) from None
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _cannot_listen(where: str, error: Exception) -> QingyuError:
    return ListenError(
        f"cannot listen at {where}",
        expected="an address of this machine that is free",
        found=str(error),
        remedy="Choose another with --host, --port or --unix-socket.",
    )
