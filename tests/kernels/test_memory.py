"""Memory from the system: aligned, zero, apart, and given back."""

import ctypes
import gc
import mmap
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixkv.kernels.memory
from mixkv.kernels.layout import Q4, TileLayout
from mixkv.kernels.memory import ALIGNMENT, LARGE_PAGE, LargePages, Slabs, aligned_zeros, zeroed_memory
from mixkv.kernels.segment import TileStore

PAGE = mmap.PAGESIZE
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its memory")


@pytest.mark.parametrize("allocate", [aligned_zeros, zeroed_memory, LargePages().zeros, Slabs().zeros])
def test_memory_is_zero_aligned_and_can_be_written(allocate) -> None:
    for nbytes in (1, 64, 4097, 3 * LARGE_PAGE + 5):
        found = allocate(nbytes)
        assert found.shape == (nbytes,) and found.dtype == "uint8"
        assert found.ctypes.data % ALIGNMENT == 0 and not found.any()
        found[:] = 255


@given(st.lists(st.integers(0, 200_000), max_size=30))
def test_arrays_in_large_pages_do_not_overlap(sizes: list[int]) -> None:
    pages = LargePages()
    arrays = [pages.zeros(size) for size in sizes]
    for i, array in enumerate(arrays):
        assert not array.any()
        array[:] = i + 1
    for i, array in enumerate(arrays):
        assert len(array) == sizes[i] and (array == i + 1).all()


def test_small_arrays_share_a_chunk_that_begins_with_a_large_page() -> None:
    pages = LargePages()
    first, second = pages.zeros(100), pages.zeros(100)
    assert first.ctypes.data % LARGE_PAGE == 0
    assert second.ctypes.data == first.ctypes.data + 2 * ALIGNMENT


