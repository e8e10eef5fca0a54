"""Measures of retrieval by rank: recall@k, nDCG@k and the reciprocal rank of the first relevant passage.

Definitions are those of trec_eval (and so of BEIR and MTEB): linear gains, a discount of log2(rank + 1), the ideal
order over all judged passages, the mean over queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qingyu.quantize.evaluation import BLOCK, RetrievalSet, SimilaritySet, spearman_of
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.vectors import unit

__all__ = ["Figure", "ranked", "retrieval_figures", "retrieval_measures", "similarity_figures"]

AT = 10  # for nDCG and the reciprocal rank
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Figure:
    """One measure of one model on one set, times 100; ``items`` is how many queries, pairs or texts it is of."""

    measured_on: str
    measure: str
    items: int
    value: float


def ranked(queries: Floats, corpus: Floats, *, depth: int) -> NDArray[np.int64]:
    """For each query the positions of its ``depth`` nearest passages by cosine, nearest first.

    Of equal ones the earlier is nearer. ``queries`` (n, dim), ``corpus`` (m, dim); the result is (n, min(depth, m)).
    """
    near, passages = unit(queries), unit(corpus).T
    blocks = [
        np.argsort(-(near[start : start + BLOCK] @ passages), axis=1, kind="stable")[:, :depth]
        for start in range(0, len(near), BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, min(depth, len(corpus))), dtype=np.int64)


def retrieval_measures(order: NDArray[np.int64], grades: Sequence[Mapping[int, int]]) -> dict[str, float]:
    """Recall@1, @5 and @10, nDCG@10 and MRR@10, each 0 to 1.

    ``order`` (n, 10 or more) holds each query's passages, best first; ``grades`` the relevant ones' grades above 0.
    """
    found: dict[str, list[float]] = {}
    for row, wanted in zip(order.tolist(), grades, strict=True):
        for k in RECALL_AT:
            found.setdefault(f"recall@{k}", []).append(len(wanted.keys() & set(row[:k])) / len(wanted))
        gains = [wanted.get(place, 0) for place in row[:AT]]
        ideal = sorted(wanted.values(), reverse=True)[:AT]
        found.setdefault(f"nDCG@{AT}", []).append(_discounted(gains) / _discounted(ideal))
        first = next((rank for rank, gain in enumerate(gains, start=1) if gain), None)
        found.setdefault(f"MRR@{AT}", []).append(0.0 if first is None else 1 / first)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _discounted(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))


def retrieval_figures(embedder: Embedder, retrieval: RetrievalSet) -> list[Figure]:
    """The measures of a model on a set, with its own prompts for queries and passages where it has them."""
    prompts = {name: name if name in embedder.spec.prompts else None for name in ("query", "passage")}
    queries = embedder.embed(retrieval.queries, prompt=prompts["query"], progress=True)
    corpus = embedder.embed(retrieval.corpus, prompt=prompts["passage"], progress=True)
    grades = retrieval.grades or [dict.fromkeys(relevant, 1) for relevant in retrieval.relevant]
    measures = retrieval_measures(ranked(queries, corpus, depth=AT), grades)
    return [Figure(retrieval.name, name, len(grades), 100 * value) for name, value in measures.items()]


def similarity_figures(
    embedder: Embedder, pairs: SimilaritySet, *, prompt: str | None = None
) -> list[Figure]:
    """Spearman's correlation of a model's cosines with the labels of a set; ``prompt`` as in ``Embedder.embed``."""
    value = spearman_of(embedder, pairs, prompt=prompt)
    return [Figure(pairs.name, "Spearman", len(pairs.labels), 100 * value)]
