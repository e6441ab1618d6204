"""A row's bits depend on neither the other rows of a call, nor its size, its route, its threads, nor the run."""

import os
from typing import Any

import numba
import numpy as np
import pytest

from mixkv.kernels import Segment, empty_state, flash, flash_attention, tables
from mixkv.kernels.sight import splits_in

from .oracle import DTYPES, make_store, normal, quantize_as
from .other_process import CODED_PAIRS, PRECISIONS, attention_bits, run_process

T, N, H, KV_HEADS, D = 200, 1300, 6, 2, 64  # three splits of 512, and tiles that are not full
CODES = tuple("/".join(kinds) for kinds in CODED_PAIRS)
FORMS = (*DTYPES, *CODES)
ROUTES = [(form, "default") for form in FORMS] + [(form, "f32") for form in CODES]
LAST = np.arange(N - T, N)
RANGES = {
    "full": (np.zeros(T, np.int64), np.full(T, N)),
    "causal": (np.zeros(T, np.int64), LAST + 1),
    "sliding": (LAST - 99, LAST + 1),
    "anything": tuple(np.sort(np.random.default_rng(5).integers(0, N + 1, (2, T)), axis=0)),
}


def make_keys(form: str, n: int = N, d: int = D) -> tuple:
    rng = np.random.default_rng(1)
    k, v = normal(rng, n, KV_HEADS, d), normal(rng, n, KV_HEADS, d)
    if form in DTYPES:
        return k.astype(DTYPES[form]), v.astype(DTYPES[form])
    return (quantize_as(tuple(form.split("/")), k, v),)


def attention(q: np.ndarray, keys: tuple, **options: object) -> tuple[np.ndarray, np.ndarray]:
    state = empty_state(q.shape[1], q.shape[0])
    return flash_attention(q, *keys, state=state, **options), state


def assert_same_bits(found: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[0].view(np.uint32), want[0].view(np.uint32))
    np.testing.assert_array_equal(np.ascontiguousarray(found[1]).view(np.uint32), want[1].view(np.uint32))


@pytest.mark.parametrize(("form", "precision"), ROUTES)
@pytest.mark.parametrize("ranges", RANGES)
def test_each_row_of_a_long_call_equals_the_row_alone(form: str, precision: str, ranges: str) -> None:
    q, keys = normal(np.random.default_rng(2), T, H, D), make_keys(form)
    start, stop = RANGES[ranges]
    out, state = attention(q, keys, start=start, stop=stop, precision=precision)
    for i in range(T):
        one = attention(q[i : i + 1], keys, start=start[i : i + 1], stop=stop[i : i + 1], precision=precision)
        assert_same_bits(one, (out[i : i + 1], np.ascontiguousarray(state[:, i : i + 1])))


@pytest.mark.parametrize(("form", "precision"), ROUTES)
def test_where_a_call_is_cut_changes_nothing(form: str, precision: str) -> None:
    q, keys = normal(np.random.default_rng(3), T, H, D), make_keys(form)
    start, stop = RANGES["causal"]
    out, state = attention(q, keys, start=start, stop=stop, precision=precision)
    for cuts in ([0, 1, 3, 8, 40, 73, 74, 139, T], [0, 64, 128, 192, T], [0, T - 1, T]):
        for a, b in zip(cuts, cuts[1:], strict=False):
            part = attention(q[a:b], keys, start=start[a:b], stop=stop[a:b], precision=precision)
            assert_same_bits(part, (out[a:b], np.ascontiguousarray(state[:, a:b])))


def test_with_every_option_a_row_still_equals_itself_alone() -> None:
    rng = np.random.default_rng(4)
    q, mask = normal(rng, T, H, D), normal(rng, H, T, N)
    mask[rng.random(mask.shape) < 0.3] = -np.inf
    options = {"softcap": 20.0, "max_bias": 8.0, "sink_logits": normal(rng, H), "causal": True}
    for form, options["precision"] in (("f16", "default"), *((form, p) for form in CODES for p in PRECISIONS)):
        keys = make_keys(form)
        out, state = attention(q, keys, mask=mask, positions=LAST, **options)
        for i in range(0, T, 7):
            one = attention(q[i : i + 1], keys, mask=mask[:, i : i + 1], positions=LAST[i], **options)
            assert_same_bits(one, (out[i : i + 1], np.ascontiguousarray(state[:, i : i + 1])))


