"""The routes of a serverless function, whatever platform calls it: method, path, headers and body in, a reply out.

``/v1/embeddings`` and ``/embed`` (POST), ``/v1/models``, ``/info`` and ``/health`` (GET). Platforms put stages and
function names before a path, so a path counts by its end. Nothing here is drawn at random or opened when the module
is imported, so that a snapshot of the process can be restored many times (AWS SnapStart).

Not here: what events look like (``events``), and the one app of a process (``handlers``).
"""

from __future__ import annotations

import hmac
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qingyu.errors import InputError, InvalidOptionError, QingyuError
from qingyu.runtime import wire
from qingyu.runtime.bodies import EmbeddingRequest, embedding_of, read_body
from qingyu.runtime.engine import Floats
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.statuses import Style, refusal_of, reply_of
from qingyu.runtime.wire import RefusedError, Reply, check_type, no_model, parse_json

if TYPE_CHECKING:
    from qingyu.runtime.embedder import Embedder

__all__ = ["App", "Limits", "Request", "Settings"]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. ``reply_bytes`` is what the platform lets a function give back."""

    body_bytes: int = 2_000_000
    texts: int = 512
    reply_bytes: int = 6_000_000


@dataclass(frozen=True)
class Request:
    """An HTTP request; ``headers`` have names in lower case, ``body`` is decoded."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Settings:
    """What the environment says of a function.

    ``QINGYU_MODEL`` is a model folder (default: the model in the package; ``qingyu bundle-app`` sets its own),
    ``QINGYU_MAX_TEXTS`` the most texts of a request, ``QINGYU_MAX_MEMORY_MB`` as ``max_memory_mb`` of
    ``Embedder.open``, and ``QINGYU_API_KEY`` what callers must send as a bearer token, where it is set.
    """

    model: str
    limits: Limits = field(default_factory=Limits)
    max_memory_mb: int | None = None
    api_key: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """The settings of an environment; ``InvalidOptionError`` for a number that is none."""
        from qingyu.runtime.task import BUNDLED

        texts = _number(environment, "QINGYU_MAX_TEXTS")
        return cls(
            model=environment.get("QINGYU_MODEL") or BUNDLED,
            limits=Limits() if texts is None else Limits(texts=texts),
            max_memory_mb=_number(environment, "QINGYU_MAX_MEMORY_MB"),
            api_key=environment.get("QINGYU_API_KEY") or None,
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:10]) > 0 and len(text) < 10):
        raise InvalidOptionError(
            f"environment variable {name}",
            expected="a whole number above 0",
            found=repr(text),
            remedy="Set it so.",
        )
    return int(text)


