"""How keys and values lie in memory: the formats, and the layout of one tile.

A *tile* is ``tile`` consecutive tokens of one layer, all KV heads, in one allocation: first K of every head, then V. The
order is what the kernels eat. An attention product has a *lane axis*, 16 of which stand side by side in a vector, and a
*sum axis*, along which it adds up:

             lane axis    sum axis
    q . K    tokens       channels
    p . V    channels     tokens

``width`` is head_dim rounded up to 16; the added channels are zero, or in codes copies of the last one, so that they widen
no range.

    K dense   [tile/16][width][16 tokens]
    V dense   [tile][width]
    codes     [lanes/16][words][16 lanes] of 32-bit words, then scales f16, then minima f16

A word holds codes of one lane. Its lower half has those of the first half of the sum axis and its upper half those of the
second: the codes at the same place of both are the pair (i, i + length/2) that one 16-bit dot product takes, where length
is that of the sum axis, or of a group where scales lie along the lanes. So a word holds 2 pairs of 8 bits, 4 of 4 or 8 of
2. Codes of 3 bits are two planes: the lower two bits of all of them as 2-bit codes, then the third bits, 16 to a half word.

A value is code * scale + minimum. *By channel*, a channel has one pair (scale, minimum) a tile; *by token*, a token has one
for every ``group`` channels. For K and V alike the question is whether scales lie along the lane axis (K by token, V by
channel), where they multiply the finished sum, or along the sum axis (K by channel, V by token), where they multiply what
is multiplied with the codes. ``group`` counts the places along the other axis that share a scale.

    scales along the lane axis    [sum axis / group][lanes]
    scales along the sum axis     [lanes / group][sum axis]
"""

import contextlib
import mmap
import threading
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .simd import LANES

Bytes = NDArray[np.uint8]

F32, F16, BF16, Q8, Q4, Q3, Q2 = range(7)
KIND_BITS = (32, 16, 16, 8, 4, 3, 2)
KIND_OF_BITS = {8: Q8, 4: Q4, 3: Q3, 2: Q2}
DENSE_DTYPES = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
TILES = (32, 64, 128)
AXES = ("channel", "token")
MAX_HEAD_DIM = 256  # 256 codes of 8 bits times 16-bit factors is what a sum in 32 bits can hold
_ALIGNMENT = 64  # bytes: a vector load never straddles two cache lines


@dataclass(frozen=True, slots=True)
class Side:
    """Where the kernel finds K (or V) of one head in a tile; offsets and strides in bytes."""

    kind: int
    head_stride: int
    row_stride: int  # 0: the tile layout above; else token after token, so many bytes apart
    params: int  # offset of the scales from the head's start
    group: int  # places that share a scale, along the axis on which the scales do not lie
    parts: int  # groups along that axis
    per_lane: bool  # scales lie along the lane axis
    nbytes: int  # that lie together, of one head in one tile; 0 where a head's rows lie apart


# Indices into the int64 array that describes a Side to the kernels
KIND, HEAD, ROW, PARAMS, GROUP, PARTS, PER_LANE, BYTES = range(8)


def side_numbers(side: Side) -> NDArray[np.int64]:
    """A Side as the kernels take it; BYTES is how many lie together, one head in one tile."""
    return np.array(
        [
            side.kind, side.head_stride, side.row_stride, side.params, side.group, side.parts, side.per_lane, side.nbytes,
        ],
        dtype=np.int64,
    )  # fmt: skip


def default_group(width: int) -> int:
    """Channels that share a scale by token: the largest multiple of 16 that divides ``width`` and is at most 64.

    Where that would be under 32 (width 80 or 112: one scale for 16 values costs 2 bits each), the whole width.
    """
    best = max(g for g in range(LANES, 65, LANES) if width % g == 0)
    return best if best >= min(32, width) else width


def legal_groups(width: int) -> list[int]:
    """The groups of channels that may share a scale by token: multiples of 16 that divide the width."""
    return [g for g in range(LANES, width + 1, LANES) if width % g == 0]


