"""Reading a tile: from any format into a small buffer that stays in the first-level cache.

Codes become pairs of uint16, [lanes/16][pairs][16 lanes], for the integer route. Everything else, and codes on the
float32 route, become float32, [lanes/16][sum axis][16 lanes]: in both, one vector a step of the product that follows (see
products.py). It is done once for all query heads of a KV head and for all queries of a block.
"""

from . import simd
from .jit import inner
from .layout import BF16, F16, F32, Q2, Q3, Q4, Q8
from .simd import LANES

VECTOR = 4 * LANES  # bytes of a vector of words


@inner
def is_dense(kind):  # type: ignore[no-untyped-def]
    """Whether a format holds the numbers themselves."""
    return kind in (F32, F16, BF16)


@inner
def _ask(ahead, vector):  # type: ignore[no-untyped-def]
    """For every third vector that is read, ask for a cache line from ``ahead`` on."""
    if vector % 3 == 0:
        simd.prefetch(ahead + vector // 3 * VECTOR)


@inner
def unpack_codes(base, kind, vectors, target, ahead):  # type: ignore[no-untyped-def]
    """The codes of one head and tile at ``base`` into ``vectors`` vectors of 16 pairs of uint16.

    Asks for a third as many bytes from ``ahead`` on.
    """
    simd.never_inline()
    if kind == Q8:
        for i in range(vectors // 2):
            _ask(ahead, i)
            simd.spread8(base + i * VECTOR, target + 2 * i * VECTOR)
    elif kind == Q4:
        for i in range(vectors // 4):
            _ask(ahead, i)
            simd.spread4(base + i * VECTOR, target + 4 * i * VECTOR)
    elif kind == Q3:
        tops = base + vectors // 8 * VECTOR
        for i in range(vectors // 16):
            _ask(ahead, 3 * i)
            simd.spread3(base + 2 * i * VECTOR, tops + i * VECTOR, target + 16 * i * VECTOR)
    elif kind == Q2:
        for i in range(vectors // 8):
            _ask(ahead, i)
            simd.spread2(base + i * VECTOR, target + 8 * i * VECTOR)


@inner
def unpack_scales(source, count, target):  # type: ignore[no-untyped-def]
    """``count`` scales and as many minima, float16, as float32."""
    for i in range(0, 2 * count, LANES):
        simd.store_f32(target + 4 * i, simd.load_f16(source + 2 * i))


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
def unpack_dense_k(base, kind, row_stride, width, first, stop, target, scratch):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of dense K at ``base`` into ``target`` [tile/16][width][16 tokens].

    Lanes of a block of 16 that lie outside are undefined: nothing may read them. ``scratch`` has room for 256 floats.
    """
    simd.never_inline()
    size = 4 if kind == F32 else 2
    if row_stride == 0:
        for i in range(first // LANES * width, (stop + LANES - 1) // LANES * width):
            simd.store_f32(target + i * VECTOR, _load(kind, base + i * LANES * size))
        return
    for block in range(first // LANES, (stop + LANES - 1) // LANES):
        for c in range(0, width, LANES):
            for i in range(max(first - block * LANES, 0), min(stop - block * LANES, LANES)):
                value = _load(kind, base + (block * LANES + i) * row_stride + c * size)
                simd.store_f32(scratch + i * VECTOR, value)
            simd.transpose(scratch, target + (block * width + c) * VECTOR)


@inner
def unpack_dense_v(base, kind, row_stride, width, tile, first, stop, target):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of dense V at ``base`` into ``target`` [width/16][tile][16 channels]."""
    simd.never_inline()
    size = 4 if kind == F32 else 2
    for token in range(first, stop):
        for c in range(0, width, LANES):
            value = _load(kind, base + token * row_stride + c * size)
            simd.store_f32(target + (c // LANES * tile + token) * VECTOR, value)