class App:
    """Answers requests with one model, which the first of them opens (or ``prepare``); thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._embedder: Embedder | None = None

    @property
    def body_limit(self) -> int:
        """The most bytes that a request may have."""
        return self._settings.limits.body_bytes

    def prepare(self) -> None:
        """Open the model and check the machine now: while a sandbox starts it has a full CPU, and may be saved.

        Raises nothing: what is wrong is logged, and tried again, and answered, at each request.
        """
        try:
            self._model()
        except QingyuError as error:
            print(f"qingyu: {error}", file=sys.stderr)  # noqa: T201 - the platforms' log

    def reply(self, request: Request) -> Reply:
        """The answer to a request; of an error too, in the form of the API that was asked. Raises nothing of ours."""
        route = _route(request.path)
        style: Style = "openai" if route is not None and route.startswith("/v1/") else "tei"
        try:
            return self._answer(request, route)
        except RefusedError as wrong:
            return reply_of(wrong, style)
        except QingyuError as error:
            if not isinstance(error, InputError):
                print(f"qingyu: {error}", file=sys.stderr)  # noqa: T201 - the platforms' log
            return reply_of(refusal_of(error), style)

    def _answer(self, request: Request, route: str | None) -> Reply:
        if route is None:
            raise RefusedError("not_found", f"no such path: expected one of {', '.join(ROUTES)}")
        method, needs_key, answer = ROUTES[route]
        if request.method.upper() != method and (request.method.upper(), method) != ("HEAD", "GET"):
            raise RefusedError("method_not_allowed", f"{route} takes {method}", headers={"allow": method})
        if needs_key:
            self._check_key(request.headers.get("authorization", ""))
        reply = answer(self, request)
        if len(reply.body) > self._settings.limits.reply_bytes:
            most = self._settings.limits.reply_bytes
            raise RefusedError(
                "too_many_inputs",
                f"the answer would take {len(reply.body)} bytes of {most}: send fewer texts",
            )
        return reply

    def _check_key(self, sent: str) -> None:
        key = self._settings.api_key
        # In constant time, and of bytes: strings that are not ASCII would be refused by an exception.
        if key is not None and not hmac.compare_digest(_octets(sent), _octets(f"Bearer {key}")):
            raise RefusedError(
                "unauthorized",
                "expected the API key as a bearer token",
                headers={"www-authenticate": "Bearer"},
            )

    def _model(self) -> Embedder:
        with self._lock:
            if self._embedder is None:
                from qingyu.runtime.embedder import Embedder

                embedder = Embedder.open(
                    self._settings.model, profile="edge", max_memory_mb=self._settings.max_memory_mb
                )
                embedder.load()  # a model that fails the self-check is not kept
                self._embedder = embedder
            return self._embedder

    def _openai(self, request: Request) -> Reply:
        asked, vectors, tokens, space = self._embedded("/v1/embeddings", request)
        name = self._model().spec.name
        body = wire.embeddings_openai(
            vectors, model=name, fingerprint=space, tokens=tokens, encoding=asked.encoding
        )
        return _json(body, space)

    def _tei(self, request: Request) -> Reply:
        _, vectors, _, space = self._embedded("/embed", request)
        return _json(wire.embeddings_tei(vectors), space)

    def _embedded(self, path: str, request: Request) -> tuple[EmbeddingRequest, Floats, int, str]:
        """What was asked, its vectors, how many tokens they took, and the fingerprint of their space."""
        from qingyu.runtime.task import Report

        limits = self._settings.limits
        check_type(
            request.headers.get("content-type", ""), request.headers.get("content-encoding", "identity")
        )
        if len(request.body) > limits.body_bytes:
            raise RefusedError("body_too_large", f"expected a body of at most {limits.body_bytes} bytes")
        asked = embedding_of(path, read_body(path, parse_json(request.body), limits.texts))
        model, report = self._model(), Report()
        if asked.model not in (None, model.spec.name):
            raise no_model(asked.model, [model.spec.name])
        space: dict[str, Any] = {"prompt": asked.prompt, "dim": asked.dim, "normalize": asked.normalize}
        vectors = model.embed(asked.texts, long_text=asked.long_text, report=report, **space)
        return asked, vectors, report.tokens, fingerprint(model.spec, **space)

    def _models(self, request: Request) -> Reply:
        name = self._model().spec.name
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "qingyu"}
        return _json(_bytes({"object": "list", "data": [entry]}))

    def _info(self, request: Request) -> Reply:
        from qingyu import __version__

        spec, limits = self._model().spec, self._settings.limits
        return _json(
            _bytes(
                {
                    "model_id": spec.name,
                    "model_sha256": spec.files[spec.graph].sha256,
                    "fingerprint": fingerprint(spec),
                    "precision": spec.precision,
                    "dimensions": spec.dim,
                    "pooling": spec.pooling,
                    "max_input_length": spec.max_tokens,
                    "max_client_batch_size": limits.texts,
                    "payload_limit": limits.body_bytes,
                    "version": __version__,
                }
            )
        )

    def _health(self, request: Request) -> Reply:
        self._model()  # a model that cannot be opened is answered by its error
        return _json(_bytes({"status": "ok"}))


# Path: its method, whether it needs the key where there is one, and the method that answers.
ROUTES: Mapping[str, tuple[str, bool, Callable[[App, Request], Reply]]] = {
    "/v1/embeddings": ("POST", True, App._openai),
    "/v1/models": ("GET", True, App._models),
    "/embed": ("POST", True, App._tei),
    "/info": ("GET", True, App._info),
    "/health": ("GET", False, App._health),
}


def _route(path: str) -> str | None:
    clean = path.rstrip("/")
    return next((route for route in ROUTES if clean.endswith(route)), None)


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json(body: bytes, space: str | None = None) -> Reply:
    headers = {"content-type": wire.JSON_TYPE}
    if space is not None:
        headers["x-qingyu-fingerprint"] = space
    return Reply(200, body, headers)


def _bytes(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8")
