"""One split: 512 keys against the rows of a block, logits, softmax and weighted sum of values; the kernel's inner half.

K and V meet in the logits only, so the format of one has nothing to do with that of the other.
"""

import numpy as np
from numba import types

from . import simd
from .fold import fold
from .jit import inner, standalone
from .layout import F32, K_CODES, K_PARAMS, KIND, LIMBS, PARTS, PER_LANE, ROW, TOKEN, V_CODES, V_PARAMS
from .products import multiply_tiles, score_floats, weigh_floats
from .softmax import divide_by_sums, exponentials, find_maxima, finish_logits
from .tables import (
    ACTIVE,
    CALL,
    CODES,
    DENSE_KERNEL,
    DIRECT_ROWS,
    EXACT,
    FACTORS,
    FIRST,
    FIRST_TILE,
    FOLD_KERNEL,
    HIGH,
    K_SIDE,
    LOGITS,
    LOGITS_ROW,
    LOW,
    NEXT_HEAD,
    NEXT_STOP,
    NEXT_TILE,
    OFFSETS,
    OUT,
    QUERIES,
    SCALES,
    SCALES_AT,
    SCRATCH,
    SOFTCAP,
    SPLIT,
    SPLIT_M,
    SPLIT_S,
    SUMS,
    TARGETS,
    TILE,
    TILE_KERNEL,
    TILE_SHIFT,
    TOPS,
    UNPACK_KERNEL,
    V_SIDE,
    VALUES,
    WHOLE,
    WIDTH,
    WORDS,
    X,
    ask_from,
    get,
    lines_ahead,
    no_options,
    row_field,
    row_int,
    see_split,
    see_tiles,
    see_whole,
    set_row_float,
    set_row_int,
    tile_address,
    tiles_together,
)
from .tiles import VECTOR, is_dense, middle_code, unpack_head, unpack_scales

_unpack = unpack_head.call


