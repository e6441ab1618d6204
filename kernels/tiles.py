"""Reading a tile into a small buffer of float32 that stays in the first-level cache, [lanes/16][sum axis][16 lanes].

Codes with precision="f32" go that way, and dense numbers where many rows share the work or K is a plain array. Otherwise
the microkernels read a tile as it is stored.
"""

import numpy as np
from numba import types

from . import simd
from .jit import inner, standalone
from .layout import BF16, F16, F32, GROUP, KIND, PARTS, PER_LANE, Q2, Q3, Q4, Q8, ROW, TOKEN
from .simd import LANES

VECTOR = 4 * LANES  # bytes of a vector of words


@inner
def is_dense(kind):  # type: ignore[no-untyped-def]
    """Whether a format holds the numbers themselves."""
    return kind in (F32, F16, BF16)


@inner
def middle_code(kind):  # type: ignore[no-untyped-def]
    """The code in the middle of a format's range, which products are taken around (see products.py)."""
    return np.float32(128 if kind == Q8 else 8 if kind == Q4 else 4 if kind == Q3 else 2)


@inner
def unpack_codes(base, kind, vectors, target):  # type: ignore[no-untyped-def]
    """The codes of one head and tile at ``base`` into ``vectors`` vectors of 16 pairs of uint16."""
    simd.never_inline()
    if kind == Q8:
        for i in range(vectors // 2):
            simd.spread8(base + i * VECTOR, target + 2 * i * VECTOR)
    elif kind == Q4:
        for i in range(vectors // 4):
            simd.spread4(base + i * VECTOR, target + 4 * i * VECTOR)
    elif kind == Q3:
        tops = base + vectors // 8 * VECTOR
        for i in range(vectors // 16):
            simd.spread3(base + 2 * i * VECTOR, tops + i * VECTOR, target + 16 * i * VECTOR)
    elif kind == Q2:
        for i in range(vectors // 8):
            simd.spread2(base + i * VECTOR, target + 8 * i * VECTOR)


@inner
def unpack_scales(source, count, middle, target):  # type: ignore[no-untyped-def]
    """``count`` scales as float32, and then as many centres: the value of the code ``middle``.

    They are stored as float16; where ``source`` is odd, as float32, one byte before.
    """
    if source & 1:
        for i in range(0, 4 * count, VECTOR):
            scale, minimum = simd.load_f32(source - 1 + i), simd.load_f32(source - 1 + 4 * count + i)
            simd.store_f32(target + i, scale)
            simd.store_f32(target + 4 * count + i, simd.fma(scale, simd.splat(middle), minimum))
        return
    for i in range(0, count, LANES):
        scale, minimum = simd.load_f16(source + 2 * i), simd.load_f16(source + 2 * (count + i))
        simd.store_f32(target + 4 * i, scale)
        simd.store_f32(target + 4 * (count + i), simd.fma(scale, simd.splat(middle), minimum))


@inner
def codes_to_floats(codes, scales, lanes, steps, group, parts, per_lane, target):  # type: ignore[no-untyped-def]
    """Values, code * scale + minimum, of pairs [lanes/16][steps/2][16] into float32 [lanes/16][steps][16]."""
    simd.never_inline()
    minima = scales + 4 * parts * (lanes if per_lane else steps)
    half = (group if per_lane else steps) // 2
    for block in range(lanes // LANES):
        for i in range(steps // 2):
            step = i // half * 2 * half + i % half
            pair = codes + (block * steps // 2 + i) * VECTOR
            at = target + (block * steps + step) * VECTOR
            if per_lane:
                place = 4 * (step // group * lanes + block * LANES)
                scale, minimum = simd.load_f32(scales + place), simd.load_f32(minima + place)
                simd.store_f32(at, simd.fma(simd.load_low(pair), scale, minimum))
                simd.store_f32(at + half * VECTOR, simd.fma(simd.load_high(pair), scale, minimum))
            else:
                place = 4 * (block * LANES // group * steps + step)
                low = simd.fma(simd.load_low(pair), simd.splat_at(scales + place), simd.splat_at(minima + place))
                place += 4 * half
                high = simd.fma(simd.load_high(pair), simd.splat_at(scales + place), simd.splat_at(minima + place))
                simd.store_f32(at, low)
                simd.store_f32(at + half * VECTOR, high)


@inner
def _load(kind, address):  # type: ignore[no-untyped-def]
    """16 dense numbers of any kind, as float32."""
    if kind == F32:
        return simd.load_f32(address)
    if kind == F16:
        return simd.load_f16(address)
    return simd.load_bf16(address)


@inner
def unpack_dense_k(base, kind, step, token_stride, width, tile, first, stop, target, scratch):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of dense K at ``base`` into ``target`` [tile/16][width][16 tokens].

    step: bytes from one channel to the next; token_stride: from one token to the next, or 0 where 16 tokens lie side by
    side, as in tiles. Lanes of a block of 16 that lie outside are undefined: nothing may read them. ``scratch`` has room
    for 256 floats.
    """
    simd.never_inline()
    size = 4 if kind == F32 else 2
    for block in range(first // LANES, (stop + LANES - 1) // LANES):
        if token_stride == 0:
            for c in range(width):
                value = _load(kind, base + c * step + block * LANES * size)
                simd.store_f32(target + (block * width + c) * VECTOR, value)
            continue
        for c in range(0, width, LANES):
            for i in range(max(first - block * LANES, 0), min(stop - block * LANES, LANES)):
                value = _load(kind, base + (block * LANES + i) * token_stride + c * size)
                simd.store_f32(scratch + i * VECTOR, value)
            simd.transpose(scratch, target + (block * width + c) * VECTOR)


@inner
def unpack_dense_v(base, kind, step, width, tile, first, stop, target):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of dense V at ``base``, ``step`` bytes apart, into ``target`` [width/16][tile][16 channels]."""
    simd.never_inline()
    size = 4 if kind == F32 else 2
    for token in range(first, stop):
        for c in range(0, width, LANES):
            value = _load(kind, base + token * step + c * size)
            simd.store_f32(target + (c // LANES * tile + token) * VECTOR, value)


@inner
def store_dense(kind, x, target):  # type: ignore[no-untyped-def]
    """16 float32 as 16 numbers of a dense kind; returns what they are then, as float32."""
    if kind == F32:
        simd.store_f32(target, x)
        return x
    if kind == BF16:
        simd.store_bf16(target, x)
        return simd.load_bf16(target)
    simd.store_f16(target, x)
    return simd.load_f16(target)


@standalone(types.void(*[types.int64] * 11))
def unpack_head(is_k, side, codes, params, width, tile, first, stop, pairs, scales, values):  # type: ignore[no-untyped-def]
    """K (where ``is_k``) or V of one head of a tile of any format as float32; of dense formats tokens first .. stop only.

    side: the Side's numbers (layout.py). pairs, scales: room for the codes as pairs, and for scales and minima.
    """
    kind, row = simd.integer_at(side + 8 * KIND), simd.integer_at(side + 8 * ROW)
    if is_dense(kind):
        if is_k:
            token = simd.integer_at(side + 8 * TOKEN)
            unpack_dense_k(codes, kind, row, token, width, tile, first, stop, values, scales)
        else:
            unpack_dense_v(codes, kind, row, width, tile, first, stop, values)
        return
    lanes, steps = (tile, width) if is_k else (width, tile)
    per_lane, parts = simd.integer_at(side + 8 * PER_LANE), simd.integer_at(side + 8 * PARTS)
    unpack_scales(params, parts * (lanes if per_lane else steps), np.float32(0), scales)
    unpack_codes(codes, kind, lanes * steps // 32, pairs)
    codes_to_floats(pairs, scales, lanes, steps, simd.integer_at(side + 8 * GROUP), parts, per_lane, values)
