"""``LayerWindows``: the local errors of one layer for every window at once, by merging partial attentions.

With b tiles in codes, the output of a query at position p is that over three disjoint sets of keys:

    out(b) = merge(coded(b), dense(b))    coded(b): sinks, and tiles below b in codes    dense(b): from tile b to p, dense

Of a window w only b = max(0, (p + 1 - w) // tile) matters. ``coded`` grows from b to b + 1 by attending to one tile more
with the state that there is, ``dense`` likewise from b + 1 down to b. So one walk up the codes and one down the dense tiles
give both for every b: two attentions in all, and a merge for each b, instead of an attention for each window.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...engine.layer import LayerCache
from ...engine.policy import CachePolicy
from ...kernels.flash import attend
from ...kernels.hadamard import rotated
from ...kernels.segment import Int64, Segment, segment_of_arrays
from ...kernels.state import empty_state, merge_partials, pad_last_axis
from ...kernels.threads import get_num_threads, set_num_threads
from ...models.transformer import Softmax

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

BLOCK = 512  # queries that are taken through all tiles together, by one thread; fewer where threads would be idle,
LEAST = 64  # but not below this
ROOM, LEAST_ROOM = 1 << 27, 1 << 24  # bytes of blocks' outputs, one for each b: of all threads, and of each at least


class LayerWindows:
    """Finds the errors of one layer after the other; the memory for it is kept from one to the next.

    Threads have blocks of queries of their own, and wait for each other at a layer's end only.

    Args:
        policy: one tier, no overrides; its window does not matter.
        windows: (W,) numbers of tokens.
        n_kv_heads, head_dim: shape of a token's keys.

    """

    def __init__(self, policy: CachePolicy, windows: Int64, n_kv_heads: int, head_dim: int) -> None:
        self._policy, self._windows = policy, windows
        self._shape = n_kv_heads, head_dim
        self._threads = get_num_threads()
        self._room = room_nbytes(self._threads) // self._threads  # of a thread
        self._rooms = [np.zeros(self._room // 4, np.float32) for _ in range(self._threads)]

    def __call__(
        self, qkv: Float32, softmax: Softmax, out: Float32 | None = None, sliding_window: int | None = None
    ) -> tuple[Float64, Float64]:
        """Sums of squares over the queries of a text: of errors (W, H), and of the outputs over dense keys (H,).

        Args:
            qkv: float32 (T, H + 2 * n_kv_heads, head_dim), queries, keys and values from position 0 on. It may be changed.
            softmax: scale, soft-cap and sink logits.
            out: float32 (T, H, head_dim), where the outputs over dense keys go.
            sliding_window: how many positions a query sees, itself included; None for all.

        Raises:
            NumericalError: keys or values that the codes cannot hold.

        """
        n_heads = qkv.shape[1] - 2 * self._shape[0]
        if out is None:
            out = np.empty((len(qkv), n_heads, qkv.shape[2]), np.float32)
        qkv = pad_last_axis(qkv)
        cache = _stored(self._policy, qkv, *self._shape)  # queries are rotated by it, too

        def of_block(span: tuple[int, int]) -> tuple[Float64, Float64]:
            q = np.ascontiguousarray(qkv[span[0] : span[1], :n_heads])
            seen = np.arange(span[0] + 1, span[1] + 1)
            lowest = np.zeros_like(seen) if sliding_window is None else np.maximum(seen - sliding_window, 0)
            room = self._rooms.pop()
            try:
                with np.errstate(invalid="ignore", over="ignore"):
                    block = _Block(cache, q, (lowest, seen), self._tiles(seen), softmax)
                    return block.squares(room, out[slice(*span)])
            finally:
                self._rooms.append(room)

        spans = self._spans(len(qkv), qkv[0, :n_heads].nbytes)[::-1]  # the longest work first
        with ThreadPoolExecutor(self._threads, initializer=set_num_threads, initargs=(1,)) as pool:
            errors, outputs = zip(*pool.map(of_block, spans), strict=True)
        return np.sum(errors, axis=0), np.sum(outputs, axis=0)

    def _tiles(self, seen: Int64) -> Int64:
        """B(p) / tile for each window, (W, T), of queries that see so many positions."""
        return np.maximum((seen - self._windows[:, None]) // self._policy.tile, 0)

    def _spans(self, n_queries: int, nbytes: int) -> list[tuple[int, int]]:
        """Blocks of queries, first and last + 1, for whose outputs, of so many bytes each, there is room."""
        spans, first = list[tuple[int, int]](), 0
        most = min(BLOCK, max(LEAST, n_queries // (4 * self._threads)))
        while first < n_queries:
            count = min(most, n_queries - first)
            while count > 1:
                kept = len(_steps(self._tiles(np.arange(first + 1, first + count + 1))))
                if kept * count * nbytes <= self._room:
                    break
                count = max(1, self._room // (kept * nbytes))
            spans.append((first, first + count))
            first += count
        return spans


def room_nbytes(threads: int) -> int:
    """Bytes of the outputs that are kept at one time."""
    return threads * max(ROOM // threads, LEAST_ROOM)


def _steps(tiles: Int64) -> Int64:
    """The numbers of coded tiles for which something has to be known, ascending, 0 (the exact output) always."""
    return np.unique(np.append(tiles, 0))


class _Block:
    """A block of queries of a layer.

    Args:
        cache: the layer's dense tiles, and codes.
        q: float32 (T, H, width), as the cache's keys are rotated.
        seen: (T,) each, the first position that each query sees, and one past the last, itself.
        tiles: (W, T) how many of the tiles are codes, for each window.
        softmax: scale, soft-cap and sink logits.

    """

    def __init__(
        self, cache: LayerCache, q: Float32, seen: tuple[Int64, Int64], tiles: Int64, softmax: Softmax
    ) -> None:
        self._cache, self._q, self._tiles, self._softmax = cache, q, tiles, softmax
        self._lowest, self._seen = seen
        self._most, self._steps = tiles.max(axis=0), _steps(tiles)
        self._tile, last = cache.policy.tile, int(self._seen[-1])
        self._dense, self._coded = cache.recent.segment(0, last), cache.old.segment(0, cache.old.stop * self._tile)

    def squares(self, room: Float32, out_dense: Float32) -> tuple[Float64, Float64]:
        """Sums of squares as of ``LayerWindows``, (W, H) and (H,).

        Args:
            room: memory of numbers that are finite.
            out_dense: (T, H, head_dim), where the outputs over dense keys go.

        """
        (n_queries, n_heads, _), head_dim = self._q.shape, self._cache.head_dim
        outs, states = self._down(room)
        out, state = np.zeros_like(self._q), self._softmax.first_state(n_heads, n_queries)
        self._see_sinks(out, state)
        merge_partials(out[None], state[None], outs[0], states[0])
        exact = outs[0, ..., :head_dim]  # behind it codes have copies of the last channel
        out_dense[...] = rotated(exact) if self._cache.policy.rotates[1] else exact
        found = np.zeros((len(self._steps), n_queries, n_heads))
        for i in range(1, len(self._steps)):
            first = int(np.argmax(self._most >= self._steps[i]))  # no query before has so many tiles in codes
            stops = np.where(self._most >= self._steps[i], self._steps[i] * self._tile, 0)
            self._see(self._coded, int(self._steps[i - 1]), stops, out, state)
            own, other = (np.ascontiguousarray(x[:, first:]) for x in (states[i], state))
            merge_partials(out[None, first:], other[None], outs[i, first:], own)
            off = outs[i, first:, :, :head_dim]
            off -= exact[first:]
            found[i, first:] = np.einsum("thd,thd->th", off, off)
        by_window = found[np.searchsorted(self._steps, self._tiles), np.arange(n_queries)]  # (W, T, H)
        return by_window.sum(axis=1), np.einsum("thd,thd->h", exact, exact, dtype=np.float64)

    def _down(self, room: Float32) -> tuple[Float32, Float32]:
        """For each step b the attention over all dense keys from tile b on.

        Returns outs (steps, T, H, width), which lie in ``room`` if they fit, and states (steps, H, T, 2).
        """
        shape = len(self._steps), *self._q.shape
        size = math.prod(shape)
        outs = (room[:size] if size <= room.size else np.zeros(size, np.float32)).reshape(shape)
        states = np.empty((len(self._steps), shape[2], shape[1], 2), np.float32)
        above: Int64 = self._seen
        for i in range(len(self._steps) - 1, -1, -1):
            if i == len(self._steps) - 1:
                states[i] = empty_state(shape[2], shape[1])
            else:
                first = int(np.searchsorted(self._seen, above[0], "right"))  # no query before has seen anything yet
                outs[i, first:], states[i] = outs[i + 1, first:], states[i + 1]
            self._see(self._dense, int(self._steps[i]), np.minimum(above, self._seen), outs[i], states[i])
            above = np.full(len(self._seen), self._steps[i] * self._tile)
        return outs, states

    def _see_sinks(self, out: Float32, state: Float32) -> None:
        """Continue over the sinks."""
        stops = np.minimum(self._seen, self._cache.sinks)
        segment = segment_of_arrays(self._cache.sink_k, self._cache.sink_v)
        self._attend(segment, self._lowest, stops, out, state)

    def _see(self, segment: Segment, first_tile: int, stops: Int64, out: Float32, state: Float32) -> None:
        """Continue over the positions from a tile on, without sinks, up to ``stops`` (T,)."""
        self._attend(
            segment, np.maximum(self._lowest, max(first_tile * self._tile, self._cache.sinks)), stops, out, state
        )

    def _attend(self, segment: Segment, starts: Int64, stops: Int64, out: Float32, state: Float32) -> None:
        scale, softcap = self._softmax.scale, self._softmax.softcap
        attend(self._q, segment, starts, np.maximum(stops, starts), out, state, scale=scale, softcap=softcap)


# --- tiles, as a session makes them ------------------------------------------------------------------------------


def _stored(policy: CachePolicy, qkv: Float32, n_kv_heads: int, head_dim: int) -> LayerCache:
    """Keys and values of a text in a cache that holds every tile densely, and every full one in codes as well.

    So it stays without a ``commit``, which would forget dense tiles that are out of sight.
    """
    cache = LayerCache(replace(policy, window=0), n_kv_heads, head_dim, len(qkv))
    cache.attend(qkv, 0, Softmax(1.0), first=len(qkv))
    return cache
