"""Dense tiles, and the store that keeps tiles; read back by the description of the layout alone (oracle.py)."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels.attention import FIRST_TILE
from mixkv.kernels.layout import F16, F32, TileLayout, aligned_zeros
from mixkv.kernels.quantize import narrow, quantize_tile, store_rows
from mixkv.kernels.segment import TileStore

from .oracle import (
    DTYPES,
    layout_of,
    make_store,
    normal,
    read_tile,
)

# --- Dense tiles ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES)), st.sampled_from((16, 20, 64)), st.integers(0, 64),
    st.integers(0, 64), st.integers(0, 2**32),
)  # fmt: skip
def test_rows_are_stored_at_any_offset_and_touch_no_other(
    k_kind: str, v_kind: str, d: int, first: int, stop: int, seed: int
) -> None:
    first, stop = sorted((first, stop))
    rng = np.random.default_rng(seed)
    layout = layout_of((k_kind, v_kind), 64, 3, d)
    tile = layout.empty_tile()
    assert len(tile) == layout.nbytes and not tile.any()
    k, v = normal(rng, 64, 3, d), normal(rng, 64, 3, d)
    store_rows(layout, tile, 0, k, v)
    new_k, new_v = normal(rng, stop - first, 3, d), normal(rng, stop - first, 3, d)
    store_rows(layout, tile, first, new_k, new_v)
    k[first:stop], v[first:stop] = new_k, new_v
    read_k, read_v = read_tile(tile, (k_kind, v_kind), 64, 3, d)
    np.testing.assert_array_equal(read_k, k.astype(DTYPES[k_kind]).astype(np.float64))
    np.testing.assert_array_equal(read_v, v.astype(DTYPES[v_kind]).astype(np.float64))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("kind", "largest", "beyond"), [("f16", 65504.0, 65520.0), ("bf16", 3.38e38, 3.4e38)])
def test_a_number_beyond_the_dtype_is_an_error_and_nothing_is_written(
    part: int, kind: str, largest: float, beyond: float
) -> None:
    layout = layout_of((kind, kind), 32, 2, 16)
    tile = layout.empty_tile()
    x = np.ones((3, 2, 16), np.float32), np.ones((3, 2, 16), np.float32)
    x[part][2, 1, 15] = -beyond
    with pytest.raises(OverflowError, match=rf"{beyond:.6g}".replace("+", r"\+") + " is beyond the largest"):
        store_rows(layout, tile, 4, *x)
    assert not tile.any()
    x[part][2, 1, 15] = -largest
    store_rows(layout, tile, 4, *x)
    assert np.isfinite(read_tile(tile, (kind, kind), 32, 2, 16)[part]).all()


def test_infinity_and_nan_keep_their_place_in_half_precision() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 65519.9, 1e-8], np.float32)
    np.testing.assert_array_equal(narrow(x, F16), np.array([np.inf, -np.inf, np.nan, 65504, 0], np.float16))
    assert narrow(x, F32) is x


@pytest.mark.parametrize(
    "kinds", [("f16", "q4"), ("q4", "bf16"), ("f32", "f16"), ("q8", "q8"), ("bf16", "q3c"), ("q2t16", "f32")]
)
def test_a_tile_may_be_dense_on_one_side(kinds: tuple[str, str]) -> None:
    rng = np.random.default_rng(11)
    k, v = normal(rng, 32, 2, 20), normal(rng, 32, 2, 20)
    source_layout = layout_of(("f32", "f32"), 32, 2, 20)
    source = source_layout.empty_tile()
    store_rows(source_layout, source, 0, k, v)
    before = source.tobytes()
    found = quantize_tile(source, source_layout, layout_of(kinds, 32, 2, 20))
    assert source.tobytes() == before
    for values, wanted, kind in zip(read_tile(found, kinds, 32, 2, 20), (k, v), kinds, strict=True):
        if kind in DTYPES:
            np.testing.assert_array_equal(values, wanted.astype(DTYPES[kind]).astype(np.float64))
        else:
            np.testing.assert_allclose(values, wanted, atol={"q8": 0.02, "q4": 0.3, "q3": 0.6, "q2": 1.3}[kind[:2]])


def test_a_tile_starts_on_a_cache_line() -> None:
    for nbytes in (1, 64, 1000):
        room = aligned_zeros(nbytes)
        assert room.shape == (nbytes,) and room.ctypes.data % 64 == 0 and not room.any()


def test_a_layout_of_another_tile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile must be one of \(32, 64, 128\), found 16"):
        TileLayout(1, 16, 16, F32, F32)


# --- The store of tiles --------------------------------------------------------------------------------------------------


def assert_holds(store: TileStore, first: int, tiles: list[np.ndarray]) -> None:
    """Everything that can be asked of the store says: these tiles, from this one on."""
    assert (store.first, store.stop, store.nbytes) == (first, first + len(tiles), len(tiles) * store.layout.nbytes)
    assert all(store[first + i] is tile for i, tile in enumerate(tiles))
    segment = store.segment(first * 32, first * 32 + 5)
    assert (segment.start, segment.stop) == (first * 32, first * 32 + 5)
    assert segment.geometry[FIRST_TILE] == first
    addresses = [tile.ctypes.data for tile in tiles]
    np.testing.assert_array_equal(segment.k_table[: len(tiles)], addresses)
    np.testing.assert_array_equal(segment.v_table[: len(tiles)], np.array(addresses, np.int64) + store.layout.v_offset)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("append", "append", "before", "from")), st.integers(0, 40)), max_size=12))
def test_a_store_holds_what_was_appended_and_not_forgotten(steps: list[tuple[str, int]]) -> None:
    store = TileStore(layout_of(("q4", "q4"), 32, 1, 16))
    first, tiles = 0, []
    assert_holds(store, first, tiles)
    for step, number in steps:
        if step == "append":  # so many at once: the tables have to grow
            for _ in range(number):
                tiles = [*tiles, store.layout.empty_tile()]
                store.append(tiles[-1])
        elif step == "before":
            store.forget_before(number)
            tiles = tiles[max(0, number - first) :]
            first = max(first, number)
        else:
            store.forget_from(number)
            tiles = tiles[: max(0, number - first)]
        assert_holds(store, first, tiles)


def test_a_segment_keeps_its_tiles_alive() -> None:
    store = make_store(np.ones((64, 1, 16), np.float32), np.ones((64, 1, 16), np.float32), ("f32", "f32"), tile=32)
    tiles = [store[0], store[1]]
    segment = store.segment(0, 64)
    store.forget_before(2)
    assert segment.owner[0] is tiles[0] and segment.owner[1] is tiles[1]


def test_addresses_are_not_copied() -> None:
    """A copied or pickled segment would point into memory that it does not own."""
    store = TileStore(layout_of(("f32", "f32"), 32, 1, 16))
    store.append(store.layout.empty_tile())
    for thing in (store, store.segment(0, 32)):
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(thing)
