"""Extractive question answering: the stretch of a context that answers a question.

Contexts of any length are read in overlapping windows. The rules are those of transformers 4's question-answering
pipeline (transformers 5 has none). Not here: writing answers in words of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError, InvalidTextError, TextTooLongError
from qingyu.runtime.batching import ItemBatcher, Prepared, weakly, windows
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.memory import Plan
from qingyu.runtime.scores import softmax
from qingyu.runtime.selfcheck import CheckedEngine
from qingyu.runtime.spec import ModelSpec, Task
from qingyu.runtime.task import TextModel
from qingyu.runtime.tokenizer import TokenizedText, Tokenizer

__all__ = ["Answer", "QuestionAnswerer"]

MAX_TOKENS = 384  # of one window, and their overlap: the defaults of transformers' pipeline
OVERLAP = 128


@dataclass(frozen=True)
class Answer:
    """The characters ``[start:end]`` of the context, and the probability of that stretch.

    An answer that stands at several places, or in two overlapping windows, is named once, at the first; its
    probabilities are added up, as in transformers' pipeline, and may come to more than 1. Of "no answer", ``text``
    is empty and ``start`` and ``end`` are 0.
    """

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class _Row:
    """One window: its ids and types, where the context begins among them, and which context tokens it holds."""

    ids: Ids
    types: Ids
    before: int
    first: int
    count: int


class _Context(NamedTuple):
    text: str
    tokenized: TokenizedText


_Ready: TypeAlias = Prepared[_Row, Floats, list[tuple[Answer, ...]]]


class QuestionAnswerer(TextModel):
    """Finds answers in contexts with one model; thread-safe, fork-safe, and a context manager.

    Open one with ``QuestionAnswerer.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "question-answering"

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        super().__init__(folder, spec, tokenizer, engine, steps)
        self._batcher: ItemBatcher[_Row, Floats] = ItemBatcher(
            workers=self._workers, token_budget=steps.token_budget, run=weakly(self._run)
        )

    def answer(
        self,
        question: str,
        context: str,
        *,
        top_k: int = 1,
        max_answer_tokens: int = 15,
        allow_none: bool = False,
    ) -> tuple[Answer, ...]:
        """The ``top_k`` likeliest answers, best first; ``allow_none`` lets "no answer" be one of them.

        ``max_answer_tokens`` bounds an answer's length. An answer covers whole words. Fewer answers where the context
        is short, none for an empty one. Raises ``InvalidTextError``, ``InvalidOptionError``, and
        ``TextTooLongError`` for a question that leaves no room for the context.
        """
        answers = self.answer_stream(
            [(question, context)], top_k=top_k, max_answer_tokens=max_answer_tokens, allow_none=allow_none
        )
        return next(answers)

    def answer_stream(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        top_k: int = 1,
        max_answer_tokens: int = 15,
        allow_none: bool = False,
    ) -> Iterator[tuple[Answer, ...]]:
        """The same for (question, context) pairs, any number of them, in their order."""
        _check_counts(top_k=top_k, max_answer_tokens=max_answer_tokens)

        def prepared() -> Iterator[tuple[_Ready, Sequence[_Row]]]:
            done = 0
            for window in windows(pairs, self.plan.window):
                ready = self.prepare(
                    window,
                    top_k=top_k,
                    max_answer_tokens=max_answer_tokens,
                    allow_none=allow_none,
                    first=done,
                )
                done += len(window)
                yield ready, ready.rows

        for ready, logits in self._batcher.run_windows(prepared()):
            yield from ready.finish(logits)

    def prepare(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        top_k: int = 1,
        max_answer_tokens: int = 15,
        allow_none: bool = False,
        first: int = 0,
    ) -> _Ready:
        """What ``answer`` runs for these pairs, to be run by somebody else: a scheduler, which mixes callers.

        Options and errors as for ``answer``; errors count pairs from ``first``.
        """
        _check_counts(top_k=top_k, max_answer_tokens=max_answer_tokens)
        found = [self._rows(pair, first + n) for n, pair in enumerate(pairs)]

        def finish(logits: Sequence[Floats]) -> list[tuple[Answer, ...]]:
            values = iter(logits)
            return [
                _best(
                    context,
                    [(row, next(values)) for row in rows],
                    top_k,
                    max_answer_tokens,
                    allow_none=allow_none,
                )
                for context, rows in found
            ]

        return Prepared([row for _, rows in found for row in rows], finish)

    def _rows(self, pair: tuple[str, str], number: int) -> tuple[_Context, list[_Row]]:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidTextError(
                f"pair {number} is no pair",
                expected="a tuple of a question and a context",
                found=type(pair).__name__,
                remedy="Pass (question, context).",
            )
        template = self._tokenizer.pair_template
        question = self._tokenizer.content(pair[0], name=f"question {number}")
        context = self._tokenizer.whole(pair[1], name=f"context {number}")
        most = min(self.spec.max_tokens, MAX_TOKENS)
        room = most - template.added - len(question)
        if room < 2:
            raise TextTooLongError(
                f"question {number} is too long",
                expected=f"room for the context within {most} tokens",
                found=f"{len(question)} tokens",
                remedy="Shorten the question.",
            )
        overlap = min(OVERLAP, most // 2)
        step = room - (overlap if overlap < room else room // 2)
        rows = []
        for first in range(0, max(1, len(context.ids)), step):
            own = context.ids[first : first + room]
            ids, types = template.join(question, own)
            before = len(template.before) + len(question) + len(template.between)
            rows.append(_Row(ids, types, before, first, len(own)))
            if first + room >= len(context.ids):
                break
        return _Context(pair[1], context), rows

    def _run(self, rows: Sequence[_Row]) -> list[Floats]:
        batch = TokenBatch.pad(
            [row.ids for row in rows], self._tokenizer.pad_id, types=[row.types for row in rows]
        )
        logits = self._engine.run(batch, ("token_logits",))[0]
        return [own[: len(row.ids)] for own, row in zip(logits, rows, strict=True)]


def _check_counts(*, top_k: int, max_answer_tokens: int) -> None:
    for option, value in (("top_k", top_k), ("max_answer_tokens", max_answer_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidOptionError(option, expected="at least 1", found=repr(value), remedy="Raise it.")


def _best(
    context: _Context,
    windows_: Sequence[tuple[_Row, Floats]],
    top_k: int,
    longest: int,
    *,
    allow_none: bool,
) -> tuple[Answer, ...]:
    # As the pipeline does: an answer found twice, in two windows or places, counts by the sum of its scores.
    answers: dict[str, Answer] = {}
    none = 1.0
    for row, logits in windows_:
        starts, ends = _probabilities(row, logits)
        none = min(none, float(starts[0] * ends[0]))
        for first, last, score in _spans(starts[1:], ends[1:], 2 * top_k + 10, longest):
            start, end = _characters(context.tokenized, row.first + first, row.first + last)
            text = context.text[start:end]
            same = answers.get(text.lower(), Answer(text, 0.0, start, end))
            answers[text.lower()] = dataclasses.replace(same, score=same.score + score)
    found = list(answers.values())
    if allow_none:
        found.append(Answer("", none, 0, 0))
    return tuple(sorted(found, key=lambda answer: -answer.score)[:top_k])


def _probabilities(row: _Row, logits: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the first token, which stands for no answer, and of each context token: to be the first, to be the last."""
    kept = [0, *range(row.before, row.before + row.count)]
    starts, ends = softmax(np.ascontiguousarray(logits[kept].T))
    return starts, ends


def _spans(
    starts: NDArray[np.float64], ends: NDArray[np.float64], top_k: int, longest: int
) -> list[tuple[int, int, float]]:
    """The likeliest (first token, last token, probability), both (tokens,) among the context's tokens."""
    table = np.tril(np.triu(np.outer(starts, ends)), longest - 1)
    order = np.argsort(-table, axis=None, kind="stable")[:top_k]
    spans = [(*divmod(int(place), max(1, len(ends))), float(table.flat[place])) for place in order]
    return [span for span in spans if span[2] > 0]


def _characters(tokenized: TokenizedText, first: int, last: int) -> tuple[int, int]:
    """The characters of tokens ``first`` to ``last``, and of the rest of the words that these are pieces of."""
    while first > 0 and tokenized.tokens[first].startswith("##"):
        first -= 1
    while last + 1 < len(tokenized.tokens) and tokenized.tokens[last + 1].startswith("##"):
        last += 1
    return tokenized.offsets[first][0], tokenized.offsets[last][1]
