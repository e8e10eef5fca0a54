"""JSON requests for embeddings and their answers: the form of OpenAI's API and that of text-embeddings-inference.

What arrives is untrusted: it is read strictly, within limits, and refused in the words of the API that was asked.
Every function takes and gives plain values, so that a server and a serverless handler give the same answers.

Not here: routing, and how bytes arrive (``qingyu.runtime.serverless``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from qingyu.runtime.engine import Floats

__all__ = [
    "EmbeddingRequest",
    "Limits",
    "Reply",
    "RequestError",
    "embeddings_openai",
    "embeddings_tei",
    "parse_json",
    "read_openai",
    "read_tei",
]

JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. ``reply_bytes`` is what the platform lets a function give back."""

    body_bytes: int = 2_000_000
    texts: int = 512
    reply_bytes: int = 6_000_000


@dataclass(frozen=True)
class EmbeddingRequest:
    """What is to be embedded, and how; ``None`` is the model's own way."""

    texts: tuple[str, ...]
    prompt: str | None = None
    dim: int | None = None
    normalize: bool | None = None
    long_text: Literal["truncate", "error"] = "truncate"
    encoding: Literal["float", "base64"] = "float"


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; names of headers are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class RequestError(Exception):
    """A request that gets no answer but a refusal: a ``code`` for programs, and a message for people.

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
    """The object that a body holds; ``RequestError`` for anything but one object in strict JSON and UTF-8.

    >>> parse_json(b'{"input": "a"}')
    {'input': 'a'}
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        # Not the parser's own words where they quote the body.
        raise RequestError("invalid_json", f"the body is not JSON in UTF-8: {_defect(error)}") from None
    if not isinstance(value, dict):
        raise RequestError("invalid_json", f"the body holds {_kind(value)} instead of a JSON object")
    return value


def read_openai(document: Mapping[str, Any], limits: Limits) -> EmbeddingRequest:
    """The request of ``POST /v1/embeddings``; ``RequestError`` names the field that is wrong.

    Fields: ``input``, ``model`` (any: a function has one), ``dimensions``, ``encoding_format``, ``user``; and
    ``prompt`` and ``truncate``, which are ours.
    """
    _only(document, ("input", "model", "dimensions", "encoding_format", "user", "prompt", "truncate"))
    for name in ("model", "user"):
        _optional(document, name, str, "a string")
    encoding = document.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        _refuse("encoding_format", "'float' or 'base64'", encoding)
    return EmbeddingRequest(
        texts=_texts(document, "input", limits),
        prompt=_optional(document, "prompt", str, "a string"),
        dim=_optional(document, "dimensions", int, "a whole number"),
        long_text="truncate" if _flag(document, "truncate", default=True) else "error",
        encoding=encoding,
    )


def read_tei(document: Mapping[str, Any], limits: Limits) -> EmbeddingRequest:
    """The request of ``POST /embed`` as text-embeddings-inference defines it; ``RequestError`` names the wrong field.

    Fields: ``inputs``, ``normalize``, ``truncate``, ``truncation_direction`` ("right" only), ``prompt_name``,
    ``dimensions`` and ``model``. A text over the model's limit is refused unless ``truncate`` is true, as there.
    """
    known = ("inputs", "normalize", "truncate", "truncation_direction", "prompt_name", "dimensions", "model")
    _only(document, known)
    direction = document.get("truncation_direction", "right")
    if not isinstance(direction, str) or direction.lower() != "right":
        _refuse("truncation_direction", "'right'", direction)
    return EmbeddingRequest(
        texts=_texts(document, "inputs", limits),
        prompt=_optional(document, "prompt_name", str, "a string"),
        dim=_optional(document, "dimensions", int, "a whole number"),
        normalize=_flag(document, "normalize", default=True),
        long_text="truncate" if _flag(document, "truncate", default=False) else "error",
    )


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


def _texts(document: Mapping[str, Any], name: str, limits: Limits) -> tuple[str, ...]:
    value = document.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        _refuse(name, "a string or a list of strings", value)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            _refuse(f"{name}[{place}]", "a string", text)
    if not texts:
        raise RequestError("empty_input", f"{name}: expected at least one text, found none", parameter=name)
    if len(texts) > limits.texts:
        message = f"{name}: expected at most {limits.texts} texts, found {len(texts)}"
        raise RequestError("too_many_inputs", message, parameter=name)
    return tuple(texts)


def _optional(document: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:  # noqa: ANN401 - JSON
    value = document.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        _refuse(name, expected, value)
    return value


def _flag(document: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = document.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)
    return value


def _only(document: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in document:
        if name not in known:
            shown = name if len(name) <= 40 else name[:37] + "..."
            message = f"unknown field {shown!r}: expected fields among {', '.join(known)}"
            raise RequestError("invalid_request", message, parameter=shown)


def _refuse(name: str, expected: str, found: object) -> NoReturn:
    raise RequestError(
        "invalid_request", f"{name}: expected {expected}, found {_kind(found)}", parameter=name
    )


def _kind(value: object) -> str:
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
