"""Rotary embedding of queries and keys, in place (https://arxiv.org/abs/2104.09864)."""

from . import simd
from .jit import inner
from .simd import LANES


@inner
def rotate_heads(x, heads, head_dim, half, turns):  # type: ignore[no-untyped-def]
    """Turn ``heads`` heads of one token: channel i of the first ``half`` with channel i + half; those behind stay.

    This is the half-split order of Hugging Face's Llama. x: float32, ``head_dim`` each. turns: ``half`` cosines, then as
    many sines. Both are addresses.
    """
    whole = half // LANES * LANES
    for h in range(heads):
        at = x + 4 * head_dim * h
        for i in range(0, 4 * whole, 4 * LANES):
            first, second = simd.load_f32(at + i), simd.load_f32(at + 4 * half + i)
            c, s = simd.load_f32(turns + i), simd.load_f32(turns + 4 * half + i)
            simd.store_f32(at + i, simd.sub(simd.mul(first, c), simd.mul(second, s)))
            simd.store_f32(at + 4 * half + i, simd.add(simd.mul(second, c), simd.mul(first, s)))
        for i in range(4 * whole, 4 * half, 4):
            first, second = simd.scalar_at(at + i), simd.scalar_at(at + 4 * half + i)
            c, s = simd.scalar_at(turns + i), simd.scalar_at(turns + 4 * half + i)
            simd.store_scalar(at + i, first * c - second * s)
            simd.store_scalar(at + 4 * half + i, second * c + first * s)
