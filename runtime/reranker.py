"""Reranking with a cross-encoder: how well each document answers a query, both read together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError
from qingyu.runtime.sequences import SequenceModel
from qingyu.runtime.spec import Task
from qingyu.runtime.task import Report, listed

__all__ = ["Ranked", "Reranker"]


@dataclass(frozen=True)
class Ranked:
    """A document: its place in the list that was passed, its score, and its text."""

    index: int
    score: float
    text: str


class Reranker(SequenceModel):
    """Sorts documents by how well they fit a query; thread-safe, fork-safe, and a context manager.

    Open one with ``Reranker.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "reranking"

    def rank(
        self, query: str, documents: Iterable[str], *, top_k: int | None = None, report: Report | None = None
    ) -> list[Ranked]:
        """The documents, best first, or the best ``top_k``; equal ones in the order given.

        Scores are those of sentence-transformers' CrossEncoder: between 0 and 1, unless the checkpoint says that the
        graph's own numbers are meant. Raises ``InvalidTextError``.
        """
        if top_k is not None and top_k < 1:
            raise InvalidOptionError(
                "top_k", expected="at least 1", found=repr(top_k), remedy="Leave it out for all documents."
            )
        texts = listed(documents)
        scores = self.score(((query, text) for text in texts), report=report).tolist()
        ranked = [Ranked(n, score, text) for n, (text, score) in enumerate(zip(texts, scores, strict=True))]
        return sorted(ranked, key=lambda one: -one.score)[:top_k]

    def score(self, pairs: Iterable[tuple[str, str]], *, report: Report | None = None) -> NDArray[np.float64]:
        """The score of each (query, document), float64 (n,), in the order given."""
        counted = Report() if report is None else report
        rows = [row for _, scores in self._scored(pairs, counted) for row in scores]
        counted.warn()
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.float64)
