"""The stateful flash-attention kernel: attention over one segment, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. K and V meet in the logits only, so the format of one has nothing to do with that of the other. The grid of
splits and tiles is fixed in absolute positions, the order of merges too, and each row has its own factors and
accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.
"""

import numpy as np
from numba import prange, types

from . import simd
from .jit import inner, parallel_kernel, standalone
from .layout import BYTES, GROUP, HEAD, KIND, PARAMS, PARTS, PER_LANE, ROW
from .products import (
    FOLDED,
    fold,
    multiply_codes,
    multiply_packed,
    packs_directly,
    score_floats,
    weigh_floats,
)
from .simd import LANES
from .state import merge_rows
from .tiles import VECTOR, codes_to_floats, is_dense, unpack_codes, unpack_dense_k, unpack_dense_v, unpack_scales

SPLIT = 512  # positions whose logits share one maximum; a multiple of every tile
BLOCK_ROWS = 96  # query rows that share the unpacking of a tile: their logits then fit the second-level cache
LOGITS_ROW = np.int64((SPLIT + LANES) * 4)  # bytes between rows of logits: a power of two would share cache sets

# Indices into the int64 array that describes a segment (see segment.py)
TILE, TILE_SHIFT, FIRST_TILE, WIDTH, KV_HEADS = range(5)
K_SIDE, V_SIDE = 5, 13  # where the eight numbers of each Side begin (see layout.py)
SIDE_NUMBERS = 8

COLUMNS = np.int64(136)  # of the tables below: room for BLOCK_ROWS or MAX_N_REP rows
MAX_N_REP = 128  # query heads of a KV head

# Indices into the float32 array of options
SCALE, SOFTCAP, EXACT = range(3)  # EXACT: not 0 for float32 throughout

# A worker's room: addresses, on 64-byte boundaries, of
#     QUERIES  float32 [rows][width], scaled            OUT      float32 [rows][width], the partial output of a split
#     LOGITS   float32 [rows][SPLIT + 16]               SUMS     a vector a row: largest logits, then sums of exponentials
#     CODES    one side of a tile as pairs of uint16    VALUES   one side of a tile as float32
#     SCALES   its scales and minima, or room to transpose
#     WORDS    int16 [rows][tile or width], and what is more by products.multiply_codes
QUERIES, OUT, LOGITS, SUMS, CODES, VALUES, SCALES, WORDS, FACTORS, OFFSETS, SCRATCH = range(11)

# A worker's rows. int64 [fields][COLUMNS]: the positions that a row sees, absolute and in the current split; the distance
# of position 0 from the query's; addresses of its mask (or 0), its output and its partial output
START, STOP, LOW, HIGH, DISTANCE, MASK, TARGET, PARTIAL = range(8)
# Lists made for a few tiles, in the same table: the rows that see each of them, tile after tile, with the addresses of what
# is multiplied and of the tile's scales; where each tile's rows begin; whether they see all of it; room for multiply_codes
ACTIVE, X, SCALES_AT, FIRST, WHOLE, TARGETS = range(8, 14)  # and TARGETS + 1
FIELDS = 15
# float32 [fields][COLUMNS]: M and S of the current split, of everything so far, and the slope of ALiBi
SPLIT_M, SPLIT_S, M, S, SLOPE = range(5)
FLOAT_FIELDS = 5


# Arrays are handed down as addresses: Numba counts references to an array wherever it is passed or sliced, with atomic
# operations that took a fifth of the time of a decode step.


@inner
def _get(base, i):  # type: ignore[no-untyped-def]
    """Number i of the int64 at an address."""
    return simd.integer_at(base + 8 * i)


@inner
def _field(table, field):  # type: ignore[no-untyped-def]
    """Where a field of the rows' int64 begins."""
    return table + 8 * COLUMNS * field


@inner
def _int(table, field, row):  # type: ignore[no-untyped-def]
    return simd.integer_at(_field(table, field) + 8 * row)


