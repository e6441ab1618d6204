"""How keys and values lie in memory: the formats, and the layout of one tile.

A *tile* is ``tile`` consecutive tokens of one layer, all KV heads. One tile or more lie in a *page*, one allocation, in the
order in which a decode step reads: for each head the scales of K of all its tiles, their codes, then the same of V. So a
head's part of a page is one run of memory, and the page's heads follow one another: that is what lets the processor's own
prefetcher run ahead, without which memory gives a third of its bandwidth (docs/log.md).

    page     [heads] of [K scales and minima: tiles] [K codes: tiles] [V scales and minima: tiles] [V codes: tiles]

An attention product has a *lane axis*, 16 of which stand side by side in a vector, and a *sum axis*, along which it adds
up:

             lane axis    sum axis
    q . K    tokens       channels
    p . V    channels     tokens

``width`` is head_dim rounded up to 16; the added channels are zero, or in codes copies of the last one, so that they widen
no range.

    K dense   [width][tile]
    V dense   [tile][width]
    codes     [lanes/16][words][16 lanes] of 32-bit words
    scales    float16, one after the other; then as many minima

A word holds codes of one lane. Its lower half has those of the first half of the sum axis and its upper half those of the
second: the codes at the same place of both are the pair (i, i + length/2) that one 16-bit dot product takes, where length
is that of the sum axis, or of a group where scales lie along the lanes. So a word holds 2 pairs of 8 bits, 4 of 4 or 8 of
2. Codes of 3 bits are two planes: the lower two bits of all of them as 2-bit codes, then the third bits, 16 to a half word.
What is stored is the code less the middle one, 2^(bits - 1), in two's complement: the code with its highest bit inverted.

A value is code * scale + minimum. *By channel*, a channel has one pair (scale, minimum) a tile; *by token*, a token has one
for every ``group`` channels. For K and V alike the question is whether scales lie along the lane axis (K by token, V by
channel), where they multiply the finished sum, or along the sum axis (K by channel, V by token), where they multiply what
is multiplied with the codes. ``group`` counts the places along the other axis that share a scale.

    scales along the lane axis    [sum axis / group][lanes]
    scales along the sum axis     [lanes / group][sum axis]
"""

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .memory import Bytes, slabs
from .simd import LANES

F32, F16, BF16, Q8, Q4, Q3, Q2 = range(7)
KIND_BITS = (32, 16, 16, 8, 4, 3, 2)
KIND_OF_BITS = {8: Q8, 4: Q4, 3: Q3, 2: Q2}
DENSE_DTYPES = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
TILES = (32, 64, 128)
AXES = ("channel", "token")
PAGE = 512  # positions of a page of many tiles: the unit of work of the kernels, of growth, and of what lies in one run
MAX_HEAD_DIM = 256  # 256 codes of 8 bits times 16-bit factors is what a sum in 32 bits can hold


@dataclass(frozen=True, slots=True)
class Side:
    """Where the kernel finds K (or V) of one head in a page, and how to read it; offsets and sizes in bytes."""

    kind: int
    head_stride: int  # from one head's part of a page to the next one's
    row_stride: int  # of dense formats: from one place of the sum axis to the next
    token_stride: int  # of K in a plain array, token after token: from one to the next; 0 in tiles
    group: int  # places that share a scale, along the axis on which the scales do not lie
    parts: int  # groups along that axis
    per_lane: bool  # scales lie along the lane axis
    params: int  # offset of the scales of the first tile
    params_nbytes: int  # of the scales and minima of one tile
    codes: int  # offset of the codes, or numbers, of the first tile
    codes_nbytes: int  # of one tile
    limbs: int = 1  # int16 that a number is rounded to before it is multiplied with codes (see products.py)


# Indices into the int64 array that describes a Side to the kernels
KIND, HEAD, ROW, TOKEN, GROUP, PARTS, PER_LANE, LIMBS = range(8)
SIDE_NUMBERS = 8
# Indices into a row of the table of addresses that a segment has for every tile
K_CODES, K_PARAMS, V_CODES, V_PARAMS = range(4)
ADDRESSES = 4


