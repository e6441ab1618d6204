"""Chains of linear layers: rows of activations, normed or gated, times packed weights, into or onto an output, and on.

In a layer, the rows are made ready once for all weights (activations.py), then blocks of 16 weight rows are shared out to
the threads. A single row is so quickly made ready that each thread does it for itself: there is one parallel region then,
not two. All layers between two attentions are one call: what Python does between calls is time in which no memory is read.
"""

import numpy as np
from numba import prange, types

from . import microkernel, simd
from .activations import (
    CODES,
    LESS_8,
    LESS_128,
    OFFSETS,
    SCALES,
    SILU,
    normalize_segments,
    prepare_row,
    quantize_row,
    tile_nbytes,
)
from .dots import GROUP, TILE_ROWS, multiply_bytes4, multiply_bytes4m, multiply_bytes8, next_byte_rows
from .jit import inner, kernel, parallel_kernel, standalone
from .rotary import rotate_heads
from .simd import LANES
from .tables import get
from .weights import W4, W4M, W8, WBF16, WF16, WF32, codes_of, row_of

VECTOR = 4 * LANES
# A link of a chain: one array of int64, behind which the parts of its matrix follow. EPS is the bits of a float32
HOW, SOURCE, TARGET, COLUMNS, OUT_COLUMNS, ONTO, NORM_WEIGHT, EPS, BIAS, HAS_CODES, HAS_FLOATS = range(11)
N_PARTS, ALL_BLOCKS, HEADS, HEAD_DIM, ROTARY_DIM, FIRST_CHANNEL = range(11, 17)
MULTIPLY_KERNEL, PREPARE_KERNEL, ROW_KERNEL = range(17, 20)  # addresses
LINK_FIELDS = 20
KIND, DATA, BLOCK_NBYTES, BLOCKS, ROWS, FIRST = range(6)
PART_FIELDS = 6
# A value of HOW besides those of activations.py: no product, but what ROW_KERNEL does with each row, from SOURCE to TARGET
BY_ROW = 16
ROOM = 0  # the first of the buffers that a chain runs on: for rows made ready
OWN_BUFFERS = 1
CACHED_NBYTES = 1 << 16  # of weights: part of a second-level cache


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
    codes = codes_of(kind, block, groups)
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
def _multiply_floats(kind, block, columns, x, x_stride, rows, target, stride):  # type: ignore[no-untyped-def]
    """Some rows of float32 times one block of dense weights; target is added to."""
    simd.never_inline()
    if kind == WBF16:
        microkernel.multiply_bf16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0)
    elif kind == WF16:
        microkernel.multiply_f16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0)
    elif kind == WF32:
        microkernel.multiply_f32(x, x_stride, block, 4 * LANES, 0, columns, rows, 1, target, stride, 0)


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
        part = call + 8 * (LINK_FIELDS + PART_FIELDS * p)
        kind, blocks = simd.integer_at(part + 8 * KIND), simd.integer_at(part + 8 * BLOCKS)
        n_rows, first_row = simd.integer_at(part + 8 * ROWS), simd.integer_at(part + 8 * FIRST)
        nbytes = simd.integer_at(part + 8 * BLOCK_NBYTES)
        # Weights that fit a cache meet all rows before the next ones do, and a few rows meet one block after the other, so
        # that lines of the output are written next to each other.
        low, high, step = max(first - begin, 0), min(stop - begin, blocks), max(CACHED_NBYTES // nbytes, 1)
        for group in range(low, high, step):
            row = np.int64(0)
            while row < rows:
                place = row % TILE_ROWS
                left = min(TILE_ROWS - place, rows - row)
                count = next_byte_rows(left) if kind <= W4M else min(left, microkernel.most_dense_rows())
                for b in range(group, min(group + step, high)):
                    block = simd.integer_at(part + 8 * DATA) + b * nbytes
                    column = first_row + LANES * b
                    lanes = min(LANES, n_rows - LANES * b)
                    own_bias = bias + 4 * column if bias else 0
                    target = out + row * stride + 4 * column
                    if kind > W4M:
                        for i in range(count):
                            simd.store_f32(scratch + VECTOR * i, simd.splat(np.float32(0)))
                        _multiply_floats(
                            kind, block, columns, floats + row * groups * GROUP * 4, groups * GROUP * 4, count, scratch,
                            np.int64(VECTOR),
                        )  # fmt: skip
                        _finish(scratch, count, lanes, target, stride, own_bias, onto)
                        continue
                    tile = tiles + row // TILE_ROWS * tile_nbytes(groups)
                    if lanes == LANES and bias == 0:
                        _multiply_codes(kind, block, groups, tile, place, count, target, stride, np.int64(1 - onto))
                    else:
                        _multiply_codes(kind, block, groups, tile, place, count, scratch, np.int64(VECTOR), np.int64(1))
                        _finish(scratch, count, lanes, target, stride, own_bias, onto)
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
    x_stride = 4 * columns * (2 if how >= SILU else 1)
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


@standalone(types.void(*[types.int64] * 5))
def rotate_rows(call, source, target, first, stop):  # type: ignore[no-untyped-def]
    """Rotary embedding of the first HEADS heads of rows first .. stop of ``target``, in place (see rotary.py).

    source: for each row the cosines and then the sines of ROTARY_DIM / 2 angles.
    """
    heads, stride = simd.integer_at(call + 8 * HEADS), 4 * simd.integer_at(call + 8 * OUT_COLUMNS)
    head_dim, rotary_dim = simd.integer_at(call + 8 * HEAD_DIM), simd.integer_at(call + 8 * ROTARY_DIM)
    for row in range(first, stop):
        rotate_heads(target + row * stride, heads, head_dim, rotary_dim // 2, source + row * rotary_dim * 4)


@standalone(types.void(*[types.int64] * 5))
def normalize_rows(call, source, target, first, stop):  # type: ignore[no-untyped-def]
    """RMSNorm of HEADS runs of HEAD_DIM channels from FIRST_CHANNEL on, of rows first .. stop, into or onto ``target``."""
    count, size = simd.integer_at(call + 8 * HEADS), simd.integer_at(call + 8 * HEAD_DIM)
    stride, at = 4 * simd.integer_at(call + 8 * OUT_COLUMNS), 4 * simd.integer_at(call + 8 * FIRST_CHANNEL)
    own = np.empty(size + GROUP + LANES, np.float32)
    scratch = (own.ctypes.data + 63) // 64 * 64
    for row in range(first, stop):
        normalize_segments(
            source + row * stride + at, target + row * stride + at, count, size, simd.integer_at(call + 8 * NORM_WEIGHT),
            simd.scalar_at(call + 8 * EPS), simd.integer_at(call + 8 * ONTO), scratch,
        )  # fmt: skip
    own[0] = 0


_multiply, _prepare, _by_row = multiply_blocks.call, prepare_rows.call, rotate_rows.call


@inner
def _one_row(call, x, out, worker, workers):  # type: ignore[no-untyped-def]
    """The share of one worker in a product with one row, which it makes ready for itself."""
    groups, blocks = (get(call, COLUMNS) + GROUP - 1) // GROUP, get(call, ALL_BLOCKS)
    memory = np.empty(tile_nbytes(groups) + 4 * GROUP * groups + 64, np.uint8)
    tiles = (memory.ctypes.data + 63) // 64 * 64
    floats = tiles + tile_nbytes(groups)
    _prepare(get(call, PREPARE_KERNEL), call, x, np.int64(0), np.int64(1), tiles, floats)
    _multiply(
        get(call, MULTIPLY_KERNEL), call, blocks * worker // workers, blocks * (worker + 1) // workers, tiles, floats,
        np.int64(1), out,
    )  # fmt: skip
    memory[0] = 0


@parallel_kernel
def run_chain(table, addresses, rows, workers, multiplying, by_row):  # type: ignore[no-untyped-def]
    """Run ``rows`` rows through the links of ``table``, one after the other.

    table: int64 (links, LINK_FIELDS and more), addresses: int64, those of the buffers. workers, multiplying, by_row: the
    same number: Numba would make one loop of neighbours that count to the same variable.
    """
    for i in range(table.shape[0]):
        call = table.ctypes.data + 8 * i * table.shape[1]
        source, target, room = addresses[get(call, SOURCE)], addresses[get(call, TARGET)], addresses[ROOM]
        groups, blocks = (get(call, COLUMNS) + GROUP - 1) // GROUP, get(call, ALL_BLOCKS)
        n_tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        tiles = (room + 63) // 64 * 64
        floats = tiles + n_tiles * tile_nbytes(groups) * get(call, HAS_CODES)
        if get(call, HOW) == BY_ROW:
            if rows == 1:
                _by_row(get(call, ROW_KERNEL), call, source, target, np.int64(0), rows)
            else:
                for worker in prange(by_row):
                    w = np.int64(worker)
                    _by_row(get(call, ROW_KERNEL), call, source, target, rows * w // by_row, rows * (w + 1) // by_row)
        elif rows == 1:
            for worker in prange(workers):
                _one_row(call, source, target, np.int64(worker), workers)
        else:
            for worker in prange(workers):
                w = np.int64(worker)
                first, stop = n_tiles * w // workers * TILE_ROWS, min(rows, n_tiles * (w + 1) // workers * TILE_ROWS)
                _prepare(get(call, PREPARE_KERNEL), call, source, first, stop, tiles, floats)
            for worker in prange(multiplying):
                w = np.int64(worker)
                _multiply(
                    get(call, MULTIPLY_KERNEL), call, blocks * w // multiplying, blocks * (w + 1) // multiplying, tiles,
                    floats, rows, target,
                )  # fmt: skip


@kernel
def take_rows(table, ids, out):  # type: ignore[no-untyped-def]
    """Rows ``ids`` of the matrix of the first link, which has one part, as float32."""
    part = table.ctypes.data + 8 * LINK_FIELDS
    for i in range(len(ids)):
        row_of(
            get(part, KIND), get(part, DATA) + ids[i] // LANES * get(part, BLOCK_NBYTES), ids[i] % LANES, table[0, COLUMNS],
            out.ctypes.data + i * out.shape[1] * 4,
        )  # fmt: skip
