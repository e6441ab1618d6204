"""The stateful flash-attention kernel: attention over a few segments, one after the other, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. K and V meet in the logits only, so the format of one has nothing to do with that of the other. The grid of
splits and tiles is fixed in absolute positions, the order of merges too, and each row has its own factors and
accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.

Work is dealt out in one of two ways, with the same result. Many queries: each worker takes blocks of them through all
splits. Few queries: each split of each segment is a part of its own, and the parts are merged in their order.
"""

import numpy as np
from numba import prange, types

from . import simd
from .append import append_tokens
from .jit import inner, parallel_kernel, standalone
from .products import multiply_dense, multiply_tile
from .simd import LANES
from .split import split_kernel
from .state import clear, merge_parts, merge_rows
from .tables import (
    APPEND_KERNEL,
    APPENDED,
    BLOCK_ROWS,
    COLUMNS,
    DENSE_FUNCTION,
    DENSE_KERNEL,
    DISTANCE,
    DISTANCES,
    FIELDS,
    FLOAT_FIELDS,
    FRESH,
    MASK,
    MASK_HEAD,
    MASK_QUERY,
    MASKS,
    MERGE_KERNEL,
    MOST_PARTS,
    N_HEADS,
    N_KV_HEADS,
    N_PARTS,
    N_QUERIES,
    N_SEGMENTS,
    OPTIONS,
    OUT,
    PARTIAL,
    Q_STRIDE,
    QUERIES,
    RANGES,
    ROOM_FIELDS,
    ROOM_ROWS,
    ROW_WIDTH,
    SCALE,
    SCRATCH,
    SEGMENTS,
    SLOPE,
    SLOPES,
    SPLIT,
    SPLIT_KERNEL,
    SPLIT_M,
    SPLIT_S,
    START,
    STOP,
    TARGET,
    TILE,
    TILE_FUNCTION,
    TILE_KERNEL,
    WORK_KERNEL,
    M,
    S,
    float_field,
    get,
    lay_out_room,
    room_nbytes,
    row_field,
    row_float,
    row_int,
    set_row_float,
    set_row_int,
)
from .tiles import VECTOR

_attend_split, _merge, _append = split_kernel.call, merge_parts.call, append_tokens.call
SHARE_KEYS = 48  # keys that a split's fixed costs are worth, when work is shared out


@inner
def _splits_of(call, segment):  # type: ignore[no-untyped-def]
    """The splits that any query sees of a segment: the first, and one past the last."""
    low, high = get(call, RANGES + 4 * segment + 2), get(call, RANGES + 4 * segment + 3)
    return low // SPLIT, (high + SPLIT - 1) // SPLIT if low < high else low // SPLIT


@inner
def _begin_rows(call, head, first_query, n_queries, q, out, state, fresh, room, table, numbers):  # type: ignore[no-untyped-def]
    """What belongs to the rows of some queries of a KV head's query heads, whatever the segment; returns their number."""
    n_heads, width, all_queries = get(call, N_HEADS), get(call, ROW_WIDTH), get(call, N_QUERIES)
    n_rep = n_heads // get(call, N_KV_HEADS)
    scale, mask = simd.splat(simd.scalar_at(get(call, OPTIONS) + 4 * SCALE)), get(call, MASKS)
    slopes, distances = get(call, SLOPES), get(call, DISTANCES)
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(head * n_rep, (head + 1) * n_rep):
            source, target = q + query * get(call, Q_STRIDE) + h * width * 4, get(room, QUERIES) + row * width * 4
            for c in range(0, 4 * width, VECTOR):
                simd.store_f32(target + c, simd.mul(simd.load_f32(source + c), scale))
            own_mask = mask + h * get(call, MASK_HEAD) + query * get(call, MASK_QUERY) if mask else 0
            set_row_int(table, DISTANCE, row, get(distances, query) if distances else 0)
            set_row_int(table, MASK, row, own_mask)
            set_row_int(table, TARGET, row, out + (query * n_heads + h) * width * 4)
            set_row_int(table, PARTIAL, row, get(room, OUT) + row * width * 4)
            set_row_float(numbers, SLOPE, row, simd.scalar_at(slopes + 4 * h) if slopes else np.float32(0))
            own = state + 8 * (h * all_queries + query)
            set_row_float(numbers, M, row, np.float32(-np.inf) if fresh else simd.scalar_at(own))
            set_row_float(numbers, S, row, np.float32(0) if fresh else simd.scalar_at(own + 4))
            row += 1
    return row


