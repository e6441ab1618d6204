"""A linear layer: rows of activations, normed or gated, times a packed weight matrix, into or onto an output.

The rows are made ready once for all weights (activations.py), then blocks of 16 weight rows are shared out to the threads.
A single row is so quickly made ready that each thread does it for itself: there is one parallel region then, not two.
"""

from collections.abc import Sequence

import numpy as np
from numba import prange, types
from numpy.typing import NDArray

from . import microkernel, simd
from .activations import CODES, GATE, LESS_8, LESS_128, OFFSETS, SCALES, prepare_row, quantize_row, tile_nbytes
from .dots import GROUP, TILE_ROWS, multiply_bytes4, multiply_bytes4m, multiply_bytes8, next_byte_rows
from .jit import inner, kernel, parallel_kernel, standalone
from .simd import LANES
from .weights import CODE_BITS, W4, W4M, W8, WBF16, WF16, Matrix, row_of

Float32 = NDArray[np.float32]

VECTOR = 4 * LANES
KIND, DATA, BLOCK_NBYTES, BLOCKS, ROWS, FIRST = range(6)
PART_FIELDS = 6
# What a call is about: one array of int64, behind which the parts follow. EPS is the bits of a float32
N_PARTS, COLUMNS, HOW, NORM_WEIGHT, EPS, BIAS, ONTO, HAS_CODES, HAS_FLOATS, OUT_COLUMNS, ALL_BLOCKS = range(11)
MULTIPLY_KERNEL, PREPARE_KERNEL = range(11, 13)  # addresses
CALL_FIELDS = 13


@inner
def _array_of(tile, groups, which):  # type: ignore[no-untyped-def]
    """Where an array of a tile of activations begins."""
    if which == CODES:
        return tile
    return tile + groups * TILE_ROWS * (GROUP + 4 * (which - SCALES))


@inner
def _multiply_codes(kind, block, groups, tile, place, rows, target, stride, fresh):  # type: ignore[no-untyped-def]
    """Some rows of one tile of activations, from row ``place`` on, times one block of weights."""
    simd.never_inline()
    others = OFFSETS if kind == W4M else LESS_8 if kind == W4 else LESS_128
    params = groups * LANES * 2
    codes = block + ((2 if kind == W4M else 1) * params + 63) // 64 * 64
    x = _array_of(tile, groups, CODES) + place * GROUP
    scales = _array_of(tile, groups, SCALES) + 4 * place
    others_at = _array_of(tile, groups, others) + 4 * place
    if kind == W8:
        multiply_bytes8(x, scales, others_at, codes, block, 0, groups, rows, target, stride, fresh)
    elif kind == W4:
        multiply_bytes4(x, scales, others_at, codes, block, 0, groups, rows, target, stride, fresh)
    else:
        multiply_bytes4m(x, scales, others_at, codes, block, block + params, groups, rows, target, stride, fresh)


@inner
def _multiply_floats(kind, block, columns, x, x_stride, rows, target, stride, scratch):  # type: ignore[no-untyped-def]
    """Some rows of float32 times one block of dense weights; target is added to."""
    simd.never_inline()
    if kind == WBF16:
        microkernel.multiply_bf16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0)
    elif kind == WF16:
        microkernel.multiply_f16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0)


@inner
def _finish(source, rows, lanes, target, stride, bias, onto):  # type: ignore[no-untyped-def]
    """Up to 16 numbers of some rows from ``source`` (a vector a row) into ``target``, plus bias, plus what was there."""
    for r in range(rows):
        for i in range(lanes):
            value = simd.scalar_at(source + r * VECTOR + 4 * i)
            if bias:
                value += simd.scalar_at(bias + 4 * i)
            if onto:
                value += simd.scalar_at(target + r * stride + 4 * i)
            simd.store_scalar(target + r * stride + 4 * i, value)


