"""Keys and values whose scales float16 cannot hold: the cache quantizes such tiles once more, with scales of float32."""

from collections.abc import Callable

import numpy as np
import pytest

from mixkv.engine.cache import LayerCache
from mixkv.engine.policy import CachePolicy
from mixkv.kernels.reference import reference_attention

SIZES = [1.0, 1e6, 1e-9]  # of which the last two need float32
POLICIES = {
    "one tier": CachePolicy(window=10, sinks=3, tile=32, dense="f32", k_bits=8, v_bits=8),
    "rotated": CachePolicy(window=10, sinks=3, tile=32, dense="f32", k_bits=8, v_bits=8, rotate_k=True, rotate_v=True),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one tier", "rotated"])
@pytest.mark.parametrize("cuts", [[0, 200], [0, 150, 200], [*range(201)]])
def test_what_is_seen_is_what_was_appended(
    draw_qkv: Callable, feed: Callable, name: str, size: float, cuts: list[int]
) -> None:
    """To 8 bits, after a tile has been quantized once more too: the new tokens are not stored, nor rotated, again."""
    q, k, v = draw_qkv(2, 200)
    q, k, v = q / 100, k, v * np.float32(size)
    stops = np.arange(1, 201)
    want, _, _ = reference_attention(q, k, v, stop=stops)
    cache = LayerCache(POLICIES[name], 2, 32)
    outs = feed(cache, (q, k, v), cuts)
    assert np.abs(outs - want).max() <= 0.02 * np.abs(v).max()
