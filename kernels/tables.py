"""What a worker of the attention kernel keeps: tables of its rows, lists of who sees which tile, and room for numbers."""

import numpy as np
from numpy.typing import NDArray

from . import simd
from .crew import TASK_NBYTES
from .fold import FOLDED
from .jit import inner
from .layout import (
    ADDRESSES,
    HEAD,
    K_CODES,
    KIND,
    KIND_BITS,
    PAGE,
    SIDE_NUMBERS,
    TOKEN,
    V_CODES,
    Side,
    side_numbers,
)
from .microkernel import ask_for_lines, asks_before_run
from .simd import LANES
from .tiles import VECTOR, is_dense

SPLIT = PAGE  # positions whose logits share one maximum; a multiple of every tile
BLOCK_ROWS = 96  # query rows that share the unpacking of a tile: their logits then fit the second-level cache
LOGITS_ROW = np.int64((SPLIT + LANES) * 4)  # bytes between rows of logits: a power of two would share cache sets

# Indices into the int64 array that describes a segment (see segment.py)
TILE, TILE_SHIFT, FIRST_TILE, WIDTH = range(4)
K_SIDE, V_SIDE = 4, 4 + SIDE_NUMBERS  # where the numbers of each Side begin (see layout.py)

# Indices into the int64 array that describes a call: numbers, addresses (0 for what there is not), bytes
N_HEADS, N_KV_HEADS, ROW_WIDTH, MOST_PARTS = range(4)  # MOST_PARTS: the most of a side of any segment, times its limbs
OPTIONS, SLOPES, DISTANCES, MASKS, MASK_HEAD, MASK_QUERY = range(4, 10)
FRESH = 10  # whether out and state are begun, not continued
SPLIT_KERNEL, TILE_KERNEL, DENSE_KERNEL, WORK_KERNEL, MERGE_KERNEL = range(11, 16)
STORE_KERNEL, SEAL_KERNEL, LEDGER_KERNEL, UNPACK_KERNEL = range(16, 20)
HEAD_DIM, K_BLOCK, V_BLOCK = range(20, 23)  # channels, and those of a block of rotated K and V (hadamard.py), or 0
N_SINKS, LOST = range(23, 25)  # see append.py
DENSE_KIND = 25  # of the dense parts, though they may be float32 where not all numbers fit
LEDGER = 26  # address of float32 (N_SEGMENTS, H, T, 2): the state after each segment
FOLLOW_KERNEL, FINISH_KERNEL, FOLD_KERNEL = range(27, 30)
N_SEGMENTS, SEGMENTS = 30, 31  # for each of up to MAX_SEGMENTS segments, the addresses of its table and geometry
MAX_SEGMENTS = 6
JOBS, JOB_STARTS = SEGMENTS + 2 * MAX_SEGMENTS, SEGMENTS + 2 * MAX_SEGMENTS + 1  # tiles to quantize first (quantize.py)
MAX_ROUNDS = 4  # of jobs: those of each only depend on rounds before
STEP = JOB_STARTS + MAX_ROUNDS + 1  # from here on, what is the same for all layers
N_QUERIES, Q_STRIDE, APPENDED, POSITION = range(STEP, STEP + 4)  # Q_STRIDE: from one query's row to the next
APPEND_AS_IS, APPEND_ROTATED = 1, 2  # APPENDED: whether keys and values are to be stored, and rotated before
N_PARTS = STEP + 4  # of splits that are attended to apart and merged; 0: all in one go
FIRST_QUERY = STEP + 5  # outputs and states of queries before it are not wanted
RANGES = STEP + 6  # for each segment, where each query starts and stops, and the first and last + 1 position
CALL_FIELDS = RANGES + 4 * MAX_SEGMENTS
CALL_TASKS = MAX_ROUNDS + 3  # of a call (attention.py): storing, rounds of jobs, attending, merging
CALL_NUMBERS = CALL_FIELDS + CALL_TASKS * TASK_NBYTES // 8 + 8  # int64 of a call: its fields, then its tasks (crew.py)

