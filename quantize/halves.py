"""Weights stored as float16 and computed with in FP32: half the bytes, and a 2,000th of rounding at most.

Not here: the recipe that stores all weights so (``weights_only``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import UnsupportedModelError
from qingyu.models.export.builder import GraphBuilder

__all__ = ["FLOAT", "halves", "stored_halves", "widened"]

FLOAT = 1  # onnx.TensorProto.FLOAT

Floats = NDArray[np.float32]


def stored_halves(graph: GraphBuilder, name: str, weight: Floats) -> str:
    """A weight of any shape as an FP32 value, which onnxruntime widens once, when it loads the graph."""
    return widened(graph, graph.weight(f"{name}.weight", halves(name, weight)))


def widened(graph: GraphBuilder, value: str) -> str:
    """A value as FP32."""
    return graph.node("Cast", [value], attributes={"to": FLOAT})


def halves(name: str, weight: Floats) -> NDArray[Any]:
    """A weight as float16; ``UnsupportedModelError`` where it does not fit."""
    largest = float(np.abs(weight).max(initial=0))
    limit = float(np.finfo(np.float16).max)
    if not largest <= limit:
        raise UnsupportedModelError(
            f"{name}.weight cannot be stored as float16",
            expected=f"magnitudes up to {limit:g}",
            found=f"{largest:g}",
            remedy="Use another recipe.",
        )
    return weight.astype(np.float16)
