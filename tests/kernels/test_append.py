"""New tokens in the dense parts of a cache, against NumPy's own casts; read back by the description of the layout."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels.append import store_rows_of, store_share
from mixkv.kernels.hadamard import block_size
from mixkv.kernels.jit import do_share
from mixkv.kernels.segment import Segment, TileStore, segment_of_arrays
from mixkv.kernels.tables import (
    CALL_FIELDS,
    HEAD_DIM,
    K_BLOCK,
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
    V_BLOCK,
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

    def rows_of(self, kv: np.ndarray) -> np.ndarray:
        """Keys and values, float32 (2, T, heads, head_dim), behind queries, padded."""
        queries = np.full((kv.shape[1], QUERIES, self.head_dim), 1e30, np.float32)
        rows = np.concatenate([queries, *kv], axis=1)
        return np.pad(rows, ((0, 0), (0, 0), (0, padded_width(self.head_dim) - self.head_dim)))

    def call(self, rows: np.ndarray, position: int) -> np.ndarray:
        """The call that stores rows from a position on."""
        width, t = padded_width(self.head_dim), len(rows)
        call = np.zeros(CALL_FIELDS, np.int64)
        call[HEAD_DIM] = self.head_dim
        call[N_HEADS], call[N_KV_HEADS], call[ROW_WIDTH], call[N_SEGMENTS] = QUERIES, self.heads, width, 3
        call[N_SINKS] = self.sinks
        call[N_QUERIES], call[Q_STRIDE], call[POSITION] = t, rows.strides[0], position
        call[SEGMENTS : SEGMENTS + 2] = self.segment.table.ctypes.data, self.segment.geometry.ctypes.data
        call[SEGMENTS + 4 : SEGMENTS + 6] = self.store.addresses()
        return call

    def append(self, kv: np.ndarray, position: int) -> bool:
        """Store keys and values, float32 (2, T, heads, head_dim), from a position on; what is said of lost numbers."""
        t, rows = kv.shape[1], self.rows_of(kv)
        before = rows.tobytes()
        call = self.call(rows, position)
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


# --- Workers, and rotation -----------------------------------------------------------------------------------------------


def by_workers(dense: Dense, rows: np.ndarray, position: int, workers: int, blocks: tuple[int, int]) -> bool:
    """Store rows share by share, the last worker's first; what is said of lost numbers."""
    call = dense.call(rows, position)
    call[K_BLOCK], call[V_BLOCK] = blocks
    for worker in reversed(range(workers)):
        do_share(store_share.address(), call.ctypes.data, worker, workers, 0, rows.ctypes.data, 0, 0, 0, 0)
    return bool(call[LOST])


def contents(dense: Dense) -> list[bytes]:
    """Every byte of the tiles and of the sinks."""
    pages = {id(page): page for page in (dense.store.place(t)[0] for t in range(dense.store.first, dense.store.stop))}
    return [x.tobytes() for x in (*pages.values(), *dense.sink)]


@settings(max_examples=150, deadline=None)
@given(
    SHAPES, st.integers(0, 200), st.integers(0, 150), st.integers(2, 5), st.booleans(), st.booleans(),
    st.integers(0, 2**32),
)  # fmt: skip
def test_shares_of_workers_add_up_to_what_one_stores(
    shape: tuple, position: int, count: int, workers: int, rotate_k: bool, rotate_v: bool, seed: int
) -> None:
    """Bit for bit, queries too, in any order; every row is rotated once."""
    kind, tile, heads, d, sinks = shape
    rng = np.random.default_rng(seed)
    kv, blocks = normal(rng, 2, count, heads, d), (block_size(d) * rotate_k, block_size(d) * rotate_v)
    found = []
    for share in (1, workers):
        dense = Dense(kind, tile, heads, d, sinks, max(1, position + count))
        rows = dense.rows_of(kv)
        rows[:, :QUERIES, :d] = normal(np.random.default_rng(seed), count, QUERIES, d)
        assert not by_workers(dense, rows, position, share, blocks)
        found.append([rows.tobytes(), *contents(dense)])
    assert found[0] == found[1]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("row", [0, 16, 39])
def test_a_lost_number_is_told_whichever_worker_meets_it(workers: int, row: int) -> None:
    dense = Dense("f16", 32, 2, 20, 2, 40)
    kv = np.ones((2, 40, 2, 20), np.float32)
    kv[1, row, 1, 19] = 1e6
    assert by_workers(dense, dense.rows_of(kv), 0, workers, (0, 0))


@pytest.mark.parametrize("rotate", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("d", [2, 6, 16, 20, 48, 64, 96, 112, 128, 250])
def test_what_is_rotated_is_so_in_place_and_stored_so(rotate: tuple[bool, bool], d: int) -> None:
    """Queries with keys, values by themselves; padding stays zero. The matrix is that of Sylvester, block by block."""
    rng = np.random.default_rng(d)
    heads, count, position = 2, 40, 3
    dense = Dense("f32", 32, heads, d, 5, position + count)
    kv, q = normal(rng, 2, count, heads, d), normal(rng, count, QUERIES, d)
    rows = dense.rows_of(kv)
    rows[:, :QUERIES, :d] = q
    by_workers(dense, rows, position, 1, (block_size(d) * rotate[0], block_size(d) * rotate[1]))
    n = next(2**i for i in reversed(range(9)) if d % 2**i == 0)
    block = np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / np.sqrt(n)
    turned = np.kron(np.eye(d // n), block)
    wanted = [x @ turned if yes else x for x, yes in zip((q, *kv), (rotate[0], *rotate), strict=True)]
    assert not rows[..., d:].any()
    found = rows[:, :QUERIES, :d], rows[:, QUERIES : QUERIES + heads, :d], rows[:, QUERIES + heads :, :d]
    for own, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(own, want, rtol=0, atol=4e-6)
    for own, yes, before in zip(found, (rotate[0], *rotate), (q, *kv), strict=True):
        assert yes or np.array_equal(own, before)
    dense.want[:, position : position + count] = np.stack(found[1:])
    dense.want_sinks[:, position:5] = np.stack(found[1:])[:, :2]
    dense.check()
