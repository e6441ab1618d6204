"""Quantizing, read back by the description of the layout alone (oracle.py)."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import quantize
from mixkv.kernels.attention import TILE

from .oracle import (
    head_parts,
    k_codes,
    make_store,
    normal,
    padded_width,
    read_tile,
    v_codes,
    v_group,
)

LARGEST_CODE = {"q8": 255, "q4": 15}
CODED = tuple(LARGEST_CODE)


def f16_rounding(x: np.ndarray) -> np.ndarray:
    """The most that storing x in float16 changes it: half a step of 11 bits, or half of the smallest subnormal."""
    return np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)


def parts(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, d: int) -> tuple[list, list]:
    """(codes, scales, minima) of K and of V of every head."""
    k, v = head_parts(raw, kinds, tile, heads, d)
    width = padded_width(d)
    return [k_codes(x, kinds[0], tile, width) for x in k], [v_codes(x, kinds[1], tile, width) for x in v]


def one_tile(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], dead: int = 0) -> np.ndarray:
    """k, v (tile, Hkv, D) as one coded tile."""
    return make_store(k, v, kinds, tile=len(k), dead=dead)[0]


def assert_within_half_a_step(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, largest: int
) -> None:
    """Half a stored step; at the ends of the range also what rounding the scale and the minimum to float16 cut off."""
    error = np.abs(codes * scales + minima - x)
    bound = scales / 2 + largest * f16_rounding(scales) + f16_rounding(minima) + 2.0**-22 * np.abs(x)
    assert (error <= bound).all(), f"{(error - bound).max()} beyond the bound"
    inside = (codes > 0) & (codes < largest)
    assert (error[inside] <= (scales / 2 + 2.0**-22 * (np.abs(x) + np.abs(minima)))[inside]).all()


def check_tile(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], raw: np.ndarray, dead: int = 0) -> None:
    """Codes within half a step, and no scale wider than its group."""
    tile, heads, d = k.shape
    k_parts, v_parts = parts(raw, kinds, tile, heads, d)
    for h in range(heads):
        codes, scales, minima = (np.broadcast_to(x[..., :d], (tile, d)) for x in k_parts[h])
        largest = LARGEST_CODE[kinds[0]]
        live = k[dead:, h].astype(np.float64)
        assert_within_half_a_step(live, codes[dead:], scales[dead:], minima[dead:], largest)
        spread = (live.max(axis=0) - live.min(axis=0)) / largest
        assert (np.abs(scales[0] - spread) <= 1.001 * f16_rounding(spread)).all()
        assert (np.abs(minima[0] - live.min(axis=0)) <= 1.001 * f16_rounding(minima[0])).all()
        codes, scales, minima = (x[:, :d] for x in v_parts[h])
        largest = LARGEST_CODE[kinds[1]]
        values = v[:, h].astype(np.float64)
        assert_within_half_a_step(values, codes, scales, minima, largest)
        group = v_group(padded_width(d))
        for first in range(0, d, group):
            part = values[:, first : first + group]
            spread = (part.max(axis=1) - part.min(axis=1)) / largest
            assert (np.abs(scales[:, first] - spread) <= 1.001 * f16_rounding(spread)).all()
            assert (np.abs(minima[:, first] - part.min(axis=1)) <= 1.001 * f16_rounding(minima[:, first])).all()


# --- Round trips ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((32, 64, 128)), st.integers(1, 3), st.sampled_from((1, 16, 20, 40, 48, 64, 80, 112, 128)),
    st.tuples(st.sampled_from(CODED), st.sampled_from(CODED)), st.floats(-8, 3), st.floats(-3, 3), st.integers(0, 40),
    st.integers(0, 2**32),
)  # fmt: skip
def test_a_code_is_at_most_half_a_step_away(
    tile: int, heads: int, d: int, kinds: tuple[str, str], size: float, offset: float, dead: int, seed: int
) -> None:
    """Data of any size down to subnormal scales, around any offset; the first ``dead`` tokens do not count for K."""
    rng = np.random.default_rng(seed)
    k, v = ((10**size * normal(rng, tile, heads, d) + np.float32(offset)).astype(np.float32) for _ in "kv")
    dead = min(dead, tile - 1)
    check_tile(k, v, kinds, one_tile(k, v, kinds, dead), dead)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_quantize_cuts_keys_into_tiles(bits: tuple[int, int], tile: int) -> None:
    rng = np.random.default_rng(1)
    kinds = f"q{bits[0]}", f"q{bits[1]}"
    k, v = normal(rng, 2 * tile + 5, 2, 40), normal(rng, 2 * tile + 5, 2, 40)
    segment = quantize(k, v, k_bits=bits[0], v_bits=bits[1], tile=tile)
    assert (segment.start, segment.stop, segment.n_kv_heads, segment.head_dim) == (0, 2 * tile + 5, 2, 40)
    assert segment.geometry[TILE] == tile and len(segment.owner) == 3
    for i, raw in enumerate(segment.owner):
        rows = np.minimum(np.arange(i * tile, (i + 1) * tile), len(k) - 1)  # the last tile's own five tokens only
        check_tile(k[rows], v[rows], kinds, raw)


def test_quantize_takes_half_precision_and_any_layout() -> None:
    rng = np.random.default_rng(2)
    k, v = normal(rng, 70, 2, 20).astype(np.float16), normal(rng, 70, 2, 20).astype(ml_dtypes.bfloat16)
    want = quantize(k.astype(np.float32), v.astype(np.float32))
    for arrays in ((k, v), (np.asfortranarray(k), v[::-1].copy()[::-1])):
        found = quantize(*arrays)
        for a, b in zip(found.owner, want.owner, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_defaults_are_four_bits_and_tiles_of_64() -> None:
    x = normal(np.random.default_rng(3), 65, 1, 16)
    a, b = quantize(x, x), quantize(x, x, k_bits=4, v_bits=4, tile=64)
    np.testing.assert_array_equal(a.geometry, b.geometry)
    np.testing.assert_array_equal(a.owner[0], b.owner[0])


# --- Numbers that break quantizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 65504.0, -65504.0, 2.0**-24, 6e-5])
@pytest.mark.parametrize("d", [16, 20])
def test_a_constant_group_is_exact(kind: str, value: float, d: int) -> None:
    held = np.float32(np.float16(value))
    x = np.full((32, 1, d), held)
    for values in read_tile(one_tile(x, x, (kind, kind)), (kind, kind), 32, 1, d):
        np.testing.assert_array_equal(values, held)


@pytest.mark.parametrize("kind", CODED)
def test_a_group_of_zeros_among_others_is_exact(kind: str) -> None:
    rng = np.random.default_rng(4)
    k, v = normal(rng, 32, 2, 128), normal(rng, 32, 2, 128)
    k[:, 1, 7], v[5, 0, 64:] = 0, 0
    raw = one_tile(k, v, (kind, kind))
    check_tile(k, v, (kind, kind), raw)
    read_k, read_v = read_tile(raw, (kind, kind), 32, 2, 128)
    assert not read_k[:, 1, 7].any() and not read_v[5, 0, 64:].any()


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("outlier", [30_000.0, -60_000.0])
def test_one_huge_outlier_costs_its_own_group_only(kind: str, outlier: float) -> None:
    rng = np.random.default_rng(5)
    k, v = normal(rng, 64, 2, 128), normal(rng, 64, 2, 128)
    before = parts(one_tile(k, v, (kind, kind)), (kind, kind), 64, 2, 128)
    k[11, 1, 70], v[11, 1, 70] = outlier, outlier
    raw = one_tile(k, v, (kind, kind))
    check_tile(k, v, (kind, kind), raw)
    after = parts(raw, (kind, kind), 64, 2, 128)
    others = np.arange(128) != 70
    for was, now in zip(before[0], after[0], strict=True):
        for a, b in zip(was, now, strict=True):
            np.testing.assert_array_equal(a[..., others], b[..., others])
    for h, (was, now) in enumerate(zip(before[1], after[1], strict=True)):
        elsewhere = np.ones((64, 128), bool)
        elsewhere[11, 64:] = h != 1  # the second group of this token in this head
        for a, b in zip(was, now, strict=True):
            np.testing.assert_array_equal(a[elsewhere], b[elsewhere])


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-7, 1e-8, 1e-30, 1e-44])
def test_subnormal_scales_and_smaller_ones(kind: str, size: float) -> None:
    rng = np.random.default_rng(6)
    x = (size * normal(rng, 32, 1, 16).astype(np.float64)).astype(np.float32)
    raw = one_tile(x, x, (kind, kind))
    check_tile(x, x, (kind, kind), raw)
    for values in read_tile(raw, (kind, kind), 32, 1, 16):
        assert np.isfinite(values).all() and np.abs(values).max() <= 4 * size + 2.0**-24


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dead", [1, 4, 16, 33])
def test_dead_rows_do_not_widen_the_range_of_K(kind: str, dead: int) -> None:
    rng = np.random.default_rng(7)
    k, v = normal(rng, 64, 2, 20), normal(rng, 64, 2, 20)
    k[:dead] *= 1e30
    raw = one_tile(k, v, (kind, kind), dead)
    check_tile(k, v, (kind, kind), raw, dead)
    k[:dead] = -1
    again = one_tile(k, v, (kind, kind), dead)
    found, want = (parts(x, (kind, kind), 64, 2, 20)[0] for x in (raw, again))
    for (codes, *pair), (other_codes, *other_pair) in zip(found, want, strict=True):
        np.testing.assert_array_equal(codes[dead:], other_codes[dead:])
        np.testing.assert_array_equal(pair, other_pair)


@pytest.mark.parametrize("dead", [32, 40])
def test_a_tile_of_dead_rows_is_no_error(dead: int) -> None:
    rng = np.random.default_rng(8)
    k, v = normal(rng, 32, 1, 16), normal(rng, 32, 1, 16)
    for values in read_tile(one_tile(k, v, ("q4", "q4"), dead), ("q4", "q4"), 32, 1, 16):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", CODED)
def test_V_of_a_token_depends_on_that_token_alone(kind: str) -> None:
    rng = np.random.default_rng(9)
    k, v = normal(rng, 32, 2, 80), normal(rng, 32, 2, 80)
    before = parts(one_tile(k, v, (kind, kind)), (kind, kind), 32, 2, 80)[1]
    kept = rng.random(32) < 0.5
    v[~kept] = 100 * normal(rng, 32, 2, 80)[~kept]
    k *= 3
    after = parts(one_tile(k, v, (kind, kind), dead=5), (kind, kind), 32, 2, 80)[1]
    for was, now in zip(before, after, strict=True):
        for a, b in zip(was, now, strict=True):
            np.testing.assert_array_equal(a[kept], b[kept])
            assert (a[~kept] != b[~kept]).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize(
    "numbers", [(70_000.0, 70_000.0), (-70_000.0, 0.0), (-2e7, 2e7), (3e38, -3e38), (np.nan, 1), (np.inf, 1)]
)
def test_what_float16_cannot_hold_is_an_error(bits: int, part: str, numbers: tuple[float, float]) -> None:
    rng = np.random.default_rng(10)
    arrays = {"k": normal(rng, 40, 2, 16), "v": normal(rng, 40, 2, 16)}
    arrays[part][34, 1] = numbers[0]
    arrays[part][34, 1, 5] = numbers[1]
    if part == "k":
        arrays[part][35, 1] = numbers[1]
    if numbers[0] == numbers[1]:
        arrays[part][:] = numbers[0]
    with pytest.raises(OverflowError, match="scale or minimum is beyond the largest float16"):
        quantize(**arrays, k_bits=bits, v_bits=bits)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"k_bits": 5}, r"^k_bits must be one of \(4, 8\), found 5"),
        ({"v_bits": 16}, "^v_bits .*16"),
        ({"v_bits": None}, "^v_bits .*None"),
        ({"tile": 48}, r"^tile must be one of \(32, 64, 128\), found 48"),
        ({"k": np.zeros((3, 16), np.float32)}, r"^k must be an array \(N, Hkv, D\), found \(3, 16\)"),
        ({"v": np.zeros((3, 1, 16), np.float64)}, "^v .*float64"),
        ({"v": np.zeros((3, 2, 16), np.float32)}, r"^k and v .*\(3, 1, 16\) and \(3, 2, 16\)"),
    ],
)
def test_quantize_refuses_what_does_not_fit(bad: dict[str, object], message: str) -> None:
    x = np.zeros((3, 1, 16), np.float32)
    with pytest.raises(ValueError, match=message):
        quantize(**{"k": x, "v": x, **bad})
