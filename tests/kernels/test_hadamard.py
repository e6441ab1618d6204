"""The rotation of heads, against the Kronecker products that define Sylvester's matrices, in float64."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels.hadamard import block_size, rotated

from .oracle import normal

BLOCKS = {2: 2, 6: 2, 16: 16, 20: 4, 48: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 256: 256}


def matrix(head_dim: int) -> np.ndarray:
    """Blocks of Sylvester's matrix of the largest power of two that divides head_dim, each of length 1 a row."""
    n = max(2**i for i in range(9) if head_dim % 2**i == 0)
    block = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * (n.bit_length() - 1), np.ones((1, 1)))
    return np.kron(np.eye(head_dim // n), block / np.sqrt(n))


def test_the_size_of_a_block_is_the_largest_power_of_two_that_divides() -> None:
    assert {d: block_size(d) for d in BLOCKS} == BLOCKS
    assert [block_size(d) for d in (1, 15, 250, 192)] == [1, 1, 2, 64]


@pytest.mark.parametrize("d", [*BLOCKS, 1, 15, 192, 250])
def test_rotation_is_a_product_with_the_matrix(d: int) -> None:
    """Every channel alone, and all of them; twice gives back what there was; lengths and products stay."""
    x = normal(np.random.default_rng(d), 40, d)
    for rows in (x, np.eye(d, dtype=np.float32)):
        before = rows.copy()
        found = rotated(rows)
        assert found.dtype == np.float32 and found.shape == rows.shape
        np.testing.assert_array_equal(rows, before)
        np.testing.assert_allclose(found, rows.astype(np.float64) @ matrix(d), rtol=0, atol=4e-6)
        np.testing.assert_allclose(rotated(found), rows, rtol=0, atol=4e-6)
    np.testing.assert_array_equal(rotated(np.eye(d, dtype=np.float32)) > 0, matrix(d) > 0)
    np.testing.assert_allclose(rotated(x) @ rotated(x).T, x.astype(np.float64) @ x.T, rtol=0, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(BLOCKS)), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_each_row_is_rotated_by_itself(d: int, n: int, heads: int, seed: int) -> None:
    """Bit for bit, whatever stands beside it."""
    rng = np.random.default_rng(seed)
    x = normal(rng, n, heads, d)
    found = rotated(x)
    for i, h in np.ndindex(n, heads):
        np.testing.assert_array_equal(found[i, h], rotated(x[i, h]))
    row = rng.integers(n), rng.integers(heads)
    x[row] = np.nan
    spoiled = rotated(x)
    assert np.isnan(spoiled[row]).any()
    keep = np.ones((n, heads), bool)
    keep[row] = False
    np.testing.assert_array_equal(spoiled[keep], found[keep])


@pytest.mark.parametrize("d", list(BLOCKS))
def test_each_block_of_channels_is_rotated_by_itself(d: int) -> None:
    x = normal(np.random.default_rng(d), 3, d)
    found, size = rotated(x), BLOCKS[d]
    for first in range(0, d, size):
        alone = np.zeros_like(x)
        alone[:, first : first + size] = x[:, first : first + size]
        np.testing.assert_array_equal(rotated(alone)[:, first : first + size], found[:, first : first + size])


def test_an_outlier_is_spread_over_its_head() -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, 9] = 800
    np.testing.assert_array_equal(np.abs(rotated(x)), np.full((1, 64), 100, np.float32))
