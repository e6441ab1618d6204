"""The stateful flash-attention kernel: attention over one segment, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. The grid of splits and tiles is fixed in absolute positions, the order of merges too, and each row has
its own accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.
"""

import numpy as np
from numba import prange
from numba.cpython.unsafe.tuple import tuple_setitem

from . import simd
from .jit import inner, kernel, parallel_kernel
from .simd import LANES
from .state import merge_row
from .tiles import VECTOR, unpack_k, unpack_v

SPLIT = 512  # positions whose logits share one maximum; a multiple of every tile
BLOCK_ROWS = 96  # query rows that share the unpacking of a tile: their logits then fit the second-level cache

# Indices into the int64 array that describes a segment to the kernel (see segment.py)
TILE, FIRST_TILE, WIDTH, KV_HEADS = range(4)
K_KIND, K_HEAD, K_ROW, K_PARAMS = range(4, 8)
V_KIND, V_HEAD, V_ROW, V_PARAMS, V_GROUP = range(8, 13)

# Indices into the float32 array of options
SCALE, SOFTCAP = 0, 1


@inner
def _fma_rows(acc, a, a_stride, b, count):  # type: ignore[no-untyped-def]
    """acc[i] += sum over j < count of a[i, j] * b[j]: the one product of both sides. b is a vector a step."""
    for j in range(count):
        column = simd.load_f32(b + j * VECTOR)
        for i in range(len(acc)):
            acc = tuple_setitem(acc, i, simd.fma(simd.splat_at(a + i * a_stride + 4 * j), column, acc[i]))
    return acc


@inner
def _zeros8():  # type: ignore[no-untyped-def]
    z = simd.splat(np.float32(0))
    return (z, z, z, z, z, z, z, z)


@inner
def _zeros4():  # type: ignore[no-untyped-def]
    z = simd.splat(np.float32(0))
    return (z, z, z, z)


@inner
def _store_rows(acc, target, stride):  # type: ignore[no-untyped-def]
    for i in range(len(acc)):
        simd.store_f32(target + i * stride, acc[i])


@inner
def _add_to_rows(acc, p, p_stride, values, count, out, out_stride):  # type: ignore[no-untyped-def]
    """out[i] += p[i] . values, for as many rows as ``acc`` is long; its content does not matter."""
    for i in range(len(acc)):
        acc = tuple_setitem(acc, i, simd.load_f32(out + i * out_stride))
    _store_rows(_fma_rows(acc, p, p_stride, values, count), out, out_stride)


@inner
def _block_scores(q, rows, width, starts, stops, origin, n_blocks, keys, logits):  # type: ignore[no-untyped-def]
    """Logits of all rows against the 16-token blocks of one unpacked tile; blocks that no row of a group sees are skipped.

    ``origin`` is the tile's first position, relative to the split like starts and stops.
    """
    for block in range(n_blocks):
        at = origin + block * LANES
        row = 0
        while row < rows:
            size = 8 if rows - row >= 8 else 4
            seen = False
            for i in range(row, row + size):
                seen |= starts[i] < at + LANES and stops[i] > at
            if seen:
                a, b = q + row * width * 4, keys + block * width * VECTOR
                target = logits + (row * SPLIT + at) * 4
                if size == 8:
                    _store_rows(_fma_rows(_zeros8(), a, width * 4, b, width), target, SPLIT * 4)
                else:
                    _store_rows(_fma_rows(_zeros4(), a, width * 4, b, width), target, SPLIT * 4)
            row += size


