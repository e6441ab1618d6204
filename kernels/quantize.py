"""Quantizing tiles: from the recent segment into the youngest tier, from a tier into the next one. Once a tile and tier.

Asymmetric rounding: code = round((x - minimum) / scale), with the scale and minimum *as stored* in float16, so that what
rounding them costs is not paid twice. They are those of the values' range; or, fitted, those of the line with the least
squares through the values over their codes (over the codes of a part of the range, under 4 bits). More rounds of that, or
smaller parts, lessen the squared error further, but cut off more of the outliers, and attention needs these (docs/log.md).
Where float16 cannot hold the scales of a tile, it is done once more with float32.
"""

import numpy as np
from numpy.typing import NDArray

from . import simd
from .jit import SHARE, do_share, inner, standalone
from .layout import (
    ADDRESSES,
    DENSE_DTYPES,
    F32,
    GROUP,
    HEAD,
    K_CODES,
    KIND,
    KIND_BITS,
    PER_LANE,
    ROW,
    V_CODES,
    TileLayout,
)
from .memory import Bytes
from .scratch import begin_of, let_go, own_memory
from .simd import LANES
from .tables import (
    CALL_FIELDS,
    HEAD_DIM,
    JOB_STARTS,
    JOBS,
    K_SIDE,
    N_KV_HEADS,
    ROW_WIDTH,
    TILE,
    UNPACK_KERNEL,
    V_SIDE,
    get,
    make_geometry,
    put,
)
from .tiles import VECTOR, is_dense, store_dense, unpack_head

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# A job, int64: the tile's addresses in its source and in its target (layout.py, ``K_CODES``; odd addresses of scales are
# those of float32), those of both geometries, how many of the first tokens are dead, whether scales are fitted, and what
# became of K and of V
SOURCE, TARGET = 0, ADDRESSES
SOURCE_GEOMETRY, TARGET_GEOMETRY, DEAD, FITTED = range(2 * ADDRESSES, 2 * ADDRESSES + 4)
# Not 0 for K, one further for V, where float16, or nothing, would do
TOO_WIDE_AT, IMPOSSIBLE_AT = FITTED + 1, FITTED + 3
JOB_FIELDS = FITTED + 5
FINE, TOO_WIDE, IMPOSSIBLE = range(3)

SMALLEST_HALF, SMALLEST_NORMAL = np.float32(2.0**-24), np.float32(2.0**-14)
# Where the largest scale of a head and tile is below, float16's steps of 2^-24 would cost more than 1/64 of it
SMALLEST_SCALE = np.float32(2.0**-18)
# Steps that are not larger have an infinite inverse, or lose digits as subnormal numbers do: their range is left as it is
SMALLEST_FITTED = np.float32(2.0**-120)


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
    source: Bytes,
    dense: TileLayout,
    target: TileLayout,
    dead: int = 0,
    page: Bytes | None = None,
    slot: int = 0,
    fitted: bool = False,
) -> Bytes:
    """A tile in the layout ``target`` from one in the layout ``dense`` of the same heads, head_dim and tile.

    Args:
        source: a page of one tile, all of its tokens present.
        dense, target: layouts; despite its name, ``dense`` may be one of codes.
        dead: how many of the first tokens no query will ever see (they are sinks); they widen no range by channel.
        page, slot: where to write it; slot 0 of a new page unless given.
        fitted: whether scales and minima of codes under 8 bits are fitted, or those of the range.

    Returns:
        the page.

    Raises:
        OverflowError: numbers, or scales, that the target cannot hold. What has been written to the slot is of no use then.

    """
    page = target.empty_page() if page is None else page
    geometries = [make_geometry(x.tile, 0, x.width, x.k, x.v) for x in (dense, target)]
    addresses = *dense.addresses(source, 0), *target.addresses(page, slot), *(x.ctypes.data for x in geometries)
    jobs = np.array([[*addresses, dead, fitted, 0, 0, 0, 0]])
    quantize_jobs(jobs, target)
    if jobs[0, TOO_WIDE_AT:].any():
        raise OverflowError("a number or scale is beyond what the format can hold, or not a number")
    return page


