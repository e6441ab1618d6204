"""Any format of K with any format of V, with every option, against float64 over the numbers that are stored."""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mixkv.kernels import empty_state, flash_attention

from .contract import BOUNDS, allowed, assert_within, check, coded_segment, sizes_of_logits
from .oracle import CODED, DTYPES, expected, normal, padded_width

SMALL_D = 40  # width 48: padding, and by token one group of 48 or three of 16
FORMATS = (*DTYPES, *(kind + axis for kind in CODED for axis in ("c", "t", "t16")))
PAIRS = [(k, v) for k in FORMATS for v in FORMATS]


# --- Every pair of formats with every option -----------------------------------------------------------------------------

T, H, KV_HEADS, N = 5, 4, 2, 75


def every_option(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Calls that differ in one option each, and one with all of them."""
    mask = normal(rng, H, T, N)
    mask[rng.random(mask.shape) < 0.4] = -np.inf
    mask[1, 2] = -np.inf  # a row that sees nothing
    flat = normal(rng, T, N)
    flat[rng.random(flat.shape) < 0.4] = -np.inf
    single: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True},
        "ranges": {"start": np.array([0, 32, 33, 60, 9]), "stop": np.array([75, 64, 34, 10, 74])},
        "sliding window": {"sliding_window": 20},
        "causal sliding window": {"sliding_window": 33, "causal": True},
        "scale": {"scale": -0.25},
        "mask": {"mask": mask},
        "flat mask": {"mask": flat},
        "softcap": {"softcap": 1.5},
        "max_bias": {"max_bias": 8.0},
        "sink_logits": {"sink_logits": np.array([0.5, -np.inf, 3.0, -20.0], np.float32)},
        "positions": {"positions": np.array([40, 3, 74, 75, 200]), "causal": True, "max_bias": 8.0},
        "k_position": {"k_position": 1000, "positions": np.arange(1030, 1035), "causal": True, "max_bias": 8.0},
    }
    together: dict[str, Any] = {}
    for options in single.values():
        together |= options
    return {**single, "all": together}


@pytest.mark.parametrize(("k_kind", "v_kind"), PAIRS)
def test_every_pair_of_formats_with_every_option(k_kind: str, v_kind: str) -> None:
    rng = np.random.default_rng(1)
    segment, *stored = coded_segment(rng, N, KV_HEADS, SMALL_D, (k_kind, v_kind), 32)
    q = normal(rng, T, H, SMALL_D)
    for name, options in every_option(rng).items():
        check(q, segment, stored, options, f"{k_kind} {v_kind} {name}")


@pytest.mark.parametrize(("k_kind", "v_kind"), PAIRS)
def test_every_pair_of_formats_continues_from_other_keys(k_kind: str, v_kind: str) -> None:
    """From the state of dense keys, over one segment of another format, at positions whose first tiles are gone."""
    rng = np.random.default_rng(2)
    earlier = normal(rng, 40, KV_HEADS, SMALL_D), normal(rng, 40, KV_HEADS, SMALL_D)
    segment, k, v = coded_segment(rng, N, KV_HEADS, SMALL_D, (k_kind, v_kind), 32, first=35)
    q = normal(rng, T, H, SMALL_D)
    all_k, all_v = np.concatenate([earlier[0], k[35:]]), np.concatenate([earlier[1], v[35:]])
    want = expected(q, all_k, all_v)
    sizes = sizes_of_logits(q, all_k, np.zeros(T), np.full(T, len(all_k)), {})
    for precision in BOUNDS:
        out, state = np.empty_like(q), empty_state(H, T)
        flash_attention(q, *earlier, state=state, out=out)
        flash_attention(q, segment, state=state, out=out, precision=precision)
        assert_within((out, state), want, allowed(precision, *sizes), precision)


@pytest.mark.parametrize(("k_kind", "v_kind"), PAIRS)
def test_every_pair_of_formats_where_a_block_of_rows_is_small(k_kind: str, v_kind: str) -> None:
    """Rows are worked on in blocks of 96 and what one needs depends on its size: the last one has three rows, or six."""
    rng = np.random.default_rng(3)
    segment, *stored = coded_segment(rng, 200, 1, SMALL_D, (k_kind, v_kind), 32)
    for t in (33, 66):
        check(normal(rng, t, 3, SMALL_D), segment, stored, {"causal": True}, f"{k_kind} {v_kind} {t}")


# --- Anything with anything ----------------------------------------------------------------------------------------------

HEAD_DIMS = (64, 80, 96, 112, 128, 256)
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513, 700, 1100)
WORK = 3_000_000  # products of one generated case: the float64 reference does some hundred million a second


@st.composite
def format_names(draw: st.DrawFn, d: int) -> str:
    """A dense format, or codes by channel or by token in any group that fits."""
    kind = draw(st.sampled_from((*CODED, *CODED, *DTYPES)))
    if kind in DTYPES:
        return kind
    axis = draw(st.sampled_from(("", "c", "t", "t")))
    width = padded_width(d)
    groups = [g for g in range(16, width + 1, 16) if width % g == 0]
    return kind + axis + (draw(st.sampled_from(("", *map(str, groups)))) if axis == "t" else "")


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[str, str], int, int, dict[str, Any], float]:
    """((seed, T, H, KV heads, n, D), formats, tile, first position, options, size of q)."""
    d = draw(
        st.sampled_from(HEAD_DIMS)
        | st.sampled_from(HEAD_DIMS)
        | st.integers(1, 16).map(lambda x: 16 * x)
        | st.integers(1, 256)
    )
    kinds = draw(format_names(d)), draw(format_names(d))
    kv_heads, n_rep = draw(st.integers(1, 2)), draw(st.integers(1, 16))
    n = draw(st.sampled_from(LENGTHS) | st.integers(1, 150))
    h = kv_heads * n_rep
    longest = max(1, min(200, WORK // (n * h * d)))
    t = draw(st.integers(1, min(longest, 9)) | st.integers(1, longest))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    tile = draw(st.sampled_from((32, 64, 128)))
    first = draw(st.sampled_from((0, 0, 0, min(n - 1, 5), n // 2)))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.sampled_from((1, 7, 64, 100, 600)))
    if draw(st.booleans()):
        options["k_position"] = draw(st.integers(0, 5000))
        options["positions"] = options["k_position"] + rng.integers(-5, n + 5, t)
    if draw(st.booleans()):
        options["start"], options["stop"] = rng.integers(-2, n + 3, t), rng.integers(-2, n + 3, t)
    if draw(st.booleans()):
        mask = normal(rng, *draw(st.sampled_from(((t, n), (h, t, n)))))
        mask[rng.random(mask.shape) < draw(st.sampled_from((0.0, 0.5, 0.98)))] = -np.inf
        options["mask"] = mask
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((2.0, 50.0)))
    if draw(st.booleans()):
        options["max_bias"] = 8.0
    if draw(st.booleans()):
        options["sink_logits"] = normal(rng, h)
    if draw(st.booleans()):
        options["scale"] = d**-0.5 * draw(st.sampled_from((-1.0, 0.5, 1.5)))
    return (seed, t, h, kv_heads, n, d), kinds, tile, first, options, draw(st.sampled_from((1.0, 1.0, 0.01, 6.0)))


@settings(max_examples=600, deadline=None)
@given(calls())
def test_any_formats_shapes_and_options(call: tuple) -> None:
    (seed, t, h, kv_heads, n, d), kinds, tile, first, options, size = call
    rng = np.random.default_rng(seed + 1)
    segment, *stored = coded_segment(rng, n, kv_heads, d, kinds, tile, first)
    event("codes" if any(kind not in DTYPES for kind in kinds) else "dense")
    check(np.float32(size) * normal(rng, t, h, d), segment, stored, options)
