"""Storing tokens densely in a tile, and quantizing a dense tile. Called once a token and once a tile.

Asymmetric rounding: code = round((x - minimum) / scale), with the scale and minimum *as stored* in float16, so that what
rounding them costs is not paid twice.
"""

import numpy as np
from numpy.typing import NDArray

from . import simd
from .jit import inner, kernel
from .layout import (
    ADDRESSES,
    DENSE_DTYPES,
    GROUP,
    HEAD,
    K_CODES,
    KIND,
    KIND_BITS,
    PER_LANE,
    ROW,
    V_CODES,
    Bytes,
    TileLayout,
    side_numbers,
)
from .simd import LANES
from .tiles import VECTOR, unpack_dense_k, unpack_dense_v

Float32 = NDArray[np.float32]


def store_rows(layout: TileLayout, page: Bytes, first: int, k: Float32, v: Float32) -> None:
    """Write k, v (T, n_kv_heads, head_dim) as the tokens first .. first + T of a dense page.

    Raises:
        OverflowError: a finite value that the page's dtype cannot hold.

    """
    tiles, rows = np.divmod(np.arange(first, first + len(k)), layout.tile)
    narrow_k, narrow_v = narrow(k, layout.k_kind), narrow(v, layout.v_kind)  # both, before either is written
    # Index arrays that stand around a slice put their axis first: (T, n_kv_heads, head_dim), as k is.
    layout.dense_k(page)[:, tiles, : layout.head_dim, rows] = narrow_k
    layout.dense_v(page)[:, tiles, rows, : layout.head_dim] = narrow_v.swapaxes(0, 1)


def narrow(x: Float32, kind: int) -> NDArray[np.generic]:
    """X in the dtype of a dense kind; OverflowError where a finite value would become infinite."""
    dtype = DENSE_DTYPES[kind]
    if dtype == np.float32:
        return x
    with np.errstate(over="ignore"):
        narrowed = x.astype(dtype)
    lost = np.isfinite(x) & ~np.isfinite(narrowed)
    if lost.any():
        raise OverflowError(f"{np.abs(x[lost]).max():.6g} is beyond the largest {dtype.name}")
    return narrowed


def quantize_tile(
    source: Bytes, dense: TileLayout, target: TileLayout, dead: int = 0, page: Bytes | None = None, slot: int = 0
) -> Bytes:
    """A tile in the layout ``target`` from one in the layout ``dense``.

    Args:
        source: a dense page of one tile, all of its tokens present.
        dense, target: layouts of the same heads, head_dim and tile.
        dead: how many of the first tokens no query will ever see (they are sinks); they widen no range by channel.
        page, slot: where to write it; slot 0 of a new page unless given.

    Returns:
        the page.

    Raises:
        OverflowError: a scale or minimum beyond float16. What has been written to the slot then is of no use.

    """
    page = target.empty_page() if page is None else page
    addresses = np.array([*dense.addresses(source, 0), *target.addresses(page, slot)])
    for is_k, wide, side in ((True, dense.k, target.k), (False, dense.v, target.v)):
        if side.kind in DENSE_DTYPES:
            views = (layout.dense_k if is_k else layout.dense_v for layout in (dense, target))
            numbers, kept = (view(x) for view, x in zip(views, (source, page), strict=True))
            same = side.kind == wide.kind
            kept[:, slot] = numbers[:, 0] if same else narrow(numbers[:, 0].astype(np.float32), side.kind)
            continue
        found = _quantize_side(
            addresses, side_numbers(wide), side_numbers(side), KIND_BITS[side.kind], is_k, target.n_kv_heads,
            target.head_dim, target.tile, dead,
        )  # fmt: skip
        if not found:
            raise OverflowError("a scale or minimum is beyond the largest float16, or not a number")
    return page


