"""Memory from the system: aligned, zero, apart, and given back."""

import gc
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.kernels.memory import ALIGNMENT, LARGE_PAGE, LargePages, aligned_zeros, zeroed_memory


@pytest.mark.parametrize("allocate", [aligned_zeros, zeroed_memory, LargePages().zeros])
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


def test_threads_get_arrays_of_their_own() -> None:
    pages, found = LargePages(), []

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
