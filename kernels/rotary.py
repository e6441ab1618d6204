"""Rotary embedding of queries and keys, in place."""

from . import simd
from .jit import inner, kernel


@inner
def rotate_heads(x, heads, half, cos, sin):  # type: ignore[no-untyped-def]
    """Turn ``heads`` heads of one token, of twice ``half`` float32 each. Addresses."""
    for h in range(heads):
        at = x + 8 * half * h
        for i in range(0, 4 * half, 4):
            first, second = simd.scalar_at(at + i), simd.scalar_at(at + 4 * half + i)
            c, s = simd.scalar_at(cos + i), simd.scalar_at(sin + i)
            simd.store_scalar(at + i, first * c - second * s)
            simd.store_scalar(at + 4 * half + i, second * c + first * s)


@kernel
def rotate(x, heads, cos, sin):  # type: ignore[no-untyped-def]
    """Turn the first ``heads`` heads of x float32 (T, all heads, head_dim), channel i with i + head_dim / 2.

    cos, sin: float32 (T, head_dim / 2). https://arxiv.org/abs/2104.09864, in the half-split order of Hugging Face's Llama.
    """
    width, half = x.shape[1] * x.shape[2] * 4, x.shape[2] // 2
    for t in range(x.shape[0]):
        rotate_heads(
            x.ctypes.data + t * width, heads, half, cos.ctypes.data + 4 * half * t, sin.ctypes.data + 4 * half * t
        )