@inner
def _as_floats(is_k, side, addresses, t, head, width, tile, low, high, rows, room):  # type: ignore[no-untyped-def]
    """One head and tile for the float32 route: its kind, its address, and the bytes between steps and between vectors.

    A dense tile is taken as it is stored; codes, plain arrays of K, and 16-bit numbers that many rows want are made float32
    first. t: the row of ``addresses``; low, high: the tokens that some row sees.
    """
    kind = get(side, KIND)
    codes = tile_address(addresses, t, K_CODES if is_k else V_CODES, side, head)
    if is_dense(kind) and get(side, TOKEN) == 0 and (kind == F32 or rows <= DIRECT_ROWS):
        return kind, codes, get(side, ROW), np.int64(VECTOR if kind == F32 else VECTOR // 2)
    params = tile_address(addresses, t, K_PARAMS if is_k else V_PARAMS, side, head)
    _unpack(
        get(get(room, CALL), UNPACK_KERNEL), np.int64(is_k), side, codes, params, width, tile, np.int64(low),
        np.int64(high), get(room, CODES), get(room, SCALES), get(room, VALUES),
    )  # fmt: skip
    return np.int64(F32), get(room, VALUES), np.int64(VECTOR), (width if is_k else tile) * VECTOR


@standalone(types.void(*[types.int64] * 17))
def fold_tiles(  # type: ignore[no-untyped-def]
    table, first_tile, stop_tile, base, addresses, which, head, side, lanes, steps, x, x_stride, x_step, target,
    target_stride, again, room,
):  # fmt: skip
    """Unpack the scales of some tiles and fold the rows that see them.

    base: the row of ``addresses`` that belongs to tile 0 of the split; which: K_PARAMS or V_PARAMS. x: the address of
    row 0 and of tile 0, x_step bytes before that of the next tile; target: of row 0. again: whether it is one tile of the
    same rows as in the last call, with the same arguments otherwise.
    """
    count = get(side, PARTS) * (lanes if get(side, PER_LANE) else steps)
    middle = middle_code(get(side, KIND))
    for t in range(first_tile, stop_tile):
        scales = get(room, SCALES) + (t - first_tile) * 8 * count
        unpack_scales(tile_address(addresses, base + t, which, side, head), count, middle, scales)
        first, stop = row_int(table, FIRST, t - first_tile), row_int(table, FIRST, t - first_tile + 1)
        for i in range(first, first if again else stop):
            row = row_int(table, ACTIVE, i)
            set_row_int(table, X, i, x + row * x_stride + (t - first_tile) * x_step)
            set_row_int(table, SCALES_AT, i, scales)
            set_row_int(table, TARGETS, i, target + row * target_stride)
            set_row_int(table, TOPS, i, get(room, SUMS) + row * VECTOR)
    fold(
        row_field(table, X), first_tile * x_step, row_field(table, SCALES_AT),
        row_int(table, FIRST, stop_tile - first_tile), lanes, steps, side, get(room, WORDS), get(room, FACTORS),
        get(room, OFFSETS), get(room, SCRATCH),
    )  # fmt: skip


_fold, _multiply = fold_tiles.call, multiply_tiles.call


@inner
def _score_tiles(  # type: ignore[no-untyped-def]
    head, t0, stop_tile, again, base, first, stop, rows, addresses, geometry, options, room, table, numbers, plain
):
    """Logits of all rows against the tiles t0 .. stop_tile of a split. again: see ``fold_tiles``."""
    tile, width, side = get(geometry, TILE), get(geometry, WIDTH), geometry + 8 * K_SIDE
    exact, cap = simd.scalar_at(options + 4 * EXACT) != 0, simd.scalar_at(options + 4 * SOFTCAP)
    origin = (base + get(geometry, FIRST_TILE)) * tile
    floats, active = exact or is_dense(get(side, KIND)), row_field(table, ACTIVE)
    queries, logits, sums = get(room, QUERIES), get(room, LOGITS), get(room, SUMS)
    # Where a product is final, the microkernel keeps the largest ones; else that takes a pass of its own.
    keep_tops = plain and not floats and get(side, PARTS) * get(side, LIMBS) == 1
    if not floats:
        _fold(
            get(get(room, CALL), FOLD_KERNEL), table, t0, stop_tile, base, addresses, K_PARAMS, head, side, tile, width,
            queries, width * 4, np.int64(0), logits, LOGITS_ROW, np.int64(again), room,
        )  # fmt: skip
        _multiply(
            get(get(room, CALL), TILE_KERNEL), table, t0, stop_tile, base, tile, width, addresses, K_CODES, head, side,
            np.int64(1), 4 * tile, np.int64(keep_tops), room,
        )  # fmt: skip
    for t in range(t0, stop_tile):
        nth, low, high = t - t0, t * tile, (t + 1) * tile
        first_row, count = row_int(table, FIRST, nth), row_int(table, FIRST, nth + 1) - row_int(table, FIRST, nth)
        if count == 0:
            continue
        if floats:
            first_active, stop_active = get(active, first_row), get(active, first_row + count - 1) + 1
            kind, keys, step, stride = _as_floats(
                True, side, addresses, base + t, head, width, tile, max(first - low, 0), min(stop - low, tile), rows, room
            )  # fmt: skip
            score_floats(
                get(get(room, CALL), DENSE_KERNEL), queries, width * 4, first_active, stop_active, row_field(table, LOW),
                row_field(table, HIGH), low, tile, width, kind, keys, step, stride, logits + 4 * low, LOGITS_ROW,
                lines_ahead(room, keys, side, tile * width),
            )  # fmt: skip
        if not (keep_tops and row_int(table, WHOLE, nth)):
            finish_logits(active + 8 * first_row, count, table, numbers, low, high, origin, cap, logits, sums)


@inner
def _weigh_tiles(  # type: ignore[no-untyped-def]
    head, t0, stop_tile, again, base, first, stop, rows, addresses, geometry, options, room, table, numbers
):
    """Exponentials of all rows' logits for the tiles t0 .. stop_tile of a split, and their products with V."""
    tile, width, side = get(geometry, TILE), get(geometry, WIDTH), geometry + 8 * V_SIDE
    exact, active = simd.scalar_at(options + 4 * EXACT) != 0, row_field(table, ACTIVE)
    floats = exact or is_dense(get(side, KIND))
    logits, sums, out = get(room, LOGITS), get(room, SUMS), get(room, OUT)
    for t in range(t0, stop_tile):
        first_row, count = (
            row_int(table, FIRST, t - t0),
            row_int(table, FIRST, t - t0 + 1) - row_int(table, FIRST, t - t0),
        )
        exponentials(active + 8 * first_row, count, numbers, t * tile, (t + 1) * tile, logits, sums)
    if not floats:
        _fold(
            get(get(room, CALL), FOLD_KERNEL), table, t0, stop_tile, base, addresses, V_PARAMS, head, side, width, tile,
            logits, LOGITS_ROW, 4 * tile, out, width * 4, np.int64(again), room,
        )  # fmt: skip
        _multiply(
            get(get(room, CALL), TILE_KERNEL), table, t0, stop_tile, base, width, tile, addresses, V_CODES, head, side,
            np.int64(0), np.int64(0), np.int64(0), room,
        )  # fmt: skip
        return
    for t in range(t0, stop_tile):
        nth, low = t - t0, t * tile
        first_row, count = row_int(table, FIRST, nth), row_int(table, FIRST, nth + 1) - row_int(table, FIRST, nth)
        if count == 0:
            continue
        first_active, stop_active = get(active, first_row), get(active, first_row + count - 1) + 1
        kind, values, step, stride = _as_floats(
            False, side, addresses, base + t, head, width, tile, max(first - low, 0), min(stop - low, tile), rows, room
        )  # fmt: skip
        weigh_floats(
            get(get(room, CALL), DENSE_KERNEL), logits, LOGITS_ROW, first_active, stop_active, row_field(table, LOW),
            row_field(table, HIGH), low, tile, width, kind, values, step, stride, out,
            lines_ahead(room, values, side, tile * width),
        )  # fmt: skip


@standalone(types.void(*[types.int64] * 9))
def split_kernel(  # type: ignore[no-untyped-def]
    head, split, rows, addresses, geometry, options, room, table, numbers
):
    """The partial attention of a worker's rows over one split: OUT, normalised, with SPLIT_M and SPLIT_S.

    All arguments are numbers, or addresses of arrays; ``addresses`` is that of a segment's table.
    """
    tile, shift, width = get(geometry, TILE), get(geometry, TILE_SHIFT), get(geometry, WIDTH)
    cap = simd.scalar_at(options + 4 * SOFTCAP)
    origin, sums, out = split * SPLIT, get(room, SUMS), get(room, OUT)
    first, stop, common, common_stop = see_split(table, rows, origin)
    if first >= stop:
        for row in range(rows):
            set_row_float(numbers, SPLIT_M, row, np.float32(-np.inf))
            set_row_float(numbers, SPLIT_S, row, np.float32(0))
        return
    for row in range(rows):
        simd.store_f32(sums + row * VECTOR, simd.splat(np.float32(-np.inf)))
    for at in range(0, 4 * rows * width, VECTOR):
        simd.store_f32(out + at, simd.splat(np.float32(0)))
    plain = no_options(table, numbers, rows, cap)
    base = (origin >> shift) - get(geometry, FIRST_TILE)
    first_tile, stop_tile, tiles = first >> shift, ((stop - 1) >> shift) + 1, tiles_together(rows, tile)
    before = False
    ask_from(room, addresses, geometry, base + first_tile, base + stop_tile, head, V_SIDE)  # while K is read
    for t in range(first_tile, stop_tile, tiles):
        end, all_see = min(t + tiles, stop_tile), tiles == 1 and see_whole(t, tile, common, common_stop)
        again = before and all_see
        if again or see_tiles(table, rows, t, end, tile, common, common_stop) > 0:
            _score_tiles(
                head, t, end, again, base, first, stop, rows, addresses, geometry, options, room, table, numbers, plain
            )
        before = all_see
    emptied = find_maxima(table, numbers, rows, get(room, LOGITS), sums)
    common_stop = 0 if emptied else common_stop
    if get(room, NEXT_TILE) < get(room, NEXT_STOP):
        ask_from(room, addresses, geometry, get(room, NEXT_TILE), get(room, NEXT_STOP), get(room, NEXT_HEAD), K_SIDE)
    see_again, before = emptied or tiles < stop_tile - first_tile, False  # else the lists are those made for K
    for t in range(first_tile, stop_tile, tiles):
        end, all_see = min(t + tiles, stop_tile), tiles == 1 and see_whole(t, tile, common, common_stop)
        again = before and all_see
        if again or not see_again or see_tiles(table, rows, t, end, tile, common, common_stop) > 0:
            _weigh_tiles(
                head, t, end, again, base, first, stop, rows, addresses, geometry, options, room, table, numbers
            )
        before = all_see
    divide_by_sums(numbers, rows, width, sums, out)
