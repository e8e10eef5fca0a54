"""uvicorn's HTTP protocol with the limits that it leaves to a proxy: of bytes, of time, and of connections.

A client that is refused here is told why in the usual form, then its bytes are thrown away for a while before the
connection is closed: closed at once, the operating system might throw the answer away before it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qingyu.runtime.statuses import reply_of
from qingyu.runtime.wire import RefusedError

__all__ = ["Gate", "LimitedProtocol"]

HEADER_BYTES = 32_768
LINGER_SECONDS = 2.0


@dataclass(frozen=True)
class Gate:
    """The limits of every connection, in bytes and seconds, and who is told of refusals."""

    max_body: int
    header_seconds: float
    body_seconds: float
    write_seconds: float
    max_connections: int
    refused: Callable[[str], None]


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Its application is an ``App`` with a ``gate``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*arguments, **options)
        self.gate: Gate = self.app.gate
        self._deadline: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._answering: RequestResponseCycle | None = None  # not ``cycle`` while others wait behind it
        self._head_bytes = 0
        self._body_bytes = 0
        self._own: RequestResponseCycle | None = None  # of the request that is arriving
        self._in_head = False
        self._lingering = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.gate.max_connections:
            self._refuse("too_many_connections", "too many connections")
            return
        # Never used, it may stay as long as one between two requests.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Parse, within the limits."""
        if self._lingering:
            return
        super().data_received(data)
        if self._in_head and not self._lingering:
            self._head_bytes += len(data)
            self._check_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; nobody waits for what it asked for."""
        self._set_deadline(None)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self.pipeline.clear()  # those are never answered

    # What the parser calls.

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._lingering:
            return
        super().on_message_begin()
        self._in_head, self._head_bytes, self._own = True, 0, None
        self._set_deadline(self.gate.header_seconds)

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        if not self._lingering:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if not self._lingering:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers: refuse what they tell to be too large."""
        if self._lingering:
            return
        self._in_head = False
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if not self._check_head():
            return
        self._body_bytes = 0
        self._set_deadline(self.gate.body_seconds)
        names = [name for name, _ in self.headers]
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1") or (names.count(b"host") != 1 and version == "1.1"):
            self._refuse("bad_request", "expected an HTTP/1.1 request to one host")
            return
        if b"transfer-encoding" in names and b"content-length" in names:
            # Two lengths are how requests are smuggled past a proxy that believes the other one.
            self._refuse("bad_request", "expected one of Content-Length and Transfer-Encoding, found both")
            return
        declared = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if int(declared or b"0") > self.gate.max_body:  # digits only: the parser has seen to that
            self._refuse("body_too_large", f"expected a body of at most {self.gate.max_body} bytes")
            return
        try:
            super().on_headers_complete()
        except (httptools.HttpParserError, UnicodeDecodeError, ValueError):
            self._refuse("bad_request", "expected a path that is a URL")
            return
        self._own = self.cycle

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._lingering:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.gate.max_body:
            self._refuse("body_too_large", f"expected a body of at most {self.gate.max_body} bytes")
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if self._lingering:
            return
        self._set_deadline(None)
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            # Answered before the body had arrived, which ended the waiting for another request.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # What uvicorn calls.

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        if not self._lingering:
            self._refuse("bad_request", "expected an HTTP/1.1 request")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        self._answering = cycle
        self._task = self.loop.create_task(cycle.run_asgi(app))
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)

    def on_response_complete(self) -> None:
        """An answer was handed to the operating system, or waits for a client that does not read."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:
            self._expect_reading(self.transport.get_write_buffer_size())

    def _expect_reading(self, before: int) -> None:
        """Close the connection of a client that reads nothing for a while."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= before > 0:
                self.transport.abort()
            elif left > 0:
                self._expect_reading(left)

        self.loop.call_later(self.gate.write_seconds, check)

    def _check_head(self) -> bool:
        if self._head_bytes <= HEADER_BYTES:
            return True
        self._refuse("headers_too_large", f"expected at most {HEADER_BYTES} bytes of headers")
        return False

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        what = "headers" if self._in_head else "the body"
        self._refuse("request_timeout", f"{what} took too long to arrive")

    def _refuse(self, code: str, message: str) -> None:
        """Answer for the request that is arriving, and read nothing more of this connection."""
        self._lingering = True
        self._set_deadline(None)
        self._unset_keepalive_if_required()
        self.gate.refused(code)
        own = self._own
        earlier = self.pipeline or (self.cycle is not own and self.cycle and not self.cycle.response_complete)
        if earlier or (own is not None and own.response_started and not own.response_complete):
            self.transport.abort()  # an answer here would stand for another request
            return
        if own is None or not own.response_started:
            if own is not None:
                own.disconnected = True
                own.message_event.set()
            if self._task is not None:
                self._task.cancel()
            self.transport.write(_response(code, message))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _response(code: str, message: str) -> bytes:
    reply = reply_of(RefusedError(code, message), "tei")
    headers = {**reply.headers, "content-length": str(len(reply.body)), "connection": "close"}
    lines = [
        f"HTTP/1.1 {reply.status} ",
        *(f"\r\n{name}: {value}" for name, value in headers.items()),
        "\r\n\r\n",
    ]
    return "".join(lines).encode("ascii") + reply.body
