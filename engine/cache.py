"""The mixed KV cache: for each layer a list of three segments - sink, old, recent - and one rule for who sees what.

Positions are absolute. Tile t holds the positions t * tile .. (t + 1) * tile. While it is recent it is dense; it is
*sealed* (quantized, once) as soon as a query comes that may not see it densely. The query at position p sees

    sinks   [0, min(sinks, p + 1))        old   [sinks, B(p))        recent   [max(B(p), sinks), p + 1)

with B(p) = ``CachePolicy.boundary(p)``. While a prompt is processed in chunks, a tile may exist in both forms; the range
of each query picks one. So a query sees what it would have seen token by token, however the prompt was cut.
"""

import numpy as np
from numpy.typing import NDArray

from ..kernels.flash import attend
from ..kernels.layout import DENSE_DTYPES
from ..kernels.quantize import Float32, narrow, quantize_tile, store_rows
from ..kernels.segment import Int64, TileStore, segment_of_arrays
from ..kernels.simd import LANES
from ..kernels.state import empty_state, pad_last_axis
from ..models.errors import NumericalError
from .policy import DENSE, CachePolicy

_WIDER = "use a policy with dense='f32' and k_bits and v_bits of 32"


class LayerCache:
    """Keys and values of one layer, from position 0 to the last one appended."""

    def __init__(self, policy: CachePolicy, n_kv_heads: int, head_dim: int, context: int | None = None) -> None:
        self.policy = policy
        self._sinks = (
            policy.sinks if context is None else min(policy.sinks, context)
        )  # there are no more tokens than that
        self.old = TileStore(policy.old_layout(n_kv_heads, head_dim))
        self.recent = TileStore(policy.dense_layout(n_kv_heads, head_dim))
        dtype = DENSE_DTYPES[DENSE[policy.dense]]
        self.sink_k: NDArray[np.generic] = np.zeros((self._sinks, n_kv_heads, -(-head_dim // LANES) * LANES), dtype)
        self.sink_v: NDArray[np.generic] = np.zeros_like(self.sink_k)
        self._sink_segment = segment_of_arrays(self.sink_k, self.sink_v)
        self.tiles_quantized = 0  # each tile of the old segment once, which is tested by this count

    def attend(self, q: Float32, k: Float32, v: Float32, position: int, scale: float) -> Float32:
        """Append k, v (T, n_kv_heads, head_dim) at ``position``, and attend with q (T, n_heads, head_dim) there.

        Returns o, float32 (T, n_heads, head_dim). Nothing is final before ``commit``; to append something else at the
        same position, ``rollback`` first.
        """
        self._append(k, v, position)
        positions = np.arange(position, position + len(q), dtype=np.int64)
        boundaries = self.policy.boundaries(positions)
        self._seal(int(boundaries[-1]) // self.policy.tile)
        return self._attend(q, positions, boundaries, scale)

    def commit(self, position: int) -> None:
        """Everything below ``position`` is final: forget the dense form of tiles that no query from there on sees."""
        self.recent.forget_before(min(self.old.stop, self.policy.boundary(position) // self.policy.tile))

    def rollback(self, position: int) -> None:
        """Forget what was appended at ``position`` and after it since the last ``commit``."""
        tile = self.policy.tile
        self.recent.forget_from(-(-position // tile))
        self.old.forget_from(self.policy.boundary(position - 1) // tile)  # what the last query committed had sealed

    def nbytes(self) -> dict[str, int]:
        """Bytes in use of each segment."""
        return {
            "sink": self.sink_k.nbytes + self.sink_v.nbytes,
            "old": self.old.nbytes,
            "recent": self.recent.nbytes,
        }

    def _append(self, k: Float32, v: Float32, position: int) -> None:
        tile, stop, layout = self.policy.tile, position + len(k), self.recent.layout
        try:
            for t in range(position // tile, -(-stop // tile)):
                page, _ = self.recent.place(t)
                if t == self.recent.stop:
                    self.recent.append()
                first, last = max(position, t * tile), min(stop, (t + 1) * tile)
                rows = slice(first - position, last - position)
                store_rows(layout, page, first - t * tile, k[rows], v[rows])
            if position < self._sinks:
                count, head_dim = min(stop, self._sinks) - position, layout.head_dim
                self.sink_k[position : position + count, :, :head_dim] = narrow(k[:count], layout.k_kind)
                self.sink_v[position : position + count, :, :head_dim] = narrow(v[:count], layout.v_kind)
        except OverflowError as error:
            raise NumericalError(f"a key or value of {error}; {_WIDER}") from None

    def _seal(self, stop: int) -> None:
        """Write the dense tiles below tile ``stop`` that are not yet old to the old segment, quantized."""
        dense, target = self.recent.layout, self.old.layout
        rounds = (dense.k_kind, dense.v_kind) != (target.k_kind, target.v_kind)  # else tiles are only copied
        for t in range(self.old.stop, stop):
            (source, _), (page, slot) = self.recent.place(t), self.old.place(t)
            dead = min(max(self._sinks - t * self.policy.tile, 0), self.policy.tile)
            try:
                quantize_tile(source, dense, target, dead, page, slot)
            except OverflowError as error:
                raise NumericalError(f"tile {t} cannot be quantized: {error}; {_WIDER}") from None
            self.old.append()
            self.tiles_quantized += rounds

    def _attend(self, q: Float32, positions: Int64, boundaries: Int64, scale: float) -> Float32:
        n_queries, n_heads, head_dim = q.shape
        padded, seen, sinks = pad_last_axis(q), positions + 1, self._sinks
        out, state = np.zeros_like(padded), empty_state(n_heads, n_queries)
        old = self.old.segment(sinks, self.old.stop * self.policy.tile)
        recent = self.recent.segment(sinks, int(seen[-1]))
        attend(padded, self._sink_segment, np.zeros_like(seen), np.minimum(seen, sinks), out, state, scale=scale)
        attend(padded, old, np.full_like(seen, sinks), boundaries, out, state, scale=scale)
        attend(padded, recent, np.maximum(boundaries, sinks), seen, out, state, scale=scale)
        return out[..., :head_dim]


class Cache:
    """The caches of all layers of one sequence. This is what a model's layers see (``AttentionCache``)."""

    def __init__(
        self, policy: CachePolicy, n_layers: int, n_kv_heads: int, head_dim: int, context: int | None = None
    ) -> None:
        self.policy = policy
        self.layers = [LayerCache(policy, n_kv_heads, head_dim, context) for _ in range(n_layers)]

    def attend(self, layer: int, q: Float32, k: Float32, v: Float32, position: int, scale: float) -> Float32:
        """Append and attend in one layer; see ``LayerCache.attend``."""
        try:
            return self.layers[layer].attend(q, k, v, position, scale)
        except NumericalError as error:
            raise NumericalError(f"layer {layer}, position {position}: {error}") from None

    def commit(self, position: int) -> None:
        """Make everything below ``position`` final, in all layers."""
        for layer in self.layers:
            layer.commit(position)

    def rollback(self, position: int) -> None:
        """Go back to ``position``, the last one committed, in all layers."""
        for layer in self.layers:
            layer.rollback(position)

    def nbytes(self) -> dict[str, int]:
        """Bytes in use: {"sink", "old", "recent", "total"}."""
        parts = [layer.nbytes() for layer in self.layers]
        sums = {name: sum(part[name] for part in parts) for name in ("sink", "old", "recent")}
        return {**sums, "total": sum(sums.values())}
