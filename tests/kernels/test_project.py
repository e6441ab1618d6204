"""Products with packed weights: against float64, and bit for bit the same however rows are put together."""

import itertools
from collections.abc import Sequence

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixkv.kernels.chain import Normalization, Projection, chain_addresses, chain_table, room_nbytes, rotation
from mixkv.kernels.project import GATE, OWN_BUFFERS, run_chain
from mixkv.kernels.weights import W8, WBF16, empty_matrix

from .oracle import DTYPES, normal
from .other_process import run_process
from .projections import (
    CODES,
    GROUP,
    HOWS,
    KINDS,
    Layer,
    Rows,
    apply,
    coded_rows,
    mlp,
    projection_bits,
    random_layer,
    random_mlp,
    round_groups,
)

MOST = 40  # rows of activations: five tiles of eight


def identity(kind: str, size: int, how: str = "plain", norm_weight: np.ndarray | None = None) -> Layer:
    """A layer whose outputs are what is multiplied; of codes, the first is 1 and all others are 0."""
    ones = np.eye(size)
    if kind in DTYPES:
        rows = Rows(kind, ones.astype(DTYPES[kind]), ones)
    else:
        scales = np.ones((size, size // GROUP))
        minima = np.zeros_like(scales) if kind == "q4m" else None
        rows = coded_rows(kind, ones.astype(np.int64).reshape(size, -1, GROUP), scales, minima)
    return Layer([rows], how, None, norm_weight)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.sampled_from(list(HOWS)), st.integers(16, 60), st.integers(1, 130), st.booleans(),
    st.integers(1, MOST), st.integers(1, 4), st.integers(0, 2**32),
)  # fmt: skip
def test_a_product_is_that_of_rounded_activations(
    kind: str, how: str, rows: int, columns: int, biased: bool, t: int, workers: int, seed: int
) -> None:
    """Rounded to 127ths of the largest of each 32 where weights are codes, and not at all where they are numbers."""
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, [(kind, rows)], columns, how, biased)
    x = layer.input(rng, t)
    found = apply(layer, x, workers)
    assert found.shape == (t, rows) and layer.error(x, found) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(list(KINDS)), st.sampled_from(list(HOWS)), st.integers(1, 100), st.booleans(), st.integers(1, 20),
    st.integers(1, 4), st.integers(0, 2**32),
)  # fmt: skip
def test_parts_of_different_kinds_are_one_layer(
    parts: list[tuple[str, int]], first: str, how: str, columns: int, biased: bool, t: int, workers: int, seed: int
) -> None:
    """Whatever their numbers of rows are; and each part has the bits that it has alone."""
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, [(first, 16), *parts], columns, how, biased)
    x = layer.input(rng, t)
    found, start = apply(layer, x, workers), 0
    assert layer.error(x, found) <= 1
    for part in layer.parts:
        stop = start + len(part.values)
        bias = None if layer.bias is None else layer.bias[start:stop]
        alone = apply(Layer([part], how, bias, layer.norm_weight), x)
        np.testing.assert_array_equal(found[:, start:stop], alone)
        start = stop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [32, 21])
