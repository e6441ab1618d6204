"""The promise of the cache: what a query sees does not depend on how the text was cut, and no token is rounded twice."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv.engine.layer
from mixkv.engine.cache import Cache
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy
from mixkv.kernels.layout import F32, LANES
from mixkv.kernels.segment import TileStore
from mixkv.models.errors import NumericalError
from mixkv.models.transformer import Softmax

from .stored import held_tiles

N, HEADS, DIM = 500, 2, 32
BITS = [(4, 4), (8, 8), (8, 4), (4, 8), (16, 16), (32, 32), (4, 16), (3, 2), (2, 3)]

Draw = Callable[..., tuple[NDArray[np.float32], ...]]
Feed = Callable[..., NDArray[np.float32]]


def small(**fields: object) -> CachePolicy:
    return CachePolicy(**{"window": 32, "sinks": 2, **fields})  # type: ignore[arg-type]


def plain(**fields: object) -> CachePolicy:
    """Without rotation: what is stored are the numbers themselves."""
    return CachePolicy(**{"rotate_k": False, "rotate_v": False, **fields})  # type: ignore[arg-type]


def cuts(size: int, n: int = N) -> list[int]:
    return [*range(0, n, size), n]


def scales_of_k(cache: LayerCache, t: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Scales and minima (heads, width) that an old tile stores for K."""
    layout, (page, slot) = cache.old.layout, cache.old.place(t)
    pairs = layout.params(page, layout.k)[:, slot].copy().view(np.float16)
    return pairs[:, : layout.width], pairs[:, layout.width :]


# --- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", ["f16", "f32"])
@pytest.mark.parametrize(("k_bits", "v_bits"), BITS)
def test_chunks_change_neither_the_codes_nor_a_bit_of_the_output(
    draw_qkv: Draw, feed: Feed, k_bits: int, v_bits: int, dense: str
) -> None:
    """The same keys, values and queries of 500 tokens, fed one by one, by 7, by 64 and all at once."""
    qkv, policy = draw_qkv(1, N), small(k_bits=k_bits, v_bits=v_bits, dense=dense)
    once = LayerCache(policy, HEADS, DIM)
    expected = feed(once, qkv, [0, N])
    assert once.old.stop * policy.tile >= 200, "so few sealed tokens prove nothing"
    for size in (1, 7, 64):
        cache = LayerCache(policy, HEADS, DIM)
        outs = feed(cache, qkv, cuts(size))
        np.testing.assert_allclose(outs, expected, rtol=0, atol=1e-5)
        assert outs.tobytes() == expected.tobytes(), f"chunks of {size}: same to 1e-5, but not bit for bit"
        assert held_tiles(cache.old) == held_tiles(once.old)
        assert cache.nbytes() == once.nbytes()


@pytest.mark.parametrize("n_rep", [1, 3, 8])
def test_chunks_change_no_bit_beyond_one_split_of_the_kernel(draw_qkv: Draw, feed: Feed, n_rep: int) -> None:
    """1,100 tokens: the kernel cuts keys at 512 and 1,024, and few queries and many take different ways through it."""
    qkv, n = draw_qkv(12, 1100, HEADS, n_rep), 1100
    expected = feed(LayerCache(small(), HEADS, DIM), qkv, [0, n])
    for size in (1, 7, 300):
        cache = LayerCache(small(), HEADS, DIM)
        assert feed(cache, qkv, cuts(size, n)).tobytes() == expected.tobytes(), f"chunks of {size}"


def test_the_codes_matter_to_the_output(draw_qkv: Draw, feed: Feed) -> None:
    """So that the test above compares something: 4 bits, 8 bits and float32 give different outputs, 8 the closer one."""
    qkv = draw_qkv(1, N)
    outs = {
        bits: feed(LayerCache(small(k_bits=bits, v_bits=bits, dense="f32"), HEADS, DIM), qkv, [0, N])
        for bits in (4, 8, 32)
    }
    errors = {bits: np.abs(outs[bits] - outs[32]).max() for bits in (4, 8)}
    assert 1e-4 < errors[8] < errors[4] / 4


