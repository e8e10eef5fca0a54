"""Bytes of requests and answers, for the HTTP server and serverless functions alike: JSON in, replies out.

What arrives is untrusted: it is read strictly, and refused without being quoted. Not here: what a request may ask
(``bodies``), what a refusal is to a client (``statuses``), routing, and how bytes arrive (``serve``, ``serverless``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from qingyu.runtime.engine import Floats

__all__ = [
    "RefusedError",
    "Reply",
    "check_type",
    "embeddings_openai",
    "embeddings_tei",
    "kind_of",
    "no_model",
    "parse_json",
]

JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; names of headers are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class RefusedError(Exception):
    """A request that gets no answer but a refusal: a ``code`` of ``statuses`` for programs, a message for people.

    ``parameter`` names the field at fault.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.parameter = parameter
        self.headers = headers or {}


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds; ``RefusedError`` for anything but one object in strict JSON and UTF-8.

    >>> parse_json(b'{"input": "a"}')
    {'input': 'a'}
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        # Not the parser's own words where they quote the body.
        raise RefusedError("invalid_json", f"the body is not JSON in UTF-8: {_defect(error)}") from None
    if not isinstance(value, dict):
        raise RefusedError("invalid_json", f"the body holds {kind_of(value)} instead of a JSON object")
    return value


def no_model(name: str, known: Iterable[str]) -> RefusedError:
    """The refusal of a model's name; of a long one only the beginning is said."""
    shown = name if len(name) <= 60 else name[:57] + "..."
    return RefusedError(
        "model_not_found", f"no model {shown!r}: expected one of {', '.join(known)}", parameter="model"
    )


def check_type(content_type: str, encoding: str = "") -> None:
    """Raise ``RefusedError`` but for JSON, declared as such and not compressed.

    Declared: a web page of elsewhere cannot send that without being allowed to.
    """
    if content_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise RefusedError("unsupported_media_type", "expected the header Content-Type: application/json")
    if encoding.strip().lower() not in ("", "identity"):
        raise RefusedError("unsupported_media_type", "expected a body that is not compressed")


def embeddings_openai(
    vectors: Floats, *, model: str, fingerprint: str, tokens: int, encoding: Literal["float", "base64"]
) -> bytes:
    """The body of an answer to ``/v1/embeddings``; base64 is of little-endian float32, as the clients expect."""
    rows = _base64(vectors) if encoding == "base64" else _decimals(vectors)
    data = ",".join(
        f'{{"object":"embedding","index":{number},"embedding":{row}}}' for number, row in enumerate(rows)
    )
    usage = f'{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}'
    text = f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"fingerprint":"{fingerprint}",'
    text += f'"usage":{usage}}}'
    return text.encode("ascii")


def embeddings_tei(vectors: Floats) -> bytes:
    """The body of an answer to ``/embed``: a list of numbers for each text."""
    return f"[{','.join(_decimals(vectors))}]".encode("ascii")


def _decimals(vectors: Floats) -> list[str]:
    """JSON arrays of decimals that read back to the same float32.

    Nine digits are always enough for that, and twice as fast as looking for the least that are.
    """
    row = f"[{','.join(['%.9g'] * vectors.shape[1])}]"
    return [row % tuple(values) for values in vectors.tolist()]


def _base64(vectors: Floats) -> list[str]:
    return [f'"{base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")}"' for row in vectors]


def kind_of(value: object) -> str:
    """What a JSON value is, without what it says: it may be of any length, and private."""
    kinds = {str: "a string", bool: "a truth value", list: "a list", dict: "an object", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise _DefectError("a key that occurs twice")
    return document


def _no_number(name: str) -> NoReturn:
    raise _DefectError("NaN or infinity")


class _DefectError(ValueError):
    """A defect that JSON allows and we do not. Never leaves this module."""


def _defect(error: Exception) -> str:
    if isinstance(error, _DefectError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number of too many digits"
