"""The cache against a slow float64 oracle that does, query by query, what the docstring of engine/cache.py says.

The oracle shares nothing with the package: it keeps every token in every form it may be seen in, as plain arrays over
absolute positions, quantizes with its own few lines, and picks for each query and position the form that it sees.
"""

from collections.abc import Callable
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkv.engine.cache import LayerCache
from mixkv.engine.policy import CachePolicy

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


def coded(x: Float32, live: Float32, bits: int) -> Float64:
    """x as it comes back from codes whose scale and minimum are those of the values ``live`` (all of one group).

    Single precision up to the code, as in the package: whether 6.5 steps become 6 or 7 must not depend on us.
    """
    low, high = np.float32(live.min()), np.float32(live.max())
    scale = np.float32(np.float16(np.float32(high - low) / np.float32(2**bits - 1)))
    minimum = np.float32(np.float16(low))
    if scale == 0:
        return np.full(x.shape, minimum, np.float64)
    codes = np.clip(np.rint((x - minimum) / scale), 0, 2**bits - 1)
    return codes.astype(np.float64) * scale + minimum


def old_form(x: Float32, policy: CachePolicy, bits: int) -> Float64:
    """Dense values in the precision of 16 or 32 bits; 16 bits are bfloat16 where the dense parts are."""
    return through(x, {16: DENSE_TYPES["bf16" if policy.dense == "bf16" else "f16"], 32: np.float32}[bits]).astype(
        float
    )


