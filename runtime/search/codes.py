"""Vectors in the bytes that an index keeps of them, and back.

``int8`` keeps the direction of a vector, with a scale of its own for each; ``bf16`` the upper half of each float32;
``float32`` all. Not here: the formats for embeddings that are given to users (``qingyu.runtime.vectors``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError
from qingyu.runtime.engine import Floats
from qingyu.runtime.vectors import to_int8

__all__ = ["CODES", "Codes", "Precision", "codes_for"]

Precision = Literal["int8", "bf16", "float32"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Codes:
    """One way to keep vectors.

    ``encode``: float32 (n, dim) to an array of n rows whose bytes are kept. ``decode``: that array back to float32
    (n, dim). ``searched``: the array to what the graph is given, which need not be all of it. ``scalar`` is usearch's
    name of what the graph holds; ``row`` the type of a row's bytes, ``tail`` how many of them follow the values.
    """

    encode: Callable[[Floats], Array]
    decode: Callable[[Array], Floats]
    searched: Callable[[Array], Array]
    scalar: str
    row: Any
    tail: int = 0

    def unpack(self, rows: Sequence[bytes], dim: int) -> Array:
        """The array that ``encode`` gave, from the bytes of its rows."""
        return np.frombuffer(b"".join(rows), dtype=self.row).reshape(len(rows), dim + self.tail)


def _int8_rows(vectors: Floats) -> Array:
    codes, scales = to_int8(vectors)
    return np.concatenate([codes, scales.astype("<f4")[:, None].view(np.int8)], axis=1)


def _int8_vectors(rows: Array) -> Floats:
    scales = np.ascontiguousarray(rows[:, -4:]).view("<f4")
    vectors: Floats = rows[:, :-4].astype(np.float32) * scales
    return vectors


def _bf16_rows(vectors: Floats) -> Array:
    """The upper 16 bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(vectors, dtype="<f4").view("<u4")
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _bf16_vectors(rows: Array) -> Floats:
    vectors: Floats = (rows.astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)
    return vectors


def _float32(rows: Array) -> Floats:
    return np.ascontiguousarray(rows, dtype="<f4").astype(np.float32, copy=False)


CODES: dict[Precision, Codes] = {
    "int8": Codes(
        encode=_int8_rows,
        decode=_int8_vectors,
        searched=lambda rows: np.ascontiguousarray(rows[:, :-4]),
        scalar="i8",
        row=np.int8,
        tail=4,
    ),
    "bf16": Codes(
        encode=_bf16_rows, decode=_bf16_vectors, searched=_bf16_vectors, scalar="bf16", row=np.dtype("<u2")
    ),
    "float32": Codes(encode=_float32, decode=_float32, searched=_float32, scalar="f32", row=np.dtype("<f4")),
}


def codes_for(precision: str) -> Codes:
    """The codes of a precision, or ``InvalidOptionError``."""
    for name, codes in CODES.items():
        if name == precision:
            return codes
    raise InvalidOptionError(
        "precision", expected=f"one of {', '.join(CODES)}", found=repr(precision), remedy="Use one of them."
    )