CHUNK_ROWS = 32  # few rows are folded for several tiles at once, up to so many: none waits for another's maximum then
DIRECT_ROWS = 8  # up to so many rows, unpacking a dense tile costs more than converting its numbers for every four rows
COLUMNS = np.int64(136)  # of the tables below: room for BLOCK_ROWS or MAX_N_REP rows
MAX_N_REP = 128  # query heads of a KV head

# Indices into the float32 array of options
SCALE, SOFTCAP, EXACT = range(3)  # EXACT: not 0 for float32 throughout

# A worker's room: addresses, on 64-byte boundaries, of
#     QUERIES  float32 [rows][width], scaled            OUT      float32 [rows][width], the partial output of a split
#     LOGITS   float32 [rows][SPLIT + 16]               SUMS     a vector a row: largest logits, then sums of exponentials
#     CODES    one side of a tile as pairs, uint16 or int16    VALUES   one side of a tile as float32
#     SCALES   scales and centres of some tiles, or room to transpose
#     WORDS, FACTORS, OFFSETS, SCRATCH                  for fold.fold and products.multiply_tiles
QUERIES, OUT, LOGITS, SUMS, CODES, VALUES, SCALES, WORDS, FACTORS, OFFSETS, SCRATCH = range(11)
CALL = 11  # the call, which has the addresses of the kernels
ROOM_ROWS = 12  # how many rows there is room for
# Cache lines are asked for while others are read: those of a split's V with its K, those of the next K with V. ASK is where
# those begin that nobody has asked for yet, ASK_STOP where they end; NEXT_.. what this worker turns to after the split:
# tiles of the segment, from the first to one past the last, and a head. Some widths do without (microkernel._asks_once)
ASK, ASK_STOP, NEXT_TILE, NEXT_STOP, NEXT_HEAD = range(13, 18)
ROOM_FIELDS = 18
AT_ONCE = np.int64(2048)  # bytes of a run that are asked for in one go, before it is read
AHEAD = np.int64(8192)  # bytes ahead of what is read that lines are asked for where nothing better is known

# A worker's rows. int64 [fields][COLUMNS]: the positions that a row sees, absolute and in the current split; the distance
# of position 0 from the query's; addresses of its mask (or 0), its output and its partial output
START, STOP, LOW, HIGH, DISTANCE, MASK, TARGET, PARTIAL = range(8)
# Lists made for a few tiles, in the same table: the rows that see each of them, tile after tile, with the addresses of what
# is multiplied, of the tile's scales, of what is added to and of the largest logits; where each tile's rows begin; whether
# they see all of it
ACTIVE, X, SCALES_AT, TARGETS, TOPS, FIRST, WHOLE = range(8, 15)
FIELDS = 15
# float32 [fields][COLUMNS]: M and S of the current split, of everything so far, and the slope of ALiBi
SPLIT_M, SPLIT_S, M, S, SLOPE = range(5)
FLOAT_FIELDS = 5
# Where, behind the rows' float32, others begin in a worker's memory: the rows' int64, the room's fields, and the room
TABLE_AT = (4 * FLOAT_FIELDS * COLUMNS + VECTOR - 1) // VECTOR * VECTOR
FIELDS_AT = TABLE_AT + 8 * FIELDS * COLUMNS
ROOM_AT = (FIELDS_AT + 8 * ROOM_FIELDS + VECTOR - 1) // VECTOR * VECTOR


def make_geometry(tile: int, first_tile: int, width: int, k: Side, v: Side) -> NDArray[np.int64]:
    """The integers that describe a segment, in the order of the index names above."""
    return np.concatenate(
        [np.array([tile, tile.bit_length() - 1, first_tile, width]), side_numbers(k), side_numbers(v)]
    )


# Arrays are handed down as addresses: Numba counts references to an array wherever it is passed or sliced, with atomic
# operations that took a fifth of the time of a decode step.


