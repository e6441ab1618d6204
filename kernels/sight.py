"""What the queries of a step see in each segment of a cache, and what a call says of a step: the same for all layers alike.

engine/layer.py says who sees what, and why. In Python it took a tenth of a millisecond a token.
"""

from . import simd
from .jit import inner, kernel
from .tables import (
    APPEND_ROTATED,
    APPENDED,
    BLOCK_ROWS,
    CALL_FIELDS,
    N_PARTS,
    N_QUERIES,
    POSITION,
    Q_STRIDE,
    RANGES,
    SPLIT,
    STEP,
    get,
)

UNITS_A_WORKER = 8  # units of work each, at least, so that none waits long for another


@inner
def splits_in(low, high):  # type: ignore[no-untyped-def]
    """How many splits hold the positions low .. high."""
    return (high + SPLIT - 1) // SPLIT - low // SPLIT if low < high else 0


@inner
def parts_of(n_queries, n_heads, n_kv_heads, splits, workers):  # type: ignore[no-untyped-def]
    """In how many parts so many splits are attended to; 0 for all in one go.

    Parts are for calls whose queries alone would leave workers idle. workers: the most that there may be.
    """
    n_rows = n_queries * n_heads // n_kv_heads
    enough_units = (n_rows + BLOCK_ROWS - 1) // BLOCK_ROWS * n_kv_heads >= UNITS_A_WORKER * workers
    return 0 if splits <= 1 or n_rows > BLOCK_ROWS or enough_units else splits


@kernel
def look(  # type: ignore[no-untyped-def]
    position, ages, tile, sinks, sliding_window, n_heads, n_kv_heads, q_stride, workers, ranges, fields
):
    """Write the ranges and fields of a step whose first query is at a position; returns the number of parts (``parts_of``).

    ages: int64 (tiers,), youngest first. sliding_window: 0 for none. q_stride: bytes from one query's row to the next.
    ranges: int64 (2 * (tiers + 2), T), C order, receives where each query starts and stops: of the sinks, of each tier from
    the oldest on, of the recent tokens. fields: int64 (CALL_FIELDS - STEP,), receives what a call has from STEP on.
    """
    n_queries, tiers = ranges.shape[1], len(ages)
    for i in range(n_queries):
        end = position + i + 1
        first = max(end - sliding_window, 0) if sliding_window else 0
        behind_sinks = max(first, sinks)
        ranges[0, i], ranges[1, i], ranges[2, i] = first, min(end, sinks), behind_sinks
        for t in range(tiers):
            boundary = max((end - ages[tiers - 1 - t]) // tile, 0) * tile
            ranges[3 + 2 * t, i], ranges[4 + 2 * t, i] = boundary, max(boundary, behind_sinks)
        ranges[3 + 2 * tiers, i] = end
    fields[:] = 0
    fields[N_QUERIES - STEP], fields[Q_STRIDE - STEP], fields[POSITION - STEP] = n_queries, q_stride, position
    fields[APPENDED - STEP] = APPEND_ROTATED
    splits = 0
    for segment in range(tiers + 2):
        low, high, at = ranges[2 * segment, 0], ranges[2 * segment + 1, n_queries - 1], RANGES - STEP + 4 * segment
        fields[at] = ranges.ctypes.data + 16 * n_queries * segment
        fields[at + 1], fields[at + 2], fields[at + 3] = fields[at] + 8 * n_queries, low, high
        splits += splits_in(low, high)
    parts = parts_of(n_queries, n_heads, n_kv_heads, splits, workers)
    fields[N_PARTS - STEP] = parts
    return parts


@kernel
def renew_calls(calls, fields):  # type: ignore[no-untyped-def]
    """Write the fields of a step into the call of each layer.

    calls: int64 (layers, any number of columns), the first of which has the calls' addresses; fields: int64 (layers,), the
    addresses of what ``look`` wrote.
    """
    for layer in range(len(fields)):
        for i in range(CALL_FIELDS - STEP):
            simd.store_integer(calls[layer, 0] + 8 * (STEP + i), get(fields[layer], i))
