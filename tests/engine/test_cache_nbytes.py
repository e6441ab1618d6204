"""nbytes says what is really held, and that is less than a third of a float16 cache at 4 bits."""

import ctypes
import mmap
import sys
import tracemalloc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv.engine.layer
from mixkv.engine.cache import Cache
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy
from mixkv.kernels.layout import TileLayout
from mixkv.kernels.segment import TileStore
from mixkv.models.transformer import Softmax

Float32 = NDArray[np.float32]
Feed = Callable[..., Float32]
Draw = Callable[..., tuple[Float32, ...]]

POLICIES = [
    CachePolicy(),
    CachePolicy(k_bits=8, v_bits=4, window=10, sinks=0, tile=32, dense="bf16"),
    CachePolicy(k_bits=2, v_bits=3, window=10),
    CachePolicy(k_bits=16, v_bits=16, sinks=300),
    CachePolicy(k_bits=32, v_bits=32, window=0, sinks=70, tile=128),
    CachePolicy(window=100_000),
    CachePolicy.full(),
]


def pages_of(store: TileStore) -> dict[int, tuple[np.ndarray, int]]:
    """By address, the pages of the tiles that a store holds, and how many of them each has."""
    found: dict[int, tuple[np.ndarray, int]] = {}
    for t in range(store.first, store.stop):
        page, slot = store.place(t)
        assert page.nbytes == store.layout.page_tiles * store.layout.nbytes and slot == t % store.layout.page_tiles
        found[page.ctypes.data] = page, found.get(page.ctypes.data, (page, 0))[1] + 1
    return found


