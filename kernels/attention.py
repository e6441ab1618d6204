"""The stateful flash-attention kernel: attention over one segment, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. K and V meet in the logits only, so the format of one has nothing to do with that of the other. The grid of
splits and tiles is fixed in absolute positions, the order of merges too, and each row has its own factors and
accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.
"""

import numpy as np
from numba import prange, types
from numba.cpython.unsafe.tuple import tuple_setitem

from . import simd
from .jit import inner, parallel_kernel, standalone
from .layout import BYTES, GROUP, HEAD, KIND, PARAMS, PER_LANE, ROW
from .products import FOLDED, multiply_codes, score_floats, weigh_floats
from .simd import LANES
from .state import merge_rows
from .tiles import VECTOR, codes_to_floats, is_dense, unpack_codes, unpack_dense_k, unpack_dense_v, unpack_scales

SPLIT = 512  # positions whose logits share one maximum; a multiple of every tile
BLOCK_ROWS = 96  # query rows that share the unpacking of a tile: their logits then fit the second-level cache
LOGITS_ROW = np.int64((SPLIT + LANES) * 4)  # bytes from one row of logits to the next: no power of two, which would share cache sets

# Indices into the int64 array that describes a segment to the kernel (see segment.py)
TILE, FIRST_TILE, WIDTH, KV_HEADS = range(4)
K_SIDE, V_SIDE = 4, 11  # where the seven numbers of each Side begin (see layout.py)

# Indices into the float32 array of options
SCALE, SOFTCAP, EXACT = range(3)  # EXACT: not 0 for float32 throughout

# Parts of a worker's room: addresses, on 64-byte boundaries
QUERIES, OUT, LOGITS, CODES, VALUES, SCALES, WORDS, FACTORS, OFFSETS, SCRATCH = range(10)


