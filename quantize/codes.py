"""Weights as integer codes and scales: by column, by row of a table, or by blocks of a column.

All are symmetric: code 0 (in blocks: the middle code) is exactly 0, and a value and its negative round alike.
Not here: activations, whose codes are computed when the graph runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SMALLEST", "quantize_blocks", "quantize_columns", "quantize_rows"]

SMALLEST = np.float32(1e-30)  # a scale for columns of zeros, which would otherwise divide zero by zero

Floats = NDArray[np.float32]


def quantize_columns(weight: Floats, *, bits: int = 8) -> tuple[NDArray[np.int8], Floats]:
    """Codes int8 (in, out) and scales float32 (out,): weight = codes x scales, error at most half a scale.

    Codes go from -(2^(bits-1) - 1) to its negative, bits being 2 to 8.

    >>> quantize_columns(np.float32([[1, 0], [-0.5, 0]]))[0].tolist()
    [[127, 0], [-64, 0]]
    """
    levels = np.float32((1 << (bits - 1)) - 1)
    scales = np.maximum(np.abs(weight).max(axis=0) / levels, SMALLEST).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def quantize_rows(table: Floats, *, bits: int = 8) -> tuple[NDArray[np.int8], Floats]:
    """Codes int8 (rows, hidden) and scales float32 (rows, 1), one scale for each row of a table."""
    codes, scales = quantize_columns(np.ascontiguousarray(table.T), bits=bits)
    return np.ascontiguousarray(codes.T), scales[:, None]


def quantize_blocks(weight: Floats, *, bits: int, block: int) -> tuple[NDArray[np.uint8], Floats]:
    """Codes and scales of blocks of ``block`` consecutive inputs, as com.microsoft.MatMulNBits stores them.

    ``weight`` is (in, out); codes are uint8 (out, blocks, block x bits / 8), of 4 bits two a byte with the first in
    the lower half; scales float32 (out, blocks). A weight is (code - 2^(bits-1)) x scale, error at most half a scale.
    The last block is filled up with zeros.
    """
    width, columns = weight.shape
    blocks = -(-width // block)
    padded = np.zeros((columns, blocks * block), dtype=np.float32)
    padded[:, :width] = weight.T
    grouped = padded.reshape(columns, blocks, block)
    middle = 1 << (bits - 1)
    scales = np.maximum(np.abs(grouped).max(axis=2) / np.float32(middle - 1), SMALLEST).astype(np.float32)
    codes = (np.rint(grouped / scales[:, :, None]) + middle).astype(np.uint8)
    if bits == 4:
        codes = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    return codes, scales