def quantize_jobs(jobs: Int64, layout: TileLayout) -> None:
    """Do jobs, int64 (n, JOB_FIELDS), one after the other; the layout is that of the targets."""
    call = np.zeros(CALL_FIELDS, np.int64)
    call[N_KV_HEADS], call[ROW_WIDTH], call[HEAD_DIM] = layout.n_kv_heads, layout.width, layout.head_dim
    call[JOBS], call[JOB_STARTS + 1], call[UNPACK_KERNEL] = jobs.ctypes.data, len(jobs), unpack_head.address()
    do_share(quantize_share.address(), call.ctypes.data, 0, 1, 0, 0, 0, 0, 0, 0)


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
def _part(bits):  # type: ignore[no-untyped-def]
    """The part of the range that fitting begins with, best for attention of those tried (docs/log.md)."""
    return np.float32(0.85 if bits == 2 else 0.95 if bits == 3 else 1)


@inner
def _line(n, c, cc, y, yc, step, start):  # type: ignore[no-untyped-def]
    """Slope and value at 0 of the line with the least squares through n values; where there is none, those given.

    c, cc, y, yc: the sums of the codes, of their squares, of the values, of their products.
    """
    det = n * cc - c * c
    slope = (n * yc - c * y) / det
    if det > 0 and slope > 0 and np.isfinite(slope):
        return slope, (y - slope * c) / n
    return step, start


