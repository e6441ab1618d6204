"""Tiles made of coded tiles, as one tier of a cache makes them of another, against plain NumPy over the decoded codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels.jit import do_share
from mixkv.kernels.quantize import IMPOSSIBLE_AT, TOO_WIDE_AT, quantize_share, quantize_tile
from mixkv.kernels.segment import TileStore, seal_job
from mixkv.kernels.tables import CALL_FIELDS, HEAD_DIM, JOB_STARTS, JOBS, N_KV_HEADS, ROW_WIDTH, UNPACK_KERNEL
from mixkv.kernels.tiles import unpack_head

from .oracle import CODED, DTYPES, Row, dense_store, formats, layout_of, normal, page_tile, seal, store_row
from .plain import assert_within_half_a_step, needs_float32, plain

SOURCES = tuple(kind + axis for kind in CODED for axis in ("c", "t", "t16"))
TARGETS = (*DTYPES, *SOURCES)


def check(decoded: tuple[np.ndarray, np.ndarray], source: Row, found: Row, dead: int = 0) -> None:
    """Found is what a plain quantizer makes of the decoded numbers, bit for bit.

    Decoding rounds once, to float32. Where a product of code and scale is rounded before (scales of float32, on CPUs that
    cannot multiply and add in one), codes may be one off: then numbers are held against half a step.
    """
    for side, (x, form) in enumerate(zip(decoded, formats(found.kinds), strict=True)):
        numbers = x.astype(np.float32)
        if form.kind not in DTYPES:
            wide = found.wide[side]
            if not source.wide[side]:
                assert wide == needs_float32(numbers, form, dead)
            for head in range(found.heads):
                own, want = found.coded(side, head), plain(numbers[:, head], form, dead, wide)
                if not source.wide[side]:
                    for a, b in zip(own, want, strict=True):
                        np.testing.assert_array_equal(a, b)
                live = slice(dead if form.axis == "channel" and dead < found.tile else 0, None)
                assert_within_half_a_step(
                    numbers[live, head], *(part[live] for part in own), 2**form.bits - 1, wide
                )  # fmt: skip
        else:
            want = numbers.astype(DTYPES[form.kind]).astype(np.float64)
            ulps = {"f32": 2.0**-22, "f16": 2.0**-10, "bf16": 2.0**-7}[form.kind] * np.abs(want) + 2.0**-22 * np.abs(
                x
            ).max()
            assert (np.abs(found.read()[side] - want) <= ulps * source.wide[side]).all()


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.sampled_from(SOURCES)] * 2), st.tuples(*[st.sampled_from(TARGETS)] * 2),
    st.sampled_from((32, 64)), st.sampled_from((16, 20, 48, 64, 112)), st.sampled_from((1.0, 1.0, 30.0, 1e-3, 1e-9, 1e7)),
    st.sampled_from((0, 0, 5, 40)), st.integers(0, 2**32),
)  # fmt: skip
def test_codes_are_quantized_again_as_the_numbers_that_they_stand_for(
    kinds: tuple[str, str], target: tuple[str, str], tile: int, d: int, size: float, dead: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, tile, 2, d) * np.float32(size) for _ in "kv")
    source = seal(dense_store(k, v, tile=tile), kinds)
    if size == 1e7 and "f16" in target:
        with pytest.raises(OverflowError):
            seal(source, target, dead)
        return
    first = store_row(source, kinds, 0)
    decoded = first.read()
    found = store_row(seal(source, target, dead), target, 0)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, store_row(source, kinds, 0).read(), strict=True))
    check(decoded, first, found, dead)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_pair_of_formats(source: str, target: str) -> None:
    """On both sides, and by a page of its own as from store to store."""
    rng = np.random.default_rng(1)
    kinds, targets = (source, source), (target, target)
    store = seal(dense_store(normal(rng, 32, 2, 48), normal(rng, 32, 2, 48), tile=32), kinds, page_tiles=1)
    decoded = store_row(store, kinds, 0).read()
    row = store_row(seal(store, targets, page_tiles=1), targets, 0)
    check(decoded, store_row(store, kinds, 0), row)
    page = quantize_tile(store.place(0)[0], store.layout, layout_of(targets, 32, 2, 48))
    held = row.owner.place(0)[0]
    np.testing.assert_array_equal(page_tile(page, 0, targets, 32, 2, 48), page_tile(held, 0, targets, 32, 2, 48))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("size", [1.0, 1e7, 1e-9])
def test_codes_that_are_quantized_into_their_own_format_stay_what_they_are(kind: str, size: float) -> None:
    """To an ulp of their minimum and scale: the ends of each group have the first and the last code."""
    rng = np.random.default_rng(2)
    x = normal(rng, 64, 2, 48) * np.float32(size)
    source = seal(dense_store(x, x, tile=64), (kind, kind))
    once, twice = (store_row(store, (kind, kind), 0) for store in (source, seal(source, (kind, kind))))
    assert once.wide == twice.wide == (size != 1, size != 1)
    for side, head in np.ndindex(2, 2):
        (codes, *params), (codes_again, *params_again) = once.coded(side, head), twice.coded(side, head)
        same = codes == codes_again
        assert same.mean() > 0.9 and np.abs(codes - codes_again).max() <= 1 + 255 * 2.0**-10
        for a, b in zip(params, params_again, strict=True):
            np.testing.assert_allclose(a, b, rtol=2.0**-9, atol=size * 2.0**-9)


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
@pytest.mark.parametrize("kinds", [("q8", "q4"), ("f16", "q3t"), ("q2t", "f32")])
def test_shares_of_workers_add_up_round_by_round(workers: int, kinds: tuple[str, str]) -> None:
    """Tiles of the second round are made of those of the first; a job tells of its own side alone what float16 lacks."""
    rng = np.random.default_rng(3)
    k, v = normal(rng, 96, 3, 20), normal(rng, 96, 3, 20)
    v[64:, 2] *= 1e5
    source, last = dense_store(k, v, tile=32), ("q4", "q2")
    first, second = (TileStore(layout_of(x, 32, 3, 20, 16)) for x in (kinds, last))
    for store in (first, second):
        for _ in range(3):
            store.append()
    jobs = np.array([seal_job(*pair, t, 0, False) for pair in ((source, first), (first, second)) for t in range(3)])
    call = np.zeros(CALL_FIELDS, np.int64)
    call[UNPACK_KERNEL] = unpack_head.address()
    call[N_KV_HEADS], call[ROW_WIDTH], call[HEAD_DIM], call[JOBS] = 3, 32, 20, jobs.ctypes.data
    call[JOB_STARTS : JOB_STARTS + 3] = 0, 3, 6
    for nth_round in (0, 1):
        for worker in reversed(range(workers)):
            do_share(quantize_share.address(), call.ctypes.data, worker, workers, nth_round, 0, 0, 0, 0, 0)
    found = jobs[:, TOO_WIDE_AT : TOO_WIDE_AT + 2].astype(bool)
    assert found[:3].tolist() == [[False, False]] * 2 + [[False, kinds[1] in CODED or kinds[1][:2] in CODED]]
    assert not jobs[:2, IMPOSSIBLE_AT:].any() and not found[3:5].any()
    assert found[5, 1] or jobs[5, IMPOSSIBLE_AT + 1]
    want_first = seal(source, kinds)
    want_second = seal(want_first, last)
    for store, want, names in ((first, want_first, kinds), (second, want_second, last)):
        for t in range(2):
            np.testing.assert_array_equal(
                page_tile(*store.place(t), names, 32, 3, 20), page_tile(*want.place(t), names, 32, 3, 20)
            )
