"""Every route: one table, from which requests are answered and the OpenAPI document is written.

A handler takes the fields that ``bodies`` has read, and gives the bytes of the answer. The forms are those of OpenAI's
API and of text-embeddings-inference; ``/fill-mask``, ``/tag`` and ``/answer`` are ours.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import resources
from typing import Any

import numpy as np
import orjson

from qingyu import __version__
from qingyu.errors import TextTooLongError
from qingyu.runtime.batching import Prepared
from qingyu.runtime.bodies import EmbeddingRequest, embedding_of
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.fill_mask import FillMask
from qingyu.runtime.question_answerer import QuestionAnswerer
from qingyu.runtime.scheduler import Timing
from qingyu.runtime.sequences import SequenceModel
from qingyu.runtime.serve.service import Served, Service
from qingyu.runtime.spec import Task
from qingyu.runtime.statuses import Style
from qingyu.runtime.task import Report
from qingyu.runtime.token_classifier import TokenClassifier
from qingyu.runtime.wire import RefusedError

__all__ = ["ROUTES", "Call", "Route"]


@dataclass
class Call:
    """What became of one request: for the log, the metrics and the answer's headers."""

    id: str
    model: str = ""
    fingerprint: str = ""
    report: Report = field(default_factory=Report)
    timing: Timing = field(default_factory=Timing)


Answer = Callable[[Service, Mapping[str, Any], Call], Awaitable[bytes]]


@dataclass(frozen=True)
class Route:
    """A path: ``answer`` for its method, the tasks of models that it is for, and what may go wrong beside the usual."""

    method: str
    path: str
    summary: str
    answer: Answer
    tasks: tuple[Task, ...] = ()
    style: Style = "tei"
    runs: bool = False  # a model: the route is refused when too much waits
    key: bool = True  # is asked for, where there are keys
    any_host: bool = False  # may be asked by any name and address: it tells nothing, and probes use their own
    media: str = "application/json"
    refusals: tuple[str, ...] = ()


EMBEDDING: tuple[Task, ...] = ("embedding",)
SCORING: tuple[Task, ...] = ("classification", "reranking")
ANY: tuple[Task, ...] = (
    "embedding",
    "fill-mask",
    "classification",
    "tagging",
    "question-answering",
    "reranking",
)


