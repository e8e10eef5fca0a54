"""The four inputs of an encoder layer that linear layers read, by the names of those linear layers.

attention      query, key and value; a LayerNormalization gives it
context        attention.output.dense; what attention gathered
intermediate   intermediate.dense; a LayerNormalization gives it
output         output.dense; the activation function gives it

The head of a task reads a fifth, which has few rows: one for each text or mask.
"""

from __future__ import annotations

from typing import Literal, get_args

from qingyu.models.export.graph import GraphPlan, linear_shapes

__all__ = ["INPUTS", "Input", "input_of", "is_head", "linear_groups", "linear_names"]

Input = Literal["attention", "context", "intermediate", "output"]
INPUTS: tuple[Input, ...] = get_args(Input)

_PARTS: dict[Input, tuple[str, ...]] = {
    "attention": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "context": ("attention.output.dense",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
}
_INPUT_OF: dict[str, Input] = {part: kind for kind, parts in _PARTS.items() for part in parts}


def input_of(name: str) -> Input:
    """Which input the linear layer ``encoder.layer.<n>.<part>`` reads.

    >>> input_of("encoder.layer.3.attention.self.key")
    'attention'
    """
    return _INPUT_OF[name.split(".", 3)[3]]


def is_head(name: str) -> bool:
    """Whether a linear layer is of the head of a task and not of the encoder.

    >>> is_head("task_head.dense"), is_head("encoder.layer.3.output.dense")
    (True, False)
    """
    return name.startswith("task_head.")


def linear_groups(plan: GraphPlan) -> list[tuple[str, ...]]:
    """The linear layers of the encoder in order, those that share an input together."""
    layers = range(plan.architecture.layers)
    return [tuple(f"encoder.layer.{n}.{part}" for part in parts) for n in layers for parts in _PARTS.values()]


def linear_names(plan: GraphPlan) -> list[str]:
    """The linear layers of the encoder in order."""
    return [name for n in range(plan.architecture.layers) for name in linear_shapes(plan.architecture, n)]