def test_a_new_query_far_behind_sees_the_same_old_tokens_however_they_came(draw_qkv: Draw, feed: Feed) -> None:
    """Irregular cuts, on tile borders and one beside them, then one more token."""
    qkv = draw_qkv(2, N)
    expected = feed(LayerCache(small(), HEADS, DIM), qkv, [0, N - 1, N])[-1]
    for irregular in ([0, 63, 64, 65, 128, N - 1, N], [0, 1, 97, 98, 400, N - 1, N], [0, 95, 96, 191, 192, N - 1, N]):
        cache = LayerCache(small(), HEADS, DIM)
        assert feed(cache, qkv, irregular)[-1].tobytes() == expected.tobytes()


# --- each token is rounded once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, N])
def test_every_token_is_quantized_exactly_once(
    draw_qkv: Draw, feed: Feed, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channel 0 of the first key head holds each token's number, so the calls of the quantizer tell what they got."""
    q, k, v = draw_qkv(3, N)
    k[:, 0, 0] = np.arange(N)
    cache, due, seen = LayerCache(small(rotate_k=False), HEADS, DIM), [], []
    seal_job, attend_segments = mixkv.engine.layer.seal_job, mixkv.engine.layer.attend_segments

    def noting(source: TileStore, target: TileStore, tile: int, dead: int, fitted: bool) -> list[int]:
        assert (source, target) == (cache.recent, cache.old)
        due.append(tile)
        return seal_job(source, target, tile, dead, fitted)

    def recording(*call: object) -> None:
        attend_segments(*call)
        for tile in due:  # what the kernel has just read
            page, slot = cache.recent.place(tile)
            seen.append(cache.recent.layout.dense_k(page)[0, slot, 0].astype(int).tolist())
        due.clear()

    monkeypatch.setattr(mixkv.engine.layer, "seal_job", noting)
    monkeypatch.setattr(mixkv.engine.layer, "attend_segments", recording)
    feed(cache, (q, k, v), cuts(size))
    sealed = small().boundary(N - 1)
    assert sealed >= 200
    assert sum(seen, []) == list(range(sealed))
    assert cache.tiles_quantized == len(seen) == sealed // small().tile
    assert [len(tile) for tile in seen] == [small().tile] * len(seen)


def test_nothing_is_quantized_where_the_old_segment_is_as_precise(draw_qkv: Draw, feed: Feed) -> None:
    """Its tiles are copies of the dense ones."""
    cache, (q, k, v) = LayerCache(CachePolicy.full(), HEADS, DIM), draw_qkv(4, 200)
    feed(cache, (q, k, v), cuts(7, 200))
    assert cache.tiles_quantized == 0 and cache.old.stop == 200 // 64
    for t in range(3):
        layout, (page, slot) = cache.old.layout, cache.old.place(t)
        rows = slice(64 * t, 64 * (t + 1))
        np.testing.assert_array_equal(layout.dense_k(page)[:, slot], k[rows].transpose(1, 2, 0))
        np.testing.assert_array_equal(layout.dense_v(page)[:, slot], v[rows].transpose(1, 0, 2))


def test_the_dense_form_is_forgotten_when_no_query_can_see_it_any_more(draw_qkv: Draw, feed: Feed) -> None:
    """Position by position: old and recent together hold every token, and twice at most what one chunk brought."""
    policy, qkv = small(), draw_qkv(5, 300)
    cache = LayerCache(policy, HEADS, DIM)
    for p in range(300):
        feed(cache, qkv, [p, p + 1])
        assert cache.old.stop * policy.tile == policy.boundary(p)
        assert cache.recent.stop == p // policy.tile + 1
        next_boundary = policy.boundary(p + 1)
        assert cache.recent.first * policy.tile == min(next_boundary, cache.old.stop * policy.tile)


# --- dead sinks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scales", ["fit", "range"])
def test_sinks_are_dead_in_their_tile_and_do_not_widen_the_scales_of_k(
    draw_qkv: Draw, feed: Feed, bits: int, scales: str
) -> None:
    q, k, v = draw_qkv(6, 200)
    policy = small(sinks=5, k_bits=bits, rotate_k=False, scales=scales)
    ordinary = LayerCache(policy, HEADS, DIM)
    feed(ordinary, (q, k, v), [0, 200])
    loud = k.copy()
    loud[:5] = np.float32(60_000) * np.sign(k[:5])
    cache = LayerCache(policy, HEADS, DIM)
    feed(cache, (q, loud, v), [0, 200])
    for ours, theirs in zip(*(scales_of_k(c, 0) for c in (cache, ordinary)), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    if scales == "fit" and bits < 8:
        return
    # And they are those of the live tokens alone.
    live = k[5:64].astype(np.float16).astype(np.float32)
    scale, minimum = scales_of_k(cache, 0)
    assert np.array_equal(minimum, live.min(axis=0).astype(np.float16))
    assert np.array_equal(scale, ((live.max(axis=0) - live.min(axis=0)) / (2**bits - 1)).astype(np.float16))
    # In the next tile nothing is dead.
    live = k[64:128].astype(np.float16).astype(np.float32)
    assert np.array_equal(scales_of_k(cache, 1)[1], live.min(axis=0).astype(np.float16))


def test_a_tile_of_nothing_but_sinks_is_harmless(draw_qkv: Draw, feed: Feed) -> None:
    """70 sinks: tile 0 is dead from end to end. The outputs are those of tokens that were never rounded."""
    qkv = draw_qkv(7, 130)
    policy = CachePolicy(window=0, sinks=70, tile=64, dense="f32")
    cache = LayerCache(policy, HEADS, DIM)
    outs = feed(cache, qkv, cuts(13, 130))
    exact = feed(LayerCache(CachePolicy.full(), HEADS, DIM), qkv, [0, 130])
    assert cache.old.stop == 2
    np.testing.assert_allclose(outs[:127], exact[:127], rtol=0, atol=1e-5)  # 127 is the first that sees codes
    assert np.abs(outs[127:] - exact[127:]).max() > 1e-4


# --- faults 24 and 25 ---------------------------------------------------------------------------------------------


def reference(qkv: tuple[NDArray[np.float32], ...], dtype: type = np.float64) -> NDArray[np.float64]:
    """Causal attention over all tokens in float64, keys and values rounded to ``dtype`` first."""
    q, k, v = qkv
    k, v = (np.repeat(x.astype(dtype).astype(np.float64), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("thd,nhd->htn", q.astype(np.float64), k) * q.shape[2] ** -0.5
    logits = np.where(np.arange(len(k)) <= np.arange(len(q))[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return np.einsum("htn,nhd->thd", weights / weights.sum(axis=2, keepdims=True), v)


@pytest.mark.fault("empty-segments")
@pytest.mark.parametrize(
    "policy",
    [
        plain(window=1 << 24),
        plain(window=101, sinks=0),
        plain(window=101, sinks=1000),
        plain(window=0, sinks=1000),
        plain(window=0, sinks=100),
    ],
    ids=str,
)
def test_a_window_larger_than_the_context_or_more_sinks_than_tokens_lose_nothing(
    draw_qkv: Draw, feed: Feed, policy: CachePolicy
) -> None:
    qkv = draw_qkv(8, 100)
    expected = reference(qkv, np.float16)
    for size in (1, 33, 100):
        outs = feed(LayerCache(policy, HEADS, DIM), qkv, cuts(size, 100))
        np.testing.assert_allclose(outs, expected, rtol=0, atol=1e-5)


@pytest.mark.fault("empty-segments")
@pytest.mark.parametrize("policy", [plain(), plain(window=0, sinks=0), plain(sinks=1)], ids=str)
def test_a_single_key_gives_its_value_and_every_other_segment_is_empty(
    draw_qkv: Draw, feed: Feed, policy: CachePolicy
) -> None:
    q, k, v = draw_qkv(9, 1)
    outs = feed(LayerCache(policy, HEADS, DIM), (q, k, v), [0, 1])
    assert np.array_equal(outs, np.repeat(v.astype(np.float16).astype(np.float32), 2, axis=1))


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("rotate", [False, True])
def test_values_beyond_float16_are_kept_wider_and_only_these(
    draw_qkv: Draw, feed: Feed, side: str, rotate: bool
) -> None:
    """Fault row 24: outputs depend on no cut, fork or truncation, and numbers that fit are rounded as ever."""
    policy = small(k_bits=8, v_bits=8, rotate_k=rotate, rotate_v=rotate, rollback=80)
    qkv = draw_qkv(10, 300)
    wild = tuple(x.copy() for x in qkv)
    wild["qkv".index(side)][75, 1, 3] = -900_000
    once = LayerCache(policy, HEADS, DIM)
    expected = feed(once, wild, [0, 300])
    assert np.isfinite(expected).all() and once.recent.layout.k_kind == F32
    for size in (1, 7, 64):
        cache = LayerCache(policy, HEADS, DIM)
        assert feed(cache, wild, cuts(size, 300)).tobytes() == expected.tobytes(), f"chunks of {size}"
        assert held_tiles(cache.old) == held_tiles(once.old)
    plain = feed(LayerCache(policy, HEADS, DIM), qkv, [0, 300])
    assert expected[:75].tobytes() == plain[:75].tobytes(), "before it, nothing is kept otherwise"
    if policy.rotates == (False, False):
        k, v, coded = once.values(256, 300)
        assert not coded.any()
        for found, given in ((k, wild[1]), (v, wild[2])):
            np.testing.assert_array_equal(found, given[256:].astype(np.float16).astype(np.float32))
    once.truncate(220)
    other = once.fork()
    for cache in (once, other):
        rows = np.concatenate([x[220:] for x in wild], axis=1)
        assert cache.attend(rows, 220, Softmax(DIM**-0.5)).tobytes() == expected[220:].tobytes()


def test_a_value_beyond_float16_that_a_tier_of_float16_is_to_hold_names_layer_and_position(draw_qkv: Draw) -> None:
    qkv = draw_qkv(10, 120)
    broken = tuple(x.copy() for x in qkv)
    broken[1][5, 1, 3] = -70_000

    def steps(cache: Cache, data: tuple[NDArray[np.float32], ...], position: int, stop: int) -> list[bytes]:
        rows = np.concatenate([x[position:stop] for x in data], axis=1)
        outs = [cache.attend(i, rows, position, Softmax(0.2)).tobytes() for i in range(3)]
        cache.commit(stop)
        return outs

    policy = small(k_bits=16)
    expected = Cache(policy, 3, HEADS, DIM)
    wanted = [steps(expected, qkv, 0, 120)]
    cache = Cache(policy, 3, HEADS, DIM)
    cache.attend(0, np.concatenate(qkv, axis=1), 0, Softmax(0.2))
    with pytest.raises(NumericalError) as caught:
        cache.attend(1, np.concatenate(broken, axis=1), 0, Softmax(0.2))
    message = str(caught.value)
    assert message.startswith("layer 1, position 0: tile 0 cannot be quantized: ") and "\n" not in message
    assert "dense='f32'" in message
    cache.truncate(0)
    assert steps(cache, qkv, 0, 120) == wanted[0]
    # What the message proposes works.
    wide = LayerCache(small(dense="f32", k_bits=32, v_bits=32), HEADS, DIM)
    out = wide.attend(np.concatenate(broken, axis=1), 0, Softmax(0.2))
    assert np.isfinite(out).all()


def test_head_dims_that_are_no_multiple_of_the_vector_are_padded_in_every_segment(draw_qkv: Draw, feed: Feed) -> None:
    for head_dim in (2, 20):
        qkv = draw_qkv(11, 150, head_dim=head_dim)
        policy = CachePolicy(window=40, sinks=3, k_bits=32, v_bits=32, dense="f32", tile=32)
        cache = LayerCache(policy, HEADS, head_dim)
        assert cache.sink_k.shape[2] % LANES == 0 and cache.sink_k.shape[2] - head_dim < LANES
        outs = feed(cache, qkv, cuts(11, 150))
        assert outs.shape == qkv[0].shape and cache.old.stop == 3
        np.testing.assert_allclose(outs, reference(qkv), rtol=0, atol=1e-5)


def test_sinks_of_which_there_are_only_codes_are_counted_as_not_restored(draw_qkv: Draw, feed: Feed) -> None:
    """When another policy takes over: two of its eight sinks were dense before, six are decoded."""
    cache, other = (LayerCache(CachePolicy(window=0, sinks=sinks, tile=32), HEADS, DIM) for sinks in (2, 8))
    feed(cache, draw_qkv(13, 64), [0, 64])
    assert other.take_over(cache, 64) == {"requantized": 0, "not_restored": 6}
