"""What a function answers that is not 200: codes and statuses of ``qingyu serve``, as far as a function has them.

Not imported from there, because a function's bundle holds no server; a test compares the answers of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from qingyu.errors import (
    ClosedError,
    InputError,
    InvalidTextError,
    MemoryBudgetError,
    QingyuError,
    TextTooLongError,
)
from qingyu.runtime.wire import JSON_TYPE, Reply, RequestError

__all__ = ["STATUSES", "Style", "refusal", "refusal_of"]

Style = Literal["openai", "tei"]

STATUSES: Mapping[str, int] = {
    "bad_request": 400,
    "invalid_json": 400,
    "empty_input": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "too_many_inputs": 413,
    "text_too_long": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "invalid_text": 422,
    "model_failed": 500,
    "draining": 503,
    "out_of_memory": 503,
}

# The first kind that fits.
OF_ERRORS: tuple[tuple[type[QingyuError], str], ...] = (
    (TextTooLongError, "text_too_long"),
    (InvalidTextError, "invalid_text"),
    (InputError, "invalid_request"),
    (MemoryBudgetError, "out_of_memory"),
    (ClosedError, "draining"),
    (QingyuError, "model_failed"),
)


def refusal_of(error: QingyuError, style: Style) -> Reply:
    """The answer for one of our errors: in its own words where the caller must act, else without them.

    The words of an error inside name paths and files.
    """
    code = next(code for kind, code in OF_ERRORS if isinstance(error, kind))
    words = str(error) if isinstance(error, InputError) else "the model cannot answer; the log says why"
    return refusal(RequestError(code, words), style)


def refusal(error: RequestError, style: Style) -> Reply:
    """The answer in the form that clients of either API expect; OpenAI's know 400 for what is 422 elsewhere."""
    status = STATUSES[error.code]
    status = 400 if style == "openai" and status == 422 else status
    message = str(error).encode("utf-8", "replace").decode("utf-8")
    document: dict[str, object] = {"error": message, "error_type": error.code}
    if style == "openai":
        kind = "invalid_request_error" if status < 500 else "server_error"
        document = {"error": {"message": message, "type": kind, "param": error.parameter, "code": error.code}}
    headers = {"content-type": JSON_TYPE, **error.headers}
    if status == 503:
        headers["retry-after"] = "1"
    return Reply(status, json.dumps(document, ensure_ascii=False).encode("utf-8"), headers)
