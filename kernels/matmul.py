"""The product of a float32 weight matrix with one row of activations, at memory speed.

Many rows go through NumPy's BLAS (models/linear.py). One row does not: BLAS has a thread pool of its own, and two pools
that take turns 120 times a token on the same cores wait for each other (measured in docs/log.md). Packed weights have
kernels of their own (project.py).
"""

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from . import simd
from .jit import inner, parallel_kernel
from .simd import LANES

Float32 = NDArray[np.float32]


@inner
def _dot_rows(weight, columns, x, y, count):  # type: ignore[no-untyped-def]
    """y[i] = weight[i] . x for ``count`` (4 or 1) rows that follow one another; all addresses, rows of whole vectors."""
    zero = simd.splat(np.float32(0))
    a, b, c, d = zero, zero, zero, zero
    row = 4 * columns
    if count == 4:
        for i in range(0, 4 * columns, 4 * LANES):
            v = simd.load_f32(x + i)
            a = simd.fma(simd.load_f32(weight + i), v, a)
            b = simd.fma(simd.load_f32(weight + row + i), v, b)
            c = simd.fma(simd.load_f32(weight + 2 * row + i), v, c)
            d = simd.fma(simd.load_f32(weight + 3 * row + i), v, d)
        simd.store_scalar(y, simd.sum_lanes(a))
        simd.store_scalar(y + 4, simd.sum_lanes(b))
        simd.store_scalar(y + 8, simd.sum_lanes(c))
        simd.store_scalar(y + 12, simd.sum_lanes(d))
    else:
        for i in range(0, 4 * columns, 4 * LANES):
            a = simd.fma(simd.load_f32(weight + i), simd.load_f32(x + i), a)
        simd.store_scalar(y, simd.sum_lanes(a))


@parallel_kernel
def _matvec(weight, x, y, workers):  # type: ignore[no-untyped-def]
    rows, columns = weight.shape
    blocks = (rows + 3) // 4
    weight_at, x_at, y_at = np.int64(weight.ctypes.data), np.int64(x.ctypes.data), np.int64(y.ctypes.data)
    for worker in prange(workers):
        for block in range(blocks * worker // workers, blocks * (worker + 1) // workers):
            row = 4 * block
            at, target = weight_at + row * columns * 4, y_at + row * 4
            if row + 4 <= rows:
                _dot_rows(at, columns, x_at, target, 4)
            else:
                for i in range(rows - row):
                    _dot_rows(at + i * columns * 4, columns, x_at, target + 4 * i, 1)


def matvec(weight: Float32, x: Float32) -> Float32:
    """Weight (R, C) . x (C,) -> (R,), all float32, C order, C a multiple of 16. Bits do not depend on threads."""
    if weight.dtype != np.float32 or not weight.flags.c_contiguous or weight.ndim != 2 or weight.shape[1] % LANES:
        raise ValueError(
            f"weight must be float32 (R, C), C order, C a multiple of {LANES}, found {weight.dtype} {weight.shape}"
        )
    if x.dtype != np.float32 or not x.flags.c_contiguous or x.shape != weight.shape[1:]:
        raise ValueError(f"x must be contiguous float32 {weight.shape[1:]}, found {x.dtype} {x.shape}")
    y = np.empty(len(weight), np.float32)
    _matvec(weight, x, y, numba.get_num_threads())
    return y
