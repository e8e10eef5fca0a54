"""What classifying and reranking share: texts and pairs of texts to the scores of a head on the first token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidTextError
from qingyu.runtime.batching import ItemBatcher, Prepared, weakly, windows
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.memory import Plan
from qingyu.runtime.scores import SCORES
from qingyu.runtime.selfcheck import CheckedEngine
from qingyu.runtime.spec import ModelSpec
from qingyu.runtime.task import Report, TextModel
from qingyu.runtime.tokenizer import EncodedPair, Tokenizer

__all__ = ["SequenceModel", "TextOrPair"]

TextOrPair: TypeAlias = str | tuple[str, str]  # a text, or a text and another
Doubles = NDArray[np.float64]
_Ready: TypeAlias = Prepared[EncodedPair, Floats, list[Doubles]]


class SequenceModel(TextModel):
    """A model whose graph gives ``logits`` (rows, labels); its subclasses say what they mean."""

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        super().__init__(folder, spec, tokenizer, engine, steps)
        self._batcher: ItemBatcher[EncodedPair, Floats] = ItemBatcher(
            workers=self._workers, token_budget=steps.token_budget, run=weakly(self._run)
        )

    def _scored(
        self, texts: Iterable[TextOrPair], report: Report
    ) -> Iterator[tuple[list[TextOrPair], list[Doubles]]]:
        """Windows of texts, each with its scores float64 (labels,)."""

        def prepared() -> Iterator[tuple[tuple[list[TextOrPair], _Ready], Sequence[EncodedPair]]]:
            for window in windows(texts, self.plan.window):
                ready = self.prepare(window, report=report)
                yield (window, ready), ready.rows

        for (window, ready), logits in self._batcher.run_windows(prepared()):
            yield window, ready.finish(logits)

    def prepare(
        self, texts: Sequence[TextOrPair], *, raw: bool = False, report: Report | None = None
    ) -> _Ready:
        """The rows of texts and pairs, and the scores (labels,) of their logits; ``raw`` leaves those as they are.

        For whoever runs rows of many callers together. Raises ``InvalidTextError``.
        """
        counted = Report() if report is None else report
        rows = [self._encode(text, counted.texts + n) for n, text in enumerate(texts)]
        counted.add(rows)
        score = SCORES["none" if raw else self.spec.scores]

        def finish(logits: Sequence[Floats]) -> list[Doubles]:
            return list(score(np.asarray(logits, dtype=np.float32))) if len(logits) else []

        return Prepared(rows, finish)

    def _encode(self, text: TextOrPair, number: int) -> EncodedPair:
        if isinstance(text, tuple):
            if len(text) != 2:
                raise InvalidTextError(
                    f"text {number} is no pair",
                    expected="a str, or a tuple of two",
                    found=f"a tuple of {len(text)}",
                    remedy="Pass (text, other text).",
                )
            return self._tokenizer.encode_pairs([text], first=number)[0]
        alone = self._tokenizer.encode([text], first=number)[0]
        types = np.zeros_like(alone.ids)
        return EncodedPair(alone.ids, types, alone.unknown, alone.truncated, alone.dropped)

    def _run(self, rows: Sequence[EncodedPair]) -> Sequence[Floats]:
        batch = TokenBatch.pad(
            [row.ids for row in rows], self._tokenizer.pad_id, types=[row.types for row in rows]
        )
        logits: Sequence[Floats] = self._engine.run(batch, ("logits",))[0]  # type: ignore[assignment] # one a row
        return logits
