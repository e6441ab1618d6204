"""A segment: keys and values that one call of the kernel attends to, as the kernel wants them described.

Whether dense or quantized, in tiles or as plain arrays, a segment is a table of tile addresses and one small array of
integers (``geometry``, indexed by the names in tables.py).
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .layout import (
    ADDRESSES,
    DENSE_DTYPES,
    F16,
    F32,
    K_CODES,
    KIND_OF_BITS,
    LIMBS,
    PAGE,
    PARTS,
    V_CODES,
    Bytes,
    Side,
    TileLayout,
    side_numbers,
)
from .quantize import Float32, quantize_tile, store_rows
from .simd import LANES
from .tables import FIRST_TILE, K_SIDE, V_SIDE

Int64 = NDArray[np.int64]

ARRAY_TILE = 64  # plain arrays are visited in tiles of so many tokens
_KIND_OF_DTYPE = {dtype: kind for kind, dtype in DENSE_DTYPES.items()}


@dataclass(slots=True)
class Segment:
    """Consecutive positions of one layer. ``owner`` holds whatever keeps the memory behind the addresses alive."""

    table: Int64  # (tiles or more, 4) addresses of each tile, of the first head: see layout.py, ``K_CODES``
    geometry: Int64
    start: int  # first and last + 1 absolute position that may be attended to
    stop: int
    n_kv_heads: int
    head_dim: int
    owner: Any

    @property
    def most_parts(self) -> int:
        """The most parts of a side, times its limbs (layout.py)."""
        return max(int(self.geometry[side + PARTS] * self.geometry[side + LIMBS]) for side in (K_SIDE, V_SIDE))

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a Segment holds addresses and cannot be copied or pickled")


def make_geometry(tile: int, first_tile: int, width: int, k: Side, v: Side) -> Int64:
    """The integers that describe a segment, in the order of the index names in tables.py."""
    return np.concatenate(
        [np.array([tile, tile.bit_length() - 1, first_tile, width]), side_numbers(k), side_numbers(v)]
    )


def segment_of_arrays(k: object, v: object) -> Segment:
    """A segment over arrays k, v (N, Hkv, D) of float32, float16 or bfloat16; position 0 is row 0. Copies only to pad D.

    Raises:
        ValueError: shapes that differ, or a dtype other than those.

    """
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, np.ndarray) or x.ndim != 3:
            raise ValueError(f"{name} must be an array (N, Hkv, D), found {getattr(x, 'shape', type(x).__name__)}")
        if x.dtype not in _KIND_OF_DTYPE:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, found {x.dtype}")
    assert isinstance(k, np.ndarray) and isinstance(v, np.ndarray)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape (N, Hkv, D), found {k.shape} and {v.shape}")
    n, heads, head_dim = k.shape
    k, v = _rows(k), _rows(v)
    width = k.shape[2]
    kinds, strides = [_KIND_OF_DTYPE[x.dtype] for x in (k, v)], ((k.itemsize, k.strides[0]), (v.strides[0], 0))
    sides = [
        Side(kind, x.strides[1], row, token, ARRAY_TILE, 1, False, 0, 0, 0, 0)
        for kind, x, (row, token) in zip(kinds, (k, v), strides, strict=True)
    ]
    tiles = np.arange(-(-n // ARRAY_TILE), dtype=np.int64) * ARRAY_TILE
    table = np.zeros((len(tiles), ADDRESSES), np.int64)
    table[:, K_CODES], table[:, V_CODES] = (x.ctypes.data + tiles * x.strides[0] for x in (k, v))
    geometry = make_geometry(ARRAY_TILE, 0, width, *sides)
    return Segment(table, geometry, 0, n, heads, head_dim, (k, v))


def _rows(x: NDArray[Any]) -> NDArray[Any]:
    """X with channels contiguous, padded with zeros to a multiple of 16, and positive strides."""
    missing = -x.shape[2] % LANES
    if missing:
        x = np.pad(x, ((0, 0), (0, 0), (0, missing)))  # keeps Fortran order
    if x.size and (x.strides[2] != x.itemsize or x.strides[0] <= 0):
        # Not ascontiguousarray: it returns a single row as it is, whose stride of 0 would mean the layout of tiles.
        return x.copy(order="C")
    return x


def _empty_table() -> Int64:
    return np.zeros((16, ADDRESSES), np.int64)


def _addressed(table: Int64) -> tuple[Int64, int]:
    return table, table.ctypes.data


class TileStore:
    """Tiles of one layout, from tile ``first`` on without a gap, in their pages, with the table that the kernels read.

    Every change becomes visible by one assignment, so that an interrupt finds the store either before or after it.
    """

    def __init__(self, layout: TileLayout) -> None:
        self.layout = layout
        self._geometry = make_geometry(layout.tile, 0, layout.width, layout.k, layout.v)
        # First tile, one past the last, the pages that hold them by number, a row of the table for each tile from the
        # first, and the table's address
        self._held: tuple[int, int, dict[int, Bytes], Int64, int] = 0, 0, {}, *_addressed(_empty_table())
        self._geometry_address = self._geometry.ctypes.data

    @property
    def first(self) -> int:
        """The first tile held, or that will be."""
        return self._held[0]

    @property
    def stop(self) -> int:
        """One past the last tile held."""
        return self._held[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return (self.stop - self.first) * self.layout.nbytes

    def place(self, tile: int) -> tuple[Bytes, int]:
        """The page and the slot of a tile that is held, or of the next one, which ``append`` will hold."""
        number, slot = divmod(tile, self.layout.page_tiles)
        pages = self._held[2]
        if number not in pages and tile == self.stop:
            pages[number] = self.layout.empty_page()
        return pages[number], slot

    def append(self) -> None:
        """Hold one more tile: what was written to the place of tile ``stop``."""
        first, stop, pages, table, address = self._held
        if stop - first == len(table):
            table, address = _addressed(np.concatenate([table, np.zeros_like(table)]))
        page, slot = self.place(stop)
        table[stop - first] = self.layout.addresses(page, slot)
        self._held = first, stop + 1, pages, table, address

    def forget_before(self, tile: int) -> None:
        """Drop the tiles before this one, and the pages that are wholly before it."""
        first, stop, pages, table, _ = self._held
        if tile > first:
            kept = {number: page for number, page in pages.items() if number >= tile // self.layout.page_tiles}
            self._held = tile, max(stop, tile), kept, *_addressed(np.roll(table, first - tile, axis=0))

    def forget_from(self, tile: int) -> None:
        """Drop this tile and those after it, and the pages that are wholly after it."""
        first, stop, pages, table, address = self._held
        if tile < stop:
            tile = max(tile, first)
            kept = {number: page for number, page in pages.items() if number * self.layout.page_tiles < tile}
            self._held = first, tile, kept, table, address

    def addresses(self) -> tuple[int, int]:
        """Of the table and of the geometry, for ``attend_segments``. Valid until the next change."""
        self._geometry[FIRST_TILE] = self._held[0]
        return self._held[4], self._geometry_address

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a TileStore (and so a cache or session) holds addresses and cannot be copied or pickled")

    def segment(self, start: int, stop: int) -> Segment:
        """The positions start .. stop as a segment. Valid until the next change."""
        first, _, pages, table, _ = self._held
        self._geometry[FIRST_TILE] = first
        layout = self.layout
        return Segment(table, self._geometry, start, stop, layout.n_kv_heads, layout.head_dim, list(pages.values()))


def quantize(
    k: Float32,
    v: Float32,
    *,
    k_bits: int = 4,
    v_bits: int = 4,
    tile: int = 64,
    k_axis: str = "channel",
    v_axis: str = "token",
    k_group: int = 0,
    v_group: int = 0,
) -> Segment:
    """Quantize k, v (N, Hkv, D) float32 into one segment that ``flash_attention`` takes in the place of arrays.

    Args:
        k, v: float32 (N, Hkv, D). A last tile that N does not fill counts its own tokens only.
        k_bits, v_bits: bits of a code, 8, 4, 3 or 2; or 16 or 32, which keep float16 or float32 in the same tiles.
        tile: tokens that are quantized together: 32, 64 or 128.
        k_axis, v_axis: "channel", one scale a channel and tile, or "token", one a token and group of channels.
        k_group, v_group: channels of a group by token, a multiple of 16 that divides D (rounded up to 16); 0 for the
            largest one up to 64.

    Raises:
        ValueError: bits, a tile, an axis or a group out of those named, or arrays that do not fit together.
        OverflowError: values whose scale is beyond float16.

    """
    kinds = {**KIND_OF_BITS, 16: F16, 32: F32}
    for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
        if bits not in kinds:
            raise ValueError(f"{name} must be one of {tuple(kinds)}, found {bits}")
    plain = segment_of_arrays(k, v)
    n, heads, head_dim = k.shape
    dense = TileLayout(heads, head_dim, tile, F32, F32)
    target = TileLayout(
        heads, head_dim, tile, kinds[k_bits], kinds[v_bits], k_axis, v_axis, k_group, v_group, page_tiles=PAGE // tile
    )
    store = TileStore(target)
    for first in range(0, n, tile):
        source = dense.empty_page()
        rows = np.minimum(np.arange(first, first + tile), n - 1)  # a last, partial tile repeats its last token
        store_rows(dense, source, 0, k[rows].astype(np.float32), v[rows].astype(np.float32))
        page, slot = store.place(store.stop)
        quantize_tile(source, dense, target, page=page, slot=slot)
        store.append()
    return store.segment(plain.start, plain.stop)
