"""Packed weights: what is stored comes back, from where the description of the layout says that it lies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixkv.kernels.activations import PLAIN
from mixkv.kernels.chain import Projection
from mixkv.kernels.weights import (
    CODE_BITS,
    DENSE,
    NAMES,
    W4,
    W4M,
    W8,
    CodedRows,
    Matrix,
    block_nbytes,
    code_rows,
    empty_matrix,
    store_coded,
)

from .oracle import DTYPES
from .projections import CODES, GROUP, KINDS, coded_rows, packed, random_rows

LEVELS = {W8: 127, W4M: 15}  # steps from 0, or from the least, to the largest of a group


def take(matrix: Matrix, ids: np.ndarray | None = None) -> np.ndarray:
    """Rows by the package, all of them unless told."""
    ids = np.arange(matrix.rows) if ids is None else ids
    out = np.full((len(ids), matrix.columns), np.nan, np.float32)
    Projection([matrix], None, PLAIN, None, 0.0).take(ids, out)
    return out


def read(matrix: Matrix) -> np.ndarray:
    """Rows by the description of the layout, number by number: float64, those that fill the last block of 16, too."""
    groups, found = -(-matrix.columns // GROUP), []
    for block in matrix.data.reshape(matrix.blocks, matrix.block_nbytes):
        if matrix.kind in DENSE:
            found.append(block.view(DENSE[matrix.kind]).reshape(matrix.columns, 16).T.astype(np.float64))
            continue
        each, nbytes = 1 if matrix.kind == W4M else 2, 512 if matrix.kind == W8 else 256  # groups of a unit; of codes
        numbers, codes = np.empty((2, groups, 16)), np.empty((groups, nbytes // 64, 16, 4), np.int64)
        for group in range(groups):
            unit, nth = group // each * (64 + each * nbytes), group % each
            numbers[:, group] = np.roll(block[unit : unit + 64].view("<f2").reshape(2, 16), -nth, axis=0)
            codes[group] = block[unit + 64 + nth * nbytes :][:nbytes].reshape(-1, 16, 4)
        kinds = 2 if matrix.kind == W4M else 1
        values = np.empty((16, groups, GROUP))
        for lane in range(16):
            for c in range(GROUP):
                if matrix.kind == W8:
                    code = codes[:, c // 4, lane, c % 4] - 128
                else:
                    code = codes[:, c % 16 // 4, lane, c % 4] // 16 ** (c // 16) % 16 - (8 if matrix.kind == W4 else 0)
                values[lane, :, c] = code * numbers[0, :, lane] + (numbers[1, :, lane] if kinds == 2 else 0)
        found.append(values.reshape(16, -1)[:, : matrix.columns])
    return np.concatenate(found)


# --- Storing and taking --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(1, 70), st.integers(1, 100), st.integers(0, 2**32))
def test_rows_come_back_as_they_were_stored(kind: str, rows: int, columns: int, seed: int) -> None:
    """Rounded once, as code * scale is exact; the layout is that of the description, and what fills it up is zero."""
    rows_ = random_rows(np.random.default_rng(seed), kind, rows, columns)
    matrix = packed(rows_)
    np.testing.assert_array_equal(take(matrix), rows_.values.astype(np.float32))
    laid_out = read(matrix)
    np.testing.assert_array_equal(laid_out[:rows], rows_.values)
    assert not laid_out[rows:].any()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.lists(st.integers(1, 3), max_size=3), st.integers(1, 40), st.integers(1, 100),
    st.integers(0, 2**32),
)  # fmt: skip
def test_tensors_of_one_matrix_lie_one_below_the_other(
    kind: str, blocks: list[int], rows: int, columns: int, seed: int
) -> None:
    """All but the last end with a whole block."""
    rng = np.random.default_rng(seed)
    tensors = [random_rows(rng, kind, count, columns) for count in (*(16 * x for x in blocks), rows)]
    found = take(packed(*tensors))
    np.testing.assert_array_equal(found, np.concatenate([x.values for x in tensors]).astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 36), max_size=40), st.integers(0, 2**32))
def test_any_rows_are_taken_in_any_order(kind: str, ids: list[int], seed: int) -> None:
    """Twice, too."""
    rows = random_rows(np.random.default_rng(seed), kind, 37, 50)
    found = take(packed(rows), np.array(ids, np.int64))
    np.testing.assert_array_equal(found, rows.values[ids].astype(np.float32).reshape(len(ids), 50))


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_and_every_number_comes_back(kind: str) -> None:
    """All codes at all places of a group in all lanes; of dense kinds, all bit patterns (of float32 every 2^16-th)."""
    if kind in DTYPES:
        patterns = np.arange(1 << 16, dtype=np.uint32) << 16 if kind == "f32" else np.arange(1 << 16, dtype=np.uint16)
        stored = patterns.view(DTYPES[kind]).reshape(1024, 64)
        matrix = empty_matrix(KINDS[kind], 1024, 64)
        held = matrix.data.view(patterns.dtype).reshape(64, 64, 16)
        held[:] = patterns.reshape(64, 16, 64).transpose(0, 2, 1)
        found = take(matrix)
        np.testing.assert_array_equal(found, stored.astype(np.float32))
        return
    lowest, levels = {"q8": (-128, 256), "q4": (-8, 16), "q4m": (0, 16)}[kind]
    codes = (np.arange(16)[:, None, None] + np.arange(levels)[:, None] + np.arange(GROUP)) % levels + lowest
    minima = np.full((16, levels), -3) if kind == "q4m" else None
    rows = coded_rows(kind, codes, np.full((16, levels), 0.25), minima)
    np.testing.assert_array_equal(take(packed(rows)), rows.values.astype(np.float32))


@pytest.mark.parametrize("kind", CODES)
def test_every_scale_and_minimum_comes_back(kind: str) -> None:
    """All float16 numbers, subnormal ones and those of both signs."""
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)].reshape(-1, 32)
    rng = np.random.default_rng(1)
    codes = rng.integers(1, 8, (*scales.shape, GROUP))
    rows = coded_rows(kind, codes, scales, rng.permuted(scales, axis=0) if kind == "q4m" else None)
    np.testing.assert_array_equal(take(packed(rows)), rows.values.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (17, 33), (40, 100)])
def test_an_empty_matrix_is_aligned_zeros_of_the_size_that_the_description_gives(
    kind: str, rows: int, columns: int
) -> None:
    matrix = empty_matrix(KINDS[kind], rows, columns)
    groups = -(-columns // GROUP)
    if kind in DTYPES:
        size = columns * 16 * (4 if kind == "f32" else 2)
    else:
        scales = groups * 16 * 2 * (2 if kind == "q4m" else 1)
        size = -(-scales // 64) * 64 + groups * GROUP * 16 * CODE_BITS[KINDS[kind]] // 8
    assert matrix.block_nbytes == block_nbytes(KINDS[kind], columns) == size
    assert matrix.nbytes == matrix.data.nbytes == matrix.blocks * size and matrix.blocks == -(-rows // 16)
    assert matrix.data.ctypes.data % 64 == 0 and not matrix.data.any()
    np.testing.assert_array_equal(take(matrix), np.zeros((rows, columns)))


def test_every_kind_has_its_name() -> None:
    assert [NAMES[kind] for kind in KINDS.values()] == ["q8", "q4", "q4 with minima", "bf16", "f16", "f32"]
    assert set(CODE_BITS) | set(DENSE) == set(KINDS.values()) and not set(CODE_BITS) & set(DENSE)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(CODES), st.permutations(range(20)), st.integers(1, 20), st.integers(0, 2**32))
def test_rows_of_a_file_are_taken_before_they_are_stored(kind: str, order: list[int], count: int, seed: int) -> None:
    """As where a file has rotary rows in another order."""
    rows, chosen = random_rows(np.random.default_rng(seed), kind, 20, 64), np.array(order[:count], np.int64)
    assert isinstance(rows.stored, CodedRows)
    matrix = empty_matrix(KINDS[kind], count, 64)
    store_coded(matrix, 0, rows.stored.take(chosen))
    np.testing.assert_array_equal(take(matrix), rows.values[chosen].astype(np.float32).reshape(count, 64))


@pytest.mark.parametrize(("ids", "message"), [([0, 5], "from 0 to 4, found 0 to 5"), ([-1, 2], "found -1 to 2")])
def test_rows_that_a_matrix_does_not_have_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take(empty_matrix(W8, 5, 32), np.array(ids))


@pytest.mark.parametrize(
    "out", [np.empty((2, 31), np.float32), np.empty((1, 32), np.float32), np.empty((2, 32)),
            np.empty((32, 2), np.float32).T]
)  # fmt: skip
def test_an_output_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    layer = Projection([empty_matrix(W8, 5, 32)], None, PLAIN, None, 0.0)
    with pytest.raises(ValueError, match=r"out must be C-ordered float32 \(2, 32\), found"):
        layer.take(np.array([0, 1]), out)


# --- Rounding to codes ---------------------------------------------------------------------------------------------------


def values_of(coded: CodedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What codes stand for, float64 (rows, columns filled up), and the scale and the minimum of each."""
    rows, groups, _ = coded.words.shape
    stored = coded.words.view(np.uint8)
    if coded.kind == W8:
        codes, minima = stored.view(np.int8).astype(np.float64), np.zeros_like(coded.scales)
    else:
        assert coded.minima is not None
        codes, minima = np.concatenate([stored % 16, stored // 16], axis=2).astype(np.float64), coded.minima
    scales, minima = (
        np.repeat(x.astype(np.float64), GROUP, axis=1) for x in (coded.scales, minima)
    )  # (rows, columns filled up)
    return codes.reshape(rows, groups * GROUP) * scales + minima, scales, minima


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([W8, W4M]), st.integers(1, 9), st.integers(8, 100), st.floats(0, 3), st.floats(-20, 20),
    st.integers(0, 2**32),
)  # fmt: skip
def test_rounding_to_codes_costs_half_a_step(
    kind: int, rows: int, columns: int, power: float, offset: float, seed: int
) -> None:
    """Of numbers whose scales float16 holds to its full precision; groups may lie far from 0."""
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((rows, columns)) + offset) * 10.0**power).astype(np.float32)
    coded = code_rows(x, kind)
    assert coded.kind == kind and coded.words.shape == (rows, -(-columns // GROUP), 8 if kind == W8 else 4)
    assert coded.scales.dtype == np.float16 and (coded.minima is None) == (kind == W8)
    values, steps, _ = values_of(coded)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, -columns % GROUP))).reshape(rows, -1, GROUP)
    span = np.abs(padded).max(axis=2) if kind == W8 else np.ptp(padded, axis=2)
    usual = np.repeat(span / LEVELS[kind] > 2.0**-14, GROUP, axis=1)  # not one number next to the zeros that fill up
    if kind == W4M:  # a minimum is rounded, too: by 2^-12 of it
        usual &= np.repeat(np.abs(padded.min(axis=2)) < 60 * span, GROUP, axis=1)
    assert usual.mean() >= 0.5
    assert (np.abs(values - padded.reshape(rows, -1)) <= 0.501 * steps)[usual].all()
    assert (np.repeat(span / LEVELS[kind], GROUP, axis=1) * 1.01 >= steps)[usual].all()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([W8, W4M]),
    arrays(np.float32, (2, 35), elements=st.floats(-60000, 60000, width=32), fill=st.floats(-60000, 60000, width=32)),
)
def test_of_any_numbers_rounding_costs_half_a_step_and_what_float16_costs(kind: int, x: np.ndarray) -> None:
    """Half a unit in the last place of a minimum, and of a scale below 2^-14 for every step."""
    coded = code_rows(x, kind)
    values, steps, minima = values_of(coded)
    least = np.pad(x, ((0, 0), (0, 29))).reshape(2, 2, GROUP).min(axis=2)
    lost = np.abs(np.repeat(least, GROUP, axis=1) - minima) if kind == W4M else 0
    bound = 0.501 * np.abs(steps) + lost + LEVELS[kind] * 2.0**-25
    assert (np.abs(values[:, :35] - x) <= bound[:, :35]).all()


