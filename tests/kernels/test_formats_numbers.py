"""Attention over codes of numbers that break it, and of very many keys: still within what is promised."""

import numpy as np
import pytest

from mixkv.kernels import empty_state, flash_attention

from .contract import BOUNDS, allowed, assert_within, check, coded_segment, sizes_of_logits
from .oracle import CODED, expected, make_store, normal, quantize_as, read_segment, read_store

AXES = [(kind + k, kind + v) for kind in CODED for k in "ct" for v in "ct"]
PRECISIONS = tuple(BOUNDS)


def run(q: np.ndarray, *keys: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
    state, out = empty_state(q.shape[1], q.shape[0]), np.full_like(q, np.nan)
    return flash_attention(q, *keys, state=state, out=out, **options), state


# --- Very many keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kind", CODED)
def test_thirty_two_thousand_keys(kind: str, d: int) -> None:
    """One query, three heads a KV head. The mean of so many values is small, and errors are relative to that."""
    rng = np.random.default_rng(d)
    n = 32_768
    segment = quantize_as((kind, kind), normal(rng, n, 1, d), normal(rng, n, 1, d))
    stored = read_segment(segment, (kind, kind), 64)
    q = normal(rng, 1, 3, d)
    want = expected(q, *stored)
    assert np.abs(want[0]).max() < 0.1
    sizes = sizes_of_logits(q, stored[0], np.zeros(1), np.full(1, n), {})
    for precision in PRECISIONS:
        bound = allowed(precision, *sizes, many_keys=True)
        assert_within(run(q, segment, precision=precision), want, bound, precision)


# --- Logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", AXES)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_logits_of_plus_and_minus_ten_thousand(kinds: tuple[str, str], size: float) -> None:
    """As coarse as the bound says; and where one key outdoes all others by far, its value is the output."""
    rng = np.random.default_rng(20)
    segment, *stored = coded_segment(rng, 600, 2, 32, kinds, 64)
    q = normal(rng, 6, 4, 32)
    sizes = sizes_of_logits(q, stored[0], np.zeros(6), np.full(6, 600), {})
    q *= np.float32(size / sizes[0])
    check(q, segment, stored, {}, f"{size}", many_keys=True)
    check(q, segment, stored, {"scale": -(32**-0.5), "causal": True}, f"{size} negative")
    sizes = sizes_of_logits(q, stored[0], np.zeros(6), np.full(6, 600), {})
    logits = np.sort(np.einsum("thd,nhd->thn", q.astype(float), np.repeat(stored[0], 2, axis=1)) * 32**-0.5)
    for precision in PRECISIONS:
        found, _ = run(q, segment, precision=precision)
        sure = logits[..., -1] - logits[..., -2] > 20 + 2 * allowed(precision, *sizes)["M"]
        assert sure.any() or size < 1000
        want = expected(q, *stored)[0]
        scale = np.abs(want).max()
        np.testing.assert_allclose(found[sure], want[sure], rtol=0, atol=allowed(precision, 0, 0, 0)["o"] * scale)


@pytest.mark.parametrize("kinds", AXES)
def test_ties_share_alike(kinds: tuple[str, str]) -> None:
    rng = np.random.default_rng(21)
    k, v = np.repeat(normal(rng, 1, 2, 20), 640, axis=0), normal(rng, 640, 2, 20)
    store = make_store(k, v, kinds, 64)
    segment = store.segment(0, 600)
    _, stored = read_store(store, kinds)
    mean = np.repeat(stored[:600].mean(axis=0), 2, axis=0)
    q = 30 * normal(rng, 3, 4, 20)
    for precision in PRECISIONS:
        out, state = run(q, segment, precision=precision)
        np.testing.assert_array_equal(state[..., 1], 600)
        error = np.abs(out - mean).max() / np.abs(mean).max()
        assert error <= allowed(precision, 0, 0, 0)["o"], precision


HUGE = [(kinds, channel) for kinds in AXES for channel in ("of k", "of v", "of q")]


@pytest.mark.parametrize(("kinds", "channel"), HUGE)
@pytest.mark.parametrize("d", [64, 256])
def test_one_huge_channel(kinds: tuple[str, str], channel: str, d: int) -> None:
    """A channel of keys that is 1,000 times larger than the others, as models have them, with queries small there."""
    rng = np.random.default_rng(22)
    k, v, q = normal(rng, 256, 2, d), normal(rng, 256, 2, d), normal(rng, 6, 4, d)
    if channel == "of k":
        k[:, :, 5] *= 1000
        q[:, :, 5] /= 1000
    elif channel == "of v":
        v[:, :, 5] *= 1000
    else:
        q[:, :, 5] *= 1000
    store = make_store(k, v, kinds, 64)
    stored = read_store(store, kinds)
    check(q, store.segment(0, 256), stored, {}, f"{kinds} {channel}", many_keys=True)


@pytest.mark.parametrize("kinds", AXES)
def test_channels_far_from_zero(kinds: tuple[str, str]) -> None:
    """Keys and values with a mean a hundred times their spread."""
    rng = np.random.default_rng(23)
    k, v, q = normal(rng, 256, 2, 64), normal(rng, 256, 2, 64), normal(rng, 6, 4, 64)
    k[:, :, ::7] += 100
    v[:, :, ::5] -= 100
    store = make_store(k, v, kinds, 64)
    stored = read_store(store, kinds)
    check(q, store.segment(0, 256), stored, {}, f"{kinds}", many_keys=True)


@pytest.mark.parametrize("kinds", AXES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-38, 1e-42])
def test_queries_of_next_to_nothing(kinds: tuple[str, str], size: float) -> None:
    """16-bit factors are relative to the largest one; below the smallest float32 that is none."""
    rng = np.random.default_rng(24)
    segment, *stored = coded_segment(rng, 90, 1, 20, kinds, 32)
    check((size * normal(rng, 3, 2, 20).astype(np.float64)).astype(np.float32), segment, stored, {}, f"{size}")


