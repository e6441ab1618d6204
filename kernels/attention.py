"""The stateful flash-attention kernel: attention over a few segments, one after the other, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. K and V meet in the logits only, so the format of one has nothing to do with that of the other. The grid of
splits and tiles is fixed in absolute positions, the order of merges too, and each row has its own factors and
accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.

Work is dealt out in one of two ways, with the same result. Many queries: whoever is free takes blocks of them through all
splits. Few queries: each split of each segment is a part of its own, and the parts are merged in their order.
"""

import numpy as np
from numba import prange, types

from . import simd
from .append import store_share
from .crew import ALL_WORKERS, TASK_NBYTES, begin_tasks, do_task, have_failed, threads_in_force
from .hadamard import rotate_head
from .jit import SHARE, inner, parallel_kernel, standalone
from .products import multiply_dense, multiply_tiles
from .quantize import JOB_FIELDS, TOO_WIDE_AT, quantize_share
from .scratch import begin_of, let_go, own_memory
from .split import fold_tiles, split_kernel
from .state import clear, merge_parts, merge_rows
from .tables import (
    APPENDED,
    BLOCK_ROWS,
    CALL,
    CALL_TASKS,
    DENSE_KERNEL,
    DISTANCE,
    DISTANCES,
    FIELDS_AT,
    FINISH_KERNEL,
    FIRST_QUERY,
    FIRST_TILE,
    FOLD_KERNEL,
    FOLLOW_KERNEL,
    FRESH,
    HEAD_DIM,
    JOB_STARTS,
    JOBS,
    LEDGER,
    LEDGER_KERNEL,
    LOST,
    MASK,
    MASK_HEAD,
    MASK_QUERY,
    MASKS,
    MAX_ROUNDS,
    MERGE_KERNEL,
    MOST_PARTS,
    N_HEADS,
    N_KV_HEADS,
    N_PARTS,
    N_QUERIES,
    N_SEGMENTS,
    NEXT_HEAD,
    NEXT_STOP,
    NEXT_TILE,
    OPTIONS,
    OUT,
    PARTIAL,
    Q_STRIDE,
    QUERIES,
    RANGES,
    ROOM_AT,
    ROOM_ROWS,
    ROW_WIDTH,
    SCALE,
    SCRATCH,
    SEAL_KERNEL,
    SEGMENTS,
    SLOPE,
    SLOPES,
    SPLIT,
    SPLIT_KERNEL,
    SPLIT_M,
    SPLIT_S,
    START,
    STOP,
    STORE_KERNEL,
    TABLE_AT,
    TARGET,
    TILE,
    TILE_KERNEL,
    UNPACK_KERNEL,
    V_BLOCK,
    WORK_KERNEL,
    M,
    S,
    call_tasks,
    float_field,
    get,
    lay_out_room,
    put,
    room_nbytes,
    row_field,
    row_float,
    row_int,
    set_row_float,
    set_row_int,
)
from .tiles import VECTOR, unpack_head

_attend_split, _merge = split_kernel.call, merge_parts.call
SHARE_KEYS = 48  # keys that a split's fixed costs are worth, when work is shared out
SHARES_A_WORKER = 8  # of blocks of queries, for the one who is held up
ALONE = 16  # tokens that are stored before a second worker would have begun


@inner
def _splits_of(call, segment):  # type: ignore[no-untyped-def]
    """The splits that any query sees of a segment: the first, and one past the last."""
    low, high = get(call, RANGES + 4 * segment + 2), get(call, RANGES + 4 * segment + 3)
    return low // SPLIT, (high + SPLIT - 1) // SPLIT if low < high else low // SPLIT


@inner
def _begin_rows(call, head, first_query, n_queries, q, out, state, fresh, room, table, numbers):  # type: ignore[no-untyped-def]
    """What belongs to the rows of some queries of a KV head's query heads, whatever the segment; returns their number."""
    simd.never_inline()
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
def _enter(call, segment, first_query, n_queries, first_head, n_heads, table, numbers):  # type: ignore[no-untyped-def]
    """Write the states that rows have after a segment into the ledger, where there is one."""
    if get(call, LEDGER) == 0:
        return
    at = get(call, LEDGER) + 8 * segment * get(call, N_HEADS) * get(call, N_QUERIES)
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(first_head, first_head + n_heads):
            own = at + 8 * (h * get(call, N_QUERIES) + query)
            simd.store_scalar(own, row_float(numbers, M, row))
            simd.store_scalar(own + 4, row_float(numbers, S, row))
            row += 1


@inner
def _rotate_back(call, out):  # type: ignore[no-untyped-def]
    """Rotate one output that was made of rotated values back, in place."""
    if get(call, V_BLOCK):
        rotate_head(out, get(call, HEAD_DIM), get(call, V_BLOCK))


