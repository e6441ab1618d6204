"""The two products of attention, q . K and p . V, over one tile.

Both are the same product here:

    target[row][lane] += sum over the sum axis of x[row][step] * value[lane][step]

with x = q, lanes = tokens for K, and x = p, lanes = channels for V (see layout.py). There are two routes. The float32
route multiplies with values. The integer route multiplies with codes, and never forms a value: with
value = (code - middle) * scale + centre, scales that lie along the sum axis are folded into x before x is rounded to 16
bits, and scales that lie along the lane axis multiply the finished sum. Centres become one more sum a row. The middle is
half of the codes' range: what rounding x costs is multiplied with numbers around 0 then, not with large ones.

Where x is q and scales lie along the lanes (K by token), 16 bits are not enough: a channel of K that is a thousand times
larger than the others makes the rounding of a small q there larger than the whole rest. So q is kept in two *limbs*, w and
what rounding to w cut off, 31 bits together, and multiplied twice. By channel the fold multiplies q with the channel's
scale first, and p is never multiplied with another one's errors.
"""

from typing import Any

import numpy as np
from numba import types

from . import microkernel, simd
from .fold import next_part
from .jit import inner, standalone
from .layout import BF16, F16, F32, GROUP, KIND, LIMBS, PARTS, PER_LANE, Q2, Q3, Q4, Q8
from .simd import LANES
from .tables import (
    CODES,
    FACTORS,
    FIRST,
    OFFSETS,
    SCALES,
    TARGETS,
    TOPS,
    WHOLE,
    WORDS,
    get,
    lines_ahead,
    row_field,
    row_int,
    tile_address,
)

VECTOR = 4 * LANES  # bytes of a vector of words
PAIRS = -1  # codes that have been taken apart, in the place of a kind


