"""``flash_attention`` against float64, option by option and in combination."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import empty_state, flash_attention, quantize
from mixkv.kernels.reference import reference_attention

from .oracle import (
    DTYPES,
    KINDS,
    TOLERANCE,
    alibi_slopes,
    assert_attention,
    expected,
    make_store,
    normal,
    read_segment,
    read_tiles,
)

HEAD_DIMS = (16, 20, 40, 64, 80, 96, 112, 128, 256)
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 200, 511, 512, 513, 700, 1100, 1500)
WORK = 4_000_000  # products of one generated case: the float64 reference does about a thousand million a second


def check(q: np.ndarray, keys: tuple, stored: tuple, kind: str, **options: object) -> None:
    """``flash_attention`` over ``keys`` against the reference over the numbers that are ``stored``."""
    state, out = empty_state(q.shape[1], q.shape[0]), np.full_like(q, np.nan)
    flash_attention(q, *keys, state=state, out=out, **options)
    softcap = float(options.get("softcap", 0.0))
    assert_attention(out, state, expected(q, *stored, **options), stored[1], kind, softcap)


def dense(rng: np.random.Generator, n: int, heads: int, d: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return normal(rng, n, heads, d).astype(DTYPES[kind]), normal(rng, n, heads, d).astype(DTYPES[kind])


def make_keys(rng: np.random.Generator, n: int, heads: int, d: int, kind: str, tile: int = 64) -> tuple[tuple, tuple]:
    """(what the kernel gets, what it must make of it)."""
    if kind in DTYPES:
        pair = dense(rng, n, heads, d, kind)
        return pair, tuple(x.astype(np.float64) for x in pair)
    bits = int(kind[1:])
    segment = quantize(normal(rng, n, heads, d), normal(rng, n, heads, d), k_bits=bits, v_bits=bits, tile=tile)
    return (segment,), read_segment(segment, (bits, bits), tile)


# --- The yardstick itself ------------------------------------------------------------------------------------------------


def test_the_reference_is_the_textbook_loop() -> None:
    rng = np.random.default_rng(0)
    t, h, n, kv_heads, d = 3, 4, 7, 2, 5
    q, k, v = rng.normal(size=(t, h, d)), rng.normal(size=(n, kv_heads, d)), rng.normal(size=(n, kv_heads, d))
    mask, sinks = rng.normal(size=(h, t, n)), rng.normal(size=h)
    start, stop, where = np.array([0, 2, 6]), np.array([7, 5, 6]), np.array([4, 9, 2])
    o, M, S = reference_attention(
        q, k, v, scale=0.7, start=start, stop=stop, mask=mask, softcap=2.0, slopes=np.array([0.5, 0.25, 0.1, 1.0]),
        positions=where, sink_logits=sinks,
    )  # fmt: skip
    for i in range(t):
        for j in range(h):
            logits = []
            for key in range(start[i], stop[i]):
                product = 0.7 * sum(q[i, j, c] * k[key, j // 2, c] for c in range(d))
                capped = 2.0 * math.tanh(product / 2.0)
                logits.append(capped + (0.5, 0.25, 0.1, 1.0)[j] * (key - where[i]) + mask[j, i, key])
            top = max([*logits, sinks[j]])
            weights = [math.exp(x - top) for x in logits]
            total = sum(weights) + math.exp(sinks[j] - top)
            want = [sum(w * v[start[i] + a, j // 2, c] for a, w in enumerate(weights)) / total for c in range(d)]
            np.testing.assert_allclose(o[i, j], want, atol=1e-14)
            np.testing.assert_allclose((M[j, i], S[j, i]), (top, total), rtol=1e-14)


# --- Shapes and formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_at_every_head_dim(kind: str, d: int) -> None:
    rng = np.random.default_rng(d)
    for t, n in ((1, 600), (5, 77)):
        check(normal(rng, t, 4, d), *make_keys(rng, n, 2, d, kind), kind, causal=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_every_format_at_every_length(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    keys, stored = make_keys(rng, n, 1, 32, kind)
    for t in (1, 3, 17):
        check(normal(rng, t, 2, 32), keys, stored, kind, causal=True)


@pytest.mark.parametrize("n_rep", range(1, 17))
def test_any_number_of_query_heads_a_KV_head(n_rep: int) -> None:
    rng = np.random.default_rng(n_rep)
    for t, n in ((1, 530), (2, 40), (13, 100)):
        check(normal(rng, t, 2 * n_rep, 16), *make_keys(rng, n, 2, 16, "f16"), "f16", causal=True)


@pytest.mark.parametrize("kind", ["f32", "q4"])
def test_a_prompt_of_three_hundred_tokens(kind: str) -> None:
    rng = np.random.default_rng(1)
    keys, stored = make_keys(rng, 1300, 1, 64, kind)
    check(normal(rng, 300, 2, 64), keys, stored, kind, causal=True)


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("bits", [(4, 8), (8, 4), (4, 4)])
def test_bits_and_tiles_of_quantized_keys(bits: tuple[int, int], tile: int) -> None:
    rng = np.random.default_rng(tile)
    for n, d in ((1, 16), (tile - 1, 80), (5 * tile + 3, 64), (700, 20)):
        k, v = normal(rng, n, 2, d), normal(rng, n, 2, d)
        segment = quantize(k, v, k_bits=bits[0], v_bits=bits[1], tile=tile)
        stored = read_segment(segment, bits, tile)
        assert len(segment.owner) == -(-n // tile)
        check(normal(rng, 3, 4, d), (segment,), stored, f"q{min(bits)}", causal=True)


@pytest.mark.parametrize("k_kind", KINDS)
@pytest.mark.parametrize("v_kind", KINDS)
def test_tiles_of_any_two_formats_at_absolute_positions(k_kind: str, v_kind: str) -> None:
    """As the cache keeps them: the first tiles are gone, positions stay absolute, ranges cut tiles."""
    rng = np.random.default_rng(7)
    k, v = normal(rng, 768, 2, 40), normal(rng, 768, 2, 40)
    store = make_store(k, v, (k_kind, v_kind), tile=64)
    stored = read_tiles([store[i] for i in range(12)], (k_kind, v_kind), 64, 2, 40)
    store.forget_before(3)
    q = normal(rng, 6, 4, 40)
    start, stop = np.array([0, 195, 200, 450, 511, 760]), np.array([760, 196, 400, 600, 900, 500])
    segment = store.segment(195, 760)
    state, out = empty_state(4, 6), np.full_like(q, np.nan)
    flash_attention(q, segment, start=start, stop=stop, max_bias=8.0, state=state, out=out)
    low, high = np.maximum(start, 195), np.minimum(stop, 760)
    want = expected(q, *stored, start=low, stop=high, max_bias=8.0, positions=np.arange(754, 760))
    assert_attention(out, state, want, v, k_kind)


# --- Options, one by one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20])
@pytest.mark.parametrize("max_bias", [8.0, 5.5])
def test_alibi_slopes_of_any_number_of_heads(n_heads: int, max_bias: float) -> None:
    """One key of logit 0 at distance -d: M is then slope * -d itself."""
    q, k = np.zeros((1, n_heads, 16), np.float32), np.ones((1, 1, 16), np.float32)
    state = empty_state(n_heads, 1)
    flash_attention(q, k, k, max_bias=max_bias, positions=1000, k_position=900, state=state)
    np.testing.assert_allclose(state[:, 0, 0], -100 * np.array(alibi_slopes(n_heads, max_bias)), rtol=3e-7)


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]


def test_the_origin_multiplies_its_mask_by_the_slope() -> None:
    """That is this project's ALiBi bias wherever the mask is the distance."""
    rng = np.random.default_rng(8)
    t, n, h = 5, 90, 6
    q, (k, v) = normal(rng, t, h, 64), dense(rng, n, 2, 64, "f32")
    distance = np.arange(n) - (np.arange(t) + n - t)[:, None]
    mask = np.where(distance <= 0, distance, -np.inf)
    scaled = (np.array(alibi_slopes(h))[:, None, None] * mask).astype(np.float32)
    by_mask = flash_attention(q, k, v, mask=scaled)
    np.testing.assert_allclose(flash_attention(q, k, v, max_bias=8.0, causal=True), by_mask, rtol=0, atol=4e-6)