def old_keys(k: Float32, policy: CachePolicy) -> Float64:
    """Every full tile as the old segment holds it: one scale a channel, over the tokens that are no sinks. Else NaN."""
    result = np.full(k.shape, np.nan)
    for first in range(0, len(k) // policy.tile * policy.tile, policy.tile):
        alive = slice(max(first, policy.sinks), first + policy.tile)
        if alive.start >= alive.stop:
            continue
        if policy.k_bits >= 16:
            result[alive] = old_form(k[alive], policy, policy.k_bits)
            continue
        for head in range(k.shape[1]):
            for channel in range(k.shape[2]):
                values = k[alive, head, channel]
                result[alive, head, channel] = coded(values, values, policy.k_bits)
    return result


def value_groups(head_dim: int) -> list[slice]:
    """The channels that share a scale: of the width, rounded up to 16, the largest divisor up to 64, or all of it."""
    width = (head_dim + 15) // 16 * 16
    divisors = [g for g in (64, 48, 32, 16) if width % g == 0]
    group = divisors[0] if divisors[0] >= 32 else width
    return [slice(first, min(first + group, head_dim)) for first in range(0, head_dim, group)]


def old_values(v: Float32, policy: CachePolicy) -> Float64:
    """Every token as the old segment holds it: one scale a token and group of channels."""
    if policy.v_bits >= 16:
        return old_form(v, policy, policy.v_bits)
    result = np.empty(v.shape)
    for group in value_groups(v.shape[2]):
        for row in np.ndindex(v.shape[:2]):
            values = v[(*row, group)]
            result[(*row, group)] = coded(values, values, policy.v_bits)
    return result


def seen_by(p: int, policy: CachePolicy, dense: Float64, old: Float64) -> Float64:
    """The p + 1 tokens that the query at position p sees, each in the form in which it sees it."""
    boundary = policy.tile * max(0, (p + 1 - policy.window) // policy.tile)
    seen = dense[: p + 1].copy()
    seen[policy.sinks : boundary] = old[policy.sinks : boundary]
    return seen


def oracle(q: Float32, k: Float32, v: Float32, policy: CachePolicy, first: int = 0) -> tuple[Float64, float]:
    """The output of every query from ``first`` on, and the largest of their logits."""
    dense_k, dense_v = (through(x, DENSE_TYPES[policy.dense]) for x in (k, v))
    k_old, v_old = old_keys(dense_k, policy), old_values(dense_v, policy)
    result, largest = np.empty(q.shape), 0.0
    n_rep = q.shape[1] // k.shape[1]
    for p in range(first, len(q)):
        keys = seen_by(p, policy, dense_k.astype(float), k_old)
        values = seen_by(p, policy, dense_v.astype(float), v_old)
        for head in range(q.shape[1]):
            logits = keys[:, head // n_rep] @ q[p, head].astype(float) * q.shape[2] ** -0.5
            largest = max(largest, float(np.abs(logits).max()))
            weights = np.exp(logits - logits.max())
            result[p, head] = weights @ values[:, head // n_rep] / weights.sum()
    return result[first:], largest


def assert_sees(
    feed: Callable[..., Float32], qkv: tuple[Float32, ...], policy: CachePolicy, cuts: list[int], first: int = 0
) -> LayerCache:
    """Feed a cache in float32 throughout, and another one as it is; the outputs from ``first`` on are the oracle's."""
    heads, head_dim = qkv[1].shape[1:]
    want, largest = oracle(*qkv, policy, first)
    with mock.patch.object(LayerCache, "exact", True):
        outs = feed(LayerCache(policy, heads, head_dim), qkv, cuts)
    np.testing.assert_allclose(outs[first:], want, rtol=0, atol=TOLERANCE)
    cache = LayerCache(policy, heads, head_dim)
    outs = feed(cache, qkv, cuts)
    bound = TOLERANCE
    if min(policy.k_bits, policy.v_bits) < 16:
        bound = (CODES + CODES_A_LOGIT * largest) * np.abs(want).max()
    np.testing.assert_allclose(outs[first:], want, rtol=0, atol=bound)
    return cache


policies = st.builds(
    CachePolicy,
    window=st.one_of(st.integers(0, 60), st.integers(0, 60), st.integers(61, 200)),
    sinks=st.sampled_from([*range(9), *range(9), 31, 40, 64, 70, 130, 400]),
    k_bits=st.sampled_from([2, 3, 4, 8, 16, 32]),
    v_bits=st.sampled_from([2, 3, 4, 8, 16, 32]),
    tile=st.sampled_from([32, 64, 128, 32, 64]),
    dense=st.sampled_from(["f16", "bf16", "f32"]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=policies,
    n=st.sampled_from([1, 2, 31, 33, 64, 97, 129, *range(150, 280)]),
    kv_heads=st.integers(1, 3),
    n_rep=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 16, 20, 32, 48, 64]),
    cuts=st.lists(st.integers(1, 279), max_size=12),
    seed=st.integers(0, 1 << 20),
)
def test_every_query_sees_what_the_docstring_says(
    draw_qkv: Callable[..., tuple[Float32, ...]],
    feed: Callable[..., Float32],
    policy: CachePolicy,
    n: int,
    kv_heads: int,
    n_rep: int,
    head_dim: int,
    cuts: list[int],
    seed: int,
) -> None:
    qkv = draw_qkv(seed, n, kv_heads, n_rep, head_dim)
    cache = assert_sees(feed, qkv, policy, [0, *sorted({cut for cut in cuts if cut < n}), n])
    event(f"old tokens seen: {'some' if cache.old.stop * policy.tile > policy.sinks else 'none'}")


@pytest.mark.parametrize("head_dim", [66, 80, 96, 100, 112, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wide_heads_with_several_groups_of_values(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32], head_dim: int, bits: int
) -> None:
    qkv = draw_qkv(head_dim, 100, 1, 3, head_dim)
    policy = CachePolicy(window=10, sinks=1, k_bits=bits, v_bits=bits, tile=32)
    assert_sees(feed, qkv, policy, [0, 50, 100])


def test_tokens_beyond_one_split_of_the_kernel(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32]
) -> None:
    """1,200 tokens: the kernel cuts its work at 512 and 1,024 and merges; the last queries are checked."""
    qkv = draw_qkv(5, 1200, 1, 1, 16)
    policy = CachePolicy(window=150, sinks=4)
    assert_sees(feed, qkv, policy, [0, 500, 1100, 1199, 1200], 1000)


def test_a_constant_group_and_an_all_zero_group_come_back_exactly(
    draw_qkv: Callable[..., tuple[Float32, ...]], feed: Callable[..., Float32]
) -> None:
    """Fault row 24: their scale is 0, and nothing is divided by it."""
    q, k, v = draw_qkv(6, 100, 1, 2, 16)
    k[:, :, :4], k[:, :, 4:8], v[:] = 0, 2.5, -1.5
    v[50:] = 0
    policy = CachePolicy(window=0, sinks=0, tile=32)
    with np.errstate(all="raise", under="ignore"):
        outs = feed(LayerCache(policy, 1, 16), (q, k, v), [0, 100])
    assert_sees(feed, (q, k, v), policy, [0, 100])
    np.testing.assert_allclose(outs[:50], -1.5, rtol=1e-6)
