"""``flash_attention`` of numbers that break attention: huge logits, ties, outliers, infinities and what is not a number."""

import numpy as np
import pytest

from mixkv.kernels import empty_state, flash_attention

from .oracle import DTYPES, expected, make_keys, make_store, normal, part_offsets


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


@pytest.mark.parametrize("precision", ["default", "f32"])
@pytest.mark.parametrize("kind", ["q8t", "q4t", "q3t", "q2t"])
def test_a_dead_token_of_a_coded_tile_never_shows(kind: str, precision: str) -> None:
    """Its scales and minima may be any float16 number; those of V a finite one, as quantizing makes no other."""
    rng = np.random.default_rng(26)
    q, (segment,) = normal(rng, 5, 2, 16), make_keys(rng, 64, 1, 16, kind)[0]
    (page,) = segment.owner
    start = np.array([0, 4, 4, 20, 4])
    clean = flash_attention(q, segment, start=start, precision=precision)
    k_params, _, v_params, _ = part_offsets((kind, kind), 64, 16, 512 // 64, 0, 0)
    pairs = 2 * 64 * 2  # bytes of a scale and a minimum for every token: both sides have one group of 16 channels
    for at, numbers in ((k_params, (np.nan, np.inf, -np.inf, 7)), (v_params, (65504, -65504, 65504, 0))):
        page[at : at + pairs].view(np.float16).reshape(2, 64)[:, :4] = numbers
    found = flash_attention(q, segment, start=start, precision=precision)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], clean[1:])


def test_a_soft_cap_far_above_the_logits_changes_nothing() -> None:
    """tanh(x / cap) is computed to float32's relative precision, however small x / cap is."""
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 64), (90, 2, 64), (90, 2, 64)))
    plain = flash_attention(q, k, v)
    for cap in (1e4, 1e6, 1e30):
        assert np.abs(flash_attention(q, k, v, softcap=cap) - plain).max() <= 2e-6, cap


@pytest.mark.parametrize("position", [2**62 + 1, -(2**62) - 1])
def test_positions_that_would_wrap_are_refused(position: int) -> None:
    q = np.ones((1, 1, 16), np.float32)
    with pytest.raises(ValueError, match="positions must be from"):
        flash_attention(q, q, q, causal=True, positions=position)
    with pytest.raises(ValueError, match="k_position must be from"):
        flash_attention(q, q, q, causal=True, k_position=position)
