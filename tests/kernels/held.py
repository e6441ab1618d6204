"""What a store of tiles has to hold, kept in plain dictionaries beside it; forks of the two as well."""

import itertools
import mmap

import numpy as np

from mixkv.kernels.layout import K_CODES, K_PARAMS, V_CODES, V_PARAMS
from mixkv.kernels.segment import TileStore
from mixkv.kernels.tables import FIRST_TILE

from .oracle import bytes_at, layout_of, part_offsets, part_sizes

HEADS, TILE, D = 2, 32, 16
NUMBERS = itertools.count(1)  # no two tiles are alike, whoever writes them


def pattern(number: int, part: int, head: int, nbytes: int) -> np.ndarray:
    """Bytes that say where they belong."""
    word = np.array([number * 16 + part * HEADS + head], "<u4")
    return np.resize(word.view(np.uint8), nbytes)


class Held:
    """A store of tiles of 32 tokens, two heads and head_dim 16, and what it has to hold."""

    kinds = ("q4", "q3t")

    def __init__(self, page_tiles: int, store: TileStore | None = None) -> None:
        self.store = store or TileStore(layout_of(self.kinds, TILE, HEADS, D, page_tiles))
        self.page_tiles = page_tiles
        self.sizes = part_sizes(self.kinds, TILE, D)
        self.first = 0
        self.numbers: dict[int, int] = {}  # of the tiles held
        self.wide: dict[tuple[int, int], int] = {}  # by tile and side
        self.pages: dict[int, np.ndarray] = {}
        self.written: dict[int, set[int]] = {}  # the tiles that each page has taken up room for
        self.shared: set[int] = set()
        self.spare: list[np.ndarray] = []

    @property
    def stop(self) -> int:
        return self.first + len(self.numbers)

    # --- steps -------------------------------------------------------------------------------------------------------

    def write_next(self) -> int:
        """Write to the place of the next tile, which is not held by that."""
        return self._write(self.stop)

    def _write(self, tile: int) -> int:
        number = next(NUMBERS)
        page, slot = self.store.place(tile)
        self._changed(tile // self.page_tiles, page)
        for head in range(HEADS):
            for part, at in enumerate(part_offsets(self.kinds, TILE, D, self.page_tiles, head, slot)):
                page[at : at + self.sizes[part]] = pattern(number, part, head, self.sizes[part])
        self.written[tile // self.page_tiles].add(tile)
        return number

    def _changed(self, number: int, page: np.ndarray) -> None:
        """A page is a new one if there was none, or if it was shared; and no other one."""
        old = self.pages.get(number)
        assert (page is old) == (old is not None and number not in self.shared)
        if page is not old:
            assert old is None or not np.shares_memory(page, old)
            if old is None and self.spare:
                left = [x for x in self.spare if x is not page]
                assert len(left) == len(self.spare) - 1
                self.spare = left
            tiles = range(number * self.page_tiles, (number + 1) * self.page_tiles)
            self.written[number] = {t for t in tiles if t in self.numbers}
        self.pages[number] = page
        self.shared.discard(number)

    def append(self, count: int = 1) -> None:
        """Hold so many more tiles, and write to them afterwards, or to a single one before, whose place comes first."""
        if count == 1:
            number = self.write_next()
            self.store.append()
            self.numbers[self.stop] = number
            return
        first = self.stop
        self.store.append(count)
        for tile in range(first, first + count):
            self.numbers[tile] = self._write(tile)

    def own(self, tile: int) -> None:
        """Any tile, held or not."""
        self.store.own(tile)
        if self.first <= tile < self.stop:
            self._changed(tile // self.page_tiles, self.store.place(tile)[0])
        elif tile // self.page_tiles in self.shared:  # its page holds others, or what was not appended
            place = list(self.pages).index(tile // self.page_tiles)
            page = self.store.segment(0, 0).owner[place]
            self._changed(tile // self.page_tiles, page)

    def widen(self, tile: int, side: int) -> None:
        """Room for scales as float32, written all over."""
        self.store.widen(tile, side)
        number = next(NUMBERS)
        self.wide[tile, side] = number
        for head in range(HEADS):
            room = self._wide_room(tile, side, head)
            assert not room.any()
            room[:] = pattern(number, side, head, len(room))

    def _wide_room(self, tile: int, side: int, head: int) -> np.ndarray:
        """Scales and minima of a head as float32: from one byte before an odd address on, heads as far apart as ever."""
        address = int(self.store.row(tile)[(K_PARAMS, V_PARAMS)[side]])
        assert address % 2 == 1
        return bytes_at(address - 1 + head * self.page_tiles * sum(self.sizes), 2 * self.sizes[2 * side])

    def forget_before(self, tile: int, keep: int = 0) -> None:
        self.store.forget_before(tile, keep)
        if tile > self.first:
            before, shared = self.pages, self.shared
            kept = range(tile // self.page_tiles, 1000) if tile <= self.stop else ()
            self.first, self.numbers = tile, {t: x for t, x in self.numbers.items() if t >= tile}
            self._keep(kept)
            if self.page_tiles == 1:
                self.spare += [page for n, page in before.items() if n not in self.pages and n not in shared]
        self.spare = self.spare[:keep]

    def forget_from(self, tile: int) -> None:
        self.store.forget_from(tile)
        self.spare = []
        if tile < self.stop:
            self.numbers = {t: x for t, x in self.numbers.items() if t < tile}
            self._keep(range(-(-self.stop // self.page_tiles)))

    def _keep(self, pages: range | tuple[()]) -> None:
        self.pages = {n: page for n, page in self.pages.items() if n in pages}
        self.shared = self.shared & self.pages.keys()
        self.wide = {key: x for key, x in self.wide.items() if key[0] in self.numbers}

    def fork(self) -> "Held":
        other = Held(self.page_tiles, self.store.fork())
        other.first, other.numbers, other.wide = self.first, dict(self.numbers), dict(self.wide)
        other.pages, other.written = dict(self.pages), {n: set(x) for n, x in self.written.items()}
        self.shared, other.shared = set(self.pages), set(self.pages)
        return other

    # --- what there should be ----------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Of the tiles held, of forgotten ones in the page of the first, of pages kept, and of scales as float32."""
        number = self.first // self.page_tiles
        before = [t for t in self.written.get(number, ()) if t < self.first] if number in self.pages else []
        tiles = len(self.numbers) + len(before) + len(self.spare)
        return tiles * HEADS * sum(self.sizes) + len(self.wide) * HEADS * mmap.PAGESIZE

    def assert_holds(self) -> None:
        """Everything that can be asked of the store says: these tiles, from this one on."""
        store = self.store
        assert (store.first, store.stop, store.nbytes) == (self.first, self.stop, self.nbytes())
        segment = store.segment(self.first * TILE, self.first * TILE + 5)
        assert (segment.start, segment.stop) == (self.first * TILE, self.first * TILE + 5)
        assert segment.geometry[FIRST_TILE] == self.first
        pages, rooms = segment.owner[: len(self.pages)], segment.owner[len(self.pages) :]
        assert all(a is b for a, b in zip(pages, self.pages.values(), strict=True))
        assert len(rooms) == len(self.wide)
        places = [store.place(t) for t in self.numbers]
        assert all(page is self.pages[t // self.page_tiles] for (page, _), t in zip(places, self.numbers, strict=True))
        assert [slot for _, slot in places] == [t % self.page_tiles for t in self.numbers]
        for i, (t, (page, slot)) in enumerate(zip(self.numbers, places, strict=True)):
            self._assert_tile(t, segment.table[i], page, slot, rooms)

    def _assert_tile(self, t: int, row: np.ndarray, page: np.ndarray, slot: int, rooms: list[np.ndarray]) -> None:
        assert row.tolist() == self.store.row(t).tolist()
        for head in range(HEADS):
            offsets = part_offsets(self.kinds, TILE, D, self.page_tiles, head, slot)
            for part, (at, which) in enumerate(zip(offsets, (K_PARAMS, K_CODES, V_PARAMS, V_CODES), strict=True)):
                wide = self.wide.get((t, part // 2)) if part % 2 == 0 else None
                if wide is None:
                    assert head or row[which] == page.ctypes.data + at
                    want, found = self.numbers[t], page[at : at + self.sizes[part]]
                    assert (found == pattern(want, part, head, len(found))).all()
                else:
                    assert sum(room.ctypes.data + 1 == row[which] for room in rooms) == 1
                    found = self._wide_room(t, part // 2, head)
                    assert (found == pattern(wide, part // 2, head, len(found))).all()
