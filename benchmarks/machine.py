"""What this machine can do, measured: reading memory, float32 in BLAS, and products of bytes in registers.

`python benchmarks/machine.py` prints it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import prange, types
from numba.core.registry import cpu_target

from mixkv.kernels import simd
from mixkv.kernels.layout import aligned_zeros

CALM = 0.3  # seconds after which another library's threads no longer spin
SUMS = 16  # accumulators: more than the steps that an addition or a dot product takes
STEP_BYTES = SUMS * 64
ONES = 0x01010101  # what is read, and what is multiplied: four bytes of 1
DOT_PRODUCTS = 64  # products of bytes in one 512-bit dot product

binding.initialize_native_asmparser()


@dataclass(frozen=True)
class Machine:
    """Rates in 10^9 a second: bytes, floating-point operations (0: not measured), products of bytes."""

    threads: int
    threading_layer: str
    gigabytes: float
    blas_gflops: float
    dot_instruction: str
    dot_products_thread: float
    dot_products: float

    def __str__(self) -> str:
        """What is printed."""
        blas = f"BLAS float32 {self.blas_gflops:.0f} GFLOP/s; " if self.blas_gflops else ""
        return (
            f"{self.threads} threads ({self.threading_layer}); reads {self.gigabytes:.1f} GB/s; {blas}"
            f"{self.dot_instruction} {self.dot_products_thread:.0f} billion byte products/s a thread, "
            f"{self.dot_products:.0f} on all"
        )

    def best(self, other: "Machine") -> "Machine":
        """The higher rate of two measurements, each of which something else may have disturbed."""
        rates = ("gigabytes", "blas_gflops", "dot_products_thread", "dot_products")
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in rates})


def last_level_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


COLD_BYTES = max(256 * 2**20, 2 * last_level_cache())
"""So many bytes are read before the same ones are read again, so that they come from memory."""


def _loop(step: Callable[..., list[Any]], name: str) -> Any:
    """An intrinsic (count, source, target): ``step`` on 16 vector accumulators, ``count`` times; their sum is stored."""

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


def has_byte_dot(context: Any) -> bool:
    """Whether the CPU that kernels are compiled for has the 512-bit dot product of bytes."""
    return simd.is_x86() and simd.cpu_has(context, "avx512vnni")


def _dot_bytes(context: Any, builder: Any, sums: list[Any], source: Any, i: Any) -> list[Any]:
    ones = simd._const(simd._V_I32, ONES)
    if not has_byte_dot(context):
        return [simd._dot_pairs(context, builder, a, ones, ones) for a in sums]
    signature = ir.FunctionType(simd._V_I32, [simd._V_I32] * 3)
    return [builder.asm(signature, "vpdpbusd $3, $2, $0", "=v,0,v,v", [a, ones, ones], False) for a in sums]


_read, _multiply = _loop(_add_lines, "add_lines"), _loop(_dot_bytes, "dot_bytes")


@numba.njit(parallel=True)
def _read_all(source, steps, sums, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        first, stop = steps * worker // workers, steps * (worker + 1) // workers
        _read(stop - first, source + first * STEP_BYTES, sums.ctypes.data + worker * 64)


@numba.njit(parallel=True)
def _multiply_all(count, sums, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        _multiply(count, np.int64(0), sums.ctypes.data + worker * 64)


def _best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def _expect(sums: Any, lane: int) -> None:
    """Refuse a loop that did not do its work: each of 16 lanes, summed over the threads, in 32 bits."""
    lane += len(sums) * sum(range(SUMS))  # where the accumulators began
    if (sums.sum(axis=0, dtype=np.int64) - lane).astype(np.int32).any():
        raise AssertionError(f"the loop made {sums.sum(axis=0)} of what should be {lane}")


def _read_buffer(buffer: Any, threads: int) -> float:
    nbytes, sums = len(buffer), np.zeros((threads, 16), np.int32)
    address = buffer.ctypes.data
    seconds = _best(lambda: _read_all(address, nbytes // STEP_BYTES, sums, threads), 8)
    _expect(sums, nbytes // 64 * ONES)
    return nbytes / seconds / 1e9


def blas_rate(size: int = 2_048) -> float:
    """10^9 float32 operations a second of NumPy's matrix product, the median of seven."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    times = []
    for _ in range(8):
        begun = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begun)
        time.sleep(CALM)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9


def dot_rate(threads: int, steps: int = 1_000_000) -> float:
    """10^9 products of bytes a second that so many threads make when nothing is loaded."""
    sums = np.zeros((threads, 16), np.int32)
    seconds = _best(lambda: _multiply_all(steps, sums, threads), 8)
    pairs = ONES & 0xFFFF
    _expect(sums, threads * steps * SUMS * (4 if has_byte_dot(cpu_target.target_context) else 2 * pairs * pairs))
    return threads * steps * SUMS * DOT_PRODUCTS / seconds / 1e9


class Meter:
    """Measures the machine, again and again, with the same buffer."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._buffer = aligned_zeros(max(512 * 2**20, COLD_BYTES) // STEP_BYTES * STEP_BYTES)
        self._buffer[:] = 1  # pages that were never written to are all the same page
        self.best = self.measure(blas=True)

    def measure(self, *, blas: bool) -> Machine:
        """Everything that this many threads can do; BLAS only if asked for, as it takes seconds."""
        instruction = "vpdpbusd" if has_byte_dot(cpu_target.target_context) else "16-bit dot products, twice,"
        gigabytes, one, every = _read_buffer(self._buffer, self.threads), dot_rate(1), dot_rate(self.threads)
        found = Machine(
            self.threads, numba.threading_layer(), gigabytes, blas_rate() if blas else 0.0, instruction, one, every
        )
        self.best = found.best(getattr(self, "best", found))
        return found


if __name__ == "__main__":
    print(Meter(numba.get_num_threads()).best)
