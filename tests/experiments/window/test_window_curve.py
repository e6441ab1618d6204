"""The curve of windows: one layer against float64 and against shadow mode, whole models against a session a window."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import mixkv
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Override, Tier
from mixkv.engine.session import Session
from mixkv.engine.shadow import ShadowLayer
from mixkv.experiments.evaluate import evaluate
from mixkv.experiments.texts import default_text
from mixkv.experiments.window import layer as window_layer
from mixkv.experiments.window.curve import check_memory, default_windows, measure
from mixkv.experiments.window.layer import LayerWindows
from mixkv.models.errors import NumericalError, PromptError, UsageError
from mixkv.models.transformer import Softmax

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

N_HEADS, N_KV_HEADS = 4, 2


def rows(n: int, head_dim: int, seed: int = 3) -> Float32:
    """Queries, keys and values of n tokens (n, 8, head_dim)."""
    return np.random.default_rng(seed).standard_normal((n, N_HEADS + 2 * N_KV_HEADS, head_dim)).astype(np.float32)


def tokens(n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, n)


def curve_of(policy: CachePolicy, windows: list[int], qkv: Float32) -> tuple[Float64, Float64]:
    layer = LayerWindows(policy, np.array(windows), N_KV_HEADS, qkv.shape[2])
    return layer(qkv.copy(), Softmax(qkv.shape[2] ** -0.5))


def relative(squares: Float64, outputs: Float64) -> Float64:
    return np.sqrt(squares / outputs)


# --- one layer --------------------------------------------------------------------------------------------------------


def held(policy: CachePolicy, qkv: Float32) -> tuple[Float64, Float64]:
    """Keys and values (N, Hkv, D) that a cache of one layer holds in the end."""
    cache = LayerCache(policy, N_KV_HEADS, qkv.shape[2])
    cache.attend(qkv.copy(), 0, Softmax(1.0))
    cache.commit(len(qkv))
    k, v, _ = cache.values(0, len(qkv))
    return k.astype(float), v.astype(float)


def attention(q: Float64, k: Float64, v: Float64) -> Float64:
    """Of one query (H, D) over all keys."""
    k, v = np.repeat(k, N_HEADS // N_KV_HEADS, axis=1), np.repeat(v, N_HEADS // N_KV_HEADS, axis=1)
    logits = np.einsum("hd,nhd->hn", q, k) * q.shape[1] ** -0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), v)


@pytest.mark.parametrize(
    ("head_dim", "fields"),
    [
        (16, {"k_bits": 3, "v_bits": 2}),
        (20, {"k_bits": 3, "v_bits": 3, "rotate_k": False, "rotate_v": False, "dense": "f32"}),
        (20, {"k_bits": 2, "v_bits": 4, "k_axis": "token", "v_axis": "channel", "scales": "range", "sinks": 40}),
        (32, {"k_bits": 4, "v_bits": 4, "sinks": 0, "dense": "bf16"}),
    ],
)
def test_every_window_is_that_of_attention_in_float64(head_dim: int, fields: dict[str, Any]) -> None:
    policy, n = CachePolicy(**{"sinks": 3, "tile": 32, **fields}), 150
    qkv = rows(n, head_dim)
    dense, coded = (held(replace(policy, window=w), qkv) for w in (n, 0))
    if policy.dense == "f32":
        np.testing.assert_allclose(dense[0], qkv[:, N_HEADS : N_HEADS + N_KV_HEADS], atol=1e-6)
    q, last = qkv[:, :N_HEADS].astype(float), n // 32
    outs = np.empty((last + 1, n, N_HEADS, head_dim))  # by tiles in codes
    for b in range(last + 1):
        for p in range(n):
            old = (np.arange(p + 1) >= policy.sinks) & (np.arange(p + 1) < 32 * b)
            k, v = (np.where(old[:, None, None], y[: p + 1], x[: p + 1]) for x, y in zip(dense, coded, strict=True))
            outs[b, p] = attention(q[p], k, v)
    windows = list(range(0, n + 40))
    out = np.full((n, N_HEADS, head_dim), np.nan, np.float32)
    layer = LayerWindows(policy, np.array(windows), N_KV_HEADS, head_dim)
    squares, outputs = layer(qkv.copy(), Softmax(head_dim**-0.5), out)
    np.testing.assert_allclose(out, outs[0], atol=1e-4)
    np.testing.assert_allclose(outputs, (outs[0] ** 2).sum(axis=(0, 2)), rtol=1e-4)
    for i, window in enumerate(windows):
        tiles = np.maximum((np.arange(1, n + 1) - window) // 32, 0)
        want = ((outs[tiles, np.arange(n)] - outs[0]) ** 2).sum(axis=(0, 2))
        if window > n - 32:
            assert not squares[i].any() and not want.any()
        else:
            np.testing.assert_allclose(relative(squares[i], outputs), relative(want, outputs), rtol=5e-3)


def shadow(policy: CachePolicy, qkv: Float32) -> Float64:
    layer = ShadowLayer(policy, N_KV_HEADS, qkv.shape[2])
    layer.attend(qkv.copy(), 0, Softmax(qkv.shape[2] ** -0.5))
    return layer.errors.relative("both")


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 300),
    window=st.integers(0, 320),
    others=st.lists(st.integers(0, 320), max_size=4),
    tile=st.sampled_from([32, 64, 128]),
    sinks=st.integers(0, 140),
    bits=st.sampled_from([(2, 2), (3, 4), (8, 8), (4, 16), (16, 16)]),
    head_dim=st.sampled_from([16, 24, 64]),
    dense=st.sampled_from(["f16", "bf16", "f32"]),
    rotate=st.booleans(),
    block=st.sampled_from([7, 64, 512]),
    room=st.sampled_from([1 << 12, 1 << 17, 1 << 27]),
    threads=st.integers(1, numba.config.NUMBA_NUM_THREADS),
)
def test_a_window_is_what_shadow_mode_finds_for_it(
    n: int, window: int, others: list[int], tile: int, sinks: int, bits: tuple[int, int], head_dim: int, dense: str,
    rotate: bool, block: int, room: int, threads: int,
) -> None:  # fmt: skip
    """Whatever else is asked for, and whatever blocks the queries are cut into."""
    policy = CachePolicy(
        window, sinks, *bits, tile, dense, rotate_k=rotate, rotate_v=rotate, scales="fit" if rotate else "range"
    )
    qkv = rows(n, head_dim, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_layer, "BLOCK", block)
        patch.setattr(window_layer, "LEAST", min(block, 64))
        patch.setattr(window_layer, "ROOM", room)
        patch.setattr(window_layer, "LEAST_ROOM", 0)
        patch.setattr(numba, "get_num_threads", lambda: threads)
        squares, outputs = curve_of(policy, sorted({window, *others}), qkv)
    found = relative(squares[sorted({window, *others}).index(window)], outputs)
    np.testing.assert_allclose(found, shadow(policy, qkv), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("size", [1e5, 1e-5])
def test_numbers_beyond_float16_are_as_in_shadow_mode(size: float) -> None:
    """Dense parts, or scales, are float32 then, and tokens are stored a second time."""
    qkv = rows(200, 16)
    qkv[:, N_HEADS:] *= np.float32(size)
    qkv[:, :N_HEADS] /= np.float32(size)
    policy = CachePolicy(sinks=2, tile=32, window=50)
    squares, outputs = curve_of(policy, [0, 50], qkv)
    want = shadow(policy, qkv)
    assert (want > 0.01).all()
    np.testing.assert_allclose(relative(squares[1], outputs), want, rtol=1e-3)


def test_keys_that_change_the_attention_wholly_give_finite_errors() -> None:
    """Logits of codes that are hundreds away from the exact ones: exponentials of their differences would overflow."""
    qkv = rows(300, 16)
    qkv[:, N_HEADS : N_HEADS + N_KV_HEADS, 0] *= 3000
    policy = CachePolicy(0, 2, 2, 2, 32, "f32", rotate_k=False, rotate_v=False)
    squares, outputs = curve_of(policy, [0, 64], qkv)
    assert np.isfinite(squares).all()
    np.testing.assert_allclose(relative(squares[0], outputs), shadow(policy, qkv), rtol=1e-3)


# --- a model ----------------------------------------------------------------------------------------------------------

TINY = Path(__file__).parents[2] / "data" / "tiny_llama"


@pytest.mark.parametrize("name", ["toy", str(TINY)])
def test_the_curve_is_that_of_a_session_for_each_window(name: str) -> None:
    """The same in the first layer. Those behind get exact inputs here, and in a session what those before made of them."""
    model = mixkv.load(name, "f32")
    n = min(400, model.config.max_position_embeddings)
    ids = tokens(n) % model.config.vocab_size
    policy, windows = CachePolicy(sinks=2, tile=32), [0, 20, 64, n // 3, n]
    curve = measure(model, ids, policy, windows)
    found = []
    for window in windows:
        session = Session(model, replace(policy, window=window), shadow=True, chunk=n)
        session.forward(ids, None)
        layers = [layer.errors for layer in session.cache.layers if isinstance(layer, ShadowLayer)]
        found.append([(layer.errors["both"].sum(), layer.outputs.sum()) for layer in layers])  # type: ignore[union-attr]
    squares, outputs = np.moveaxis(np.array(found), 2, 0)
    by_layer = np.sqrt(squares / outputs)
    assert (by_layer[:4] > 0.001).all() and not by_layer[4].any() and not curve.by_layer[4].any()
    np.testing.assert_allclose(curve.by_layer[:, 0], by_layer[:, 0], rtol=1e-4)
    np.testing.assert_allclose(curve.by_layer, by_layer, rtol=0.15)
    assert (np.diff(by_layer, axis=0) < 0).all() and (np.diff(curve.by_layer, axis=0) < 0).all()
    np.testing.assert_allclose(curve.outputs.sum(axis=1), outputs[0], rtol=0.02)
    np.testing.assert_allclose(curve.errors, np.sqrt(squares.sum(axis=1) / outputs.sum(axis=1)), rtol=0.1)


def test_sums_of_squares_are_added_up_before_they_are_divided(toy: Any) -> None:
    curve = measure(toy, tokens(200), CachePolicy(tile=32), [0, 100])
    squares, outputs = curve.by_head**2 * curve.outputs, curve.outputs
    np.testing.assert_allclose(curve.by_layer, np.sqrt(squares.sum(axis=2) / outputs.sum(axis=1)))
    np.testing.assert_allclose(curve.errors, np.sqrt(squares.sum(axis=(1, 2)) / outputs.sum()))
    assert curve.by_head.shape == (2, 3, 6) and curve.by_layer.shape == (2, 3) and curve.errors.shape == (2,)
    assert curve.pass_seconds is None and curve.seconds > 0


def test_bytes_are_those_of_a_session_that_has_read_the_text(toy: Any) -> None:
    ids, policy = tokens(333), CachePolicy(k_bits=3, tile=32)
    curve = measure(toy, ids, policy, [0, 100, 333])
    for window, nbytes in zip(curve.windows, curve.kv_bytes_per_token, strict=True):
        session = Session(toy, replace(policy, window=window))
        session.forward(ids, None)
        assert nbytes == session.nbytes()["total"] / 333


def test_windows_are_measured_once_in_ascending_order(toy: Any) -> None:
    steps: list[tuple[int, int]] = []
    curve = measure(
        toy, tokens(100), CachePolicy(), [64, 0, 64], compare_time=True, progress=lambda *x: steps.append(x)
    )
    assert curve.windows == (0, 64) and steps == [(1, 3), (2, 3), (3, 3)] and curve.pass_seconds is not None


@pytest.mark.parametrize(
    ("n", "tile", "first", "last", "count"),
    [(1, 64, [0], 0, 1), (63, 64, [0], 0, 1), (64, 64, [0, 64], 64, 2), (2048, 64, [0, 64, 128], 2048, 33),
     (4031, 64, [0, 64], 3968, 63), (4096, 64, [0, 128], 4096, 33), (8000, 64, [0, 128], 7936, 63),
     (16384, 32, [0, 288], 16128, 57)],
)  # fmt: skip
def test_windows_unless_given_are_multiples_of_the_tile(
    n: int, tile: int, first: list[int], last: int, count: int
) -> None:
    found = default_windows(n, tile)
    assert found[: len(first)] == first and found[-1] == last and len(found) == count <= 64
    assert last + (found[1] if count > 1 else tile) > n


def test_what_there_is_no_curve_of_is_refused(toy: Any) -> None:
    ids = tokens(50)
    for policy in (
        CachePolicy(older=(Tier(500),)), CachePolicy(overrides=(Override("0", k_bits=8),)), CachePolicy.parse("tiny")
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"one tier and no overrides, found \d tiers and \d overrides"):
            measure(toy, ids, policy)
    for windows in ([], [-1], [1 << 25], [0.5], [True]):
        with pytest.raises(UsageError, match="windows must be whole numbers from 0 to 16777216, found"):
            measure(toy, ids, CachePolicy(), windows)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="empty"):
        measure(toy, [], CachePolicy())
    with pytest.raises(PromptError, match="do not fit into the context"):
        measure(toy, np.zeros(20_000, np.int64), CachePolicy())


def test_memory_is_planned_before(toy: Any) -> None:
    needed = check_memory(toy.config, CachePolicy(), 1000, 1 << 40)
    assert needed > window_layer.ROOM and check_memory(toy.config, CachePolicy(), 1000, needed) == needed
    with pytest.raises(UsageError, match=f"1000 tokens needs {needed} bytes, {needed - 1} bytes of memory are"):
        check_memory(toy.config, CachePolicy(), 1000, needed - 1)


def test_weights_that_are_no_numbers_are_named() -> None:
    model = mixkv.load("toy")
    weight = model.transformer.weights.layers[1].mlp.down.weight
    weight[0, 0] = np.nan
    with pytest.raises(NumericalError, match="layer 1 gives NaN"):
        measure(model, tokens(50), CachePolicy())


# --- the default model ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_windows_rank_as_by_divergence(default_model: Any) -> None:
    ids = default_model.encode(default_text())[:600]
    policy, windows = CachePolicy(k_bits=3, v_bits=3), [0, 64, 192, 448]
    curve = measure(default_model, ids, policy, windows)
    kld = [
        evaluate(Session(default_model, CachePolicy.full()), Session(default_model, replace(policy, window=w)), ids)
        for w in windows
    ]
    assert (np.diff(curve.errors) < 0).all() and (np.diff([each.kld.mean for each in kld]) < 0).all()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_the_curve_of_a_model_with_sliding_windows_is_that_of_shadow_mode(name: str) -> None:
    """Soft-caps, windows of their own in some layers, and sink logits; the first layer's inputs are the same in both."""
    model = mixkv.load(str(Path(__file__).parents[2] / "data" / "tiny_models" / name), "f32")
    ids, policy = (
        np.random.default_rng(0).integers(3, 60, 100),
        CachePolicy(sinks=2, tile=32, k_bits=2, v_bits=3, k_group=0),
    )
    curve = measure(model, ids, policy, [0, 10, 40])
    for i, window in enumerate(curve.windows):
        session = mixkv.Session(model, replace(policy, window=window), shadow=True)
        session.forward(ids, None)
        np.testing.assert_allclose(curve.by_head[i, 0], session.local_errors()["both"][0], rtol=2e-3, atol=1e-6)
