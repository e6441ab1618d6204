"""Rotary embedding of queries and keys, in place."""

from .jit import kernel


@kernel
def rotate(x, heads, cos, sin):  # type: ignore[no-untyped-def]
    """Turn the first ``heads`` heads of x float32 (T, all heads, head_dim), channel i with i + head_dim / 2.

    cos, sin: float32 (T, head_dim / 2). https://arxiv.org/abs/2104.09864, in the half-split order of Hugging Face's Llama.
    """
    half = x.shape[2] // 2
    for t in range(x.shape[0]):
        for h in range(heads):
            for i in range(half):
                first, second = x[t, h, i], x[t, h, half + i]
                x[t, h, i] = first * cos[t, i] - second * sin[t, i]
                x[t, h, half + i] = second * cos[t, i] + first * sin[t, i]