@inner
def get(base, i):  # type: ignore[no-untyped-def]
    """Number i of the int64 at an address."""
    return simd.integer_at(base + 8 * i)


@inner
def put(base, i, value):  # type: ignore[no-untyped-def]
    """Set it."""
    simd.store_integer(base + 8 * i, value)


@inner
def call_tasks(call):  # type: ignore[no-untyped-def]
    """Where the tasks of a call begin."""
    return (call + 8 * CALL_FIELDS + 63) // 64 * 64


@inner
def row_field(table, field):  # type: ignore[no-untyped-def]
    """Where a field of the rows' int64 begins."""
    return table + 8 * COLUMNS * field


@inner
def row_int(table, field, row):  # type: ignore[no-untyped-def]
    """A row's number in a field."""
    return get(row_field(table, field), row)


@inner
def set_row_int(table, field, row, value):  # type: ignore[no-untyped-def]
    """Set it."""
    put(row_field(table, field), row, value)


@inner
def float_field(numbers, field):  # type: ignore[no-untyped-def]
    """Where a field of the rows' float32 begins."""
    return numbers + 4 * COLUMNS * field


@inner
def row_float(numbers, field, row):  # type: ignore[no-untyped-def]
    """A row's float32 in a field."""
    return simd.scalar_at(float_field(numbers, field) + 4 * row)


@inner
def set_row_float(numbers, field, row, value):  # type: ignore[no-untyped-def]
    """Set it."""
    simd.store_scalar(float_field(numbers, field) + 4 * row, value)


@inner
def _nbytes(side, count):  # type: ignore[no-untyped-def]
    """Bytes of so many codes, or numbers, of a side."""
    return count * KIND_BITS[get(side, KIND)] // 8


@inner
def lines_ahead(room, address, side, count):  # type: ignore[no-untyped-def]
    """How far ahead lines are asked for by who reads ``count`` codes, or numbers, from an address: one with each line."""
    at, stop = get(room, ASK), get(room, ASK_STOP)
    put(room, ASK, min(at + _nbytes(side, count), stop))
    return at - address if at < stop else AHEAD


@inner
def ask_from(room, addresses, geometry, first, stop, head, which):  # type: ignore[no-untyped-def]
    """Let K (``which`` is K_SIDE) or V of one head of some tiles be what is asked for, if it lies in one run.

    Its first lines (AT_ONCE) are asked for here, where ``asks_before_run``: they come while nobody reads.
    """
    side, codes = geometry + 8 * which, K_CODES if which == K_SIDE else V_CODES
    first_part = codes if is_dense(get(side, KIND)) else codes + 1  # scales lie before codes
    begin = tile_address(addresses, first, first_part, side, head)
    end = tile_address(addresses, stop - 1, codes, side, head)
    end += _nbytes(side, get(geometry, TILE) * get(geometry, WIDTH))
    if get(side, TOKEN) or not begin < end <= begin + get(side, HEAD):
        begin = end  # not in one run
    at_once = min(AT_ONCE, end - begin) // VECTOR if asks_before_run(KIND_BITS[get(side, KIND)]) else 0
    if at_once > 0:
        ask_for_lines(begin, at_once)
    put(room, ASK, begin + at_once * VECTOR)
    put(room, ASK_STOP, end)


@inner
def tile_address(addresses, tile, which, side, head):  # type: ignore[no-untyped-def]
    """Where the codes or scales of one head of a tile begin; ``which`` is K_CODES or one of its neighbours."""
    return get(addresses, ADDRESSES * tile + which) + head * get(side, HEAD)


@inner
def see_split(table, rows, origin):  # type: ignore[no-untyped-def]
    """Cut the rows' ranges to the split: returns the range that any of them sees, and the one that all of them see."""
    first, stop, common, common_stop = SPLIT, 0, 0, SPLIT
    for row in range(rows):
        low = min(max(row_int(table, START, row) - origin, 0), SPLIT)
        high = max(min(row_int(table, STOP, row) - origin, SPLIT), low)
        set_row_int(table, LOW, row, low)
        set_row_int(table, HIGH, row, high)
        common, common_stop = max(common, low), min(common_stop, high)
        if low < high:
            first, stop = min(first, low), max(stop, high)
    return first, stop, common, common_stop