@inner
def _end_rows(call, head, first_query, n_queries, state, fresh, table, numbers):  # type: ignore[no-untyped-def]
    """Write the rows' states back; the output of a row that has seen no key is 0."""
    n_rep = get(call, N_HEADS) // get(call, N_KV_HEADS)
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(head * n_rep, (head + 1) * n_rep):
            own = state + 8 * (h * get(call, N_QUERIES) + query)
            simd.store_scalar(own, row_float(numbers, M, row))
            simd.store_scalar(own + 4, row_float(numbers, S, row))
            if fresh and row_float(numbers, S, row) == 0:
                clear(row_int(table, TARGET, row), get(call, ROW_WIDTH))
            row += 1


@inner
def _see_splits(call, segment, first_split, stop_split, head, first_query, n_queries, rows, room, table, numbers):  # type: ignore[no-untyped-def]
    """Attention of a worker's rows over some splits of a segment, merged into their outputs and states."""
    n_rep, width = get(call, N_HEADS) // get(call, N_KV_HEADS), get(call, ROW_WIDTH)
    addresses, geometry = get(call, SEGMENTS + 2 * segment), get(call, SEGMENTS + 2 * segment + 1)
    starts, stops = get(call, RANGES + 4 * segment), get(call, RANGES + 4 * segment + 1)
    lay_out_room(room, get(geometry, TILE), width, get(call, MOST_PARTS))
    for row in range(rows):
        query = first_query + row // n_rep
        set_row_int(table, START, row, get(starts, query))
        set_row_int(table, STOP, row, get(stops, query))
    for split in range(first_split, stop_split):
        _attend_split(
            get(call, SPLIT_KERNEL), head, split, rows, addresses, geometry, get(call, OPTIONS), room, table, numbers
        )
        merge_rows(
            row_field(table, TARGET), float_field(numbers, M), float_field(numbers, S), row_field(table, PARTIAL),
            float_field(numbers, SPLIT_M), float_field(numbers, SPLIT_S), rows, width, get(room, SCRATCH),
        )  # fmt: skip


@inner
def _all_in_one_go(call, worker, workers, block, q, out, state, room, table, numbers):  # type: ignore[no-untyped-def]
    """The share of one worker in blocks of queries. They differ in work, so they are dealt out."""
    n_queries, kv_heads, fresh = get(call, N_QUERIES), get(call, N_KV_HEADS), get(call, FRESH)
    blocks = (n_queries + block - 1) // block
    for unit in range(worker, blocks * kv_heads, workers):
        head, first = unit % kv_heads, unit // kv_heads * block
        count = min(block, n_queries - first)
        rows = _begin_rows(call, head, first, count, q, out, state, fresh, room, table, numbers)
        for segment in range(get(call, N_SEGMENTS)):
            first_split, stop_split = _splits_of(call, segment)
            _see_splits(call, segment, first_split, stop_split, head, first, count, rows, room, table, numbers)
        _end_rows(call, head, first, count, state, fresh, table, numbers)


@inner
def _keys_in(call, segment, split):  # type: ignore[no-untyped-def]
    """How many keys of a split, and what it costs besides, in keys."""
    low, high = get(call, RANGES + 4 * segment + 2), get(call, RANGES + 4 * segment + 3)
    return min(high, (split + 1) * SPLIT) - max(low, split * SPLIT) + SHARE_KEYS


@inner
def _in_parts(call, worker, workers, block, q, outs, states, room, table, numbers):  # type: ignore[no-untyped-def]
    """The share of one worker in the parts: a run, as parts, and the heads of a part, follow one another in memory."""
    n_queries, n_heads, kv_heads = get(call, N_QUERIES), get(call, N_HEADS), get(call, N_KV_HEADS)
    total, before, part = 0, 0, 0
    for segment in range(get(call, N_SEGMENTS)):
        first_split, stop_split = _splits_of(call, segment)
        for split in range(first_split, stop_split):
            total += _keys_in(call, segment, split) * kv_heads
    for segment in range(get(call, N_SEGMENTS)):
        first_split, stop_split = _splits_of(call, segment)
        for split in range(first_split, stop_split):
            out = outs + part * n_queries * n_heads * get(call, ROW_WIDTH) * 4
            state = states + part * n_queries * n_heads * 8
            keys = _keys_in(call, segment, split)
            for head in range(kv_heads):
                if (2 * before + keys) * workers // (2 * total) == worker:
                    for first in range(0, n_queries, block):
                        count = min(block, n_queries - first)
                        rows = _begin_rows(call, head, first, count, q, out, state, True, room, table, numbers)
                        _see_splits(call, segment, split, split + 1, head, first, count, rows, room, table, numbers)
                        _end_rows(call, head, first, count, state, True, table, numbers)
                before += keys
            part += 1


