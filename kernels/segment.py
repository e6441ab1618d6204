"""A segment: keys and values that one call of the kernel attends to, as the kernel wants them described.

Whether dense or quantized, in tiles or as plain arrays, a segment is a table of tile addresses and one small array of
integers (``geometry``, indexed by the names in attention.py).
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .attention import FIRST_TILE
from .layout import DENSE_DTYPES, F16, F32, KIND_OF_BITS, Bytes, Side, TileLayout, side_numbers
from .quantize import Float32, quantize_tile, store_rows
from .simd import LANES

Int64 = NDArray[np.int64]

ARRAY_TILE = 64  # plain arrays are visited in tiles of so many tokens
_KIND_OF_DTYPE = {dtype: kind for kind, dtype in DENSE_DTYPES.items()}


@dataclass(slots=True)
class Segment:
    """Consecutive positions of one layer. ``owner`` holds whatever keeps the memory behind the addresses alive."""

    k_table: Int64  # address of the K part of each tile
    v_table: Int64
    geometry: Int64
    start: int  # first and last + 1 absolute position that may be attended to
    stop: int
    n_kv_heads: int
    head_dim: int
    owner: Any

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a Segment holds addresses and cannot be copied or pickled")


def make_geometry(tile: int, first_tile: int, width: int, n_kv_heads: int, k: Side, v: Side) -> Int64:
    """The integers that describe a segment, in the order of the index names in attention.py."""
    return np.concatenate(
        [np.array([tile, tile.bit_length() - 1, first_tile, width, n_kv_heads]), side_numbers(k), side_numbers(v)]
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
    sides = [Side(_KIND_OF_DTYPE[x.dtype], x.strides[1], x.strides[0], 0, ARRAY_TILE, 1, False, 0) for x in (k, v)]
    tiles = np.arange(-(-n // ARRAY_TILE), dtype=np.int64) * ARRAY_TILE
    tables = [x.ctypes.data + tiles * x.strides[0] for x in (k, v)]
    geometry = make_geometry(ARRAY_TILE, 0, width, heads, *sides)
    return Segment(tables[0], tables[1], geometry, 0, n, heads, head_dim, (k, v))


def _rows(x: NDArray[Any]) -> NDArray[Any]:
    """X with channels contiguous, padded with zeros to a multiple of 16, and positive strides."""
    missing = -x.shape[2] % LANES
    if missing:
        x = np.pad(x, ((0, 0), (0, 0), (0, missing)))  # keeps Fortran order
    if x.size and (x.strides[2] != x.itemsize or x.strides[0] <= 0):
        # Not ascontiguousarray: it returns a single row as it is, whose stride of 0 would mean the layout of tiles.
        return x.copy(order="C")
    return x


class TileStore:
    """Tiles of one layout, from tile ``first`` on without a gap, with the tables that the kernel reads.

    Growing by one tile allocates nothing but the tile. Every change becomes visible by one assignment or list
    operation, so that an interrupt finds the store either before or after it.
    """

    def __init__(self, layout: TileLayout) -> None:
        self.layout = layout
        self._geometry = make_geometry(layout.tile, 0, layout.width, layout.n_kv_heads, layout.k, layout.v)
        self._held: tuple[int, list[Bytes], Int64] = 0, [], np.zeros((2, 16), np.int64)  # first, tiles, addresses

    @property
    def first(self) -> int:
        """The first tile held, or that will be."""
        return self._held[0]

    @property
    def stop(self) -> int:
        """One past the last tile held."""
        return self._held[0] + len(self._held[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return len(self._held[1]) * self.layout.nbytes

    def __getitem__(self, tile: int) -> Bytes:
        """The tile of this absolute number, from ``first`` to ``stop`` - 1."""
        return self._held[1][tile - self._held[0]]

    def append(self, tile: Bytes) -> None:
        """Hold one more tile, the next one."""
        first, tiles, tables = self._held
        n = len(tiles)
        if n == tables.shape[1]:
            tables = np.concatenate([tables, np.zeros_like(tables)], axis=1)
            self._held = first, tiles, tables
        address = tile.ctypes.data
        tables[:, n] = address, address + self.layout.v_offset
        tiles.append(tile)

    def forget_before(self, stop: int) -> None:
        """Drop the tiles before tile ``stop``."""
        first, tiles, tables = self._held
        count = stop - first
        if count > 0:
            self._held = stop, tiles[count:], np.roll(tables, -count, axis=1)

    def forget_from(self, stop: int) -> None:
        """Drop the tiles from tile ``stop`` on."""
        del self._held[1][max(0, stop - self._held[0]) :]

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a TileStore (and so a cache or session) holds addresses and cannot be copied or pickled")

    def segment(self, start: int, stop: int) -> Segment:
        """The positions start .. stop as a segment. Valid until the next change."""
        first, tiles, (k_table, v_table) = self._held
        self._geometry[FIRST_TILE] = first
        layout = self.layout
        return Segment(k_table, v_table, self._geometry, start, stop, layout.n_kv_heads, layout.head_dim, tiles)


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
    target = TileLayout(heads, head_dim, tile, kinds[k_bits], kinds[v_bits], k_axis, v_axis, k_group, v_group)
    store = TileStore(target)
    for first in range(0, n, tile):
        source = dense.empty_tile()
        rows = np.minimum(np.arange(first, first + tile), n - 1)  # a last, partial tile repeats its last token
        store_rows(dense, source, 0, k[rows].astype(np.float32), v[rows].astype(np.float32))
        store.append(quantize_tile(source, dense, target))
    return store.segment(plain.start, plain.stop)
