"""Shadow mode: what is kept in codes is kept densely too, and every query is answered by both.

The local error of a layer and head is how far its output over codes is from its output over the same keys and values in the
dense type, relative to the latter, as a root mean square over all queries, those that were taken back too. It is also found
with K alone in codes, and with V alone: K's part and V's part. A change of policy (``retier``) starts from the dense tiles.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.flash import attend
from ..kernels.hadamard import rotated
from ..kernels.layout import V_CODES
from ..kernels.quantize import Float32
from ..kernels.segment import Segment, TileStore
from ..kernels.state import pad_last_axis
from ..kernels.tables import FIRST_TILE, V_SIDE
from ..models.transformer import Softmax
from .layer import LayerCache, View

Float64 = NDArray[np.float64]

PARTS = {"k": (True, False), "v": (False, True), "both": (True, True)}  # whether K, and V, are taken from the codes


@dataclass(slots=True)
class LocalErrors:
    """Sums of squares of one layer: of errors by part, (H,) each, and of the outputs over dense keys and values."""

    errors: dict[str, Float64] = field(default_factory=dict)
    outputs: Float64 | None = None

    def add(self, exact: Float32, found: dict[str, Float32]) -> None:
        """Outputs (T, H, D) of T queries, exact ones and those of each part."""
        wide = exact.astype(np.float64)
        self.outputs = (0 if self.outputs is None else self.outputs) + np.einsum("thd,thd->h", wide, wide)
        for part, out in found.items():
            off = out - wide
            self.errors[part] = self.errors.get(part, 0) + np.einsum("thd,thd->h", off, off)

    def relative(self, part: str) -> Float64:
        """The local error of each head, (H,); 0 where there was no query."""
        if self.outputs is None:
            return np.zeros(0)
        return np.sqrt(self.errors[part] / np.where(self.outputs > 0, self.outputs, 1))


class ShadowLayer(LayerCache):
    """A layer's cache that forgets no dense tile, and compares, for each query, what it sees with what it stands for."""

    keeps_dense = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.errors = LocalErrors()

    def fork(self) -> "ShadowLayer":
        """As ``LayerCache.fork``; its errors are counted anew."""
        other = super().fork()
        assert isinstance(other, ShadowLayer)
        other.errors = LocalErrors()
        return other

    def attend(
        self,
        qkv: Float32,
        position: int,
        softmax: Softmax,
        out: Float32 | None = None,
        view: View | None = None,
        first: int = 0,
    ) -> Float32:
        """As ``LayerCache.attend``, of all queries; then the same over dense keys and values, codes, and one of each."""
        view = self.view(position, qkv) if view is None else view
        q = qkv[:, : view.heads].copy()
        out = super().attend(qkv, position, softmax, out, view)
        q = pad_last_axis(rotated(q) if self.policy.rotates[0] else q)
        exact = self._answer(q, view, softmax, False, False)
        self.errors.add(exact, {part: self._answer(q, view, softmax, *coded) for part, coded in PARTS.items()})
        return out

    def _answer(self, q: Float32, view: View, softmax: Softmax, k_coded: bool, v_coded: bool) -> Float32:
        """Outputs (T, H, D) over what the view's queries see, values as they are held (a rotation changes no norm)."""
        result, state = np.zeros(q.shape, np.float32), softmax.first_state(q.shape[1], len(q))
        stores = [(self.recent, self.recent)]
        stores += [(tier if k_coded else self.recent, tier if v_coded else self.recent) for tier in self.tiers]
        segments = [self._sink_segment, *(_segment(*pair, view.stop) for pair in reversed(stores))]
        for i, segment in enumerate(segments):
            starts, stops = (np.ascontiguousarray(x) for x in view.ranges[2 * i : 2 * i + 2])
            if (starts < stops).any():
                attend(
                    q,
                    segment,
                    starts,
                    stops,
                    result,
                    state,
                    scale=softmax.scale,
                    softcap=softmax.softcap,
                    exact=self.exact,
                )
        return result[..., : self.head_dim]  # behind it codes have copies of the last channel


def _segment(k: TileStore, v: TileStore, stop: int) -> Segment:
    """The tiles that both stores hold, keys from one and values from the other."""
    first, last = max(k.first, v.first), min(k.stop, v.stop)
    tables, geometries = [], []
    for store in (k, v):
        segment = store.segment(0, stop)
        tables.append(segment.table[first - store.first : last - store.first])
        geometries.append(segment.geometry)
    table, geometry = tables[0].copy(), geometries[0].copy()
    table[:, V_CODES:], geometry[V_SIDE:], geometry[FIRST_TILE] = tables[1][:, V_CODES:], geometries[1][V_SIDE:], first
    layout = k.layout
    return Segment(table, geometry, 0, stop, layout.n_kv_heads, layout.head_dim, (k, v))