@standalone(types.void(*[types.int64] * 7))
def multiply_blocks(call, first, stop, tiles, floats, rows, out):  # type: ignore[no-untyped-def]
    """The blocks first .. stop of all parts times all rows. Arguments are numbers and addresses."""
    columns, stride = simd.integer_at(call + 8 * COLUMNS), 4 * simd.integer_at(call + 8 * OUT_COLUMNS)
    bias, onto = simd.integer_at(call + 8 * BIAS), simd.integer_at(call + 8 * ONTO)
    groups = (columns + GROUP - 1) // GROUP
    own = np.empty((TILE_ROWS + 1) * LANES, np.float32)
    scratch = (own.ctypes.data + 63) // 64 * 64
    begin = np.int64(0)
    for p in range(simd.integer_at(call + 8 * N_PARTS)):
        part = call + 8 * (CALL_FIELDS + PART_FIELDS * p)
        kind, blocks = simd.integer_at(part + 8 * KIND), simd.integer_at(part + 8 * BLOCKS)
        n_rows, first_row = simd.integer_at(part + 8 * ROWS), simd.integer_at(part + 8 * FIRST)
        for b in range(max(first - begin, 0), min(stop - begin, blocks)):
            block = simd.integer_at(part + 8 * DATA) + b * simd.integer_at(part + 8 * BLOCK_NBYTES)
            column = first_row + LANES * b
            lanes = min(LANES, n_rows - LANES * b)
            direct = lanes == LANES and bias == 0
            row = np.int64(0)
            while row < rows:
                place = row % TILE_ROWS
                left = min(TILE_ROWS - place, rows - row)
                target = out + row * stride + 4 * column
                if kind <= W4M:
                    count = next_byte_rows(left)
                    tile = tiles + row // TILE_ROWS * tile_nbytes(groups)
                    if direct:
                        _multiply_codes(kind, block, groups, tile, place, count, target, stride, np.int64(1 - onto))
                    else:
                        _multiply_codes(kind, block, groups, tile, place, count, scratch, np.int64(VECTOR), np.int64(1))
                        _finish(scratch, count, lanes, target, stride, bias + 4 * column if bias else 0, onto)
                else:
                    count = min(left, microkernel.most_dense_rows())
                    for i in range(count):
                        simd.store_f32(scratch + VECTOR * i, simd.splat(np.float32(0)))
                    _multiply_floats(
                        kind, block, columns, floats + row * groups * GROUP * 4, groups * GROUP * 4, count, scratch,
                        np.int64(VECTOR), scratch,
                    )  # fmt: skip
                    _finish(scratch, count, lanes, target, stride, bias + 4 * column if bias else 0, onto)
                row += count
        begin += blocks
    own[0] = 0  # Numba frees an array after its last mention, and the addresses above do not count as one


