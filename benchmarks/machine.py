"""What this machine can do, measured: reading memory, float32 in BLAS, and products of bytes in registers.

`python benchmarks/machine.py` prints it.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import prange
from numba.core.registry import cpu_target

from mixkv.kernels import simd
from mixkv.kernels.bandwidth import (
    ONES,
    SUMS,
    best_seconds,
    cold_buffer,
    expect_sums,
    last_level_cache,
    read_bandwidth,
    vector_loop,
)

CALM = 0.3  # seconds after which another library's threads no longer spin
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


COLD_BYTES = max(256 * 2**20, 2 * last_level_cache())
"""So many bytes are read before the same ones are read again, so that they come from memory."""


def has_byte_dot(context: Any) -> bool:
    """Whether the CPU that kernels are compiled for has the 512-bit dot product of bytes."""
    return simd.is_x86() and simd.cpu_has(context, "avx512vnni")


def _dot_bytes(context: Any, builder: Any, sums: list[Any], source: Any, i: Any) -> list[Any]:
    ones = simd._const(simd._V_I32, ONES)
    if not has_byte_dot(context):
        return [simd._dot_pairs(context, builder, a, ones, ones) for a in sums]
    signature = ir.FunctionType(simd._V_I32, [simd._V_I32] * 3)
    return [builder.asm(signature, "vpdpbusd $3, $2, $0", "=v,0,v,v", [a, ones, ones], False) for a in sums]


_multiply = vector_loop(_dot_bytes, "dot_bytes")


@numba.njit(parallel=True)
def _multiply_all(count, sums, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        _multiply(count, np.int64(0), sums.ctypes.data + worker * 64)


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
    seconds = best_seconds(lambda: _multiply_all(steps, sums, threads))
    pairs = ONES & 0xFFFF
    expect_sums(sums, threads * steps * SUMS * (4 if has_byte_dot(cpu_target.target_context) else 2 * pairs * pairs))
    return threads * steps * SUMS * DOT_PRODUCTS / seconds / 1e9


class Meter:
    """Measures the machine, again and again, with the same buffer."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._buffer = cold_buffer()
        self.best = self.measure(blas=True)

    def measure(self, *, blas: bool) -> Machine:
        """Everything that this many threads can do; BLAS only if asked for, as it takes seconds."""
        instruction = "vpdpbusd" if has_byte_dot(cpu_target.target_context) else "16-bit dot products, twice,"
        gigabytes = read_bandwidth(self.threads, self._buffer) / 1e9
        one, every = dot_rate(1), dot_rate(self.threads)
        found = Machine(
            self.threads, numba.threading_layer(), gigabytes, blas_rate() if blas else 0.0, instruction, one, every
        )
        self.best = found.best(getattr(self, "best", found))
        return found


if __name__ == "__main__":
    print(Meter(numba.get_num_threads()).best)
