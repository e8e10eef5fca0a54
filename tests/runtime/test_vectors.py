"""Finished vectors: lengths, cosines and the smaller forms."""

from __future__ import annotations

import numpy as np

from qingyu.runtime.vectors import cosine, to_binary, to_float16, to_int8, unit


def vectors(rows: int = 50, dim: int = 24) -> np.ndarray:
    return unit(np.random.default_rng(3).normal(size=(rows, dim)).astype(np.float32))


def test_unit_gives_length_one_and_leaves_a_zero_vector_finite():
    rows = np.float32([[3, 4], [0, 0], [1e-20, 0]])
    assert unit(rows)[0].tolist() == np.float32([0.6, 0.8]).tolist()
    assert np.isfinite(unit(rows)).all()
    assert unit(rows).dtype == np.float32


def test_unit_of_none_is_none():
    assert unit(np.empty((0, 5), np.float32)).shape == (0, 5)


def test_cosine_is_within_one_and_one_on_the_diagonal():
    table = cosine(vectors(), vectors())
    assert table.max() <= 1.0
    assert np.allclose(np.diag(table), 1, atol=1e-6)


def test_int8_is_within_half_a_scale_and_keeps_cosines():
    rows = vectors()
    codes, scales = to_int8(rows)
    assert codes.dtype == np.int8
    assert scales.shape == (50,)
    # Half a scale, and the rounding of the division.
    assert (np.abs(codes * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()
    assert (
        np.abs(cosine(codes.astype(np.float32), codes.astype(np.float32)) - cosine(rows, rows)).max() < 0.01
    )


def test_int8_of_a_zero_vector_is_zero():
    codes, scales = to_int8(np.zeros((2, 4), np.float32))
    assert not codes.any()
    assert not scales.any()


def test_float16_is_within_its_stated_relative_error():
    rows = vectors()
    assert (np.abs(to_float16(rows) - rows) <= np.abs(rows) * 2.0**-11 + 2.0**-25).all()


def test_binary_bits_are_the_signs_first_value_highest():
    rows = vectors(dim=24)
    assert np.unpackbits(to_binary(rows), axis=1).astype(bool).tolist() == (rows > 0).tolist()
    assert to_binary(vectors(dim=20)).shape == (50, 3)
