"""Which way the kernels compute each format on this CPU: what ``mixkv info --routes`` and the statistics say."""

import platform
from typing import Any

from .layout import DENSE_DTYPES, KIND_BITS

FLOAT32 = "float32"
INTEGER = "int16 x codes"  # queries and exponentials rounded to 16 bits, times the codes, summed exactly in 32 bits

# Every option runs on every route. What it costs, beyond the plain call:
OPTIONS = {
    "scale": "nothing: multiplied into q",
    "start, stop, causal, sliding_window": "nothing: what a query cannot see is skipped, tile by tile",
    "mask": "one pass over the logits, vectorized",
    "softcap": "one pass over the logits, vectorized",
    "max_bias": "one pass over the logits, vectorized",
    "sink_logits": "one merge a call",
    "state": "nothing: continued from",
    "k_axis token": "the products with K's codes twice: queries keep 31 bits",
    "k, v as plain arrays": "keys are transposed 16 x 16 for every block of queries",
}


def route(kind: int, precision: str = "default") -> str:
    """How K or V of a format (layout.py) is multiplied: ``INTEGER`` or ``FLOAT32``."""
    return FLOAT32 if kind in DENSE_DTYPES or precision == "f32" else INTEGER


def kind_name(kind: int) -> str:
    """What people call a format: "float16", "4 bits"."""
    return DENSE_DTYPES[kind].name if kind in DENSE_DTYPES else f"{KIND_BITS[kind]} bits"


def cpu() -> dict[str, str]:
    """The instructions that the kernels use on the CPU that Numba compiles for, by what they are used for."""
    from numba.core.registry import cpu_target

    from . import simd

    context = cpu_target.target_context

    def has(feature: str) -> bool:
        return simd.is_x86() and simd.cpu_has(context, feature)

    dot = "integer multiplication and addition"
    if simd.is_x86():
        dot = (
            "vpdpwssd (AVX-512 VNNI)" if has("avx512vnni")
            else "vpmaddwd (AVX-512 BW)" if has("avx512bw")
            else "vpmaddwd (AVX2)" if has("avx2")
            else "pmaddwd (SSE2)"
        )  # fmt: skip
    return {
        "machine": platform.machine(),
        "vectors": f"{512 if has('avx512f') else 256 if has('avx2') else 128} bits",
        "dot product of 16-bit pairs": dot,
        "float32 products": "fused multiply-add" if simd.cpu_has(context, "fma") else "multiply, then add",
        "float16": "conversion instructions" if simd.cpu_has(context, "f16c") else "integer operations",
    }


def routes() -> dict[str, Any]:
    """The whole table: {"cpu": ..., "formats": {name: {precision: route}}, "options": ...}."""
    formats = {
        kind_name(kind): {precision: route(kind, precision) for precision in ("default", "f32")}
        for kind in range(len(KIND_BITS))
    }
    return {"cpu": cpu(), "formats": formats, "options": OPTIONS}