@pytest.mark.parametrize("kind", [W8, W4M])
def test_numbers_that_have_codes_are_kept(kind: int) -> None:
    """Both ends of the codes among them; so coding what was coded changes nothing."""
    rng = np.random.default_rng(3)
    lowest, levels = (-127, 255) if kind == W8 else (0, 16)
    codes = rng.integers(lowest, lowest + levels, (20, 2, GROUP))
    codes[..., 3], codes[..., 20] = lowest, lowest + levels - 1
    scales = 2.0 ** rng.integers(-6, 3, (20, 2))
    minima = rng.integers(-50, 50, (20, 2)) * scales if kind == W4M else None
    rows = coded_rows("q8" if kind == W8 else "q4m", codes, scales, minima)
    coded = code_rows(rows.values.astype(np.float32), kind)
    np.testing.assert_array_equal(values_of(coded)[0], rows.values)
    np.testing.assert_array_equal(coded.words, rows.stored.words)
    np.testing.assert_array_equal(coded.scales, scales)


@pytest.mark.parametrize("kind", [W8, W4M])
def test_groups_of_zeros_and_of_one_number_are_kept(kind: int) -> None:
    x = np.zeros((3, 64), np.float32)
    x[1] = -0.75
    x[2, 40:] = 2.0**-30
    values, steps, _ = values_of(code_rows(x, kind))
    np.testing.assert_allclose(values[:2], x[:2], rtol=2.0**-11 if kind == W8 else 0)
    assert not values[0].any() and not steps[0].any()
    assert not values[2, :32].any() and (np.abs(values[2]) <= 2.0**-29).all()


