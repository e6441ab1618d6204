"""Chains of linear layers: rows of activations, normed or gated, times packed weights, into or onto an output, and on.

In a layer, the rows are made ready once for all weights (activations.py), then blocks of 16 weight rows are shared out to
the threads. A single row is so quickly made ready that each thread does it for itself. All that lies between two attentions
is one call, or all layers with their attentions are: what Python does between calls is time in which no memory is read.
"""

import numpy as np
from numba import prange, types

from . import microkernel, simd
from .activations import (
    CODES,
    LESS_8,
    LESS_128,
    OFFSETS,
    SCALES,
    SILU,
    TOGETHER,
    gate_run,
    normalize_segments,
    prepare_row,
    quantize_row,
    tile_nbytes,
)
from .attention import follow_attention, is_to_be_repeated
from .crew import ALL_WORKERS, TASK_NBYTES, attempt, begin_tasks, do_task, have_failed, threads_in_force
from .dots import GROUP, TILE_ROWS, multiply_bytes4, multiply_bytes4m, multiply_bytes8, next_byte_rows
from .jit import SHARE, inner, kernel, parallel_kernel, standalone
from .rotary import rotate_heads
from .scratch import begin_of, let_go, own_memory
from .simd import LANES
from .tables import AHEAD, CALL_TASKS, FOLLOW_KERNEL, call_tasks, get
from .weights import W4, W4M, W8, WBF16, WF16, WF32, row_of

VECTOR = 4 * LANES
# A link of a chain: one array of int64, behind which the parts of its matrix follow. EPS is the bits of a float32
HOW, SOURCE, TARGET, COLUMNS, OUT_COLUMNS, ONTO, NORM_WEIGHT, EPS, BIAS, HAS_CODES, HAS_FLOATS = range(11)
N_PARTS, ALL_BLOCKS, HEADS, HEAD_DIM, ROTARY_DIM, FIRST_CHANNEL = range(11, 17)
MULTIPLY_KERNEL, PREPARE_KERNEL, ROW_KERNEL = range(17, 20)  # addresses
LAYER, GATE = 20, 21
LINK_FIELDS = 22
KIND, DATA, BLOCK_NBYTES, BLOCKS, ROWS, FIRST = range(6)
PART_FIELDS = 6
# A value of HOW besides those of activations.py: no product, but what ROW_KERNEL does with each row, from SOURCE to TARGET
BY_ROW = 16
ATTEND = 17  # the attention of LAYER: its queries, keys and values are SOURCE
# GATE: a gate of activations.py that many rows meet at once, the halves of the rows of weights being gate and up: they are
# gated, rounded, and put where the next link takes them, never into TARGET, whose lines would go through a distant cache
# Whose addresses a chain runs on. ATTENTIONS: int64 (layers, 4), of each layer's call, state, and parts (attention.py)
FOLLOW, TASKS, ATTENTIONS, ROOM, OWN_BUFFERS = range(5)
LINK_TASKS = 2  # at most: making rows ready, and the product
CACHED_NBYTES = 1 << 16  # of weights: part of a second-level cache


@inner
def _array_of(tile, groups, which):  # type: ignore[no-untyped-def]
    """Where an array of a tile of activations begins."""
    if which == CODES:
        return tile
    return tile + groups * TILE_ROWS * (GROUP + 4 * (which - SCALES))


@inner
def _multiply_codes(kind, block, groups, tile, place, rows, target, stride, fresh):  # type: ignore[no-untyped-def]
    """Some rows of one tile of activations, from row ``place`` on, times one block of weights."""
    simd.never_inline()
    others = OFFSETS if kind == W4M else LESS_8 if kind == W4 else LESS_128
    x = _array_of(tile, groups, CODES) + place * GROUP
    scales = _array_of(tile, groups, SCALES) + 4 * place
    others_at = _array_of(tile, groups, others) + 4 * place
    if kind == W8:
        multiply_bytes8(x, scales, others_at, block, groups, rows, target, stride, fresh)
    elif kind == W4:
        multiply_bytes4(x, scales, others_at, block, groups, rows, target, stride, fresh)
    else:
        multiply_bytes4m(x, scales, others_at, block, groups, rows, target, stride, fresh)


@inner
def _multiply_floats(kind, block, columns, x, x_stride, rows, target, stride):  # type: ignore[no-untyped-def]
    """Some rows of float32 times one block of dense weights; target is added to."""
    simd.never_inline()
    if kind == WBF16:
        microkernel.multiply_bf16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0, AHEAD)
    elif kind == WF16:
        microkernel.multiply_f16(x, x_stride, block, 2 * LANES, 0, columns, rows, 1, target, stride, 0, AHEAD)
    elif kind == WF32:
        microkernel.multiply_f32(x, x_stride, block, 4 * LANES, 0, columns, rows, 1, target, stride, 0, AHEAD)


