"""uvicorn's HTTP protocol with the limits that it leaves to a proxy: of bytes, of time, and of connections.

A client that is refused here is told why in the usual form, then its bytes are thrown away for a while before the
connection is closed: closed at once, the operating system might throw the answer away before it is read.

Requests behind each other ("pipelining") are parsed one ahead of the one that is answered, and none is begun while the
answers before it wait for a client that does not read: what a connection keeps is one request that waits, one answer,
and what one read of the socket brought.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qingyu.runtime.statuses import reply_of
from qingyu.runtime.wire import RefusedError

__all__ = ["Gate", "LimitedProtocol"]

HEADER_BYTES = 32_768
LINGER_SECONDS = 2.0
UNSENT_BYTES = 16_384  # of answers; above that the client has to read before its next request is begun


@dataclass(frozen=True)
class Gate:
    """The limits of every connection, in bytes and seconds, and who is told of refusals."""

    max_body: int
    header_seconds: float
    body_seconds: float
    write_seconds: float
    max_connections: int
    refused: Callable[[str], None]


class _Flow(FlowControl):
    """uvicorn's flow control, by which reading stays paused while it is ``held``.

    Every application that asks for its body resumes reading, also for requests that are far behind.
    """

    held = False

    def resume_reading(self) -> None:
        """Read on, unless it is held."""
        if not self.held:
            super().resume_reading()


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
        self._body_left = 0  # of a declared length
        self._own: RequestResponseCycle | None = None  # of the request that is arriving
        self._in_head = False
        self._lingering = False
        self._unparsed = bytearray()
        self._unread = False  # the last answer waits for the client to read
        self._answers = 0
        self._reading: asyncio.TimerHandle | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        self.flow: _Flow = _Flow(transport)
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
        self._unparsed += data
        self._parse()

    def resume_writing(self) -> None:
        """The client has read: go on with what it asked for next."""
        super().resume_writing()
        if self._unread:
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; nobody waits for what it asked for."""
        self._set_deadline(None)
        self._unread = False
        self._unparsed.clear()
        if self._reading is not None:
            self._reading.cancel()
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
        self._body_left = int(declared or b"0")  # digits only: the parser has seen to that
        if self._body_left > self.gate.max_body:
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
        self._body_left = max(0, self._body_left - len(body))
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
        self._answers += 1
        self._expect_reading()
        self._unread = self.flow.write_paused
        if not self._unread:
            self._go_on()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not in the face of a request that has come and was not read yet.

        One that is still under way finds the connection ended, not reset: its client knows that nobody has seen it.
        """
        if self.transport.is_closing() or self._lingering or _readable(self.transport):
            return
        self._linger()

    def _go_on(self) -> None:
        """Begin the next request, or wait for one."""
        self._unread = self.flow.held = False
        super().on_response_complete()
        self._parse()

    def _parse(self) -> None:
        """Parse what has arrived, piece by piece, until a whole request waits for the answers before it."""
        while self._unparsed and not self._full() and not self._lingering and not self.transport.is_closing():
            size = self._piece()
            piece = bytes(self._unparsed[:size])
            del self._unparsed[:size]
            super().data_received(piece)
            if self._in_head and not self._lingering:
                self._head_bytes += size
                self._check_head()
        self.flow.held = bool(self._unparsed)
        if self.flow.held:
            self.flow.pause_reading()

    def _full(self) -> bool:
        """Whether to parse nothing more: the client has to read first, or a whole request waits."""
        return self._unread or (bool(self.pipeline) and not self.cycle.more_body)

    def _piece(self) -> int:
        """How many bytes reach to the end of these headers, of this body, or of these chunks."""
        if self._body_left and not self._in_head:
            return self._body_left
        end = self._unparsed.find(b"\r\n\r\n")
        return len(self._unparsed) if end < 0 else end + 4

    def _expect_reading(self) -> None:
        """Close the connection if its client reads nothing for a while."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._reading is None:
            self._reading = self.loop.call_later(
                self.gate.write_seconds, self._check_reading, unsent, self._answers
            )

    def _check_reading(self, unsent: int, answers: int) -> None:
        self._reading = None
        # With another answer in between as much may be unsent, although the client reads.
        if self.transport.get_write_buffer_size() >= unsent and answers == self._answers:
            self.transport.abort()
        else:
            self._expect_reading()

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
        if self.flow.read_paused:  # by us: it may have come long ago
            self._set_deadline(self.gate.body_seconds)
            return
        what = "headers" if self._in_head else "the body"
        self._refuse("request_timeout", f"{what} took too long to arrive")

    def _refuse(self, code: str, message: str) -> None:
        """Answer for the request that is arriving, and read nothing more of this connection."""
        self._lingering = True
        self._set_deadline(None)
        self._unset_keepalive_if_required()
        self._unparsed.clear()
        self.flow.held = False
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
        self._linger()

    def _linger(self) -> None:
        """Say that nothing more will come, and throw away what does before closing."""
        self._lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _readable(transport: asyncio.Transport) -> bool:
    """Whether bytes, or an end, have arrived that the loop has not read."""
    with selectors.DefaultSelector() as selector:
        selector.register(transport.get_extra_info("socket").fileno(), selectors.EVENT_READ)
        return bool(selector.select(0))


def _response(code: str, message: str) -> bytes:
    reply = reply_of(RefusedError(code, message), "tei")
    headers = {**reply.headers, "content-length": str(len(reply.body)), "connection": "close"}
    lines = [
        f"HTTP/1.1 {reply.status} ",
        *(f"\r\n{name}: {value}" for name, value in headers.items()),
        "\r\n\r\n",
    ]
    return "".join(lines).encode("ascii") + reply.body