@inner
def _softmax_row(logits, start, stop, options, slope, distance, mask):  # type: ignore[no-untyped-def]
    """Turn the raw dot products of a row into exp(logit - M), in place; returns (M, S).

    ``distance`` is the position of the split's first key minus that of the query; ``mask`` an address, or 0.
    """
    lowest = np.float32(-np.inf)
    scale, cap = simd.splat(options[SCALE]), options[SOFTCAP]
    top = simd.splat(lowest)
    first = start // LANES * LANES
    for at in range(first, stop, LANES):
        x = simd.mul(simd.load_f32(logits + 4 * at), scale)
        if cap > 0:
            y = simd.div(x, simd.splat(cap))
            x = simd.mul(simd.splat(cap), simd.tanh_from_exp(y, simd.exp(simd.add(y, y))))
        if slope != 0:
            away = simd.add(simd.lane_numbers(), simd.splat(np.float32(distance + at)))
            x = simd.fma(simd.splat(slope), away, x)
        if mask:
            x = simd.add(x, simd.load_f32(mask + 4 * at))
        if at < start or at + LANES > stop:
            x = simd.keep_lanes(x, np.int32(start - at), np.int32(stop - at), lowest)
        simd.store_f32(logits + 4 * at, x)
        top = simd.maximum(top, x)
    M = simd.max_lanes(top)
    if lowest == M:  # every key masked: nothing was attended to, and -inf - -inf is never computed
        return M, np.float32(0)
    total = simd.splat(np.float32(0))
    for at in range(first, stop, LANES):
        p = simd.exp(simd.sub(simd.load_f32(logits + 4 * at), simd.splat(M)))
        simd.store_f32(logits + 4 * at, p)
        total = simd.add(total, p)
    return M, simd.sum_lanes(total)