@inner
def _set_int(table, field, row, value):  # type: ignore[no-untyped-def]
    simd.store_integer(_field(table, field) + 8 * row, value)


@inner
def _float_field(numbers, field):  # type: ignore[no-untyped-def]
    """Where a field of the rows' float32 begins."""
    return numbers + 4 * COLUMNS * field


@inner
def _float(numbers, field, row):  # type: ignore[no-untyped-def]
    return simd.scalar_at(_float_field(numbers, field) + 4 * row)


@inner
def _set_float(numbers, field, row, value):  # type: ignore[no-untyped-def]
    simd.store_scalar(_float_field(numbers, field) + 4 * row, value)


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
def _finish_logits(active, count, table, numbers, low, high, origin, cap, logits, sums):  # type: ignore[no-untyped-def]
    """What follows q . K in the tile low .. high of the split: the options, -inf outside of a row's range, the maximum."""
    simd.never_inline()
    for i in range(count):
        row = _get(active, i)
        at, slope, mask = logits + row * LOGITS_ROW, _float(numbers, SLOPE, row), _int(table, MASK, row)
        if cap > 0 or slope != 0 or mask:
            mask = mask + 4 * origin if mask else 0
            _map_logits(at, low, high, cap, slope, _int(table, DISTANCE, row) + origin, mask)
        start, stop = _int(table, LOW, row), _int(table, HIGH, row)
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
def _find_maxima(table, numbers, rows, logits, sums):  # type: ignore[no-untyped-def]
    """M of the split for every row, from a vector of largest logits each; then that becomes a vector of sums, 0.

    A row that sees nothing, or only -inf, is left with an empty range.
    """
    simd.never_inline()
    lowest = np.float32(-np.inf)
    for row in range(0, rows, 4):
        simd.store_f32(sums + row * VECTOR, simd.largest_four(sums + row * VECTOR))
    for row in range(rows):
        top = simd.scalar_at(sums + row // 4 * 4 * VECTOR + row % 4 * LANES)
        start, stop = _int(table, LOW, row), _int(table, HIGH, row)
        if top == lowest and start < stop:
            top = _first_nan(logits + row * LOGITS_ROW, start, stop)
            if top == lowest:  # nothing was attended to, and -inf - -inf is never computed
                _set_int(table, LOW, row, stop)
        _set_float(numbers, SPLIT_M, row, top)
    for row in range(rows):
        simd.store_f32(sums + row * VECTOR, simd.splat(np.float32(0)))


@inner
def _first_nan(logits, start, stop):  # type: ignore[no-untyped-def]
    """NaN if one is among the logits start .. stop, else -inf."""
    for i in range(start, stop):
        x = simd.scalar_at(logits + 4 * i)
        if x != x:
            return x
    return np.float32(-np.inf)


@inner
def _exponentials(active, count, numbers, low, high, logits, sums):  # type: ignore[no-untyped-def]
    """exp(logit - M) in place of the logits of one tile, for the rows that see it, and their sums."""
    simd.never_inline()
    for i in range(count):
        row = _get(active, i)
        at, total, top = (
            logits + row * LOGITS_ROW,
            simd.load_f32(sums + row * VECTOR),
            simd.splat(_float(numbers, SPLIT_M, row)),
        )
        for place in range(low, high, LANES):
            p = simd.exp(simd.sub(simd.load_f32(at + 4 * place), top))
            simd.store_f32(at + 4 * place, p)
            total = simd.add(total, p)
        simd.store_f32(sums + row * VECTOR, total)


@inner
def _divide_by_sums(numbers, rows, width, sums, out):  # type: ignore[no-untyped-def]
    """S of the split for every row, and the output divided by it."""
    simd.never_inline()
    for row in range(0, rows, 4):
        simd.store_f32(sums + row * VECTOR, simd.sum_four(sums + row * VECTOR))
    for row in range(rows):
        total = simd.scalar_at(sums + row // 4 * 4 * VECTOR + row % 4 * LANES)
        _set_float(numbers, SPLIT_S, row, total)
        if np.isnan(total):
            _set_float(numbers, SPLIT_M, row, np.float32(np.nan))
        if total != 0:
            share = simd.splat(np.float32(1) / total)
            for c in range(0, 4 * width, VECTOR):
                at = out + row * width * 4 + c
                simd.store_f32(at, simd.mul(simd.load_f32(at), share))


@inner
def _see_split(table, rows, origin):  # type: ignore[no-untyped-def]
    """Cut the rows' ranges to the split: returns the range that any of them sees."""
    first, stop = SPLIT, 0
    for row in range(rows):
        low = min(max(_int(table, START, row) - origin, 0), SPLIT)
        high = max(min(_int(table, STOP, row) - origin, SPLIT), low)
        _set_int(table, LOW, row, low)
        _set_int(table, HIGH, row, high)
        if low < high:
            first, stop = min(first, low), max(stop, high)
    return first, stop


@inner
def _see_tiles(table, rows, first_tile, stop_tile, tile):  # type: ignore[no-untyped-def]
    """List the rows that see each of some tiles; returns how many in all. The lists have room for them (``_chunk``)."""
    count = 0
    for t in range(first_tile, stop_tile):
        low, high = t * tile, (t + 1) * tile
        _set_int(table, FIRST, t - first_tile, count)
        whole = True
        for row in range(rows):
            _set_int(table, ACTIVE, count, row)
            if max(_int(table, LOW, row), low) < min(_int(table, HIGH, row), high):
                count += 1
                whole &= _int(table, LOW, row) <= low and _int(table, HIGH, row) >= high
        _set_int(table, WHOLE, t - first_tile, whole)
    _set_int(table, FIRST, stop_tile - first_tile, count)
    return count


@inner
def _chunk(rows):  # type: ignore[no-untyped-def]
    """How many tiles are folded together, so that few rows do not wait for one another's maxima."""
    return max(1, FOLDED // rows)


@inner
def _no_options(table, numbers, rows, cap):  # type: ignore[no-untyped-def]
    """Whether a product is a logit: no soft-cap, bias or mask changes it."""
    for row in range(rows):
        if _float(numbers, SLOPE, row) != 0 or _int(table, MASK, row) != 0:
            return False
    return cap == 0


@inner
def _unpack_values(is_k, side, address, width, tile, low, high, room, ahead):  # type: ignore[no-untyped-def]
    """One head and tile as float32 in _get(room, VALUES); of dense formats the tokens low .. high only."""
    simd.never_inline()
    if is_dense(_get(side, KIND)):
        if is_k:
            unpack_dense_k(
                address, _get(side, KIND), _get(side, ROW), width, low, high, _get(room, VALUES), _get(room, SCALES)
            )
        else:
            unpack_dense_v(address, _get(side, KIND), _get(side, ROW), width, tile, low, high, _get(room, VALUES))
        return
    lanes, steps = (tile, width) if is_k else (width, tile)
    unpack_scales(
        address + _get(side, PARAMS), _get(side, PARTS) * (lanes if _get(side, PER_LANE) else steps), _get(room, SCALES)
    )
    unpack_codes(address, _get(side, KIND), lanes * steps // 32, _get(room, CODES), ahead)
    codes_to_floats(
        _get(room, CODES), _get(room, SCALES), lanes, steps, _get(side, GROUP), _get(side, PARTS), _get(side, PER_LANE),
        _get(room, VALUES),
    )  # fmt: skip


@inner
def _fold_tiles(  # type: ignore[no-untyped-def]
    table, first_tile, stop_tile, addresses, head, side, lanes, steps, x, x_stride, x_step, room
):
    """Unpack the scales of some tiles and fold the rows that see them.

    x: the address of row 0 and the first of the tiles, x_step bytes before that of the next tile.
    """
    simd.never_inline()
    count = _get(side, PARTS) * (lanes if _get(side, PER_LANE) else steps)
    for t in range(first_tile, stop_tile):
        scales = _get(room, SCALES) + (t - first_tile) * 8 * count
        unpack_scales(_get(addresses, t - first_tile) + head * _get(side, HEAD) + _get(side, PARAMS), count, scales)
        for i in range(_int(table, FIRST, t - first_tile), _int(table, FIRST, t - first_tile + 1)):
            _set_int(table, X, i, x + _int(table, ACTIVE, i) * x_stride + (t - first_tile) * x_step)
            _set_int(table, SCALES_AT, i, scales)
    fold(
        _field(table, X), _field(table, SCALES_AT), _int(table, FIRST, stop_tile - first_tile), lanes, steps, side,
        _get(room, WORDS), _get(room, FACTORS), _get(room, OFFSETS), _get(room, SCRATCH),
    )  # fmt: skip


@inner
def _multiply_tile(  # type: ignore[no-untyped-def]
    table, nth, tiles, address, side, lanes, steps, fresh, target, target_stride, tops, ahead, last, room
):
    """The integer route over the nth of the tiles that were folded together."""
    simd.never_inline()
    first = _int(table, FIRST, nth)
    scales = _get(room, SCALES) + nth * 8 * _get(side, PARTS) * (lanes if _get(side, PER_LANE) else steps)
    rows, own = _int(table, FIRST, nth + 1) - first, _field(table, ACTIVE) + 8 * first
    if packs_directly(_get(side, KIND), rows):
        multiply_packed(
            _get(room, WORDS), _get(room, FACTORS), _get(room, OFFSETS), _int(table, FIRST, tiles), first, own, rows, lanes,
            steps, address, scales, side, fresh, target, target_stride, tops, ahead, last, _get(room, SCRATCH),
        )  # fmt: skip
        return
    unpack_codes(address, _get(side, KIND), lanes * steps // 32, _get(room, CODES), ahead)
    multiply_codes(
        _get(room, WORDS), _get(room, FACTORS), _get(room, OFFSETS), _int(table, FIRST, tiles), first, own, rows, lanes,
        steps, _get(room, CODES), scales, side, fresh, target, target_stride, tops, ahead + (last - ahead) // 3, last,
        _field(table, TARGETS),
    )  # fmt: skip


@inner
def _ask_for_scales(addresses, head, side, first, count):  # type: ignore[no-untyped-def]
    """Ask for the scales of ``count`` tiles: they are read before the codes, and together."""
    if _get(side, PARAMS):
        for i in range(first, first + count):
            for at in range(_get(side, PARAMS), _get(side, BYTES), VECTOR):
                simd.prefetch(_get(addresses, i) + head * _get(side, HEAD) + at)


@standalone(types.void(*[types.int64] * 11))
def split_kernel(  # type: ignore[no-untyped-def]
    head, split, rows, k_table, v_table, geometry, options, room, table, numbers, following
):
    """The partial attention of a worker's rows over one split: OUT, normalised, with SPLIT_M and SPLIT_S.

    ``following`` is the address of what will be read next. All arguments are numbers, or addresses of arrays.
    """
    tile, shift, width = _get(geometry, TILE), _get(geometry, TILE_SHIFT), _get(geometry, WIDTH)
    k_side, v_side = geometry + 8 * K_SIDE, geometry + 8 * V_SIDE
    exact, cap = simd.scalar_at(options + 4 * EXACT) != 0, simd.scalar_at(options + 4 * SOFTCAP)
    k_floats, v_floats = exact or is_dense(_get(k_side, KIND)), exact or is_dense(_get(v_side, KIND))
    origin, active = split * SPLIT, _field(table, ACTIVE)
    queries, logits, sums, out = _get(room, QUERIES), _get(room, LOGITS), _get(room, SUMS), _get(room, OUT)
    first, stop = _see_split(table, rows, origin)
    if first >= stop:
        for row in range(rows):
            _set_float(numbers, SPLIT_M, row, np.float32(-np.inf))
            _set_float(numbers, SPLIT_S, row, np.float32(0))
        return
    for row in range(rows):
        simd.store_f32(sums + row * VECTOR, simd.splat(np.float32(-np.inf)))
    for at in range(0, 4 * rows * width, VECTOR):
        simd.store_f32(out + at, simd.splat(np.float32(0)))
    plain = _no_options(table, numbers, rows, cap)
    base = (origin >> shift) - _get(geometry, FIRST_TILE)
    first_tile, last_tile = first >> shift, (stop - 1) >> shift
    first_v = _get(v_table, base + first_tile) + head * _get(v_side, HEAD)
    tiles = _chunk(rows)
    for t0 in range(first_tile, last_tile + 1, tiles):
        stop_tile = min(t0 + tiles, last_tile + 1)
        if _see_tiles(table, rows, t0, stop_tile, tile) == 0:
            continue
        if not k_floats:
            _fold_tiles(
                table, t0, stop_tile, k_table + 8 * (base + t0), head, k_side, tile, width, queries, width * 4, 0, room
            )  # fmt: skip
        if stop_tile > last_tile:
            _ask_for_scales(v_table, head, v_side, base + first_tile, min(tiles, last_tile + 1 - first_tile))
        else:
            _ask_for_scales(k_table, head, k_side, base + stop_tile, min(tiles, last_tile + 1 - stop_tile))
        for t in range(t0, stop_tile):
            nth, low, high = t - t0, t * tile, (t + 1) * tile
            first_row, count = _int(table, FIRST, nth), _int(table, FIRST, nth + 1) - _int(table, FIRST, nth)
            if count == 0:
                continue
            # Where a product is final, the microkernel keeps the largest ones; else that takes a pass of its own.
            final = plain and _int(table, WHOLE, nth) != 0 and not k_floats and _get(k_side, PARTS) == 1
            ahead = _get(k_table, base + t + 1) + head * _get(k_side, HEAD) if t < last_tile else first_v
            last = ahead + (_get(k_side, BYTES) if t < last_tile else _get(v_side, BYTES))
            at = _get(k_table, base + t) + head * _get(k_side, HEAD)
            if k_floats:
                _unpack_values(True, k_side, at, width, tile, max(first - low, 0), min(stop - low, tile), room, ahead)
                score_floats(
                    queries, width * 4, _get(active, first_row), _get(active, first_row + count - 1) + 1, tile, width,
                    _get(room, VALUES), logits + 4 * low, LOGITS_ROW, ahead, last,
                )  # fmt: skip
            else:
                _multiply_tile(
                    table, nth, stop_tile - t0, at, k_side, tile, width, np.int64(1), logits + 4 * low, LOGITS_ROW,
                    sums if final else 0, ahead, last, room,
                )  # fmt: skip
            if not final:
                _finish_logits(
                    active + 8 * first_row, count, table, numbers, low, high, origin, cap, logits, sums
                )  # fmt: skip
    _find_maxima(table, numbers, rows, logits, sums)
    for t0 in range(first_tile, last_tile + 1, tiles):
        stop_tile = min(t0 + tiles, last_tile + 1)
        if _see_tiles(table, rows, t0, stop_tile, tile) == 0:
            continue
        for t in range(t0, stop_tile):
            first_row, count = _int(table, FIRST, t - t0), _int(table, FIRST, t - t0 + 1) - _int(table, FIRST, t - t0)
            _exponentials(active + 8 * first_row, count, numbers, t * tile, (t + 1) * tile, logits, sums)
        if not v_floats:
            _fold_tiles(
                table, t0, stop_tile, v_table + 8 * (base + t0), head, v_side, width, tile, logits + 4 * t0 * tile,
                LOGITS_ROW, 4 * tile, room,
            )  # fmt: skip
        _ask_for_scales(v_table, head, v_side, base + stop_tile, min(tiles, last_tile + 1 - stop_tile))
        for t in range(t0, stop_tile):
            nth, low = t - t0, t * tile
            first_row, count = _int(table, FIRST, nth), _int(table, FIRST, nth + 1) - _int(table, FIRST, nth)
            if count == 0:
                continue
            ahead = _get(v_table, base + t + 1) + head * _get(v_side, HEAD) if t < last_tile else following
            last = ahead + (_get(v_side, BYTES) if t < last_tile else _get(k_side, BYTES))
            at = _get(v_table, base + t) + head * _get(v_side, HEAD)
            if v_floats:
                _unpack_values(False, v_side, at, width, tile, max(first - low, 0), min(stop - low, tile), room, ahead)
                weigh_floats(
                    logits, LOGITS_ROW, _get(active, first_row), _get(active, first_row + count - 1) + 1,
                    _field(table, LOW), _field(table, HIGH), low, tile, width, _get(room, VALUES), out, ahead, last,
                )  # fmt: skip
            else:
                _multiply_tile(
                    table, nth, stop_tile - t0, at, v_side, width, tile, np.int64(0), out, width * 4, np.int64(0), ahead,
                    last, room,
                )  # fmt: skip
    _divide_by_sums(numbers, rows, width, sums, out)


_attend_split = split_kernel.call


@inner
def _room(start, rows, tile, width, parts):  # type: ignore[no-untyped-def]
    """Where each part of a worker's room begins, from address ``start`` on, and where the last one ends.

    ``parts``: the most that a side has.
    """
    most, vectors = max(tile, width), (rows + LANES - 1) // LANES * LANES
    queries = start
    out = queries + rows * width * 4
    logits = out + rows * width * 4
    sums = logits + rows * LOGITS_ROW
    codes = sums + vectors * VECTOR
    values = codes + tile * width * 2
    scales = values + tile * width * 4
    tiles = min(
        FOLDED, SPLIT // tile
    )  # that are folded together, at most: the last block of queries may be a small one
    words = scales + max(tiles * parts * most * 8, LANES * LANES * 4)
    factors = words + parts * vectors * most * 2 + VECTOR
    offsets = factors + parts * vectors * 4
    scratch = offsets + parts * vectors * 4
    end = scratch + FOLDED * (2 * VECTOR + 4 * most) + VECTOR
    return queries, out, logits, sums, codes, values, scales, words, factors, offsets, scratch, end


@inner
def _attend_block(  # type: ignore[no-untyped-def]
    split_address, head, first_query, n_queries, first_split, stop_split, q, starts, stops, k_table, v_table, geometry,
    options, slopes, distances, mask, mask_strides, out, state, room, table, numbers,
):  # fmt: skip
    """Attention of some queries of one KV head's query heads over a run of splits, merged into ``out`` and ``state``.

    room, table, numbers: addresses.
    """
    width, n_heads = geometry[WIDTH], q.shape[1]
    n_rep = n_heads // geometry[KV_HEADS]
    scale = simd.splat(options[SCALE])
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(head * n_rep, (head + 1) * n_rep):
            place = (query * n_heads + h) * width * 4
            for c in range(0, 4 * width, VECTOR):
                target = _get(room, QUERIES) + row * width * 4 + c
                simd.store_f32(target, simd.mul(simd.load_f32(q.ctypes.data + place + c), scale))
            _set_int(table, START, row, starts[query])
            _set_int(table, STOP, row, stops[query])
            _set_int(table, DISTANCE, row, distances[query])
            _set_int(table, MASK, row, mask + h * mask_strides[0] + query * mask_strides[1] if mask else 0)
            _set_int(table, TARGET, row, out.ctypes.data + place)
            _set_int(table, PARTIAL, row, _get(room, OUT) + row * width * 4)
            _set_float(numbers, SLOPE, row, slopes[h])
            _set_float(numbers, M, row, state[h, query, 0])
            _set_float(numbers, S, row, state[h, query, 1])
            row += 1
    for split in range(first_split, stop_split):
        next_tile = ((split + 1) * SPLIT >> geometry[TILE_SHIFT]) - geometry[FIRST_TILE]
        following = k_table[min(max(next_tile, 0), k_table.size - 1)] + head * geometry[K_SIDE + HEAD]
        _attend_split(
            split_address, head, split, row, k_table.ctypes.data, v_table.ctypes.data, geometry.ctypes.data,
            options.ctypes.data, room, table, numbers, following,
        )  # fmt: skip
        merge_rows(
            _field(table, TARGET), _float_field(numbers, M), _float_field(numbers, S), _field(table, PARTIAL),
            _float_field(numbers, SPLIT_M), _float_field(numbers, SPLIT_S), row, width, _get(room, SCRATCH),
        )  # fmt: skip
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(head * n_rep, (head + 1) * n_rep):
            state[h, query, 0], state[h, query, 1] = _float(numbers, M, row), _float(numbers, S, row)
            row += 1


@inner
def _work(  # type: ignore[no-untyped-def]
    split_address, worker, workers, q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes,
    distances, mask, mask_strides, outs, states,
):  # fmt: skip
    """The share of one worker: see ``attend_parts``."""
    n_queries, kv_heads, tile, width = q.shape[0], geometry[KV_HEADS], geometry[TILE], geometry[WIDTH]
    n_rep = q.shape[1] // kv_heads
    parts, n_splits = outs.shape[0], stop_split - first_split
    block = max(1, BLOCK_ROWS // n_rep)
    blocks = (n_queries + block - 1) // block
    rows = min(block, n_queries) * n_rep
    most_parts = max(geometry[K_SIDE + PARTS], geometry[V_SIDE + PARTS])
    memory = np.empty(_room(0, rows, tile, width, most_parts)[-1] + 64, np.uint8)
    room = np.array(_room((memory.ctypes.data + 63) // 64 * 64, rows, tile, width, most_parts))
    table, numbers = np.empty(FIELDS * COLUMNS, np.int64), np.zeros(FLOAT_FIELDS * COLUMNS, np.float32)
    units = parts * blocks * kv_heads
    # Parts follow one another in memory, so a worker takes a run of them; blocks differ in work, so they are dealt out.
    first_unit, stop_unit, step = worker, units, workers
    if parts > 1:
        first_unit, stop_unit, step = units * worker // workers, units * (worker + 1) // workers, 1
    for unit in range(first_unit, stop_unit, step):
        head, rest = unit // (parts * blocks), unit % (parts * blocks)
        if parts == 1:
            head, rest = unit % kv_heads, unit // kv_heads
        part, first_query = rest // blocks, rest % blocks * block
        _attend_block(
            split_address, head, first_query, min(block, n_queries - first_query), first_split + n_splits * part // parts,
            first_split + n_splits * (part + 1) // parts, q, starts, stops, k_table, v_table, geometry, options, slopes,
            distances, mask, mask_strides, outs[part], states[part], room.ctypes.data, table.ctypes.data,
            numbers.ctypes.data,
        )  # fmt: skip
    # Numba frees an array after its last mention, and the addresses above do not count as one.
    memory[0] = room[0] = table[0] = numbers[0] = 0


@parallel_kernel
def attend_parts(  # type: ignore[no-untyped-def]
    split_address, q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes, distances, mask,
    mask_strides, outs, states, workers,
):  # fmt: skip
    """Attention of all queries, cut into (KV head, part of the splits, block of queries), shared out to the workers.

    outs (parts, T, H, width) and states (parts, H, T, 2) are continued: a part each for as many runs of splits, or one
    part for all. split_address: of ``split_kernel``.
    """
    for worker in prange(workers):
        _work(
            split_address, np.int64(worker), workers, q, starts, stops, first_split, stop_split, k_table, v_table,
            geometry, options, slopes, distances, mask, mask_strides, outs, states,
        )  # fmt: skip