@inner
def _fit_along_lanes(values, lanes, steps, group, dead_lanes, bits, lows, highs, scratch):  # type: ignore[no-untyped-def]
    """Move the ranges ``lows`` .. ``highs`` of every ``group`` lanes to those of the best line over the codes of a part."""
    most, zero = np.float32((1 << bits) - 1), simd.splat(np.float32(0))
    for g in range(lanes // group):
        first = g * group
        dead = min(max(dead_lanes - first, 0), group)
        for at in range(steps):
            place = 4 * (g * steps + at)
            low, high = simd.scalar_at(lows + place), simd.scalar_at(highs + place)
            step = (high - low) * _part(bits) / most
            start = (high - low) * (np.float32(1) - _part(bits)) / np.float32(2)  # from ``low`` on
            if not (step > SMALLEST_FITTED and np.isfinite(step)):
                continue
            inverse, from_low = simd.splat(np.float32(1) / step), simd.splat(-start / step)
            c, cc, y, yc = zero, zero, zero, zero
            for lane in range(first + dead // LANES * LANES, first + group, LANES):
                x = simd.sub(simd.load_f32(values + (lane // LANES * steps + at) * VECTOR), simd.splat(low))
                code = simd.rounded(simd.smaller(simd.larger(simd.fma(x, inverse, from_low), zero), simd.splat(most)))
                if lane - first < dead:
                    x = simd.keep_lanes(x, np.int32(dead - (lane - first)), np.int32(LANES), np.float32(0))
                    code = simd.keep_lanes(code, np.int32(dead - (lane - first)), np.int32(LANES), np.float32(0))
                c, y = simd.add(c, code), simd.add(y, x)
                cc, yc = simd.fma(code, code, cc), simd.fma(code, x, yc)
            simd.store_f32(scratch, c)
            simd.store_f32(scratch + VECTOR, cc)
            simd.store_f32(scratch + 2 * VECTOR, y)
            simd.store_f32(scratch + 3 * VECTOR, yc)
            simd.store_f32(scratch, simd.sum_four(scratch))
            step, start = _line(
                np.float32(group - dead), simd.scalar_at(scratch), simd.scalar_at(scratch + 16),
                simd.scalar_at(scratch + 32), simd.scalar_at(scratch + 48), step, start,
            )  # fmt: skip
            simd.store_scalar(lows + place, low + start)
            simd.store_scalar(highs + place, low + start + most * step)


@inner
def _fit_along_sum(values, lanes, steps, group, dead_steps, bits, lows, highs, scratch):  # type: ignore[no-untyped-def]
    """The same for every ``group`` places along the sum axis."""
    most, zero = simd.splat(np.float32((1 << bits) - 1)), simd.splat(np.float32(0))
    part, margin = simd.splat(_part(bits)), simd.splat((np.float32(1) - _part(bits)) / np.float32(2))
    for g in range(steps // group):
        first = max(g * group, dead_steps)
        n = np.float32((g + 1) * group - first)
        for block in range(lanes // LANES):
            place = 4 * (g * lanes + block * LANES)
            low = simd.load_f32(lows + place)
            span = simd.sub(simd.load_f32(highs + place), low)
            step, start = simd.div(simd.mul(span, part), most), simd.mul(span, margin)
            c, cc, y, yc = zero, zero, zero, zero
            for at in range(first, (g + 1) * group):
                x = simd.sub(simd.load_f32(values + (block * steps + at) * VECTOR), low)
                code = simd.rounded(simd.smaller(simd.larger(simd.div(simd.sub(x, start), step), zero), most))
                c, y = simd.add(c, code), simd.add(y, x)
                cc, yc = simd.fma(code, code, cc), simd.fma(code, x, yc)
            for i, sums in enumerate((step, start, c, cc, y, yc)):
                simd.store_f32(scratch + i * VECTOR, sums)
            for lane in range(0, VECTOR, 4):
                own, bottom = scratch + lane, simd.scalar_at(lows + place + lane)
                slope, value = simd.scalar_at(own), simd.scalar_at(own + VECTOR)
                if slope > SMALLEST_FITTED and np.isfinite(slope):
                    slope, value = _line(
                        n, simd.scalar_at(own + 2 * VECTOR), simd.scalar_at(own + 3 * VECTOR),
                        simd.scalar_at(own + 4 * VECTOR), simd.scalar_at(own + 5 * VECTOR), slope, value,
                    )  # fmt: skip
                    simd.store_scalar(lows + place + lane, bottom + value)
                    simd.store_scalar(highs + place + lane, bottom + value + np.float32((1 << bits) - 1) * slope)


@inner
def _store_params(lows, highs, count, largest, params, divisors, minima):  # type: ignore[no-untyped-def]
    """Scales and minima at ``params``, and what codes are made with: FINE, or why not.

    As float16; where ``params`` is odd, as float32, one byte before. In the steps of float16's smallest numbers a scale is
    rounded up: no value then lies beyond the last code.
    """
    wide, largest_step, found = params & 1, np.float32(0), FINE
    for i in range(0, 4 * count, VECTOR):
        low, high = simd.load_f32(lows + i), simd.load_f32(highs + i)
        step = simd.div(simd.sub(high, low), simd.splat(np.float32(largest)))
        simd.store_f32(divisors + i, step)
        simd.store_f32(minima + i, low)
        largest_step = max(largest_step, simd.max_lanes(step))
        if wide:
            simd.store_f32(params - 1 + i, step)
            simd.store_f32(params - 1 + 4 * count + i, low)
            continue
        for at in range(divisors + i, divisors + i + VECTOR, 4):
            if np.float32(0) < simd.scalar_at(at) < SMALLEST_NORMAL:
                simd.store_scalar(at, np.ceil(simd.scalar_at(at) / SMALLEST_HALF) * SMALLEST_HALF)
        simd.store_f16(params + i // 2, simd.load_f32(divisors + i))
        simd.store_f16(params + 2 * count + i // 2, low)
        simd.store_f32(divisors + i, simd.load_f16(params + i // 2))
        simd.store_f32(minima + i, simd.load_f16(params + 2 * count + i // 2))
    if not wide and np.float32(0) < largest_step < SMALLEST_SCALE:
        found = TOO_WIDE
    for i in range(0, 4 * count, 4):
        step, minimum = simd.scalar_at(divisors + i), simd.scalar_at(minima + i)
        if not (np.isfinite(step) and np.isfinite(minimum)):
            low, high = simd.scalar_at(lows + i), simd.scalar_at(highs + i)
            found = max(found, TOO_WIDE if not wide and np.isfinite(high - low) else IMPOSSIBLE)
        if step == 0:
            simd.store_scalar(divisors + i, np.float32(np.inf))  # a single value: its code is 0
    return found


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


_unpack = unpack_head.call


@inner
def _store_dense(values, lanes, steps, kind, row_stride, target):  # type: ignore[no-untyped-def]
    """Values [lanes/16][steps][16] as numbers, ``row_stride`` bytes from one step to the next.

    FINE, or IMPOSSIBLE where a finite one has become infinite. What was infinite or NaN before keeps its place.
    """
    size, lost = 4 if kind == F32 else 2, simd.splat(np.float32(0))
    for block in range(lanes // LANES):
        for step in range(steps):
            at = target + step * row_stride + block * LANES * size
            x = simd.load_f32(values + (block * steps + step) * VECTOR)
            y = store_dense(kind, x, at)
            lost = simd.larger(simd.sub(x, y), lost)  # infinite where y has become so, NaN, and dropped, where x was so
            lost = simd.larger(simd.sub(y, x), lost)
    return IMPOSSIBLE if np.isinf(simd.max_lanes(lost)) else FINE


@inner
def _quantize_head(unpack, job, is_k, head, head_dim, tile, memory):  # type: ignore[no-untyped-def]
    """K (or V) of one head of a tile: FINE, or why not. ``unpack``: where ``unpack_head`` is; ``memory``: room for it."""
    width = (head_dim + LANES - 1) // LANES * LANES
    lanes, steps = (tile, width) if is_k else (width, tile)
    wide, coded = get(job, SOURCE_GEOMETRY), get(job, TARGET_GEOMETRY)
    wide += 8 * (K_SIDE if is_k else V_SIDE)
    coded += 8 * (K_SIDE if is_k else V_SIDE)
    which = K_CODES if is_k else V_CODES
    at, at_params = get(job, SOURCE + which), get(job, SOURCE + which + 1)
    codes, params = get(job, TARGET + which), get(job, TARGET + which + 1)
    at += head * get(wide, HEAD)
    at_params += head * get(wide, HEAD)
    codes += head * get(coded, HEAD)
    params += head * get(coded, HEAD)
    values, lows = memory, memory + 4 * tile * width
    scales = lows + 2 * tile * width  # of the source, as float32, behind room for its codes
    _unpack(unpack, np.int64(is_k), wide, at, at_params, width, tile, np.int64(0), tile, lows, scales, values)
    kind = get(coded, KIND)
    if is_dense(kind):
        return _store_dense(values, lanes, steps, kind, get(coded, ROW), codes)
    group, per_lane, bits = get(coded, GROUP), get(coded, PER_LANE) != 0, KIND_BITS[kind]
    count = lanes * steps // group
    highs, divisors, minima = lows + 4 * count, lows + 8 * count, lows + 12 * count
    _fill_padding(values, is_k, per_lane, head_dim, width, tile)
    by_channel, dead = per_lane != is_k, get(job, DEAD)
    live = dead if by_channel and dead < tile else 0
    fitted = get(job, FITTED) != 0 and bits < 8
    if per_lane:
        _range_along_sum(values, lanes, steps, group, live, lows, highs)
        if fitted:
            _fit_along_sum(values, lanes, steps, group, live, bits, lows, highs, minima + 4 * count)
    else:
        _range_along_lanes(values, lanes, steps, group, live, lows, highs)
        if fitted:
            _fit_along_lanes(values, lanes, steps, group, live, bits, lows, highs, minima + 4 * count)
    found = _store_params(lows, highs, count, (1 << bits) - 1, params, divisors, minima)
    _pack(values, lanes, steps, group, per_lane, divisors, minima, bits, codes)
    return found


@standalone(SHARE)
def quantize_share(call, worker, workers, nth_round, _, _1, _2, _3, _4):  # type: ignore[no-untyped-def]
    """The share of one worker in the jobs of a round; each head of K and of V is a unit of work."""
    heads, head_dim, width = get(call, N_KV_HEADS), get(call, HEAD_DIM), get(call, ROW_WIDTH)
    first, stop = get(call, JOB_STARTS + nth_round), get(call, JOB_STARTS + nth_round + 1)
    jobs = get(call, JOBS)
    tile = get(get(jobs + 8 * JOB_FIELDS * first, TARGET_GEOMETRY), TILE)
    # Values; then codes as pairs and scales of the source, or ranges, scales and minima of the target
    memory = own_memory(4 * tile * width + 3 * tile * width + 4 * LANES * LANES)
    unpack, room = get(call, UNPACK_KERNEL), begin_of(memory)
    for unit in range(first * 2 * heads + worker, stop * 2 * heads, workers):
        job, side = jobs + 8 * JOB_FIELDS * (unit // (2 * heads)), unit // heads % 2
        found = _quantize_head(unpack, job, side == 0, unit % heads, head_dim, tile, room)
        if found != FINE:
            put(job, (TOO_WIDE_AT if found == TOO_WIDE else IMPOSSIBLE_AT) + side, np.int64(1))
    let_go(memory)
