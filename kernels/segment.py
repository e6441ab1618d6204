"""A segment: keys and values that one call of the kernel attends to, as the kernel wants them described.

Whether dense or quantized, in tiles or as plain arrays, a segment is a table of tile addresses and one small array of
integers (``geometry``, indexed by the names in attention.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import DENSE_DTYPES, KIND_NAMES, LANES, Bytes, Q4, Q8, Side, TileLayout
from .quantize import Float32, quantize_tile, store_rows

Int64 = NDArray[np.int64]

ARRAY_TILE = 64  # plain arrays are visited in tiles of so many tokens
_KIND_OF_DTYPE = {dtype: kind for kind, dtype in DENSE_DTYPES.items()}
_KIND_OF_BITS = {4: Q4, 8: Q8}


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


def make_geometry(
    tile: int, first_tile: int, width: int, n_kv_heads: int, k: Side, v: Side
) -> Int64:
    """The integers that describe a segment, in the order of the index names in attention.py."""
    return np.array(
        [
            tile, first_tile, width, n_kv_heads,
            k.kind, k.head_stride, k.row_stride, k.params,
            v.kind, v.head_stride, v.row_stride, v.params, v.group,
        ],
        dtype=np.int64,
    )  # fmt: skip


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
    sides = [Side(_KIND_OF_DTYPE[x.dtype], x.strides[1], x.strides[0], 0, width) for x in (k, v)]
    tiles = np.arange(-(-n // ARRAY_TILE), dtype=np.int64) * ARRAY_TILE
    tables = [x.ctypes.data + tiles * x.strides[0] for x in (k, v)]
    geometry = make_geometry(ARRAY_TILE, 0, width, heads, *sides)
    return Segment(tables[0], tables[1], geometry, 0, n, heads, head_dim, (k, v))


def _rows(x: NDArray[Any]) -> NDArray[Any]:
    """x with channels contiguous, padded with zeros to a multiple of 16, and positive strides."""
    missing = -x.shape[2] % LANES
    if missing:
        return np.pad(x, ((0, 0), (0, 0), (0, missing)))
    if x.size and (x.strides[2] != x.itemsize or x.strides[0] <= 0):
        return np.ascontiguousarray(x)
    return x


def segment_of_tiles(layout: TileLayout, tiles: list[Bytes], first_tile: int, start: int, stop: int) -> Segment:
    """A segment over tiles of one layout; ``tiles[0]`` holds the positions from first_tile * tile on."""
    table = np.array([tile.ctypes.data for tile in tiles], dtype=np.int64)
    geometry = make_geometry(layout.tile, first_tile, layout.width, layout.n_kv_heads, layout.k, layout.v)
    return Segment(
        table, table + layout.v_offset, geometry, start, stop, layout.n_kv_heads, layout.head_dim, tiles
    )  # fmt: skip


def quantize(k: Float32, v: Float32, *, k_bits: int = 4, v_bits: int = 4, tile: int = 64) -> Segment:
    """Quantize k, v (N, Hkv, D) float32 into one segment that ``flash_attention`` takes in the place of arrays.

    K gets one scale a channel and tile, V one a token and group of channels. A last tile that N does not fill counts its
    own tokens only.

    Raises:
        ValueError: bits other than 4 or 8, a tile other than 32, 64 or 128, or arrays that do not fit together.
        OverflowError: values whose scale is beyond float16.

    """
    for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
        if bits not in _KIND_OF_BITS:
            raise ValueError(f"{name} must be one of {tuple(_KIND_OF_BITS)}, found {bits}")
    plain = segment_of_arrays(k, v)
    n, heads, head_dim = k.shape
    dense = TileLayout(heads, head_dim, tile, 0, 0)
    target = TileLayout(heads, head_dim, tile, _KIND_OF_BITS[k_bits], _KIND_OF_BITS[v_bits])
    tiles = []
    for first in range(0, n, tile):
        source = dense.empty_tile()
        rows = np.minimum(np.arange(first, first + tile), n - 1)  # a last, partial tile repeats its last token
        store_rows(dense, source, 0, np.asarray(k, np.float32)[rows], np.asarray(v, np.float32)[rows])
        tiles.append(quantize_tile(source, dense, target))
    return segment_of_tiles(target, tiles, 0, plain.start, plain.stop)


def describe(segment: Segment) -> str:
    """One line for people: formats and number of tokens."""
    k, v = KIND_NAMES[segment.geometry[4]], KIND_NAMES[segment.geometry[8]]
    return f"{segment.stop - segment.start} tokens, K {k}, V {v}"
