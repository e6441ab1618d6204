"""The ledger: M and S of every query after each segment, against float64; the two ways of sharing work agree."""

import numba
import numpy as np
import pytest

from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Tier
from mixkv.kernels.tables import N_PARTS, STEP
from mixkv.models.transformer import Softmax

from .oracle import expected, normal, read_store

POLICY = CachePolicy(
    window=130, sinks=5, k_bits=8, v_bits=8, tile=32, dense="f32", rotate_k=False, rotate_v=False,
    older=(Tier(600, k_bits=4, v_bits=4),),
)  # fmt: skip
HEADS, KV_HEADS, D, N = 4, 2, 20, 1400


def ranges(p: int) -> list[tuple[int, int]]:
    """What the query at p sees of sinks, the second tier, the first and the recent segment, from the docstring."""
    first, second = (32 * max(0, (p + 1 - after) // 32) for after in (130, 600))
    return [
        (0, min(5, p + 1)), (5, max(second, 5)), (max(second, 5), max(first, 5)), (max(first, 5), p + 1)
    ]  # fmt: skip


def stored(cache: LayerCache, k: np.ndarray, v: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each segment all positions as it holds them, zeros where it holds none."""
    found = [(k.astype(np.float64), v.astype(np.float64)) for _ in range(4)]
    for place, tier, kind in ((1, cache.tiers[1], "q4"), (2, cache.tiers[0], "q8")):
        own = np.zeros((2, len(k), KV_HEADS, D))
        own[:, tier.first * 32 : tier.stop * 32] = read_store(tier, (kind, kind))
        found[place] = own[0], own[1]
    return found


def merged(M: np.ndarray, S: np.ndarray, more_M: np.ndarray, more_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M and S of the keys of both."""
    top = np.maximum(M, more_M)
    finite = np.where(np.isneginf(top), 0, top)
    return top, S * np.exp(M - finite) + more_S * np.exp(more_M - finite)


@pytest.mark.parametrize("queries", [1, 3, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_state_after_each_segment(queries: int, threads: int) -> None:
    rng = np.random.default_rng(queries)
    qkv = normal(rng, N, HEADS + 2 * KV_HEADS, D)
    q, k, v = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        cache, plain = LayerCache(POLICY, KV_HEADS, D), LayerCache(POLICY, KV_HEADS, D)
        cache.exact = plain.exact = True
        for own in (cache, plain):
            own.attend(qkv[: N - queries].copy(), 0, Softmax(D**-0.5))
        cache.keeps_ledger = True
        rows = qkv[N - queries :].copy()
        out = cache.attend(rows, N - queries, Softmax(D**-0.5))
        np.testing.assert_array_equal(out, plain.attend(rows.copy(), N - queries, Softmax(D**-0.5)))
    finally:
        numba.set_num_threads(before)
    assert plain.ledger is None and cache.ledger is not None
    parts = cache.view(N - queries, rows).fields[N_PARTS - STEP]
    assert (parts > 0) == (queries < 200), "both ways of sharing work"
    assert cache.ledger.shape == (4, HEADS, queries, 2)
    forms = stored(cache, k, v)
    M, S = np.full((HEADS, queries), -np.inf), np.zeros((HEADS, queries))
    seen = np.array([ranges(p) for p in range(N - queries, N)])
    for segment in range(4):
        low, high = seen[:, segment].T
        _, more_M, more_S = expected(q[N - queries :], *forms[segment], start=low, stop=np.maximum(low, high))
        M, S = merged(M, S, more_M, more_S)
        np.testing.assert_allclose(cache.ledger[segment, ..., 0], M, rtol=0, atol=5e-6)
        np.testing.assert_allclose(cache.ledger[segment, ..., 1], S, rtol=5e-6, atol=0)


def test_a_ledger_that_is_not_kept_any_more_is_not_written_to() -> None:
    """Least of all by a call of more queries than it has room for."""
    rng = np.random.default_rng(1)
    cache = LayerCache(POLICY, KV_HEADS, D)
    cache.keeps_ledger = True
    cache.attend(normal(rng, 1, HEADS + 2 * KV_HEADS, D), 0, Softmax(0.2))
    ledger = cache.ledger
    assert ledger is not None
    ledger[:] = 7
    cache.keeps_ledger = False
    cache.attend(normal(rng, 1, HEADS + 2 * KV_HEADS, D), 1, Softmax(0.2))
    assert cache.ledger is None and (ledger == 7).all()


def test_the_ledger_of_a_fork_is_its_own() -> None:
    rng = np.random.default_rng(2)
    cache = LayerCache(POLICY, KV_HEADS, D)
    cache.keeps_ledger = True
    cache.attend(normal(rng, 3, HEADS + 2 * KV_HEADS, D), 0, Softmax(0.2))
    before = cache.ledger.copy()
    other = cache.fork()
    other.attend(normal(rng, 1, HEADS + 2 * KV_HEADS, D), 3, Softmax(0.2))
    np.testing.assert_array_equal(cache.ledger, before)
    assert other.ledger.shape == (4, HEADS, 1, 2)
