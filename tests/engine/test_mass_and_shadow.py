"""What a session says about its attention: the ledger of shares, and the local errors of codes, against plain NumPy."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Override, Tier
from mixkv.engine.session import Session
from mixkv.engine.shadow import ShadowLayer
from mixkv.models.errors import UsageError
from mixkv.models.transformer import Softmax

Float32 = NDArray[np.float32]

THREE = CachePolicy(
    window=20, sinks=3, tile=32, k_bits=8, v_bits=8, older=(Tier(70, k_bits=4, v_bits=4), Tier(120, k_bits=3, v_bits=2))
)


@pytest.fixture(scope="module")
def model() -> Any:
    return mixkv.load("toy", weights="q8")  # whose bits do not depend on how many rows are read at once


def tokens(n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, n)


def weights_of(q: Float32, k: Float32) -> NDArray[np.float64]:
    """Causal softmax weights (H, T, N) in float64."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("thd,nhd->htn", q.astype(float), k.astype(float)) * q.shape[2] ** -0.5
    logits = np.where(np.arange(len(k)) <= np.arange(len(q))[:, None], logits, -np.inf)
    found = np.exp(logits - logits.max(axis=2, keepdims=True))
    return found / found.sum(axis=2, keepdims=True)


# --- the ledger -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 40, 200])
def test_shares_are_the_sums_of_the_softmax_weights_of_each_segment(size: int) -> None:
    """In a cache of float32 throughout, whatever it is cut into, so that float64 weights can be added up by position."""
    from mixkv.engine.cache import Cache

    policy = CachePolicy(
        window=20, sinks=3, tile=32, k_bits=32, v_bits=32, dense="f32", older=(Tier(70, k_bits=32, v_bits=32),)
    )
    cache = Cache(policy, 2, 2, 16)
    ledger = cache.keep_ledger(True)
    assert ledger is not None and ledger.names == ["sink", "old2", "old", "recent"]
    rows = np.random.default_rng(1).standard_normal((2, 200, 8, 16)).astype(np.float32)  # 4 query heads, 2 KV heads
    for start in range(0, 200, size):
        for layer in range(2):
            cache.attend(layer, rows[layer, start : start + size].copy(), start, Softmax(0.25))
        cache.commit(min(start + size, 200))
    shares = ledger.shares()
    assert shares.shape == (200, 2, 4, 4) and ledger.positions.tolist() == list(range(200))
    for layer in range(2):
        weights = weights_of(rows[layer, :, :4], rows[layer, :, 4:6])
        for p in range(200):
            young, old = (32 * max(0, (p + 1 - age) // 32) for age in (20, 70))
            edges = [0, 3, max(old, 3), max(young, 3), 200]
            want = [weights[:, p, a:b].sum(axis=1) for a, b in zip(edges, edges[1:], strict=False)]
            np.testing.assert_allclose(shares[p, layer], np.stack(want, axis=1), rtol=0, atol=2e-6)
    means = ledger.mean()
    np.testing.assert_allclose(list(means.values()), shares.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert means["old2"] > 0.1 and sum(means.values()) == pytest.approx(1)


def test_a_ledger_follows_the_session_back_and_changes_no_logit(model: Any) -> None:
    ids = tokens(260)
    plain, session = Session(model, THREE), Session(model, THREE)
    expected = plain.forward(ids, "all")
    session.forward(ids[:100], None)
    ledger = session.keep_ledger()
    assert ledger is not None
    found = session.forward(ids[100:], "all")
    assert found.tobytes() == expected[100:].tobytes()  # type: ignore[index, union-attr]
    before = ledger.shares()
    session.truncate(250)
    assert ledger.positions.tolist() == list(range(100, 250))
    np.testing.assert_array_equal(ledger.shares(), before[:150])
    session.truncate(120, replay=True)  # reads again, but what was seen there was seen
    assert ledger.positions.tolist() == list(range(100, 120))
    session.forward(ids[120:], None)
    np.testing.assert_array_equal(ledger.shares(), before)
    assert session.fork().cache.ledger is None
    with pytest.raises(UsageError, match="a ledger is kept"):
        session.retier(CachePolicy())
    assert session.keep_ledger(False) is None
    session.forward(ids[:5], None)
    assert len(ledger.positions) == 160, "nothing is entered any more"
    session.retier(CachePolicy())


def test_a_ledger_without_queries_says_so(model: Any) -> None:
    ledger = Session(model).keep_ledger()
    assert ledger is not None and len(ledger.positions) == 0
    for ask in (ledger.shares, ledger.mean):
        with pytest.raises(UsageError, match="no queries yet"):
            ask()


def test_layers_with_fewer_tiers_have_no_share_of_those_they_lack(model: Any) -> None:
    policy = CachePolicy(
        window=20, tile=32, older=(Tier(70), Tier(120, k_bits=2)), overrides=(Override("1", older=(Tier(70),)),)
    )
    session = Session(model, policy)
    ledger = session.keep_ledger()
    assert ledger is not None and ledger.names == ["sink", "old3", "old2", "old", "recent"]
    session.forward(tokens(250), None)
    shares = ledger.shares()
    assert (shares[:, 1, :, 1] == 0).all() and (shares[200:, 0, :, 1] > 0).all()
    np.testing.assert_allclose(shares.sum(axis=3), 1, atol=1e-6)


# --- shadow mode ------------------------------------------------------------------------------------------------------


def test_a_shadow_changes_no_logit_and_finds_nothing_where_nothing_is_rounded(model: Any) -> None:
    ids = tokens(300)
    for policy in (THREE, CachePolicy(rotate_k=False, scales="range"), CachePolicy.full()):
        plain, shadow = Session(model, policy), Session(model, policy, shadow=True)
        for start, stop in ((0, 170), (170, 171), (171, 300)):
            expected, found = (session.forward(ids[start:stop], "all") for session in (plain, shadow))
            assert found.tobytes() == expected.tobytes()  # type: ignore[union-attr]
        errors = shadow.local_errors()
        config = model.config
        assert all(x.shape == (config.num_hidden_layers, config.num_attention_heads) for x in errors.values())
        rounded = policy != CachePolicy.full()
        assert all((x > 1e-5).all() if rounded else not x.any() for x in errors.values())
    with pytest.raises(UsageError, match="shadow mode only"):
        plain.local_errors()


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_local_errors_are_those_of_attention_in_float64(rotate: bool, head_dim: int) -> None:
    """K's part, V's part, and both, from the values that the cache holds."""
    policy = CachePolicy(window=20, sinks=3, tile=32, k_bits=3, v_bits=2, rotate_k=rotate, rotate_v=rotate, dense="f32")
    cache = ShadowLayer(policy, 2, head_dim)
    rows = np.random.default_rng(3).standard_normal((150, 8, head_dim)).astype(np.float32)
    for start, stop in ((0, 90), (90, 91), (91, 150)):
        cache.attend(rows[start:stop].copy(), start, Softmax(head_dim**-0.5))
        cache.commit(stop)
    plain = LayerCache(policy, 2, head_dim)
    plain.attend(rows.copy(), 0, Softmax(head_dim**-0.5))
    coded_k, coded_v = np.zeros((2, 150, 2, head_dim))
    plain.commit(150)
    coded_k, coded_v, coded = plain.values(0, 150)
    assert coded.sum() == 125  # 128 sealed, 3 of them sinks
    q, k, v = rows[:, :4].astype(float), rows[:, 4:6].astype(float), rows[:, 6:].astype(float)

    def attention(kinds: tuple[bool, bool]) -> NDArray[np.float64]:
        out = np.empty(q.shape)
        for p in range(150):
            boundary = 32 * max(0, (p + 1 - 20) // 32)
            old = (np.arange(p + 1) >= 3) & (np.arange(p + 1) < boundary)
            keys = np.where(old[:, None, None] & kinds[0], coded_k[: p + 1], k[: p + 1])
            values = np.where(old[:, None, None] & kinds[1], coded_v[: p + 1], v[: p + 1])
            for h in range(4):
                logits = keys[:, h // 2] @ q[p, h] * head_dim**-0.5
                weights = np.exp(logits - logits.max())
                out[p, h] = weights @ values[:, h // 2] / weights.sum()
        return out

    exact = attention((False, False))
    size = np.sqrt((exact**2).sum(axis=(0, 2)))
    for part, kinds in {"k": (True, False), "v": (False, True), "both": (True, True)}.items():
        want = np.sqrt(((attention(kinds) - exact) ** 2).sum(axis=(0, 2))) / size
        assert (want > 0.02).all()
        np.testing.assert_allclose(cache.errors.relative(part), want, rtol=2e-3)


def test_a_fork_counts_its_own_errors(model: Any) -> None:
    session = Session(model, THREE, shadow=True)
    session.forward(tokens(200), None)
    before = session.local_errors()["both"]
    other = session.fork()
    other.forward(tokens(50, 1), None)
    np.testing.assert_array_equal(session.local_errors()["both"], before)
    assert (other.local_errors()["both"] != before).all()
