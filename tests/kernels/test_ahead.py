"""Which cache lines are asked for while others are read."""

import numpy as np
import pytest
from llvmlite import ir
from numba import types

from mixkv.kernels import microkernel, tables
from mixkv.kernels.jit import kernel
from mixkv.kernels.layout import KIND, KIND_BITS, Q4, TileLayout, side_numbers
from mixkv.kernels.segment import segment_of_arrays
from mixkv.kernels.simd import _operation, is_zen5
from mixkv.kernels.tables import ASK, ASK_STOP, K_SIDE, ROOM_FIELDS, V_SIDE

from .oracle import make_store, normal, part_offsets, part_sizes

TILE, HEADS, D, PAGE_TILES = 32, 3, 20, 4


@kernel
def _ask_from(room, addresses, geometry, first, stop, head, which):
    tables.ask_from(room, addresses, geometry, first, stop, head, which)


@kernel
def _lines_ahead(room, address, side, count):
    return tables.lines_ahead(room, address, side, count)


@_operation(types.boolean)
def _is_zen5(context, _):
    return ir.Constant(ir.IntType(1), int(is_zen5(context)))


@kernel
def _compiles_for_zen5():
    return _is_zen5()


@kernel
def _asks_before_run(bits):
    return microkernel.asks_before_run(bits)


def asked(addresses: tuple[int, int], first: int, stop: int, head: int, which: int) -> np.ndarray:
    """A worker's room after ``ask_from``."""
    room = np.zeros(ROOM_FIELDS, np.int64)
    _ask_from(room.ctypes.data, *addresses, first, stop, head, which)
    return room


@pytest.mark.parametrize("kinds", [("q4c", "q8t"), ("q3t", "q2c"), ("f16", "f16"), ("bf16", "q4t"), ("f32", "f32")])
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_run_goes_from_the_first_scale_of_some_tiles_to_their_last_code(kinds: tuple[str, str], side: str) -> None:
    rng = np.random.default_rng(1)
    k, v = normal(rng, 6 * TILE, HEADS, D), normal(rng, 6 * TILE, HEADS, D)
    store = make_store(k, v, kinds, TILE, page_tiles=PAGE_TILES)
    codes = 1 if side == "k" else 3  # among a tile's parts: scales of K, codes of K, then those of V
    which = K_SIDE if side == "k" else V_SIDE
    bits = KIND_BITS[side_numbers(getattr(store.layout, side))[KIND]]
    for head in range(HEADS):
        for page, first, stop in ((0, 0, 4), (0, 1, 3), (0, 3, 4), (4, 4, 6)):
            base = store.place(page)[0].ctypes.data
            begin = base + part_offsets(kinds, TILE, D, PAGE_TILES, head, first - page)[codes - 1]
            if part_sizes(kinds, TILE, D)[codes - 1] == 0:  # numbers have no scales
                begin = base + part_offsets(kinds, TILE, D, PAGE_TILES, head, first - page)[codes]
            end = base + part_offsets(kinds, TILE, D, PAGE_TILES, head, stop - 1 - page)[codes]
            end += part_sizes(kinds, TILE, D)[codes]
            room = asked(store.addresses(), first, stop, head, which)
            at_once = min(tables.AT_ONCE, end - begin) // 64 * 64 if _asks_before_run(bits) else 0
            assert (room[ASK], room[ASK_STOP]) == (begin + at_once, end)
        room = asked(store.addresses(), 2, 6, head, which)  # of two pages
        assert room[ASK] >= room[ASK_STOP] or room[ASK_STOP] - room[ASK] <= store.layout.nbytes * PAGE_TILES // HEADS


def test_what_lies_in_plain_arrays_is_no_run() -> None:
    x = np.zeros((3 * 64, 2, 16), np.float32)
    segment = segment_of_arrays(x, x)
    for which in (K_SIDE, V_SIDE):
        room = asked((segment.table.ctypes.data, segment.geometry.ctypes.data), 0, 3, 1, which)
        assert room[ASK] >= room[ASK_STOP]


def test_a_line_is_asked_for_with_each_line_until_the_run_ends() -> None:
    room, side = np.zeros(ROOM_FIELDS, np.int64), side_numbers(TileLayout(1, 64, 64, Q4, Q4).k)
    room[ASK], room[ASK_STOP] = 10_000, 10_000 + 5 * 64

    def ahead(address: int, count: int) -> int:
        return int(_lines_ahead(room.ctypes.data, address, side.ctypes.data, count))

    assert ahead(1_000, 256) == 9_000 and room[ASK] == 10_128
    assert ahead(1_128, 256) == 9_000 and room[ASK] == 10_256
    assert ahead(20_000, 256) == 10_256 - 20_000 and room[ASK] == room[ASK_STOP]  # not beyond the run
    assert ahead(1_384, 256) == tables.AHEAD and room[ASK] == room[ASK_STOP]


def test_only_8_and_16_bits_on_zen_5_are_not_asked_for_before_their_run() -> None:
    found = {bits for bits in KIND_BITS if not _asks_before_run(bits)}
    assert found == ({8, 16} if _compiles_for_zen5() else set())
