"""How fast this machine reads memory: vectors are loaded from a large buffer and summed, so that none can be left out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numpy.typing import NDArray

from . import simd
from .jit import parallel_kernel
from .memory import Bytes, aligned_zeros

SUMS = 16  # accumulators: more than the steps that an addition takes
STEP_BYTES = SUMS * 64
ONES = 0x01010101  # what is read: four bytes of 1
SMALLEST_BUFFER = 512 * 2**20
REPEATS = 8


def last_level_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def vector_loop(step: Callable[..., list[Any]], name: str) -> Any:
    """An intrinsic (count, source, target): ``step`` on 16 vector accumulators, ``count`` times; their sum is stored.

    ``step`` is (context, builder, the accumulators, source, number of the step) -> the accumulators, as LLVM values of
    16 x i32. They begin at 0, 1 .. 15 in every lane: equal ones would be one to the compiler.
    """

    def body(context: Any, builder: Any, count: Any, source: Any, target: Any) -> None:
        vector, word = simd._V_I32, count.type
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(word)
        accumulators = [builder.phi(vector) for _ in range(SUMS)]
        sums = step(context, builder, accumulators, source, i)
        following = builder.add(i, ir.Constant(word, 1))
        i.add_incoming(ir.Constant(word, 0), before)
        i.add_incoming(following, loop)
        for k, (phi, total) in enumerate(zip(accumulators, sums, strict=True)):
            phi.add_incoming(simd._const(vector, k), before)
            phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        total = sums[0]
        for more in sums[1:]:
            total = builder.add(total, more)
        builder.store(total, simd._pointer(builder, target, vector)).align = 4

    body.__name__ = name
    return simd._operation(types.void, types.intp, types.intp, types.intp)(body)


def _add_lines(context: Any, builder: Any, sums: list[Any], source: Any, i: Any) -> list[Any]:
    start = builder.add(source, builder.mul(i, ir.Constant(i.type, STEP_BYTES)))
    lines = [builder.add(start, ir.Constant(i.type, 64 * k)) for k in range(SUMS)]
    return [builder.add(a, simd._load(builder, at, simd._V_I32)) for a, at in zip(sums, lines, strict=True)]


_read = vector_loop(_add_lines, "add_lines")


@parallel_kernel
def _read_all(source, steps, sums, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        first, stop = steps * worker // workers, steps * (worker + 1) // workers
        _read(stop - first, source + first * STEP_BYTES, sums.ctypes.data + worker * 64)


def best_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of so many calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def expect_sums(sums: NDArray[np.int32], lane: int) -> None:
    """AssertionError for a loop that did not do its work: ``sums`` (threads, 16), each lane summed up in 32 bits."""
    lane += len(sums) * sum(range(SUMS))  # where the accumulators began
    if (sums.sum(axis=0, dtype=np.int64) - lane).astype(np.int32).any():
        raise AssertionError(f"the loop made {sums.sum(axis=0)} of what should be {lane}")


def cold_buffer() -> Bytes:
    """What is read: bytes of 1, uint8, at least 512 MiB and twice the largest cache, so that they come from memory."""
    buffer = aligned_zeros(max(SMALLEST_BUFFER, 2 * last_level_cache()) // STEP_BYTES * STEP_BYTES)
    buffer[:] = 1  # pages that were never written to are all the same page
    return buffer


def read_bandwidth(threads: int, buffer: Bytes | None = None) -> float:
    """Bytes a second that so many threads read from memory: the best of eight passes over ``cold_buffer()``.

    Args:
        threads: from 1 to the threads that Numba has in force.
        buffer: what to read instead: bytes of 1, uint8 (N,), N a multiple of 1,024 and at least 1,024 a thread.

    Raises:
        ValueError: threads or a buffer out of range.
        AssertionError: sums that are not those of the buffer.

    """
    most = numba.get_num_threads()
    if not 1 <= threads <= most:
        raise ValueError(f"threads must be from 1 to {most}, found {threads}")
    buffer = cold_buffer() if buffer is None else buffer
    if len(buffer) % STEP_BYTES or len(buffer) < threads * STEP_BYTES:
        raise ValueError(f"the buffer must have {STEP_BYTES} bytes or a multiple for each thread, found {len(buffer)}")
    sums = np.zeros((threads, 16), np.int32)
    address, steps = buffer.ctypes.data, len(buffer) // STEP_BYTES
    seconds = best_seconds(lambda: _read_all(address, steps, sums, threads))
    expect_sums(sums, len(buffer) // 64 * ONES)
    return len(buffer) / seconds
