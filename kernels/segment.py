"""A segment: keys and values that one call of the kernel attends to, as the kernel wants them described.

Whether dense or quantized, in tiles or as plain arrays, a segment is a table of tile addresses and one small array of
integers (``geometry``, indexed by the names in tables.py).
"""

import itertools
import mmap
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from .layout import (
    ADDRESSES,
    DENSE_DTYPES,
    F16,
    F32,
    K_CODES,
    K_PARAMS,
    KIND_OF_BITS,
    PAGE,
    V_CODES,
    V_PARAMS,
    Side,
    TileLayout,
)
from .memory import Bytes, slabs, zeroed_memory
from .quantize import IMPOSSIBLE_AT, TOO_WIDE_AT, Float32, quantize_jobs, store_rows
from .simd import LANES
from .tables import FIRST_TILE, make_geometry

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

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a Segment holds addresses and cannot be copied or pickled")


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


class _Held(NamedTuple):
    """What a store holds: tiles first .. stop, in pages by number, with a row of the table for each tile from the first."""

    first: int
    stop: int
    written: int  # the first tile of its pages that was written
    pages: dict[int, Bytes]
    shared: frozenset[int]  # numbers of the pages that another store holds too
    wide: dict[tuple[int, int], Bytes]  # by tile and side, scales as float32
    table: Int64
    address: int  # of the table