@pytest.mark.parametrize("form", ["f32", "f16"])
def test_a_query_head_alone_equals_the_head_in_its_group(form: str) -> None:
    q, (k, v) = normal(np.random.default_rng(6), 11, H, D), make_keys(form)
    out, state = attention(q, (k, v), causal=True)
    for head in range(H):
        kv = slice(head * KV_HEADS // H, head * KV_HEADS // H + 1)
        one = attention(np.ascontiguousarray(q[:, head : head + 1]), (k[:, kv], v[:, kv]), causal=True)
        assert_same_bits(one, (np.ascontiguousarray(out[:, head : head + 1]), state[head : head + 1]))


@pytest.mark.parametrize("kinds", CODED_PAIRS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_query_head_over_codes_alone_equals_the_head_in_its_group(kinds: tuple[str, str], precision: str) -> None:
    """Its factors are its own, and codes of a head do not depend on the other heads."""
    q, (k, v) = normal(np.random.default_rng(6), 11, H, D), make_keys("f32")
    out, state = attention(q, (quantize_as(kinds, k, v),), causal=True, precision=precision)
    for head in range(H):
        kv = slice(head * KV_HEADS // H, head * KV_HEADS // H + 1)
        keys = (quantize_as(kinds, k[:, kv], v[:, kv]),)
        one = attention(np.ascontiguousarray(q[:, head : head + 1]), keys, causal=True, precision=precision)
        assert_same_bits(one, (np.ascontiguousarray(out[:, head : head + 1]), state[head : head + 1]))


@pytest.mark.parametrize(("form", "precision"), ROUTES)
@pytest.mark.parametrize("t", [1, 5, T])
def test_both_ways_of_dealing_out_the_work_give_the_same_bits(form: str, precision: str, t: int) -> None:
    q, keys = normal(np.random.default_rng(7), t, H, 20), make_keys(form, d=20)
    before = attention(normal(np.random.default_rng(8), t, H, 20), keys)
    found, describe = [], flash._describe
    for in_parts in (False, True):  # all go by blocks of queries, all by splits of keys

        def described(*arguments: Any, in_parts: bool = in_parts) -> Any:
            call = describe(*arguments)
            call[tables.N_PARTS] = splits_in(call[tables.RANGES + 2], call[tables.RANGES + 3]) * in_parts
            assert (call[tables.N_PARTS] > 1) == in_parts
            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "_describe", described)
            out, state = before[0].copy(), before[1].copy()
            flash_attention(q, *keys, causal=True, state=state, out=out, precision=precision)
        found.append((out, state))
    assert_same_bits(*found)


def test_a_repeated_run_gives_the_same_bits() -> None:
    first = attention_bits()
    assert len(set(first.values())) == len(first)
    for _ in range(5):
        assert attention_bits() == first


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="this process may run one thread only")
def test_one_thread_and_two_give_the_same_bits() -> None:
    found = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            found.append(attention_bits())
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert found[0] == found[1]


@pytest.mark.parametrize("threads", [4])
def test_more_threads_than_cores_give_the_same_bits(threads: int) -> None:
    assert run_process("bits", {"NUMBA_NUM_THREADS": str(threads)}) == {"threads": threads, **attention_bits()}


@pytest.mark.parametrize("page_tiles", [1, 3, 8])
def test_a_segment_of_a_store_equals_the_arrays_it_came_from(page_tiles: int) -> None:
    """Tiles of float32 and plain arrays hold the same numbers on the same grid."""
    q, (k, v) = normal(np.random.default_rng(9), 5, H, D), make_keys("f32", n=1280)
    segment = make_store(k, v, ("f32", "f32"), page_tiles=page_tiles).segment(0, 1280)
    assert isinstance(segment, Segment)
    assert_same_bits(attention(q, (segment,), causal=True), attention(q, (k, v), causal=True))


@pytest.mark.parametrize("kinds", CODED_PAIRS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_how_many_tiles_a_page_has_changes_nothing(kinds: tuple[str, str], precision: str) -> None:
    q, (k, v) = normal(np.random.default_rng(10), 5, H, D), make_keys("f32", n=1280)
    found = [
        attention(q, (make_store(k, v, kinds, page_tiles=n).segment(0, 1250),), causal=True, precision=precision)
        for n in (1, 3, 8)
    ]
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_the_other_processes_see_this_package() -> None:
    """Else they would compare something else."""
    import mixkv.kernels

    assert run_process("where", {})["file"] == os.path.realpath(mixkv.kernels.__file__)
