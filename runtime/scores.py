"""Logits to scores: softmax, its logarithm, and the logistic function, over the last axis and in float64.

In float64 because a difference of 1e-5 from a reference is to be that of the graph alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.engine import Floats
from qingyu.runtime.spec import ScoreFunction

__all__ = ["SCORES", "log_softmax", "sigmoid", "softmax"]

Doubles = NDArray[np.float64]


def log_softmax(logits: Floats) -> Doubles:
    """The logarithms of ``softmax``, exact also where the probability itself would be 0."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    logs: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def softmax(logits: Floats) -> Doubles:
    """Probabilities that add up to 1.

    >>> softmax(np.float32([[0, 0]])).tolist()
    [[0.5, 0.5]]
    """
    return np.exp(log_softmax(logits))


def sigmoid(logits: Floats) -> Doubles:
    """Each label's own probability.

    >>> sigmoid(np.float32([0])).tolist()
    [0.5]
    """
    # Of -|x|, so that exp cannot overflow.
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def _same(logits: Floats) -> Doubles:
    return logits.astype(np.float64)


SCORES: Mapping[ScoreFunction, Callable[[Floats], Doubles]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": _same,
}
