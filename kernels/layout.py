"""How keys and values lie in memory: the formats, and the layout of one tile.

A *tile* is ``tile`` consecutive tokens of one layer, all KV heads, in one allocation: first K of every head, then V. The
order is what the kernels eat: 16 tokens side by side for K (a dot product then needs no sum across lanes) and 16 channels
side by side for V. ``width`` is head_dim rounded up to 16; the added channels are zero, or in coded V
copies of the last one, so that they widen no range.

    K dense   [tile/16][width][16 tokens]
    K 8 bits  [tile/16][width/4][16 tokens][4 channels]             then scales f16 [width], minima f16 [width]
    K 4 bits  [tile/16][width/8][16 tokens][4 bytes]                the same; byte b of block i: low nibble channel
                                                                    8i + b, high nibble channel 8i + 4 + b
    V dense   [tile][width]
    V 8 bits  [tile/4][width/16][16 channels][4 tokens]             then scales f16 [groups][tile], minima likewise
    V 4 bits  [tile/8][width/16][16 channels][4 bytes]              the same; byte b of block i: low nibble token
                                                                    8i + b, high nibble token 8i + 4 + b

A value is code * scale + minimum. K has one pair (scale, minimum) a channel and tile, V one a token and group of channels.
"""

import mmap
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .simd import LANES

Bytes = NDArray[np.uint8]

F32, F16, BF16, Q8, Q4 = range(5)
KIND_BITS = (32, 16, 16, 8, 4)
DENSE_DTYPES = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
TILES = (32, 64, 128)
_ALIGNMENT = 64  # bytes: a vector load never straddles two cache lines


@dataclass(frozen=True, slots=True)
class Side:
    """Where the kernel finds K (or V) of one head in a tile; offsets and strides in bytes."""

    kind: int
    head_stride: int
    row_stride: int  # 0: the tile layout above; else token after token, so many bytes apart
    params: int  # offset of the scales from the head's start
    group: int  # channels that share a scale (V by token)


def value_group(width: int) -> int:
    """Channels of V that share a scale: the largest multiple of 16 that divides ``width`` and is at most 64.

    Where that would be under 32 (width 80 or 112: one scale for 16 values costs 2 bits each), the whole width.
    """
    best = max(g for g in range(LANES, 65, LANES) if width % g == 0)
    return best if best >= min(32, width) else width


@dataclass(frozen=True, slots=True)
class TileLayout:
    """The layout of every tile of one cache segment."""

    n_kv_heads: int
    head_dim: int
    tile: int
    k_kind: int
    v_kind: int
    width: int = field(init=False)
    k: Side = field(init=False)
    v: Side = field(init=False)
    v_offset: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, found {self.tile}")
        width = -(-self.head_dim // LANES) * LANES
        group = value_group(width)

        def side(kind: int, scales: int) -> Side:
            codes = self.tile * width * KIND_BITS[kind] // 8
            params = codes if kind in (Q8, Q4) else 0
            return Side(kind, codes + (4 * scales if params else 0), 0, params, group)

        set_ = object.__setattr__
        set_(self, "width", width)
        k, v = side(self.k_kind, width), side(self.v_kind, self.tile * (width // group))
        if self.v_kind in DENSE_DTYPES:
            v = Side(v.kind, v.head_stride, width * KIND_BITS[v.kind] // 8, 0, group)
        set_(self, "k", k)
        set_(self, "v", v)
        set_(self, "v_offset", -(-k.head_stride * self.n_kv_heads // _ALIGNMENT) * _ALIGNMENT)
        set_(self, "nbytes", self.v_offset + v.head_stride * self.n_kv_heads)

    def empty_tile(self, *, short_lived: bool = False) -> Bytes:
        """A tile of zeros: uint8 (nbytes,), aligned to 64 bytes.

        A tile that will not live long gets pages of its own, which go back to the system when it is dropped. On the heap
        it would leave a hole between tiles that stay: the process would use up to a tenth more than is counted.
        """
        if short_lived and hasattr(mmap, "MAP_PRIVATE"):
            pages = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return np.frombuffer(pages, np.uint8)
        return aligned_zeros(self.nbytes)

    def k_heads(self, tile: Bytes) -> Bytes:
        """The K part as uint8 (n_kv_heads, head_stride), a view."""
        return tile[: self.k.head_stride * self.n_kv_heads].reshape(self.n_kv_heads, -1)

    def v_heads(self, tile: Bytes) -> Bytes:
        """The V part as uint8 (n_kv_heads, head_stride), a view."""
        return tile[self.v_offset :].reshape(self.n_kv_heads, -1)

    def dense_k(self, tile: Bytes) -> NDArray[np.generic]:
        """Dense K as (n_kv_heads, tile/16, width, 16), a view."""
        return self.k_heads(tile).view(DENSE_DTYPES[self.k_kind]).reshape(self.n_kv_heads, -1, self.width, LANES)

    def dense_v(self, tile: Bytes) -> NDArray[np.generic]:
        """Dense V as (n_kv_heads, tile, width), a view."""
        return self.v_heads(tile).view(DENSE_DTYPES[self.v_kind]).reshape(self.n_kv_heads, self.tile, self.width)


def aligned_zeros(nbytes: int) -> Bytes:
    """Zeros, uint8 (nbytes,), whose first byte lies on a 64-byte boundary."""
    room = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + nbytes]