def side_numbers(side: Side) -> NDArray[np.int64]:
    """A Side as the kernels take it."""
    where = side.kind, side.head_stride, side.row_stride, side.token_stride
    return np.array([*where, side.group, side.parts, side.per_lane, side.limbs], np.int64)


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
    """The layout of every tile and page of one cache segment.

    Attributes:
        n_kv_heads, head_dim: shape of a token's keys and of its values.
        tile: tokens a tile.
        k_kind, v_kind: formats.
        k_axis, v_axis: the axis that has scales of its own, "channel" or "token"; dense formats have none.
        k_group, v_group: channels that share a scale by token; 0 for ``default_group``. By channel it is the tile.
        page_tiles: tiles a page.
        nbytes: of one tile, all heads.

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
    page_tiles: int = 1
    width: int = field(init=False)
    k: Side = field(init=False)
    v: Side = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, found {self.tile}")
        set_ = object.__setattr__
        set_(self, "width", -(-self.head_dim // LANES) * LANES)
        k = self._side("k", self.k_kind, self.k_axis, self.k_group, 0)
        v = self._side("v", self.v_kind, self.v_axis, self.v_group, k.codes + self.page_tiles * k.codes_nbytes)
        stride = v.codes + self.page_tiles * v.codes_nbytes
        set_(self, "k", replace(k, head_stride=stride))
        set_(self, "v", replace(v, head_stride=stride))
        set_(self, "nbytes", stride // self.page_tiles * self.n_kv_heads)

    @property
    def has_codes(self) -> bool:
        """Whether keys or values are codes."""
        return max(self.k_kind, self.v_kind) >= Q8

    def _side(self, name: str, kind: int, axis: str, group: int, offset: int) -> Side:
        if axis not in AXES:
            raise ValueError(f"{name}_axis must be one of {AXES}, found {axis!r}")
        codes = self.tile * self.width * KIND_BITS[kind] // 8
        if kind in DENSE_DTYPES:
            row = (self.tile if name == "k" else self.width) * KIND_BITS[kind] // 8
            return Side(kind, 0, row, 0, self.tile, 1, False, offset, 0, offset, codes)
        if self.width > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} for codes, found {self.head_dim}")
        if axis == "channel":
            if group not in (0, self.tile):
                raise ValueError(f"{name}_group by channel is the tile ({self.tile}) or 0, found {group}")
            group = self.tile
        else:
            group = group or default_group(self.width)
            if group not in legal_groups(self.width):
                legal = legal_groups(self.width)
                raise ValueError(
                    f"{name}_group by token must be one of {', '.join(map(str, legal))} at head_dim {self.head_dim}, "
                    f"found {group}; the nearest is {min(legal, key=lambda g: abs(g - group))}"
                )
        params = 4 * (self.tile * self.width // group)
        parts = 1 if axis == "channel" else self.width // group
        per_lane = (name == "k") == (axis == "token")
        limbs = 2 if name == "k" and per_lane else 1
        return Side(
            kind, 0, 0, 0, group, parts, per_lane, offset, params, offset + self.page_tiles * params, codes, limbs
        )

    def same_tiles(self, other: "TileLayout") -> bool:
        """Whether tiles are the same bytes, scales and codes, in both layouts; pages may have other numbers of them."""
        return replace(self, page_tiles=other.page_tiles) == other

    def empty_page(self) -> Bytes:
        """A page of zeros, uint8 (page_tiles * nbytes,), aligned to 64 bytes.

        It takes up memory as it is written to, 4 kB at a time, and gives it back when it is dropped: a page that is half
        full costs half of it.
        """
        return slabs.zeros(self.page_tiles * self.nbytes)

    def _view(self, page: Bytes, offset: int, nbytes: int) -> Bytes:
        heads = page.reshape(self.n_kv_heads, -1)[:, offset : offset + self.page_tiles * nbytes]
        return heads.reshape(self.n_kv_heads, self.page_tiles, nbytes)

    def codes(self, page: Bytes, side: Side) -> Bytes:
        """The codes (or numbers) of one side: uint8 (n_kv_heads, page_tiles, bytes), a view."""
        return self._view(page, side.codes, side.codes_nbytes)

    def params(self, page: Bytes, side: Side) -> Bytes:
        """Its scales and minima: uint8 (n_kv_heads, page_tiles, bytes), a view."""
        return self._view(page, side.params, side.params_nbytes)

    def dense_k(self, page: Bytes) -> NDArray[np.generic]:
        """Dense K as (n_kv_heads, page_tiles, width, tile), a view."""
        numbers = self.codes(page, self.k).view(DENSE_DTYPES[self.k_kind])
        return numbers.reshape(self.n_kv_heads, self.page_tiles, self.width, self.tile)

    def dense_v(self, page: Bytes) -> NDArray[np.generic]:
        """Dense V as (n_kv_heads, page_tiles, tile, width), a view."""
        numbers = self.codes(page, self.v).view(DENSE_DTYPES[self.v_kind])
        return numbers.reshape(self.n_kv_heads, self.page_tiles, self.tile, self.width)

    def addresses(self, page: Bytes, slot: int) -> tuple[int, int, int, int]:
        """What the kernels need to know of the tile in a slot of a page: see ``K_CODES`` and what follows it."""
        k, v, base = self.k, self.v, page.ctypes.data
        return (
            base + k.codes + slot * k.codes_nbytes, base + k.params + slot * k.params_nbytes,
            base + v.codes + slot * v.codes_nbytes, base + v.params + slot * v.params_nbytes,
        )  # fmt: skip
