"""Pages of tiles, dense and coded, and the store that keeps them; read back by the description of the layout alone."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mixkv.kernels.layout import F16, F32, K_CODES, K_PARAMS, V_CODES, V_PARAMS, TileLayout
from mixkv.kernels.memory import aligned_zeros
from mixkv.kernels.quantize import narrow, quantize_tile, store_rows
from mixkv.kernels.segment import TileStore

from .held import Held
from .oracle import (
    CODED,
    DTYPES,
    layout_of,
    make_store,
    normal,
    page_tile,
    part_offsets,
    part_sizes,
    read_tile,
    read_tiles,
)

# --- The layout of a page ------------------------------------------------------------------------------------------------

ANY_FORMAT = (*DTYPES, *(kind + axis for kind in CODED for axis in ("c", "t", "t16")))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ANY_FORMAT), st.sampled_from(ANY_FORMAT), st.sampled_from((32, 64, 128)), st.integers(1, 3),
    st.sampled_from((16, 20, 64, 112)), st.sampled_from((1, 3, 8)),
)  # fmt: skip
def test_every_part_of_a_tile_is_where_the_description_says(
    k_kind: str, v_kind: str, tile: int, heads: int, d: int, page_tiles: int
) -> None:
    """For each head the scales of K of all tiles, their codes, then the same of V; no byte is unused or used twice."""
    kinds = (k_kind, v_kind)
    layout = layout_of(kinds, tile, heads, d, page_tiles)
    page = layout.empty_page()
    assert page.shape == (page_tiles * layout.nbytes,) and not page.any() and page.ctypes.data % 64 == 0
    assert layout.nbytes == heads * sum(part_sizes(kinds, tile, d))
    views = (
        layout.params(page, layout.k), layout.codes(page, layout.k), layout.params(page, layout.v),
        layout.codes(page, layout.v),
    )  # fmt: skip
    number = 0
    for head in range(heads):
        for slot in range(page_tiles):
            offsets = part_offsets(kinds, tile, d, page_tiles, head, slot)
            for view, size, offset in zip(views, part_sizes(kinds, tile, d), offsets, strict=True):
                assert view.shape == (heads, page_tiles, size)
                number += 1
                view[head, slot] = number
                assert (page[offset : offset + size] == number).all()
            if head == 0:
                want = np.empty(4, np.int64)
                want[[K_PARAMS, K_CODES, V_PARAMS, V_CODES]] = page.ctypes.data + np.array(offsets)
                np.testing.assert_array_equal(layout.addresses(page, slot), want)
    assert page.all() and np.bincount(page)[1:].sum() == len(page)


def test_a_page_is_new_memory_each_time() -> None:
    layout = layout_of(("q4", "q4"), 64, 2, 64, 8)
    one, other = layout.empty_page(), layout.empty_page()
    one[:] = 255
    assert not other.any() and not np.shares_memory(one, other)


# --- Dense tiles ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES)), st.sampled_from((16, 20, 64)),
    st.sampled_from((1, 1, 4)), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32),
)  # fmt: skip
def test_rows_are_stored_at_any_offset_and_touch_no_other(
    k_kind: str, v_kind: str, d: int, page_tiles: int, first: float, stop: float, seed: int
) -> None:
    """Across the tiles of a page, too."""
    kinds, n = (k_kind, v_kind), 64 * page_tiles
    first, stop = sorted((round(first * n), round(stop * n)))
    rng = np.random.default_rng(seed)
    layout = layout_of(kinds, 64, 3, d, page_tiles)
    page = layout.empty_page()
    k, v = normal(rng, n, 3, d), normal(rng, n, 3, d)
    store_rows(layout, page, 0, k, v)
    new_k, new_v = normal(rng, stop - first, 3, d), normal(rng, stop - first, 3, d)
    store_rows(layout, page, first, new_k, new_v)
    k[first:stop], v[first:stop] = new_k, new_v
    read_k, read_v = read_tiles([page_tile(page, i, kinds, 64, 3, d) for i in range(page_tiles)], kinds, 64, 3, d)
    np.testing.assert_array_equal(read_k, k.astype(DTYPES[k_kind]).astype(np.float64))
    np.testing.assert_array_equal(read_v, v.astype(DTYPES[v_kind]).astype(np.float64))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("kind", "largest", "beyond"), [("f16", 65504.0, 65520.0), ("bf16", 3.38e38, 3.4e38)])
def test_a_number_beyond_the_dtype_is_an_error_and_nothing_is_written(
    part: int, kind: str, largest: float, beyond: float
) -> None:
    layout = layout_of((kind, kind), 32, 2, 16)
    tile = layout.empty_page()
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
    source = source_layout.empty_page()
    store_rows(source_layout, source, 0, k, v)
    before = source.tobytes()
    found = quantize_tile(source, source_layout, layout_of(kinds, 32, 2, 20))
    assert source.tobytes() == before
    for values, wanted, kind in zip(read_tile(found, kinds, 32, 2, 20), (k, v), kinds, strict=True):
        if kind in DTYPES:
            np.testing.assert_array_equal(values, wanted.astype(DTYPES[kind]).astype(np.float64))
        else:
            np.testing.assert_allclose(values, wanted, atol={"q8": 0.02, "q4": 0.3, "q3": 0.6, "q2": 1.3}[kind[:2]])


@pytest.mark.parametrize("kinds", [("q4", "q4"), ("q3", "q2t16"), ("q8t", "q3c"), ("f16", "q4"), ("bf16", "f32")])
@pytest.mark.parametrize("source_kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_a_tile_is_written_to_its_slot_as_to_a_page_of_its_own(
    kinds: tuple[str, str], source_kind: str, slot: int
) -> None:
    """And no byte beside it."""
    rng = np.random.default_rng(12)
    source_layout = layout_of((source_kind, source_kind), 32, 2, 20)
    source = source_layout.empty_page()
    store_rows(source_layout, source, 0, normal(rng, 32, 2, 20), normal(rng, 32, 2, 20))
    alone = quantize_tile(source, source_layout, layout_of(kinds, 32, 2, 20), 3)
    layout = layout_of(kinds, 32, 2, 20, 5)
    page = layout.empty_page()
    page[:] = rng.integers(0, 256, page.shape, np.uint8)
    before = page.copy()
    assert quantize_tile(source, source_layout, layout, 3, page, slot) is page
    for i in range(5):
        want = alone if i == slot else page_tile_of_copy(before, i, kinds)
        np.testing.assert_array_equal(page_tile(page, i, kinds, 32, 2, 20), want)


def page_tile_of_copy(page: np.ndarray, slot: int, kinds: tuple[str, str]) -> np.ndarray:
    """One tile of 32 tokens, 2 heads and head_dim 20 in a copy of a page."""
    room = aligned_zeros(len(page))
    room[:] = page
    return page_tile(room, slot, kinds, 32, 2, 20)


@pytest.mark.parametrize("source_kind", DTYPES)
def test_the_numbers_of_a_dense_tile_of_the_same_formats_are_kept(source_kind: str) -> None:
    """Bit for bit, subnormal numbers and infinities among them; what is not a number stays none, whatever its bits."""
    rng = np.random.default_rng(13)
    kinds = (source_kind, source_kind)
    layout, target = layout_of(kinds, 64, 2, 20), layout_of(kinds, 64, 2, 20, 8)
    source, page = layout.empty_page(), target.empty_page()
    source[:] = rng.integers(0, 256, source.shape, np.uint8)
    numbers = source.view(DTYPES[source_kind])
    numbers[::7], numbers[1::7] = np.inf, -np.inf
    quantize_tile(source, layout, target, 0, page, 5)
    found = page_tile(page, 5, kinds, 64, 2, 20)
    nan = np.isnan(numbers.astype(np.float32))
    assert nan.any() and np.isnan(found.view(DTYPES[source_kind]).astype(np.float32)[nan]).all()
    kept = np.repeat(~nan, numbers.itemsize)
    np.testing.assert_array_equal(found[kept], source[kept])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("kind", "largest", "beyond"), [("f16", 65519.996, 65520.0), ("bf16", 3.38e38, 3.4e38)])
def test_a_finite_number_that_would_become_infinite_is_refused_wherever_it_is(
    part: int, kind: str, largest: float, beyond: float
) -> None:
    """Beside infinities and NaN, which a dense tile keeps as an array does."""
    dense, target = layout_of(("f32", "f32"), 32, 2, 20), layout_of((kind, kind), 32, 2, 20)
    rng = np.random.default_rng(15)
    for sign in (1, -1):
        x = normal(rng, 2, 32, 2, 20)
        x[:, 3, 1, 2:7], x[:, 4, 0, 3] = [np.inf, -np.inf, np.nan, sign * largest, 1e-30], np.nan
        source = dense.empty_page()
        store_rows(dense, source, 0, *x)
        with np.errstate(over="ignore"):
            want = x.astype(DTYPES[kind]).astype(np.float64)
        np.testing.assert_array_equal(read_tile(quantize_tile(source, dense, target), (kind, kind), 32, 2, 20), want)
        x[part, rng.integers(5, 32), rng.integers(2), rng.integers(20)] = sign * beyond
        store_rows(dense, source, 0, *x)
        with pytest.raises(OverflowError):
            quantize_tile(source, dense, target)


def test_a_tile_starts_on_a_cache_line() -> None:
    for nbytes in (1, 64, 1000):
        room = aligned_zeros(nbytes)
        assert room.shape == (nbytes,) and room.ctypes.data % 64 == 0 and not room.any()


def test_a_layout_of_another_tile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile must be one of \(32, 64, 128\), found 16"):
        TileLayout(1, 16, 16, F32, F32)


# --- The store of tiles --------------------------------------------------------------------------------------------------


STEPS = ("append", "append at once", "write", "before, keep 0", "before, keep 1", "before, keep 3", "from")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from((1, 3, 16)), st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 40)), max_size=12)
)  # fmt: skip
def test_a_store_holds_what_was_appended_and_not_forgotten(page_tiles: int, steps: list[tuple[str, int]]) -> None:
    held = Held(page_tiles)
    held.assert_holds()
    for step, number in steps:
        if step == "append":  # so many at once: the table has to grow
            for _ in range(number):
                held.append()
        elif step == "append at once":
            held.append(number)
        elif step == "write":  # what is written and not held is as if it had not been
            held.write_next()
        elif step.startswith("before"):
            held.forget_before(number, int(step[-1]))
        else:
            held.forget_from(number)
        held.assert_holds()


class Forks(RuleBasedStateMachine):
    """Up to three stores, forks of one another, each of which holds what was written to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[Held] = []

    @initialize(page_tiles=st.sampled_from((1, 3, 16)), count=st.integers(0, 7))
    def begin(self, page_tiles: int, count: int) -> None:
        self.stores = [Held(page_tiles)]
        self.append(0, count)

    def store(self, which: int) -> Held:
        return self.stores[which % len(self.stores)]

    @rule(which=st.integers(0, 2))
    def fork(self, which: int) -> None:
        """A fourth takes the place of the first."""
        self.stores = [*self.stores, self.store(which).fork()][-3:]

    @rule(which=st.integers(0, 2), count=st.integers(1, 5))
    def append(self, which: int, count: int) -> None:
        self.store(which).append(count)

    @rule(which=st.integers(0, 2))
    def write(self, which: int) -> None:
        self.store(which).write_next()

    @rule(which=st.integers(0, 2), place=st.integers(-2, 3))
    def own(self, which: int, place: int) -> None:
        self.store(which).own(max(0, self.store(which).stop - place))

    @rule(which=st.integers(0, 2), place=st.integers(0, 20), side=st.integers(0, 1))
    def widen(self, which: int, place: int, side: int) -> None:
        held = self.store(which)
        if held.numbers:
            held.widen(held.first + place % len(held.numbers), side)

    @rule(which=st.integers(0, 2), more=st.integers(0, 6), keep=st.integers(0, 3))
    def forget_before(self, which: int, more: int, keep: int) -> None:
        self.store(which).forget_before(self.store(which).first + more, keep)

    @rule(which=st.integers(0, 2), count=st.integers(0, 6))
    def forget_from(self, which: int, count: int) -> None:
        self.store(which).forget_from(max(0, self.store(which).stop - count))

    @invariant()
    def each_holds_its_own(self) -> None:
        for held in self.stores:
            held.assert_holds()


