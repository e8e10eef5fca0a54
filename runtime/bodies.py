"""What may be asked: the fields of every request body, which read themselves and describe themselves.

One table serves the HTTP server, serverless functions and the OpenAPI document, so that none says what another does
not. ``null`` is the same as leaving a field out. Nothing that is refused is quoted: it may be of any length, and
private.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qingyu.runtime.wire import RefusedError, kind_of

__all__ = ["BODIES", "EmbeddingRequest", "Field", "Inputs", "embedding_of", "read_body", "schema_of"]

Schema = dict[str, Any]
MISSING = object()


class Kind(Protocol):
    """What a field holds."""

    def read(self, name: str, value: Any, most: int) -> Any:  # noqa: ANN401 - JSON values
        """The value as the handlers take it; ``RefusedError`` if it is none."""
        ...

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        ...


@dataclass(frozen=True)
class Text:
    """A string."""

    def read(self, name: str, value: Any, most: int) -> str:  # noqa: ANN401
        """The string."""
        if not isinstance(value, str):
            raise refused(name, "a string", value)
        return value

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        return {"type": "string"}


@dataclass(frozen=True)
class Texts:
    """A list of strings; ``or_one`` also takes a string alone, as a list of one."""

    or_one: bool = True

    def read(self, name: str, value: Any, most: int) -> tuple[str, ...]:  # noqa: ANN401
        """The strings."""
        if self.or_one and isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise refused(
                name, "a string or a list of strings" if self.or_one else "a list of strings", value
            )
        _check_count(name, value, most)
        for number, text in enumerate(value):
            if not isinstance(text, str):
                hint = (
                    "; token ids are not taken, send the text"
                    if _is_number(text) or isinstance(text, list)
                    else ""
                )
                raise refused(f"{name}[{number}]", "a string", text, hint)
        return tuple(value)

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        several = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": most}
        return {"oneOf": [{"type": "string"}, several]} if self.or_one else several


@dataclass(frozen=True)
class Inputs:
    """What is classified: a text; a list of one, or of two that are a pair; or a list of such lists.

    Read as (several, items): whether an answer for each is a list of its own, and the texts and pairs.
    """

    def read(self, name: str, value: Any, most: int) -> tuple[bool, list[str | tuple[str, str]]]:  # noqa: ANN401
        """Whether there are several, and each of them."""
        if isinstance(value, str):
            return False, [value]
        if not isinstance(value, list):
            raise refused(name, "a string, a list of one or two strings, or a list of such lists", value)
        if not value:
            raise RefusedError("empty_input", f"{name}: expected a text, found none", parameter=name)
        if not isinstance(value[0], list):
            return False, [self._one(name, value)]
        _check_count(name, value, most)
        return True, [self._one(f"{name}[{number}]", one) for number, one in enumerate(value)]

    def _one(self, name: str, value: Any) -> str | tuple[str, str]:  # noqa: ANN401
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise refused(name, "a list of one or two strings", value)
        if len(value) not in (1, 2):
            raise RefusedError(
                "invalid_request", f"{name}: expected one or two strings, found {len(value)}", parameter=name
            )
        return value[0] if len(value) == 1 else (value[0], value[1])

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        one = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2}
        several = {"type": "array", "items": one, "minItems": 1, "maxItems": most}
        return {"oneOf": [{"type": "string"}, one, several]}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, name: str, value: Any, most: int) -> bool:  # noqa: ANN401
        """The truth value."""
        if not isinstance(value, bool):
            raise refused(name, "true or false", value)
        return value

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``."""

    least: int
    most: int

    def read(self, name: str, value: Any, most: int) -> int:  # noqa: ANN401
        """The number."""
        # JSON knows one kind of number: 1.0 is whole.
        whole = _is_number(value) and value == value // 1 if abs(_size(value)) < 1 << 31 else False
        if not whole or not self.least <= value <= self.most:
            raise refused(name, f"a whole number from {self.least} to {self.most}", value)
        return int(value)

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Choice:
    """One of some strings."""

    values: tuple[str, ...]

    def read(self, name: str, value: Any, most: int) -> str:  # noqa: ANN401
        """The string."""
        if not isinstance(value, str) or value not in self.values:
            raise refused(name, " or ".join(map(repr, self.values)), value)
        return value

    def schema(self, most: int) -> Schema:
        """Its JSON schema."""
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Field:
    """One field of a body; without a ``default`` it must be there."""

    name: str
    kind: Kind
    about: str
    default: Any = MISSING


MODEL = Field("model", Text(), "a served model's name; by default the first that fits the route", None)
TRUNCATE_RIGHT = Field(
    "truncation_direction", Choice(("Right", "right")), "texts are cut at their end only", "Right"
)
DIMENSIONS = Field(
    "dimensions", Whole(1, 1 << 16), "the first values only, for models trained for it; then normalized", None
)
TRUNCATE = Field("truncate", Flag(), "read only the beginning of a longer text, or refuse it", False)
RAW = Field("raw_scores", Flag(), "the model's own numbers instead of scores", False)
PROMPT = Field("prompt_name", Text(), "a prompt of the model (query, passage), or a text to put first", None)
TOP_K = Field("top_k", Whole(1, 1000), "how many", 5)

