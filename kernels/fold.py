"""Folding: rounding what will be multiplied with codes, q or p, to 16 bits, with the codes' scales multiplied in.

See products.py for what is folded and why. Rows are folded in fours whose numbers stay in registers, where the CPU has
enough of them and a row has 32, 64 or 128 numbers; else with a pass through memory. Both compute a row alike.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from . import simd
from .jit import inner
from .layout import GROUP, LIMBS, PARTS, PER_LANE
from .microkernel import _choose, _number
from .simd import (
    _F32,
    _V_F32,
    _V_I32,
    LANES,
    _const,
    _fma,
    _larger,
    _larger_magnitude,
    _load,
    _operation,
    _pair_factors,
    _pointer,
    _reduce_four,
    cpu_has,
)

VECTOR = 4 * LANES
FOLDED = 16  # rows that are folded together, so that one need not wait for the other's maximum
_LARGEST = 32767.0  # of a 16-bit factor
_LIMB = 65534.0  # what the second limb is the finer by: the rest of rounding is at most 1/2
_SMALLEST = 1e-33  # rows of smaller numbers count as zeros: 32767 / x would not be a float32
_BLOCKS = {32: 4, 64: 4, 128: 2}  # rows whose numbers fit the registers together, by numbers of a row


@_operation(types.boolean, types.int64)
def folds_in_registers(context: Any, builder: Any, count: Any) -> Any:
    """Whether ``fold_block`` folds rows of so many numbers."""
    found = ir.Constant(ir.IntType(1), 0)
    for length in _BLOCKS if cpu_has(context, "avx512f") else ():
        found = builder.or_(found, builder.icmp_signed("==", count, _number(count, length)))
    return found


@_operation(types.int64, types.int64)
def block_rows(context: Any, builder: Any, count: Any) -> Any:
    """How many rows of so many numbers a call of ``fold_block`` takes at most."""
    return builder.select(
        builder.icmp_signed("==", count, _number(count, 128)), _number(count, _BLOCKS[128]), _number(count, 4)
    )


@_operation(types.void, *[types.intp] * 10)
def fold_block(context: Any, builder: Any, *args: Any) -> None:
    """``_fold_rows`` of up to ``block_rows`` rows whose scales lie along the sum.

    Arguments: xs, an offset of all of them, scales, the offsets of the scales and of the centres in each, rows, count,
    words, factors, offsets. ``block_rows`` factors and offsets are written, whatever the number of rows.
    """
    xs, x_offset, scales, scales_offset, centres_offset, rows, count, words, factors, offsets = args
    if not cpu_has(context, "avx512f"):
        return
    last = builder.sub(rows, _number(rows, 1))
    for length in _choose(builder, count, iter(_BLOCKS)):
        n_rows, n_vectors = _BLOCKS[length], length // LANES
        folded, tops, totals, places = [], [], [], []
        for r in range(n_rows):
            own = _number(rows, r)
            own = builder.select(
                builder.icmp_signed("<", own, last), own, last
            )  # the last row again, where there is none
            places.append(own)
            eight = builder.mul(own, _number(own, 8))
            x = builder.add(_load(builder, builder.add(xs, eight), xs.type), x_offset)
            base = _load(builder, builder.add(scales, eight), xs.type)
            scale, centre = builder.add(base, scales_offset), builder.add(base, centres_offset)
            top, total, numbers = _const(_V_F32, 0.0), _const(_V_F32, 0.0), []
            for v in range(n_vectors):
                at = _number(x, VECTOR * v)
                value = _load(builder, builder.add(x, at), _V_F32)
                total = _fma(context, builder, value, _load(builder, builder.add(centre, at), _V_F32), total)
                value = builder.fmul(value, _load(builder, builder.add(scale, at), _V_F32))
                top = _larger_magnitude(context, builder, top, value)
                numbers.append(value)
            folded.append(numbers)
            tops.append(top)
            totals.append(total)
        tops, totals = (x + x[-1:] * (4 - n_rows) for x in (tops, totals))
        largest = _reduce_four(builder, tops, lambda a, b: _larger(builder, a, b))
        total = _reduce_four(builder, totals, builder.fadd)
        some, none = ir.VectorType(_F32, n_rows), ir.Constant(_V_F32, ir.Undefined)
        order = ir.Constant(ir.VectorType(ir.IntType(32), n_rows), [4 * r for r in range(n_rows)])
        # As many lanes as rows from here on: to divide 16 takes four times as many cycles
        largest, total = (builder.shuffle_vector(value, none, order) for value in (largest, total))
        factor = builder.fmul(largest, _const(some, float(np.float32(1 / _LARGEST))))
        for value, target in ((factor, factors), (total, offsets)):
            builder.store(value, _pointer(builder, target, some)).align = 4
        large = builder.fcmp_ordered(">", largest, _const(some, float(np.float32(_SMALLEST))))
        inverse = builder.select(large, builder.fdiv(_const(some, _LARGEST), largest), _const(some, 0.0))
        for r, own in enumerate(places):
            alone = builder.shuffle_vector(inverse, ir.Constant(some, ir.Undefined), _const(_V_I32, r))
            target = builder.add(words, builder.mul(own, _number(own, 2 * length)))
            for v in range(n_vectors // 2):
                pairs = _pair_factors(context, builder, folded[r][v], folded[r][v + n_vectors // 2], alone)
                to = builder.add(target, _number(target, VECTOR * v))
                builder.store(pairs, _pointer(builder, to, _V_I32)).align = 4


@inner
def next_part(words, factors, offsets, rows, length):  # type: ignore[no-untyped-def]
    """Where the folded rows of the next part, or of the next limb, are."""
    vectors = (rows + FOLDED - 1) // FOLDED * VECTOR
    return words + 2 * rows * length, factors + vectors, offsets + vectors


@inner
def _fold_rows(  # type: ignore[no-untyped-def]
    xs, x_offset, scales, scales_offset, centres_offset, rows, count, words, factors, offsets, scratch
):
    """Round x * scale of up to 16 rows to int16 at ``words``, with x * scale ~ word * factor and offset = x . centre.

    xs, scales: addresses of int64, an address a row. scales_offset: -1 for scales and centres of 1. The pairs are those of
    the codes, (i, i + count/2). ``scratch`` has room for 16 rows of ``count`` floats and 32 + 1 vectors; what the rows were
    multiplied with, 16 floats, is at its beginning afterwards.
    """
    simd.never_inline()
    tops, sums = scratch, scratch + FOLDED * VECTOR
    folded = scratch + 2 * FOLDED * VECTOR
    for r in range(rows):
        row, target = simd.integer_at(xs + 8 * r) + x_offset, folded + 4 * r * count
        scale = simd.integer_at(scales + 8 * r) + scales_offset
        centre = simd.integer_at(scales + 8 * r) + centres_offset
        top, total = simd.splat(np.float32(0)), simd.splat(np.float32(0))
        for i in range(0, 4 * count, VECTOR):
            value = simd.load_f32(row + i)
            if scales_offset >= 0:
                total = simd.fma(value, simd.load_f32(centre + i), total)
                value = simd.mul(value, simd.load_f32(scale + i))
            else:
                total = simd.add(value, total)
            simd.store_f32(target + i, value)
            top = simd.larger_magnitude(top, value)
        simd.store_f32(tops + r * VECTOR, top)
        simd.store_f32(sums + r * VECTOR, total)
    largest, total = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for quad in range((rows + 3) // 4):
        largest = simd.replace_fourth(largest, simd.largest_four(tops + 4 * quad * VECTOR), quad)
        total = simd.replace_fourth(total, simd.sum_four(sums + 4 * quad * VECTOR), quad)
    largest = simd.turn_quads(largest)  # now lane r belongs to row r
    simd.store_f32(factors, simd.mul(largest, simd.splat(np.float32(1 / _LARGEST))))
    simd.store_f32(offsets, simd.turn_quads(total))
    simd.store_f32(tops, simd.inverse_above(largest, np.float32(_LARGEST), np.float32(_SMALLEST)))
    half = 2 * count
    for r in range(rows):
        inverse, source, target = simd.splat_at(tops + 4 * r), folded + 4 * r * count, words + r * half
        for i in range(0, half, VECTOR):
            pairs = simd.pair_factors(simd.load_f32(source + i), simd.load_f32(source + half + i), inverse)
            simd.store_words(target + i, pairs)


@inner
def _fold_rest(xs, x_offset, rows, count, factors, words, own_factors, own_offsets):  # type: ignore[no-untyped-def]
    """The second limb of what ``_fold_rows`` rounded (with scales of 1): its words, factors and offsets, 0.

    own_factors: what the rows were multiplied with before they were rounded; it is replaced by their factors.
    """
    simd.never_inline()
    half, finer = 2 * count, simd.splat(np.float32(_LIMB))
    for r in range(rows):
        x, inverse, target = (
            simd.integer_at(xs + 8 * r) + x_offset,
            simd.splat_at(own_factors + 4 * r),
            words + r * half,
        )
        for i in range(0, half, VECTOR):
            low = simd.rest_of_rounding(simd.load_f32(x + i), inverse)
            high = simd.rest_of_rounding(simd.load_f32(x + half + i), inverse)
            simd.store_words(target + i, simd.pair_factors(low, high, finer))
    simd.store_f32(own_factors, simd.mul(simd.load_f32(factors), simd.splat(np.float32(1 / _LIMB))))
    simd.store_f32(own_offsets, simd.splat(np.float32(0)))


@inner
def fold(xs, x_offset, scales, rows, lanes, steps, side, words, factors, offsets, scratch):  # type: ignore[no-untyped-def]
    """The integer route, first step: round what will be multiplied with codes.

    xs, scales: addresses of int64, the addresses of x and of the scales of the tile it meets, for each of ``rows``; after
    the scales come the centres, in the same order. x_offset: an offset of all x. side: the address of the Side's numbers.
    words: room for PARTS x LIMBS times ``rows`` int16, as many each as a sum has steps, and one vector; factors, offsets:
    for PARTS x LIMBS times as many floats as rows, rounded up to 16; scratch: see ``_fold_rows``.
    """
    simd.never_inline()
    group, parts = simd.integer_at(side + 8 * GROUP), simd.integer_at(side + 8 * PARTS)
    per_lane, limbs = simd.integer_at(side + 8 * PER_LANE), simd.integer_at(side + 8 * LIMBS)
    length = group if per_lane else steps
    for part in range(parts):
        more_words, more_factors, more_offsets = next_part(words, factors, offsets, rows, length)
        own_offset, own_scales, own_centres = x_offset, np.int64(-1), np.int64(0)
        if per_lane:
            own_offset += 4 * part * length
        else:
            own_scales, own_centres = 4 * part * steps, 4 * (parts + part) * steps
        in_registers = own_scales >= 0 and folds_in_registers(length)
        block = block_rows(length)
        for i in range(0, rows if in_registers else 0, block):
            fold_block(
                xs + 8 * i, own_offset, scales + 8 * i, own_scales, own_centres, min(block, rows - i), length,
                words + 2 * i * length, factors + 4 * i, offsets + 4 * i,
            )  # fmt: skip
        for i in range(0, 0 if in_registers else rows, FOLDED):
            _fold_rows(
                xs + 8 * i, own_offset, scales + 8 * i, own_scales, own_centres, min(FOLDED, rows - i), length,
                words + 2 * i * length, factors + 4 * i, offsets + 4 * i, scratch,
            )  # fmt: skip
            if limbs == 2:
                simd.store_f32(more_factors + 4 * i, simd.load_f32(scratch))  # what x was multiplied with
        if limbs == 2:  # not before all rows have their first limb: a short row's last vector reaches into what follows
            for i in range(0, rows, FOLDED):
                _fold_rest(
                    xs + 8 * i, own_offset, min(FOLDED, rows - i), length, factors + 4 * i, more_words + 2 * i * length,
                    more_factors + 4 * i, more_offsets + 4 * i,
                )  # fmt: skip
        words, factors, offsets = more_words, more_factors, more_offsets
        if limbs == 2:
            words, factors, offsets = next_part(words, factors, offsets, rows, length)