@standalone(types.void(*[types.int64] * 6))
def prepare_rows(call, x, first, stop, tiles, floats):  # type: ignore[no-untyped-def]
    """Make rows first .. stop ready: codes into ``tiles``, or float32 into ``floats``, or both."""
    columns, how = simd.integer_at(call + 8 * COLUMNS), simd.integer_at(call + 8 * HOW)
    groups = (columns + GROUP - 1) // GROUP
    padded = groups * GROUP
    own = np.empty(2 * padded + LANES, np.float32)
    scratch = (own.ctypes.data + 63) // 64 * 64
    x_stride = 4 * columns * (2 if how == GATE else 1)
    for row in range(first, stop):
        prepare_row(
            x + row * x_stride, columns, padded, how, simd.integer_at(call + 8 * NORM_WEIGHT),
            simd.scalar_at(call + 8 * EPS), scratch,
        )  # fmt: skip
        if simd.integer_at(call + 8 * HAS_CODES):
            quantize_row(scratch, groups, tiles + row // TILE_ROWS * tile_nbytes(groups), row % TILE_ROWS)
        if simd.integer_at(call + 8 * HAS_FLOATS):
            for i in range(0, 4 * padded, VECTOR):
                simd.store_f32(floats + 4 * row * padded + i, simd.load_f32(scratch + i))
    own[0] = 0


_multiply, _prepare = multiply_blocks.call, prepare_rows.call


@inner
def _one_row(call, x, out, first, stop):  # type: ignore[no-untyped-def]
    groups = (call[COLUMNS] + GROUP - 1) // GROUP
    memory = np.empty(tile_nbytes(groups) + 4 * GROUP * groups + 64, np.uint8)
    tiles = (memory.ctypes.data + 63) // 64 * 64
    floats = tiles + tile_nbytes(groups)
    _prepare(call[PREPARE_KERNEL], call.ctypes.data, x, np.int64(0), np.int64(1), tiles, floats)
    _multiply(call[MULTIPLY_KERNEL], call.ctypes.data, first, stop, tiles, floats, np.int64(1), out)
    memory[0] = 0


@parallel_kernel
def project_row(call, x, out, workers):  # type: ignore[no-untyped-def]
    """``project_rows`` for one row, in one parallel region."""
    blocks = call[ALL_BLOCKS]
    for worker in prange(workers):
        w = np.int64(worker)
        _one_row(call, x.ctypes.data, out.ctypes.data, blocks * w // workers, blocks * (w + 1) // workers)


@parallel_kernel
def project_rows(call, x, memory, out, workers, multiplying):  # type: ignore[no-untyped-def]
    """X (T, columns) through the layer that ``call`` describes, into or onto ``out`` (T, rows).

    memory: uint8, room for the rows made ready. multiplying: the workers, once more: Numba would make one loop of two that
    count to the same variable.
    """
    rows, blocks = x.shape[0], call[ALL_BLOCKS]
    groups = (call[COLUMNS] + GROUP - 1) // GROUP
    n_tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    tiles = (memory.ctypes.data + 63) // 64 * 64
    floats = tiles + n_tiles * tile_nbytes(groups) * call[HAS_CODES]
    for worker in prange(workers):
        w = np.int64(worker)
        first, stop = n_tiles * w // workers * TILE_ROWS, min(rows, n_tiles * (w + 1) // workers * TILE_ROWS)
        _prepare(call[PREPARE_KERNEL], call.ctypes.data, x.ctypes.data, first, stop, tiles, floats)
    for worker in prange(multiplying):
        w = np.int64(worker)
        _multiply(
            call[MULTIPLY_KERNEL], call.ctypes.data, blocks * w // multiplying, blocks * (w + 1) // multiplying, tiles,
            floats, np.int64(rows), out.ctypes.data,
        )  # fmt: skip


@kernel
def _take(call, ids, out):  # type: ignore[no-untyped-def]
    """Rows ``ids`` of the first part, as float32."""
    part = call.ctypes.data + 8 * CALL_FIELDS
    for i in range(len(ids)):
        row_of(
            simd.integer_at(part + 8 * KIND),
            simd.integer_at(part + 8 * DATA) + ids[i] // LANES * simd.integer_at(part + 8 * BLOCK_NBYTES), ids[i] % LANES,
            call[COLUMNS], out.ctypes.data + i * out.shape[1] * 4,
        )  # fmt: skip


class Projection:
    """A layer as the kernels take it. It keeps what its addresses point to.

    Args:
        parts: matrices of the same number of columns, whose rows follow one another.
        bias: float32, one for every row of all parts, or None.
        how: PLAIN, NORM or GATE: what is done with the input first.
        norm_weight: float32 (columns,), for NORM; eps: its epsilon.

    """

    def __init__(
        self, parts: Sequence[Matrix], bias: Float32 | None, how: int, norm_weight: Float32 | None, eps: float
    ) -> None:
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns
        self._in_columns = self.columns * (2 if how == GATE else 1)
        self._has_codes = any(part.kind in CODE_BITS for part in parts)
        self._has_floats = any(part.kind not in CODE_BITS for part in parts)
        padded = np.zeros(-(-self.columns // GROUP) * GROUP, np.float32)
        if norm_weight is not None:
            padded[: self.columns] = norm_weight
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        self._kept = list(parts), padded, bias
        first = np.cumsum([0, *(part.rows for part in parts)])
        table = [
            [part.kind, part.data.ctypes.data, part.block_nbytes, part.blocks, part.rows, first[i]]
            for i, part in enumerate(parts)
        ]
        fields = [0] * CALL_FIELDS
        fields[N_PARTS], fields[COLUMNS], fields[HOW] = len(parts), self.columns, how
        fields[NORM_WEIGHT], fields[BIAS] = padded.ctypes.data, 0 if bias is None else bias.ctypes.data
        fields[EPS] = int(np.float32(eps).view(np.uint32))
        fields[HAS_CODES], fields[HAS_FLOATS] = self._has_codes, self._has_floats
        fields[OUT_COLUMNS], fields[ALL_BLOCKS] = self.rows, sum(part.blocks for part in parts)
        fields[MULTIPLY_KERNEL], fields[PREPARE_KERNEL] = multiply_blocks.address(), prepare_rows.address()
        self._into = np.array([*fields, *sum(table, [])], np.int64)
        self._onto = self._into.copy()
        self._onto[ONTO] = 1

    def __call__(self, x: Float32, onto: Float32 | None, workers: int) -> Float32:
        """X float32 (T, columns), or (T, 2 * columns) for GATE, to float32 (T, rows); added to ``onto`` if given.

        Raises:
            ValueError: arrays that do not fit.

        """
        rows = len(x)
        if x.shape != (rows, self._in_columns) or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x must be C-ordered float32 (T, {self._in_columns}), found {x.dtype} {x.shape}")
        if onto is None:
            call, out = self._into, np.empty((rows, self.rows), np.float32)
        else:
            call, out = self._onto, onto
            if out.shape != (rows, self.rows) or out.dtype != np.float32 or not out.flags.c_contiguous:
                raise ValueError(f"onto must be C-ordered float32 {(rows, self.rows)}, found {out.dtype} {out.shape}")
        if rows == 1:
            project_row(call, x, out, workers)
        elif rows:
            memory = np.empty(_room_nbytes(rows, self.columns, self._has_codes, self._has_floats), np.uint8)
            project_rows(call, x, memory, out, workers, workers)
        return out

    def take(self, ids: NDArray[np.int64]) -> Float32:
        """Rows of the matrix, which has one part, as float32 (len(ids), columns)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise ValueError(f"ids must be from 0 to {self.rows - 1}, found {ids.min()} to {ids.max()}")
        out = np.empty((len(ids), self.columns), np.float32)
        _take(self._into, ids, out)
        return out


def _room_nbytes(rows: int, columns: int, has_codes: bool, has_floats: bool) -> int:
    """Bytes of what ``project_rows`` needs for rows made ready."""
    groups, n_tiles = -(-columns // GROUP), -(-rows // TILE_ROWS)
    tile = groups * TILE_ROWS * (GROUP + 16)
    return n_tiles * (tile * has_codes + TILE_ROWS * 4 * GROUP * groups * has_floats) + 64