@inner
def _finish(source, rows, lanes, target, stride, bias, onto):  # type: ignore[no-untyped-def]
    """Up to 16 numbers of some rows from ``source`` (a vector a row) into ``target``, plus bias, plus what was there."""
    for r in range(rows):
        for i in range(lanes):
            value = simd.scalar_at(source + r * VECTOR + 4 * i)
            if bias:
                value += simd.scalar_at(bias + 4 * i)
            if onto:
                value += simd.scalar_at(target + r * stride + 4 * i)
            simd.store_scalar(target + r * stride + 4 * i, value)


@inner
def _multiply_gated(call, share, shares, tiles, rows, out):  # type: ignore[no-untyped-def]
    """A share of gate and up times all rows, a few columns of both at a time; gated and rounded, into tiles at ``out``."""
    simd.never_inline()
    groups, how = (get(call, COLUMNS) + GROUP - 1) // GROUP, get(call, GATE)
    blocks_a_group, out_groups = GROUP // LANES, get(call, OUT_COLUMNS) // 2 // GROUP
    first, stop = out_groups * share // shares, out_groups * (share + 1) // shares
    gate = up = call + 8 * LINK_FIELDS
    first_up = blocks_a_group * out_groups
    if get(call, N_PARTS) > 1:
        up, first_up = up + 8 * PART_FIELDS, np.int64(0)
    stride, half = np.int64(TOGETHER * GROUP * 4), TILE_ROWS * TOGETHER * GROUP * 4
    memory = own_memory(2 * half)
    scratch = begin_of(memory)
    for group in range(first, stop, TOGETHER):
        together = min(TOGETHER, stop - group)
        row = np.int64(0)
        while row < rows:
            place, tile = row % TILE_ROWS, row // TILE_ROWS
            count = next_byte_rows(min(TILE_ROWS - place, rows - row))
            for p in range(2):
                part, first_block = (up, first_up) if p else (gate, np.int64(0))
                kind, nbytes = get(part, KIND), get(part, BLOCK_NBYTES)
                block = get(part, DATA) + (first_block + blocks_a_group * group) * nbytes
                for b in range(blocks_a_group * together):
                    _multiply_codes(
                        kind, block + b * nbytes, groups, tiles + tile * tile_nbytes(groups), place, count,
                        scratch + half * p + VECTOR * b, stride, np.int64(1),
                    )  # fmt: skip
            for r in range(count):
                at = scratch + stride * r
                gate_run(at, at + half, at, together * GROUP, how)
                quantize_row(at, group, together, out_groups, out + tile * tile_nbytes(out_groups), place + r)
            row += count
    let_go(memory)


