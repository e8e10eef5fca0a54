"""What a model holds between its layers: vectors of tokens with their characters, of any layers, pooled or not.

For a folder that was exported with ``--hidden-states``. Layer 0 is the embeddings, layer n the output of the n-th
encoder layer, -1 the last, as in transformers' ``hidden_states``. Not here: the model's own sentence vectors, which
``Embedder`` gives and which cost less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from qingyu.errors import InvalidOptionError, UnsupportedModelError
from qingyu.runtime.batching import ItemBatcher
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.spec import ModelSpec, Task
from qingyu.runtime.task import Report, TextModel, TokenRow, listed
from qingyu.runtime.vectors import unit

__all__ = ["Combine", "HiddenStates", "StatePooling", "TokenStates"]

Combine = Literal["mean", "concatenate"]
StatePooling = Literal["cls", "mean", "max", "weighted_mean"]


@dataclass(frozen=True, eq=False)
class TokenStates:
    """A text, its tokens, and a vector for each: ``vectors`` float32 (tokens, dim).

    ``offsets[n]`` are the characters ``[start:end]`` of the text that token n was made from, (0, 0) for special tokens
    and a prompt's; ``special`` marks the tokens that were put around the text.
    """

    text: str
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    vectors: Floats
    truncated: bool


class HiddenStates(TextModel):
    """Gives the states of a model's layers; thread-safe, fork-safe, and a context manager.

    Open one with ``HiddenStates.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "embedding"

    @classmethod
    def _check(cls, folder: Path, spec: ModelSpec) -> None:
        super()._check(folder, spec)
        if "hidden_state_0" not in spec.outputs:
            raise UnsupportedModelError(
                f"{folder} does not give its hidden states",
                expected="a graph with the outputs hidden_state_0 and so on",
                found=", ".join(spec.outputs),
                remedy="Export the checkpoint with --hidden-states.",
            )

    @property
    def layers(self) -> int:
        """How many encoder layers there are; states are those of layer 0 to this one."""
        return self.spec.architecture.layers

    def tokens(
        self,
        texts: str | Iterable[str],
        *,
        layers: Sequence[int] = (-1,),
        combine: Combine = "mean",
        report: Report | None = None,
    ) -> list[TokenStates]:
        """The tokens of each text with a vector for each, of the mean of ``layers`` or of all of them side by side.

        ``combine="concatenate"`` gives ``len(layers)`` times as many values, in the order of ``layers``. No prompt
        is added. A text longer than the model reads ends there, with ``truncated``. Raises ``InvalidTextError``, and
        ``InvalidOptionError`` for layers that the model does not have.
        """
        return list(
            self._stream(
                listed(texts), self._names(layers), _combiner(combine), Report() if report is None else report
            )
        )

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        layers: Sequence[int] = (-1,),
        combine: Combine = "mean",
        pooling: StatePooling = "mean",
        normalize: bool = False,
        report: Report | None = None,
    ) -> Floats:
        """A vector for each text, float32 (n, dim): its tokens' states of ``layers`` combined, then pooled.

        Special tokens are pooled, too, as sentence-transformers does; "weighted_mean" weighs the n-th token n
        (Muennighoff 2022). Otherwise as ``tokens``.
        """
        if pooling not in POOLINGS:
            raise InvalidOptionError(
                "pooling", expected=", ".join(POOLINGS), found=repr(pooling), remedy="Use one of them."
            )
        names, combiner = self._names(layers), _combiner(combine)
        counted = Report() if report is None else report
        pooled = [
            POOLINGS[pooling](one.vectors) for one in self._stream(listed(texts), names, combiner, counted)
        ]
        width = self.spec.architecture.hidden_size * (len(names) if combine == "concatenate" else 1)
        vectors = np.stack(pooled) if pooled else np.empty((0, width), dtype=np.float32)
        return unit(vectors) if normalize else vectors

    def _names(self, layers: Sequence[int]) -> tuple[str, ...]:
        count = self.layers + 1
        if not layers or not all(-count <= layer < count for layer in layers):
            raise InvalidOptionError(
                "layers",
                expected=f"numbers from {-count} to {count - 1}",
                found=repr(tuple(layers)),
                remedy="0 is the embeddings, -1 the last layer.",
            )
        return tuple(f"hidden_state_{layer % count}" for layer in layers)

    def _stream(
        self,
        texts: Sequence[str],
        names: tuple[str, ...],
        combiner: Callable[[Sequence[Floats]], Floats],
        report: Report,
    ) -> Iterator[TokenStates]:
        batcher: ItemBatcher[TokenRow, Floats] = ItemBatcher(
            workers=self._workers,
            token_budget=self.plan.token_budget,
            run=partial(self._run, names, combiner),
        )

        for (window, rows), states in batcher.run_windows(self._token_windows(texts, report)):
            for text, row, vectors in zip(window, rows, states, strict=True):
                own = row.tokenized
                yield TokenStates(text, own.tokens, own.offsets, own.special, vectors, own.truncated)
        report.warn()

    def _run(
        self, names: tuple[str, ...], combiner: Callable[[Sequence[Floats]], Floats], rows: Sequence[TokenRow]
    ) -> list[Floats]:
        batch = TokenBatch.pad([row.ids for row in rows], self._tokenizer.pad_id)
        wanted = tuple(dict.fromkeys(names))
        states = dict(zip(wanted, self._engine.run(batch, wanted), strict=True))
        combined = combiner([states[name] for name in names])
        # A copy, since a view would keep the whole micro-batch alive.
        return [own[: len(row.ids)].copy() for own, row in zip(combined, rows, strict=True)]


def _mean_of(states: Sequence[Floats]) -> Floats:
    mean: Floats = np.mean(np.stack(states), axis=0, dtype=np.float32)
    return mean


def _side_by_side(states: Sequence[Floats]) -> Floats:
    joined: Floats = np.concatenate(states, axis=-1)
    return joined


COMBINERS: Mapping[str, Callable[[Sequence[Floats]], Floats]] = {
    "mean": _mean_of,
    "concatenate": _side_by_side,
}


def _combiner(combine: str) -> Callable[[Sequence[Floats]], Floats]:
    if combine not in COMBINERS:
        raise InvalidOptionError(
            "combine", expected=", ".join(COMBINERS), found=repr(combine), remedy="Use one of them."
        )
    return COMBINERS[combine]


def _cls(vectors: Floats) -> Floats:
    first: Floats = vectors[0]
    return first


def _mean(vectors: Floats) -> Floats:
    mean: Floats = vectors.mean(axis=0, dtype=np.float32)
    return mean


def _max(vectors: Floats) -> Floats:
    highest: Floats = vectors.max(axis=0)
    return highest


def _weighted_mean(vectors: Floats) -> Floats:
    weights = np.arange(1, len(vectors) + 1, dtype=np.float32)
    mean: Floats = (weights @ vectors / weights.sum()).astype(np.float32)
    return mean


POOLINGS: Mapping[str, Callable[[Floats], Floats]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "weighted_mean": _weighted_mean,
}
