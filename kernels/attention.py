"""The stateful flash-attention kernel: attention over one segment, continuing from a state.

Keys are visited in *splits* of 512 absolute positions. In a split, every query row (one query and head) goes through
three steps - logits, softmax, weighted sum of values - and comes out as a partial attention (O, M, S) that is merged into
the row's state. K and V meet in the logits only, so the format of one has nothing to do with that of the other. The grid of
splits and tiles is fixed in absolute positions, the order of merges too, and each row has its own factors and
accumulators: so its bits depend on neither the other rows of a call, nor where the call was cut, nor threads.
"""

import numpy as np
from numba import prange

from . import simd
from .jit import inner, parallel_kernel
from .layout import LIMBS, PARTS
from .products import multiply_dense, multiply_tile
from .split import split_kernel
from .state import merge_rows
from .tables import (
    BLOCK_ROWS,
    COLUMNS,
    DENSE_KERNEL,
    DISTANCE,
    FIELDS,
    FLOAT_FIELDS,
    K_SIDE,
    KV_HEADS,
    MASK,
    OUT,
    PARTIAL,
    QUERIES,
    SCALE,
    SCRATCH,
    SLOPE,
    SPLIT_M,
    SPLIT_S,
    START,
    STOP,
    TARGET,
    TILE,
    TILE_KERNEL,
    V_SIDE,
    WIDTH,
    M,
    S,
    float_field,
    get,
    room_of,
    row_field,
    row_float,
    set_row_float,
    set_row_int,
)
from .tiles import VECTOR

_attend_split = split_kernel.call
KERNELS = (split_kernel, multiply_tile, multiply_dense)  # that are called by their address


@inner
def _attend_block(  # type: ignore[no-untyped-def]
    split_address, head, first_query, n_queries, first_split, stop_split, q, starts, stops, addresses, geometry, options,
    slopes, distances, mask, mask_strides, out, state, room, table, numbers,
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
                target = get(room, QUERIES) + row * width * 4 + c
                simd.store_f32(target, simd.mul(simd.load_f32(q.ctypes.data + place + c), scale))
            set_row_int(table, START, row, starts[query])
            set_row_int(table, STOP, row, stops[query])
            set_row_int(table, DISTANCE, row, distances[query])
            set_row_int(table, MASK, row, mask + h * mask_strides[0] + query * mask_strides[1] if mask else 0)
            set_row_int(table, TARGET, row, out.ctypes.data + place)
            set_row_int(table, PARTIAL, row, get(room, OUT) + row * width * 4)
            set_row_float(numbers, SLOPE, row, slopes[h])
            set_row_float(numbers, M, row, state[h, query, 0])
            set_row_float(numbers, S, row, state[h, query, 1])
            row += 1
    for split in range(first_split, stop_split):
        _attend_split(
            split_address, head, split, row, addresses.ctypes.data, geometry.ctypes.data, options.ctypes.data, room, table,
            numbers,
        )  # fmt: skip
        merge_rows(
            row_field(table, TARGET), float_field(numbers, M), float_field(numbers, S), row_field(table, PARTIAL),
            float_field(numbers, SPLIT_M), float_field(numbers, SPLIT_S), row, width, get(room, SCRATCH),
        )  # fmt: skip
    row = 0
    for query in range(first_query, first_query + n_queries):
        for h in range(head * n_rep, (head + 1) * n_rep):
            state[h, query, 0], state[h, query, 1] = row_float(numbers, M, row), row_float(numbers, S, row)
            row += 1


@inner
def _work(  # type: ignore[no-untyped-def]
    kernels, worker, workers, q, starts, stops, first_split, stop_split, addresses, geometry, options, slopes,
    distances, mask, mask_strides, outs, states,
):  # fmt: skip
    """The share of one worker: see ``attend_parts``."""
    n_queries, kv_heads, tile, width = q.shape[0], geometry[KV_HEADS], geometry[TILE], geometry[WIDTH]
    n_rep = q.shape[1] // kv_heads
    parts, n_splits = outs.shape[0], stop_split - first_split
    block = max(1, BLOCK_ROWS // n_rep)
    blocks = (n_queries + block - 1) // block
    rows = min(block, n_queries) * n_rep
    most_parts = max(geometry[K_SIDE + PARTS] * geometry[K_SIDE + LIMBS], geometry[V_SIDE + PARTS])
    memory = np.empty(room_of(0, rows, tile, width, most_parts)[-1] + 64, np.uint8)
    room = np.array(room_of((memory.ctypes.data + 63) // 64 * 64, rows, tile, width, most_parts))
    room[TILE_KERNEL], room[DENSE_KERNEL] = kernels[1], kernels[2]
    table, numbers = np.empty(FIELDS * COLUMNS, np.int64), np.zeros(FLOAT_FIELDS * COLUMNS, np.float32)
    units = parts * blocks * kv_heads
    # Parts, and the heads of a part, follow one another in memory, so a worker takes a run of them; blocks differ in work,
    # so they are dealt out.
    first_unit, stop_unit, step = worker, units, workers
    if parts > 1:
        first_unit, stop_unit, step = units * worker // workers, units * (worker + 1) // workers, 1
    for unit in range(first_unit, stop_unit, step):
        head, rest = unit % kv_heads, unit // kv_heads
        part, first_query = rest // blocks, rest % blocks * block
        _attend_block(
            kernels[0], head, first_query, min(block, n_queries - first_query), first_split + n_splits * part // parts,
            first_split + n_splits * (part + 1) // parts, q, starts, stops, addresses, geometry, options, slopes, distances,
            mask, mask_strides, outs[part], states[part], room.ctypes.data, table.ctypes.data,
            numbers.ctypes.data,
        )  # fmt: skip
    # Numba frees an array after its last mention, and the addresses above do not count as one.
    memory[0] = room[0] = table[0] = numbers[0] = 0


@parallel_kernel
def attend_parts(  # type: ignore[no-untyped-def]
    kernels, q, starts, stops, first_split, stop_split, addresses, geometry, options, slopes, distances, mask,
    mask_strides, outs, states, workers,
):  # fmt: skip
    """Attention of all queries, cut into (KV head, part of the splits, block of queries), shared out to the workers.

    outs (parts, T, H, width) and states (parts, H, T, 2) are continued: a part each for as many runs of splits, or one
    part for all. kernels: the addresses of ``KERNELS``.
    """
    for worker in prange(workers):
        _work(
            kernels, np.int64(worker), workers, q, starts, stops, first_split, stop_split, addresses, geometry,
            options, slopes, distances, mask, mask_strides, outs, states,
        )  # fmt: skip