@standalone(SHARE)
def multiply_blocks(call, share, shares, tiles, floats, rows, out, _1, _2):  # type: ignore[no-untyped-def]
    """A share of the blocks of all parts times all rows, gated if there are many. Arguments are numbers and addresses."""
    if rows > 1 and get(call, GATE):
        _multiply_gated(call, share, shares, tiles, rows, out)
        return
    first, stop = get(call, ALL_BLOCKS) * share // shares, get(call, ALL_BLOCKS) * (share + 1) // shares
    columns, stride = get(call, COLUMNS), 4 * get(call, OUT_COLUMNS)
    bias, onto = get(call, BIAS), get(call, ONTO)
    groups = (columns + GROUP - 1) // GROUP
    memory = own_memory(TILE_ROWS * VECTOR)
    scratch = begin_of(memory)
    begin = np.int64(0)
    for p in range(get(call, N_PARTS)):
        part = call + 8 * (LINK_FIELDS + PART_FIELDS * p)
        kind, blocks = get(part, KIND), get(part, BLOCKS)
        n_rows, first_row = get(part, ROWS), get(part, FIRST)
        nbytes = get(part, BLOCK_NBYTES)
        # Weights that fit a cache meet all rows before the next ones do, and a few rows meet one block after the other, so
        # that lines of the output are written next to each other.
        low, high, step = max(first - begin, 0), min(stop - begin, blocks), max(CACHED_NBYTES // nbytes, 1)
        for group in range(low, high, step):
            row = np.int64(0)
            while row < rows:
                place = row % TILE_ROWS
                left = min(TILE_ROWS - place, rows - row)
                count = next_byte_rows(left) if kind <= W4M else min(left, microkernel.most_dense_rows())
                for b in range(group, min(group + step, high)):
                    block = get(part, DATA) + b * nbytes
                    column = first_row + LANES * b
                    lanes = min(LANES, n_rows - LANES * b)
                    own_bias = bias + 4 * column if bias else 0
                    target = out + row * stride + 4 * column
                    if kind > W4M:
                        for i in range(count):
                            simd.store_f32(scratch + VECTOR * i, simd.splat(np.float32(0)))
                        _multiply_floats(
                            kind, block, columns, floats + row * groups * GROUP * 4, groups * GROUP * 4, count, scratch,
                            np.int64(VECTOR),
                        )  # fmt: skip
                        _finish(scratch, count, lanes, target, stride, own_bias, onto)
                        continue
                    tile = tiles + row // TILE_ROWS * tile_nbytes(groups)
                    if lanes == LANES and bias == 0:
                        _multiply_codes(kind, block, groups, tile, place, count, target, stride, np.int64(1 - onto))
                    else:
                        _multiply_codes(kind, block, groups, tile, place, count, scratch, np.int64(VECTOR), np.int64(1))
                        _finish(scratch, count, lanes, target, stride, own_bias, onto)
                row += count
        begin += blocks
    let_go(memory)


@standalone(SHARE)
def prepare_rows(call, share, shares, tiles, floats, rows, x, _1, _2):  # type: ignore[no-untyped-def]
    """Make a share of the rows ready, tile by tile: codes into ``tiles``, or float32 into ``floats``, or both."""
    n_tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    first, stop = n_tiles * share // shares * TILE_ROWS, min(rows, n_tiles * (share + 1) // shares * TILE_ROWS)
    columns, how = get(call, COLUMNS), get(call, HOW)
    groups = (columns + GROUP - 1) // GROUP
    padded = groups * GROUP
    memory = own_memory(8 * padded)
    scratch = begin_of(memory)
    x_stride = 4 * columns * (2 if how >= SILU else 1)
    for row in range(first, stop):
        made = prepare_row(
            x + row * x_stride, columns, padded, how, get(call, NORM_WEIGHT),
            simd.scalar_at(call + 8 * EPS), scratch,
        )  # fmt: skip
        if get(call, HAS_CODES):
            quantize_row(made, 0, groups, groups, tiles + row // TILE_ROWS * tile_nbytes(groups), row % TILE_ROWS)
        if get(call, HAS_FLOATS):
            for i in range(0, 4 * padded, VECTOR):
                simd.store_f32(floats + 4 * row * padded + i, simd.load_f32(made + i))
    let_go(memory)


@standalone(SHARE)
def rotate_rows(call, share, shares, source, target, rows, _1, _2, _3):  # type: ignore[no-untyped-def]
    """Rotary embedding of the first HEADS heads of a share of the rows of ``target``, in place (see rotary.py).

    source: for each row the cosines and then the sines of ROTARY_DIM / 2 angles.
    """
    heads, stride = get(call, HEADS), 4 * get(call, OUT_COLUMNS)
    head_dim, rotary_dim = get(call, HEAD_DIM), get(call, ROTARY_DIM)
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        rotate_heads(target + row * stride, heads, head_dim, rotary_dim // 2, source + row * rotary_dim * 4)


@standalone(SHARE)
def normalize_rows(call, share, shares, source, target, rows, _1, _2, _3):  # type: ignore[no-untyped-def]
    """RMSNorm of HEADS runs of HEAD_DIM channels from FIRST_CHANNEL on, of a share of the rows, into or onto ``target``."""
    count, size = get(call, HEADS), get(call, HEAD_DIM)
    stride, at = 4 * get(call, OUT_COLUMNS), 4 * get(call, FIRST_CHANNEL)
    memory = own_memory(4 * (size + GROUP))
    scratch = begin_of(memory)
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        normalize_segments(
            source + row * stride + at, target + row * stride + at, count, size, get(call, NORM_WEIGHT),
            simd.scalar_at(call + 8 * EPS), get(call, ONTO), scratch,
        )  # fmt: skip
    let_go(memory)


@inner
def _prepared_nbytes(call, rows):  # type: ignore[no-untyped-def]
    """Bytes of so many rows made ready for a link: tiles of codes, then float32."""
    groups, n_tiles = (get(call, COLUMNS) + GROUP - 1) // GROUP, (rows + TILE_ROWS - 1) // TILE_ROWS
    return n_tiles * tile_nbytes(groups) * get(call, HAS_CODES) + 4 * rows * groups * GROUP * get(call, HAS_FLOATS)


@inner
def _tiles_and_floats(call, rows, room):  # type: ignore[no-untyped-def]
    """Where rows made ready for a link lie in a room."""
    groups, n_tiles = (get(call, COLUMNS) + GROUP - 1) // GROUP, (rows + TILE_ROWS - 1) // TILE_ROWS
    tiles = (room + 63) // 64 * 64
    return tiles, tiles + n_tiles * tile_nbytes(groups) * get(call, HAS_CODES)


@standalone(types.void(*[types.int64] * 7))
def follow_chain(table, first, links, link_nbytes, addresses, rows, workers):  # type: ignore[no-untyped-def]
    """One worker's part in a chain, whose tasks are zeros. All arguments are numbers or addresses."""
    own_nbytes = none = np.int64(0)
    for i in range(first, links if rows == 1 else first):
        own_nbytes = max(own_nbytes, _prepared_nbytes(table + link_nbytes * i, rows))
    memory = own_memory(own_nbytes)
    room = begin_of(memory) if rows == 1 else get(addresses, ROOM)
    for i in range(first, links):
        call, task = table + link_nbytes * i, get(addresses, TASKS) + LINK_TASKS * TASK_NBYTES * i
        source, target = get(addresses, get(call, SOURCE)), get(addresses, get(call, TARGET))
        if get(call, HOW) == ATTEND:
            entry = get(addresses, ATTENTIONS) + 32 * get(call, LAYER)
            attention = get(entry, 0)
            _follow_attention(
                get(attention, FOLLOW_KERNEL), attention, source, target, get(entry, 1), get(entry, 2), get(entry, 3),
                workers,
            )  # fmt: skip
            if is_to_be_repeated(attention):
                break
            continue
        if get(call, HOW) == BY_ROW:
            do_task(get(call, ROW_KERNEL), call, min(rows, workers), source, target, rows, none, none, none, task)
            continue
        tiles, floats = _tiles_and_floats(call, rows, room)
        behind = tiles + _prepared_nbytes(call, rows)  # where a gate's are
        preparing = get(call, PREPARE_KERNEL)
        if rows > 1 and get(call, GATE):
            target = behind
        if rows > 1 and i > 0 and get(call - link_nbytes, GATE):
            tiles = _tiles_and_floats(call - link_nbytes, rows, room)[0] + _prepared_nbytes(call - link_nbytes, rows)
        elif rows == 1:  # each worker for itself
            attempt(preparing, call, none, rows, tiles, floats, rows, source, none, none, task)
        else:
            n_tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
            do_task(preparing, call, min(n_tiles, workers), tiles, floats, rows, source, none, none, task)
            task += TASK_NBYTES
        blocks = min(get(call, ALL_BLOCKS), workers)
        do_task(get(call, MULTIPLY_KERNEL), call, blocks, tiles, floats, rows, target, none, none, task)
    let_go(memory)


_follow, _follow_attention = follow_chain.call, follow_attention.call


@parallel_kernel
def run_chain(table, first, addresses, rows, workers):  # type: ignore[no-untyped-def]
    """Run ``rows`` rows through the links of ``table``, one after the other, from link ``first`` on.

    table: int64 (links, LINK_FIELDS and more). addresses: int64; FOLLOW that of ``follow_chain``, TASKS of the counters of
    LINK_TASKS a link, whatever they are (crew.py), ATTENTIONS of what those need, ROOM of room for rows made ready, then
    those of the buffers. workers: how many, or ALL_WORKERS.

    Raises:
        MemoryError: a worker got no memory.

    Returns how many links are done: all, or those before an attention that is to be repeated (attention.py).
    """
    links, fields = table.shape
    if workers == ALL_WORKERS:
        workers = threads_in_force()
    begin_tasks(addresses[TASKS], LINK_TASKS * links)
    for i in range(first, links):
        if table[i, HOW] == ATTEND:
            begin_tasks(call_tasks(get(addresses[ATTENTIONS], 4 * table[i, LAYER])), CALL_TASKS)
    for _ in prange(workers):
        _follow(
            addresses[FOLLOW], table.ctypes.data, np.int64(first), links, np.int64(8 * fields), addresses.ctypes.data,
            np.int64(rows), np.int64(workers),
        )  # fmt: skip
    failed, done = have_failed(addresses[TASKS], LINK_TASKS * links), links
    for i in range(links - 1, first - 1, -1):
        if table[i, HOW] == ATTEND:
            call = get(addresses[ATTENTIONS], 4 * table[i, LAYER])
            failed |= have_failed(call_tasks(call), CALL_TASKS)
            if is_to_be_repeated(call):
                done = i
    if failed:
        raise MemoryError("a pass through the layers ran out of memory")
    return done


@kernel
def take_rows(table, ids, out):  # type: ignore[no-untyped-def]
    """Rows ``ids`` of the matrix of the first link, which has one part, as float32; False if there is no such row."""
    part = table.ctypes.data + 8 * LINK_FIELDS
    for i in range(len(ids)):
        if not 0 <= ids[i] < get(part, ROWS):
            return False
    for i in range(len(ids)):
        row_of(
            get(part, KIND), get(part, DATA) + ids[i] // LANES * get(part, BLOCK_NBYTES), ids[i] % LANES, table[0, COLUMNS],
            out.ctypes.data + i * out.shape[1] * 4,
        )  # fmt: skip
    return True