@standalone(types.void(*[types.int64] * 8))
def attend_share(call, worker, workers, q, out, state, outs, states):  # type: ignore[no-untyped-def]
    """The share of one worker. All arguments are numbers or addresses."""
    n_queries, n_heads, width = get(call, N_QUERIES), get(call, N_HEADS), get(call, ROW_WIDTH)
    n_rep = n_heads // get(call, N_KV_HEADS)
    block = max(1, BLOCK_ROWS // n_rep)
    rows, nbytes = min(block, n_queries) * n_rep, 0
    for segment in range(get(call, N_SEGMENTS)):
        tile = get(get(call, SEGMENTS + 2 * segment + 1), TILE)
        nbytes = max(nbytes, room_nbytes(rows, tile, width, get(call, MOST_PARTS)))
    memory, room = np.empty(nbytes + 64, np.uint8), np.empty(ROOM_FIELDS, np.int64)
    table, numbers = np.empty(FIELDS * COLUMNS, np.int64), np.zeros(FLOAT_FIELDS * COLUMNS, np.float32)
    room[QUERIES] = (memory.ctypes.data + 63) // 64 * 64
    room[OUT] = room[QUERIES] + rows * width * 4
    room[ROOM_ROWS] = rows
    room[TILE_KERNEL], room[DENSE_KERNEL] = get(call, TILE_FUNCTION), get(call, DENSE_FUNCTION)
    if get(call, N_PARTS):
        _in_parts(
            call, worker, workers, block, q, outs, states, room.ctypes.data, table.ctypes.data, numbers.ctypes.data
        )
    else:
        _all_in_one_go(
            call, worker, workers, block, q, out, state, room.ctypes.data, table.ctypes.data, numbers.ctypes.data
        )
    # Numba frees an array after its last mention, and the addresses above do not count as one.
    memory[0] = room[0] = table[0] = numbers[0] = 0


_share = attend_share.call
KERNELS = {
    SPLIT_KERNEL: split_kernel,
    TILE_FUNCTION: multiply_tile,
    DENSE_FUNCTION: multiply_dense,
    WORK_KERNEL: attend_share,
    MERGE_KERNEL: merge_parts,
    APPEND_KERNEL: append_tokens,
}
"""The kernels that are called by their address, by the field of a call that has it."""


@parallel_kernel
def attend_segments(call, q, out, state, workers):  # type: ignore[no-untyped-def]
    """Attention of all queries over the segments of ``call`` (see tables.py), in their order.

    q: float32 (T, heads, width), of which the first N_HEADS heads are queries. out (T, H, width) and state (H, T, 2) are
    continued, or begun where FRESH. Where APPENDED, the heads behind the queries are keys and values, stored first.
    """
    parts, rows = call[N_PARTS], call[N_QUERIES] * call[N_HEADS]
    if call[APPENDED]:
        _append(call[APPEND_KERNEL], call.ctypes.data, q.ctypes.data)
    outs, states = (
        np.empty(parts * rows * call[ROW_WIDTH] + LANES, np.float32),
        np.empty(parts * rows * 2 + 1, np.float32),
    )
    for worker in prange(workers):
        _share(
            call[WORK_KERNEL], call.ctypes.data, np.int64(worker), workers, q.ctypes.data, out.ctypes.data,
            state.ctypes.data, outs.ctypes.data, states.ctypes.data,
        )  # fmt: skip
    if parts:
        _merge(
            call[MERGE_KERNEL], outs.ctypes.data, states.ctypes.data, parts, call[N_QUERIES], call[N_HEADS],
            call[ROW_WIDTH], out.ctypes.data, state.ctypes.data, call[FRESH],
        )  # fmt: skip
    outs[0] = states[0] = 0
