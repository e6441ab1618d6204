"""Keys and values whose scales float16 cannot hold: the cache quantizes such tiles once more, with scales of float32."""

from collections.abc import Callable

import numpy as np
import pytest

from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Tier
from mixkv.kernels.reference import reference_attention
from mixkv.models.errors import NumericalError

SIZES = [1.0, 1e6, 1e-9]  # of which the last two need float32
POLICIES = {
    "one tier": CachePolicy(window=10, sinks=3, tile=32, dense="f32", k_bits=8, v_bits=8),
    "rotated": CachePolicy(window=10, sinks=3, tile=32, dense="f32", k_bits=8, v_bits=8, rotate_k=True, rotate_v=True),
    "tiers": CachePolicy(
        window=0, sinks=3, tile=32, dense="f32", k_bits=8, v_bits=8, older=(Tier(64, k_bits=8, v_bits=8), Tier(96))
    ),
    "finer": CachePolicy(window=0, sinks=0, tile=32, dense="f32", k_bits=2, v_bits=2, older=(Tier(33, v_bits=8),)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", POLICIES)
def test_however_a_prompt_is_cut_its_tiles_are_the_same(
    draw_qkv: Callable, feed: Callable, name: str, size: float
) -> None:
    """In one go a tile passes through several tiers in one call, each of which may need float32."""
    q, k, v = draw_qkv(1, 200, head_dim=20)
    v[:, 1] *= np.float32(size)  # one head of two is enough
    v[40:60, 0] *= np.float32(size)
    whole, single = (LayerCache(POLICIES[name], 2, 20) for _ in range(2))
    outs = feed(whole, (q, k, v), [0, 70, 200])
    np.testing.assert_array_equal(outs, feed(single, (q, k, v), [*range(201)]))
    for tier, other in zip(whole.tiers, single.tiers, strict=True):
        assert (tier.first, tier.stop, tier.nbytes) == (other.first, other.stop, other.nbytes)
        odd = [(tier.row(t) & 1).tolist() for t in range(tier.first, tier.stop)]
        assert odd == [(other.row(t) & 1).tolist() for t in range(other.first, other.stop)]
        assert size != 1 or not np.any(odd)
    assert size == 1 or any(tier.row(tier.stop - 1)[3] & 1 for tier in whole.tiers if tier.stop > tier.first)


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


def test_a_range_beyond_float32_in_the_second_tier_is_an_error_all_the_same(draw_qkv: Callable, feed: Callable) -> None:
    """And is no error because of a tile that only has to be quantized once more before it."""
    q, k, v = draw_qkv(3, 100)
    policy = CachePolicy(window=0, sinks=0, tile=32, dense="f32", k_bits=32, v_bits=32, older=(Tier(32, v_bits=4),))
    feed(LayerCache(policy, 2, 32), (q, k, v * np.float32(1e30)), [0, 100])
    v[3] = 3e38
    v[3, :, ::2] = -3e38
    with pytest.raises(NumericalError, match="^tile 0 cannot be quantized"):
        feed(LayerCache(policy, 2, 32), (q, k, v), [0, 100])
