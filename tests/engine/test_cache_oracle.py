"""The cache against a slow float64 oracle that does, query by query, what the docstring of engine/layer.py says.

The oracle shares nothing with the package: it keeps every token in every form it may be seen in, as plain arrays over
absolute positions, rotates and quantizes with its own few lines, and picks for each query and position the form that it
sees. Scales are those of the range: fitted ones cannot be had bit for bit (tests/kernels/test_fitted.py has them).
"""

import functools
from collections.abc import Callable
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Tier

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# In float32, outputs are averages of values of about 1, largest about 5; logits reach about 20, whose rounding is 2e-6 and
# enters the weights as that relative error. The largest seen in 1,500 examples: 5.0e-6. This is what tells which form of
# a token a query has seen.
TOLERANCE = 2e-5
# Over codes the kernel multiplies in 16-bit integers. Relative to the largest output, and this much more for every unit of
# the largest logit, which is itself rounded.
CODES, CODES_A_LOGIT = 5e-4, 2.0**-14

DENSE_TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


def through(x: Float32, dtype: type) -> Float32:
    """x as it comes back from being stored in ``dtype``."""
    return x.astype(dtype).astype(np.float32)


def hadamard(head_dim: int) -> Float64:
    """Blocks of the largest power of two that divides head_dim, by Sylvester: [[H, H], [H, -H]]."""
    size = head_dim & -head_dim
    block = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * (size.bit_length() - 1), np.ones((1, 1)))
    return np.kron(np.eye(head_dim // size), block) * float(np.float32(size**-0.5))


def on_grid(x: Float32) -> Float32:
    """x in steps of 2^-9: float32 adds up 64 of these exactly, so rotation rounds once (not in blocks of 32 or 128)."""
    return np.round(x * 512) / np.float32(512)


def stored_scale(scale: Float32) -> Float32:
    """A scale through float16; where that has nothing but steps of 2^-24, it is rounded up."""
    up = np.ceil(scale.astype(float) * 2.0**24) * 2.0**-24
    return through(np.where(scale < 2.0**-14, up, scale).astype(np.float32), np.float16)


def coded(x: Float32, live: Float32, bits: int, axis: int) -> Float32:
    """x as it comes back from codes whose scales and minima are those of the values ``live`` along an axis.

    Single precision up to the code, as in the package: whether 6.5 steps become 6 or 7 must not depend on us.
    """
    low, high = live.min(axis, keepdims=True), live.max(axis, keepdims=True)
    scale, minimum = stored_scale((high - low) / np.float32(2**bits - 1)), through(low, np.float16)
    codes = np.clip(np.rint((x - minimum) / np.where(scale == 0, np.float32(np.inf), scale)), 0, 2**bits - 1)
    return (codes.astype(float) * scale + minimum).astype(np.float32)


def next_form(x: Float32, policy: CachePolicy, bits: int, axis: str, group: int) -> Float32:
    """Keys or values x of every full tile as a tier makes them of the form before; NaN elsewhere, and for sinks."""
    result = np.full(x.shape, np.nan, np.float32)
    half = DENSE_TYPES["bf16" if policy.dense == "bf16" else "f16"]
    for first in range(0, len(x) // policy.tile * policy.tile, policy.tile):
        alive = slice(max(first, policy.sinks), first + policy.tile)
        if alive.start >= alive.stop:
            continue
        if bits >= 16:
            result[alive] = through(x[alive], {16: half, 32: np.float32}[bits])
        elif axis == "channel":
            result[alive] = coded(x[alive], x[alive], bits, 0)
        else:
            for channels in groups(x.shape[2], group):
                values = x[alive, :, channels]
                result[alive, :, channels] = coded(values, values, bits, 2)
    return result


def groups(head_dim: int, group: int) -> list[slice]:
    """The channels that share a scale: of the width, rounded up to 16, the largest divisor up to 64, or all of it."""
    width = (head_dim + 15) // 16 * 16
    divisors = [g for g in (64, 48, 32, 16) if width % g == 0]
    group = group or (divisors[0] if divisors[0] >= 32 else width)
    return [slice(first, min(first + group, head_dim)) for first in range(0, head_dim, group)]


def all_forms(k: Float32, v: Float32, policy: CachePolicy) -> list[tuple[Float32, Float32]]:
    """Keys and values of all tokens, dense and then as each tier holds them, made of the one before."""
    forms = [tuple(through(x, DENSE_TYPES[policy.dense]) for x in (k, v))]
    for tier in policy.tiers:
        forms.append(
            (
                next_form(forms[-1][0], policy, tier.k_bits, tier.k_axis, tier.k_group),
                next_form(forms[-1][1], policy, tier.v_bits, tier.v_axis, tier.v_group),
            )
        )
    return forms


def seen_by(p: int, policy: CachePolicy, forms: list[Float32]) -> Float64:
    """The p + 1 first tokens, each in the form in which the query at position p sees it."""
    seen = forms[0][: p + 1].astype(float)
    for tier, form in zip(policy.tiers, forms[1:], strict=True):
        boundary = policy.tile * max(0, (p + 1 - tier.after) // policy.tile)
        seen[policy.sinks : boundary] = form[policy.sinks : boundary]
    return seen


def oracle(
    q: Float32, k: Float32, v: Float32, policy: CachePolicy, first: int = 0, sliding: int | None = None
) -> tuple[Float64, float, float]:
    """The output of every query from ``first`` on, the largest of their logits, and of their outputs as they are held."""
    turn = hadamard(k.shape[2])
    bits = [[getattr(tier, name) for tier in policy.tiers] for name in ("k_bits", "v_bits")]
    turned = [yes and min(own) < 16 for yes, own in zip((policy.rotate_k, policy.rotate_v), bits, strict=True)]
    queries = q.astype(float)
    if turned[0]:
        queries, k = queries @ turn, (k.astype(float) @ turn).astype(np.float32)
    if turned[1]:
        v = (v.astype(float) @ turn).astype(np.float32)
    k_forms, v_forms = zip(*all_forms(k, v, policy), strict=True)
    result, largest = np.empty(q.shape), 0.0
    n_rep = q.shape[1] // k.shape[1]
    for p in range(first, len(q)):
        low = 0 if sliding is None else max(0, p + 1 - sliding)
        keys, values = seen_by(p, policy, k_forms)[low:], seen_by(p, policy, v_forms)[low:]
        for head in range(q.shape[1]):
            logits = keys[:, head // n_rep] @ queries[p, head] * q.shape[2] ** -0.5
            largest = max(largest, float(np.abs(logits).max()))
            weights = np.exp(logits - logits.max())
            result[p, head] = weights @ values[:, head // n_rep] / weights.sum()
    result = result[first:]
    most = float(np.abs(result).max())
    return result @ turn if turned[1] else result, largest, most


def assert_sees(
    feed: Callable[..., Float32],
    qkv: tuple[Float32, ...],
    policy: CachePolicy,
    cuts: list[int],
    first: int = 0,
    sliding: int | None = None,
) -> LayerCache:
    """Feed a cache in float32 throughout, and another one as it is; the outputs from ``first`` on are the oracle's."""
    heads, head_dim = qkv[1].shape[1:]
    want, largest, most = oracle(*qkv, policy, first, sliding)
    with mock.patch.object(LayerCache, "exact", True):
        outs = feed(LayerCache(policy, heads, head_dim, sliding_window=sliding), qkv, cuts)
    np.testing.assert_allclose(outs[first:], want, rtol=0, atol=TOLERANCE)
    cache = LayerCache(policy, heads, head_dim, sliding_window=sliding)
    outs = feed(cache, qkv, cuts)
    bound = TOLERANCE
    if min(min(tier.k_bits, tier.v_bits) for tier in policy.tiers) < 16:
        bound = (CODES + CODES_A_LOGIT * largest) * most
    np.testing.assert_allclose(outs[first:], want, rtol=0, atol=bound)
    return cache


def plain(**fields: object) -> CachePolicy:
    """A policy without rotation, unless that is asked for, and with scales of the range."""
    return CachePolicy(**{"rotate_k": False, "rotate_v": False, **fields}, scales="range")  # type: ignore[arg-type]


HEAD_DIMS = [2, 6, 16, 20, 32, 48, 64]


@st.composite
def sides(draw: st.DrawFn, head_dim: int, tile: int) -> dict[str, object]:
    """The format of a tier, with any group that fits head_dim."""
    fields: dict[str, object] = {}
    width = (head_dim + 15) // 16 * 16
    for side in "kv":
        bits = draw(st.sampled_from([2, 3, 4, 8, 16, 32]))
        fields[f"{side}_bits"] = bits
        if bits < 16 and draw(st.booleans()):  # else by the usual axis and group
            axis = draw(st.sampled_from(["channel", "token"]))
            sizes = [0, tile] if axis == "channel" else [0, *(g for g in range(16, width + 1, 16) if width % g == 0)]
            fields |= {f"{side}_axis": axis, f"{side}_group": draw(st.sampled_from(sizes))}
    return fields


@st.composite
def policies(draw: st.DrawFn, head_dim: int) -> CachePolicy:
    tile = draw(st.sampled_from([32, 32, 32, 64, 64, 128]))
    window = draw(st.one_of(st.integers(0, 60), st.integers(0, 60), st.integers(61, 200)))
    ages = draw(st.sets(st.integers(window + 1, window + 100), max_size=3))
    turns = st.booleans() if head_dim != 32 else st.just(False)  # see ``on_grid``
    return plain(
        window=window,
        sinks=draw(st.sampled_from([*range(9), *range(9), *range(9), 31, 40, 64, 70, 130, 400])),
        tile=tile,
        dense=draw(st.sampled_from(["f16", "bf16", "f32"])),
        rotate_k=draw(turns),
        rotate_v=draw(turns),
        older=tuple(Tier(age, **draw(sides(head_dim, tile))) for age in sorted(ages)),
        **draw(sides(head_dim, tile)),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    head_dim_and_policy=st.sampled_from(HEAD_DIMS).flatmap(lambda d: st.tuples(st.just(d), policies(d))),
    n=st.sampled_from([1, 2, 31, 33, 64, 97, 129, *range(150, 340)]),
    kv_heads=st.integers(1, 3),
    n_rep=st.integers(1, 4),
    sliding=st.one_of(st.none(), st.none(), st.integers(1, 300)),
    cuts=st.lists(st.integers(1, 339), max_size=12),
    seed=st.integers(0, 1 << 20),
)
def test_every_query_sees_what_the_docstring_says(
    draw_qkv: Callable[..., tuple[Float32, ...]],
    feed: Callable[..., Float32],
    head_dim_and_policy: tuple[int, CachePolicy],
    n: int,
    kv_heads: int,
    n_rep: int,
    sliding: int | None,
    cuts: list[int],
    seed: int,
) -> None:
    head_dim, policy = head_dim_and_policy
    qkv = tuple(on_grid(x) for x in draw_qkv(seed, n, kv_heads, n_rep, head_dim))
    cache = assert_sees(feed, qkv, policy, [0, *sorted({cut for cut in cuts if cut < n}), n], sliding=sliding)
    reached = sum(tier.stop * policy.tile > max(policy.sinks, tier.first * policy.tile) for tier in cache.tiers)
    event(f"tiers seen: {reached}")
    event(f"rotated: {policy.rotates}")


@pytest.mark.parametrize("head_dim", [66, 80, 96, 100, 112, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wide_heads_with_several_groups_of_values(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32], head_dim: int, bits: int
) -> None:
    qkv = draw_qkv(head_dim, 100, 1, 3, head_dim)
    policy = plain(window=10, sinks=1, k_bits=bits, v_bits=bits, tile=32)
    assert_sees(feed, qkv, policy, [0, 50, 100])


def test_tokens_beyond_one_split_of_the_kernel(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32]
) -> None:
    """1,200 tokens: the kernel cuts its work at 512 and 1,024 and merges; the last queries are checked."""
    qkv = tuple(on_grid(x) for x in draw_qkv(5, 1200, 1, 1, 16))
    for policy in (
        plain(window=150, sinks=4),
        plain(window=150, sinks=4, rotate_k=True, rotate_v=True, older=(Tier(300, 3, 3), Tier(700, 2, 2))),
    ):
        assert_sees(feed, qkv, policy, [0, 500, 1100, 1199, 1200], 1000)


@pytest.mark.fault("extreme-keys")
def test_a_constant_group_and_an_all_zero_group_come_back_exactly(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32]
) -> None:
    """Fault row 24: their scale is 0, and nothing is divided by it."""
    q, k, v = draw_qkv(6, 100, 1, 2, 16)
    k[:, :, :4], k[:, :, 4:8], v[:] = 0, 2.5, -1.5
    v[50:] = 0
    policy = plain(window=0, sinks=0, tile=32)
    with np.errstate(all="raise", under="ignore"):
        outs = feed(LayerCache(policy, 1, 16), (q, k, v), [0, 100])
    assert_sees(feed, (q, k, v), policy, [0, 100])
    np.testing.assert_allclose(outs[:50], -1.5, rtol=1e-6)
