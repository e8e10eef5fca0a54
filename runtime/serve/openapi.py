"""The OpenAPI document: written from the tables that requests are read and refused by."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from qingyu import __version__
from qingyu.runtime.bodies import BODIES, schema_of
from qingyu.runtime.serve.routes import ROUTES, Route
from qingyu.runtime.statuses import STATUSES, status_number

__all__ = ["document", "refusals_of"]

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


VECTOR = _list(NUMBER)
OPENAI_MODEL = _object(id=STRING, object=STRING, created=WHOLE, owned_by=STRING)
LABEL = _object(label=STRING, score=NUMBER)
STATUS = _object(status=STRING)

ANSWERS: Mapping[str, Schema] = {
    "/v1/embeddings": _object(
        object={"const": "list"},
        data=_list(
            _object(object={"const": "embedding"}, index=WHOLE, embedding={"oneOf": [VECTOR, STRING]})
        ),
        model=STRING,
        usage=_object(prompt_tokens=WHOLE, total_tokens=WHOLE),
        fingerprint=STRING,
    ),
    "/v1/models": _object(object={"const": "list"}, data=_list(OPENAI_MODEL)),
    "/v1/models/{model}": OPENAI_MODEL,
    "/embed": _list(VECTOR),
    "/embed_all": _list(_list(VECTOR)),
    "/rerank": _list(_object(("text",), index=WHOLE, score=NUMBER, text=STRING)),
    "/predict": {"oneOf": [_list(LABEL), _list(_list(LABEL))]},
    "/tokenize": _list(
        _list(_object(id=WHOLE, text=STRING, special={"type": "boolean"}, start=WHOLE, stop=WHOLE))
    ),
    "/fill-mask": _list(
        _object(text=STRING, masks=_list(_list(_object(token=STRING, id=WHOLE, score=NUMBER, text=STRING))))
    ),
    "/tag": _list(
        _object(
            text=STRING,
            entities=_list(_object(label=STRING, score=NUMBER, start=WHOLE, end=WHOLE, text=STRING)),
        )
    ),
    "/answer": _list(_object(text=STRING, score=NUMBER, start=WHOLE, end=WHOLE)),
    "/info": _object(model_id=STRING, version=STRING, models=_list({"type": "object"})),
    "/live": STATUS,
    "/ready": STATUS,
    "/health": STATUS,
    "/stats": {"type": "object"},
    "/openapi.json": {"type": "object"},
}

ERRORS: Mapping[str, Schema] = {
    "openai": _object(
        error=_object(
            message=STRING,
            type=STRING,
            param={"type": ["string", "null"]},
            code=STRING,
        )
    ),
    "tei": _object(error=STRING, error_type=STRING),
}

# What any request may be answered with, and any with a body.
ALWAYS = ("bad_request", "headers_too_large", "request_timeout", "too_many_connections", "internal")
WITH_BODY = ("invalid_json", "invalid_request", "unsupported_media_type", "body_too_large")


def refusals_of(route: Route, *, keys: bool) -> tuple[str, ...]:
    """Every code that a route may be refused with."""
    return (
        *route.refusals,
        *(WITH_BODY if route.method == "POST" else ()),
        *(("unauthorized",) if keys and route.key else ()),
        *(() if route.any_host else ("wrong_host",)),
        *ALWAYS,
    )


def document(*, max_inputs: int, keys: bool) -> Schema:
    """The whole document, OpenAPI 3.1."""
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, max_inputs, keys)
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "qingyu",
            "version": __version__,
            "description": "Chinese BERT-family models on ordinary CPUs, in the forms of OpenAI's API and of "
            "text-embeddings-inference.",
        },
        "paths": paths,
        "components": {"schemas": {f"{style}_error": schema for style, schema in ERRORS.items()}},
    }
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(route: Route, max_inputs: int, keys: bool) -> Schema:
    answers: dict[str, Schema] = {"200": _good(route)}
    for code in refusals_of(route, keys=keys):
        number = str(status_number(code, route.style))
        known = answers.setdefault(number, _bad(route, number))
        known["description"] += f"\n- `{code}`: {STATUSES[code].meaning}"
        if STATUSES[code].retry:
            about = "seconds after which to try again"
            known["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": about}}
    operation: Schema = {
        "summary": route.summary,
        "operationId": (route.method + route.path)
        .replace("/", "_")
        .replace("{", "")
        .replace("}", "")
        .lower(),
        "responses": dict(sorted(answers.items())),
    }
    if route.path in BODIES:
        schema = schema_of(BODIES[route.path], max_inputs)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": STRING}]
    if keys and route.key:
        operation["security"] = [{"key": []}]
    return operation


def _good(route: Route) -> Schema:
    content = {route.media: {"schema": ANSWERS[route.path]} if route.path in ANSWERS else {}}
    return {"description": route.summary, "content": content}


def _bad(route: Route, number: str) -> Schema:
    schema = {"$ref": f"#/components/schemas/{route.style}_error"}
    return {
        "description": http.HTTPStatus(int(number)).phrase + ":",
        "content": {"application/json": {"schema": schema}},
    }
