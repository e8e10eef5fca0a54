"""HTTP(S) for fetching models, for servers that may be slow, broken or hostile.

- Only http and https, also after a redirect, and never from https to http.
- A token goes to the host that it is for and to no other, and over plain http only to this machine.
- Every wait has an end, and so has a server that drips: the limit is on bytes a second of waiting, headers included.
- Nothing is read beyond the size that was announced or allowed.

The standard library's urllib, which honours HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Not here: what is fetched.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from qingyu import __version__
from qingyu.errors import SourceError

__all__ = ["BrokenTransferError", "Limits", "Request", "get_json", "opened", "pieces", "unreachable"]

SCHEMES = ("http", "https")
PIECE = 1 << 16
RETRY_CODES = (408, 425, 429, 500, 502, 503, 504)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes.

    ``wait``: for a connection, and for each next byte. ``window`` and ``rate``: whoever waited ``window`` seconds in
    all must have got ``rate`` bytes for each. ``attempts``: how often a broken transfer is taken up, ``pause`` seconds
    after the first time, doubled after each next. ``listing`` and ``file``: bytes of a list of files, and of a file.
    """

    wait: float = 20.0
    window: float = 30.0
    rate: int = 1024
    attempts: int = 5
    pause: float = 0.5
    listing: int = 16 << 20
    file: int = 16 << 30


@dataclass(frozen=True)
class Request:
    """What to ask for; ``token`` never appears in ``repr`` and so in no message."""

    url: str
    token: str | None = field(default=None, repr=False)


class BrokenTransferError(Exception):
    """A transfer that failed in a way that another attempt may mend; never leaves this package."""