@dataclass(frozen=True, slots=True)
class TileLayout:
    """The layout of every tile of one cache segment.

    Attributes:
        n_kv_heads, head_dim: shape of a token's keys and of its values.
        tile: tokens a tile.
        k_kind, v_kind: formats.
        k_axis, v_axis: the axis that has scales of its own, "channel" or "token"; dense formats have none.
        k_group, v_group: channels that share a scale by token; 0 for ``default_group``. By channel it is the tile.

    Raises:
        ValueError: a tile, an axis or a group that the kernels do not know, with those that they do.

    """

    n_kv_heads: int
    head_dim: int
    tile: int
    k_kind: int
    v_kind: int
    k_axis: str = "channel"
    v_axis: str = "token"
    k_group: int = 0
    v_group: int = 0
    width: int = field(init=False)
    k: Side = field(init=False)
    v: Side = field(init=False)
    v_offset: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, found {self.tile}")
        set_ = object.__setattr__
        set_(self, "width", -(-self.head_dim // LANES) * LANES)
        k = self._side("k", self.k_kind, self.k_axis, self.k_group)
        v = self._side("v", self.v_kind, self.v_axis, self.v_group)
        if self.v_kind in DENSE_DTYPES:
            v = replace(v, row_stride=self.width * KIND_BITS[v.kind] // 8)
        set_(self, "k", k)
        set_(self, "v", v)
        set_(self, "v_offset", -(-k.head_stride * self.n_kv_heads // _ALIGNMENT) * _ALIGNMENT)
        set_(self, "nbytes", self.v_offset + v.head_stride * self.n_kv_heads)

    def _side(self, name: str, kind: int, axis: str, group: int) -> Side:
        if axis not in AXES:
            raise ValueError(f"{name}_axis must be one of {AXES}, found {axis!r}")
        codes = self.tile * self.width * KIND_BITS[kind] // 8
        if kind in DENSE_DTYPES:
            return Side(kind, codes, 0, 0, self.tile, 1, False, codes)
        if self.width > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} for codes, found {self.head_dim}")
        if axis == "channel":
            if group not in (0, self.tile):
                raise ValueError(f"{name}_group by channel is the tile ({self.tile}) or 0, found {group}")
            group = self.tile
        else:
            group = group or default_group(self.width)
            if group not in legal_groups(self.width):
                legal = ", ".join(map(str, legal_groups(self.width)))
                raise ValueError(
                    f"{name}_group by token must be one of {legal} at head_dim {self.head_dim}, found {group}"
                )
        nbytes = codes + 4 * (self.tile * self.width // group)
        parts = 1 if axis == "channel" else self.width // group
        return Side(kind, nbytes, 0, codes, group, parts, (name == "k") == (axis == "token"), nbytes)

    def empty_tile(self, *, short_lived: bool = False) -> Bytes:
        """A tile of zeros: uint8 (nbytes,), aligned to 64 bytes.

        A tile that will not live long gets pages of its own, which go back to the system when it is dropped. The others
        share large pages, which go back when all of their tiles are dropped (see ``Arena``).
        """
        if not hasattr(mmap, "MAP_PRIVATE"):
            return aligned_zeros(self.nbytes)
        if short_lived:
            return np.frombuffer(_pages(self.nbytes), np.uint8)
        return _ARENA.take(self.nbytes)

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


def _pages(nbytes: int) -> mmap.mmap:
    """Zeroed memory straight from the system, which takes up room page by page as it is written to."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Arena:
    """Hands out memory for tiles, one after the other, from large pages where the system has them (Linux: madvise).

    A tile is a few kilobytes of every head; with pages of 4 kB each of them costs a walk through the page tables, which
    took a quarter of the time of reading a cache from memory. Nothing is handed out twice: the pages go back to the system
    when the last array that was taken from them is gone. At most one large page, 2 MiB, is in use beyond what was taken.
    """

    _LARGE_PAGE, _RESERVE = 1 << 21, 1 << 26

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: Bytes = np.zeros(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Zeros, uint8 (nbytes,), aligned to 64 bytes."""
        with self._lock:
            if nbytes > len(self._free):
                self._free = self._reserve(max(nbytes, self._RESERVE))
            taken, self._free = self._free[:nbytes], self._free[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
            return taken

    def _reserve(self, nbytes: int) -> Bytes:
        pages = _pages(nbytes + self._LARGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
        return memory[-memory.ctypes.data % self._LARGE_PAGE :]


_ARENA = Arena()