def test_an_output_may_be_added_to(kind: str, biased: bool, rows: int) -> None:
    """One addition more, and the same otherwise; what was in an output that is not added to never shows."""
    rng = np.random.default_rng(1)
    layer = random_layer(rng, [(kind, rows)], 70, biased=biased)
    projection = layer.projection()
    for t in (1, 2, 9):
        x, before = layer.input(rng, t), normal(rng, t, rows)
        want = apply(layer, x)
        for onto, number in ((True, None), (False, np.nan), (False, np.inf)):
            out = before.copy() if number is None else np.full_like(before, number)
            run([projection.link(A, B, onto=onto)], [x, out])
            np.testing.assert_array_equal(out, before + want if onto else want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
def test_no_rows_and_rows_of_zeros(kind: str, how: str) -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(rng, [(kind, 37)], 70, how, biased=True)
    assert apply(layer, layer.input(rng, 0)).shape == (0, 37)
    for t in (1, 5):
        zeros = np.zeros_like(layer.input(rng, t))
        np.testing.assert_array_equal(apply(layer, zeros), np.tile(layer.bias, (t, 1)))
        x = layer.input(rng, t)
        x[-1] = 0
        np.testing.assert_array_equal(apply(layer, x)[-1], layer.bias)


@pytest.mark.parametrize("kind", CODES)
def test_a_group_of_zeros_adds_nothing(kind: str) -> None:
    """The others are what they are without it."""
    rng = np.random.default_rng(3)
    layer = random_layer(rng, [(kind, 20)], 96)
    x = layer.input(rng, 6)
    x[:, 32:64] = 0
    assert layer.error(x, apply(layer, x)) <= 1
    x[:, :32] = x[:, 64:] = 0
    assert not apply(layer, x).any()


# --- Rounding to bytes ---------------------------------------------------------------------------------------------------


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations (T, a multiple of 32) as they are multiplied with codes."""
    return apply(identity("q8", x.shape[1]), np.ascontiguousarray(x))


@settings(max_examples=150, deadline=None)
@given(arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32), fill=st.just(1e-36)))
def test_activations_are_rounded_by_half_a_step_at_most(x: np.ndarray) -> None:
    """Whatever they are. Groups below 1e-35 become 0."""
    found = rounded(x).astype(np.float64)
    groups = np.abs(x.astype(np.float64)).reshape(2, 2, GROUP)
    steps = np.repeat(groups.max(axis=2) / 127, GROUP, axis=1)
    assert (np.abs(found - x) <= 0.50001 * steps + 1e-35).all()
    codes = found / np.where(steps < 1e-37, np.inf, steps)
    np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=127 * 4 * 2.0**-24)


def test_activations_between_two_codes_go_to_the_nearest_and_to_the_even_one() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :10] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, 0.5000001, 126.5, -126.5, -127
    found = rounded(x)[0, :10]
    np.testing.assert_array_equal(found, [127, 0, 2, 2, 0, -2, 1, 126, -126, -127])


@pytest.mark.parametrize("kind", CODES)
def test_every_kind_of_codes_meets_the_same_rounded_activations(kind: str) -> None:
    x = normal(np.random.default_rng(4), 5, 96)
    want, doubts = round_groups(x.astype(np.float64))
    found = apply(identity(kind, 96), x)
    assert (np.abs(found - want) <= doubts + 1e-6 * np.abs(want)).all() and (doubts == 0).mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(1, 10), st.integers(-80, 80), st.integers(0, 2**32))
def test_activations_of_another_magnitude_give_outputs_of_another_magnitude(
    kind: str, t: int, power: int, seed: int
) -> None:
    """Exactly, for powers of two."""
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, [(kind, 24)], 80)
    x = layer.input(rng, t)
    found = apply(layer, np.ldexp(x, power))
    np.testing.assert_array_equal(found, np.ldexp(apply(layer, x), power))


# --- Norms and gates -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.floats(-30, 17), st.integers(1, 10), st.integers(0, 2**32))
def test_a_norm_divides_by_the_root_of_the_mean_square(columns: int, power: float, t: int, seed: int) -> None:
    """Seen through an identity; where eps is all that counts, too."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-2, 2, columns).astype(np.float32)
    layer = identity("bf16", columns, "norm", weight)
    x = (normal(rng, t, columns) * 10.0**power).astype(np.float32)
    np.testing.assert_allclose(apply(layer, x), layer.before(x), rtol=1e-6, atol=1e-36)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.floats(-10, 30), st.floats(-10, 3), st.integers(1, 10), st.integers(0, 2**32))
def test_a_gate_is_silu_times_what_is_gated(columns: int, power: float, up_power: float, t: int, seed: int) -> None:
    """Seen through an identity. Below -87 the kernels' exponential ends, where a SiLU is next to nothing."""
    rng = np.random.default_rng(seed)
    layer = identity("f16", columns, "gate")
    x = layer.input(rng, t)
    x[:, :columns] *= np.float32(10.0**power)
    x[:, columns:] *= np.float32(10.0**up_power)
    want, found = layer.before(x), apply(layer, x)
    size = np.abs(x[:, :columns].astype(np.float64) * x[:, columns:])
    units = 2 + np.minimum(np.abs(x[:, :columns]), 88) / 4 + 4
    assert (np.abs(found - want) <= units * 2.0**-23 * np.abs(want) + 1e-37 * (1 + size)).all()


