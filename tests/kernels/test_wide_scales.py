"""Attention over codes whose scales are float32, against float64 over what the codes stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import flash_attention

from .contract import check
from .oracle import CODED, expected, normal, quantize_as, read_segment, segment_rows

KINDS = tuple(kind + axis for kind in CODED for axis in ("c", "t"))


@pytest.mark.fault("extreme-keys")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e6, 1e-9, 1e30])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("queries", [1, 12])
def test_one_loud_or_quiet_side(kind: str, size: float, part: str, queries: int) -> None:
    """Queries are scaled so that logits are about 1 wherever keys are."""
    rng = np.random.default_rng(1)
    k, v = normal(rng, 150, 2, 48), normal(rng, 150, 2, 48)
    q = normal(rng, queries, 4, 48)
    if part == "k":
        k, q = k * np.float32(size), q / np.float32(size)
    else:
        v = v * np.float32(size)
    segment = quantize_as((kind, kind), k, v, 32)
    assert all(row.wide == (part == "k", part == "v") for row in segment_rows(segment, (kind, kind), 32))
    check(q, segment, read_segment(segment, (kind, kind), 32), {"causal": True}, kind, many_keys=queries == 1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from((32, 64, 128)), st.sampled_from((16, 20, 64, 112)),
    st.sampled_from((1, 2, 40)), st.lists(st.sampled_from((1.0, 1.0, 1e6, 1e-9)), min_size=12, max_size=12),
    st.integers(0, 2**32),
)  # fmt: skip
def test_tiles_and_heads_of_all_sizes_side_by_side(
    k_kind: str, v_kind: str, tile: int, d: int, queries: int, sizes: list[float], seed: int
) -> None:
    """Each tile of a head of V has a size of its own, each head of K; what is not needed stays in float16."""
    rng = np.random.default_rng(seed)
    n = 3 * tile
    k, v, q = normal(rng, n, 3, d), normal(rng, n, 3, d), normal(rng, queries, 6, d)
    for head in range(3):
        k[:, head] *= np.float32(sizes[head])
        q[:, 2 * head : 2 * head + 2] /= np.float32(sizes[head])
        for t in range(3):
            v[t * tile : (t + 1) * tile, head] *= np.float32(sizes[3 + 3 * head + t])
    segment = quantize_as((k_kind, v_kind), k, v, tile)
    rows = segment_rows(segment, (k_kind, v_kind), tile)
    for t, row in enumerate(rows):
        v_sizes = {sizes[3 + 3 * head + t] for head in range(3)}
        assert row.wide == (set(sizes[:3]) != {1.0}, v_sizes != {1.0})
    stored = read_segment(segment, (k_kind, v_kind), tile)
    want, _, _ = expected(q, *stored)
    for precision, bound in (("default", 1e-3), ("f32", 2e-5)):
        found = flash_attention(q, segment, precision=precision)
        for h in range(6):  # each against its own head's largest value
            top = np.abs(stored[1][:, h // 2]).max()
            assert np.abs(found[:, h] - want[:, h]).max() <= bound * top, (precision, h)