def test_keys_cut_into_segments_keep_their_positions() -> None:
    rng = np.random.default_rng(9)
    t, n, h = 30, 610, 4
    q, (k, v) = normal(rng, t, h, 64), dense(rng, n, 2, 64, "f16")
    positions = np.arange(n - t, n)
    options = {"causal": True, "max_bias": 8.0}
    want = expected(q, k, v, **options)
    for cuts in ((0, 590, n), (0, 1, 300, 585, 600, n), (0, 605, 606, n)):
        out, state = np.empty_like(q), empty_state(h, t)
        for a, b in zip(cuts, cuts[1:], strict=False):
            flash_attention(q, k[a:b], v[a:b], k_position=a, positions=positions, state=state, out=out, **options)
        assert_attention(out, state, want, v, "f16")
    shifted = {"k_position": 100_000, **options}
    np.testing.assert_array_equal(flash_attention(q, k, v, **shifted), flash_attention(q, k, v, **options))
    segment = quantize(k.astype(np.float32), v.astype(np.float32))
    np.testing.assert_array_equal(flash_attention(q, segment, **shifted), flash_attention(q, segment, **options))


def test_positions_of_the_queries_in_any_order() -> None:
    rng = np.random.default_rng(10)
    q, keys = normal(rng, 5, 4, 16), dense(rng, 100, 2, 16, "f32")
    for positions in ([99, 0, 50, 50, -3], np.array([7, 8, 9, 250, 2], np.uint8), 31):
        check(q, keys, keys, "f32", causal=True, max_bias=8.0, positions=positions)