@inner
def _end_rows(call, head, first_query, n_queries, state, fresh, table, numbers):  # type: ignore[no-untyped-def]
    """Write the rows' states back; the output of a row that has seen no key is 0."""
    simd.never_inline()
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
def _look_ahead(call, segment, split, head, room):  # type: ignore[no-untyped-def]
    """Say which tiles of a segment a worker turns to next, those of a split and a head; none if there is no such split."""
    geometry = get(call, SEGMENTS + 2 * segment + 1)
    low, high = max(get(call, RANGES + 4 * segment + 2), split * SPLIT), get(call, RANGES + 4 * segment + 3)
    tile, first = get(geometry, TILE), get(geometry, FIRST_TILE)
    put(room, NEXT_TILE, low // tile - first)
    put(room, NEXT_STOP, (min(high, (split + 1) * SPLIT) + tile - 1) // tile - first)
    put(room, NEXT_HEAD, head)


@inner
def _see_splits(  # type: ignore[no-untyped-def]
    call, segment, first_split, stop_split, by_head, head, first_query, n_queries, rows, room, table, numbers
):
    """Attention of a worker's rows over some splits of a segment, merged into their outputs and states.

    by_head: whether the worker goes from here to the next head, and not to the next split.
    """
    simd.never_inline()
    n_rep, width = get(call, N_HEADS) // get(call, N_KV_HEADS), get(call, ROW_WIDTH)
    addresses, geometry = get(call, SEGMENTS + 2 * segment), get(call, SEGMENTS + 2 * segment + 1)
    starts, stops = get(call, RANGES + 4 * segment), get(call, RANGES + 4 * segment + 1)
    lay_out_room(room, get(geometry, TILE), width, get(call, MOST_PARTS))
    for row in range(rows):
        query = first_query + row // n_rep
        set_row_int(table, START, row, get(starts, query))
        set_row_int(table, STOP, row, get(stops, query))
    for split in range(first_split, stop_split):
        if by_head and head + 1 < get(call, N_KV_HEADS):
            _look_ahead(call, segment, split, head + 1, room)
        else:
            _look_ahead(call, segment, split + 1, np.int64(0) if by_head else head, room)
        _attend_split(
            get(call, SPLIT_KERNEL), head, split, rows, addresses, geometry, get(call, OPTIONS), room, table, numbers
        )
        merge_rows(
            row_field(table, TARGET), float_field(numbers, M), float_field(numbers, S), row_field(table, PARTIAL),
            float_field(numbers, SPLIT_M), float_field(numbers, SPLIT_S), rows, width, get(room, SCRATCH),
        )  # fmt: skip


@inner
def _block_queries(call):  # type: ignore[no-untyped-def]
    """How many queries are a block."""
    return max(1, BLOCK_ROWS * get(call, N_KV_HEADS) // get(call, N_HEADS))


@inner
def _blocks(call):  # type: ignore[no-untyped-def]
    """How many blocks of queries there are."""
    block = _block_queries(call)
    return (get(call, N_QUERIES) - get(call, FIRST_QUERY) + block - 1) // block


@inner
def _all_in_one_go(call, worker, workers, block, q, out, state, room, table, numbers):  # type: ignore[no-untyped-def]
    """One of some shares in blocks of queries. They differ in work, so they are dealt out, the last ones first."""
    n_queries, kv_heads, fresh = get(call, N_QUERIES), get(call, N_KV_HEADS), get(call, FRESH)
    n_rep, begin, units = get(call, N_HEADS) // kv_heads, get(call, FIRST_QUERY), _blocks(call) * kv_heads
    for nth in range(worker, units, workers):
        unit = units - 1 - nth
        head, first = unit % kv_heads, begin + unit // kv_heads * block
        count = min(block, n_queries - first)
        rows = _begin_rows(call, head, first, count, q, out, state, fresh, room, table, numbers)
        for segment in range(get(call, N_SEGMENTS)):
            first_split, stop_split = _splits_of(call, segment)
            _see_splits(call, segment, first_split, stop_split, False, head, first, count, rows, room, table, numbers)
            _enter(call, segment, first, count, head * n_rep, n_rep, table, numbers)
        _end_rows(call, head, first, count, state, fresh, table, numbers)
        for row in range(rows):
            _rotate_back(call, row_int(table, TARGET, row))


@inner
def _keys_in(call, segment, split):  # type: ignore[no-untyped-def]
    """How many keys of a split, and what it costs besides, in keys."""
    low, high = get(call, RANGES + 4 * segment + 2), get(call, RANGES + 4 * segment + 3)
    return min(high, (split + 1) * SPLIT) - max(low, split * SPLIT) + SHARE_KEYS


@inner
def _in_parts(call, worker, workers, block, q, outs, states, room, table, numbers):  # type: ignore[no-untyped-def]
    """The share of one worker in the parts: a run, as parts, and the heads of a part, follow one another in memory."""
    n_queries, n_heads, kv_heads = get(call, N_QUERIES), get(call, N_HEADS), get(call, N_KV_HEADS)
    total, before, part, one = 0, 0, 0, np.int64(1)
    for segment in range(get(call, N_SEGMENTS)):
        first_split, stop_split = _splits_of(call, segment)
        for split in range(first_split, stop_split):
            total += _keys_in(call, segment, split) * kv_heads
    low, high = 2 * total * worker, 2 * total * (worker + 1)
    for segment in range(get(call, N_SEGMENTS)):
        first_split, stop_split = _splits_of(call, segment)
        for split in range(first_split, stop_split):
            out = outs + part * n_queries * n_heads * get(call, ROW_WIDTH) * 4
            state = states + part * n_queries * n_heads * 8
            keys = _keys_in(call, segment, split)
            for head in range(kv_heads):
                if low <= (2 * before + keys) * workers < high:  # its middle lies in the share
                    for first in range(0, n_queries, block):
                        count = min(block, n_queries - first)
                        rows = _begin_rows(call, head, first, count, q, out, state, one, room, table, numbers)
                        _see_splits(
                            call, segment, split, split + 1, True, head, first, count, rows, room, table, numbers
                        )
                        _end_rows(call, head, first, count, state, one, table, numbers)
                before += keys
            part += 1


@standalone(SHARE)
def attend_share(call, worker, workers, _, q, out, state, outs, states):  # type: ignore[no-untyped-def]
    """The share of one worker in the attention. All arguments are numbers or addresses."""
    n_queries, n_heads, width = get(call, N_QUERIES), get(call, N_HEADS), get(call, ROW_WIDTH)
    n_rep, block = n_heads // get(call, N_KV_HEADS), _block_queries(call)
    rows, nbytes = min(block, n_queries) * n_rep, 0
    for segment in range(get(call, N_SEGMENTS)):
        tile = get(get(call, SEGMENTS + 2 * segment + 1), TILE)
        nbytes = max(nbytes, room_nbytes(rows, tile, width, get(call, MOST_PARTS)))
    memory = own_memory(ROOM_AT + nbytes)
    numbers = begin_of(memory)
    table, room, queries = numbers + TABLE_AT, numbers + FIELDS_AT, numbers + ROOM_AT
    clear(numbers, TABLE_AT // 4)  # also those of no row, which are merged too
    put(room, QUERIES, queries)
    put(room, OUT, queries + rows * width * 4)
    put(room, ROOM_ROWS, rows)
    put(room, CALL, call)
    if get(call, N_PARTS):
        _in_parts(call, worker, workers, block, q, outs, states, room, table, numbers)
    else:
        _all_in_one_go(call, worker, workers, block, q, out, state, room, table, numbers)
    let_go(memory)


@standalone(types.void(*[types.int64] * 2))
def enter_parts(call, states):  # type: ignore[no-untyped-def]
    """The ledger of a call whose splits were attended to apart: ``states`` (parts, H, T, 2) added up in their order."""
    rows, part = get(call, N_HEADS) * get(call, N_QUERIES), 0
    before = np.int64(0)
    for segment in range(get(call, N_SEGMENTS)):
        at = get(call, LEDGER) + 8 * rows * segment
        for i in range(0, 8 * rows, 8):
            simd.store_scalar(at + i, simd.scalar_at(before + i) if before else np.float32(-np.inf))
            simd.store_scalar(at + i + 4, simd.scalar_at(before + i + 4) if before else np.float32(0))
        first_split, stop_split = _splits_of(call, segment)
        for _ in range(first_split, stop_split):
            other = states + 8 * rows * part
            for i in range(0, 8 * rows, 8):
                m, s = simd.scalar_at(at + i), simd.scalar_at(at + i + 4)
                other_m, other_s = simd.scalar_at(other + i), simd.scalar_at(other + i + 4)
                top = max(m, other_m)
                total = np.float32(0)
                if s > 0:
                    total += s * np.exp(m - top)
                if other_s > 0:
                    total += other_s * np.exp(other_m - top)
                simd.store_scalar(at + i, top)
                simd.store_scalar(at + i + 4, total)
            part += 1
        before = at


_enter_parts = enter_parts.call


@standalone(SHARE)
def finish_parts(call, _1, _2, _3, _q, out, state, outs, states):  # type: ignore[no-untyped-def]
    """Merge the parts in their order: a task of one share."""
    rows, width = get(call, N_QUERIES) * get(call, N_HEADS), get(call, ROW_WIDTH)
    _merge(
        get(call, MERGE_KERNEL), outs, states, get(call, N_PARTS), get(call, N_QUERIES), get(call, N_HEADS), width, out,
        state, get(call, FRESH),
    )  # fmt: skip
    for row in range(rows if get(call, V_BLOCK) else 0):
        rotate_head(out + 4 * row * width, get(call, HEAD_DIM), get(call, V_BLOCK))
    if get(call, LEDGER):
        _enter_parts(get(call, LEDGER_KERNEL), call, states)


@standalone(types.void(*[types.int64] * 7))
def follow_attention(call, q, out, state, outs, states, workers):  # type: ignore[no-untyped-def]
    """One worker's part in a call, whose tasks are zeros. All arguments are numbers or addresses."""
    task, one = call_tasks(call), np.int64(1)
    if get(call, APPENDED):
        storing = one if get(call, N_QUERIES) <= ALONE else workers
        do_task(get(call, STORE_KERNEL), call, storing, np.int64(0), q, out, state, outs, states, task)
    for nth_round in range(MAX_ROUNDS):
        task += TASK_NBYTES
        if get(call, JOB_STARTS + nth_round) < get(call, JOB_STARTS + nth_round + 1):
            do_task(get(call, SEAL_KERNEL), call, workers, nth_round, q, out, state, outs, states, task)
    task += TASK_NBYTES
    parts = get(call, N_PARTS) if get(call, N_PARTS) else _blocks(call)
    shares = min(parts * get(call, N_KV_HEADS), SHARES_A_WORKER * workers)
    do_task(get(call, WORK_KERNEL), call, shares, np.int64(0), q, out, state, outs, states, task)
    task += TASK_NBYTES
    if get(call, N_PARTS):
        do_task(get(call, FINISH_KERNEL), call, one, np.int64(0), q, out, state, outs, states, task)


_follow = follow_attention.call
KERNELS = {
    SPLIT_KERNEL: split_kernel,
    FOLD_KERNEL: fold_tiles,
    TILE_KERNEL: multiply_tiles,
    DENSE_KERNEL: multiply_dense,
    WORK_KERNEL: attend_share,
    MERGE_KERNEL: merge_parts,
    STORE_KERNEL: store_share,
    SEAL_KERNEL: quantize_share,
    LEDGER_KERNEL: enter_parts,
    UNPACK_KERNEL: unpack_head,
    FOLLOW_KERNEL: follow_attention,
    FINISH_KERNEL: finish_parts,
}
"""The kernels that are called by their address, by the field of a call that has it."""


@inner
def is_to_be_repeated(call):  # type: ignore[no-untyped-def]
    """Whether something did not fit where a call put it: then it is described anew, with more room (engine/layer.py)."""
    if get(call, LOST):
        return True
    jobs, stop = get(call, JOBS), get(call, JOB_STARTS + MAX_ROUNDS)
    for job in range(stop):
        for field in range(TOO_WIDE_AT, JOB_FIELDS):
            if get(jobs + 8 * JOB_FIELDS * job, field):
                return True
    return False


@parallel_kernel
def attend_segments(call, q, out, state, workers):  # type: ignore[no-untyped-def]
    """Attention of all queries over the segments of ``call`` (see tables.py), in their order.

    q: float32 (T, heads, width), of which the first N_HEADS heads are queries. out (T, H, width) and state (H, T, 2) are
    continued, or begun where FRESH. Where APPENDED, the heads behind the queries are keys and values: they are stored
    first. Then tiles are quantized, as the call's jobs say (quantize.py), round by round. workers: their number, or
    ALL_WORKERS.
    """
    if workers == ALL_WORKERS:
        workers = threads_in_force()
    parts, rows = call[N_PARTS], call[N_QUERIES] * call[N_HEADS]
    outs_nbytes = 4 * parts * rows * call[ROW_WIDTH]
    memory = own_memory(outs_nbytes + 8 * parts * rows)
    outs = begin_of(memory)
    tasks = call_tasks(np.int64(call.ctypes.data))
    begin_tasks(tasks, CALL_TASKS)
    for _ in prange(workers):
        _follow(
            call[FOLLOW_KERNEL], call.ctypes.data, q.ctypes.data, out.ctypes.data, state.ctypes.data, outs,
            outs + outs_nbytes, np.int64(workers),
        )  # fmt: skip
    let_go(memory)
    if have_failed(tasks, CALL_TASKS):
        raise MemoryError("attention ran out of memory")