@contextmanager
def opened(request: Request, *, limits: Limits, start: int = 0) -> Iterator[http.client.HTTPResponse]:
    """The response to a GET, from byte ``start`` on if the server can.

    Raises ``SourceError`` for an answer that will stay as it is, ``BrokenTransferError`` for any other failure.
    """
    _check_scheme(request.url)
    asked = urllib.request.Request(request.url, headers=_headers(start))
    if request.token is not None and _may_carry_token(request.url):
        asked.add_unredirected_header("Authorization", f"Bearer {request.token}")
    try:
        response = _opener(limits).open(asked, timeout=limits.wait)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_error(request.url, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(_reason(error)) from error
    with response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _refused(request.url, "bytes as they are", "compressed ones")
        yield response


def get_json(request: Request, *, limits: Limits) -> Any:  # noqa: ANN401 - JSON
    """The JSON value at an address, of at most ``limits.listing`` bytes, tried ``limits.attempts`` times.

    Raises ``SourceError``.
    """
    for attempt in range(limits.attempts):
        if attempt:
            time.sleep(limits.pause * 2 ** (attempt - 1))
        try:
            with opened(request, limits=limits) as response:
                data = b"".join(pieces(response, request.url, limits.listing))
            return _parsed(data, request.url)
        except BrokenTransferError as error:
            reason = str(error)
    raise unreachable(request.url, reason)


def pieces(response: http.client.HTTPResponse, url: str, most: int) -> Iterator[bytes]:
    """The body as it arrives; ``BrokenTransferError`` when it ends early, ``SourceError`` above ``most`` bytes."""
    announced = response.headers.get("Content-Length")
    got = 0
    while piece := _read(response):
        got += len(piece)
        if got > most:
            raise _refused(url, f"at most {most:,} bytes", "more")
        yield piece
    if announced is not None and announced.isdigit() and got < int(announced):
        raise BrokenTransferError(f"the connection ended after {got:,} of {int(announced):,} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(_reason(error)) from error


def unreachable(url: str, reason: str) -> SourceError:
    """The error for a server that did not answer as it should after all attempts."""
    return SourceError(
        f"{_host(url)} cannot be read from",
        expected=f"an answer to {url}",
        found=reason,
        remedy="Try again later, go on with --from and another source, or set HF_ENDPOINT to a mirror.",
    )


def _headers(start: int) -> dict[str, str]:
    headers = {"User-Agent": f"qingyu/{__version__}", "Accept-Encoding": "identity"}
    return {**headers, "Range": f"bytes={start}-"} if start else headers


def _parsed(data: bytes, url: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused(url, "JSON", str(error) or type(error).__name__) from None


def _status_error(url: str, error: urllib.error.HTTPError) -> Exception:
    if error.code in RETRY_CODES:
        return BrokenTransferError(f"HTTP status {error.code}")
    if 300 <= error.code < 400:
        return _refused(url, "a redirect to http or https, and not from https to http", str(error.reason))
    remedy = {
        401: "Check the name; for a private or gated model set HF_TOKEN, over https.",
        403: "Accept the model's terms on its page, or use a token (HF_TOKEN) that may read it.",
        404: "Check the name and the revision.",
    }.get(error.code, "Try another source with --from.")
    return SourceError(
        f"{_host(url)} refuses {urlsplit(url).path}",
        expected="HTTP status 200",
        found=f"{error.code} {error.reason}",
        remedy=remedy,
    )


def _refused(url: str, expected: str, found: str) -> SourceError:
    return SourceError(
        f"{_host(url)} gives what is not taken",
        expected=expected,
        found=found,
        remedy="Try another source with --from.",
    )


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(inner) or type(inner).__name__


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme not in SCHEMES or not urlsplit(url).hostname:
        raise SourceError(
            "an address of a source",
            expected="http://... or https://...",
            found=repr(url),
            remedy="Set HF_ENDPOINT to the beginning of an address like https://huggingface.co.",
        )


def _may_carry_token(url: str) -> bool:
    return urlsplit(url).scheme == "https" or urlsplit(url).hostname in LOOPBACK


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # before Python 3.11

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in SCHEMES or (old, new) == ("https", "http"):
            raise urllib.error.HTTPError(req.full_url, code, f"a redirect to {newurl}", headers, fp)
        # What was added as "unredirected", which the token is, does not come along by itself.
        asked = urllib.request.Request(newurl, headers=dict(req.headers))
        token = req.unredirected_hdrs.get("Authorization")
        if token is not None and _origin(newurl) == _origin(req.full_url):
            asked.add_unredirected_header("Authorization", token)
        return asked


class _Pace:
    """Counts bytes, and seconds spent waiting for them; ``TimeoutError`` when the one is too few for the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waited = 0.0
        self._got = 0

    def read(self, stream: io.RawIOBase, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        start = time.monotonic()
        count = stream.readinto(buffer) or 0
        self._waited += time.monotonic() - start
        self._got += count
        if self._waited >= self._limits.window:
            if self._got < self._limits.rate * self._waited:
                raise TimeoutError(f"{self._got:,} bytes in {self._waited:.0f} seconds are too slow")
            self._waited, self._got = 0.0, 0
        return count


class _PacedStream(io.RawIOBase):
    def __init__(self, stream: io.RawIOBase, pace: _Pace) -> None:
        self._stream, self._pace = stream, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        return self._pace.read(self._stream, buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _PacedSocket:
    """A socket whose file, which http.client reads headers and body from, keeps the pace."""

    def __init__(self, real: socket.socket, pace: _Pace) -> None:
        self._real, self._pace = real, pace

    def makefile(self, mode: str = "rb") -> io.BufferedReader:
        return io.BufferedReader(_PacedStream(self._real.makefile(mode, buffering=0), self._pace))  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the socket's own
        return getattr(self._real, name)


class _Connection(http.client.HTTPConnection):
    pace: _Pace

    def connect(self) -> None:
        super().connect()
        self.sock = _PacedSocket(self.sock, self.pace)


class _SecureConnection(http.client.HTTPSConnection):
    pace: _Pace

    def connect(self) -> None:
        super().connect()
        self.sock = _PacedSocket(self.sock, self.pace)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(host: str, timeout: float) -> _Connection:
            made = _Connection(host, timeout=timeout)
            made.pace = _Pace(self._limits)
            return made

        return self.do_open(connection, req)  # type: ignore[arg-type]


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(host: str, timeout: float) -> _SecureConnection:
            made = _SecureConnection(host, timeout=timeout, context=ssl.create_default_context())
            made.pace = _Pace(self._limits)
            return made

        return self.do_open(connection, req)  # type: ignore[arg-type]


def _opener(limits: Limits) -> urllib.request.OpenerDirector:
    """The opener of urllib with no handler for files, FTP or data."""
    director = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler(),
        _Plain(limits),
        _Secure(limits),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    for handler in handlers:
        director.add_handler(handler)
    return director
