"""``flash_attention`` against float64, option by option and in combination."""

import math

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
    check,
    dense,
    expected,
    make_keys,
    make_store,
    normal,
    quantize_as,
    read_segment,
    read_store,
)

HEAD_DIMS = (16, 20, 40, 64, 80, 96, 112, 128, 256)
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 200, 511, 512, 513, 700, 1100, 1500)
WORK = 4_000_000  # products of one generated case: the float64 reference does about a thousand million a second


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
@pytest.mark.parametrize("kinds", [("q4", "q8"), ("q8", "q4"), ("q4", "q4"), ("q3", "q2"), ("q2t", "q3c")])
def test_bits_and_tiles_of_quantized_keys(kinds: tuple[str, str], tile: int) -> None:
    rng = np.random.default_rng(tile)
    for n, d in ((1, 16), (tile - 1, 80), (5 * tile + 3, 64), (700, 20)):
        k, v = normal(rng, n, 2, d), normal(rng, n, 2, d)
        segment = quantize_as(kinds, k, v, tile)
        stored = read_segment(segment, kinds, tile)
        assert len(segment.owner) == -(-n // 512)
        check(normal(rng, 3, 4, d), (segment,), stored, kinds[0], causal=True)


@pytest.mark.parametrize("page_tiles", [1, 3, 8])
@pytest.mark.parametrize("k_kind", KINDS)
@pytest.mark.parametrize("v_kind", KINDS)
def test_tiles_of_any_two_formats_at_absolute_positions(k_kind: str, v_kind: str, page_tiles: int) -> None:
    """As the cache keeps them: the first tiles are gone, positions stay absolute, ranges cut tiles."""
    rng = np.random.default_rng(7)
    k, v = normal(rng, 768, 2, 40), normal(rng, 768, 2, 40)
    store = make_store(k, v, (k_kind, v_kind), tile=64, page_tiles=page_tiles)
    stored = read_store(store, (k_kind, v_kind))
    store.forget_before(3)
    q = normal(rng, 6, 4, 40)
    start, stop = np.array([0, 195, 200, 450, 511, 760]), np.array([760, 196, 400, 600, 900, 500])
    segment = store.segment(195, 760)
    state, out = empty_state(4, 6), np.full_like(q, np.nan)
    flash_attention(q, segment, start=start, stop=stop, max_bias=8.0, state=state, out=out)
    low, high = np.maximum(start, 195), np.minimum(stop, 760)
    want = expected(q, *stored, start=low, stop=high, max_bias=8.0, positions=np.arange(754, 760))
    coded = [kind for kind in (k_kind, v_kind) if kind not in DTYPES]
    assert_attention(out, state, want, v, "codes" if coded else k_kind)


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


def test_a_mask_multiplied_by_the_slope() -> None:
    """Some operators do that: it is this project's ALiBi bias wherever the mask is the distance."""
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


@pytest.mark.fault("empty-segments")
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


@pytest.mark.fault("empty-segments")
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
