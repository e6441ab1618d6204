"""Fitted scales: codes are the nearest to what is stored, and that is the best line, as the docstrings of quantize.py say.

A float64 implementation of these docstrings finds which scale and minimum there should be: codes over a part of the range,
then the line with the least squares through the values over their codes.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import quantize
from mixkv.kernels.jit import do_share
from mixkv.kernels.quantize import JOB_FIELDS, quantize_share, quantize_tile
from mixkv.kernels.segment import TileStore, seal_job
from mixkv.kernels.tables import CALL_FIELDS, HEAD_DIM, JOB_STARTS, JOBS, N_KV_HEADS, ROW_WIDTH, UNPACK_KERNEL
from mixkv.kernels.tiles import unpack_head

from .oracle import (
    Format,
    Row,
    dense_store,
    formats,
    layout_of,
    normal,
    padded_width,
    page_tile,
    seal,
    segment_rows,
    store_row,
)

BITS = (2, 3, 4)
AXES = ("c", "t", "t16")
PARTS = {2: 0.85, 3: 0.95, 4: 1.0}  # of the range, whose middle it is
# What sums of up to 256 products in float32 cost, relative to them. The scale is a quotient of differences of such sums, so
# its own error is larger by as much as these differences are smaller (``fitted_line``). The largest seen in
# 1,000 examples: 6.3 * 2^-24.
SUMS = 2.0**-20
# A code is a matter of rounding where a value lies so near to the middle of two (in steps)
TIE = 1e-4


def groups(form: Format, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of each group of values (tile, width); by channel one a channel."""
    tile, width = shape
    if form.axis == "channel":
        return [(slice(0, tile), slice(c, c + 1)) for c in range(width)]
    size = form.group(width)
    return [(slice(t, t + 1), slice(c, c + size)) for t in range(tile) for c in range(0, width, size)]


def fitted_line(x: np.ndarray, bits: int) -> tuple[float, float, float, bool]:
    """Scale and minimum for values x of one group, how much an error of the sums grows, and whether they hang on a tie."""
    most = 2**bits - 1
    low, high = x.min(), x.max()
    if low == high:
        return 0.0, float(low), 0.0, False
    step = (high - low) * PARTS[bits] / most
    steps = (x - low - (high - low) * (1 - PARTS[bits]) / 2) / step
    codes = np.clip(np.rint(steps), 0, most)
    inside = (steps > -TIE) & (steps < most + TIE)
    tie = bool((np.abs(np.abs(steps - np.floor(steps)) - 0.5)[inside] < TIE).any())
    slope, start = np.polyfit(codes, x - low, 1)
    n, c, cc, y, yc = len(x), codes.sum(), codes @ codes, (x - low).sum(), codes @ (x - low)
    grows = n * cc / (n * cc - c * c) + n * yc / (n * yc - c * y)
    return float(slope), float(low + start), float(grows), tie


def padded(x: np.ndarray) -> np.ndarray:
    """x (tile, D) with the last channel repeated up to a multiple of 16, as the kernel has it."""
    return np.pad(x, ((0, 0), (0, padded_width(x.shape[1]) - x.shape[1])), mode="edge").astype(np.float64)


def check_fitted(x: np.ndarray, form: Format, own: tuple[np.ndarray, ...], dead: int, wide: bool) -> tuple[int, int]:
    """Of one head: x (tile, D) and codes, scales and minima; how many groups were checked, and how many had ties."""
    tile, d = x.shape
    codes, scales, minima = own
    dead = dead if form.axis == "channel" and dead < tile else 0
    most = 2**form.bits - 1
    steps = (x - minima.astype(np.float32)) / np.where(scales == 0, np.inf, scales).astype(np.float32)
    np.testing.assert_array_equal(codes, np.clip(np.rint(steps), 0, most))
    full, n, ties = padded(x), 0, 0
    for rows, columns in groups(form, full.shape):
        if columns.start >= d:
            continue
        live = full[rows, columns][dead if form.axis == "channel" else 0 :]
        scale, minimum, grows, tie = fitted_line(live.ravel(), form.bits)
        found_scale, found_minimum = scales[rows, columns].flat[0], minima[rows, columns].flat[0]
        assert (scales[rows, columns] == found_scale).all() and (minima[rows, columns] == found_minimum).all()
        n, ties = n + 1, ties + tie
        if tie:
            continue
        span, at = live.max() - live.min(), np.abs(live).max()
        rounding = 2.0**-22 * at  # of the ends of the line, whose difference gives the scale
        scale_bound, minimum_bound = SUMS * grows * scale + rounding, SUMS * grows * span + rounding
        if not wide:
            scale_bound += max(2.0**-11 * scale, 2.0**-24)
            minimum_bound += max(2.0**-11 * abs(minimum), 2.0**-25)
        assert abs(found_scale - scale) <= scale_bound, (found_scale, scale)
        assert abs(found_minimum - minimum) <= minimum_bound, (found_minimum, minimum)
    return n, ties