@inner
def _softmax_row(logits, start, stop, tile, cap, slope, distance, mask):  # type: ignore[no-untyped-def]
    """Turn the logits of a row into exp(logit - M), in place; returns (M, S).

    Within the tiles that the row sees, what lies outside of start .. stop becomes 0. ``distance`` is the position of the
    split's first key minus that of the query; ``mask`` an address, or 0.
    """
    simd.never_inline()
    lowest, nothing = np.float32(-np.inf), simd.splat(np.float32(0))
    first, last = start // LANES * LANES, (stop - 1) // LANES * LANES
    for at in range(start // tile * tile, first, LANES):
        simd.store_f32(logits + 4 * at, nothing)
    for at in range(last + LANES, (stop + tile - 1) // tile * tile, LANES):
        simd.store_f32(logits + 4 * at, nothing)
    if cap > 0 or slope != 0 or mask:
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
    for at in (first, last):  # the vectors that may reach beyond the range
        x = simd.keep_lanes(simd.load_f32(logits + 4 * at), np.int32(start - at), np.int32(stop - at), lowest)
        simd.store_f32(logits + 4 * at, x)
    tops, at = (simd.splat(lowest), simd.splat(lowest), simd.splat(lowest), simd.splat(lowest)), first
    while at + 4 * LANES <= stop:
        for i in range(4):
            tops = tuple_setitem(tops, i, simd.larger(tops[i], simd.load_f32(logits + 4 * at + i * VECTOR)))
        at += 4 * LANES
    top = simd.larger(simd.larger(tops[0], tops[1]), simd.larger(tops[2], tops[3]))
    while at < stop:
        top = simd.larger(top, simd.load_f32(logits + 4 * at))
        at += LANES
    M = simd.largest_lane(top)
    if lowest == M:
        M = _first_nan(logits, first, stop)
        if lowest == M:  # every key masked: nothing was attended to, and -inf - -inf is never computed
            return M, np.float32(0)
    total = nothing
    for at in range(first, stop, LANES):
        p = simd.exp(simd.sub(simd.load_f32(logits + 4 * at), simd.splat(M)))
        simd.store_f32(logits + 4 * at, p)
        total = simd.add(total, p)
    return M, simd.sum_lanes(total)


@inner
def _first_nan(logits, start, stop):  # type: ignore[no-untyped-def]
    """NaN if one is among the logits start .. stop, else -inf."""
    for i in range(start, stop):
        x = simd.scalar_at(logits + 4 * i)
        if x != x:
            return x
    return np.float32(-np.inf)


@inner
def _rows_that_see(starts, stops, rows, low, high, active):  # type: ignore[no-untyped-def]
    """List the rows whose range meets the positions low .. high in ``active``; returns how many."""
    count = 0
    for row in range(rows):
        if max(starts[row], low) < min(stops[row], high):
            active[count] = row
            count += 1
    return count


@inner
def _unpack_coded(base, side, lanes, steps, room, ahead):  # type: ignore[no-untyped-def]
    """Codes of one head and tile as pairs of uint16 in room[CODES], their scales and minima as float32 in room[SCALES]."""
    unpack_codes(base, side[KIND], lanes * steps // 32, room[CODES], ahead)
    unpack_scales(base + side[PARAMS], lanes * steps // side[GROUP], room[SCALES])


@inner
def _first_key(split, k_table, geometry):  # type: ignore[no-untyped-def]
    """Address of the first tile of K in a split, or of the last one there is."""
    return k_table[min(max(split * (SPLIT // geometry[TILE]) - geometry[FIRST_TILE], 0), k_table.size - 1)]


_INT64, _INTS, _FLOATS = types.int64, types.int64[::1], types.float32[::1]


@standalone(
    types.void(
        _INT64, _INT64, _INT64, _INT64, _INT64, _INTS, _INTS, _INTS, _INTS, _INTS, _FLOATS, _FLOATS, _INTS, _INT64, _INTS,
        _INTS, types.float32[:, ::1], types.int64[:, ::1], _INTS, _INTS, _INT64,
    )
)  # fmt: skip
def split_kernel(  # type: ignore[no-untyped-def]
    head, split, rows, n_rep, first_query, starts, stops, k_table, v_table, geometry, options, slopes, distances, mask,
    mask_strides, room, states, ranges, active, targets, following,
):  # fmt: skip
    """The partial attention of a block of rows over one split: room[OUT] (rows, width) normalised, states[:2] = M, S."""
    tile, width = geometry[TILE], geometry[WIDTH]
    k_side, v_side = geometry[K_SIDE : K_SIDE + 7], geometry[V_SIDE : V_SIDE + 7]
    exact = options[EXACT] != 0
    origin, logits, out = split * SPLIT, room[LOGITS], room[OUT]
    starts_here, stops_here = ranges[0], ranges[1]
    first, stop = SPLIT, 0
    for row in range(rows):
        a = min(max(starts[first_query + row // n_rep] - origin, 0), SPLIT)
        b = max(min(stops[first_query + row // n_rep] - origin, SPLIT), a)
        starts_here[row], stops_here[row] = a, b
        states[0, row], states[1, row] = -np.inf, 0
        if a < b:
            first, stop = min(first, a), max(stop, b)
    if first >= stop:
        return
    base = split * (SPLIT // tile) - geometry[FIRST_TILE]
    first_tile, last_tile = first // tile, (stop - 1) // tile
    first_v = v_table[base + first_tile] + head * v_side[HEAD]
    for t in range(first_tile, last_tile + 1):
        count = _rows_that_see(starts_here, stops_here, rows, t * tile, (t + 1) * tile, active)
        if count == 0:
            continue
        at, target = k_table[base + t] + head * k_side[HEAD], logits + t * tile * 4
        ahead = k_table[base + t + 1] + head * k_side[HEAD] if t < last_tile else first_v
        last = ahead + (k_side[BYTES] if t < last_tile else v_side[BYTES])
        if is_dense(k_side[KIND]):
            low, high = max(first - t * tile, 0), min(stop - t * tile, tile)
            unpack_dense_k(at, k_side[KIND], k_side[ROW], width, low, high, room[VALUES], room[SCALES])
        else:
            _unpack_coded(at, k_side, tile, width, room, ahead)
            if exact:
                codes_to_floats(
                    room[CODES], room[SCALES], tile, width, k_side[GROUP], k_side[PER_LANE], room[VALUES]
                )  # fmt: skip
        if exact or is_dense(k_side[KIND]):
            score_floats(
                room[QUERIES], width * 4, active[0], active[count - 1] + 1, tile, width, room[VALUES], target,
                LOGITS_ROW, ahead, last,
            )  # fmt: skip
        else:
            multiply_codes(
                room[QUERIES], width * 4, active, count, tile, width, room[CODES], room[SCALES], k_side[GROUP],
                k_side[PER_LANE], 1, target, LOGITS_ROW, ahead + (last - ahead) // 3, last, room[WORDS], room[FACTORS], room[OFFSETS], targets,
                room[SCRATCH],
            )  # fmt: skip
    for row in range(rows):
        query, h = first_query + row // n_rep, head * n_rep + row % n_rep
        if starts_here[row] < stops_here[row]:
            row_mask = mask + h * mask_strides[0] + query * mask_strides[1] + origin * 4 if mask else 0
            M, S = _softmax_row(
                logits + row * LOGITS_ROW, starts_here[row], stops_here[row], tile, options[SOFTCAP], slopes[h],
                distances[query] + origin, row_mask,
            )  # fmt: skip
            states[0, row], states[1, row] = M, S
            if S == 0:
                starts_here[row] = stops_here[row]
    for i in range(0, rows * width, LANES):
        simd.store_f32(out + 4 * i, simd.splat(np.float32(0)))
    for t in range(first_tile, last_tile + 1):
        count = _rows_that_see(starts_here, stops_here, rows, t * tile, (t + 1) * tile, active)
        if count == 0:
            continue
        at = v_table[base + t] + head * v_side[HEAD]
        ahead = v_table[base + t + 1] + head * v_side[HEAD] if t < last_tile else following
        last = ahead + (v_side[BYTES] if t < last_tile else k_side[BYTES])
        if is_dense(v_side[KIND]):
            low, high = max(first - t * tile, 0), min(stop - t * tile, tile)
            unpack_dense_v(at, v_side[KIND], v_side[ROW], width, tile, low, high, room[VALUES])
        else:
            _unpack_coded(at, v_side, width, tile, room, ahead)
            if exact:
                codes_to_floats(
                    room[CODES], room[SCALES], width, tile, v_side[GROUP], v_side[PER_LANE], room[VALUES]
                )  # fmt: skip
        if exact or is_dense(v_side[KIND]):
            weigh_floats(
                logits, LOGITS_ROW, active[0], active[count - 1] + 1, starts_here, stops_here, t * tile, tile, width,
                room[VALUES], out, ahead, last,
            )  # fmt: skip
        else:
            multiply_codes(
                logits + t * tile * 4, LOGITS_ROW, active, count, width, tile, room[CODES], room[SCALES], v_side[GROUP],
                v_side[PER_LANE], 0, out, width * 4, ahead + (last - ahead) // 3, last, room[WORDS], room[FACTORS], room[OFFSETS], targets,
                room[SCRATCH],
            )  # fmt: skip
    for row in range(rows):
        if states[1, row] != 0:
            share = simd.splat(np.float32(1) / states[1, row])
            for c in range(0, width, LANES):
                at = out + (row * width + c) * 4
                simd.store_f32(at, simd.mul(simd.load_f32(at), share))


@inner
def _room_parts(start, rows, tile, width):  # type: ignore[no-untyped-def]
    """Where each part of a worker's room begins, from address ``start`` on, and where the last one ends."""
    queries = start
    out = queries + rows * width * 4
    logits = out + rows * width * 4
    codes = logits + rows * LOGITS_ROW
    values = codes + tile * width * 2
    scales = values + tile * width * 4
    words = scales + max(2 * tile * width // LANES, LANES * LANES) * 4
    factors = words + (rows * max(tile, width) * 2 + 63) // 64 * 64
    offsets = factors + (rows + 3) // 4 * VECTOR
    scratch = offsets + (rows + 3) // 4 * VECTOR
    end = scratch + FOLDED * (2 * VECTOR + 4 * max(tile, width))
    return queries, out, logits, codes, values, scales, words, factors, offsets, scratch, end


_attend_split = split_kernel.call


@inner
def _attend_block(  # type: ignore[no-untyped-def]
    split_address, head, first_query, n_queries, first_split, stop_split, q, starts, stops, k_table, v_table, geometry, options, slopes,
    distances, mask, mask_strides, out, state, room, states, ranges, active, targets, outs,
):  # fmt: skip
    """Attention of some queries of one KV head's query heads over a run of splits, merged into ``out`` and ``state``."""
    width, n_heads = geometry[WIDTH], q.shape[1]
    n_rep = n_heads // geometry[KV_HEADS]
    rows = n_queries * n_rep
    scale = simd.splat(options[SCALE])
    for row in range(rows):
        query, h = first_query + row // n_rep, head * n_rep + row % n_rep
        at = q.ctypes.data + (query * n_heads + h) * width * 4
        for c in range(0, width, LANES):
            simd.store_f32(room[QUERIES] + (row * width + c) * 4, simd.mul(simd.load_f32(at + 4 * c), scale))
        outs[0, row] = out.ctypes.data + (query * n_heads + h) * width * 4
        outs[1, row] = room[OUT] + row * width * 4
        states[2, row], states[3, row] = state[h, query, 0], state[h, query, 1]
    for split in range(first_split, stop_split):
        following = _first_key(split + 1, k_table, geometry) + head * geometry[K_SIDE + HEAD]
        _attend_split(
            split_address, head, split, rows, n_rep, first_query, starts, stops, k_table, v_table, geometry, options,
            slopes, distances, mask, mask_strides, room, states, ranges, active, targets, following,
        )  # fmt: skip
        merge_rows(outs[0], states[2], states[3], outs[1], states[0], states[1], rows, width)
    for row in range(rows):
        query, h = first_query + row // n_rep, head * n_rep + row % n_rep
        state[h, query, 0], state[h, query, 1] = states[2, row], states[3, row]


@inner
def _units(worker, workers, parts, blocks, kv_heads):  # type: ignore[no-untyped-def]
    """The units of work of one worker: first, stop, step.

    Parts follow one another in memory, so a worker takes a run of them; blocks differ in work, so they are dealt out.
    """
    units = parts * blocks * kv_heads
    if parts > 1:
        return units * worker // workers, units * (worker + 1) // workers, 1
    return worker, units, workers


@inner
def _work(  # type: ignore[no-untyped-def]
    split_address, worker, workers, q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes, distances,
    mask, mask_strides, outs, states,
):  # fmt: skip
    """The share of one worker: see ``attend_parts``."""
    n_queries, kv_heads, tile, width = q.shape[0], geometry[KV_HEADS], geometry[TILE], geometry[WIDTH]
    n_rep = q.shape[1] // kv_heads
    parts, n_splits = outs.shape[0], stop_split - first_split
    block = max(1, BLOCK_ROWS // n_rep)
    blocks = (n_queries + block - 1) // block
    rows = min(block, n_queries) * n_rep
    memory = np.empty(_room_parts(0, rows, tile, width)[-1] + 64, np.uint8)
    room = np.array(_room_parts((memory.ctypes.data + 63) // 64 * 64, rows, tile, width))
    row_states = np.zeros((4, (rows + LANES - 1) // LANES * LANES), np.float32)  # M and S of a split, and of all so far
    row_outs = np.empty((2, rows), np.int64)
    ranges, active, targets = np.empty((2, rows), np.int64), np.empty(rows, np.int64), np.empty(rows, np.int64)
    first_unit, stop_unit, step = _units(worker, workers, parts, blocks, kv_heads)
    for unit in range(first_unit, stop_unit, step):
        head, rest = unit // (parts * blocks), unit % (parts * blocks)
        if parts == 1:
            head, rest = unit % kv_heads, unit // kv_heads
        part, first_query = rest // blocks, rest % blocks * block
        _attend_block(
            split_address, head, first_query, min(block, n_queries - first_query), first_split + n_splits * part // parts,
            first_split + n_splits * (part + 1) // parts, q, starts, stops, k_table, v_table, geometry, options, slopes,
            distances, mask, mask_strides, outs[part], states[part], room, row_states, ranges, active, targets, row_outs,
        )  # fmt: skip
    memory[0] = 0  # Numba frees an array after its last mention, and the addresses above do not count as one


@parallel_kernel
def attend_parts(  # type: ignore[no-untyped-def]
    split_address, q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes, distances, mask,
    mask_strides, outs, states, workers,
):  # fmt: skip
    """Attention of all queries, cut into (KV head, part of the splits, block of queries), shared out to the workers.

    outs (parts, T, H, width) and states (parts, H, T, 2) are continued: a part each for as many runs of splits, or one
    part for all.
    """
    for worker in prange(workers):
        _work(
            split_address, np.int64(worker), workers, q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes,
            distances, mask, mask_strides, outs, states,
        )  # fmt: skip