Forks.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestForks = Forks.TestCase


def test_bytes_in_use_are_told_as_pages_are_copied_and_dropped() -> None:
    """A copy of a later page takes nothing from the first; a gap drops the page before it; what is copied is held alone."""
    held = Held(4)
    for _ in range(8):
        held.append()
    held.forget_before(2)
    one = held.nbytes() // 8
    assert held.store.nbytes == 8 * one
    other = held.fork()
    other.own(5)
    other.own(1)
    assert (held.store.nbytes, other.store.nbytes) == (8 * one, 6 * one)
    held.own(6)
    assert held.store.nbytes == 8 * one
    held.forget_before(9)
    assert held.store.nbytes == 0 and held.store.segment(9 * 32, 9 * 32).owner == []
    held.append()
    for store in (held, other):
        store.assert_holds()


def test_a_segment_keeps_its_pages_alive() -> None:
    rng = np.random.default_rng(14)
    k, v = normal(rng, 128, 1, 16), normal(rng, 128, 1, 16)
    store = make_store(k, v, ("f32", "f32"), tile=32, page_tiles=2)
    pages = [store.place(0)[0], store.place(2)[0]]
    segment = store.segment(0, 128)
    store.forget_before(3)
    assert len(store.segment(96, 128).owner) == 1
    store.forget_before(4)
    assert store.segment(128, 128).owner == []
    assert len(segment.owner) == 2 and all(a is b for a, b in zip(segment.owner, pages, strict=True))


def test_addresses_are_not_copied() -> None:
    """A copied or pickled segment would point into memory that it does not own."""
    store = TileStore(layout_of(("f32", "f32"), 32, 1, 16))
    store.append()
    for thing in (store, store.segment(0, 32)):
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(thing)