def check_row(k: np.ndarray, v: np.ndarray, row: Row, dead: int = 0) -> None:
    n = ties = 0
    for side, (x, form) in enumerate(zip((k, v), formats(row.kinds), strict=True)):
        for head in range(row.heads):
            more, more_ties = check_fitted(x[:, head], form, row.coded(side, head), dead, row.wide[side])
            n, ties = n + more, ties + more_ties
    assert ties <= n // 10 + 5, "too many ties to have proved anything"


def same_parts(a: Row, b: Row, sides: tuple[int, ...] = (0, 1)) -> bool:
    """Whether two tiles are the same, bit for bit."""
    assert a.wide == b.wide
    return all(
        np.array_equal(x, y)
        for side in sides
        for head in range(a.heads)
        for x, y in zip(a.parts(side, head), b.parts(side, head), strict=True)
    )


def draw_data(rng: np.random.Generator, kind: str, tile: int, heads: int, d: int) -> np.ndarray:
    x = normal(rng, tile, heads, d)
    if kind == "uniform":
        return rng.random((tile, heads, d), np.float32)
    if kind == "outliers":
        x[rng.random(x.shape) < 0.03] *= np.float32(12)
    return x


# --- The line, and the codes over it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("dead", [0, 5, 16, 30])
@pytest.mark.parametrize("size", [1.0, 1e7])
def test_scales_are_those_of_the_best_line_and_codes_the_nearest(
    bits: int, axis: str, tile: int, dead: int, size: float
) -> None:
    """In float16, and where that does not do in float32, which shows how exact the sums are."""
    rng = np.random.default_rng(100 * bits + tile + dead)
    kinds = (f"q{bits}{axis}",) * 2
    k, v = (normal(rng, tile, 1, 48) * np.float32(size) for _ in "kv")
    row = store_row(seal(dense_store(k, v, tile=tile), kinds, dead, fitted=True), kinds, 0)
    assert row.wide == (size > 1, size > 1)
    check_row(k, v, row, dead)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.sampled_from(BITS)] * 2), st.tuples(*[st.sampled_from(("c", "t", "t16"))] * 2),
    st.sampled_from((32, 64)), st.sampled_from((1, 2, 16, 20, 64, 80, 112, 256)), st.integers(1, 2),
    st.sampled_from(("normal", "uniform", "outliers")), st.floats(-6, 10), st.sampled_from((0.0, 0.0, 0.5, -30.0)),
    st.integers(0, 40), st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape_and_size(
    bits: tuple[int, int], axes: tuple[str, str], tile: int, d: int, heads: int, kind: str, size: float, offset: float,
    dead: int, seed: int,
) -> None:  # fmt: skip
    """Around 0, and far from it, where little is left of the digits."""
    kinds = (f"q{bits[0]}{axes[0]}", f"q{bits[1]}{axes[1]}")
    rng = np.random.default_rng(seed)
    k, v = (
        np.float32(10**size) * (draw_data(rng, kind, tile, heads, d) + np.float32(offset)) for _ in "kv"
    )  # fmt: skip
    check_row(k, v, store_row(seal(dense_store(k, v, tile=tile), kinds, dead, fitted=True), kinds, 0), dead)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
def test_every_way_of_asking_for_it_gives_the_same(bits: int, axis: str) -> None:
    """A page of its own, a store, ``quantize``; and it is not what one gets unasked."""
    rng = np.random.default_rng(bits)
    form, kinds = Format(f"q{bits}{axis}", "k"), (f"q{bits}{axis}",) * 2
    k, v = normal(rng, 64, 2, 48), normal(rng, 64, 2, 48)
    source = dense_store(k, v)
    store = seal(source, kinds, fitted=True)
    row, ranged = store_row(store, kinds, 0), store_row(seal(source, kinds), kinds, 0)
    assert not any(same_parts(row, ranged, (side,)) for side in (0, 1))
    target = layout_of(kinds, 64, 2, 48)
    page = quantize_tile(source.place(0)[0], source.layout, target, fitted=True)
    np.testing.assert_array_equal(page_tile(page, 0, kinds, 64, 2, 48), page_tile(*store.place(0), kinds, 64, 2, 48))
    options = {f"{side}_{name}": x for side in "kv" for name, x in
               (("bits", bits), ("axis", form.axis), ("group", form.given_group))}  # fmt: skip
    segments = [segment_rows(quantize(k, v, **options, fitted=x), kinds, 64)[0] for x in (True, False)]
    assert same_parts(segments[0], row) and same_parts(segments[1], ranged)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("last", [1, 5, 31])
