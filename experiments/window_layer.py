"""``LayerWindows``: the local errors of one layer for every window at once, by merging partial attentions.

With b tiles in codes, the output of a query at position p is that over three disjoint sets of keys:

    out(b) = merge(coded(b), dense(b))    coded(b): sinks, and tiles below b in codes    dense(b): from tile b to p, dense

Of a window w only b = max(0, (p + 1 - w) // tile) matters. ``coded`` grows from b to b + 1 by attending to one tile more
with the state that there is, ``dense`` likewise from b + 1 down to b. So one walk up the codes and one down the dense tiles
give both for every b: two attentions in all, and a merge for each b, instead of an attention for each window.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numba
import numpy as np
from numpy.typing import NDArray

from ..engine.cache import LayerCache, View
from ..engine.policy import CachePolicy
from ..kernels.flash import attend
from ..kernels.segment import Int64, Segment, segment_of_arrays
from ..kernels.state import empty_state, merge_partials, pad_last_axis
from ..kernels.tables import N_PARTS, RANGES, STEP

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

BLOCK = 1024  # queries that are taken through all tiles together
PIECE = 256  # of these, whose outputs are merged together: the second-level cache holds them
ROOM = 1 << 27  # bytes of a block's outputs, one for each b; blocks are smaller where these would not do


class LayerWindows:
    """Finds the errors of one layer after the other; what it needs room for is kept from one to the next.

    Args:
        policy: one tier, no overrides; its window does not matter.
        windows: (W,) numbers of tokens.
        n_kv_heads, head_dim: shape of a token's keys.

    """

    def __init__(self, policy: CachePolicy, windows: Int64, n_kv_heads: int, head_dim: int) -> None:
        self._policy, self._windows = policy, windows
        self._shape = n_kv_heads, head_dim
        self._room = np.empty(0, np.float32)

    def __call__(self, qkv: Float32, scale: float) -> tuple[Float64, Float64]:
        """Sums of squares over the queries of a text: of errors (W, H), and of the outputs over dense keys (H,).

        Args:
            qkv: float32 (T, H + 2 * n_kv_heads, head_dim), queries, keys and values from position 0 on. It may be changed.
            scale: softmax scale.

        Raises:
            NumericalError: keys or values that the codes cannot hold.

        """
        n_heads = qkv.shape[1] - 2 * self._shape[0]
        qkv = pad_last_axis(qkv)
        cache = _stored(self._policy, qkv, *self._shape)  # queries are rotated by it, too
        errors, outputs = np.zeros((len(self._windows), n_heads)), np.zeros(n_heads)
        first = 0
        while first < len(qkv):
            stop = first + self._block(first, len(qkv), qkv[0, :n_heads].nbytes)
            q = np.ascontiguousarray(qkv[first:stop, :n_heads])
            of_block = self._walk(cache, q, np.arange(first + 1, stop + 1), scale)
            errors, outputs, first = errors + of_block[0], outputs + of_block[1], stop
        return errors, outputs

    def _tiles(self, seen: Int64) -> Int64:
        """B(p) / tile for each window, (W, T), of queries that see so many positions."""
        return np.maximum((seen - self._windows[:, None]) // self._policy.tile, 0)

    def _block(self, first: int, n_queries: int, nbytes: int) -> int:
        """How many queries from ``first`` on are taken together, whose outputs have so many bytes each; 1 at least."""
        count = min(BLOCK, n_queries - first)
        while count > 1:
            kept = len(_steps(self._tiles(np.arange(first + 1, first + count + 1))))
            if kept * count * nbytes <= ROOM:
                break
            count = max(1, ROOM // (kept * nbytes))
        return count

    def _walk(self, cache: LayerCache, q: Float32, seen: Int64, scale: float) -> tuple[Float64, Float64]:
        """As ``__call__``, for a block of queries; seen: (T,) positions that each sees, itself included."""
        n_queries, n_heads, head_dim = *q.shape[:2], self._shape[1]
        tiles = self._tiles(seen)
        steps = _steps(tiles)
        outs, states = self._rooms(len(steps), q)
        walk = _Walk(cache, q, seen, scale)
        walk.down(steps, outs, states)
        out, state = np.zeros_like(q), empty_state(n_heads, n_queries)
        walk.sinks(out, state)
        merge_partials(out[None], state[None], outs[0], states[0])
        exact = outs[0, ..., :head_dim]  # behind it codes have copies of the last channel
        most, squares = tiles.max(axis=0), np.zeros((len(steps), n_queries, n_heads))
        with ThreadPoolExecutor(numba.get_num_threads()) as pool:
            for i in range(1, len(steps)):
                walk.up(int(steps[i - 1]), int(steps[i]), most, out, state)
                first = int(np.argmax(most >= steps[i]))  # no query before has so many tiles in codes
                parts = [slice(at, min(at + PIECE, n_queries)) for at in range(first, n_queries, PIECE)]
                off = functools.partial(_squares_off, exact, (outs[i], states[i]), (out, state))
                for part, found in zip(parts, pool.map(off, parts), strict=True):
                    squares[i, part] = found
        by_window = squares[np.searchsorted(steps, tiles), np.arange(n_queries)]  # (W, T, H)
        return by_window.sum(axis=1), np.einsum("thd,thd->h", exact, exact, dtype=np.float64)

    def _rooms(self, steps: int, q: Float32) -> tuple[Float32, Float32]:
        """Outputs (steps, T, H, width) and states (steps, H, T, 2); the memory of the former is used again and again."""
        if self._room.size < steps * q.size:
            self._room = np.zeros(steps * q.size, np.float32)
        return self._room[: steps * q.size].reshape(steps, *q.shape), np.empty(
            (steps, q.shape[1], len(q), 2), np.float32
        )


def _squares_off(
    exact: Float32, dense: tuple[Float32, Float32], coded: tuple[Float32, Float32], part: slice
) -> Float32:
    """Squared errors (T, H) of some queries' outputs over what is dense and what is coded. ``dense`` is overwritten.

    exact: (T, H, head_dim); dense, coded: outputs (T, H, width) and states (H, T, 2), of which ``part`` is looked at.
    """
    out, (state, other_state) = dense[0][part], (np.ascontiguousarray(x[1][:, part]) for x in (dense, coded))
    merge_partials(coded[0][part][None], other_state[None], out, state)
    off = out[..., : exact.shape[2]]
    off -= exact[part]
    found: Float32 = np.einsum("thd,thd->th", off, off)
    return found


def _steps(tiles: Int64) -> Int64:
    """The numbers of coded tiles for which something has to be known, ascending, 0 (the exact output) always."""
    return np.unique(np.append(tiles, 0))


class _Walk:
    """The attention of a block of queries over pieces of a layer's segments."""

    def __init__(self, cache: LayerCache, q: Float32, seen: Int64, scale: float) -> None:
        self._cache, self._q, self._seen, self._scale = cache, q, seen, scale
        self._tile, last = cache.policy.tile, int(seen[-1])
        self._dense, self._coded = cache.recent.segment(0, last), cache.old.segment(0, cache.old.stop * self._tile)

    def down(self, steps: Int64, outs: Float32, states: Float32) -> None:
        """For each step b the attention over all dense keys from tile b on: outs (steps, T, H, width), with states."""
        above: Int64 = self._seen
        for i in range(len(steps) - 1, -1, -1):
            if i == len(steps) - 1:
                states[i] = empty_state(*states.shape[1:3])
            else:
                first = int(np.searchsorted(self._seen, above[0], "right"))  # no query before has seen anything yet
                outs[i, first:], states[i] = outs[i + 1, first:], states[i + 1]
            self._attend(self._dense, int(steps[i]), np.minimum(above, self._seen), outs[i], states[i])
            above = np.full(len(self._seen), steps[i] * self._tile)

    def sinks(self, out: Float32, state: Float32) -> None:
        """Continue over the sinks."""
        stops = np.minimum(self._seen, self._cache.sinks)
        segment = segment_of_arrays(self._cache.sink_k, self._cache.sink_v)
        attend(self._q, segment, np.zeros_like(stops), stops, out, state, scale=self._scale)

    def up(self, first: int, stop: int, most: Int64, out: Float32, state: Float32) -> None:
        """Continue over the tiles first .. stop in codes, where a query has as many: ``most`` (T,)."""
        self._attend(self._coded, first, np.where(most >= stop, stop * self._tile, 0), out, state)

    def _attend(self, segment: Segment, first_tile: int, stops: Int64, out: Float32, state: Float32) -> None:
        starts = np.full(len(stops), max(first_tile * self._tile, self._cache.sinks))
        attend(self._q, segment, starts, np.maximum(stops, starts), out, state, scale=self._scale)


# --- tiles, as a session makes them ------------------------------------------------------------------------------


class _Unseeing(View):
    """Queries that see nothing: the keys and values of their tokens are stored and sealed, and that is all."""

    def __init__(self, cache: LayerCache, position: int, qkv: Float32) -> None:
        super().__init__(cache, position, qkv)
        self.ranges[1::2] = self.ranges[::2]
        spans = self.fields[RANGES - STEP : RANGES - STEP + 2 * len(self.ranges)].reshape(-1, 4)
        spans[:, 3] = spans[:, 2]
        self.fields[N_PARTS - STEP] = 0


def _stored(policy: CachePolicy, qkv: Float32, n_kv_heads: int, head_dim: int) -> LayerCache:
    """Keys and values of a text in a cache that holds every tile densely, and every full one in codes as well.

    So it stays without a ``commit``, which would forget dense tiles that are out of sight.
    """
    cache = LayerCache(replace(policy, window=0), n_kv_heads, head_dim, len(qkv))
    cache.attend(qkv, 0, 1.0, view=_Unseeing(cache, 0, qkv))
    return cache