@inner
def _one_row(p, values, lo, hi, tile, width, out):  # type: ignore[no-untyped-def]
    """Out += p[lo:hi] . values[lo:hi] for one row; all offsets relative to the tile."""
    for vector in range(width // LANES):
        at = values + (vector * tile + lo) * VECTOR
        _add_to_rows((simd.splat(np.float32(0)),), p + 4 * lo, 0, at, hi - lo, out + vector * VECTOR, 0)


@inner
def _weigh_values(p, rows, width, starts, stops, origin, tile, values, out):  # type: ignore[no-untyped-def]
    """out[row] += sum of p * V over the part of one unpacked tile that each row sees, in the order of the tokens.

    Rows go in groups of 4 over the range they share; what only some of them see comes before and after, row by row. A
    token outside a row's range is never touched, so whatever lies there (NaN even) cannot reach the row.
    """
    lows, highs = np.empty(4, np.int64), np.empty(4, np.int64)
    for row in range(0, rows, 4):
        low, high = 0, tile
        for i in range(4):
            lows[i] = min(max(starts[row + i] - origin, 0), tile)
            highs[i] = max(min(stops[row + i] - origin, tile), lows[i])
            low, high = max(low, lows[i]), min(high, highs[i])
        shared = low < high
        target, weights = out + row * width * 4, p + (row * SPLIT + origin) * 4
        for i in range(4):
            stop = low if shared else highs[i]
            if lows[i] < stop:
                _one_row(weights + i * SPLIT * 4, values, lows[i], stop, tile, width, target + i * width * 4)
        if shared:
            for vector in range(width // LANES):
                at = values + (vector * tile + low) * VECTOR
                _add_to_rows(
                    _zeros4(), weights + 4 * low, SPLIT * 4, at, high - low, target + vector * VECTOR, width * 4
                )
            for i in range(4):
                if high < highs[i]:
                    _one_row(weights + i * SPLIT * 4, values, high, highs[i], tile, width, target + i * width * 4)


@inner
def _attend_split(  # type: ignore[no-untyped-def]
    head, split, rows, n_rep, first_query, qrows, starts, stops, k_table, v_table, geometry, options, slopes, distances,
    mask, mask_strides, logits, out, states, local_starts, local_stops, keys, values, scratch,
):  # fmt: skip
    """The partial attention of a block of rows over one split: ``out`` (rows, width) normalised, ``states`` (rows, 2)."""
    tile, width = geometry[TILE], geometry[WIDTH]
    origin = split * SPLIT
    first, stop = SPLIT, 0
    for row in range(rows):
        a = min(max(starts[first_query + row // n_rep] - origin, 0), SPLIT)
        b = max(min(stops[first_query + row // n_rep] - origin, SPLIT), a)
        local_starts[row], local_stops[row] = a, b
        states[row, 0], states[row, 1] = -np.inf, 0
        if a < b:
            first, stop = min(first, a), max(stop, b)
    padded = (rows + 3) // 4 * 4
    for row in range(rows, padded):  # rows that only fill a group of four; they see what the last one sees
        local_starts[row], local_stops[row] = local_starts[rows - 1], local_stops[rows - 1]
    if first >= stop:
        return
    base = split * (SPLIT // tile) - geometry[FIRST_TILE]
    for t in range(first // tile, (stop + tile - 1) // tile):
        lo, hi = max(first - t * tile, 0), min(stop - t * tile, tile)
        at = k_table[base + t] + head * geometry[K_HEAD]
        unpack_k(at, geometry[K_KIND], geometry[K_ROW], geometry[K_PARAMS], width, lo, hi, keys, scratch)
        skip = lo // LANES
        _block_scores(
            qrows, padded, width, local_starts, local_stops, t * tile + skip * LANES, (hi + LANES - 1) // LANES - skip,
            keys + skip * width * VECTOR, logits,
        )  # fmt: skip
    for row in range(rows):
        query, h = first_query + row // n_rep, head * n_rep + row % n_rep
        if local_starts[row] < local_stops[row]:
            row_mask = mask + h * mask_strides[0] + query * mask_strides[1] + origin * 4 if mask else 0
            M, S = _softmax_row(
                logits + row * SPLIT * 4, local_starts[row], local_stops[row], options, slopes[h],
                distances[query] + origin, row_mask,
            )  # fmt: skip
            states[row, 0], states[row, 1] = M, S
            if S == 0:
                local_starts[row] = local_stops[row]
    for i in range(0, padded * width, LANES):
        simd.store_f32(out + 4 * i, simd.splat(np.float32(0)))
    for t in range(first // tile, (stop + tile - 1) // tile):
        lo, hi = max(first - t * tile, 0), min(stop - t * tile, tile)
        at = v_table[base + t] + head * geometry[V_HEAD]
        unpack_v(
            at, geometry[V_KIND], geometry[V_ROW], geometry[V_PARAMS], geometry[V_GROUP], width, tile, lo, hi, values,
            scratch,
        )  # fmt: skip
        _weigh_values(logits, padded, width, local_starts, local_stops, t * tile, tile, values, out)
    for row in range(rows):
        if states[row, 1] != 0:
            share = simd.splat(np.float32(1) / states[row, 1])
            for c in range(0, width, LANES):
                at = out + (row * width + c) * 4
                simd.store_f32(at, simd.mul(simd.load_f32(at), share))


@inner
def _aligned(buffer):  # type: ignore[no-untyped-def]
    """The first address of a buffer that lies on a 64-byte boundary."""
    return (buffer.ctypes.data + 63) // 64 * 64


@inner
def _attend_block(  # type: ignore[no-untyped-def]
    head, first_query, n_queries, first_split, stop_split, q, starts, stops, k_table, v_table, geometry, options, slopes,
    distances, mask, mask_strides, out, state,
):  # fmt: skip
    """Attention of some queries of one KV head's query heads over a run of splits, merged into ``out`` and ``state``."""
    tile, width = geometry[TILE], geometry[WIDTH]
    n_heads = q.shape[1]
    n_rep = n_heads // geometry[KV_HEADS]
    rows = n_queries * n_rep
    padded = (rows + 3) // 4 * 4
    scratch_size = 2 * max(width, tile * (width // geometry[V_GROUP]))
    room = np.empty(padded * (2 * width + SPLIT) + 2 * tile * width + scratch_size + 16, np.float32)
    qrows = _aligned(room)
    partial = qrows + padded * width * 4
    logits = partial + padded * width * 4
    keys = logits + padded * SPLIT * 4
    values = keys + tile * width * 4
    scratch = values + tile * width * 4
    states = np.empty((rows, 2), np.float32)
    local_starts, local_stops = np.empty(padded, np.int64), np.empty(padded, np.int64)
    for row in range(padded):
        source = min(row, rows - 1)
        query, h = first_query + source // n_rep, head * n_rep + source % n_rep
        at = q.ctypes.data + (query * n_heads + h) * width * 4
        for c in range(0, width, LANES):
            simd.store_f32(qrows + (row * width + c) * 4, simd.load_f32(at + 4 * c))
    for split in range(first_split, stop_split):
        _attend_split(
            head, split, rows, n_rep, first_query, qrows, starts, stops, k_table, v_table, geometry, options, slopes,
            distances, mask, mask_strides, logits, partial, states, local_starts, local_stops, keys, values, scratch,
        )  # fmt: skip
        for row in range(rows):
            query, h = first_query + row // n_rep, head * n_rep + row % n_rep
            M, S = merge_row(
                out.ctypes.data + (query * n_heads + h) * width * 4, state[h, query, 0], state[h, query, 1],
                partial + row * width * 4, states[row, 0], states[row, 1], width,
            )  # fmt: skip
            state[h, query, 0], state[h, query, 1] = M, S
    return room.size  # Numba frees an array after its last mention, and the addresses above do not count as one


@parallel_kernel
def attend_blocks(  # type: ignore[no-untyped-def]
    q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes, distances, mask,
    mask_strides, out, state, workers,
):  # fmt: skip
    """Attention with many queries: the work is cut into (KV head, block of queries), dealt out in turn to the workers."""
    n_queries, kv_heads = q.shape[0], geometry[KV_HEADS]
    block = max(1, BLOCK_ROWS // (q.shape[1] // kv_heads))
    units = (n_queries + block - 1) // block * kv_heads
    for worker in prange(workers):
        for unit in range(worker, units, workers):
            first = unit // kv_heads * block
            _attend_block(
                unit % kv_heads, first, min(block, n_queries - first), first_split, stop_split, q, starts, stops, k_table,
                v_table, geometry, options, slopes, distances, mask, mask_strides, out, state,
            )  # fmt: skip


@parallel_kernel
def attend_splits(  # type: ignore[no-untyped-def]
    q, starts, stops, first_split, stop_split, k_table, v_table, geometry, options, slopes, distances, mask,
    mask_strides, partial_outs, partial_states, workers,
):  # fmt: skip
    """Attention with few queries: the work is cut into (KV head, split), each into a partial attention of its own.

    partial_outs (n_splits, T, H, width) and partial_states (n_splits, H, T, 2), the latter empty, receive them.
    """
    n_queries, kv_heads = q.shape[0], geometry[KV_HEADS]
    units = (stop_split - first_split) * kv_heads
    for worker in prange(workers):
        for unit in range(worker, units, workers):
            i = unit // kv_heads
            _attend_block(
                unit % kv_heads, 0, n_queries, first_split + i, first_split + i + 1, q, starts, stops, k_table, v_table,
                geometry, options, slopes, distances, mask, mask_strides, partial_outs[i], partial_states[i],
            )  # fmt: skip


@kernel
def merge_partials(partial_outs, partial_states, out, state):  # type: ignore[no-untyped-def]
    """Merge partial attentions into ``out`` (T, H, width) and ``state`` (H, T, 2), in the order of the splits."""
    n_splits, n_queries, n_heads, width = partial_outs.shape
    for h in range(n_heads):
        for t in range(n_queries):
            M, S = state[h, t, 0], state[h, t, 1]
            target = out.ctypes.data + (t * n_heads + h) * width * 4
            for i in range(n_splits):
                source = partial_outs.ctypes.data + ((i * n_queries + t) * n_heads + h) * width * 4
                other = partial_states[i, h, t]
                M, S = merge_row(target, M, S, source, other[0], other[1], width)
            state[h, t, 0], state[h, t, 1] = M, S
