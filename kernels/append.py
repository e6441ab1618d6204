"""Storing new tokens in a cache's dense parts: the tiles of the recent segment, and the sinks.

They come as the heads of one array, behind the queries, and go where the segments' tables say; nothing is allocated here.
"""

import numpy as np
from numpy.typing import NDArray

from . import simd
from .hadamard import rotate_head
from .jit import SHARE, do_share, inner, standalone
from .layout import F32, HEAD, K_CODES, KIND, ROW, TOKEN, V_CODES
from .scratch import begin_of, let_go, own_memory
from .simd import LANES
from .tables import (
    APPEND_AS_IS,
    APPENDED,
    DENSE_KIND,
    FIRST_TILE,
    HEAD_DIM,
    K_BLOCK,
    K_SIDE,
    LOST,
    N_HEADS,
    N_KV_HEADS,
    N_QUERIES,
    N_SEGMENTS,
    N_SINKS,
    POSITION,
    Q_STRIDE,
    ROW_WIDTH,
    SEGMENTS,
    TILE_SHIFT,
    V_BLOCK,
    V_SIDE,
    get,
    put,
    tile_address,
)
from .tiles import store_dense

VECTOR = 4 * LANES


@inner
def _narrow(kind, source, target, rest, through):  # type: ignore[no-untyped-def]
    """16 float32 as 16 numbers of a dense kind; returns ``rest`` plus 0, or NaN in the lanes that became infinite.

    Numbers that are kept as float32 only because some do not fit another type (``through``) are those of that type where
    they fit.
    """
    x = simd.load_f32(source)
    if kind == F32:
        if through != F32:
            x = simd.finite_or(store_dense(through, x, target), x)
        simd.store_f32(target, x)
        return rest
    y = store_dense(kind, x, target)
    return simd.add(rest, simd.sub(y, y))


@inner
def _store_token(source, heads, width, kind, side, base, stride, scratch, rest, through):  # type: ignore[no-untyped-def]
    """The heads of one token, ``width`` float32 each, from ``source`` to ``base``, ``stride`` bytes between channels."""
    size = 4 if kind == F32 else 2
    for head in range(heads):
        at = base + head * get(side, HEAD)
        for c in range(0, width, LANES):
            place = source + 4 * (head * width + c)
            if stride == size:
                rest = _narrow(kind, place, at + c * size, rest, through)
                continue
            rest = _narrow(kind, place, scratch, rest, through)
            for i in range(LANES):
                if kind == F32:
                    simd.store_scalar(at + (c + i) * stride, simd.scalar_at(scratch + 4 * i))
                else:
                    simd.store_short(at + (c + i) * stride, simd.short_at(scratch + 2 * i))
    return rest


@inner
def _store_sixteen(source, row_stride, heads, width, kind, side, base, stride, scratch, rest, through):  # type: ignore[no-untyped-def]
    """The same of 16 tokens that lie side by side in the target, each channel in one piece."""
    for head in range(heads):
        for c in range(0, width, LANES):
            for i in range(LANES):
                row = simd.load_f32(source + i * row_stride + 4 * (head * width + c))
                simd.store_f32(scratch + i * VECTOR, row)
            simd.transpose(scratch, scratch)
            for i in range(LANES):
                target = base + head * get(side, HEAD) + (c + i) * stride
                rest = _narrow(kind, scratch + i * VECTOR, target, rest, through)
    return rest


@inner
def _rotate_tokens(call, x, first, stop):  # type: ignore[no-untyped-def]
    """Rotate what is to be rotated of the rows first .. stop, in place: queries and keys together, and values."""
    heads, kv_heads, vector = get(call, N_HEADS), get(call, N_KV_HEADS), 4 * get(call, ROW_WIDTH)
    for row in range(first, stop):
        at = x + row * get(call, Q_STRIDE)
        for head in range(heads + kv_heads if get(call, K_BLOCK) else 0):
            rotate_head(at + head * vector, get(call, HEAD_DIM), get(call, K_BLOCK))
        at += (heads + kv_heads) * vector
        for head in range(kv_heads if get(call, V_BLOCK) else 0):
            rotate_head(at + head * vector, get(call, HEAD_DIM), get(call, V_BLOCK))


