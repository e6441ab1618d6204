"""The mixed KV cache: for each layer a list of three segments - sink, old, recent - and one rule for who sees what.

Positions are absolute. Tile t holds the positions t * tile .. (t + 1) * tile. While it is recent it is dense; it is
*sealed* (quantized, once) as soon as a query comes that may not see it densely. The query at position p sees

    sinks   [0, min(sinks, p + 1))        old   [sinks, B(p))        recent   [max(B(p), sinks), p + 1)

with B(p) = ``CachePolicy.boundary(p)``. While a prompt is processed in chunks, a tile may exist in both forms; the range
of each query picks one. So a query sees what it would have seen token by token, however the prompt was cut.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from ..kernels.append import append_tokens
from ..kernels.attention import attend_segments
from ..kernels.flash import empty_call, n_parts
from ..kernels.layout import DENSE_DTYPES
from ..kernels.quantize import Float32, narrow, quantize_tile
from ..kernels.segment import Int64, TileStore, segment_of_arrays
from ..kernels.simd import LANES
from ..kernels.state import pad_last_axis
from ..kernels.tables import (
    APPENDED,
    CALL_FIELDS,
    EXACT,
    FRESH,
    LOST,
    MAX_SEGMENTS,
    N_HEADS,
    N_PARTS,
    N_QUERIES,
    N_SEGMENTS,
    N_SINKS,
    OPTIONS,
    POSITION,
    Q_STRIDE,
    RANGES,
    SCALE,
    SEGMENTS,
    STEP,
)
from ..models.errors import NumericalError
from .policy import DENSE, CachePolicy

_WIDER = "use a policy with dense='f32' and k_bits and v_bits of 32"


class View:
    """What the queries of one step see, the same in every layer: absolute positions, cut into the three segments."""

    def __init__(self, policy: CachePolicy, sinks: int, position: int, qkv: Float32, n_kv_heads: int) -> None:
        n_queries, heads = len(qkv), qkv.shape[1] - 2 * n_kv_heads
        self.position, self.n_queries, self.heads = position, n_queries, heads
        self.stop, self.threads = position + n_queries, numba.get_num_threads()
        self.state = np.empty((heads, n_queries, 2), np.float32)
        seen = np.arange(position + 1, self.stop + 1, dtype=np.int64)
        boundaries = policy.boundaries(seen - 1)
        self.old_stop = int(boundaries[-1]) // policy.tile  # the tiles below are sealed
        # Of sink, old, recent: where each query starts and stops
        self._ranges = np.stack(
            [np.zeros_like(seen), np.minimum(seen, sinks), np.full_like(seen, sinks), boundaries,
             np.maximum(boundaries, sinks), seen]
        )  # fmt: skip
        firsts, lasts = self._ranges[::2, 0].tolist(), self._ranges[1::2, -1].tolist()
        spans = list(zip(firsts, lasts, strict=True))
        width = -(-qkv.shape[2] // LANES) * LANES
        fields = np.zeros(CALL_FIELDS, np.int64)
        fields[N_QUERIES], fields[Q_STRIDE], fields[APPENDED] = n_queries, 4 * qkv.shape[1] * width, 1
        fields[POSITION] = position
        fields[N_PARTS] = n_parts(n_queries, heads, n_kv_heads, spans, self.threads)
        address, nbytes = self._ranges.ctypes.data, 8 * n_queries
        for i, (low, high) in enumerate(spans):
            own = address + 2 * i * nbytes, address + (2 * i + 1) * nbytes, low, high
            fields[RANGES + 4 * i : RANGES + 4 * (i + 1)] = own
        self.fields = fields[STEP:]


class LayerCache:
    """Keys and values of one layer, from position 0 to the last one appended.

    ``exact`` keeps attention float32 throughout, as ``precision="f32"`` of ``flash_attention`` does.
    """

    exact = False

    def __init__(self, policy: CachePolicy, n_kv_heads: int, head_dim: int, context: int | None = None) -> None:
        self.policy = policy
        self.sinks = (
            policy.sinks if context is None else min(policy.sinks, context)
        )  # there are no more tokens than that
        self.old = TileStore(policy.old_layout(n_kv_heads, head_dim))
        self.recent = TileStore(policy.dense_layout(n_kv_heads, head_dim))
        dtype = DENSE_DTYPES[DENSE[policy.dense]]
        self.sink_k: NDArray[np.generic] = np.zeros((self.sinks, n_kv_heads, -(-head_dim // LANES) * LANES), dtype)
        self.sink_v: NDArray[np.generic] = np.zeros_like(self.sink_k)
        self._sink_segment = segment_of_arrays(self.sink_k, self.sink_v)
        self._sink_addresses = self._sink_segment.table.ctypes.data, self._sink_segment.geometry.ctypes.data
        self._call: Int64 | None = None
        self._options = np.zeros(3, np.float32)
        self.tiles_quantized = 0  # each tile of the old segment once, which is tested by this count

    def attend(
        self, qkv: Float32, position: int, scale: float, out: Float32 | None = None, view: View | None = None
    ) -> Float32:
        """Append keys and values at ``position``, and attend with the queries there.

        Args:
            qkv: float32 (T, n_heads + 2 * n_kv_heads, head_dim), queries, keys and values of T tokens, C order.
            position: of the first of them.
            scale: softmax scale.
            out: float32 (T, n_heads, head_dim), C order, to write to.
            view: what the queries see, where the caller has it already.

        Returns o, float32 (T, n_heads, head_dim). Nothing is final before ``commit``; to append something else at the
        same position, ``rollback`` first.
        """
        if view is None:
            view = View(self.policy, self.sinks, position, qkv, self.recent.layout.n_kv_heads)
        heads, head_dim, width = view.heads, qkv.shape[2], self.recent.layout.width
        if out is None:
            out = np.empty((view.n_queries, heads, head_dim), np.float32)
        padded, result = qkv, out
        if head_dim != width:
            padded, result = pad_last_axis(qkv), np.empty((view.n_queries, heads, width), np.float32)
        call = self._describe(view, scale)
        if view.old_stop > self.old.stop:  # a tile may have to be full first
            call[APPENDED] = 0
            append_tokens.function(call.ctypes.data, padded.ctypes.data)
            self._check_kept(call, qkv, heads)
            self._seal(view.old_stop)
            call[SEGMENTS + 2 : SEGMENTS + 4] = self.old.addresses()
        attend_segments(call, padded, result, view.state, view.threads)
        self._check_kept(call, qkv, heads)
        if result is not out:
            out[...] = result[..., :head_dim]
        return out

    def _describe(self, view: View, scale: float) -> Int64:
        """The call of ``attend_segments``; places for new tokens are made."""
        while self.recent.stop * self.recent.layout.tile < view.stop:
            self.recent.place(self.recent.stop)
            self.recent.append()
        if self._call is None or self._call[N_HEADS] != view.heads:
            self._call = self._begin_call(view.heads)
        call = self._call
        self._options[SCALE], self._options[EXACT] = scale, self.exact
        call[STEP:] = view.fields
        call[SEGMENTS + 2 : SEGMENTS + 6] = *self.old.addresses(), *self.recent.addresses()
        return call

    def _begin_call(self, heads: int) -> Int64:
        """What is the same in every call with so many query heads."""
        old = self.old.layout
        most = max(side.parts * side.limbs for side in (old.k, old.v))
        call = empty_call(heads, old.n_kv_heads, old.width, most)
        call[FRESH], call[N_SEGMENTS], call[N_SINKS] = 1, MAX_SEGMENTS, self.sinks
        call[OPTIONS] = self._options.ctypes.data
        call[SEGMENTS : SEGMENTS + 2] = self._sink_addresses
        return call

    def _check_kept(self, call: Int64, qkv: Float32, heads: int) -> None:
        """NumericalError if a finite key or value of those just appended has become infinite."""
        if not call[LOST]:
            return
        try:
            narrow(qkv[:, heads:], self.recent.layout.k_kind)
        except OverflowError as error:
            raise NumericalError(f"a key or value of {error}; {_WIDER}") from None

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

    def _seal(self, stop: int) -> None:
        """Write the dense tiles below tile ``stop`` that are not yet old to the old segment, quantized."""
        dense, target = self.recent.layout, self.old.layout
        rounds = (dense.k_kind, dense.v_kind) != (target.k_kind, target.v_kind)  # else tiles are only copied
        for t in range(self.old.stop, stop):
            (source, _), (page, slot) = self.recent.place(t), self.old.place(t)
            dead = min(max(self.sinks - t * self.policy.tile, 0), self.policy.tile)
            try:
                quantize_tile(source, dense, target, dead, page, slot)
            except OverflowError as error:
                raise NumericalError(f"tile {t} cannot be quantized: {error}; {_WIDER}") from None
            self.old.append()
            self.tiles_quantized += rounds


class Cache:
    """The caches of all layers of one sequence. This is what a model's layers see (``AttentionCache``)."""

    def __init__(
        self, policy: CachePolicy, n_layers: int, n_kv_heads: int, head_dim: int, context: int | None = None
    ) -> None:
        self.policy = policy
        self.layers = [LayerCache(policy, n_kv_heads, head_dim, context) for _ in range(n_layers)]
        self._view: View | None = None

    def attend(self, layer: int, qkv: Float32, position: int, scale: float, out: Float32 | None = None) -> Float32:
        """Append and attend in one layer; see ``LayerCache.attend``."""
        cache = self.layers[layer]
        view = self._view
        if layer == 0 or view is None or (view.position, view.n_queries) != (position, len(qkv)):
            view = self._view = View(self.policy, cache.sinks, position, qkv, cache.recent.layout.n_kv_heads)
        try:
            return cache.attend(qkv, position, scale, out, view)
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