@pytest.mark.parametrize("kind", [LargePages, Slabs])
def test_threads_get_arrays_of_their_own(kind: type[LargePages] | type[Slabs]) -> None:
    pages, found = kind(), []

    def take() -> None:
        for _ in range(3000):
            found.append(pages.zeros(1000))

    threads = [threading.Thread(target=take) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    addresses = sorted(x.ctypes.data for x in found)
    assert all(b - a >= 1000 for a, b in zip(addresses, addresses[1:], strict=False))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_chunk_that_nobody_uses_is_given_back() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    pages = LargePages()
    before = resident()
    for _ in range(8):
        pages.zeros(1 << 25)[:] = 1
    gc.collect()
    assert resident() - before < 3 << 25


def resident_in(room: np.ndarray) -> int:
    """Bytes of an array, which begins with a page of the system, that are in memory."""
    found = (ctypes.c_ubyte * -(-len(room) // PAGE))()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    assert libc.mincore(room.ctypes.data, room.nbytes, found) == 0
    return sum(x & 1 for x in found) * PAGE


def in_large_pages(first: np.ndarray, last: np.ndarray) -> int:
    """Bytes of large pages in all mappings from one array to another."""
    start, stop, found, inside = first.ctypes.data, last.ctypes.data + len(last), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(x, 16) for x in mapping.groups())
            inside = low < stop and start < high
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


@given(
    st.lists(st.tuples(st.sampled_from([1, 5000, 300_000]), st.booleans(), st.booleans()), max_size=60), st.randoms()
)
def test_rooms_come_and_go_as_zeros_and_never_overlap(steps: list[tuple[int, bool, bool]], random) -> None:
    slabs, held = Slabs(), {}
    for i, (nbytes, drops, settles) in enumerate(steps):
        room = slabs.zeros(nbytes)
        assert len(room) == nbytes and not room.any()
        room[:] = i % 255 + 1
        held[i] = room
        del room
        if settles:
            slabs.make_large(held[i])
        if drops:
            held.pop(random.choice(sorted(held)))
        for number, kept in held.items():
            assert kept[0] == kept[-1] == number % 255 + 1
    for number, kept in held.items():
        assert (kept == number % 255 + 1).all()


@needs_linux
def test_a_room_takes_up_memory_as_it_is_written_to_and_gives_it_back() -> None:
    slabs = Slabs()
    first, room = slabs.zeros(64 * PAGE), slabs.zeros(64 * PAGE)
    assert room.ctypes.data == first.ctypes.data + 64 * PAGE and resident_in(room) == 0
    room[5 * PAGE] = room[9 * PAGE] = 1
    assert resident_in(room) == 2 * PAGE
    address, view = room.ctypes.data, room.reshape(64, PAGE)[5:][0]
    del room
    gc.collect()
    assert slabs.zeros(64 * PAGE).ctypes.data != address and view[0] == 1, "a view keeps the room"
    del view
    gc.collect()
    again = slabs.zeros(64 * PAGE)
    assert again.ctypes.data == address and resident_in(again) == 0 and not again.any()


@needs_linux
def test_a_slab_that_nobody_uses_is_dropped() -> None:
    slabs = Slabs()
    rooms = [slabs.zeros(PAGE) for _ in range(2)]
    slab = weakref.ref(slabs._slabs[PAGE][0])
    rooms.pop()
    slabs.zeros(2 * PAGE)  # whatever is asked for next
    assert slab() is not None
    rooms.pop()
    slabs.zeros(2 * PAGE)
    assert slab() is None


@needs_linux
@pytest.mark.parametrize("nbytes", [108 * 1024, LARGE_PAGE // 4, 3 * LARGE_PAGE + PAGE])
def test_only_what_is_full_from_end_to_end_becomes_a_large_page(nbytes: int) -> None:
    slabs = Slabs()
    rooms = [slabs.zeros(nbytes) for _ in range(-(-2 * LARGE_PAGE // nbytes) + 1)]
    for i, room in enumerate(rooms):
        room[:] = i + 1
    for room in rooms[1:]:
        slabs.make_large(room)
        slabs.make_large(room)
    before = in_large_pages(rooms[0], rooms[-1])
    if before == 0:
        pytest.skip("this system makes no large pages of small ones")
    slabs.make_large(rooms[0])
    assert in_large_pages(rooms[0], rooms[-1]) > before
    for i, room in enumerate(rooms):
        assert (room == i + 1).all() and resident_in(room) == -(-nbytes // PAGE) * PAGE
    dropped = rooms.pop(0).ctypes.data
    gc.collect()
    for i, room in enumerate(rooms, 2):
        assert (room == i).all()
    again = slabs.zeros(nbytes)
    again[0] = 1
    assert again.ctypes.data == dropped and resident_in(again) == PAGE, "it begins with small pages again"
    assert not again[1:].any()


def test_memory_that_cannot_be_given_back_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("locked")

    monkeypatch.setattr(mixkv.kernels.memory.mmap, "mmap", Locked)
    slabs = Slabs()
    kept, room = slabs.zeros(100), slabs.zeros(100)
    room[:] = 1
    slabs.make_large(room)
    del room
    gc.collect()
    assert not any(slabs.zeros(100).any() for _ in range(3)) and not kept.any()


@pytest.mark.parametrize("lasting", [True, False])
def test_a_store_makes_full_pages_large_if_its_tiles_last(lasting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = []
    monkeypatch.setattr(mixkv.kernels.memory.slabs, "make_large", lambda room: settled.append(room.ctypes.data))
    store = TileStore(TileLayout(1, 16, 32, Q4, Q4, page_tiles=4), lasting)
    store.forget_before(6)  # in the midst of a page, whose beginning is never written
    pages = []
    for _ in range(11):
        page, slot = store.place(store.stop)
        if not pages or slot == 0:
            pages.append(page.ctypes.data)
        store.append()
    assert len(pages) == 4 and settled == (pages[1:3] if lasting else [])
    fork = store.fork()
    for _ in range(8):
        fork.append()
    assert settled[2:] == ([fork.place(t)[0].ctypes.data for t in (16, 20)] if lasting else [])


@pytest.mark.parametrize(("tiles", "large"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_a_finished_store_has_its_last_page_large_if_that_is_full(
    tiles: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = set()
    monkeypatch.setattr(mixkv.kernels.memory.slabs, "make_large", lambda room: settled.add(room.ctypes.data))
    for lasting in (True, False):
        settled.clear()
        store = TileStore(TileLayout(1, 16, 32, Q4, Q4, page_tiles=4), lasting)
        store.append(tiles)
        store.finish()
        assert settled == ({store.place(4 * page)[0].ctypes.data for page in range(large)} if lasting else set())


def test_where_memory_is_given_back_otherwise_there_are_no_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    slabs = Slabs()
    room = slabs.zeros(5000)
    assert len(room) == 5000 and not room.any() and not slabs._slabs
    slabs.make_large(room)


OUTLIVES_MODULES = """
import numba
from mixkv.kernels.memory import slabs

@numba.njit
def function(x):
    return x

function(1)  # keeps the names of this program until all modules are taken apart
room = slabs.zeros(5000)
"""


@needs_linux
def test_memory_that_outlives_the_modules_is_given_back_without_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", OUTLIVES_MODULES], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
