"""The state: attention over keys in pieces is attention over all of them, however they are cut, ordered and merged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.kernels import empty_state, flash_attention, merge_states

from .oracle import MERGE, expected, normal

Partial = tuple[np.ndarray, np.ndarray]  # (out, state)
SETTINGS = settings(max_examples=250, deadline=None)


def run(q: np.ndarray, k: np.ndarray, v: np.ndarray, so_far: Partial | None = None, **options: object) -> Partial:
    """Attention from the empty state, or continued from another; arguments stay as they are."""
    if so_far is None:
        out, state = np.full_like(q, np.nan), empty_state(q.shape[1], q.shape[0])
    else:
        out, state = so_far[0].copy(), so_far[1].copy()
    assert flash_attention(q, k, v, state=state, out=out, **options) is out
    return out, state


def assert_same(found: Partial, want: Partial) -> None:
    np.testing.assert_allclose(found[0], want[0], rtol=0, atol=MERGE)
    np.testing.assert_array_equal(found[1][..., 0], want[1][..., 0])  # the largest logit is the largest logit
    np.testing.assert_allclose(found[1][..., 1], want[1][..., 1], rtol=2e-6, atol=0)


# --- The first test of such an operator ---


@pytest.fixture
def first_test() -> tuple[np.ndarray, ...]:
    """Its sizes: head_dim 16, 4 heads, 2 KV heads, 8 queries, 32 keys."""
    rng = np.random.default_rng(0)
    return normal(rng, 8, 4, 16), normal(rng, 32, 2, 16), normal(rng, 32, 2, 16)


def test_the_empty_state_is_minus_infinity_and_zero() -> None:
    state = empty_state(4, 8)
    assert state.shape == (4, 8, 2) and state.dtype == np.float32 and state.flags.c_contiguous
    assert (state[..., 0] == -np.inf).all() and (state[..., 1] == 0).all()


def test_with_a_state_equals_without(first_test: tuple[np.ndarray, ...]) -> None:
    q, k, v = first_test
    mask = np.where(np.arange(32) <= np.arange(8)[:, None] + 24, np.float32(0), np.float32(-np.inf))
    for options in ({}, {"mask": mask}, {"causal": True, "precision": "f32"}):
        out, state = run(q, k, v, **options)
        assert np.abs(out - flash_attention(q, k, v, **options)).max() <= 1e-6
        o, M, S = expected(q, k, v, **{name: x for name, x in options.items() if name != "precision"})
        np.testing.assert_allclose(out, o, rtol=0, atol=2e-6)
        np.testing.assert_allclose(state[..., 0], M, rtol=0, atol=2e-6)
        np.testing.assert_allclose(state[..., 1], S, rtol=2e-6)


def test_three_calls_on_the_same_keys_triple_S_and_leave_the_rest(first_test: tuple[np.ndarray, ...]) -> None:
    q, k, v = first_test
    first = run(q, k, v)
    second = run(q, k, v, first)
    third = run(q, k, v, second)
    for times, (out, state) in ((2, second), (3, third)):
        np.testing.assert_allclose(state[..., 1], times * first[1][..., 1], rtol=1e-5)
        np.testing.assert_array_equal(state[..., 0], first[1][..., 0])
        np.testing.assert_allclose(out, first[0], rtol=0, atol=1e-6)


def test_the_pair_of_a_row_is_at_head_times_q_len_plus_position(first_test: tuple[np.ndarray, ...]) -> None:
    q, k, v = first_test
    _, state = run(q, k, v)
    for head, position in ((0, 5), (3, 0), (2, 7)):
        _, alone = run(q[position : position + 1, head : head + 1], k[:, head // 2, None], v[:, head // 2, None])
        np.testing.assert_array_equal(state.reshape(-1, 2)[head * 8 + position], alone.ravel())


def test_the_state_is_updated_in_place_and_out_is_returned(first_test: tuple[np.ndarray, ...]) -> None:
    q, k, v = first_test
    state, without_out = empty_state(4, 8), empty_state(4, 8)
    out = np.empty_like(q)
    assert flash_attention(q, k, v, state=state, out=out) is out
    np.testing.assert_array_equal(flash_attention(q, k, v, state=without_out), out)
    np.testing.assert_array_equal(without_out, state)
    assert (state[..., 1] > 0).all()


# --- Any cut, any order, any association ---------------------------------------------------------------------------------


@st.composite
def cut_attention(draw: st.DrawFn) -> tuple[tuple[np.ndarray, ...], np.ndarray | None, list[slice], st.DataObject]:
    """q, k, v, a mask, and the slices that the keys are cut into, in any order. |v| <= 1, so that 1e-6 means something."""
    t, n = draw(st.integers(1, 9)), draw(st.integers(0, 200))
    kv_heads, n_rep, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.sampled_from((16, 20, 64, 80)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    h = kv_heads * n_rep
    v = rng.uniform(-1, 1, (n, kv_heads, d)).astype(np.float32)
    mask = None
    if draw(st.booleans()):
        mask = normal(rng, *draw(st.sampled_from(((t, n), (h, t, n)))))
        mask[rng.random(mask.shape) < draw(st.sampled_from((0.0, 0.3, 0.95)))] = -np.inf
        mask[..., rng.random(t) < draw(st.sampled_from((0.0, 0.5, 1.0))), :] = -np.inf  # rows that see nothing
    edges = [0, *sorted(draw(st.lists(st.integers(0, n), max_size=6))), n]
    cuts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return (normal(rng, t, h, d), normal(rng, n, kv_heads, d), v), mask, draw(st.permutations(cuts)), draw(st.data())


def pieces(case: tuple[np.ndarray, ...], mask: np.ndarray | None, cuts: list[slice]) -> list[tuple]:
    """The arguments of one call for each piece."""
    q, k, v = case
    return [(q, k[cut], v[cut], {} if mask is None else {"mask": mask[..., cut]}) for cut in cuts]


@SETTINGS
@given(cut_attention())
def test_any_cut_chained_through_the_state_equals_the_uncut(drawn: tuple) -> None:
    (q, k, v), mask, cuts, _ = drawn
    whole = run(q, k, v, mask=mask)
    chained = None
    for *arrays, options in pieces((q, k, v), mask, cuts):
        chained = run(*arrays, chained, **options)
    assert chained is not None
    assert_same(chained, whole)
    o, M, S = expected(q, k, v, mask=mask)
    np.testing.assert_allclose(chained[0], o, rtol=0, atol=MERGE)
    np.testing.assert_allclose(chained[1][..., 0], M, rtol=0, atol=2e-6)
    np.testing.assert_allclose(chained[1][..., 1], S, rtol=4e-6)


@SETTINGS
@given(cut_attention())
def test_any_cut_merged_in_any_association_equals_the_uncut(drawn: tuple) -> None:
    (q, k, v), mask, cuts, data = drawn
    parts = [run(*arrays, **options) for *arrays, options in pieces((q, k, v), mask, cuts)]
    while len(parts) > 1:
        one = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge_states(*one, *other))
    assert_same(parts[0], run(q, k, v, mask=mask))
    np.testing.assert_allclose(parts[0][0], expected(q, k, v, mask=mask)[0], rtol=0, atol=MERGE)


@st.composite
def partials(draw: st.DrawFn, count: int) -> list[Partial]:
    """Partial attentions of one shape; some rows, or all, have no keys, and there out is anything."""
    t, h, d = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.sampled_from((1, 16, 20, 64)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(count):
        out = rng.uniform(-1, 1, (t, h, d)).astype(np.float32)
        state = np.stack([5 * normal(rng, h, t), rng.uniform(1, 50, (h, t)).astype(np.float32)], axis=-1)
        empty = rng.random((h, t)) < draw(st.sampled_from((0.0, 0.3, 1.0)))
        state[empty] = -np.inf, 0
        out[empty.T] = draw(st.sampled_from((0.0, np.nan, np.inf, 7.0)))
        made.append((out, state))
    return made


@SETTINGS
@given(partials(2))
def test_the_merge_is_commutative(pair: list[Partial]) -> None:
    one, other = pair
    assert_same(merge_states(*one, *other), merge_states(*other, *one))


@SETTINGS
@given(partials(3))
def test_the_merge_is_associative(three: list[Partial]) -> None:
    a, b, c = three
    assert_same(merge_states(*merge_states(*a, *b), *c), merge_states(*a, *merge_states(*b, *c)))


@pytest.mark.fault("empty-segments")
@SETTINGS
@given(partials(1))
def test_the_empty_state_is_the_identity(one: list[Partial]) -> None:
    out, state = one[0]
    nothing = np.full_like(out, np.nan), empty_state(out.shape[1], out.shape[0])
    want = np.where((state[..., 1] == 0).T[..., None], np.float32(0), out)
    for found in (merge_states(*one[0], *nothing), merge_states(*nothing, *one[0])):
        np.testing.assert_array_equal(found[0], want)
        np.testing.assert_array_equal(found[1], state)


@pytest.mark.fault("empty-segments")
def test_merging_two_empty_states_gives_zero_and_the_empty_state() -> None:
    out, state = np.full((3, 4, 20), np.nan, np.float32), empty_state(4, 3)
    merged, merged_state = merge_states(out, state, out, state)
    np.testing.assert_array_equal(merged, 0)
    np.testing.assert_array_equal(merged_state, empty_state(4, 3))


@pytest.mark.parametrize("d", [16, 20])
def test_the_merge_leaves_its_arguments_alone_and_may_write_into_them(d: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = normal(rng, 3, 4, d), normal(rng, 50, 2, d), normal(rng, 50, 2, d)
    one, other = run(q, k[:20], v[:20]), run(q, k[20:], v[20:])
    before = [x.copy() for x in (*one, *other)]
    merged, state = merge_states(*one, *other)
    for x, was in zip((*one, *other), before, strict=True):
        np.testing.assert_array_equal(x, was)
    for i in (0, 2):
        into = before[i].copy()
        arguments = [into if j == i else x for j, x in enumerate(before)]
        again, again_state = merge_states(*arguments, out=into)
        assert again is into
        np.testing.assert_array_equal(again, merged)
        np.testing.assert_array_equal(again_state, state)


# --- Rows without keys ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("empty-segments")
@pytest.mark.parametrize("d", [16, 20])
@pytest.mark.parametrize("garbage_M", [-np.inf, 0.0, np.nan, np.inf])
def test_whatever_an_empty_row_holds_never_shows(d: int, garbage_M: float) -> None:
    rng = np.random.default_rng(2)
    q, k, v = normal(rng, 4, 6, d), normal(rng, 30, 2, d), normal(rng, 30, 2, d)
    stop = np.array([30, 0, 30, 0])  # queries 1 and 3 see nothing
    out, state = run(q, k, v, stop=stop)
    want, want_state = run(q, k[:9], v[:9], (out, state))
    out[stop == 0] = np.nan
    state[:, stop == 0, 0] = garbage_M
    found, found_state = run(q, k[:9], v[:9], (out, state))
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(found_state, want_state)
    still, still_state = run(q, k, v, (out, state), stop=0)  # and where there are still no keys, they become 0 and -inf
    np.testing.assert_array_equal(still[stop == 0], 0)
    np.testing.assert_array_equal(still_state[:, stop == 0], empty_state(6, 2))
    merged, merged_state = merge_states(out, state, out, state)
    np.testing.assert_array_equal(merged[stop == 0], 0)
    np.testing.assert_array_equal(merged_state[:, stop == 0], empty_state(6, 2))
    assert np.isfinite(merged).all()


@pytest.mark.fault("empty-segments")
def test_an_empty_state_needs_no_out_and_is_made_clean() -> None:
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, 2, 4, 16), normal(rng, 5, 2, 16), normal(rng, 5, 2, 16)
    state = np.full((4, 2, 2), np.nan, np.float32)
    state[..., 1] = 0
    out = flash_attention(q, k, v, stop=[5, 0], state=state)
    np.testing.assert_array_equal(out, flash_attention(q, k, v, stop=[5, 0]))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(state[:, 1], empty_state(4, 1)[:, 0])


# --- Sink logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 20])
@pytest.mark.parametrize("n", [0, 33, 700])
def test_a_sink_logit_is_a_state(d: int, n: int) -> None:
    """(O = 0, M = logit, S = 1), before the keys, after them or merged."""
    rng = np.random.default_rng(5)
    q, k, v = normal(rng, 3, 6, d), normal(rng, n, 2, d), rng.uniform(-1, 1, (n, 2, d)).astype(np.float32)
    logits = np.array([-30.0, -1.0, 0.0, 2.5, 30.0, -np.inf], np.float32)
    sink_state = empty_state(6, 3)
    sink_state[:5, :, 0] = logits[:5, None]
    sink_state[:5, :, 1] = 1
    sink = np.zeros_like(q), sink_state
    counted = run(q, k, v, sink_logits=logits)
    assert_same(run(q, k, v, sink), counted)
    assert_same(merge_states(*sink, *run(q, k, v)), counted)
    o, M, S = expected(q, k, v, sink_logits=logits)
    np.testing.assert_allclose(counted[0], o, rtol=0, atol=MERGE)
    np.testing.assert_allclose(counted[1][..., 0], M, rtol=0, atol=2e-6)
    np.testing.assert_allclose(counted[1][..., 1], S, rtol=4e-6)