@inner
def _take_apart(kind, codes, third_bits, pairs, target):  # type: ignore[no-untyped-def]
    """All codes of a tile as ``pairs`` vectors of pairs."""
    if kind == Q8:
        microkernel.take_apart8(codes, 0, pairs // 2, target)
    elif kind == Q4:
        microkernel.take_apart4(codes, 0, pairs // 4, target)
    elif kind == Q3:
        microkernel.take_apart3(codes, third_bits, pairs // 8, target)
    elif kind == Q2:
        microkernel.take_apart2(codes, 0, pairs // 8, target)


def _apart(multiply: Any) -> Any:
    """A microkernel as a function of its own: together in one, they take registers and time at its top from each other."""

    @inner
    def apart(  # type: ignore[no-untyped-def]
        a, a_stride, b, b_stride, tops_plane, first_pair, count, rows, vectors, targets, column, fresh, factors,
        offsets, scales, centres, scale_step, largest, ahead
    ):  # fmt: skip
        simd.never_inline()
        multiply(
            a, a_stride, b, b_stride, tops_plane, first_pair, count, rows, vectors, targets, column, fresh, factors,
            offsets, scales, centres, scale_step, largest, ahead,
        )  # fmt: skip

    return apart


_multiply_codes8, _multiply_codes4 = _apart(microkernel.multiply_codes8), _apart(microkernel.multiply_codes4)
_multiply_codes3, _multiply_codes2 = _apart(microkernel.multiply_codes3), _apart(microkernel.multiply_codes2)
_multiply_pairs = _apart(microkernel.multiply_pairs)


@standalone(types.void(*[types.int64] * 14))
def multiply_tiles(  # type: ignore[no-untyped-def]
    table, first_tile, stop_tile, base, lanes, steps, addresses, which, head, side, fresh, column, keep_tops, room
):
    """The integer route, second step: the products of folded rows and the codes of some tiles. All arguments are numbers.

    table, room: a worker's (tables.py), with the lists of the tiles' rows and what ``fold`` made of them. base: the row of
    ``addresses`` that belongs to tile 0 of the split; which: K_CODES or V_CODES. fresh: 1 if the targets are written, not
    added to. column: bytes from a tile's targets to the next one's. keep_tops: 1 if the largest values written to the
    targets of rows that see all of a tile are kept.
    """
    group, parts, per_lane = get(side, GROUP), get(side, PARTS), get(side, PER_LANE)
    limbs, folded = get(side, LIMBS), row_int(table, FIRST, stop_tile - first_tile)
    length, span = (group, lanes) if per_lane else (steps, group)  # of a sum, and the lanes that share it, in each part
    scale_step = VECTOR if per_lane else 0
    for t in range(first_tile, stop_tile):
        nth = t - first_tile
        first, rows = row_int(table, FIRST, nth), row_int(table, FIRST, nth + 1) - row_int(table, FIRST, nth)
        if rows == 0:
            continue
        codes, kind = tile_address(addresses, base + t, which, side, head), get(side, KIND)
        ahead = lines_ahead(room, codes, side, lanes * steps)
        scales = get(room, SCALES) + nth * 8 * parts * (lanes if per_lane else steps)
        targets = row_field(table, TARGETS) + 8 * first
        tops = row_field(table, TOPS) + 8 * first if keep_tops and row_int(table, WHOLE, nth) else 0
        words, factors, offsets = get(room, WORDS), get(room, FACTORS), get(room, OFFSETS)
        a_word = 2 if kind == Q8 else 4 if kind == Q4 else 8  # pairs
        stride, third_bits = steps // 2 // a_word * VECTOR, codes + lanes * steps // 32 // 8 * VECTOR
        if rows >= microkernel.pairs_from():
            _take_apart(kind, codes, third_bits, lanes * steps // 32, get(room, CODES))
            kind, codes, a_word, stride = PAIRS, get(room, CODES), 1, steps // 2 * VECTOR
        for turn in range(parts * limbs):
            part = turn // limbs
            first_step, first_lane = (part * length, 0) if per_lane else (0, part * span)
            pair = first_lane // LANES * (steps // 2) + first_step // 2
            source = codes + first_lane // LANES * stride + first_step // 2 // a_word * VECTOR
            own_scales = scales + 4 * part * lanes
            own_centres = own_scales + 4 * parts * lanes
            own_fresh = 1 if fresh and (turn == 0 or first_lane > 0) else 0
            i = 0
            while i < rows:
                row, count = first + i, microkernel.next_rows(rows - i)
                at = words + 2 * row * length
                common = (
                    length // 2, count, span // LANES, targets + 8 * i, t * column + 4 * first_lane, own_fresh,
                    factors + 4 * row, offsets + 4 * row, own_scales, own_centres, scale_step,
                    tops + 8 * i if tops else 0, ahead,
                )  # fmt: skip
                if kind == Q8:
                    _multiply_codes8(at, 2 * length, source, stride, 0, 0, *common)
                elif kind == Q4:
                    _multiply_codes4(at, 2 * length, source, stride, 0, 0, *common)
                elif kind == Q3:
                    _multiply_codes3(at, 2 * length, source, stride, third_bits, pair, *common)
                elif kind == Q2:
                    _multiply_codes2(at, 2 * length, source, stride, 0, 0, *common)
                else:
                    _multiply_pairs(at, 2 * length, source, stride, 0, 0, *common)
                i += count
            words, factors, offsets = next_part(words, factors, offsets, folded, length)


@standalone(types.void(*[types.int64] * 12))
def multiply_dense(  # type: ignore[no-untyped-def]
    kind, a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, ahead
):
    """``microkernel.multiply_f32`` and so on, for any number of vectors; targets of a row lie side by side."""
    v = 0
    while v < vectors:
        some, at, to = microkernel.next_vectors(vectors - v), b + v * stride, target + v * VECTOR
        if kind == F32:
            microkernel.multiply_f32(a, a_stride, at, step, stride, count, rows, some, to, row_stride, VECTOR, ahead)
        elif kind == F16:
            microkernel.multiply_f16(a, a_stride, at, step, stride, count, rows, some, to, row_stride, VECTOR, ahead)
        elif kind == BF16:
            microkernel.multiply_bf16(a, a_stride, at, step, stride, count, rows, some, to, row_stride, VECTOR, ahead)
        v += some


_multiply_dense = multiply_dense.call


@inner
def _seen(starts, stops, row, origin, tile):  # type: ignore[no-untyped-def]
    """The tokens of a tile that begins at ``origin`` which a row sees: first and last + 1."""
    low = min(max(simd.integer_at(starts + 8 * row) - origin, 0), tile)
    return low, max(min(simd.integer_at(stops + 8 * row) - origin, tile), low)


@inner
def score_floats(  # type: ignore[no-untyped-def]
    dense_address, q, q_stride, first, stop, starts, stops, origin, tile, channels, kind, keys, step, stride, target,
    target_stride, ahead,
):  # fmt: skip
    """The float32 route of q . K: logits of the rows first .. stop against the tile that begins at ``origin``.

    dense_address: of ``multiply_dense``. keys: numbers of a dense ``kind``, 16 tokens together; step and stride: bytes from
    one channel, and from 16 tokens, to the next; ahead: from a line to one that will be needed next. Logits of tokens that
    a row does not see are computed, or not.
    """
    simd.never_inline()
    most = microkernel.most_dense_rows()
    for row in range(first, stop, most):
        count, low, high = min(most, stop - row), tile, 0
        for i in range(count):
            own_low, own_high = _seen(starts, stops, row + i, origin, tile)
            if own_low < own_high:
                low, high = min(low, own_low), max(high, own_high)
        if low >= high:
            continue
        block, blocks = low // LANES, (high + LANES - 1) // LANES - low // LANES
        at = target + row * target_stride + block * VECTOR
        for i in range(count):
            for lane in range(0, blocks * VECTOR, VECTOR):
                simd.store_f32(at + i * target_stride + lane, simd.splat(np.float32(0)))
        _multiply_dense(
            dense_address, kind, q + row * q_stride, q_stride, keys + block * stride, step, stride, channels, count, blocks,
            at, target_stride, ahead,
        )  # fmt: skip


@inner
def _add_values(  # type: ignore[no-untyped-def]
    dense_address, kind, p, p_stride, rows, values, step, stride, low, high, width, out, ahead
):
    """Out += p . V of ``rows`` rows over the tokens low .. high of the tile, in their order."""
    if low < high:
        _multiply_dense(
            dense_address, kind, p + 4 * low, p_stride, values + low * step, step, stride, high - low, rows,
            width // LANES, out, 4 * width, ahead,
        )  # fmt: skip


@inner
def weigh_floats(  # type: ignore[no-untyped-def]
    dense_address, p, p_stride, first, stop, starts, stops, origin, tile, width, kind, values, step, stride, out,
    ahead,
):  # fmt: skip
    """The float32 route of p . V: adds one tile to the rows first .. stop of ``out``.

    dense_address: of ``multiply_dense``. values: numbers of a dense ``kind``, 16 channels together; step and stride: bytes
    from one token, and from 16 channels, to the next. Rows go in groups over the range they share; what only some of them
    see comes before and after, row by row. A token outside a row's range is never touched, so whatever lies there (NaN
    even) cannot reach the row.
    """
    simd.never_inline()
    one, most = np.int64(1), microkernel.most_dense_rows()
    for row in range(first, stop, most):
        count = min(most, stop - row)
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
            _add_values(
                dense_address, kind, own, p_stride, one, values, step, stride, own_low, end, width, own_target, ahead
            )
        if shared:
            _add_values(
                dense_address, kind, weights, p_stride, count, values, step, stride, low, high, width, target, ahead
            )
            for i in range(count):
                _, own_high = _seen(starts, stops, row + i, origin, tile)
                own, own_target = weights + i * p_stride, target + i * width * 4
                _add_values(
                    dense_address, kind, own, p_stride, one, values, step, stride, high, own_high, width, own_target,
                    ahead,
                )  # fmt: skip