def test_a_last_tile_that_is_not_full_counts_its_own_tokens_alike(bits: int, axis: str, last: int) -> None:
    """None of them stands in for all that are missing."""
    rng, form, kinds = np.random.default_rng(7), Format(f"q{bits}{axis}", "k"), (f"q{bits}{axis}",) * 2
    k, v = normal(rng, 64 + last, 1, 48), normal(rng, 64 + last, 1, 48)
    options = {f"{side}_{name}": x for side in "kv" for name, x in
               (("bits", bits), ("axis", form.axis), ("group", form.given_group))}  # fmt: skip
    rows = segment_rows(quantize(k, v, **options, fitted=True), kinds, 64)
    assert len(rows) == 2
    own = 64 + np.arange(64) % last
    check_row(k[:64], v[:64], rows[0])
    check_row(k[own], v[own], rows[1])


# --- What it is worth ------------------------------------------------------------------------------------------------


def squared_error(x: np.ndarray, kind: str, fitted: bool) -> float:
    store = seal(dense_store(x, x), (kind, kind), fitted=fitted)
    found = [store_row(store, (kind, kind), t).read() for t in range(store.stop)]
    errors = [np.concatenate(side) - x for side in zip(*found, strict=True)]
    return float(np.mean(np.square(errors)))


@pytest.mark.parametrize(("bits", "share"), [(2, 0.60), (3, 0.84), (4, 0.94)])
@pytest.mark.parametrize("axis", ["c", "t"])
def test_the_squared_error_of_normal_numbers_falls_as_documented(bits: int, share: float, axis: str) -> None:
    """In groups of 64, against the scales of the range."""
    x = normal(np.random.default_rng(1), 512, 2, 64)
    kind = f"q{bits}{axis}"
    assert squared_error(x, kind, True) <= (share + 0.03) * squared_error(x, kind, False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", ["c", "t"])
@pytest.mark.parametrize("kind", ["uniform", "outliers"])
def test_the_squared_error_of_other_numbers_does_not_grow(bits: int, axis: str, kind: str) -> None:
    x = draw_data(np.random.default_rng(2), kind, 512, 2, 64)
    assert squared_error(x, f"q{bits}{axis}", True) <= squared_error(x, f"q{bits}{axis}", False)


# --- Numbers that break quantizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.25, 65504.0, -65504.0, 2.0**-24])
def test_a_constant_group_is_exact(bits: int, axis: str, value: float) -> None:
    x, kinds = np.full((32, 1, 20), value, np.float32), (f"q{bits}{axis}",) * 2
    for found in store_row(seal(dense_store(x, x, tile=32), kinds, fitted=True), kinds, 0).read():
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("pair", [(0.0, 1.0), (-3.5, 2.0), (100.0, 101.0)])
@pytest.mark.parametrize("rare", [False, True])
def test_two_values_are_the_first_and_the_last_code(
    bits: int, axis: str, pair: tuple[float, float], rare: bool
) -> None:
    """Whichever of them is rare: the line goes through both."""
    x, kinds = np.full((32, 1, 16), pair[0], np.float32), (f"q{bits}{axis}",) * 2
    if rare:
        x[np.arange(32), 0, np.arange(32) % 16] = pair[1]
    else:
        x[np.indices((32, 16)).sum(0)[:, None] % 2 == 0] = pair[1]
    row = store_row(seal(dense_store(x, x, tile=32), kinds, fitted=True), kinds, 0)
    for side in (0, 1):
        codes, scales, _ = row.coded(side, 0)
        np.testing.assert_array_equal(codes, np.where(x[:, 0] == pair[1], 2**bits - 1, 0))
        np.testing.assert_allclose(scales, (pair[1] - pair[0]) / (2**bits - 1), rtol=2.0**-10)
    for found in row.read():
        np.testing.assert_allclose(found, x, rtol=0, atol=2.0**-10 * np.abs(pair).max())


def impossible(x: np.ndarray, y: np.ndarray, kinds: tuple[str, str], fitted: bool) -> bool:
    try:
        seal(dense_store(x, y, tile=len(x)), kinds, fitted=fitted)
    except OverflowError:
        return True
    return False


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 31])
def test_what_is_no_finite_number_is_refused(bits: int, axis: str, side: int, bad: float, at: int) -> None:
    rng = np.random.default_rng(at)
    arrays = [normal(rng, 32, 2, 20), normal(rng, 32, 2, 20)]
    arrays[side][at, 1, at % 20] = bad
    kinds = (f"q{bits}{axis}",) * 2
    assert impossible(*arrays, kinds, True) and impossible(*arrays, kinds, False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "size", [1e-44, 1e-40, 1e-38, 1e-30, 1e-9, 1e-6, 1e-4, 1e6, 1e30, 2e35, 1e37, 5e37, 1e38, 3.4e38]
)
@pytest.mark.parametrize("kind", ["uniform", "ends", "one-sided"])
def test_tiny_and_huge_ranges_are_held_where_unfitted_scales_hold_them(
    bits: int, axis: str, size: float, kind: str
) -> None:
    """And refused where they are; no value is further away than two steps of the range."""
    rng = np.random.default_rng(3)
    x = 2 * rng.random((32, 1, 32)) - 1
    if kind == "ends":
        x = np.sign(x)
        x[::3, :, ::3] *= 0.97  # on one side of the line, which goes beyond the range of values then
    x = (size * (np.abs(x) if kind == "one-sided" else x)).astype(np.float32)
    kinds = (f"q{bits}{axis}",) * 2
    refused = impossible(x, x, kinds, False)
    assert impossible(x, x, kinds, True) == refused == (size > 1.7e38 and kind != "one-sided")
    if refused:
        return
    row, ranged = (store_row(seal(dense_store(x, x, tile=32), kinds, fitted=f), kinds, 0) for f in (True, False))
    assert row.wide == ranged.wide
    steps = [ranged.coded(side, 0)[1] for side in (0, 1)]
    for found, step in zip(row.read(), steps, strict=True):
        assert (np.abs(found[:, 0] - x[:, 0]) <= 2 * step + 1e-43).all()


