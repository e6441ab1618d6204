"""The softmax of one split: what happens to logits between q . K and p . V, for all rows of a block."""

import numpy as np

from . import simd
from .jit import inner
from .simd import LANES
from .tables import (
    DISTANCE,
    HIGH,
    LOGITS_ROW,
    LOW,
    MASK,
    SLOPE,
    SPLIT_M,
    SPLIT_S,
    get,
    row_float,
    row_int,
    set_row_float,
    set_row_int,
)
from .tiles import VECTOR


@inner
def _map_logits(logits, first, stop, cap, slope, distance, mask):  # type: ignore[no-untyped-def]
    """Soft-cap, ALiBi's bias and mask, in this order, in place. ``distance``: of the split's first key from the query."""
    for at in range(first, stop, LANES):
        x = simd.load_f32(logits + 4 * at)
        if cap > 0:
            y = simd.div(x, simd.splat(cap))
            e = simd.exp(simd.smaller(simd.splat(np.float32(40)), simd.add(y, y)))
            x = simd.mul(simd.splat(cap), simd.tanh_from_exp(y, e))
        if slope != 0:
            away = simd.add(simd.lane_numbers(), simd.splat(np.float32(distance + at)))
            x = simd.fma(simd.splat(slope), away, x)
        if mask:
            x = simd.add(x, simd.load_f32(mask + 4 * at))
        simd.store_f32(logits + 4 * at, x)


@inner
def finish_logits(active, count, table, numbers, low, high, origin, cap, logits, sums):  # type: ignore[no-untyped-def]
    """What follows q . K in the tile low .. high of the split: the options, -inf outside of a row's range, the maximum."""
    simd.never_inline()
    for i in range(count):
        row = get(active, i)
        at, slope, mask = logits + row * LOGITS_ROW, row_float(numbers, SLOPE, row), row_int(table, MASK, row)
        if cap > 0 or slope != 0 or mask:
            mask = mask + 4 * origin if mask else 0
            _map_logits(at, low, high, cap, slope, row_int(table, DISTANCE, row) + origin, mask)
        start, stop = row_int(table, LOW, row), row_int(table, HIGH, row)
        if low < start or stop < high:
            for place in range(low, high, LANES):
                x = simd.load_f32(at + 4 * place)
                x = simd.keep_lanes(x, np.int32(start - place), np.int32(stop - place), np.float32(-np.inf))
                simd.store_f32(at + 4 * place, x)
        top = simd.load_f32(sums + row * VECTOR)
        for place in range(low, high, LANES):
            top = simd.larger(top, simd.load_f32(at + 4 * place))
        simd.store_f32(sums + row * VECTOR, top)


@inner
def find_maxima(table, numbers, rows, logits, sums):  # type: ignore[no-untyped-def]
    """M of the split for every row, from a vector of largest logits each; then that becomes a vector of sums, 0.

    A row that sees nothing, or only -inf, is left with an empty range. Returns whether there was one of only -inf.
    """
    simd.never_inline()
    emptied = False
    lowest = np.float32(-np.inf)
    for row in range(0, rows, 4):
        simd.store_f32(sums + row * VECTOR, simd.largest_four(sums + row * VECTOR))
    for row in range(rows):
        top = simd.scalar_at(sums + row // 4 * 4 * VECTOR + row % 4 * LANES)
        start, stop = row_int(table, LOW, row), row_int(table, HIGH, row)
        if top == lowest and start < stop:
            top = _first_nan(logits + row * LOGITS_ROW, start, stop)
            if top == lowest:  # nothing was attended to, and -inf - -inf is never computed
                set_row_int(table, LOW, row, stop)
                emptied = True
        set_row_float(numbers, SPLIT_M, row, top)
    for row in range(rows):
        simd.store_f32(sums + row * VECTOR, simd.splat(np.float32(0)))
    return emptied


@inner
def _first_nan(logits, start, stop):  # type: ignore[no-untyped-def]
    """NaN if one is among the logits start .. stop, else -inf."""
    for i in range(start, stop):
        x = simd.scalar_at(logits + 4 * i)
        if x != x:
            return x
    return np.float32(-np.inf)


@inner
def exponentials(active, count, numbers, low, high, logits, sums):  # type: ignore[no-untyped-def]
    """exp(logit - M) in place of the logits of one tile, for the rows that see it, and their sums."""
    simd.never_inline()
    for i in range(count):
        row = get(active, i)
        at, total, top = (
            logits + row * LOGITS_ROW,
            simd.load_f32(sums + row * VECTOR),
            simd.splat(row_float(numbers, SPLIT_M, row)),
        )
        for place in range(low, high, LANES):
            p = simd.exp(simd.sub(simd.load_f32(at + 4 * place), top))
            simd.store_f32(at + 4 * place, p)
            total = simd.add(total, p)
        simd.store_f32(sums + row * VECTOR, total)


@inner
def divide_by_sums(numbers, rows, width, sums, out):  # type: ignore[no-untyped-def]
    """S of the split for every row, and the output divided by it."""
    simd.never_inline()
    for row in range(0, rows, 4):
        simd.store_f32(sums + row * VECTOR, simd.sum_four(sums + row * VECTOR))
    for row in range(rows):
        total = simd.scalar_at(sums + row // 4 * 4 * VECTOR + row % 4 * LANES)
        set_row_float(numbers, SPLIT_S, row, total)
        if np.isnan(total):
            set_row_float(numbers, SPLIT_M, row, np.float32(np.nan))
        if total != 0:
            share = simd.splat(np.float32(1) / total)
            for c in range(0, 4 * width, VECTOR):
                at = out + row * width * 4 + c
                simd.store_f32(at, simd.mul(simd.load_f32(at), share))