@pytest.mark.parametrize(
    ("kind", "last", "beyond"),
    [(W8, 127 * 65504.0, 127 * 65520.0), (W8, -127 * 65504.0, -127 * 65520.0), (W8, 0.0, np.inf), (W8, 0.0, -np.inf),
     (W8, 0.0, np.nan), (W4M, 15 * 65504.0, 15 * 65520.0), (W4M, -65504.0, -65520.0), (W4M, 0.0, np.inf),
     (W4M, 0.0, -np.inf), (W4M, 0.0, np.nan)],
)  # fmt: skip
def test_what_float16_scales_cannot_hold_is_refused(kind: int, last: float, beyond: float) -> None:
    """Wherever it is; up to there everything is rounded as usual."""
    for row, column in ((0, 0), (2, 31), (1, 40)):
        x = np.zeros((3, 41), np.float32)
        x[row, column] = last
        values, _, _ = values_of(code_rows(x, kind))
        np.testing.assert_allclose(values[row, column], last, rtol=1e-3)
        x[row, column] = beyond
        with pytest.raises(OverflowError, match="whose scale is beyond float16"):
            code_rows(x, kind)


@pytest.mark.parametrize("kind", [W8, W4M])
def test_what_was_rounded_is_stored_and_comes_back(kind: int) -> None:
    x = np.random.default_rng(4).standard_normal((37, 70)).astype(np.float32)
    coded = code_rows(x, kind)
    matrix = empty_matrix(kind, 37, 70)
    store_coded(matrix, 0, coded)
    np.testing.assert_array_equal(take(matrix), values_of(coded)[0][:, :70].astype(np.float32))
    np.testing.assert_allclose(take(matrix), x, atol={W8: 0.02, W4M: 0.3}[kind])
