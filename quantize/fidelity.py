"""Measures candidates against one FP32 model, whose own vectors and scores are computed once.

Not here: how figures are defined (``certificate``, ``evaluation``, ``speed``) and what is good enough (the gate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qingyu.quantize.certificate import (
    Certificate,
    Size,
    TextCosines,
    Texts,
    check_same_model,
    compare,
    environment,
    text_cosines,
)
from qingyu.quantize.evaluation import Change, RetrievalSet, SimilaritySet, recall_of, spearman_of
from qingyu.quantize.speed import ROUNDS, measure_speed, speed_sample
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats

__all__ = ["Measured", "Reference"]


@dataclass(frozen=True)
class Measured:
    """A certificate, and the cosine of each text, in order, that its figures were taken from."""

    certificate: Certificate
    cosines: TextCosines


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Reference:
    """An FP32 model with its vectors (n, dim) of the ``texts`` and its scores on the sets, 0 to 1.

    ``tokens`` are the lengths of the texts, special tokens counted.
    """

    embedder: Embedder
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    vectors: Floats
    recalls: tuple[tuple[RetrievalSet, float], ...]
    correlations: tuple[tuple[SimilaritySet, float], ...]

    @classmethod
    def of(
        cls,
        embedder: Embedder,
        texts: Sequence[str],
        *,
        retrieval: Sequence[RetrievalSet] = (),
        similarity: Sequence[SimilaritySet] = (),
    ) -> Reference:
        """Embed the texts and the sets with the FP32 model, which must stay open while candidates are measured."""
        return cls(
            embedder=embedder,
            texts=tuple(texts),
            tokens=tuple(len(embedder.tokenize(text).ids) for text in texts),
            vectors=embedder.embed(texts),
            recalls=tuple((found, recall_of(embedder, found)) for found in retrieval),
            correlations=tuple((pairs, spearman_of(embedder, pairs)) for pairs in similarity),
        )

    def measure(self, candidate: Embedder, *, rounds: int = ROUNDS, progress: bool = False) -> Measured:
        """The whole certificate of one candidate; ``rounds=0`` leaves out the speed.

        Raises ``MismatchError`` when the candidate is of another model, ``InputError`` for texts that the FP32
        model cannot tell apart, and ``InvalidOptionError`` when the two were opened with different options.
        """
        check_same_model(self.embedder.spec, candidate.spec)
        vectors = candidate.embed(self.texts, progress=progress)
        certificate = dataclasses.replace(
            compare(self.vectors, vectors, self.tokens),
            texts=Texts.of(self.texts),
            recall_change=tuple(self._recall_change(candidate, *recall) for recall in self.recalls),
            spearman_change=tuple(
                self._spearman_change(candidate, *correlation) for correlation in self.correlations
            ),
            size=_size(self.embedder, candidate),
            environment=environment(candidate.engine),
        )
        if rounds:
            sample = speed_sample(self.texts, self.tokens)
            speed = measure_speed(self.embedder, candidate, sample, rounds=rounds)
            certificate = dataclasses.replace(certificate, speed=speed)
        return Measured(certificate, text_cosines(self.vectors, vectors))

    def _recall_change(self, candidate: Embedder, retrieval: RetrievalSet, recall: float) -> Change:
        now = recall_of(candidate, retrieval)
        return Change(retrieval.name, len(retrieval.queries), 100 * recall, 100 * now)

    def _spearman_change(self, candidate: Embedder, pairs: SimilaritySet, correlation: float) -> Change:
        now = spearman_of(candidate, pairs)
        return Change(pairs.name, len(pairs.labels), 100 * correlation, 100 * now)


def _size(reference: Embedder, candidate: Embedder) -> Size:
    was, now = (embedder.spec.files[embedder.running_spec.graph] for embedder in (reference, candidate))
    return Size(was.bytes, now.bytes, was.sha256)
