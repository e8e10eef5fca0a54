"""The row-wise recipe without smoothing, as a writer of linear layers."""

from __future__ import annotations

from qingyu.quantize.integer import MICROSOFT, IntegerLinear

__all__ = ["MICROSOFT", "RowwiseLinear"]


class RowwiseLinear(IntegerLinear):
    """A scale for each token, found when the graph runs."""

    def __init__(self) -> None:
        super().__init__(
            {"attention": "row", "context": "row", "intermediate": "row", "output": "row"}, ranges={}
        )