BODIES: Mapping[str, tuple[Field, ...]] = {
    "/v1/embeddings": (
        Field("input", Texts(), "a text, or texts"),
        MODEL,
        Field("encoding_format", Choice(("float", "base64")), "base64 is of little-endian float32", "float"),
        DIMENSIONS,
        Field("user", Text(), "not looked at", None),
        Field("prompt", Text(), "a prompt of the model (query, passage), or a text to put first", None),
        Field("truncate", Flag(), "read only the beginning of a longer text, or refuse it", True),
    ),
    "/embed": (
        Field("inputs", Texts(), "a text, or texts"),
        Field("normalize", Flag(), "vectors of length 1", True),
        TRUNCATE,
        TRUNCATE_RIGHT,
        PROMPT,
        DIMENSIONS,
        MODEL,
    ),
    "/embed_all": (
        Field("inputs", Texts(), "a text, or texts"),
        TRUNCATE,
        TRUNCATE_RIGHT,
        PROMPT,
        MODEL,
    ),
    "/rerank": (
        Field("query", Text(), "what the texts are to fit"),
        Field("texts", Texts(or_one=False), "the texts to sort"),
        RAW,
        Field("return_text", Flag(), "the texts again in the answer", False),
        TRUNCATE,
        TRUNCATE_RIGHT,
        MODEL,
    ),
    "/predict": (
        Field("inputs", Inputs(), "a text, a pair as a list of two, or a list of lists of one or two texts"),
        RAW,
        TRUNCATE,
        TRUNCATE_RIGHT,
        MODEL,
    ),
    "/tokenize": (
        Field("inputs", Texts(), "a text, or texts"),
        Field("add_special_tokens", Flag(), "with the tokens that the model puts around a text", True),
        PROMPT,
        MODEL,
    ),
    "/fill-mask": (
        Field("inputs", Texts(), "a text with masks, or texts"),
        TOP_K,
        Field("candidates", Texts(or_one=False), "words to choose from instead of the vocabulary", None),
        MODEL,
    ),
    "/tag": (Field("inputs", Texts(), "a text, or texts"), MODEL),
    "/answer": (
        Field("question", Text(), "what is asked"),
        Field("context", Text(), "where the answer stands"),
        Field("top_k", Whole(1, 100), "how many", 1),
        Field("allow_none", Flag(), "no answer may be the answer", False),
        MODEL,
    ),
}


def read_body(path: str, document: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The fields of a body, defaults put in; ``most`` is how many inputs it may have."""
    fields = BODIES[path]
    for name in document:
        if all(name != field.name for field in fields):
            shown = name if len(name) <= 40 else name[:37] + "..."
            known = ", ".join(field.name for field in fields)
            raise RefusedError(
                "invalid_request",
                f"unknown field {shown!r}: expected fields among {known}",
                parameter=shown,
            )
    found = {}
    for field in fields:
        value = document.get(field.name)
        if value is not None:
            found[field.name] = field.kind.read(field.name, value, most)
        elif field.default is MISSING:
            raise refused(field.name, "a value", None)
        else:
            found[field.name] = field.default
    return found


@dataclass(frozen=True)
class EmbeddingRequest:
    """What is to be embedded, and how; ``None`` is the model's own way, and any model."""

    texts: tuple[str, ...]
    model: str | None = None
    prompt: str | None = None
    dim: int | None = None
    normalize: bool | None = None
    long_text: Literal["truncate", "error"] = "truncate"
    encoding: Literal["float", "base64"] = "float"


# What the two forms call texts and prompt.
EMBEDDING_NAMES: Mapping[str, tuple[str, str]] = {
    "/v1/embeddings": ("input", "prompt"),
    "/embed": ("inputs", "prompt_name"),
}


def embedding_of(path: str, asked: Mapping[str, Any]) -> EmbeddingRequest:
    """What the fields of a body, as ``read_body`` gives them, ask for in either form."""
    texts, prompt = EMBEDDING_NAMES[path]
    return EmbeddingRequest(
        texts=asked[texts],
        model=asked["model"],
        prompt=asked[prompt],
        dim=asked["dimensions"],
        normalize=asked.get("normalize"),
        long_text="truncate" if asked["truncate"] else "error",
        encoding=asked.get("encoding_format", "float"),
    )


def schema_of(fields: Sequence[Field], most: int) -> Schema:
    """The JSON schema of a body."""
    properties: dict[str, Schema] = {}
    for field in fields:
        own = field.kind.schema(most)
        if field.default is not MISSING:
            own = {"anyOf": [own, {"type": "null"}]}
            if field.default is not None:
                own["default"] = field.default
        properties[field.name] = {**own, "description": field.about}
    return {
        "type": "object",
        "properties": properties,
        "required": [field.name for field in fields if field.default is MISSING],
        "additionalProperties": False,
    }


def refused(name: str, expected: str, found: object, hint: str = "") -> RefusedError:
    """The refusal of a value, named by its kind only."""
    return RefusedError(
        "invalid_request", f"{name}: expected {expected}, found {kind_of(found)}{hint}", parameter=name
    )


def _check_count(name: str, values: list[Any], most: int) -> None:
    if not values:
        raise RefusedError("empty_input", f"{name}: expected at least one text, found none", parameter=name)
    if len(values) > most:
        raise RefusedError(
            "too_many_inputs", f"{name}: expected at most {most} texts, found {len(values)}", parameter=name
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(value: Any) -> float:  # noqa: ANN401
    """A number's size, infinite for what is none or is too large to be compared."""
    try:
        return float(value) if _is_number(value) else float("inf")
    except OverflowError:
        return float("inf")
