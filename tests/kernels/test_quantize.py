"""Quantizing, read back by the description of the layout alone (oracle.py), against a plain quantizer in NumPy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import quantize
from mixkv.kernels.tables import TILE

from .oracle import (
    CODED,
    Row,
    dense_store,
    formats,
    head_parts,
    layout_of,
    make_store,
    normal,
    padded_width,
    quantize_as,
    read_tile,
    seal,
    segment_rows,
    segment_tiles,
    store_row,
    store_tiles,
)
from .plain import SUBNORMAL, Codes, check_row, check_sides

AXES = tuple(kind + axis for kind in CODED for axis in "ct")


def coded(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, d: int) -> tuple[list[Codes], list[Codes]]:
    """(codes, scales, minima) of K and of V of every head, as a page of one tile has them."""
    width = padded_width(d)
    sides = zip(formats(kinds), head_parts(raw, kinds, tile, heads, d), strict=True)
    return tuple([tuple(x[:, :d] for x in form.coded(part, tile, width)) for part in parts] for form, parts in sides)


def one_tile(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], dead: int = 0) -> np.ndarray:
    """k, v (tile, Hkv, D) as one coded tile."""
    return store_tiles(make_store(k, v, kinds, tile=len(k), dead=dead), kinds)[0]


def sealed(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], dead: int = 0) -> Row:
    """k, v (tile, Hkv, D) as one coded tile, whatever scales it needs; the same in pages of one tile and of many."""
    source = dense_store(k, v, tile=len(k))
    rows = [store_row(seal(source, kinds, dead, page_tiles), kinds, 0) for page_tiles in (0, 1)]
    for side, head in np.ndindex(2, k.shape[1]):
        for a, b in zip(*(row.parts(side, head) for row in rows), strict=True):
            np.testing.assert_array_equal(a, b)
    return rows[0]


def check_tile(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], raw: np.ndarray, dead: int = 0) -> None:
    """The tile is what the plain quantizer makes, and no value is further away than half a step."""
    check_sides(k, v, kinds, coded(raw, kinds, *k.shape), (False, False), dead)


# --- Round trips ---------------------------------------------------------------------------------------------------------


@st.composite
def coded_kinds(draw: st.DrawFn, d: int) -> tuple[str, str]:
    """Names of two coded formats, with any group that fits head_dim."""
    width = padded_width(d)
    groups = ["", *(str(g) for g in range(16, width + 1, 16) if width % g == 0)]
    made = []
    for _ in "kv":
        kind = draw(st.sampled_from(CODED)) + draw(st.sampled_from(("", "c", "t")))
        made.append(kind + draw(st.sampled_from(groups)) if kind[2:] == "t" else kind)
    return made[0], made[1]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from((32, 64, 128)), st.integers(1, 3),
    st.sampled_from((1, 16, 20, 40, 48, 64, 80, 112, 128, 144, 250, 256)), st.data(),
    st.one_of(st.floats(-8, 3), st.floats(-7, -3), st.floats(-44, 36)), st.one_of(st.just(0.0), st.floats(-3, 3)),
    st.integers(0, 40), st.integers(0, 2**32),
)  # fmt: skip
def test_codes_are_those_of_the_plain_quantizer(
    tile: int, heads: int, d: int, data: st.DataObject, size: float, offset: float, dead: int, seed: int
) -> None:
    """Data of any size, around any offset or none; by channel the first ``dead`` tokens do not count."""
    kinds = data.draw(coded_kinds(d))
    rng = np.random.default_rng(seed)
    k, v = ((10**size * normal(rng, tile, heads, d) + np.float32(offset)).astype(np.float32) for _ in "kv")
    row = sealed(k, v, kinds, dead)
    check_row(k, v, row, dead)
    if any(row.wide):  # for which a page alone has no room
        with pytest.raises(OverflowError):
            one_tile(k, v, kinds, dead)
    else:
        check_tile(k, v, kinds, one_tile(k, v, kinds, dead), dead)


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("d", [64, 80, 96, 112, 128, 256])
def test_every_format_at_the_usual_head_dims(kind: str, tile: int, d: int) -> None:
    rng = np.random.default_rng(d)
    k, v = normal(rng, tile, 2, d), normal(rng, tile, 2, d)
    check_tile(k, v, (kind, kind), one_tile(k, v, (kind, kind)))


@pytest.mark.parametrize("kinds", [("q4", "q4"), ("q8", "q8"), ("q4", "q8"), ("q3t", "q2c"), ("q2", "q3")])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_quantize_cuts_keys_into_tiles(kinds: tuple[str, str], tile: int) -> None:
    """And these into pages of 512 positions."""
    rng = np.random.default_rng(1)
    for n, pages in ((2 * tile + 5, 1), (512, 1), (512 + tile + 5, 2)):
        k, v = normal(rng, n, 2, 40), normal(rng, n, 2, 40)
        segment = quantize_as(kinds, k, v, tile)
        assert (segment.start, segment.stop, segment.n_kv_heads, segment.head_dim) == (0, n, 2, 40)
        assert segment.geometry[TILE] == tile and len(segment.owner) == pages
        tiles = segment_tiles(segment, kinds, tile)
        assert len(tiles) == -(-n // tile)
        for i, raw in enumerate(tiles):
            rows = np.minimum(np.arange(i * tile, (i + 1) * tile), n - 1)  # the last tile's own five tokens only
            check_tile(k[rows], v[rows], kinds, raw)


def test_quantize_takes_half_precision_and_any_layout() -> None:
    rng = np.random.default_rng(2)
    k, v = normal(rng, 70, 2, 20).astype(np.float16), normal(rng, 70, 2, 20).astype(ml_dtypes.bfloat16)
    want = quantize(k.astype(np.float32), v.astype(np.float32))
    for arrays in ((k, v), (np.asfortranarray(k), v[::-1].copy()[::-1])):
        found = quantize(*arrays)
        for a, b in zip(found.owner, want.owner, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_defaults_are_four_bits_and_tiles_of_64_by_channel_and_by_token() -> None:
    x = normal(np.random.default_rng(3), 65, 1, 16)
    a = quantize(x, x)
    b = quantize(
        x, x, k_bits=4, v_bits=4, tile=64, k_axis="channel", v_axis="token", k_group=0, v_group=0
    )  # fmt: skip
    np.testing.assert_array_equal(a.geometry, b.geometry)
    np.testing.assert_array_equal(a.owner[0], b.owner[0])


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.float16), (32, np.float32)])
def test_sixteen_and_thirty_two_bits_are_kept_as_numbers(bits: int, dtype: type) -> None:
    rng = np.random.default_rng(4)
    k, v = normal(rng, 70, 2, 20), normal(rng, 70, 2, 20)
    rows = np.minimum(np.arange(64, 128), 69)
    for kinds, options in (((f"f{bits}", "q4"), {"k_bits": bits}), (("q4", f"f{bits}"), {"v_bits": bits})):
        segment = quantize(k, v, **options)
        side = kinds.index(f"f{bits}")
        found = read_tile(segment_tiles(segment, kinds, 64)[1], kinds, 64, 2, 20)[side]
        np.testing.assert_array_equal(found, (k, v)[side][rows].astype(dtype).astype(np.float64))


@pytest.mark.parametrize("d", [20, 64, 80, 112, 128])
@pytest.mark.parametrize("kind", AXES)
def test_a_tile_takes_as_many_bytes_as_its_codes_and_pairs(kind: str, d: int) -> None:
    for tile in (32, 64, 128):
        width, heads = padded_width(d), 3
        sizes = []
        for form in formats((kind, kind)):
            group = next((g for g in (64, 48, 32) if width % g == 0), width)
            pairs = width if form.axis == "channel" else tile * width // group
            sizes.append(heads * (tile * width * form.bits // 8 + 4 * pairs))
        for page_tiles in (1, 3, 8):
            layout = layout_of((kind, kind), tile, heads, d, page_tiles)
            assert layout.nbytes == sum(sizes) and len(layout.empty_page()) == page_tiles * sum(sizes)


# --- Numbers that break quantizers ---------------------------------------------------------------------------------------


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 65504.0, -65504.0, 2.0**-24, 6e-5])
@pytest.mark.parametrize("d", [16, 20])
def test_a_constant_group_is_exact(kind: str, value: float, d: int) -> None:
    held = np.float32(np.float16(value))
    x = np.full((32, 1, d), held)
    for values in read_tile(one_tile(x, x, (kind, kind)), (kind, kind), 32, 1, d):
        np.testing.assert_array_equal(values, held)


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", AXES)
def test_a_group_of_zeros_among_others_is_exact(kind: str) -> None:
    rng = np.random.default_rng(4)
    k, v = normal(rng, 32, 2, 128), normal(rng, 32, 2, 128)
    for x in (k, v):
        x[:, 1, 7], x[5, 0, 64:] = 0, 0
    raw = one_tile(k, v, (kind, kind))
    check_tile(k, v, (kind, kind), raw)
    for values in read_tile(raw, (kind, kind), 32, 2, 128):
        assert not (values[:, 1, 7] if kind.endswith("c") else values[5, 0, 64:]).any()


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("outlier", [30_000.0, -60_000.0])
def test_one_huge_outlier_costs_its_own_group_only(kind: str, outlier: float) -> None:
    rng = np.random.default_rng(5)
    k, v = normal(rng, 64, 2, 128), normal(rng, 64, 2, 128)
    before = coded(one_tile(k, v, (kind, kind)), (kind, kind), 64, 2, 128)
    k[11, 1, 70], v[11, 1, 70] = outlier, outlier
    raw = one_tile(k, v, (kind, kind))
    check_tile(k, v, (kind, kind), raw)
    after = coded(raw, (kind, kind), 64, 2, 128)
    for was, now in zip(before, after, strict=True):
        for h in range(2):
            elsewhere = np.ones((64, 128), bool)
            if kind.endswith("c"):
                elsewhere[:, 70] = h != 1
            else:
                elsewhere[11, 64:] = h != 1  # the second group of this token in this head
            for a, b in zip(was[h], now[h], strict=True):
                np.testing.assert_array_equal(a[elsewhere], b[elsewhere])
            assert h != 1 or (was[h][1][~elsewhere] < 100 * now[h][1][~elsewhere]).all()


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-7, 1e-8, 1e-9, 1e-30, 1e-44, 1e6, 1e30, 1e37])
def test_scales_that_float16_has_none_or_only_coarse_ones_for(kind: str, size: float) -> None:
    rng = np.random.default_rng(6)
    x = (size * normal(rng, 32, 1, 16).astype(np.float64)).astype(np.float32)
    row = sealed(x, x, (kind, kind))
    check_row(x, x, row)
    half_step = 0.5 * 8 * size / (2 ** int(kind[1]) - 1)
    for values in row.read():
        assert np.isfinite(values).all() and np.abs(values - x).max() <= half_step + 2.0**-24 * (size == 1e-4) + 1e-43


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", AXES)
def test_a_scale_in_the_steps_of_subnormal_numbers_is_rounded_up(kind: str) -> None:
    """So that no value lies beyond the last code. Where all scales of a head are below 2^-18, they are float32."""
    largest = 2 ** int(kind[1]) - 1
    for steps, wide in ((64.25, False), (64.0, False), (63.9, True), (900.5, False), (1023.01, False), (1.0, True)):
        x = np.zeros((32, 2, 16), np.float32)
        x[::2, :, ::2] = np.float32(steps * SUBNORMAL) * np.float32(largest)
        row = sealed(x, x, (kind, kind))
        assert row.wide == (wide, wide)
        for side, head in np.ndindex(2, 2):
            codes, scales, _ = row.coded(side, head)
            want = np.float64(np.float32(steps * SUBNORMAL)) if wide else np.ceil(steps) * SUBNORMAL
            np.testing.assert_allclose(scales[::2, ::2], want, rtol=2.0**-22 if wide else 0)
            assert codes.max() == (largest if wide or steps == 64 else np.rint(largest * steps / np.ceil(steps)))


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("loud", [1e6, 1e-9, 1e30])
def test_one_head_of_one_side_that_needs_float32_is_enough(kind: str, loud: float) -> None:
    """All heads of that side and tile have it then; neither the other side nor another tile."""
    rng = np.random.default_rng(16)
    arrays = {"k": normal(rng, 96, 3, 20), "v": normal(rng, 96, 3, 20)}
    for name in arrays:
        k, v = (x.copy() for x in arrays.values())
        {"k": k, "v": v}[name][32:64, 1] *= np.float32(loud)
        segment = quantize_as((kind, kind), k, v, 32)
        rows = segment_rows(segment, (kind, kind), 32)
        for t, row in enumerate(rows):
            assert row.wide == (t == 1 and name == "k", t == 1 and name == "v")
            check_row(k[32 * t : 32 * t + 32], v[32 * t : 32 * t + 32], row)


@pytest.mark.parametrize("kind", [kind + "c" for kind in CODED])
@pytest.mark.parametrize("dead", [1, 4, 16, 33, 63])
def test_dead_tokens_widen_no_range_by_channel(kind: str, dead: int) -> None:
    """Neither of K nor of V, whatever they are."""
    rng = np.random.default_rng(7)
    k, v = normal(rng, 64, 2, 20), normal(rng, 64, 2, 20)
    tiles = []
    for loud in (1e30, 100.0):
        for x in (k, v):
            x[:dead] = loud * np.sign(x[:dead])
        raw = one_tile(k, v, (kind, kind), dead)
        check_tile(k, v, (kind, kind), raw, dead)
        tiles.append(coded(raw, (kind, kind), 64, 2, 20))
    for found, want in zip(*tiles, strict=True):
        for (codes, *pair), (other_codes, *other_pair) in zip(found, want, strict=True):
            np.testing.assert_array_equal(codes[dead:], other_codes[dead:])
            np.testing.assert_array_equal(pair, other_pair)
    unmarked = coded(one_tile(k, v, (kind, kind)), (kind, kind), 64, 2, 20)
    assert all((a[1] != b[1]).any() for a, b in zip(unmarked[1], tiles[1][1], strict=True)), "they would have widened"


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dead", [32, 40])
def test_a_tile_of_dead_rows_is_no_error(kind: str, dead: int) -> None:
    rng = np.random.default_rng(8)
    k, v = normal(rng, 32, 1, 16), normal(rng, 32, 1, 16)
    for values in read_tile(one_tile(k, v, (kind, kind), dead), (kind, kind), 32, 1, 16):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", [kind + "t" for kind in CODED])
def test_by_token_a_token_depends_on_itself_alone(kind: str) -> None:
    rng = np.random.default_rng(9)
    k, v = normal(rng, 32, 2, 80), normal(rng, 32, 2, 80)
    before = coded(one_tile(k, v, (kind, kind)), (kind, kind), 32, 2, 80)
    kept = rng.random(32) < 0.5
    for x in (k, v):
        x[~kept] = 100 * normal(rng, 32, 2, 80)[~kept]
    after = coded(one_tile(k, v, (kind, kind), dead=5), (kind, kind), 32, 2, 80)
    for was, now in zip(before[0] + before[1], after[0] + after[1], strict=True):
        for a, b in zip(was, now, strict=True):
            np.testing.assert_array_equal(a[kept], b[kept])
            assert (a[~kept] != b[~kept]).any()


@pytest.mark.parametrize("kind", [kind + "t" for kind in CODED])
@pytest.mark.parametrize("d", [17, 20, 100])
@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_padding_channels_do_not_widen_the_range_of_a_token(kind: str, d: int, offset: float) -> None:
    """Values around 50: a 0 among them would make the steps several times as wide."""
    rng = np.random.default_rng(11)
    k, v = (normal(rng, 32, 2, d) + np.float32(offset) for _ in "kv")
    raw = one_tile(k, v, (kind, kind))
    check_tile(k, v, (kind, kind), raw)
    for found in coded(raw, (kind, kind), 32, 2, d):
        for _, scales, _ in found:
            assert scales.max() < 10 / (2 ** int(kind[1]) - 1)


def in_one_group(kind: str, part: str, numbers: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """In a channel and in a token alike: a token of one number but for one channel, and another token beside it."""
    rng = np.random.default_rng(10)
    arrays = {"k": normal(rng, 40, 2, 16), "v": normal(rng, 40, 2, 16)}
    arrays[part][34, 1] = numbers[0]
    arrays[part][34, 1, 5] = numbers[1]
    if kind.endswith("c"):
        arrays[part][35, 1] = numbers[1]
    if numbers[0] == numbers[1]:
        arrays[part][:] = numbers[0]
    return arrays["k"], arrays["v"]


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("numbers", [(70_000.0, 70_000.0), (-70_000.0, 0.0), (-2e7, 2e7), (3e38, 0.0), (-1e38, 1e38)])
def test_what_float16_cannot_hold_float32_does(kind: str, part: str, numbers: tuple[float, float]) -> None:
    k, v = in_one_group(kind, part, numbers)
    rows = np.minimum(np.arange(64), 39)
    segment = quantize_as((kind, kind), k, v)
    row = segment_rows(segment, (kind, kind), 64)[0]
    assert row.wide == (part == "k", part == "v")
    check_row(k[rows], v[rows], row)
    with pytest.raises(OverflowError):
        one_tile(k[rows], v[rows], (kind, kind))


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize(
    "numbers", [(3e38, -3e38), (np.nan, 1), (1, np.nan), (np.inf, 1), (1, -np.inf), (np.nan, np.nan)]
)
def test_a_range_that_is_no_finite_number_is_an_error(kind: str, part: str, numbers: tuple[float, float]) -> None:
    k, v = in_one_group(kind, part, numbers)
    with pytest.raises(OverflowError, match="beyond its type, or not a number"):
        quantize_as((kind, kind), k, v)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"k_bits": 5}, r"^k_bits must be one of \(8, 4, 3, 2, 16, 32\), found 5"),
        ({"v_bits": 1}, "^v_bits .*found 1"),
        ({"v_bits": None}, "^v_bits .*None"),
        ({"tile": 48}, r"^tile must be one of \(32, 64, 128\), found 48"),
        ({"k": np.zeros((3, 16), np.float32)}, r"^k must be an array \(N, Hkv, D\), found \(3, 16\)"),
        ({"v": np.zeros((3, 1, 16), np.float64)}, "^v .*float64"),
        ({"v": np.zeros((3, 2, 16), np.float32)}, r"^k and v .*\(3, 1, 16\) and \(3, 2, 16\)"),
        ({"k_axis": "row"}, r"^k_axis must be one of \('channel', 'token'\), found 'row'"),
        ({"v_axis": None}, "^v_axis .*None"),
        ({"v_group": 15}, "^v_group by token must be one of 16 at head_dim 16, found 15"),
        ({"v_group": 32}, "^v_group by token must be one of 16 .*found 32"),
        ({"v_group": -16}, "^v_group by token .*found -16"),
        ({"k_axis": "token", "k_group": 8}, "^k_group by token .*found 8"),
        ({"k_group": 16}, r"^k_group by channel is the tile \(64\) or 0, found 16"),
    ],
)
def test_quantize_refuses_what_does_not_fit(bad: dict[str, object], message: str) -> None:
    x = np.zeros((3, 1, 16), np.float32)
    with pytest.raises(ValueError, match=message):
        quantize(**{"k": x, "v": x, **bad})


def test_heads_wider_than_sums_can_hold_are_refused() -> None:
    """256 channels of 8 bits are what an exact sum in 32 bits allows."""
    x = np.zeros((3, 1, 257), np.float32)
    with pytest.raises(ValueError, match="head_dim must be at most 256 for codes, found 257"):
        quantize(x, x)
    x = normal(np.random.default_rng(12), 40, 1, 256)
    kinds = ("q8", "q8t256")
    check_tile(x[:32], x[:32], kinds, segment_tiles(quantize_as(kinds, x[:32], x[:32], 32), kinds, 32)[0])
