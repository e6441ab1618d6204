"""Rotation of keys and values by a Hadamard matrix, which spreads an outlier over the channels of its head.

The matrix is symmetric and its own inverse: rotating twice gives back what there was. Queries rotated as the keys are have
the same products with them; an output over rotated values is rotated back. A head is rotated in blocks of the largest power
of two that divides head_dim: 64 channels as one block, 96 as three of 32.
"""

import numpy as np
from numpy.typing import NDArray

from . import simd
from .jit import inner, kernel
from .simd import LANES


def block_size(head_dim: int) -> int:
    """Channels of a block: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@inner
def rotate_head(at, head_dim, size):  # type: ignore[no-untyped-def]
    """Rotate ``head_dim`` float32 at an address, in place, in blocks of ``size``; up to a multiple of 16, zeros follow."""
    scale = simd.splat(np.float32(1 / np.sqrt(np.float64(size))))
    for c in range(0, head_dim, LANES):
        x = simd.hadamard_lanes(simd.load_f32(at + 4 * c), min(size, LANES))
        simd.store_f32(at + 4 * c, simd.mul(x, scale))
    distance = LANES
    while distance < size:
        for first in range(0, head_dim, 2 * distance):
            for c in range(first, first + distance, LANES):
                low, high = simd.load_f32(at + 4 * c), simd.load_f32(at + 4 * (c + distance))
                simd.store_f32(at + 4 * c, simd.add(low, high))
                simd.store_f32(at + 4 * (c + distance), simd.sub(low, high))
        distance *= 2


@kernel
def _rotate(x, head_dim, size):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        rotate_head(x.ctypes.data + 4 * i * x.shape[1], head_dim, size)


def rotated(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A rotated copy of x float32 (..., head_dim): x @ H, H having blocks of +-1 / sqrt(block_size) on its diagonal."""
    head_dim = x.shape[-1]
    rows = np.zeros((x.size // head_dim, -(-head_dim // LANES) * LANES), np.float32)
    rows[:, :head_dim] = x.reshape(-1, head_dim)
    _rotate(rows, head_dim, block_size(head_dim))
    return rows[:, :head_dim].reshape(x.shape)
