"""Storing new tokens in a cache's dense parts: the tiles of the recent segment, and the sinks.

They come as the heads of one array, behind the queries, and go where the segments' tables say; nothing is allocated here.
"""

import numpy as np
from numba import types

from . import simd
from .jit import inner, standalone
from .layout import BF16, F32, HEAD, K_CODES, KIND, ROW, TOKEN, V_CODES
from .simd import LANES
from .tables import (
    FIRST_TILE,
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
    V_SIDE,
    get,
    tile_address,
)

VECTOR = 4 * LANES
_TOO_LARGE = np.float32(np.inf)


@inner
def _narrow(kind, source, target):  # type: ignore[no-untyped-def]
    """16 float32 as 16 numbers of a dense kind; True where one that was finite is not any more, or was not before."""
    x = simd.load_f32(source)
    if kind == F32:
        simd.store_f32(target, x)
        return False
    if kind == BF16:
        simd.store_bf16(target, x)
        y = simd.load_bf16(target)
    else:
        simd.store_f16(target, x)
        y = simd.load_f16(target)
    rest = simd.sum_lanes(simd.sub(y, y))  # 0 of finite numbers
    return rest != 0


@inner
def _store_side(source, heads, width, kind, side, base, token_stride, channel_stride, scratch):  # type: ignore[no-untyped-def]
    """The heads of one token, ``width`` float32 each, from ``source`` to ``base``; whether a number was lost."""
    size, lost = 4 if kind == F32 else 2, False
    for head in range(heads):
        at = base + head * get(side, HEAD) + token_stride
        for c in range(0, width, LANES):
            place = source + 4 * (head * width + c)
            if channel_stride == size:
                lost |= _narrow(kind, place, at + c * size)
                continue
            lost |= _narrow(kind, place, scratch)
            for i in range(LANES):
                if kind == F32:
                    simd.store_scalar(at + (c + i) * channel_stride, simd.scalar_at(scratch + 4 * i))
                else:
                    simd.store_short(at + (c + i) * channel_stride, simd.short_at(scratch + 2 * i))
    return lost


@standalone(types.void(types.int64, types.int64))
def append_tokens(call, q):  # type: ignore[no-untyped-def]
    """Store the keys and values of all rows of ``q`` from POSITION on; LOST says whether a number became infinite.

    The last segment has room for all of them, the first for those that are sinks.
    """
    width, heads = get(call, ROW_WIDTH), get(call, N_KV_HEADS)
    own = np.empty(2 * LANES, np.float32)
    scratch = (own.ctypes.data + 63) // 64 * 64
    recent = SEGMENTS + 2 * (get(call, N_SEGMENTS) - 1)
    addresses, geometry = get(call, recent), get(call, recent + 1)
    sink_addresses, sink_geometry = get(call, SEGMENTS), get(call, SEGMENTS + 1)
    shift, lost = get(geometry, TILE_SHIFT), False
    for row in range(get(call, N_QUERIES)):
        position = get(call, POSITION) + row
        k = q + row * get(call, Q_STRIDE) + 4 * width * get(call, N_HEADS)
        v = k + 4 * width * heads
        tile, place = (position >> shift) - get(geometry, FIRST_TILE), position & ((1 << shift) - 1)
        for is_k in (True, False):
            side, x = geometry + 8 * (K_SIDE if is_k else V_SIDE), k if is_k else v
            kind, stride = get(side, KIND), get(side, ROW)
            size = 4 if kind == F32 else 2
            base = tile_address(addresses, tile, K_CODES if is_k else V_CODES, side, 0)
            lost |= _store_side(
                x, heads, width, kind, side, base, place * (size if is_k else stride), stride if is_k else size, scratch
            )
            if position < get(call, N_SINKS):
                side = sink_geometry + 8 * (K_SIDE if is_k else V_SIDE)
                stride = get(side, TOKEN) if is_k else get(side, ROW)
                base = tile_address(sink_addresses, 0, K_CODES if is_k else V_CODES, side, 0)
                lost |= _store_side(x, heads, width, kind, side, base, position * stride, size, scratch)
    simd.store_integer(call + 8 * LOST, lost)
    own[0] = 0
