"""Every answer that is not 200: one table, from which server, functions, OpenAPI document and documentation take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qingyu.errors import (
    ClosedError,
    InputError,
    InvalidTextError,
    MemoryBudgetError,
    OverloadedError,
    QingyuError,
    TextTooLongError,
    ThreadLimitError,
)
from qingyu.runtime.wire import JSON_TYPE, RefusedError, Reply

__all__ = ["STATUSES", "Status", "Style", "refusal_of", "reply_of", "status_number"]

Style = Literal["openai", "tei"]


@dataclass(frozen=True)
class Status:
    """What one kind of refusal means: its HTTP status, and whether ``Retry-After`` comes with it."""

    number: int
    meaning: str
    retry: bool = False


STATUSES: Mapping[str, Status] = {
    "bad_request": Status(400, "not an HTTP request that this server reads; the connection is closed"),
    "invalid_json": Status(400, "the body is not one JSON object in UTF-8 with every key once"),
    "empty_input": Status(400, "there is nothing to work on"),
    "unauthorized": Status(401, "no API key, or a wrong one"),
    "not_found": Status(404, "no such path"),
    "model_not_found": Status(404, "no model of that name, or none for this route, is served"),
    "method_not_allowed": Status(405, "the path takes another method, which Allow names"),
    "request_timeout": Status(408, "headers or body took too long to arrive; the connection is closed"),
    "body_too_large": Status(413, "more bytes than --max-body allows; the connection is closed"),
    "too_many_inputs": Status(413, "more texts than --max-inputs allows"),
    "text_too_long": Status(413, "a text is longer than the model reads, and truncation was not allowed"),
    "unsupported_media_type": Status(415, "the body is not application/json, or is compressed"),
    "wrong_host": Status(421, "the Host header names none that this server answers for; see --allowed-hosts"),
    "invalid_request": Status(422, "a field is unknown, missing, or not what it should be"),
    "invalid_text": Status(422, "a text is not Unicode (a lone surrogate), or lacks a mask to fill"),
    "headers_too_large": Status(431, "more bytes of headers than are read; the connection is closed"),
    "overloaded": Status(429, "more work waits than can be done in time", retry=True),
    "internal": Status(500, "a fault of the server; the log says which"),
    "model_failed": Status(500, "the model cannot be used, or gave no usable numbers; the log says why"),
    "not_ready": Status(503, "models are being loaded and checked", retry=True),
    "draining": Status(503, "the server is about to end", retry=True),
    "out_of_memory": Status(503, "memory ran out; a smaller request may succeed", retry=True),
    "out_of_threads": Status(503, "the system gives the server no more threads", retry=True),
    "too_many_connections": Status(503, "more connections than --max-connections allows", retry=True),
}

# The first kind that fits.
OF_ERRORS: tuple[tuple[type[QingyuError], str], ...] = (
    (TextTooLongError, "text_too_long"),
    (InvalidTextError, "invalid_text"),
    (InputError, "invalid_request"),
    (OverloadedError, "overloaded"),
    (MemoryBudgetError, "out_of_memory"),
    (ThreadLimitError, "out_of_threads"),
    (ClosedError, "draining"),
    (QingyuError, "model_failed"),
)


def refusal_of(error: QingyuError) -> RefusedError:
    """What one of our errors is to a client: in its own words where the client must act, else without them.

    The words of an error inside name paths and files.
    """
    code = next(code for kind, code in OF_ERRORS if isinstance(error, kind))
    words = str(error) if isinstance(error, (InputError, OverloadedError)) else STATUSES[code].meaning
    return RefusedError(code, words)


def status_number(code: str, style: Style) -> int:
    """The HTTP status of a code. OpenAI's clients know 400 for what is 422 elsewhere."""
    number = STATUSES[code].number
    return 400 if style == "openai" and number == 422 else number


def reply_of(refusal: RefusedError, style: Style, *, retry_after: int = 1) -> Reply:
    """The answer, in the form that clients of either API expect."""
    status = status_number(refusal.code, style)
    message = str(refusal).encode("utf-8", "replace").decode("utf-8")
    document: dict[str, object]
    if style == "openai":
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        inner = {"message": message, "type": kind, "param": refusal.parameter, "code": refusal.code}
        document = {"error": inner}
    else:
        document = {"error": message, "error_type": refusal.code}
    headers = {"content-type": JSON_TYPE, **refusal.headers}
    if STATUSES[refusal.code].retry:
        headers["retry-after"] = str(retry_after)
    return Reply(status, json.dumps(document, ensure_ascii=False).encode("utf-8"), headers)