def test_the_ends_of_a_gate() -> None:
    gate = np.array([0, -0.0, 88, 89, 1000, -88, -89, -1000, 3e38, -1e30], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    found = apply(identity("bf16", len(gate), "gate"), x)[0]
    np.testing.assert_allclose(found, [0, 0, 88, 89, 1000, 0, 0, 0, 3e38, 0], rtol=1e-6, atol=1e-8)


# --- What is not a number ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.sampled_from(list(HOWS)), st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(1, 20), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32),
)  # fmt: skip
def test_what_is_not_a_number_spoils_its_own_row_and_no_other(
    kind: str, how: str, number: float, t: int, row: float, column: float, seed: int
) -> None:
    """All of it, so that nobody takes it for an answer. Infinity times a number stays infinite, times a code it is NaN.

    A gate that is clamped has no infinity: that is its definition, and what PyTorch computes.
    """
    assume(how != "clamped" or np.isnan(number))
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, [(kind, 37)], 70, how)
    x = layer.input(rng, t)
    clean, bad = apply(layer, x), int(row * t)
    x[bad, int(column * x.shape[1])] = number
    found = apply(layer, x)
    assert np.isnan(found[bad]).all() if kind in CODES else not np.isfinite(found[bad]).any()
    others = np.arange(t) != bad
    np.testing.assert_array_equal(found[others], clean[others])


# --- The same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "all"])
@pytest.mark.parametrize("how", HOWS)
def test_a_row_alone_has_the_bits_that_it_has_among_others(kind: str, how: str) -> None:
    """At every place of a tile, in front of any others and behind them, and by any number of workers."""
    rng = np.random.default_rng(5)
    kinds = KINDS if kind == "all" else [kind]
    layer = random_layer(rng, [(name, 37) for name in kinds], 112, how, biased=how == "plain")
    projection, x = layer.projection(), layer.input(rng, MOST)
    alone = np.concatenate([projection(x[i : i + 1], 1) for i in range(MOST)])
    assert len(np.unique(alone)) > 0.99 * alone.size
    for workers in (1, 2, 3, 7):
        for i in (0, 3, 39):
            np.testing.assert_array_equal(projection(x[i : i + 1], workers)[0], alone[i])
        for t in range(1, MOST + 1):
            np.testing.assert_array_equal(projection(x[:t], workers), alone[:t])
    for shift in range(1, MOST, 3):
        found = projection(np.roll(x, shift, axis=0), 2)
        np.testing.assert_array_equal(found, np.roll(alone, shift, axis=0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 130),
    st.sampled_from(list(HOWS)), st.booleans(), st.integers(1, MOST), st.integers(0, MOST), st.integers(1, 5),
    st.integers(0, 2**32),
)  # fmt: skip
def test_where_rows_are_cut_changes_nothing(
    parts: list[tuple[str, int]], columns: int, how: str, biased: bool, t: int, cut: int, workers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, parts, columns, how, biased)
    projection, x = layer.projection(), layer.input(rng, t)
    both = [projection(np.ascontiguousarray(part), workers) for part in (x[:cut], x[cut:])]
    np.testing.assert_array_equal(np.concatenate(both), projection(x, 1))


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="this process may run one thread only")
def test_one_thread_and_two_give_the_same_bits() -> None:
    found = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            found.append(projection_bits())
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert found[0] == found[1] and len(set(found[0].values())) == len(found[0])


def test_more_threads_than_cores_give_the_same_bits() -> None:
    found = run_process("projection", {"NUMBA_NUM_THREADS": "4"})
    assert found == {"threads": 4, **projection_bits()}


# --- Chains --------------------------------------------------------------------------------------------------------------


A, B, C, D, E = range(OWN_BUFFERS, OWN_BUFFERS + 5)


def run(links: Sequence[list[int]], arrays: Sequence[np.ndarray], workers: int = 2, cut: int = 0) -> None:
    """Run a chain on arrays (rows, width), whose numbers are A and following; nothing may be written beside its room.

    cut: the links before it are run in a call of their own.
    """
    table = chain_table(links)
    room = np.full(room_nbytes(table, len(arrays[0])) + 128, 0xA5, np.uint8)
    tasks, addresses = chain_addresses(len(links), room[64:], arrays)
    if cut:
        assert run_chain(table[:cut], 0, addresses, len(arrays[0]), workers) == cut
    assert run_chain(table, cut, addresses, len(arrays[0]), workers) == len(links)
    del tasks
    assert (room[:64] == 0xA5).all() and (room[-64:] == 0xA5).all()


HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 1, 20, 50


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("t", [1, 2, 8, 9, MOST])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("inner", "gate"), [(70, "gate"), (224, "gate"), (224, "gelu"), (224, "clamped")])
def test_a_chain_is_its_calls_one_after_the_other(kind: str, t: int, workers: int, inner: int, gate: str) -> None:
    """What stands between two attentions: o onto x, gate and up, down onto x, the next layer's q, k and v, rotation.

    Of codes and of whole groups, many rows of gate and up are gated at once, and never written to their buffer.
    """
    rng = np.random.default_rng(6)
    kinds = iter([*KINDS] * 2 if kind == "mixed" else [kind] * 10)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    o = random_layer(rng, [(next(kinds), HIDDEN)], HEADS * HEAD_DIM, biased=True)
    gate_up = random_layer(rng, [(next(kinds), inner), (next(kinds), inner)], HIDDEN, "norm")
    down = random_layer(rng, [(next(kinds), HIDDEN)], inner, gate)
    qkv = random_layer(rng, [(next(kinds), HEADS * HEAD_DIM), (next(kinds), 2 * KV_HEADS * HEAD_DIM)], HIDDEN, "norm")
    rest, angles = normal(rng, t, width), 100 * normal(rng, t, HEAD_DIM // 2)
    x, attended, turns = normal(rng, t, HIDDEN), normal(rng, t, HEADS * HEAD_DIM), turns_of(angles)

    want = x + apply(o, attended)
    middle = apply(gate_up, want)
    want += apply(down, middle)
    queries = apply(qkv, want)
    rotated = queries.copy()
    run([rotation(A, B, HEADS + KV_HEADS, HEAD_DIM, HEAD_DIM, width)], [turns, rotated], 1)

    arrays = [x, rest.copy(), attended, np.full((t, 2 * inner), np.nan, np.float32), turns]
    first, second, third, fourth = (layer.projection() for layer in (o, gate_up, down, qkv))
    links = [
        first.link(C, A, onto=True), second.link(A, D), third.link(D, A, onto=True), fourth.link(A, B),
        rotation(E, B, HEADS + KV_HEADS, HEAD_DIM, HEAD_DIM, width),
    ]  # fmt: skip
    run(links, arrays, workers, cut=t % 5)
    np.testing.assert_array_equal(arrays[0], want)
    at_once = t > 1 and inner % GROUP == 0 and {row.kind for row in (*gate_up.parts, *down.parts)} <= set(CODES)
    np.testing.assert_array_equal(arrays[3], np.full_like(middle, np.nan) if at_once else middle)
    np.testing.assert_array_equal(arrays[1], rotated)
    assert np.isfinite(rotated).all() and not np.array_equal(rotated, queries)


@pytest.mark.parametrize("kinds", [("q4m", "q4m", "q4m"), ("q8", "q8", "q8"), ("q4", "q4", "q8"), ("q8", "q4m", "q4")])
@pytest.mark.parametrize("gate", ["gate", "gelu", "clamped"])
@pytest.mark.parametrize("inner", [32, 224, 288])
def test_many_rows_are_gated_where_they_come_out_of_a_product(
    kinds: tuple[str, str, str], gate: str, inner: int
) -> None:
    """Gate and up as one matrix or two, and whether or not a call ends between the links: bit for bit two products.

    A row that is not a number stays one row.
    """
    rng = np.random.default_rng(35)
    layers = random_mlp(rng, kinds, HIDDEN, inner, gate)
    for t in (1, 2, 9, MOST):
        x = normal(rng, t, HIDDEN)
        x[t // 2, 3] = np.nan if t > 2 else 1
        want = apply(layers[1], apply(layers[0], x))
        for workers, cut, together in itertools.product((1, 2, 5), (0, 1), (False, True)):
            if not together or kinds[0] == kinds[1]:
                np.testing.assert_array_equal(mlp(layers, x, workers, cut, together), want)
        assert t <= 2 or np.isnan(want).any(axis=1).sum() == 1


def test_a_gate_stays_where_the_link_before_cannot_take_it() -> None:
    """A bias, numbers, an inner width of no whole groups, halves of other widths, a gate of its own."""
    rng = np.random.default_rng(36)
    down = random_layer(rng, [("q8", 64)], 64, "gate").projection().link(B, C)

    def given(*parts: tuple[str, int], how: str = "norm", biased: bool = False, onto: bool = False) -> int:
        layer = random_layer(rng, list(parts), 64, how, biased=biased)
        return int(chain_table([layer.projection().link(A, B, onto=onto), down])[0, GATE])

    assert given(("q8", 64), ("q4", 64)) == HOWS["gate"] == given(("q8", 128))
    for refused in (
        given(("q8", 64), ("q4", 64), biased=True), given(("q8", 64), ("q4", 64), onto=True),
        given(("q8", 64), ("bf16", 64)), given(("q8", 32), ("q4", 96)), given(("q8", 64)),
        given(("q8", 64), ("q8", 32), ("q8", 32)), given(("q8", 64), ("q4", 64), how="gelu"),
    ):  # fmt: skip
        assert refused == 0
    odd = random_layer(rng, [("q8", 40), ("q8", 40)], 64, "norm").projection().link(A, B)
    assert chain_table([odd, random_layer(rng, [("q8", 64)], 40, "gate").projection().link(B, C)])[0, GATE] == 0


def turns_of(angles: np.ndarray) -> np.ndarray:
    """Cosines, then sines, of (T, half) angles."""
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 5), st.integers(0, 4), st.sampled_from([2, 6, 16, 42, 64]), st.integers(0, 20),
    st.integers(1, 4), st.integers(0, 2**32),
)  # fmt: skip
def test_rotation_turns_the_first_channels_of_the_first_heads_and_leaves_the_others(
    t: int, heads: int, more: int, rotary_dim: int, rest: int, workers: int, seed: int
) -> None:
    """Channel i with i + rotary_dim/2, as complex numbers."""
    rng, half, head_dim = np.random.default_rng(seed), rotary_dim // 2, rotary_dim + rest
    angles, x = 100 * normal(rng, t, half), normal(rng, t, heads + more, head_dim)
    cos, sin = np.cos(angles), np.sin(angles)
    turned = x[..., :half] + 1j * x[..., half:rotary_dim].astype(np.float64)
    turned *= (cos + 1j * sin.astype(np.float64))[:, None]
    want = x.astype(np.float64)
    want[:, :heads, :rotary_dim] = np.concatenate([turned.real, turned.imag], axis=2)[:, :heads]
    found, width = x.reshape(t, -1).copy(), (heads + more) * head_dim
    run([rotation(A, B, heads, head_dim, rotary_dim, width)], [turns_of(angles), found], workers)
    found = found.reshape(x.shape)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[:, heads:], x[:, heads:])
    np.testing.assert_array_equal(found[..., rotary_dim:], x[..., rotary_dim:])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 6, 16, 33, 100]), st.integers(0, 9), st.booleans(),
    st.integers(1, 4), st.integers(0, 2**32),
)  # fmt: skip
def test_normalization_of_runs_into_and_onto_a_buffer(
    t: int, count: int, size: int, first: int, onto: bool, workers: int, seed: int
) -> None:
    """Runs of channels against float64; what stands beside them is left alone, and a row's bits are its own."""
    rng, width = np.random.default_rng(seed), first + count * size + 5
    x, target, weight = normal(rng, t, width), normal(rng, t, width), normal(rng, size)
    runs = x[:, first : first + count * size].astype(np.float64).reshape(t, count, size)
    want = runs / np.sqrt((runs * runs).mean(axis=2, keepdims=True) + 0.01) * weight
    found, link = target.copy(), Normalization(weight, 0.01, first, count, width)
    run([link.link(A, B, onto=onto)], [x, found], workers)
    inside = slice(first, first + count * size)
    before = target[:, inside] if onto else 0
    np.testing.assert_allclose(found[:, inside], before + want.reshape(t, -1), rtol=2e-6, atol=2e-6)
    outside = np.delete(np.arange(width), np.arange(first, first + count * size))
    np.testing.assert_array_equal(found[:, outside], target[:, outside])
    alone = target[-1:].copy()
    run([link.link(A, B, onto=onto)], [x[-1:].copy(), alone], workers)
    np.testing.assert_array_equal(found[-1:], alone)
    in_place = x.copy()
    run([link.link(A, A)], [in_place], workers)
    np.testing.assert_allclose(in_place[:, inside], want.reshape(t, -1), rtol=2e-6, atol=2e-6)


# --- What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 33), np.float32), np.zeros(32, np.float32), np.zeros((2, 32)), np.zeros((1, 2, 32), np.float32),
     np.zeros((32, 2), np.float32).T, np.zeros((2, 64), np.float32)[:, ::2]],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_refused(x: np.ndarray) -> None:
    layer = Projection([empty_matrix(W8, 5, 32), empty_matrix(WBF16, 3, 32)], None, HOWS["plain"], None, 0.0)
    assert (layer.rows, layer.columns, layer.in_columns) == (8, 32, 32)
    with pytest.raises(ValueError, match=r"x must be C-ordered float32 \(T, 32\), found"):
        layer(x, 1)


def test_a_gate_wants_twice_the_columns() -> None:
    layer = Projection([empty_matrix(W8, 5, 32)], None, HOWS["gate"], None, 0.0)
    assert (layer.columns, layer.in_columns) == (32, 64)
    with pytest.raises(ValueError, match=r"float32 \(T, 64\), found float32 \(2, 32\)"):
        layer(np.zeros((2, 32), np.float32), 1)