def held(cache: LayerCache) -> dict[str, int]:
    """Bytes of the tiles in use in the pages of a layer's cache, and of its arrays of sinks."""
    old, recent = pages_of(cache.old), pages_of(cache.recent)
    assert not old.keys() & recent.keys()
    return {
        "sink": cache.sink_k.nbytes + cache.sink_v.nbytes,
        "old": sum(tiles for _, tiles in old.values()) * cache.old.layout.nbytes,
        "recent": sum(tiles for _, tiles in recent.values()) * cache.recent.layout.nbytes,
    }


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nbytes_is_the_sum_of_the_buffers_that_are_held(draw_qkv: Draw, feed: Feed, policy: CachePolicy) -> None:
    for n, size in ((1, 1), (700, 512), (700, 9)):
        cache = LayerCache(policy, 2, 32)
        feed(cache, draw_qkv(1, n), [*range(0, n, size), n])
        found = cache.nbytes()
        assert found == held(cache)
        dense_tile, old_tile = (t.nbytes for t in (policy.dense_layout(2, 32), policy.old_layout(2, 32)))
        boundary = min(policy.boundary(n), policy.boundary(n - 1))
        assert found["old"] == boundary // policy.tile * old_tile
        assert found["recent"] == (-(-n // policy.tile) - boundary // policy.tile) * dense_tile


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nbytes_is_what_was_asked_of_the_system(
    draw_qkv: Draw, feed: Feed, policy: CachePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left that nbytes does not know of: no page of tiles, nor a buffer that tracemalloc sees."""
    taken: list[weakref.ref] = []
    original = TileLayout.empty_page

    def watched(self: TileLayout) -> np.ndarray:
        page = original(self)
        taken.append(weakref.ref(page))
        return page

    monkeypatch.setattr(TileLayout, "empty_page", watched)
    qkv = draw_qkv(2, 2000, head_dim=64)
    cuts = [*range(0, 2000, 500), 2000]
    feed(LayerCache(policy, 2, 64), qkv, cuts)  # what is allocated once and for all
    taken.clear()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache = LayerCache(policy, 2, 64)
        feed(cache, qkv, cuts)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    counted, old, recent = cache.nbytes(), pages_of(cache.old), pages_of(cache.recent)
    alive = [page for ref in taken if (page := ref()) is not None]
    assert {page.ctypes.data for page in alive} == old.keys() | recent.keys()
    # All of them are full, but for the last one of old tiles, which costs what has been written to it: see below.
    partial = cache.old.stop % cache.old.layout.page_tiles
    unused = (cache.old.layout.page_tiles - partial) * cache.old.layout.nbytes if partial else 0
    assert sum(page.nbytes for page in alive) == counted["old"] + counted["recent"] + unused
    # Beside pages and sinks: for each tile a few Python objects and four addresses, under 600 bytes.
    many = cache.old.stop + cache.recent.stop - cache.recent.first
    assert counted["sink"] <= grown <= counted["sink"] + 600 * many + 16_000


def resident(page: np.ndarray) -> int:
    """Bytes of a page of tiles that are in memory."""
    steps = -(-page.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * steps)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    assert libc.mincore(page.ctypes.data, page.nbytes, found) == 0
    return sum(x & 1 for x in found) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which memory is in use")
@pytest.mark.parametrize("tiles", range(9))
def test_a_page_takes_up_room_as_it_is_written_to(draw_qkv: Draw, feed: Feed, tiles: int) -> None:
    """In whole steps of the system's memory: scales and codes of K and of V are four runs for each head."""
    policy, heads = CachePolicy(window=0, sinks=0), 4
    cache = LayerCache(policy, heads, 128)
    n = tiles * policy.tile
    if n:
        feed(cache, draw_qkv(6, n, heads, 1, 128), [0, n])
    page, _ = cache.old.place(0)
    assert page.nbytes == 8 * cache.old.layout.nbytes
    used = cache.nbytes()["old"]
    assert used == tiles * cache.old.layout.nbytes
    assert used <= resident(page) <= min(used + bool(n) * 4 * heads * mmap.PAGESIZE, page.nbytes + mmap.PAGESIZE)


def test_a_cache_sums_its_layers(draw_qkv: Draw) -> None:
    qkv = draw_qkv(3, 300)
    cache = Cache(CachePolicy(), 3, 2, 32)
    assert cache.nbytes() == {"sink": 3 * 2 * 4 * 2 * 32 * 2, "old": 0, "recent": 0, "total": 1536 * 2}
    for layer in range(3):
        cache.attend(layer, np.concatenate(qkv, axis=1), 0, Softmax(0.1))
    cache.commit(300)
    parts = [layer.nbytes() for layer in cache.layers]
    assert parts[2]["old"] > parts[1]["old"] == parts[0]["old"] > 0, "40 tokens ahead of the first, here a tile"
    sums = {name: sum(part[name] for part in parts) for name in ("sink", "old", "recent")}
    assert cache.nbytes() == {**sums, "total": sum(sums.values())}


@pytest.mark.parametrize("n", [4096, 4159])
def test_four_bits_take_at_most_32_percent_of_float16_at_4096_tokens(
    draw_qkv: Draw, feed: Feed, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of the default model: 30 layers, 3 KV heads, head_dim 64; policy as by default.

    One layer stands for the 30: every layer holds the same number of tiles of the same layout, whatever is in them.
    4,159 tokens are the worst case near by: one more, and another tile is sealed. The kernel is left out, since memory
    is what is measured.
    """
    monkeypatch.setattr(mixkv.engine.layer, "attend_segments", lambda *_, **__: None)
    policy = CachePolicy(window=128, sinks=4, k_bits=4, v_bits=4, dense="f16")
    cache = LayerCache(policy, 3, 64)
    feed(cache, draw_qkv(4, n, 3, 3, 64), [*range(0, n, 512), n])
    total = 30 * sum(cache.nbytes().values())
    assert total == 30 * sum(held(cache).values())
    float16 = 30 * n * 2 * 3 * 64 * 2
    assert total / float16 <= 0.32
    assert policy.boundary(4159) == policy.boundary(4158) + 64, "4,159 tokens would not be the worst case"


def test_a_long_prompt_is_never_held_dense_and_coded_at_once(
    draw_qkv: Draw, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 16 chunks, dense tiles never hold more than a chunk, the window and a tile on either side of them."""
    policy, n, size = CachePolicy(), 4096, 256
    cache = LayerCache(policy, 1, 32)
    largest = 0

    def watched(*_: object) -> None:
        nonlocal largest
        largest = max(largest, cache.nbytes()["recent"])

    monkeypatch.setattr(mixkv.engine.layer, "attend_segments", watched)
    feed(cache, draw_qkv(5, n, 1, 1, 32), [*range(0, n, size), n])
    assert 0 < largest <= (size + policy.window + 2 * policy.tile) * 2 * 32 * 2
    assert cache.nbytes()["recent"] <= (policy.window + 2 * policy.tile) * 2 * 32 * 2
