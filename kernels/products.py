"""The two products of attention, q . K and p . V, over one unpacked tile.

Both are the same product here:

    target[row][lane] += sum over the sum axis of x[row][step] * value[lane][step]

with x = q, lanes = tokens for K, and x = p, lanes = channels for V (see layout.py). There are two routes. The float32
route multiplies with values. The integer route multiplies with codes, and never forms a value: with
value = code * scale + minimum, scales that lie along the sum axis are folded into x before x is rounded to 16 bits, and
scales that lie along the lane axis multiply the finished sum. Minima become one more sum a row.
"""

import numpy as np

from . import simd
from .jit import inner
from .layout import GROUP, KIND, PARTS, PER_LANE, Q2, Q4, Q8
from .simd import LANES, ROWS, VECTORS
from .tiles import VECTOR

FOLDED = 16  # rows that are folded together, so that one need not wait for the other's maximum
_LARGEST = 32767.0  # of a 16-bit factor
_SMALLEST = 1e-33  # rows of smaller numbers count as zeros: 32767 / x would not be a float32


@inner
def _fold_rows(xs, x_offset, scales, scales_offset, minima_offset, rows, count, words, factors, offsets, scratch):  # type: ignore[no-untyped-def]
    """Round x * scale of up to 16 rows to int16 at ``words``, with x * scale ~ word * factor and offset = x . minimum.

    xs, scales: addresses of int64, an address a row. scales_offset: -1 for scales and minima of 1. The pairs are those of
    the codes, (i, i + count/2). ``scratch`` has room for 16 rows of ``count`` floats and 32 + 1 vectors.
    """
    simd.never_inline()
    tops, totals = scratch, scratch + FOLDED * VECTOR
    folded = scratch + 2 * FOLDED * VECTOR
    for r in range(rows):
        row, target = simd.integer_at(xs + 8 * r) + x_offset, folded + 4 * r * count
        scale = simd.integer_at(scales + 8 * r) + scales_offset
        minimum = simd.integer_at(scales + 8 * r) + minima_offset
        top, total = simd.splat(np.float32(0)), simd.splat(np.float32(0))
        for i in range(0, 4 * count, VECTOR):
            value = simd.load_f32(row + i)
            if scales_offset >= 0:
                total = simd.fma(value, simd.load_f32(minimum + i), total)
                value = simd.mul(value, simd.load_f32(scale + i))
            else:
                total = simd.add(value, total)
            simd.store_f32(target + i, value)
            top = simd.larger_magnitude(top, value)
        simd.store_f32(tops + r * VECTOR, top)
        simd.store_f32(totals + r * VECTOR, total)
    largest, total = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for quad in range((rows + 3) // 4):
        largest = simd.replace_fourth(largest, simd.largest_four(tops + 4 * quad * VECTOR), quad)
        total = simd.replace_fourth(total, simd.sum_four(totals + 4 * quad * VECTOR), quad)
    largest = simd.turn_quads(largest)  # now lane r belongs to row r
    simd.store_f32(factors, simd.mul(largest, simd.splat(np.float32(1 / _LARGEST))))
    simd.store_f32(offsets, simd.turn_quads(total))
    simd.store_f32(tops, simd.inverse_above(largest, np.float32(_LARGEST), np.float32(_SMALLEST)))
    half = 2 * count
    for r in range(rows):
        inverse, source, target = simd.splat_at(tops + 4 * r), folded + 4 * r * count, words + r * half
        for i in range(0, half, VECTOR):
            simd.store_pairs(target + i, simd.load_f32(source + i), simd.load_f32(source + half + i), inverse)


@inner
def fold(xs, scales, rows, lanes, steps, side, words, factors, offsets, scratch):  # type: ignore[no-untyped-def]
    """The integer route, first step: round what will be multiplied with codes.

    xs, scales: addresses of int64, the addresses of x and of the scales of the tile it meets, for each of ``rows``; after
    the scales come the minima, as layout.py describes. side: the address of the Side's numbers. words: room for PARTS
    times ``rows`` int16, as many each as a sum has steps, and one vector; factors, offsets: for PARTS times as many floats
    as rows, rounded up to 16; scratch: see ``_fold_rows``.
    """
    simd.never_inline()
    group, parts = simd.integer_at(side + 8 * GROUP), simd.integer_at(side + 8 * PARTS)
    per_lane = simd.integer_at(side + 8 * PER_LANE)
    length = group if per_lane else steps
    for part in range(parts):
        x_offset, own_scales, own_minima = 0, np.int64(-1), np.int64(0)
        if per_lane:
            x_offset = 4 * part * length
        else:
            own_scales, own_minima = 4 * part * steps, 4 * (parts + part) * steps
        for i in range(0, rows, FOLDED):
            _fold_rows(
                xs + 8 * i, x_offset, scales + 8 * i, own_scales, own_minima, min(FOLDED, rows - i), length,
                words + 2 * i * length, factors + 4 * i, offsets + 4 * i, scratch,
            )  # fmt: skip
        words, factors, offsets = _next_part(words, factors, offsets, rows, length)


@inner
def _next_part(words, factors, offsets, rows, length):  # type: ignore[no-untyped-def]
    """Where the folded rows of the next part are."""
    vectors = (rows + FOLDED - 1) // FOLDED * VECTOR
    return words + 2 * rows * length, factors + vectors, offsets + vectors


@inner
def multiply_codes(  # type: ignore[no-untyped-def]
    words, factors, offsets, folded, first, active, rows, lanes, steps, codes, scales, side, fresh, target, target_stride,
    tops, ahead, last, targets,
):  # fmt: skip
    """The integer route, second step: the products of folded rows and the codes of one tile.

    words, factors, offsets: of all ``folded`` rows (see ``fold``), of which those of this tile are ``rows``, from ``first``
    on. active: address of the numbers of these rows, int64. codes: pairs of uint16 [lanes/16][steps/2][16]. fresh: the
    target is written, not added to. tops: 0, or where a vector a row keeps the largest value written. ahead, last: cache
    lines to ask for meanwhile. targets: address of room for 2 * rows int64.
    """
    simd.never_inline()
    group, parts = simd.integer_at(side + 8 * GROUP), simd.integer_at(side + 8 * PARTS)
    per_lane = simd.integer_at(side + 8 * PER_LANE)
    minima = scales + 4 * parts * (lanes if per_lane else steps)
    length, span = (group, lanes) if per_lane else (steps, group)  # of a sum, and the lanes that share it, in each part
    for i in range(rows):
        row = simd.integer_at(active + 8 * i)
        simd.store_integer(targets + 8 * i, target + row * target_stride)
        simd.store_integer(targets + 8 * (rows + i), tops + row * VECTOR)
    top_addresses = targets + 8 * rows if tops else 0
    for part in range(parts):
        first_step, first_lane = (part * length, 0) if per_lane else (0, part * span)
        for lane in range(first_lane, first_lane + span, VECTORS * LANES):
            blocks = min(VECTORS, (first_lane + span - lane) // LANES)
            column = codes + (lane * steps // 32 + first_step // 2) * VECTOR
            place = 4 * (part * lanes + lane)
            lane_scales, lane_minima = (scales + place, minima + place) if per_lane else (0, 0)
            for i in range(0, rows, ROWS):
                row = first + i
                simd.multiply_pairs(
                    words + 2 * row * length, 2 * length, column, steps // 2 * VECTOR, length // 2, min(ROWS, rows - i),
                    blocks, targets + 8 * i, 4 * lane, fresh and first_step == 0, factors + 4 * row,
                    offsets + 4 * row, lane_scales, lane_minima, top_addresses + 8 * i if tops else 0, ahead, last,
                )  # fmt: skip
                ahead += length // 2 * VECTOR
        words, factors, offsets = _next_part(words, factors, offsets, folded, length)


@inner
def packs_directly(kind, rows):  # type: ignore[no-untyped-def]
    """Whether ``multiply_packed`` takes a format: few rows, and codes that lie in one plane."""
    return rows <= ROWS and kind in (Q8, Q4, Q2)


@inner
def multiply_packed(  # type: ignore[no-untyped-def]
    words, factors, offsets, folded, first, active, rows, lanes, steps, codes, scales, side, fresh, target, target_stride,
    tops, ahead, last, sums,
):  # fmt: skip
    """``multiply_codes`` for up to 4 rows, on codes as they are stored. The integer sums are exact: the result is the same.

    sums: room for 16 vectors.
    """
    simd.never_inline()
    group, parts = simd.integer_at(side + 8 * GROUP), simd.integer_at(side + 8 * PARTS)
    per_lane, kind = simd.integer_at(side + 8 * PER_LANE), simd.integer_at(side + 8 * KIND)
    minima = scales + 4 * parts * (lanes if per_lane else steps)
    length, span = (group, lanes) if per_lane else (steps, group)
    a_word = 2 if kind == Q8 else 4 if kind == Q4 else 8
    for part in range(parts):
        first_step, first_lane = (part * length, 0) if per_lane else (0, part * span)
        for lane in range(first_lane, first_lane + span, VECTORS * LANES):
            blocks = min(VECTORS, (first_lane + span - lane) // LANES)
            column = codes + (lane * steps // 32 + first_step // 2) // a_word * VECTOR
            stride = steps // 2 // a_word * VECTOR
            x = words + 2 * first * length
            if kind == Q8:
                simd.sum_packed8(x, 2 * length, column, stride, length // 2, rows, blocks, sums, ahead, last)
            elif kind == Q4:
                simd.sum_packed4(x, 2 * length, column, stride, length // 2, rows, blocks, sums, ahead, last)
            else:
                simd.sum_packed2(x, 2 * length, column, stride, length // 2, rows, blocks, sums, ahead, last)
            ahead += length // 2 * VECTOR
            for i in range(rows):
                row = simd.integer_at(active + 8 * i)
                at, top = target + row * target_stride + 4 * lane, tops + row * VECTOR
                factor, offset = simd.splat_at(factors + 4 * (first + i)), simd.splat_at(offsets + 4 * (first + i))
                largest = simd.splat(np.float32(-np.inf))
                for b in range(blocks):
                    value, shift = simd.load_int32(sums + (i * VECTORS + b) * VECTOR), offset
                    if per_lane:
                        place = 4 * (part * lanes + lane + b * LANES)
                        value = simd.mul(value, simd.load_f32(scales + place))
                        shift = simd.mul(shift, simd.load_f32(minima + place))
                    value = simd.fma(value, factor, shift)
                    if not (fresh and first_step == 0):
                        value = simd.add(simd.load_f32(at + b * VECTOR), value)
                    largest = simd.larger(largest, value)
                    simd.store_f32(at + b * VECTOR, value)
                if tops:
                    simd.store_f32(top, simd.larger(simd.load_f32(top), largest))
        words, factors, offsets = _next_part(words, factors, offsets, folded, length)


@inner
def score_floats(q, q_stride, first, stop, lanes, steps, keys, target, target_stride, ahead, last):  # type: ignore[no-untyped-def]
    """The float32 route of q . K: logits of the rows first .. stop against one tile [lanes/16][steps][16]."""
    simd.never_inline()
    for lane in range(0, lanes, VECTORS * LANES):
        blocks = min(VECTORS, (lanes - lane) // LANES)
        for row in range(first, stop, ROWS):
            count = min(ROWS, stop - row)
            for i in range(count):
                for b in range(blocks):
                    at = target + (row + i) * target_stride + 4 * lane + b * VECTOR
                    simd.store_f32(at, simd.splat(np.float32(0)))
            simd.multiply_floats(
                q + row * q_stride, q_stride, keys + lane // LANES * steps * VECTOR, steps * VECTOR, steps, count,
                blocks, target + row * target_stride + 4 * lane, target_stride, VECTOR, ahead, last,
            )  # fmt: skip
            ahead += steps * VECTOR


@inner
def _add_values(p, p_stride, rows, values, low, high, tile, width, out, ahead, last):  # type: ignore[no-untyped-def]
    """Out += p . V of ``rows`` rows over the tokens low .. high of the tile, in their order."""
    simd.never_inline()
    if low < high:
        for c in range(0, width, VECTORS * LANES):
            blocks = min(VECTORS, (width - c) // LANES)
            simd.multiply_floats(
                p + 4 * low, p_stride, values + (c // LANES * tile + low) * VECTOR, tile * VECTOR, high - low, rows,
                blocks, out + 4 * c, 4 * width, VECTOR, ahead, last,
            )  # fmt: skip
            ahead += (high - low) * VECTOR
    return ahead


@inner
def _seen(starts, stops, row, origin, tile):  # type: ignore[no-untyped-def]
    """The tokens of a tile that begins at ``origin`` which a row sees: first and last + 1."""
    low = min(max(simd.integer_at(starts + 8 * row) - origin, 0), tile)
    return low, max(min(simd.integer_at(stops + 8 * row) - origin, tile), low)


@inner
def weigh_floats(  # type: ignore[no-untyped-def]
    p, p_stride, first, stop, starts, stops, origin, tile, width, values, out, ahead, last
):
    """The float32 route of p . V: adds one tile [width/16][tile][16] to the rows first .. stop of ``out``.

    Rows go in groups of 4 over the range they share; what only some of them see comes before and after, row by row. A
    token outside a row's range is never touched, so whatever lies there (NaN even) cannot reach the row.
    """
    simd.never_inline()
    one = np.int64(1)
    for row in range(first, stop, ROWS):
        count = min(ROWS, stop - row)
        low, high = 0, tile
        for i in range(count):
            own_low, own_high = _seen(starts, stops, row + i, origin, tile)
            low, high = max(low, own_low), min(high, own_high)
        shared = low < high
        weights, target = p + row * p_stride + 4 * origin, out + row * width * 4
        for i in range(count):
            own_low, own_high = _seen(starts, stops, row + i, origin, tile)
            end = low if shared else own_high
            own, own_target = weights + i * p_stride, target + i * width * 4
            ahead = _add_values(own, p_stride, one, values, own_low, end, tile, width, own_target, ahead, last)
        if shared:
            ahead = _add_values(weights, p_stride, count, values, low, high, tile, width, target, ahead, last)
            for i in range(count):
                _, own_high = _seen(starts, stops, row + i, origin, tile)
                own, own_target = weights + i * p_stride, target + i * width * 4
                ahead = _add_values(own, p_stride, one, values, high, own_high, tile, width, own_target, ahead, last)
