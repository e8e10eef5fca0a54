"""What serverless platforms pass in for an HTTP request, and what they want back; one request type in the middle.

The forms are those of the platforms' documents: AWS Lambda's payload format 2.0 (function URLs, API Gateway HTTP
APIs), format 1.0 and ALB; Tencent SCF's API gateway trigger; Alibaba FC 3.0's HTTP trigger, and WSGI of FC 2.0.
None of the platforms could be asked here: the tests replay events as their documents show them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from qingyu.runtime.serverless.app import App, Request
from qingyu.runtime.statuses import reply_of
from qingyu.runtime.wire import RefusedError, Reply

__all__ = ["answer_event", "answer_wsgi", "read_event"]

StartResponse = Callable[[str, list[tuple[str, str]]], object]


def answer_event(app: App, event: object) -> dict[str, Any]:
    """The answer of an app in the form that the sender of the event understands.

    An event that is no HTTP request (a timer's, or a direct call) is answered with 400.
    """
    try:
        request = read_event(event)
    except RefusedError as refused:
        return _response(reply_of(refused, "tei"), event)
    return _response(app.reply(request), event)


def read_event(event: object) -> Request:
    """The HTTP request in an event; ``RefusedError`` of 400 for what is none.

    Formats with ``requestContext.http`` (Lambda 2.0, FC 3.0) differ from the others (Lambda 1.0, ALB, SCF) in where
    method and path are. A header that came several times is joined by commas, as HTTP allows.
    """
    if not isinstance(event, Mapping):
        raise RefusedError("bad_request", "expected an event of an HTTP request")
    context = _mapping(event.get("requestContext"))
    http = _mapping(context.get("http"))
    method = http.get("method") or event.get("httpMethod")
    path = event.get("rawPath") or http.get("path") or event.get("path")
    if not isinstance(method, str) or not isinstance(path, str):
        raise RefusedError("bad_request", "expected an event of an HTTP request")
    headers = {**_headers(event.get("headers")), **_headers(event.get("multiValueHeaders"))}
    return Request(method, path, headers, _body(event))


def _headers(value: object) -> dict[str, str]:
    pairs = _mapping(value).items()
    return {str(name).lower(): _joined(content) for name, content in pairs if content is not None}


def _joined(content: object) -> str:
    return ",".join(map(str, content)) if isinstance(content, list) else str(content)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _body(event: Mapping[str, Any]) -> bytes:
    body = event.get("body")
    if body is None:
        return b""
    if not isinstance(body, str):
        raise RefusedError("bad_request", "expected the body of the request as a string")
    # SCF has been seen to send the word instead of the truth value.
    if event.get("isBase64Encoded") not in (True, "true"):
        return body.encode("utf-8", "surrogatepass")  # not UTF-8 then, which the reader of JSON says
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError("bad_request", "the body is not base64, as the event says it is") from None


def _response(reply: Reply, event: object) -> dict[str, Any]:
    """Statuses, headers and text. ALB wants a status line, and headers in lists where it sent lists."""
    given = _mapping(event)
    answer: dict[str, Any] = {
        "statusCode": reply.status,
        "headers": dict(reply.headers),
        "body": reply.body.decode("utf-8"),
        "isBase64Encoded": False,
    }
    if "elb" in _mapping(given.get("requestContext")):
        answer["statusDescription"] = _status_line(reply.status)
    if given.get("multiValueHeaders"):
        answer["multiValueHeaders"] = {name: [value] for name, value in reply.headers.items()}
    return answer


def _status_line(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"


def answer_wsgi(app: App, environ: Mapping[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """The answer of an app to a WSGI call. At most one byte more than the limit of a body is read."""
    headers = {
        name[5:].replace("_", "-").lower(): str(value)
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    headers["content-type"] = str(environ.get("CONTENT_TYPE") or "")
    method, path = str(environ.get("REQUEST_METHOD", "")), str(environ.get("PATH_INFO", ""))
    try:
        reply = app.reply(Request(method, path, headers, _wsgi_body(app, environ)))
    except RefusedError as refused:
        reply = reply_of(refused, "tei")
    length = {"content-length": str(len(reply.body))}
    start_response(_status_line(reply.status), [*reply.headers.items(), *length.items()])
    return [b"" if method.upper() == "HEAD" else reply.body]


def _wsgi_body(app: App, environ: Mapping[str, Any]) -> bytes:
    text = str(environ.get("CONTENT_LENGTH") or "0")
    if not (text.isascii() and text.isdigit()):
        raise RefusedError("bad_request", "expected a content-length that is a number")
    length = min(int(text[:20]), app.body_limit + 1)
    stream = environ.get("wsgi.input")
    return b"" if stream is None or not length else bytes(stream.read(length))
