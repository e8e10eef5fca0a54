"""How far a quantized encoder has drifted from FP32 after each of its layers.

Each figure holds the error of all layers up to it, since a layer's input already carries that of the ones
before. Not here: the error of one layer with an exact input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qingyu.errors import GraphError, MismatchError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.external_data import refuse_external_data
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    import_onnxruntime,
    product_entries,
    session_options,
    typed,
)

if TYPE_CHECKING:
    from qingyu.models.export.graph import LinearWriter

__all__ = ["LayerError", "graph_with_hidden_states", "layer_errors", "single_batches"]

PREFIX = "hidden_state_"


@dataclass(frozen=True)
class LayerError:
    """The states after ``layer`` (0: the embedding), over all tokens that are no padding.

    ``relative_error`` is the Euclidean norm of the difference divided by that of the FP32 states;
    ``cosine_mean`` and ``cosine_minimum`` are of the two states of a token.
    """

    layer: int
    relative_error: float
    cosine_mean: float
    cosine_minimum: float


def graph_with_hidden_states(
    path: Path, linear: LinearWriter[Any] | None = None, *, domains: tuple[str, ...] = ()
) -> bytes:
    """The FP32 graph at ``path`` written again with its hidden states as outputs, for ``layer_errors``.

    ``linear`` is how linear layers are computed, ``None`` for FP32; ``domains`` the operator sets it needs.
    Raises ``GraphError`` when ``path`` is not a graph that ``qingyu export`` wrote.
    """
    from qingyu.models.export.graph import FloatLinear, read_plan, read_weights, write_graph

    plan = dataclasses.replace(read_plan(path), hidden_states=True)
    return write_graph(plan, read_weights(path), linear or FloatLinear(), domains=domains)


def single_batches(embedder: Embedder, texts: Sequence[str]) -> Iterator[TokenBatch]:
    """Each text as a batch of its own, so that no vector depends on a neighbour and nothing is padded."""
    for text in texts:
        yield TokenBatch.pad([np.asarray(embedder.tokenize(text).ids, dtype=np.int64)], pad_id=0)


def layer_errors(
    reference_graph: bytes, candidate_graph: bytes, batches: Iterable[TokenBatch], *, threads: int = 1
) -> list[LayerError]:
    """The error after each layer, the embedding first, of one graph against another on the same tokens.

    Both graphs give ``hidden_state_0`` ... ``hidden_state_<layers>``, float32 (rows, tokens, hidden), from
    ``input_ids`` and ``attention_mask``. Without a batch the result is empty. Raises ``GraphError`` for a graph
    that cannot be run or has no hidden states, ``MismatchError`` for graphs of different depth or width.
    """
    sessions = (_session(reference_graph, "FP32", threads), _session(candidate_graph, "candidate", threads))
    names = _shared_names(sessions)
    sums = [_Sums() for _ in names]
    for batch in batches:
        wanted, found = (_states(session, names, batch) for session in sessions)
        for layer, states in enumerate(zip(wanted, found, strict=True)):
            sums[layer].add(*(state[batch.mask == 1] for state in states))
    return [total.error(layer) for layer, total in enumerate(sums) if total.tokens]


class _Sums:
    """What is added up over batches for one layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squares = self.difference = self.cosines = 0.0
        self.minimum = 1.0

    def add(self, wanted: Floats, found: Floats) -> None:
        """Count the states (tokens, hidden) of one batch."""
        if wanted.shape != found.shape:
            raise _mismatch(f"states of {wanted.shape[-1]} values", f"{found.shape[-1]}")
        a, b = wanted.astype(np.float64), found.astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = np.einsum("nd,nd->n", a, b) / np.maximum(lengths, 1e-30)
        self.tokens += len(a)
        self.squares += float(np.square(a).sum())
        self.difference += float(np.square(a - b).sum())
        self.cosines += float(cosines.sum())
        self.minimum = min(self.minimum, float(cosines.min(initial=1.0)))

    def error(self, layer: int) -> LayerError:
        """The figures over all that was added."""
        relative = (self.difference / max(self.squares, 1e-30)) ** 0.5
        return LayerError(layer, relative, min(1.0, self.cosines / self.tokens), self.minimum)


def _session(data: bytes, name: str, threads: int) -> Any:  # noqa: ANN401 - onnxruntime's class
    def load() -> Any:  # noqa: ANN401
        onnxruntime = import_onnxruntime()
        return onnxruntime.InferenceSession(
            data,
            session_options(onnxruntime, threads=threads, entries=product_entries("int8")),
            providers=list(PROVIDERS),
            disabled_optimizers=list(SLOW_FUSIONS),
            enable_fallback=0,
        )

    refuse_external_data(data, f"the {name} graph")
    return typed(f"loading the {name} graph", load)


def _states(session: Any, names: Sequence[str], batch: TokenBatch) -> list[Floats]:  # noqa: ANN401
    def run() -> list[Floats]:
        states: list[Floats] = session.run(names, {"input_ids": batch.ids, "attention_mask": batch.mask})
        return states

    return typed("measuring layers", run)


def _shared_names(sessions: Sequence[Any]) -> list[str]:
    """The hidden states that both graphs give, in order."""
    given = [[output.name for output in session.get_outputs()] for session in sessions]
    found = [[f"{PREFIX}{n}" for n in range(len(names)) if f"{PREFIX}{n}" in names] for names in given]
    if not found[0] or not found[1]:
        raise GraphError(
            "a graph has no hidden states",
            expected=f"outputs {PREFIX}0, {PREFIX}1, ...",
            found="none",
            remedy="Write it with graph_with_hidden_states().",
        )
    if found[0] != found[1]:
        raise _mismatch(f"{len(found[0])} hidden states", str(len(found[1])))
    return found[0]


def _mismatch(expected: str, found: str) -> MismatchError:
    return MismatchError(
        "graphs are not of the same model",
        expected=expected,
        found=found,
        remedy="Write both from one model.",
    )