# --- Dead tokens, 8 bits, workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dead", [1, 5, 16, 31, 32, 33, 62, 63])
def test_dead_tokens_move_no_scale_by_channel(bits: int, dead: int) -> None:
    """Of K or of V, whatever they are."""
    rng, kinds, rows = np.random.default_rng(dead), (f"q{bits}c",) * 2, []
    k, v = normal(rng, 64, 2, 20), normal(rng, 64, 2, 20)
    for loud in (1e30, 100.0, np.nan):
        for x in (k, v):
            x[:dead] = loud
        rows.append(store_row(seal(dense_store(k, v), kinds, dead, fitted=True), kinds, 0))
    for side, head in np.ndindex(2, 2):
        first, *others = (row.coded(side, head) for row in rows)
        for other in others:
            np.testing.assert_array_equal(first[0][dead:], other[0][dead:])
            np.testing.assert_array_equal(first[1:], other[1:])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dead", [5, 64, 70])
def test_by_token_nothing_is_dead_and_neither_is_a_tile_of_nothing_else(bits: int, dead: int) -> None:
    rng = np.random.default_rng(4)
    source = dense_store(normal(rng, 64, 2, 20), normal(rng, 64, 2, 20))
    kinds = (f"q{bits}t",) * 2 if dead == 5 else (f"q{bits}", f"q{bits}")
    rows = [store_row(seal(source, kinds, n, fitted=True), kinds, 0) for n in (0, dead)]
    assert same_parts(*rows)


@pytest.mark.parametrize("axis", AXES)
def test_codes_of_8_bits_are_never_fitted(axis: str) -> None:
    rng, kinds = np.random.default_rng(5), (f"q8{axis}",) * 2
    source = dense_store(normal(rng, 64, 2, 48), normal(rng, 64, 2, 48))
    rows = [store_row(seal(source, kinds, 3, fitted=fitted), kinds, 0) for fitted in (True, False)]
    assert same_parts(*rows)


@pytest.mark.parametrize("kinds", [("q4", "q2"), ("q3t16", "q4c"), ("q2t", "q3t16")])
def test_workers_find_the_same_bits_together_as_one_does_alone(kinds: tuple[str, str]) -> None:
    rng = np.random.default_rng(6)
    source = dense_store(normal(rng, 96, 3, 48), normal(rng, 96, 3, 48), tile=32)
    tiles = []
    for workers in (1, 2, 5):
        target = TileStore(layout_of(kinds, 32, 3, 48, 16))
        for _ in range(3):
            target.append()
        jobs = np.array([seal_job(source, target, t, 7 if t == 0 else 0, True) for t in range(3)])
        assert jobs.shape == (3, JOB_FIELDS)
        call = np.zeros(CALL_FIELDS, np.int64)
        call[UNPACK_KERNEL] = unpack_head.address()
        call[N_KV_HEADS], call[ROW_WIDTH], call[HEAD_DIM], call[JOBS] = 3, 48, 48, jobs.ctypes.data
        call[JOB_STARTS + 1] = 3
        for worker in range(workers):
            do_share(quantize_share.address(), call.ctypes.data, worker, workers, 0, 0, 0, 0, 0, 0)
        tiles.append([page_tile(*target.place(t), kinds, 32, 3, 48) for t in range(3)])
    for others in tiles[1:]:
        for a, b in zip(tiles[0], others, strict=True):
            np.testing.assert_array_equal(a, b)
