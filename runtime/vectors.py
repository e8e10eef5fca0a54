"""What may be done to finished vectors: cut, normalize, compare, and store in fewer bytes.

Arrays are (n, dim) with one vector a row. Not here: anything that needs a model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.engine import Floats

__all__ = ["Int8Vectors", "cosine", "to_binary", "to_float16", "to_int8", "unit"]


class Int8Vectors(NamedTuple):
    """``codes`` int8 (n, dim) and ``scales`` float32 (n,): vector = codes x scale.

    The cosine of two vectors is the cosine of their codes: the scale is needed only for lengths.
    """

    codes: NDArray[np.int8]
    scales: Floats


def unit(vectors: Floats) -> Floats:
    """The vectors with Euclidean length 1, float32; one shorter than 1e-12 is divided by 1e-12.

    The floor is that of ``torch.nn.functional.normalize``, so that both give the same for a zero vector.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    scaled: Floats = (vectors / np.maximum(lengths, 1e-12)[:, None]).astype(np.float32, copy=False)
    return scaled


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine similarities (len(a), len(b)), float32, within [-1, 1].

    >>> cosine(np.float32([[3, 4]]), np.float32([[3, 4], [4, -3]])).tolist()
    [[1.0, 0.0]]
    """
    table: Floats = np.clip(unit(a) @ unit(b).T, -1.0, 1.0)
    return table


def to_float16(vectors: Floats) -> NDArray[np.float16]:
    """The vectors as IEEE half precision (n, dim): scale 1, relative error at most 2^-11."""
    return vectors.astype(np.float16)


def to_int8(vectors: Floats) -> Int8Vectors:
    """The vectors as 8-bit integers, each with its own scale max|v| / 127; error at most half a scale.

    >>> to_int8(np.float32([[1.0, -0.5]])).codes.tolist()
    [[127, -64]]
    """
    scales = np.abs(vectors).max(axis=1, initial=0.0) / np.float32(127)
    codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return Int8Vectors(codes, scales.astype(np.float32, copy=False))


def to_binary(vectors: Floats) -> NDArray[np.uint8]:
    """The signs of the vectors packed eight to a byte (n, ceil(dim / 8)): bit 1 where a value is above zero.

    The first value is the highest bit, as in ``numpy.packbits``, faiss and sentence-transformers' "ubinary".
    Compare by Hamming distance; there is no scale.

    >>> to_binary(np.float32([[0.1, -0.2, 0.3, 0, 0, 0, 0, 0.4]])).tolist()
    [[161]]
    """
    return np.packbits(vectors > 0, axis=1)