@inner
def _store_tokens(call, is_k, x, first, stop, scratch, rest):  # type: ignore[no-untyped-def]
    """Keys or values of the rows first .. stop, which begin at ``x``, to the recent segment and the sinks."""
    width, heads, row_stride = get(call, ROW_WIDTH), get(call, N_KV_HEADS), get(call, Q_STRIDE)
    recent = SEGMENTS + 2 * (get(call, N_SEGMENTS) - 1)
    addresses, geometry = get(call, recent), get(call, recent + 1)
    sink_addresses, sink_geometry = get(call, SEGMENTS), get(call, SEGMENTS + 1)
    shift = get(geometry, TILE_SHIFT)
    side, sink_side = geometry, sink_geometry
    side += 8 * (K_SIDE if is_k else V_SIDE)
    sink_side += 8 * (K_SIDE if is_k else V_SIDE)
    which, kind, stride = K_CODES if is_k else V_CODES, get(side, KIND), get(side, ROW)
    size, through = 4 if kind == F32 else 2, get(call, DENSE_KIND)
    row = first
    while row < stop:
        position, source = get(call, POSITION) + row, x + row * row_stride
        tile, place = (position >> shift) - get(geometry, FIRST_TILE), position & ((1 << shift) - 1)
        base, count = tile_address(addresses, tile, which, side, 0), np.int64(1)
        if not is_k:
            rest = _store_token(source, heads, width, kind, side, base + place * stride, size, scratch, rest, through)
        elif place % LANES == 0 and row + LANES <= stop:
            count = np.int64(LANES)
            rest = _store_sixteen(
                source, row_stride, heads, width, kind, side, base + place * size, stride, scratch, rest, through
            )
        else:
            rest = _store_token(source, heads, width, kind, side, base + place * size, stride, scratch, rest, through)
        for i in range(count if position < get(call, N_SINKS) else 0):
            if position + i < get(call, N_SINKS):
                at = (position + i) * get(sink_side, TOKEN if is_k else ROW)
                rest = _store_token(
                    source + i * row_stride, heads, width, kind, sink_side,
                    tile_address(sink_addresses, 0, which, sink_side, 0) + at, size, scratch, rest, through,
                )  # fmt: skip
        row += count
    return rest


@standalone(SHARE)
def store_share(call, worker, workers, _, x, _1, _2, _3, _4):  # type: ignore[no-untyped-def]
    """The share of one worker in storing the keys and values of all rows of ``x`` from POSITION on.

    What is to be rotated is so first, in place, queries too. The last segment has room for all tokens, the first for those
    that are sinks. LOST is set where a number may have become infinite, or was infinite or NaN before.
    """
    width, heads, rows, position = (
        get(call, ROW_WIDTH), get(call, N_KV_HEADS), get(call, N_QUERIES), get(call, POSITION),
    )  # fmt: skip
    # Shares are cut at multiples of 16 positions, which are stored together
    first = (position + rows * worker // workers + LANES - 1) // LANES * LANES - position
    stop = (position + rows * (worker + 1) // workers + LANES - 1) // LANES * LANES - position
    first, stop = 0 if worker == 0 else min(first, rows), rows if worker == workers - 1 else min(stop, rows)
    memory, rest = own_memory(LANES * VECTOR), simd.splat(np.float32(0))
    scratch = begin_of(memory)
    if get(call, APPENDED) != APPEND_AS_IS:
        _rotate_tokens(call, x, first, stop)
    for is_k in (True, False):
        at = x + 4 * width * (get(call, N_HEADS) + (0 if is_k else heads))
        rest = _store_tokens(call, is_k, at, first, stop, scratch, rest)
    if simd.sum_lanes(rest) != 0:
        put(call, LOST, np.int64(1))
    let_go(memory)


def store_rows_of(call: NDArray[np.int64], x: NDArray[np.float32]) -> None:
    """Store all rows of ``x`` as one worker would that has no others."""
    do_share(store_share.address(), call.ctypes.data, 0, 1, 0, x.ctypes.data, 0, 0, 0, 0)
