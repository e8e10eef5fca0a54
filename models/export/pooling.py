"""Token states to one vector per row, as nodes of a graph; the rules are those of sentence-transformers.

Rows are padded on the right and hold at least one token. Not here: normalization, which the runtime does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qingyu.models.export.builder import GraphBuilder
from qingyu.runtime.spec import Pooling

__all__ = ["POOLINGS", "write_pooling"]

FLOAT = 1  # onnx.TensorProto.FLOAT
BOOL = 9  # onnx.TensorProto.BOOL


def write_pooling(graph: GraphBuilder, pooling: Pooling, states: str, mask: str) -> str:
    """Vectors (rows, hidden) of ``states`` (rows, tokens, hidden) under ``mask`` (rows, tokens)."""
    return POOLINGS[pooling](graph, states, mask)


def _cls(graph: GraphBuilder, states: str, mask: str) -> str:
    return graph.node("Gather", [states, graph.constant(np.int64(0))], attributes={"axis": 1})


def _weighted(graph: GraphBuilder, states: str, weights: str) -> tuple[str, str]:
    """The weighted sum of the states (rows, hidden), and the sum of the weights (rows, 1)."""
    column = graph.node("Unsqueeze", [weights, graph.ints(2)])
    total = graph.node(
        "ReduceSum", [graph.node("Mul", [states, column]), graph.ints(1)], attributes={"keepdims": 0}
    )
    weight = graph.node("ReduceSum", [weights, graph.ints(1)], attributes={"keepdims": 1})
    return total, graph.node("Max", [weight, graph.constant(np.float32(1e-9))])


def _float_mask(graph: GraphBuilder, mask: str) -> str:
    return graph.node("Cast", [mask], attributes={"to": FLOAT})


def _mean(graph: GraphBuilder, states: str, mask: str) -> str:
    return graph.node("Div", list(_weighted(graph, states, _float_mask(graph, mask))))


def _mean_sqrt_len(graph: GraphBuilder, states: str, mask: str) -> str:
    total, count = _weighted(graph, states, _float_mask(graph, mask))
    return graph.node("Div", [total, graph.node("Sqrt", [count])])


def _weighted_mean(graph: GraphBuilder, states: str, mask: str) -> str:
    # The n-th token weighs n; with padding on the right the running sum of the mask is that n.
    place = graph.node("CumSum", [mask, graph.constant(np.int64(1))])
    weights = graph.node("Mul", [place, mask])
    return graph.node("Div", list(_weighted(graph, states, _float_mask(graph, weights))))


def _max(graph: GraphBuilder, states: str, mask: str) -> str:
    kept = graph.node("Unsqueeze", [graph.node("Cast", [mask], attributes={"to": BOOL}), graph.ints(2)])
    lowest = graph.constant(np.finfo(np.float32).min)
    return graph.node(
        "ReduceMax", [graph.node("Where", [kept, states, lowest]), graph.ints(1)], attributes={"keepdims": 0}
    )


def _last(graph: GraphBuilder, states: str, mask: str) -> str:
    count = graph.node("ReduceSum", [mask, graph.ints(1)], attributes={"keepdims": 1})
    index = graph.node("Sub", [count, graph.ints(1)])
    return graph.node("GatherND", [states, index], attributes={"batch_dims": 1})


POOLINGS: Mapping[Pooling, Callable[[GraphBuilder, str, str], str]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
    "last": _last,
}
