"""New tokens in the dense parts of a cache, against NumPy's own casts; read back by the description of the layout."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels.append import store_rows_of
from mixkv.kernels.segment import Segment, TileStore, segment_of_arrays
from mixkv.kernels.tables import (
    CALL_FIELDS,
    LOST,
    N_HEADS,
    N_KV_HEADS,
    N_QUERIES,
    N_SEGMENTS,
    N_SINKS,
    POSITION,
    Q_STRIDE,
    ROW_WIDTH,
    SEGMENTS,
)

from .oracle import DTYPES, layout_of, normal, padded_width, page_tile, read_tiles

QUERIES = 3  # heads of queries, which stand in front of keys and values


@dataclass
class Dense:
    """The sinks and the recent segment of a layer, as a cache keeps them, and what they should hold."""

    kind: str
    tile: int
    heads: int
    head_dim: int
    sinks: int
    stop: int
    first_tile: int = 0
    page_tiles: int = 1
    store: TileStore = field(init=False)
    sink: tuple[np.ndarray, np.ndarray] = field(init=False)
    segment: Segment = field(init=False)
    want: np.ndarray = field(init=False)  # (k and v, positions, heads, head_dim)
    want_sinks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.store = TileStore(layout_of((self.kind,) * 2, self.tile, self.heads, self.head_dim, self.page_tiles))
        while self.store.stop * self.tile < self.stop:
            self.store.place(self.store.stop)
            self.store.append()
        self.store.forget_before(self.first_tile)
        shape = self.sinks, self.heads, padded_width(self.head_dim)
        self.sink = np.zeros(shape, DTYPES[self.kind]), np.zeros(shape, DTYPES[self.kind])
        self.segment = segment_of_arrays(*self.sink)
        positions = (self.store.stop - self.store.first) * self.tile
        self.want = np.zeros((2, positions, self.heads, self.head_dim))
        self.want_sinks = np.zeros((2, self.sinks, self.heads, self.head_dim))

    def append(self, kv: np.ndarray, position: int) -> bool:
        """Store keys and values, float32 (2, T, heads, head_dim), from a position on; what is said of lost numbers."""
        width, t = padded_width(self.head_dim), kv.shape[1]
        rows = np.concatenate([np.full((t, QUERIES, self.head_dim), 1e30, np.float32), *kv], axis=1)
        rows = np.pad(rows, ((0, 0), (0, 0), (0, width - self.head_dim)))
        before = rows.tobytes()
        call = np.zeros(CALL_FIELDS, np.int64)
        call[N_HEADS], call[N_KV_HEADS], call[ROW_WIDTH], call[N_SEGMENTS] = QUERIES, self.heads, width, 3
        call[N_SINKS] = self.sinks
        call[N_QUERIES], call[Q_STRIDE], call[POSITION] = t, rows.strides[0], position
        call[SEGMENTS : SEGMENTS + 2] = self.segment.table.ctypes.data, self.segment.geometry.ctypes.data
        call[SEGMENTS + 4 : SEGMENTS + 6] = self.store.addresses()
        store_rows_of(call, rows)
        assert rows.tobytes() == before and call[LOST] in (0, 1)
        with np.errstate(over="ignore"):
            stored = kv.astype(DTYPES[self.kind]).astype(np.float64)
        start = position - self.store.first * self.tile
        self.want[:, start : start + t] = stored
        sunk = self.want_sinks[:, position : position + t]
        sunk[:] = stored[:, : sunk.shape[1]]
        return bool(call[LOST])

    def check(self) -> None:
        """Every number of every tile and sink is what it should be, zeros where nothing was stored."""
        kinds = (self.kind, self.kind)
        places = [self.store.place(t) for t in range(self.store.first, self.store.stop)]
        tiles = [page_tile(page, slot, kinds, self.tile, self.heads, self.head_dim) for page, slot in places]
        for found, want in zip(read_tiles(tiles, kinds, self.tile, self.heads, self.head_dim), self.want, strict=True):
            np.testing.assert_array_equal(found, want)
        for found, want in zip(self.sink, self.want_sinks, strict=True):
            np.testing.assert_array_equal(found[..., : self.head_dim].astype(np.float64), want)
            assert not found[..., self.head_dim :].astype(np.float64).any()


SHAPES = st.tuples(
    st.sampled_from(list(DTYPES)), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.sampled_from([2, 16, 20, 64]),
    st.integers(0, 70),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    SHAPES, st.integers(0, 200), st.integers(1, 150), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 3]),
    st.integers(0, 2**32),
)  # fmt: skip
def test_tokens_are_stored_at_any_position_and_touch_no_other(
    shape: tuple, first: int, count: int, low: float, high: float, page_tiles: int, seed: int
) -> None:
    """Across tiles and pages, with channels that fill up 16, as sinks too; and over what was there before."""
    rng = np.random.default_rng(seed)
    kind, tile, heads, d, sinks = shape
    dense = Dense(kind, tile, heads, d, sinks, first + count, page_tiles=page_tiles)
    assert not dense.append(normal(rng, 2, count, heads, d), first)
    dense.check()
    start, stop = sorted((first + round(low * count), first + round(high * count)))
    assert not dense.append(normal(rng, 2, stop - start, heads, d), start)
    dense.check()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 5), st.integers(0, 100), st.integers(1, 40), st.integers(0, 2**32))
def test_tiles_that_were_forgotten_are_not_missed(shape: tuple, first: int, more: int, t: int, seed: int) -> None:
    """Positions are absolute, tiles are counted from the first one held. Behind the sinks, none is written any more."""
    kind, tile, heads, d, sinks = shape
    position = first * tile + more
    dense = Dense(kind, tile, heads, d, min(sinks, position), position + t, first)
    assert not dense.append(normal(np.random.default_rng(seed), 2, t, heads, d), position)
    dense.check()
    assert not dense.want_sinks.any()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(DTYPES)), st.sampled_from([4, 16, 20]), st.integers(0, 2**32))
def test_numbers_of_every_magnitude_are_rounded_as_by_a_cast(kind: str, d: int, seed: int) -> None:
    """Any finite bit patterns: halfway between two numbers of the type, below its smallest and beyond its largest."""
    rng = np.random.default_rng(seed)
    dense = Dense(kind, 32, 2, d, 3, 9)
    bits = rng.integers(0, 1 << 32, (2, 9, 2, d), dtype=np.uint32)
    bits[:, ::2] = (bits[:, ::2] & 0x8FFFF000) + 0x38000000  # within float16, and more often halfway
    kv = np.nan_to_num(bits.view(np.float32), nan=1.0, posinf=2.0, neginf=-2.0)
    lost = dense.append(kv, 0)
    dense.check()
    assert lost == bool(np.isinf(dense.want).any())


@pytest.mark.parametrize(("kind", "largest", "beyond"), [("f16", 65519.996, 65520.0), ("bf16", 3.38e38, 3.4e38)])
def test_a_number_that_becomes_infinite_is_told_wherever_it_is(kind: str, largest: float, beyond: float) -> None:
    """And no other one: the next call, with numbers that fit, says so."""
    for side, token, head, channel in np.ndindex(2, 3, 2, 20):
        dense = Dense(kind, 32, 2, 20, 2, 33)
        kv = np.ones((2, 3, 2, 20), np.float32)
        for sign in (1, -1):
            kv[side, token, head, channel] = sign * largest
            assert not dense.append(kv, 30)
            kv[side, token, head, channel] = sign * beyond
            assert dense.append(kv, 30)
    dense.check()


def test_float32_loses_nothing() -> None:
    dense = Dense("f32", 32, 1, 16, 1, 2)
    kv = np.full((2, 2, 1, 16), np.finfo(np.float32).max)
    kv[1, 1, 0, 3], kv[1, 0, 0, 7] = np.nan, -np.inf
    assert not dense.append(kv, 0)
    dense.check()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_infinity_and_nan_keep_their_place(kind: str) -> None:
    """They may be told as lost, which the cache looks at again; beside them, what is lost is told all the same."""
    for number in (np.nan, np.inf, -np.inf):
        dense = Dense(kind, 64, 2, 20, 2, 5)
        kv = normal(np.random.default_rng(1), 2, 5, 2, 20)
        kv[0, 1, 1, 19] = kv[1, 4, 0, 2] = number
        dense.append(kv, 0)
        dense.check()
        kv[0, 1, 1, 18] = 3.4e38
        assert dense.append(kv, 0)
        dense.check()


def test_no_token_is_no_change() -> None:
    dense = Dense("f16", 32, 2, 16, 2, 5)
    assert not dense.append(np.zeros((2, 0, 2, 16), np.float32), 3)
    dense.check()
