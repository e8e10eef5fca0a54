"""Text classification: one of several labels, or several independent ones, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from qingyu.runtime.sequences import SequenceModel, TextOrPair
from qingyu.runtime.spec import Task
from qingyu.runtime.task import Report

__all__ = ["Classified", "Classifier", "LabelScore"]


@dataclass(frozen=True)
class LabelScore:
    """A label and how well it fits: a probability, or of regression models the number itself."""

    label: str
    score: float


@dataclass(frozen=True)
class Classified:
    """A text (or a pair), and all its labels, best first."""

    text: TextOrPair
    labels: tuple[LabelScore, ...]

    @property
    def best(self) -> LabelScore:
        """The label that fits best."""
        return self.labels[0]


class Classifier(SequenceModel):
    """Labels texts with one model; thread-safe, fork-safe, and a context manager.

    Open one with ``Classifier.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "classification"

    def classify(
        self, texts: str | Iterable[TextOrPair], *, report: Report | None = None
    ) -> list[Classified]:
        """Each text with the scores of all labels, best first; a pair of texts is a tuple of two.

        Scores are those of transformers' text-classification pipeline: probabilities that add up to 1, or of a
        multi-label model each label's own. Pairs are cut the longer first. Raises ``InvalidTextError``.
        """
        return list(self.classify_stream([texts] if isinstance(texts, str) else texts, report=report))

    def classify_stream(
        self, texts: Iterable[TextOrPair], *, report: Report | None = None
    ) -> Iterator[Classified]:
        """The same for an iterable of any length, in bounded memory."""
        counted = Report() if report is None else report
        for window, scores in self._scored(texts, counted):
            for text, row in zip(window, scores, strict=True):
                labels = map(LabelScore, self.spec.labels, row.tolist())
                yield Classified(text, tuple(sorted(labels, key=lambda label: -label.score)))
        counted.warn()