class TileStore:
    """Tiles of one layout, from tile ``first`` on without a gap, in their pages, with the table that the kernels read.

    Every change becomes visible by one assignment, so that an interrupt finds the store either before or after it.

    Args:
        layout: of the tiles.
        lasting: tiles stay until all of them go; then full pages of them become large pages of the system.

    """

    def __init__(self, layout: TileLayout, lasting: bool = False) -> None:
        self.layout, self.lasting = layout, lasting
        self._geometry = make_geometry(layout.tile, 0, layout.width, layout.k, layout.v)
        self.geometry_address = self._geometry.ctypes.data
        self._held = _Held(0, 0, 0, {}, frozenset(), {}, *_addressed(_empty_table()))
        self._spare: list[Bytes] = []  # pages to be used again soon

    @property
    def first(self) -> int:
        """The first tile held, or that will be."""
        return self._held.first

    @property
    def stop(self) -> int:
        """One past the last tile held."""
        return self._held.stop

    @property
    def nbytes(self) -> int:
        """Bytes in use: all tiles held, those before them in the same page, whose memory is not free yet, spare pages."""
        held = self._held
        in_page = held.first - held.first % self.layout.page_tiles
        tiles = held.stop - max(in_page, min(held.written, held.first))
        tiles += len(self._spare) * self.layout.page_tiles
        return tiles * self.layout.nbytes + sum(self._wide_nbytes(side) for _, side in held.wide)

    @property
    def keeps_memory(self) -> bool:
        """Whether there are pages for tiles to come."""
        return bool(self._spare)

    def place(self, tile: int) -> tuple[Bytes, int]:
        """The page and the slot of a tile that is held, or of one of the next, which ``append`` will hold."""
        number, slot = divmod(tile, self.layout.page_tiles)
        pages = self._held.pages
        if tile >= self.stop:
            if number not in pages:
                pages[number] = self._spare.pop() if self._spare else self.layout.empty_page()
            elif number in self._held.shared:
                self._own(number)
                pages = self._held.pages
        return pages[number], slot

    def append(self, count: int = 1) -> None:
        """Hold so many more tiles: what was, or will be, written to the places from tile ``stop`` on."""
        layout, stop, rows = self.layout, self._held.stop, []
        for tile in range(stop, stop + count):
            page, slot = self.place(tile)
            if self.lasting and slot == 0:  # the next page has begun
                self._make_large(tile // layout.page_tiles - 1)
            rows.append(layout.addresses(page, slot))
        held = self._held
        size, table, address = stop - held.first, held.table, held.address
        if size + count > len(table):
            table, address = _addressed(
                np.concatenate([table[:size], np.zeros((max(count, size, 16), ADDRESSES), np.int64)])
            )
        if rows:
            table[size : size + count] = rows
        self._held = held._replace(stop=stop + count, table=table, address=address)

    def finish(self) -> None:
        """Say that all tiles are written and no more will come: a last page that is full becomes a large one, too."""
        if self.lasting and self._held.stop % self.layout.page_tiles == 0:
            self._make_large(self._held.stop // self.layout.page_tiles - 1)

    def _make_large(self, number: int) -> None:
        """A page is full, unless there never were tiles before some in it."""
        if number in self._held.pages and self._held.written <= number * self.layout.page_tiles:
            slabs.make_large(self._held.pages[number])

    def row(self, tile: int) -> Int64:
        """The addresses of a tile that is held: see layout.py, ``K_CODES``."""
        return self._held.table[tile - self._held.first]

    def copy(self, tile: int, other: "TileStore") -> None:
        """Take over a tile that this store and another one of the same tiles (``TileLayout.same_tiles``) both hold."""
        (page, slot), (source, source_slot) = self.place(tile), other.place(tile)
        own, theirs = self.layout, other.layout
        for side, their_side in ((own.k, theirs.k), (own.v, theirs.v)):
            own.codes(page, side)[:, slot] = theirs.codes(source, their_side)[:, source_slot]
            own.params(page, side)[:, slot] = theirs.params(source, their_side)[:, source_slot]
        for (wide_tile, side_number), scales in other.wide_scales().items():
            if wide_tile == tile:
                self.widen(tile, side_number)
                self.wide_scales()[tile, side_number][:] = scales

    def widen(self, tile: int, side: int) -> None:
        """Give K (side 0) or V (1) of a tile room for scales as float32."""
        held = self._held
        room = zeroed_memory(self.layout.n_kv_heads * self.layout.k.head_stride)
        held.wide[tile, side] = room
        held.table[tile - held.first, (K_PARAMS, V_PARAMS)[side]] = room.ctypes.data + 1

    def wide_scales(self) -> dict[tuple[int, int], Float32]:
        """By tile and side, scales and then minima where they are float32: views (n_kv_heads, numbers)."""
        sides, heads = (self.layout.k, self.layout.v), self.layout.n_kv_heads
        return {
            (tile, side): room.reshape(heads, -1)[:, : 2 * sides[side].params_nbytes].view(np.float32)
            for (tile, side), room in self._held.wide.items()
        }

    def _wide_nbytes(self, side: int) -> int:
        pages = -(-2 * (self.layout.k, self.layout.v)[side].params_nbytes // mmap.PAGESIZE)
        return self.layout.n_kv_heads * pages * mmap.PAGESIZE

    def forget_before(self, tile: int, keep: int = 0) -> None:
        """Drop the tiles before this one, and the pages that are wholly before it but for ``keep`` pages of one tile.

        Those, and what was kept before, at most so many together, are used for the next tiles; a page then holds what it
        held.
        """
        held = self._held
        if tile > held.first:
            kept = {number: page for number, page in held.pages.items() if number >= tile // self.layout.page_tiles}
            if tile > held.stop:
                kept = {}  # what tiles before the gap have taken up is free at once
            wide = held.wide and {key: room for key, room in held.wide.items() if key[0] >= tile}
            written = held.written if held.stop >= tile else tile
            rows = min(tile - held.first, len(held.table))
            table, address = held.table[rows:], held.address + rows * 8 * ADDRESSES
            shared = held.shared and held.shared & kept.keys()
            self._held = _Held(tile, max(held.stop, tile), written, kept, shared, wide, table, address)
            if self.layout.page_tiles == 1 and len(self._spare) < keep:
                self._spare += [page for n, page in held.pages.items() if n not in kept and n not in held.shared]
        del self._spare[keep:]

    def forget_from(self, tile: int) -> None:
        """Drop this tile and those after it, the pages that are wholly after it, and what was kept."""
        held = self._held
        self._spare.clear()
        if tile < held.stop:
            tile = max(tile, held.first)
            kept = {number: page for number, page in held.pages.items() if number * self.layout.page_tiles < tile}
            wide = {key: room for key, room in held.wide.items() if key[0] < tile}
            self._held = held._replace(stop=tile, pages=kept, shared=held.shared & kept.keys(), wide=wide)

    def own(self, tile: int) -> None:
        """See to it that nobody else holds the page of a tile, which is to be written to."""
        if tile // self.layout.page_tiles in self._held.shared:
            self._own(tile // self.layout.page_tiles)

    def _own(self, number: int) -> None:
        """Copy a page that another store holds too."""
        held, layout = self._held, self.layout
        page = layout.empty_page()
        first = max(number * layout.page_tiles, held.first)
        stop = min((number + 1) * layout.page_tiles, held.stop)
        written = max(held.written, first) if first == held.first else held.written
        for view, side in itertools.product((layout.params, layout.codes), (layout.k, layout.v)):
            slots = slice(first - number * layout.page_tiles, stop - number * layout.page_tiles)
            view(page, side)[:, slots] = view(held.pages[number], side)[:, slots]
        table = held.table.copy()
        for tile in range(first, stop):
            own, row = layout.addresses(page, tile % layout.page_tiles), table[tile - held.first]
            for i, address in enumerate(own):
                if not row[i] & 1:
                    row[i] = address
        pages = {**held.pages, number: page}
        self._held = held._replace(
            pages=pages, shared=held.shared - {number}, table=table, address=table.ctypes.data, written=written
        )  # fmt: skip

    def fork(self) -> "TileStore":
        """A store of the same tiles. Their pages are shared until one of the two writes to them."""
        other, held = TileStore(self.layout, self.lasting), self._held
        self._held = held._replace(shared=frozenset(held.pages))
        table, address = _addressed(held.table.copy())
        other._held = self._held._replace(pages=dict(held.pages), wide=dict(held.wide), table=table, address=address)
        return other

    def addresses(self) -> tuple[int, int]:
        """Of the table and of the geometry, for ``attend_segments``. Valid until the next change."""
        self._geometry[FIRST_TILE] = self._held.first
        return self._held.address, self.geometry_address

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse: a copy would keep the addresses of memory that it does not own."""
        raise TypeError("a TileStore (and so a cache or session) holds addresses and cannot be copied or pickled")

    def segment(self, start: int, stop: int) -> Segment:
        """The positions start .. stop as a segment. Valid until the next change."""
        held, layout = self._held, self.layout
        self._geometry[FIRST_TILE] = held.first
        owner = [*held.pages.values(), *held.wide.values()]
        return Segment(held.table, self._geometry, start, stop, layout.n_kv_heads, layout.head_dim, owner)


def seal_job(source: TileStore, target: TileStore, tile: int, dead: int, fitted: bool) -> list[int]:
    """The job (quantize.py) of writing a tile that both stores hold from one to the other."""
    geometries = source.geometry_address, target.geometry_address
    return [*source.row(tile).tolist(), *target.row(tile).tolist(), *geometries, dead, fitted, 0, 0, 0, 0]


def widen_as_found(target: TileStore, tile: int, job: Int64) -> bool:
    """Give the sides of a tile that need it room for scales as float32; True where the job is to be done again."""
    sides = [side for side in (0, 1) if job[TOO_WIDE_AT + side]]
    for side in sides:
        target.widen(tile, side)
    return bool(sides)


def seal(source: TileStore, target: TileStore, tile: int, dead: int, fitted: bool) -> None:
    """Write a tile that both stores hold from one to the other, alone; see ``seal_job``.

    Raises:
        OverflowError: in codes, numbers that are not finite, or whose range is not; in dense tiles, finite ones that do
            not fit.

    """
    again = True
    while again:
        jobs = np.array([seal_job(source, target, tile, dead, fitted)])
        quantize_jobs(jobs, target.layout)
        if jobs[0, IMPOSSIBLE_AT:].any():
            raise OverflowError("a key, a value or a range of them is beyond its type, or not a number")
        again = widen_as_found(target, tile, jobs[0])


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
    fitted: bool = False,
) -> Segment:
    """Quantize k, v (N, Hkv, D) float32 into one segment that ``flash_attention`` takes in the place of arrays.

    Args:
        k, v: float32 (N, Hkv, D). A last tile that N does not fill counts its own tokens only.
        k_bits, v_bits: bits of a code, 8, 4, 3 or 2; or 16 or 32, which keep float16 or float32 in the same tiles.
        tile: tokens that are quantized together: 32, 64 or 128.
        k_axis, v_axis: "channel", one scale a channel and tile, or "token", one a token and group of channels.
        k_group, v_group: channels of a group by token, a multiple of 16 that divides D (rounded up to 16); 0 for the
            largest one up to 64.
        fitted: whether scales and minima under 8 bits are fitted to the values (quantize.py), or those of their range.

    Raises:
        ValueError: bits, a tile, an axis or a group out of those named, or arrays that do not fit together.
        OverflowError: in codes, values that are not finite, or whose range is not; in 16 bits, finite ones beyond float16.

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
    source, store = TileStore(dense), TileStore(target, lasting=True)
    for t, first in enumerate(range(0, n, tile)):
        # A last, partial tile repeats its last token; or all of its own, so that none counts much more than the others
        rows = np.arange(first, first + tile)
        rows = first + (rows - first) % (n - first) if fitted else np.minimum(rows, n - 1)
        store_rows(dense, source.place(t)[0], 0, k[rows].astype(np.float32), v[rows].astype(np.float32))
        source.append()
        store.append()
        seal(source, store, t, 0, fitted)
        source.forget_before(t + 1)
    store.finish()
    return store.segment(plain.start, plain.stop)
