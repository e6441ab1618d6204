"""``flash_attention`` of arrays that lie in memory in any way: strided, broadcast, read-only, overlapping."""

import numpy as np
import pytest

from mixkv.kernels import empty_state, flash_attention

from .oracle import DTYPES, check, dense, normal


def unaligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at an odd address."""
    room = np.zeros(x.nbytes + 1, np.uint8)
    view = room[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS = {
    "heads before tokens": lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1),
    "Fortran order": np.asfortranarray,
    "every second head": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every second token": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second channel": lambda x: np.repeat(x, 2, axis=2)[..., ::2],
    "part of wider rows": lambda x: np.pad(x, ((3, 1), (1, 2), (5, 9)))[3:-1, 1:-2, 5:-9],
    "tokens backwards": lambda x: x[::-1].copy()[::-1],
    "heads backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "channels backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "unaligned": unaligned,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("d", [16, 20])
def test_strided_arrays_give_the_same_bits(layout: str, kind: str, d: int) -> None:
    rng = np.random.default_rng(30)
    change = LAYOUTS[layout]
    q, (k, v), mask = normal(rng, 4, 6, d), dense(rng, 101, 3, d, kind), normal(rng, 6, 4, 101)
    want = flash_attention(q, k, v, mask=mask)
    for changed in ((q, change(k), v), (q, k, change(v)), (change(q), change(k), change(v))):
        np.testing.assert_array_equal(changed[0], q)
        np.testing.assert_array_equal(changed[1], k)
        np.testing.assert_array_equal(flash_attention(*changed, mask=change(mask)), want)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("d", [16, 20])
def test_broadcast_arrays_give_the_same_bits(kind: str, d: int) -> None:
    rng = np.random.default_rng(31)
    q, (k, v) = normal(rng, 4, 6, d), dense(rng, 70, 3, d, kind)
    for pick in (
        lambda x: x[5][None],  # one token, whose stride NumPy says is 0
        lambda x: np.broadcast_to(x[5], (50, 3, d)),
        lambda x: np.broadcast_to(x[:, :1], (70, 3, d)),
        lambda x: x[:0],
    ):
        want = flash_attention(q, np.array(pick(k)), np.array(pick(v)))
        np.testing.assert_array_equal(flash_attention(q, pick(k), pick(v)), want)


def test_k_and_v_may_differ_in_type_and_layout() -> None:
    rng = np.random.default_rng(32)
    q, k, v = (
        normal(rng, 2, 4, 16),
        normal(rng, 70, 2, 16),
        np.asfortranarray(normal(rng, 70, 2, 16).astype(np.float16)),
    )
    check(q, (k, v), (k, v), "f16")
    check(q, (v, k), (v, k), "f16")


@pytest.mark.parametrize("d", [16, 20])
def test_out_may_lie_on_an_input(d: int) -> None:
    rng = np.random.default_rng(33)
    q, k, v = (normal(rng, 8, 4, d) for _ in range(3))
    want = flash_attention(q, k, v)
    for i in range(3):
        arrays = [x.copy() for x in (q, k, v)]
        np.testing.assert_array_equal(flash_attention(*arrays, out=arrays[i]), want)
        np.testing.assert_array_equal(arrays[i], want)


def test_a_read_only_or_unaligned_q_compiles_nothing() -> None:
    from mixkv.kernels.attention import attend_segments
    from mixkv.kernels.state import merge_parts

    rng = np.random.default_rng(34)
    q, k, v = normal(rng, 2, 4, 16), normal(rng, 600, 2, 16), normal(rng, 600, 2, 16)
    state = empty_state(4, 2)
    out = flash_attention(q, k, v, state=state)
    before = [len(kernel.signatures) for kernel in (attend_segments, merge_parts.function)]
    for change in (LAYOUTS["read-only"], unaligned):
        flash_attention(change(q), k, v)
        flash_attention(change(q), k[:9], v[:9], start=np.broadcast_to(np.int64(1), (2,)))
    after = [len(kernel.signatures) for kernel in (attend_segments, merge_parts.function)]
    assert after == before
    assert np.isfinite(out).all()