async def openai_embeddings(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Vectors in the form of OpenAI's API."""
    request = embedding_of("/v1/embeddings", asked)
    served, vectors = await _embedded(service, request, call)
    if request.encoding == "base64":
        rows: Sequence[Any] = [
            base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors
        ]
    else:
        rows = list(vectors)
    data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
    tokens = call.report.tokens
    return _json(
        {
            "object": "list",
            "data": data,
            "model": served.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "fingerprint": call.fingerprint,
        }
    )


async def tei_embed(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Vectors in the form of text-embeddings-inference."""
    _, vectors = await _embedded(service, embedding_of("/embed", asked), call)
    return _json(list(vectors))


async def tei_embed_all(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """The states of every token."""
    with _using(service, asked["model"], EMBEDDING, call) as served:
        if served.states is None:
            raise RefusedError("model_not_found", f"{served.name} does not give the states of its tokens")
        model = served.model
        assert isinstance(model, Embedder)
        ready = await _prepared(
            service,
            asked["inputs"],
            partial(
                model.prepare,
                asked["inputs"],
                prompt=asked["prompt_name"],
                long_text="truncate" if asked["truncate"] else "error",
                report=call.report,
            ),
        )
        states = await service.run_states(served, Prepared(ready.rows, list), call.timing)
        return _json([list(one) for one in states])


async def tei_rerank(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Texts sorted by how well they fit a query."""
    texts = asked["texts"]
    pairs = [(asked["query"], text) for text in texts]
    _, scores = await _scored(service, asked, pairs, call, ("reranking",))
    order = sorted(range(len(texts)), key=lambda n: -scores[n][0])
    rows = [{"index": n, "score": float(scores[n][0])} for n in order]
    if asked["return_text"]:
        rows = [{**row, "text": texts[row["index"]]} for row in rows]
    return _json(rows)


async def tei_predict(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Labels, best first."""
    several, items = asked["inputs"]
    served, scores = await _scored(service, asked, items, call, SCORING)
    rows = [
        [
            {"label": served.model.spec.labels[n], "score": float(own[n])}
            for n in np.argsort(-own, kind="stable")
        ]
        for own in scores
    ]
    return _json(rows if several else rows[0])


async def tei_tokenize(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """What the model reads of texts."""
    with _using(service, asked["model"], ANY, call) as served:
        model, prompt = served.model, asked["prompt_name"]
        if prompt is not None and not isinstance(model, Embedder):
            raise RefusedError(
                "invalid_request", f"prompt_name: {served.name} has no prompts", parameter="prompt_name"
            )
        read = partial(model.tokenize, prompt=prompt) if isinstance(model, Embedder) else model.tokenize
        found = await service.prepare(
            _characters(asked["inputs"]), lambda: [read(text) for text in asked["inputs"]]
        )
        rows = [
            [
                {"id": number, "text": token, "special": special, "start": start, "stop": stop}
                for number, token, special, (start, stop) in zip(
                    one.ids, one.tokens, one.special, one.offsets, strict=True
                )
                if asked["add_special_tokens"] or not special
            ]
            for one in found
        ]
        return _json(rows)


async def fill_mask(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Words for masks."""
    with _using(service, asked["model"], ("fill-mask",), call) as served:
        model = served.model
        assert isinstance(model, FillMask)
        prepare = partial(
            model.prepare,
            asked["inputs"],
            top_k=asked["top_k"],
            candidates=asked["candidates"],
            report=call.report,
        )
        ready = await _prepared(service, asked["inputs"], prepare)
        return _json([dataclasses.asdict(one) for one in await service.run(served, ready, call.timing)])


async def tag(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """Entities in texts."""
    with _using(service, asked["model"], ("tagging",), call) as served:
        model = served.model
        assert isinstance(model, TokenClassifier)
        ready = await _prepared(
            service, asked["inputs"], partial(model.prepare, asked["inputs"], report=call.report)
        )
        tagged = await service.run(served, ready, call.timing)
        return _json(
            [{"text": one.text, "entities": [dataclasses.asdict(e) for e in one.entities]} for one in tagged]
        )


async def answer(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """The stretch of a context that answers a question."""
    with _using(service, asked["model"], ("question-answering",), call) as served:
        model = served.model
        assert isinstance(model, QuestionAnswerer)
        pair = (asked["question"], asked["context"])
        ready = await _prepared(
            service,
            pair,
            partial(model.prepare, [pair], top_k=asked["top_k"], allow_none=asked["allow_none"]),
        )
        call.report.texts += 1
        call.report.tokens += sum(len(row.ids) for row in ready.rows)
        answers = await service.run(served, ready, call.timing)
        return _json([dataclasses.asdict(one) for one in answers[0]])


async def models(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """The models in the form of OpenAI's API."""
    return _json({"object": "list", "data": [_model(one) for one in _ready(service)]})


async def model(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """One model in the form of OpenAI's API."""
    return _json(_model(service.find(asked["model"], ANY)))


async def info(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """What is served, and within which limits."""
    found = _ready(service)
    spec, limits = found[0].model.running_spec, service.configuration
    return _json(
        {
            "model_id": found[0].name,
            "model_sha": spec.files[spec.graph].sha256,
            "model_dtype": spec.precision,
            "model_type": {spec.task: {"pooling": spec.pooling} if spec.task == "embedding" else {}},
            "max_input_length": spec.max_tokens,
            "max_batch_tokens": found[0].model.plan.token_budget,
            "max_client_batch_size": limits.max_inputs,
            "payload_limit": limits.max_body,
            "max_wait_seconds": limits.max_wait,
            "version": __version__,
            "models": [_described(one) for one in found],
        }
    )


async def live(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """That the process answers."""
    return _json({"status": "live"})


async def ready(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """That models can be used."""
    _ready(service)
    return _json({"status": "ready"})


async def stats(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """What the page shows."""
    found = {**service.telemetry.stats(), "models": [_described(one) for one in service.models]}
    return _json(found)


async def metrics(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """All metrics, in the text format of Prometheus."""
    return service.telemetry.exposition()


async def openapi(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """The OpenAPI document."""
    return _openapi_of(service.configuration.max_inputs, service.configuration.keyed)


@lru_cache(maxsize=8)
def _openapi_of(max_inputs: int, keyed: bool) -> bytes:
    """Made once: nobody needs a key to ask for it, and making it anew would keep the loop from everybody else."""
    from qingyu.runtime.serve.openapi import document  # which reads this table

    return _json(document(max_inputs=max_inputs, keys=keyed))


async def page(service: Service, asked: Mapping[str, Any], call: Call) -> bytes:
    """The page to try models on: one file, which loads nothing from elsewhere."""
    return _page()


@lru_cache(maxsize=1)
def _page() -> bytes:
    return resources.files("qingyu.runtime.serve").joinpath("page.html").read_bytes()


class _using:  # noqa: N801 - used as a statement
    """Within the block the model stays open, and the call knows it."""

    def __init__(self, service: Service, name: str | None, tasks: tuple[Task, ...], call: Call) -> None:
        self._service = service
        self._served = service.find(name, tasks)
        call.model = self._served.name
        call.fingerprint = self._served.fingerprint()

    def __enter__(self) -> Served:
        self._served.users += 1
        return self._served

    def __exit__(self, *error: object) -> None:
        self._service.leave(self._served)


async def _embedded(service: Service, request: EmbeddingRequest, call: Call) -> tuple[Served, Floats]:
    with _using(service, request.model, EMBEDDING, call) as served:
        model = served.model
        assert isinstance(model, Embedder)
        space: dict[str, Any] = {"prompt": request.prompt, "dim": request.dim, "normalize": request.normalize}
        prepare = partial(
            model.prepare, request.texts, long_text=request.long_text, report=call.report, **space
        )
        ready = await _prepared(service, request.texts, prepare)
        call.fingerprint = served.fingerprint(**space)
        return served, await service.run(served, ready, call.timing)


async def _scored(
    service: Service,
    asked: Mapping[str, Any],
    items: Sequence[str | tuple[str, str]],
    call: Call,
    tasks: tuple[Task, ...],
) -> tuple[Served, Sequence[Any]]:
    with _using(service, asked["model"], tasks, call) as served:
        model = served.model
        assert isinstance(model, SequenceModel)
        texts = [text for item in items for text in ((item,) if isinstance(item, str) else item)]
        ready = await _prepared(
            service, texts, partial(model.prepare, items, raw=asked["raw_scores"], report=call.report)
        )
        if call.report.truncated and not asked["truncate"]:
            raise TextTooLongError(
                f"{call.report.truncated} of {len(items)} inputs are too long",
                expected=f"at most {model.spec.max_tokens} tokens",
                found="more",
                remedy='Shorten them, or send "truncate": true to have only their beginnings read.',
            )
        return served, await service.run(served, ready, call.timing)


async def _prepared(service: Service, texts: Sequence[str], prepare: Callable[[], Any]) -> Any:  # noqa: ANN401
    return await service.prepare(_characters(texts), prepare)


def _characters(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def _ready(service: Service) -> Sequence[Served]:
    if not service.ready:
        code = "draining" if service.draining else "not_ready"
        raise RefusedError(code, "the server is ending" if service.draining else "models are being loaded")
    return service.models


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "qingyu"}


def _described(served: Served) -> dict[str, Any]:
    spec = served.model.running_spec
    found: dict[str, Any] = {
        "name": served.name,
        "model": spec.name,
        "task": spec.task,
        "precision": spec.precision,
        "sha256": spec.files[spec.graph].sha256,
        "max_input_length": spec.max_tokens,
        "fingerprint": served.fingerprint(),
    }
    if spec.task == "embedding":
        found |= {"dimensions": spec.dim, "pooling": spec.pooling, "prompts": sorted(spec.prompts)}
    if isinstance(served.model, FillMask):
        found["mask_token"] = served.model.mask_token
    if spec.labels:
        found["labels"] = list(spec.labels)
    return found


def _json(document: object) -> bytes:
    """JSON; arrays of float32 in the fewest digits that read back the same. Never NaN: the engine refuses it."""
    return orjson.dumps(document, default=_listed, option=orjson.OPT_SERIALIZE_NUMPY)


def _listed(value: object) -> object:
    if isinstance(value, np.ndarray):  # one that is not contiguous
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


RUNNING = (
    "empty_input",
    "too_many_inputs",
    "invalid_text",
    "model_not_found",
    "overloaded",
    "model_failed",
    "out_of_memory",
    "out_of_threads",
    "not_ready",
    "draining",
)
CUTTING = (*RUNNING, "text_too_long")

ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/embeddings",
        "Vectors of texts, as OpenAI's API gives them",
        openai_embeddings,
        EMBEDDING,
        style="openai",
        runs=True,
        refusals=CUTTING,
    ),
    Route(
        "GET",
        "/v1/models",
        "The models",
        models,
        style="openai",
        refusals=("not_ready", "draining"),
    ),
    Route(
        "GET",
        "/v1/models/{model}",
        "One model",
        model,
        style="openai",
        refusals=("model_not_found", "not_ready", "draining"),
    ),
    Route("POST", "/embed", "Vectors of texts", tei_embed, EMBEDDING, runs=True, refusals=CUTTING),
    Route(
        "POST",
        "/embed_all",
        "A vector for each token of texts",
        tei_embed_all,
        EMBEDDING,
        runs=True,
        refusals=CUTTING,
    ),
    Route(
        "POST",
        "/rerank",
        "Texts sorted by how well they fit a query",
        tei_rerank,
        ("reranking",),
        runs=True,
        refusals=CUTTING,
    ),
    Route(
        "POST",
        "/predict",
        "Labels of texts or pairs, best first",
        tei_predict,
        SCORING,
        runs=True,
        refusals=CUTTING,
    ),
    Route(
        "POST",
        "/tokenize",
        "What a model reads of texts",
        tei_tokenize,
        ANY,
        refusals=(
            "empty_input",
            "too_many_inputs",
            "invalid_text",
            "model_not_found",
            "not_ready",
            "draining",
        ),
    ),
    Route(
        "POST",
        "/fill-mask",
        "Words for the masks in texts",
        fill_mask,
        ("fill-mask",),
        runs=True,
        refusals=CUTTING,
    ),
    Route("POST", "/tag", "Entities in texts", tag, ("tagging",), runs=True, refusals=RUNNING),
    Route(
        "POST",
        "/answer",
        "The part of a context that answers a question",
        answer,
        ("question-answering",),
        runs=True,
        refusals=CUTTING,
    ),
    Route(
        "GET", "/info", "What is served, and within which limits", info, refusals=("not_ready", "draining")
    ),
    Route("GET", "/", "A page to try the models on", page, key=False, media="text/html; charset=utf-8"),
    Route("GET", "/stats", "Queue, speed and memory now, for the page", stats),
    Route(
        "GET", "/metrics", "Metrics for Prometheus", metrics, media="text/plain; version=0.0.4; charset=utf-8"
    ),
    Route("GET", "/openapi.json", "This document", openapi, key=False),
    Route("GET", "/live", "Whether the process answers", live, key=False, any_host=True),
    Route(
        "GET",
        "/ready",
        "Whether models can be used",
        ready,
        key=False,
        any_host=True,
        refusals=("not_ready", "draining"),
    ),
    Route(
        "GET",
        "/health",
        "The same as /ready, by the name that text-embeddings-inference has for it",
        ready,
        key=False,
        any_host=True,
        refusals=("not_ready", "draining"),
    ),
)