@pytest.mark.parametrize("kinds", AXES)
def test_weights_of_next_to_nothing(kinds: tuple[str, str]) -> None:
    """Tiles whose keys are so far below the largest logit that their weights vanish, beside one key that has all."""
    rng = np.random.default_rng(25)
    segment, *stored = coded_segment(rng, 600, 1, 20, kinds, 32)
    mask = np.full((2, 600), -80, np.float32) + normal(rng, 2, 600)
    mask[0, 333], mask[1, ::100] = 0, 0
    check(normal(rng, 2, 2, 20), segment, stored, {"mask": mask}, "far below")


# --- What is not a number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", AXES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_see_nothing_are_empty(kinds: tuple[str, str], precision: str) -> None:
    rng = np.random.default_rng(26)
    segment, *_ = coded_segment(rng, 600, 2, 20, kinds, 64)
    q, mask = normal(rng, 5, 4, 20), normal(rng, 4, 5, 600)
    seen = run(q, segment, precision=precision, mask=mask)
    mask[1, 2], mask[:, 4] = -np.inf, -np.inf
    out, state = run(q, segment, precision=precision, mask=mask)
    hidden = np.zeros((4, 5), bool)
    hidden[1, 2] = hidden[:, 4] = True
    np.testing.assert_array_equal(out[hidden.T], 0)
    np.testing.assert_array_equal(state[hidden], empty_state(1, hidden.sum())[0])
    np.testing.assert_array_equal(out[~hidden.T], seen[0][~hidden.T])
    np.testing.assert_array_equal(state[~hidden], seen[1][~hidden])


@pytest.mark.parametrize("kinds", [*AXES, ("f16", "q4"), ("q3", "bf16")])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("t", [1, 3, 60])
def test_a_query_that_is_not_a_number_spoils_its_own_row_only(kinds: tuple[str, str], precision: str, t: int) -> None:
    rng = np.random.default_rng(27)
    segment, *_ = coded_segment(rng, 600, 2, 20, kinds, 64)
    q = normal(rng, t, 4, 20)
    clean = run(q, segment, precision=precision)
    for channel in (0, 7, 19):
        bad = q.copy()
        bad[t // 2, 1, channel] = np.nan
        out, state = run(bad, segment, precision=precision)
        spoiled = np.zeros((t, 4), bool)
        spoiled[t // 2, 1] = True
        assert np.isnan(out[spoiled]).all() and np.isnan(state[spoiled.T]).all()
        np.testing.assert_array_equal(out[~spoiled], clean[0][~spoiled])
        np.testing.assert_array_equal(state[~spoiled.T], clean[1][~spoiled.T])


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_dense_side_that_is_not_a_number_outside_of_a_range_never_shows(part: str, kind: str, number: float) -> None:
    """K or V is dense, the other one codes."""
    rng = np.random.default_rng(28)
    k, v = normal(rng, 128, 1, 20), normal(rng, 128, 1, 20)
    q, start, stop = normal(rng, 4, 2, 20), np.array([0, 38, 38, 0]), np.array([37, 128, 90, 100])
    kinds = ("f32", kind) if part == "k" else (kind, "f32")
    clean = run(q, make_store(k, v, kinds).segment(0, 128), start=start, stop=stop)
    {"k": k, "v": v}[part][37] = number
    found = run(q, make_store(k, v, kinds).segment(0, 128), start=start, stop=stop)
    for a, b in zip(found, clean, strict=True):
        np.testing.assert_array_equal(a[:3] if a is found[0] else a[:, :3], b[:3] if a is found[0] else b[:, :3])
    assert not np.isfinite(found[0][3]).any()


@pytest.mark.parametrize("kinds", AXES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_whatever_the_codes_of_a_dead_token_are_they_never_show(kinds: tuple[str, str], precision: str) -> None:
    """Loud sinks in a tile: no range contains them, and the other tokens' codes are as if they were not there."""
    rng = np.random.default_rng(29)
    k, v, q = normal(rng, 64, 2, 20), normal(rng, 64, 2, 20), normal(rng, 3, 4, 20)
    found = []
    for loud in (1.0, 6e4):
        k[:5], v[:5] = loud * np.sign(k[:5]), loud * np.sign(v[:5])
        segment = make_store(k, v, kinds, dead=5).segment(5, 64)
        found.append(run(q, segment, precision=precision, causal=True))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