def test_a_softcap_bends_the_scaled_logit_before_bias_and_mask() -> None:
    rng = np.random.default_rng(11)
    q, keys = normal(rng, 3, 4, 32), dense(rng, 70, 2, 32, "f32")
    for cap in (0.5, 5.0, 30.0, 50.0):
        check(q, keys, keys, "f32", softcap=cap)
        check(4 * q, keys, keys, "f32", softcap=cap, scale=1.0, max_bias=8.0, mask=normal(rng, 3, 70))
    check(1e4 * q, keys, keys, "f32", softcap=20.0)  # saturated on both sides


@pytest.mark.parametrize("shape", [(5, 37), (4, 5, 37)])
def test_a_mask_is_added_unscaled_and_minus_infinity_hides(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(12)
    q, (k, v) = normal(rng, 5, 4, 16), dense(rng, 37, 2, 16, "f32")
    mask = normal(rng, *shape)
    mask[rng.random(shape) < 0.4] = -np.inf
    check(q, (k, v), (k, v), "f32", mask=mask)
    check(q, (k, v), (k, v), "f32", mask=np.asfortranarray(mask), scale=0.1, causal=True)
    mask[..., 9] = -np.inf
    k[9], v[9] = 1e15, 3e38  # nothing of a hidden key shows, however large
    found = flash_attention(q, k, v, mask=mask)
    k[9], v[9] = 0, 0
    np.testing.assert_array_equal(found, flash_attention(q, k, v, mask=mask))


def test_scales_of_any_sign_and_zero() -> None:
    rng = np.random.default_rng(13)
    q, keys = normal(rng, 3, 4, 16), dense(rng, 37, 2, 16, "f32")
    for scale in (1.0, -0.3, 0, np.float32(0.125)):
        check(q, keys, keys, "f32", scale=scale)
    np.testing.assert_allclose(flash_attention(q, *keys, scale=0.0)[0, 0], keys[1][:, 0].mean(axis=0), atol=1e-6)


def test_sink_logits_are_counted_once() -> None:
    rng = np.random.default_rng(14)
    q, keys = normal(rng, 3, 4, 20), dense(rng, 600, 2, 20, "f32")
    sinks = np.array([0.3, -np.inf, 20.0, -50.0], np.float32)
    check(q, keys, keys, "f32", sink_logits=sinks)
    check(q, keys, keys, "f32", sink_logits=sinks, stop=[600, 0, 1])


def test_precision_f32_is_float32() -> None:
    rng = np.random.default_rng(15)
    q, keys = normal(rng, 3, 4, 16), dense(rng, 37, 2, 16, "f32")
    found = flash_attention(q, *keys, precision="f32")
    np.testing.assert_allclose(found, expected(q, *keys)[0], rtol=0, atol=4 * TOLERANCE["out", "f32"])


def test_no_queries_no_keys() -> None:
    rng = np.random.default_rng(16)
    q, (k, v) = normal(rng, 2, 4, 20), dense(rng, 9, 2, 20, "f32")
    assert flash_attention(q[:0], k, v).shape == (0, 4, 20)
    for empty in ((k[:0], v[:0]), (quantize(k[:0], v[:0]),)):
        np.testing.assert_array_equal(flash_attention(q, *empty), np.zeros_like(q))
    single = flash_attention(q, k[:1], v[:1])
    np.testing.assert_array_equal(single, np.broadcast_to(np.repeat(v[:1], 2, axis=1), q.shape))
    np.testing.assert_array_equal(flash_attention(q, k, v, mask=np.full((2, 9), -np.inf, np.float32)), 0)


# --- Options in combination ----------------------------------------------------------------------------------------------


@st.composite
def combinations(draw: st.DrawFn) -> tuple[np.ndarray, tuple, tuple, str, dict[str, object]]:
    kind, d = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(HEAD_DIMS))
    kv_heads, n_rep = draw(st.integers(1, 2)), draw(st.integers(1, 8))
    n = draw(st.sampled_from(LENGTHS) | st.integers(0, 130))
    h = kv_heads * n_rep
    longest = max(1, min(300, WORK // (max(n, 1) * h * d)))
    t = draw(st.integers(1, min(longest, 9)) | st.integers(1, longest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keys, stored = make_keys(rng, n, kv_heads, d, kind, draw(st.sampled_from((32, 64, 128))))
    options: dict[str, object] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["k_position"] = draw(st.integers(0, 5000))
        options["positions"] = options["k_position"] + rng.integers(-5, n + 5, t)
    ranges = draw(st.sampled_from(("all", "window", "any")))
    if ranges == "window":  # of the last tokens, as a sliding-window layer sees them
        last = np.arange(n - t, n)
        options["start"], options["stop"] = last + 1 - draw(st.sampled_from((1, 16, 100))), last + 1
    elif ranges == "any":
        options["start"], options["stop"] = rng.integers(-2, n + 3, t), rng.integers(-2, n + 3, t)
    if draw(st.booleans()):
        mask = normal(rng, *draw(st.sampled_from(((t, n), (h, t, n)))))
        mask[rng.random(mask.shape) < draw(st.sampled_from((0.0, 0.5)))] = -np.inf
        options["mask"] = mask
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((2.0, 50.0)))
    if draw(st.booleans()):
        options["max_bias"] = 8.0
    if draw(st.booleans()):
        options["sink_logits"] = normal(rng, h)
    if draw(st.booleans()):
        options["scale"] = d**-0.5 * draw(st.sampled_from((-1.0, 0.5, 1.5)))
    return normal(rng, t, h, d), keys, stored, kind, options


@settings(max_examples=500, deadline=None)
@given(combinations())
def test_all_options_in_combination(case: tuple) -> None:
    q, keys, stored, kind, options = case
    check(q, keys, stored, kind, **options)


# --- Adversarial numbers -------------------------------------------------------------------------------------------------


def whole_numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small integers, whose products float32 holds exactly: logits can then be huge and yet have no rounding error."""
    return rng.integers(-60, 61, shape).astype(np.float32)


def test_logits_of_plus_and_minus_ten_thousand() -> None:
    rng = np.random.default_rng(20)
    q, k, v = whole_numbers(rng, 6, 4, 16), whole_numbers(rng, 600, 2, 16), normal(rng, 600, 2, 16)
    o, M, S = expected(q, k, v, scale=1.0)
    assert M.max() > 1e4
    state, out = empty_state(4, 6), np.empty_like(q)
    flash_attention(q, k, v, scale=1.0, state=state, out=out)
    np.testing.assert_allclose(out, o, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(state[..., 0], M)
    np.testing.assert_allclose(state[..., 1], S, rtol=1e-6)


def test_ties_share_alike() -> None:
    rng = np.random.default_rng(21)
    q, v = whole_numbers(rng, 3, 4, 16), normal(rng, 600, 2, 16)
    k = np.repeat(whole_numbers(rng, 1, 2, 16), 600, axis=0)
    state = empty_state(4, 3)
    found = flash_attention(q, k, v, scale=1.0, state=state)
    mean = np.repeat(v.astype(np.float64).mean(axis=0), 2, axis=0)
    np.testing.assert_allclose(found, np.broadcast_to(mean, found.shape), atol=1e-6)
    np.testing.assert_array_equal(state[..., 1], 600)


@pytest.mark.parametrize("at", [0, 15, 300, 511, 512, 599])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_one_huge_outlier(at: int, size: float) -> None:
    rng = np.random.default_rng(22)
    q, k, v = np.abs(normal(rng, 2, 2, 16)) + 1, normal(rng, 600, 1, 16), normal(rng, 600, 1, 16)
    k[at] = size
    found = flash_attention(q, k, v)
    if size > 0:
        np.testing.assert_array_equal(found, np.broadcast_to(v[at], found.shape))
    else:
        np.testing.assert_allclose(found, expected(q, k, v)[0], atol=4e-6)


def test_keys_of_minus_infinity_are_hidden_and_of_plus_infinity_are_not_a_number() -> None:
    rng = np.random.default_rng(23)
    q, k, v = np.abs(normal(rng, 2, 2, 16)), normal(rng, 90, 1, 16), normal(rng, 90, 1, 16)
    visible = np.delete(np.arange(90), [3, 64])
    k[[3, 64]] = -np.inf
    np.testing.assert_allclose(flash_attention(q, k, v), expected(q, k[visible], v[visible])[0], atol=4e-6)
    state = empty_state(2, 2)
    np.testing.assert_array_equal(flash_attention(q, np.full_like(k, -np.inf), v, state=state), 0)
    np.testing.assert_array_equal(state, empty_state(2, 2))
    k[3] = np.inf
    assert np.isnan(flash_attention(q, k, v)).all()


BAD = 37  # the token whose key or value is not a number
RANGES = [(0, 100), (37, 38), (0, 37), (38, 100), (36, 39), (32, 37), (38, 48), (20, 37), (38, 39), (0, 0), (30, 45)]


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "tiles of f16", "tiles of f32"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_a_number_shows_inside_a_range_and_nowhere_else(part: str, kind: str, number: float) -> None:
    rng = np.random.default_rng(24)
    name = kind.split()[-1]
    q = np.abs(normal(rng, len(RANGES), 4, 20))
    k, v = (x.astype(DTYPES[name]) for x in (normal(rng, 128, 2, 20), normal(rng, 128, 2, 20)))
    start, stop = (np.array(x) for x in zip(*RANGES, strict=True))
    clean = flash_attention(q, k, v, start=start, stop=stop)
    {"k": k, "v": v}[part][BAD] = number
    keys = (k, v)
    if kind.startswith("tiles"):
        keys = (make_store(k.astype(np.float32), v.astype(np.float32), (name, name)).segment(0, 100),)
    found = flash_attention(q, *keys, start=start, stop=stop)
    inside = (start <= BAD) & (stop > BAD)
    assert not np.isfinite(found[inside]).any()
    assert np.isnan(found[inside]).all() or (part, number) == ("v", np.inf)
    np.testing.assert_array_equal(found[~inside], clean[~inside])
    alone = [flash_attention(q[i : i + 1], *keys, start=start[i], stop=stop[i])[0] for i in range(len(q))]
    np.testing.assert_array_equal(found, np.stack(alone))


def test_what_is_not_a_number_is_not_swallowed_by_mask_softcap_or_state() -> None:
    """A key inside the range takes part, even where a mask of -inf would hide its number."""
    rng = np.random.default_rng(25)
    q, k, v = normal(rng, 2, 2, 16), normal(rng, 600, 1, 16), normal(rng, 600, 1, 16)
    mask = np.zeros((2, 600), np.float32)
    mask[:, 550] = -np.inf
    state, out = empty_state(2, 2), np.empty_like(q)
    flash_attention(q, k, v, state=state, out=out)
    for spoiled in (k, v):
        clean = spoiled[550].copy()
        spoiled[550] = np.nan
        for options in (
            {},
            {"mask": mask},
            {"softcap": 5.0},
            {"max_bias": 8.0},
            {"state": state.copy(), "out": out.copy()},
        ):
            assert np.isnan(flash_attention(q, k, v, **options)).all()
        spoiled[550] = clean
    mask[0, 3] = np.nan
    found = flash_attention(q, k, v, mask=mask)
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
    assert np.isnan(flash_attention(np.full_like(q, np.nan), k, v)).all()


def test_a_dead_token_of_a_coded_tile_never_shows() -> None:
    """Its scale and minimum may be anything."""
    rng = np.random.default_rng(26)
    q, (segment,) = normal(rng, 5, 2, 16), make_keys(rng, 64, 1, 16, "q4")[0]
    (raw,) = segment.owner
    start = np.array([0, 4, 4, 20, 4])
    clean = flash_attention(q, segment, start=start)
    raw[-2 * 64 :].view(np.float16)[[0, 1, 2, 3]] = (
        np.nan
    )  # V has one group of 16 channels: the minima stand at the end
    found = flash_attention(q, segment, start=start)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], clean[1:])


# --- Memory layouts ------------------------------------------------------------------------------------------------------


def unaligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at an odd address."""
    room = np.zeros(x.nbytes + 1, np.uint8)
    view = room[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS = {
    "heads before tokens": lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1),
    "Fortran order": np.asfortranarray,
    "every second head": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every second token": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second channel": lambda x: np.repeat(x, 2, axis=2)[..., ::2],
    "part of wider rows": lambda x: np.pad(x, ((3, 1), (1, 2), (5, 9)))[3:-1, 1:-2, 5:-9],
    "tokens backwards": lambda x: x[::-1].copy()[::-1],
    "heads backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "channels backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "unaligned": unaligned,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("d", [16, 20])
def test_strided_arrays_give_the_same_bits(layout: str, kind: str, d: int) -> None:
    rng = np.random.default_rng(30)
    change = LAYOUTS[layout]
    q, (k, v), mask = normal(rng, 4, 6, d), dense(rng, 101, 3, d, kind), normal(rng, 6, 4, 101)
    want = flash_attention(q, k, v, mask=mask)
    for changed in ((q, change(k), v), (q, k, change(v)), (change(q), change(k), change(v))):
        np.testing.assert_array_equal(changed[0], q)
        np.testing.assert_array_equal(changed[1], k)
        np.testing.assert_array_equal(flash_attention(*changed, mask=change(mask)), want)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("d", [16, 20])
def test_broadcast_arrays_give_the_same_bits(kind: str, d: int) -> None:
    rng = np.random.default_rng(31)
    q, (k, v) = normal(rng, 4, 6, d), dense(rng, 70, 3, d, kind)
    for pick in (
        lambda x: x[5][None],  # one token, whose stride NumPy says is 0
        lambda x: np.broadcast_to(x[5], (50, 3, d)),
        lambda x: np.broadcast_to(x[:, :1], (70, 3, d)),
        lambda x: x[:0],
    ):
        want = flash_attention(q, np.array(pick(k)), np.array(pick(v)))
        np.testing.assert_array_equal(flash_attention(q, pick(k), pick(v)), want)


def test_k_and_v_may_differ_in_type_and_layout() -> None:
    rng = np.random.default_rng(32)
    q, k, v = (
        normal(rng, 2, 4, 16),
        normal(rng, 70, 2, 16),
        np.asfortranarray(normal(rng, 70, 2, 16).astype(np.float16)),
    )
    check(q, (k, v), (k, v), "f16")
    check(q, (v, k), (v, k), "f16")


@pytest.mark.parametrize("d", [16, 20])
def test_out_may_lie_on_an_input(d: int) -> None:
    rng = np.random.default_rng(33)
    q, k, v = (normal(rng, 8, 4, d) for _ in range(3))
    want = flash_attention(q, k, v)
    for i in range(3):
        arrays = [x.copy() for x in (q, k, v)]
        np.testing.assert_array_equal(flash_attention(*arrays, out=arrays[i]), want)
        np.testing.assert_array_equal(arrays[i], want)


def test_a_read_only_or_unaligned_q_compiles_nothing() -> None:
    from mixkv.kernels.attention import attend_blocks, attend_splits
    from mixkv.kernels.state import _merge

    rng = np.random.default_rng(34)
    q, k, v = normal(rng, 2, 4, 16), normal(rng, 600, 2, 16), normal(rng, 600, 2, 16)
    state = empty_state(4, 2)
    out = flash_attention(q, k, v, state=state)
    before = [len(kernel.signatures) for kernel in (attend_blocks, attend_splits, _merge)]
    for change in (LAYOUTS["read-only"], unaligned):
        flash_attention(change(q), k, v)
        flash_attention(change(q), k[:9], v[:9], start=np.broadcast_to(np.int64(1), (2,)))
    after = [len(kernel.signatures) for kernel in (attend_blocks, attend_splits, _merge)]
    assert after == before
    assert np.isfinite(out).all()


# --- Refusals ------------------------------------------------------------------------------------------------------------

ARRAY = np.zeros((7, 2, 16), np.float32)
SEGMENT = quantize(ARRAY, ARRAY)
REFUSED = [
    ({"q": np.zeros((3, 4, 16))}, r"^q must be a float32 array \(T, H, D\).*float64 \(3, 4, 16\)"),
    ({"q": np.zeros((3, 16), np.float32)}, r"^q .*\(3, 16\)"),
    ({"q": [[[0.0]]]}, "^q .*list"),
    ({"q": np.zeros((3, 4, 0), np.float32)}, r"^q .*\(3, 4, 0\)"),
    ({"q": np.zeros((3, 4, 32), np.float32)}, "^q and k .*head_dim, found 32 and 16"),
    ({"q": np.zeros((3, 3, 16), np.float32)}, "the 3 query heads must be a multiple of the 2 KV heads"),
    ({"q": np.zeros((3, 0, 16), np.float32)}, "the 0 query heads"),
    ({"k": None}, "^k must be an array.*NoneType"),
    ({"k": ARRAY.astype(np.float64)}, "^k must be float32, float16 or bfloat16, found float64"),
    ({"k": ARRAY.astype(np.int8)}, "^k must be .*int8"),
    ({"k": ARRAY.astype(">f4")}, "^k must be .*>f4"),
    ({"k": ARRAY[0]}, r"^k must be an array \(N, Hkv, D\), found \(2, 16\)"),
    ({"v": ARRAY.astype(ml_dtypes.float8_e4m3fn)}, "^v must be .*float8"),
    ({"v": None}, "^v must be .*NoneType"),
    ({"v": ARRAY[:6]}, r"^k and v .*\(7, 2, 16\) and \(6, 2, 16\)"),
    ({"k": ARRAY[:, :0], "v": ARRAY[:, :0]}, "the 0 KV heads"),
    ({"k": SEGMENT}, "^v must be None"),
    ({"k": SEGMENT, "v": None, "mask": np.zeros((3, 6), np.float32)}, r"^mask .*\(3, 7\).*\(4, 3, 7\).*\(3, 6\)"),
    ({"scale": math.nan}, "^scale must be a finite number.*nan"),
    ({"scale": math.inf}, "^scale .*inf"),
    ({"scale": 1e39}, r"^scale .*1e\+39"),
    ({"scale": "1"}, "^scale .*found 1"),
    ({"softcap": -1}, "^softcap .* 0 or more, found -1"),
    ({"softcap": math.nan}, "^softcap .*nan"),
    ({"softcap": 1e39}, "^softcap"),
    ({"softcap": None}, "^softcap .*None"),
    ({"max_bias": -0.5}, "^max_bias .*-0.5"),
    ({"max_bias": math.inf}, "^max_bias .*inf"),
    ({"max_bias": [8]}, r"^max_bias .*\[8\]"),
    ({"mask": np.zeros((3, 7))}, r"^mask must be float32 .*\(3, 7\).*float64"),
    ({"mask": np.zeros((7, 3), np.float32)}, r"^mask .*found float32 \(7, 3\)"),
    ({"mask": np.zeros((2, 3, 7), np.float32)}, r"^mask .*\(2, 3, 7\)"),
    ({"mask": 0.0}, "^mask .*float"),
    ({"start": [0, 1]}, r"^start must be integers of shape \(3,\).*\(2,\)"),
    ({"start": 0.5}, "^start .*float64"),
    ({"start": True}, "^start .*bool"),
    ({"stop": [[1, 2, 3]]}, r"^stop .*\(1, 3\)"),
    ({"stop": [1, 2, None]}, "^stop .*object"),
    ({"stop": 2**64 - 1}, "^stop must fit into int64, found 18446744073709551615"),
    ({"positions": [0.0, 1.0, 2.0]}, "^positions .*float64"),
    ({"positions": np.zeros(4, np.int64)}, r"^positions .*\(4,\)"),
    ({"k_position": 1.5}, "^k_position .*float64"),
    ({"k_position": None}, "^k_position .*object"),
    ({"k_position": [0, 1]}, r"^k_position .*\(2,\)"),
    ({"sink_logits": np.zeros(4)}, r"^sink_logits .*\(4,\).*float64"),
    ({"sink_logits": np.zeros((4, 1), np.float32)}, r"^sink_logits .*\(4, 1\)"),
    ({"sink_logits": 0.0}, "^sink_logits .*float"),
    ({"sink_logits": np.array([0, 0, 0, np.nan], np.float32)}, "^sink_logits must be numbers or -inf"),
    ({"sink_logits": np.array([0, 0, np.inf, 0], np.float32)}, "^sink_logits must be numbers or -inf"),
    ({"precision": "f64"}, "^precision .*'default', 'f32'.*'f64'"),
    ({"precision": None}, "^precision .*None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message"), REFUSED, ids=[f"{'+'.join(bad)}-{i}" for i, (bad, _) in enumerate(REFUSED)]
)
def test_an_argument_that_does_not_fit_is_refused_before_any_write(bad: dict[str, object], message: str) -> None:
    state, out = empty_state(4, 3), np.full((3, 4, 16), 7, np.float32)
    before = state.tobytes(), out.tobytes()
    arguments = {"q": np.ones((3, 4, 16), np.float32), "k": ARRAY, "v": ARRAY, "state": state, "out": out, **bad}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)
    assert (state.tobytes(), out.tobytes()) == before