@inner
def _fill_padding(values, is_k, per_lane, head_dim, width, tile):  # type: ignore[no-untyped-def]
    """Give the channels that only fill up ``width`` the values of the last one, where they share scales with it."""
    if is_k and per_lane:
        for block in range(tile // LANES):
            last = simd.load_f32(values + (block * width + head_dim - 1) * VECTOR)
            for c in range(head_dim, width):
                simd.store_f32(values + (block * width + c) * VECTOR, last)
    elif not is_k and head_dim < width:
        block = values + (width // LANES - 1) * tile * VECTOR
        for token in range(tile):
            last = simd.scalar_at(block + token * VECTOR + (head_dim - 1) % LANES * 4)
            for lane in range(head_dim % LANES, LANES):
                simd.store_scalar(block + token * VECTOR + lane * 4, last)


@inner
def _range_along_sum(values, lanes, steps, group, dead_steps, lows, highs):  # type: ignore[no-untyped-def]
    """Smallest and largest of every ``group`` places along the sum axis, for every lane: [steps/group][lanes]."""
    for g in range(steps // group):
        for block in range(lanes // LANES):
            low, high = simd.splat(np.float32(-np.inf)), simd.splat(np.float32(-np.inf))
            for step in range(max(g * group, dead_steps), (g + 1) * group):
                x = simd.load_f32(values + (block * steps + step) * VECTOR)
                high = simd.maximum(high, x)
                low = simd.maximum(low, simd.sub(simd.splat(np.float32(0)), x))
            simd.store_f32(highs + 4 * (g * lanes + block * LANES), high)
            simd.store_f32(lows + 4 * (g * lanes + block * LANES), simd.sub(simd.splat(np.float32(0)), low))


@inner
def _range_along_lanes(values, lanes, steps, group, dead_lanes, lows, highs):  # type: ignore[no-untyped-def]
    """Smallest and largest of every ``group`` lanes, for every place along the sum axis: [lanes/group][steps]."""
    lowest = np.float32(-np.inf)
    for g in range(lanes // group):
        for step in range(steps):
            low, high = simd.splat(lowest), simd.splat(lowest)
            for lane in range(g * group, (g + 1) * group, LANES):
                x = simd.load_f32(values + (lane // LANES * steps + step) * VECTOR)
                minus = simd.sub(simd.splat(np.float32(0)), x)
                if lane < dead_lanes:
                    x = simd.keep_lanes(x, np.int32(dead_lanes - lane), np.int32(LANES), lowest)
                    minus = simd.keep_lanes(minus, np.int32(dead_lanes - lane), np.int32(LANES), lowest)
                high, low = simd.maximum(high, x), simd.maximum(low, minus)
            simd.store_scalar(highs + 4 * (g * steps + step), simd.max_lanes(high))
            simd.store_scalar(lows + 4 * (g * steps + step), -simd.max_lanes(low))


@inner
def _store_params(lows, highs, count, largest, params, divisors, minima):  # type: ignore[no-untyped-def]
    """Scales and minima as float16 at ``params``, and what codes are made with; False if one is beyond float16."""
    fits = True
    for i in range(0, 4 * count, VECTOR):
        low, high = simd.load_f32(lows + i), simd.load_f32(highs + i)
        simd.store_f16(params + i // 2, simd.div(simd.sub(high, low), simd.splat(np.float32(largest))))
        simd.store_f16(params + 2 * count + i // 2, low)
        simd.store_f32(divisors + i, simd.load_f16(params + i // 2))
        simd.store_f32(minima + i, simd.load_f16(params + 2 * count + i // 2))
    for i in range(0, 4 * count, 4):
        step = simd.scalar_at(divisors + i)
        if not (np.isfinite(step) and np.isfinite(simd.scalar_at(minima + i))):
            fits = False
        if step == 0:
            simd.store_scalar(divisors + i, np.float32(np.inf))  # a single value: its code is 0
    return fits


@inner
def _code(x, divisor, minimum, largest):  # type: ignore[no-untyped-def]
    """The codes, not yet rounded, of the 16 values at address ``x``."""
    code = simd.div(simd.sub(simd.load_f32(x), minimum), divisor)
    return simd.smaller(simd.larger(code, simd.splat(np.float32(0))), simd.splat(np.float32(largest)))


@inner
def _pair(values, block, step, half, lanes, steps, group, per_lane, divisors, minima, largest):  # type: ignore[no-untyped-def]
    """The codes at ``step`` and ``step + half`` of 16 lanes, as pairs."""
    x = values + (block * steps + step) * VECTOR
    if per_lane:
        place = 4 * (step // group * lanes + block * LANES)
        divisor, minimum = simd.load_f32(divisors + place), simd.load_f32(minima + place)
        return simd.pair_codes(
            _code(x, divisor, minimum, largest), _code(x + half * VECTOR, divisor, minimum, largest)
        )  # fmt: skip
    place = 4 * (block * LANES // group * steps + step)
    low = _code(x, simd.splat_at(divisors + place), simd.splat_at(minima + place), largest)
    place += 4 * half
    return simd.pair_codes(
        low, _code(x + half * VECTOR, simd.splat_at(divisors + place), simd.splat_at(minima + place), largest)
    )  # fmt: skip


@inner
def _pack(values, lanes, steps, group, per_lane, divisors, minima, bits, target):  # type: ignore[no-untyped-def]
    """Codes of [lanes/16][steps][16] values in the order that layout.py describes."""
    length = group if per_lane else steps
    half, largest, plane_bits = length // 2, (1 << bits) - 1, 2 if bits == 3 else bits
    a_word = 16 // plane_bits
    tops = target + lanes * steps // 32 // a_word * VECTOR
    words, top_words = simd.zero_words(), simd.zero_words()
    place, top_place = 0, 0
    for block in range(lanes // LANES):
        for first in range(0, steps, length):
            for step in range(first, first + half):
                codes = _pair(values, block, step, half, lanes, steps, group, per_lane, divisors, minima, largest)
                codes = simd.flip_bits(codes, (largest + 1) // 2)  # code - middle, in two's complement
                words = simd.insert_codes(words, codes, 0, plane_bits, place)
                place += plane_bits
                if place == 16:
                    simd.store_words(target, words)
                    words, place, target = simd.zero_words(), 0, target + VECTOR
                if bits == 3:
                    top_words = simd.insert_codes(top_words, codes, 2, 1, top_place)
                    top_place += 1
                    if top_place == 16:
                        simd.store_words(tops, top_words)
                        top_words, top_place, tops = simd.zero_words(), 0, tops + VECTOR


@kernel
def _quantize_side(addresses, dense, coded, bits, is_k, heads, head_dim, tile, dead):  # type: ignore[no-untyped-def]
    """K (or V) of every head of a tile; False if a scale or minimum does not fit float16.

    addresses: of the dense tile and of the coded one, as a segment's table has them. dense, coded: their Sides.
    """
    width = (head_dim + LANES - 1) // LANES * LANES
    lanes, steps = (tile, width) if is_k else (width, tile)
    group, per_lane = coded[GROUP], coded[PER_LANE] != 0
    count = lanes * steps // group
    memory = np.empty(tile * width + 4 * count + LANES * LANES + LANES, np.float32)
    values = (memory.ctypes.data + 63) // 64 * 64
    lows = values + 4 * tile * width
    highs, divisors, minima = lows + 4 * count, lows + 8 * count, lows + 12 * count
    scratch = lows + 16 * count
    which = K_CODES if is_k else V_CODES
    fits = True
    for head in range(heads):
        at = addresses[which] + head * dense[HEAD]
        codes = addresses[ADDRESSES + which] + head * coded[HEAD]
        params = addresses[ADDRESSES + which + 1] + head * coded[HEAD]
        if is_k:
            unpack_dense_k(at, dense[KIND], dense[ROW], np.int64(0), width, tile, 0, tile, values, scratch)
        else:
            unpack_dense_v(at, dense[KIND], dense[ROW], width, tile, 0, tile, values)
        _fill_padding(values, is_k, per_lane, head_dim, width, tile)
        by_channel = per_lane != is_k
        live = dead if by_channel and dead < tile else 0
        if per_lane:
            _range_along_sum(values, lanes, steps, group, live, lows, highs)
        else:
            _range_along_lanes(values, lanes, steps, group, live, lows, highs)
        fits &= _store_params(lows, highs, count, (1 << bits) - 1, params, divisors, minima)
        _pack(values, lanes, steps, group, per_lane, divisors, minima, bits, codes)
    memory[0] = 0  # Numba frees an array after its last mention, and the addresses above do not count as one
    return fits
