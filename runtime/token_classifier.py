"""Token classification: entities in a text, with the characters that they span.

Labels with a prefix are grouped: B, I (or M), E (or L) and S (or U), as in BIO, BIOES, BMES and BILOU. Not here:
training such a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.batching import ItemBatcher, Prepared, weakly, windows
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.memory import Plan
from qingyu.runtime.scores import softmax
from qingyu.runtime.selfcheck import CheckedEngine
from qingyu.runtime.spec import ModelSpec, Task
from qingyu.runtime.task import Report, TextModel, TokenRow, listed
from qingyu.runtime.tokenizer import TokenizedText, Tokenizer

__all__ = ["Entity", "Tagged", "TaggedToken", "TokenClassifier", "grouped"]

OUTSIDE = "O"
BEGINS, GOES_ON, ENDS = "BSU", "IMEL", "ESLU"


@dataclass(frozen=True)
class TaggedToken:
    """A token, its likeliest label with its probability, and the characters ``[start:end]`` that it is from."""

    token: str
    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Entity:
    """A stretch of text, ``[start:end]`` of it, of one kind; ``score`` is the mean probability of its tokens."""

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Tagged:
    """A text, the entities in it, and its tokens, special ones left out."""

    text: str
    entities: tuple[Entity, ...]
    tokens: tuple[TaggedToken, ...]


_Ready: TypeAlias = Prepared[TokenRow, NDArray[np.float64], list[Tagged]]


class TokenClassifier(TextModel):
    """Finds entities in texts with one model; thread-safe, fork-safe, and a context manager.

    Open one with ``TokenClassifier.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "tagging"

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        super().__init__(folder, spec, tokenizer, engine, steps)
        self._batcher: ItemBatcher[TokenRow, NDArray[np.float64]] = ItemBatcher(
            workers=self._workers, token_budget=steps.token_budget, run=weakly(self._run)
        )

    def tag(self, texts: str | Iterable[str], *, report: Report | None = None) -> list[Tagged]:
        """The entities of each text; those of transformers' pipeline with aggregation_strategy="simple" for BIO.

        A text longer than the model reads is tagged up to there, and counted in ``report``. Raises
        ``InvalidTextError``.
        """
        return list(self.tag_stream(listed(texts), report=report))

    def tag_stream(self, texts: Iterable[str], *, report: Report | None = None) -> Iterator[Tagged]:
        """The same for an iterable of any length, in bounded memory."""
        counted = Report() if report is None else report

        def prepared() -> Iterator[tuple[_Ready, Sequence[TokenRow]]]:
            for window in windows(texts, self.plan.window):
                ready = self.prepare(window, report=counted)
                yield ready, ready.rows

        for ready, scores in self._batcher.run_windows(prepared()):
            yield from ready.finish(scores)
        counted.warn()

    def prepare(self, texts: Sequence[str], *, report: Report | None = None) -> _Ready:
        """What ``tag`` runs for these texts, to be run by somebody else: a scheduler, which mixes callers.

        Raises ``InvalidTextError``; gives no warning of unknown tokens.
        """
        counted = Report() if report is None else report
        rows = [self._token_row(text, counted) for text in texts]

        def finish(scores: Sequence[NDArray[np.float64]]) -> list[Tagged]:
            return [self._tagged(text, row, own) for text, row, own in zip(texts, rows, scores, strict=True)]

        return Prepared(rows, finish)

    def _tagged(self, text: str, row: TokenRow, scores: NDArray[np.float64]) -> Tagged:
        tokens = tuple(_tokens(row.tokenized, scores, self.spec.labels))
        return Tagged(text, tuple(grouped(text, tokens)), tokens)

    def _run(self, rows: Sequence[TokenRow]) -> list[NDArray[np.float64]]:
        batch = TokenBatch.pad([row.ids for row in rows], self._tokenizer.pad_id)
        logits = self._engine.run(batch, ("token_logits",))[0]
        return [softmax(own[: len(row.ids)]) for own, row in zip(logits, rows, strict=True)]


def _tokens(
    tokenized: TokenizedText, scores: NDArray[np.float64], labels: Sequence[str]
) -> Iterator[TaggedToken]:
    best = scores.argmax(axis=1)
    for n, (token, (start, end), special) in enumerate(
        zip(tokenized.tokens, tokenized.offsets, tokenized.special, strict=True)
    ):
        if not special:
            yield TaggedToken(token, labels[best[n]], float(scores[n, best[n]]), start, end)


def grouped(text: str, tokens: Iterable[TaggedToken]) -> Iterator[Entity]:
    """Entities from the labels of consecutive tokens; labels without a prefix go on while they stay the same.

    >>> where = [("北", "B-LOC"), ("京", "I-LOC"), ("人", "O")]
    >>> tokens = [TaggedToken(t, label, 1.0, n, n + 1) for n, (t, label) in enumerate(where)]
    >>> [(entity.label, entity.text) for entity in grouped("北京人", tokens)]
    [('LOC', '北京')]
    """
    group: list[TaggedToken] = []
    kind, ended = OUTSIDE, False
    for token in tokens:
        prefix, own = _parsed(token.label)
        if group and (ended or own != kind or prefix in BEGINS):
            yield _entity(text, kind, group)
            group = []
        kind, ended = own, prefix in ENDS
        if own != OUTSIDE:
            group.append(token)
    if group:
        yield _entity(text, kind, group)


def _parsed(label: str) -> tuple[str, str]:
    """The prefix, "I" where there is none, and the kind of entity."""
    if len(label) > 2 and label[1] in "-_" and label[0] in BEGINS + GOES_ON:
        return label[0], label[2:]
    return "I", label


def _entity(text: str, kind: str, group: Sequence[TaggedToken]) -> Entity:
    start, end = group[0].start, group[-1].end
    score = sum(token.score for token in group) / len(group)
    return Entity(kind, score, start, end, text[start:end])