@inner
def see_whole(t, tile, common, common_stop):  # type: ignore[no-untyped-def]
    """Whether all rows see all of a tile. common .. common_stop: what all rows see."""
    return common <= t * tile and (t + 1) * tile <= common_stop


@inner
def see_tiles(table, rows, first_tile, stop_tile, tile, common, common_stop):  # type: ignore[no-untyped-def]
    """List the rows that see each of some tiles; returns how many in all. There is room for them (``tiles_together``).

    common .. common_stop: what all rows see.
    """
    count = 0
    for t in range(first_tile, stop_tile):
        low, high = t * tile, (t + 1) * tile
        set_row_int(table, FIRST, t - first_tile, count)
        whole = True
        if see_whole(t, tile, common, common_stop):
            for row in range(rows):
                set_row_int(table, ACTIVE, count + row, row)
            count += rows
        else:
            for row in range(rows):
                set_row_int(table, ACTIVE, count, row)
                if max(row_int(table, LOW, row), low) < min(row_int(table, HIGH, row), high):
                    count += 1
                    whole &= row_int(table, LOW, row) <= low and row_int(table, HIGH, row) >= high
        set_row_int(table, WHOLE, t - first_tile, np.int64(whole))
    set_row_int(table, FIRST, stop_tile - first_tile, count)
    return count


@inner
def tiles_together(rows, tile):  # type: ignore[no-untyped-def]
    """How many tiles are folded together."""
    return min(max(1, CHUNK_ROWS // rows), SPLIT // tile)


@inner
def no_options(table, numbers, rows, cap):  # type: ignore[no-untyped-def]
    """Whether a product is a logit: no soft-cap, bias or mask changes it."""
    for row in range(rows):
        if row_float(numbers, SLOPE, row) != 0 or row_int(table, MASK, row) != 0:
            return False
    return cap == 0


@inner
def _after_logits(rows, tile, width, parts):  # type: ignore[no-untyped-def]
    """Bytes of each part of a worker's room from SUMS on, for tiles of one segment."""
    most, vectors = max(tile, width), (max(rows, CHUNK_ROWS) + LANES - 1) // LANES * LANES
    tiles = tiles_together(1, tile)  # that are folded together, at most: the last block of queries may be a small one
    return (
        (rows + LANES) * VECTOR, tile * width * 2, tile * width * 4, max(tiles * parts * most * 8, LANES * LANES * 4),
        parts * vectors * most * 2 + VECTOR, parts * vectors * 4, parts * vectors * 4,
        FOLDED * (2 * VECTOR + 4 * most) + VECTOR,
    )  # fmt: skip


@inner
def room_nbytes(rows, tile, width, parts):  # type: ignore[no-untyped-def]
    """Bytes of a worker's room for ``rows`` rows and tiles of one segment; parts: the most of a side, times its limbs."""
    nbytes = rows * (2 * width * 4 + LOGITS_ROW)
    for part in _after_logits(rows, tile, width, parts):
        nbytes += part
    return nbytes


@inner
def lay_out_room(room, tile, width, parts):  # type: ignore[no-untyped-def]
    """Say where each part of a worker's room begins, for tiles of one segment. QUERIES, ROOM_ROWS are given."""
    rows = get(room, ROOM_ROWS)
    at = get(room, QUERIES)
    put(room, OUT, at + rows * width * 4)
    put(room, LOGITS, at + 2 * rows * width * 4)
    at += rows * (2 * width * 4 + LOGITS_ROW)
    field = SUMS
    for part in _after_logits(rows, tile, width, parts):
        put(room, field, at)
        at += part
        field += 1
