"""Where large arrays lie: memory from the system, in pages as small or as large as suits what is done with it."""

import contextlib
import errno
import mmap
import threading

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

ALIGNMENT = 64
LARGE_PAGE = 1 << 21
_CHUNK_NBYTES = 1 << 25  # what is taken from the system at a time


def aligned_zeros(nbytes: int) -> Bytes:
    """Zeros, uint8 (nbytes,), whose first byte lies on a 64-byte boundary."""
    room = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]


def zeroed_memory(nbytes: int) -> Bytes:
    """Zeros, uint8 (nbytes,), aligned to 64 bytes, which take up room as they are written to, 4 kB at a time."""
    return _mapped(nbytes, "MADV_NOHUGEPAGE")  # a large page would be taken up whole by the first bytes


def _mapped(nbytes: int, advice: str) -> Bytes:
    """Zeros from the system, with some advice for it if it knows such."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return aligned_zeros(nbytes)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"{nbytes:,} bytes are not to be had") from None
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):
            memory.madvise(getattr(mmap, advice))
    return np.frombuffer(memory, np.uint8)


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
                chunk = _mapped(max(size, _CHUNK_NBYTES) + LARGE_PAGE, "MADV_HUGEPAGE")
                self._free = chunk[-chunk.ctypes.data % LARGE_PAGE :]
            found, self._free = self._free[:nbytes], self._free[size:]
        return found


large_pages = LargePages()
"""Of this process."""
