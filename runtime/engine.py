"""The contract between batching and whatever runs the graph, and the data that crosses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Engine", "TokenBatch"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids and attention mask of one micro-batch, both int64 of shape (rows, tokens).

    The mask is 1 for a token and 0 for padding, which stands at the end of a row. ``types`` (rows, tokens) are the
    token types, ``None`` where all are 0. ``chosen`` (n,) are the positions that a graph with the input
    ``mask_positions`` reads, in the rows put one after the other; ``None`` is the first.
    """

    ids: Ids
    mask: Ids
    types: Ids | None = None
    chosen: Ids | None = None

    @classmethod
    def pad(
        cls,
        sequences: Sequence[Ids],
        pad_id: int,
        *,
        types: Sequence[Ids] | None = None,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> TokenBatch:
        """The sequences as one rectangle, padded with ``pad_id`` to the longest.

        ``types`` are the token types of each sequence, ``chosen`` the positions in each that are to be read.

        >>> TokenBatch.pad([np.array([101, 102]), np.array([101, 704, 102])], pad_id=0).ids.tolist()
        [[101, 102, 0], [101, 704, 102]]
        """
        tokens = max(len(sequence) for sequence in sequences)
        ids = np.full((len(sequences), tokens), pad_id, dtype=np.int64)
        mask = np.zeros((len(sequences), tokens), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        places = None if chosen is None else [row * tokens + n for row, own in enumerate(chosen) for n in own]
        return cls(
            ids,
            mask,
            None if types is None else cls.pad(types, 0).ids,
            None if places is None else np.array(places, dtype=np.int64),
        )


class Engine(Protocol):
    """Runs one graph. Implementations are thread-safe, and usable in a forked child."""

    def run(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        """The named outputs for one micro-batch, float32, first axis ``rows`` (of ``mask_logits``: masks).

        Raises ``GraphError`` when the graph fails or gives a value that is not finite, and
        ``ClosedError`` after ``close()``.
        """
        ...

    def close(self) -> None:
        """Wait for runs under way, then free the graph. May be called twice."""
        ...
