"""Where large arrays lie: memory from the system, in pages as small or as large as suits what is done with it."""

import contextlib
import errno
import heapq
import mmap
import sys
import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

ALIGNMENT = 64
LARGE_PAGE = 1 << 21
_CHUNK_NBYTES = 1 << 25  # what is taken from the system for weights at a time
_SLAB_NBYTES = 1 << 24  # and for rooms of one size
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1 (https://man7.org/linux/man-pages/man2/madvise.2.html), new to ``mmap``


def aligned_zeros(nbytes: int) -> Bytes:
    """Zeros, uint8 (nbytes,), whose first byte lies on a 64-byte boundary."""
    room = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]


def zeroed_memory(nbytes: int) -> Bytes:
    """Zeros, uint8 (nbytes,), aligned to 64 bytes, which take up room as they are written to, 4 kB at a time."""
    memory = _mapped(nbytes, "MADV_NOHUGEPAGE")  # a large page would be taken up whole by the first bytes
    return aligned_zeros(nbytes) if memory is None else np.frombuffer(memory, np.uint8)


def _mapped(nbytes: int, advice: str) -> mmap.mmap | None:
    """Zeros from the system, with some advice for it if it knows such; None where memory is not had that way."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return None
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"{nbytes:,} bytes are not to be had") from None
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):
            memory.madvise(getattr(mmap, advice))
    return memory


class LargePages:
    """Memory for arrays that stay, one behind the other in pages of 2 MB, where the system has such.

    Weights are read from end to end for every token, and each page of 4 kB of them would cost a look-up that the processor
    cannot keep. A matrix is often smaller than a large page, so they share.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: Bytes = np.empty(0, np.uint8)  # the rest of the last chunk

    def zeros(self, nbytes: int) -> Bytes:
        """Zeros, uint8 (nbytes,), aligned to 64 bytes. A chunk is given back when nothing in it is in use any more."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if size > len(self._free):
                total = max(size, _CHUNK_NBYTES) + LARGE_PAGE
                memory = _mapped(total, "MADV_HUGEPAGE")
                chunk = aligned_zeros(total) if memory is None else np.frombuffer(memory, np.uint8)
                self._free = chunk[-chunk.ctypes.data % LARGE_PAGE :]
            found, self._free = self._free[:nbytes], self._free[size:]
        return found


large_pages = LargePages()
"""Of this process."""


class _Slab:
    """Rooms of one size, side by side from the start of a large page on."""

    # Kept here, as a module's names are gone when a program ends and its last arrays are dropped
    _GIVE_BACK = tuple(getattr(mmap, advice, 0) for advice in ("MADV_NOHUGEPAGE", "MADV_DONTNEED"))

    def __init__(self, size: int, returned: "deque[tuple[_Slab, int]]") -> None:
        self.size, self._returned = size, returned
        self._rooms = max(1, _SLAB_NBYTES // size)
        memory = _mapped(self._rooms * size + LARGE_PAGE, "MADV_NOHUGEPAGE")
        assert memory is not None
        self._memory = memory
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._start = -address % LARGE_PAGE
        self._address = address + self._start
        self._begun = 0  # rooms that were ever taken: the first so many
        self.free: list[int] = []  # of those, the ones that were given back, as a heap
        self.taken: dict[int, _Room] = {}
        self._full: set[int] = set()

    @property
    def has_room(self) -> bool:
        """Whether one can be taken."""
        return bool(self.free) or self._begun < self._rooms

    def take(self, nbytes: int) -> Bytes:
        """The first free room. It is free again when neither the array nor a view of it is left."""
        if self.free:
            index = heapq.heappop(self.free)
        else:
            index, self._begun = self._begun, self._begun + 1
        # Not a part of an array over all rooms: that would be the base of all views, and this one's death mean nothing
        room = np.frombuffer(self._memory, np.uint8, nbytes, self._start + index * self.size)
        self.taken[index] = held = _Room(room, _dropped)
        held.slab, held.index = self, index
        return room

    def give_back(self, index: int) -> None:
        """Give a room's memory back to the system at once. Python calls this at any time, within anything."""
        self.taken.pop(index, None)
        self._full.discard(index)
        where = self._start + index * self.size, self.size
        try:
            for advice in self._GIVE_BACK:
                self._memory.madvise(advice, *where)
        except OSError:
            return  # memory that is locked: it is not zeros, and nobody gets it again
        self._returned.append((self, index))

    def index(self, room: Bytes) -> int | None:
        """The number of a room, if it is here."""
        place = room.ctypes.data - self._address
        return place // self.size if 0 <= place < self._rooms * self.size else None

    def make_large(self, index: int) -> None:
        """Make one large page of each that has nothing but rooms that are full and stay now."""
        self._full.add(index)
        size = self.size
        for page in range(index * size // LARGE_PAGE, ((index + 1) * size - 1) // LARGE_PAGE + 1):
            rooms = range(page * LARGE_PAGE // size, ((page + 1) * LARGE_PAGE - 1) // size + 1)
            if rooms.stop <= self._rooms and self._full.issuperset(rooms):
                where = self._start + page * LARGE_PAGE, LARGE_PAGE
                with contextlib.suppress(OSError):  # no large page is to be had, or the system does not know how
                    self._memory.madvise(mmap.MADV_HUGEPAGE, *where)
                    self._memory.madvise(_COLLAPSE, *where)


class _Room(weakref.ref[Bytes]):
    """A room that is in use, and which one of a slab it is."""

    __slots__ = ("index", "slab")
    slab: _Slab
    index: int


def _dropped(held: _Room) -> None:
    held.slab.give_back(held.index)


class Slabs:
    """Memory for pages of a cache, which come and go one by one but are read from end to end for every token.

    A room takes up memory as it is written to, 4 kB at a time, and gives it back when it is dropped. Rooms of a size lie
    side by side, so that those which are full and stay can lie in large pages (``make_large``): then they are found without
    the look-ups that small pages cost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slabs: dict[int, list[_Slab]] = {}  # by the size of their rooms
        self._returned: deque[tuple[_Slab, int]] = deque()  # rooms that were given back and are not in ``free`` yet

    def zeros(self, nbytes: int) -> Bytes:
        """Zeros, uint8 (nbytes,), that begin with a page of the system."""
        if sys.platform != "linux":  # elsewhere memory that is given back need not be zeros afterwards
            return zeroed_memory(nbytes)
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            self._take_back()
            slabs = self._slabs.setdefault(size, [])
            slab = next((slab for slab in slabs if slab.has_room), None)
            if slab is None:
                slab = _Slab(size, self._returned)
                slabs.append(slab)
            return slab.take(nbytes)

    def _take_back(self) -> None:
        """Make what was given back free; a slab that nobody uses goes back to the system."""
        while self._returned:
            slab, index = self._returned.popleft()
            heapq.heappush(slab.free, index)
            if not slab.taken and slab in self._slabs[slab.size]:
                self._slabs[slab.size].remove(slab)

    def make_large(self, room: Bytes) -> None:
        """Say that a room is written from end to end, and will stay for long."""
        for slab in self._slabs.get(-(-len(room) // mmap.PAGESIZE) * mmap.PAGESIZE, []):
            index = slab.index(room)
            if index is not None:
                slab.make_large(index)


slabs = Slabs()
"""Of this process."""
