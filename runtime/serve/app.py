"""One request, from its headers to its answer, as an ASGI application.

The order is that of cost: what can be refused by headers alone is refused before the body is read, and when too much
waits already nothing is read or parsed at all. Not here: limits of connections and of time (``protocol``).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from qingyu.errors import QingyuError
from qingyu.runtime.bodies import read_body
from qingyu.runtime.serve.hosts import Hosts
from qingyu.runtime.serve.protocol import Gate
from qingyu.runtime.serve.routes import ROUTES, Call, Route
from qingyu.runtime.serve.service import Service
from qingyu.runtime.serve.telemetry import Log, Telemetry
from qingyu.runtime.statuses import Style, refusal_of, reply_of
from qingyu.runtime.wire import RefusedError, Reply, check_type, parse_json

__all__ = ["App", "Keys"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ID_LENGTH = 128
NOT_FOUND = (
    "(none)"  # the route of unknown paths, which must not fill metrics and logs with names of their own
)
# Refusals of load are counted, and one line a second stands for all of them in the log.
UNLOGGED = ("overloaded", "draining", "not_ready", "too_many_connections")
# The page has its script and style inside, and speaks to nobody but its server.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Keys:
    """API keys, compared in constant time: neither a key's place in the list nor its first wrong letter shows."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode("utf-8")) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, header: bytes) -> bool:
        """Whether an ``Authorization`` header holds one of the keys, as a bearer token."""
        scheme, _, sent = header.partition(b" ")
        digest = _digest(sent.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class App:
    """The application of one service; ``gate`` is for ``LimitedProtocol``."""

    gate: Gate

    def __init__(self, service: Service, telemetry: Telemetry, log: Log, keys: Keys, hosts: Hosts) -> None:
        self.service = service
        self.telemetry = telemetry
        self.log = log
        self._keys = keys
        self._hosts = hosts
        self._routes = {(route.method, route.path): route for route in ROUTES}
        self._methods: dict[str, list[str]] = {}
        for route in ROUTES:
            self._methods.setdefault(route.path, []).append(route.method)
        self._unlogged = 0
        self._unlogged_since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; never raises but for faults of the server that calls it."""
        if scope["type"] != "http":
            return
        begun = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        call = Call(_request_id(headers.get(b"x-request-id")))
        route, asked = self._find(scope)
        self.telemetry.in_flight += 1
        code = None
        try:
            reply = await self._answer(scope, route, asked, headers, receive, call)
        except asyncio.CancelledError:
            # The client left, or the server ends by force: there is nobody to answer.
            self.telemetry.in_flight -= 1
            self.telemetry.cancelled()
            self.log("cancelled", id=call.id, route=_name(route), ms=_milliseconds(begun))
            return
        except RefusedError as error:
            code, reply = error.code, self._refusal(error, route)
        except QingyuError as error:
            refused = refusal_of(error)
            code, reply = refused.code, self._refusal(refused, route)
            if reply.status >= 500:
                self.log("failed", level="error", id=call.id, model=call.model, error=str(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours is an answer of 500, not a broken connection
            code, reply = "internal", self._refusal(RefusedError("internal", "a fault of the server"), route)
            self.log("fault", level="error", id=call.id, error=f"{type(error).__name__}: {error}")
        try:
            await _send(send, scope, self._with_headers(reply, call, route))
        except (OSError, RuntimeError):  # of a connection that broke just now
            self.telemetry.cancelled()
        finally:
            self.telemetry.in_flight -= 1
            self._note(route, reply, call, code, begun)

    def _find(self, scope: Scope) -> tuple[Route | str | None, dict[str, Any]]:
        """The route, the methods that the path has instead, or ``None``; and what the path itself asks."""
        path, method = scope["path"], scope["method"]
        asked: dict[str, Any] = {}
        if path.startswith("/v1/models/") and len(path) > len("/v1/models/"):
            asked["model"] = urllib.parse.unquote(path.removeprefix("/v1/models/"))
            path = "/v1/models/{model}"
        if method == "HEAD":
            method = "GET"
        route = self._routes.get((method, path))
        if route is not None:
            return route, asked
        return (", ".join(self._methods[path]) if path in self._methods else None), asked

    async def _answer(
        self,
        scope: Scope,
        route: Route | str | None,
        asked: dict[str, Any],
        headers: Mapping[bytes, bytes],
        receive: Receive,
        call: Call,
    ) -> Reply:
        if not self._hosts.admit(headers.get(b"host")) and not _any_host(route):
            raise RefusedError("wrong_host", "this server does not answer for that host; see --allowed-hosts")
        if route is None:
            raise RefusedError("not_found", "no such path; /openapi.json lists all")
        if isinstance(route, str):
            raise RefusedError("method_not_allowed", f"this path takes {route}", headers={"allow": route})
        if self._keys and route.key and not self._keys.admit(headers.get(b"authorization", b"")):
            raise RefusedError(
                "unauthorized",
                "expected an API key as a bearer token",
                headers={"www-authenticate": "Bearer"},
            )
        if route.method == "POST":
            if route.runs:
                self.service.admit()
            check_type(_text(headers, b"content-type"), _text(headers, b"content-encoding"))
            body = await _body(receive, self.service.configuration.max_body)
            asked = read_body(route.path, parse_json(body), self.service.configuration.max_inputs)
        body = await route.answer(self.service, asked, call)
        return Reply(200, body, {"content-type": route.media})

    def _refusal(self, refusal: RefusedError, route: Route | str | None) -> Reply:
        scheduler = self.service.scheduler
        retry_after = 1 if scheduler is None else scheduler.retry_after()
        return reply_of(refusal, _style(route), retry_after=retry_after)

    def _with_headers(self, reply: Reply, call: Call, route: Route | str | None) -> Reply:
        headers = {**reply.headers, "x-request-id": call.id, "x-content-type-options": "nosniff"}
        if reply.status == 200 and call.model:
            headers["x-qingyu-model"] = urllib.parse.quote(call.model)
            headers["x-qingyu-fingerprint"] = call.fingerprint
            headers["x-qingyu-queue-ms"] = f"{1e3 * call.timing.waited:.2f}"
            headers["x-qingyu-run-ms"] = f"{1e3 * call.timing.ran:.2f}"
            if call.report.truncated:
                headers["x-qingyu-truncated"] = str(call.report.truncated)
        if isinstance(route, Route) and route.path == "/":
            headers["content-security-policy"] = PAGE_POLICY
        if self.service.draining:
            headers["connection"] = "close"
        return Reply(reply.status, reply.body, headers)

    def _note(
        self, route: Route | str | None, reply: Reply, call: Call, code: str | None, begun: float
    ) -> None:
        seconds = time.perf_counter() - begun
        name = _name(route)
        self.telemetry.answered(name, reply.status, seconds)
        if code is not None:
            self.telemetry.refused(code)
        elif call.model:
            report = call.report
            self.telemetry.ran(
                call.model,
                seconds=seconds,
                waited=call.timing.waited,
                texts=report.texts,
                truncated=report.truncated,
            )
        if code in UNLOGGED:
            self._note_unlogged()
            return
        self.log(
            "request",
            id=call.id,
            route=name,
            status=reply.status,
            ms=round(1e3 * seconds, 2),
            code=code,
            model=call.model or None,
            texts=call.report.texts or None,
            tokens=call.report.tokens or None,
            truncated=call.report.truncated or None,
            queue_ms=round(1e3 * call.timing.waited, 2) if call.model and code is None else None,
        )

    def _note_unlogged(self) -> None:
        self._unlogged += 1
        now = time.monotonic()
        if now - self._unlogged_since >= 1.0:
            self.log("refused", level="warning", requests=self._unlogged)
            self._unlogged, self._unlogged_since = 0, now


def _request_id(sent: bytes | None) -> str:
    """The client's own, where it is plain: it comes back in a header and stands in the log."""
    if sent and len(sent) <= ID_LENGTH and all(0x21 <= byte <= 0x7E for byte in sent):
        return sent.decode("ascii")
    return secrets.token_hex(8)


def _style(route: Route | str | None) -> Style:
    return route.style if isinstance(route, Route) else "tei"


def _any_host(route: Route | str | None) -> bool:
    return isinstance(route, Route) and route.any_host


def _name(route: Route | str | None) -> str:
    return route.path if isinstance(route, Route) else NOT_FOUND


def _milliseconds(begun: float) -> float:
    return round(1e3 * (time.perf_counter() - begun), 2)


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


async def _body(receive: Receive, most: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise RefusedError(
                "body_too_large", f"expected a body of at most {most} bytes", headers={"connection": "close"}
            )
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _send(send: Send, scope: Scope, reply: Reply) -> None:
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in reply.headers.items()]
    headers.append((b"content-length", str(len(reply.body)).encode("ascii")))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body if scope["method"] != "HEAD" else b""})
