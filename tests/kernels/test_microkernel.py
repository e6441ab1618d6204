"""The microkernels against integers and float64, on this CPU. Those on lesser ones are in test_other_cpus.py."""

import numpy as np
import pytest

from mixkv.kernels.tables import LOGITS_ROW

from .microkernels import (
    BITS,
    Call,
    Coded,
    counts,
    exact_sums,
    multiply_codes,
    multiply_dense,
    plain_sums,
    random_factors,
    wanted_sums,
    wrong_code_products,
    wrong_dense_products,
)
from .oracle import DTYPES

THERE = counts()
ROWS, DENSE_ROWS, VECTORS = THERE["rows"], THERE["dense rows"], THERE["vectors"]
PAIRS = (8, 24, 40, 64, 128)  # the odd multiples of 8 end in the middle of a word of third bits


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def test_any_number_of_rows_and_vectors_is_taken_in_turns() -> None:
    """Each time the largest number that there is, as ``counts`` checks; one is among them, so a loop comes to an end."""
    for name in ("rows", "dense rows", "vectors"):
        assert THERE[name][0] == 1, name


def test_every_shape_is_exact_where_numbers_are_whole() -> None:
    assert wrong_code_products() == []
    assert wrong_dense_products() == []


# --- Dense numbers -------------------------------------------------------------------------------------------------------


def in_tiles(b: np.ndarray) -> np.ndarray:
    """Vectors (vectors, steps, 16) as tiles have them, where those of a step lie side by side: K and V alike."""
    return np.ascontiguousarray(b.swapaxes(0, 1)).swapaxes(0, 1)


def among_others(b: np.ndarray) -> np.ndarray:
    """The same in the middle of longer rows, as some of the vectors of a tile are; what is beside them is no number."""
    room = np.full((b.shape[1], len(b) + 3, 16), np.nan, b.dtype)
    room[:, 2:-1] = b.swapaxes(0, 1)
    return room[:, 2:-1].swapaxes(0, 1)


# As a tile has them, and as it is unpacked: one vector after the other
PLACES = {"tile": in_tiles, "part of a tile": among_others, "unpacked": np.ascontiguousarray}


def rows_apart(x: np.ndarray, stride: int) -> np.ndarray:
    """A copy of float32 (rows, ...) whose rows begin ``stride`` bytes apart."""
    room = np.full((len(x), stride // 4), np.nan, np.float32)
    view = room[:, : x[0].size]
    view[:] = x.reshape(len(x), -1)
    return np.lib.stride_tricks.as_strided(view, x.shape, (stride, *x.strides[1:]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("rows", DENSE_ROWS)
def test_products_in_float32(rows: int, vectors: int, count: int, kind: str, place: str) -> None:
    rng = np.random.default_rng(4)
    most_rows, most_vectors = max(DENSE_ROWS), max(VECTORS)
    a = rows_apart(normal(rng, most_rows, count), 4 * count + 64)
    b = PLACES[place](normal(rng, most_vectors, count, 16).astype(DTYPES[kind]))
    target = rows_apart(normal(rng, most_rows, most_vectors + 1, 16), int(LOGITS_ROW))
    found = multiply_dense(kind, a, b, target, rows, vectors)
    want = target.astype(np.float64)
    want[:rows, :vectors] += np.einsum("ri,vil->rvl", a[:rows].astype(np.float64), b[:vectors].astype(np.float64))
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)
    untouched = np.ones(target.shape[:2], bool)
    untouched[:rows, :vectors] = False
    np.testing.assert_array_equal(found[untouched], target[untouched])
    for row in range(rows):  # the bits of a row and a vector are their own
        for vector in range(vectors):
            one, lane = slice(row, row + 1), slice(vector, vector + 1)
            alone = multiply_dense(kind, a[one], b[lane], target[one, lane])
            np.testing.assert_array_equal(found[row, vector], alone[0, 0])
    for cut in {1, count // 2, count - 1} - {0, count}:  # and do not depend on where a sum is interrupted
        begun = multiply_dense(kind, a[:, :cut], b[:, :cut], target, rows, vectors)
        np.testing.assert_array_equal(multiply_dense(kind, a[:, cut:], b[:, cut:], begun, rows, vectors), found)


@pytest.mark.parametrize("kind", DTYPES)
def test_sums_in_float32_run_in_the_order_of_the_steps(kind: str) -> None:
    """What a large number swallows and what it does not tells the order; steps that cancel leave what came after them."""
    a = np.ones((1, 5), np.float32)
    b = np.zeros((1, 5, 16), DTYPES[kind])
    b[0, :, 0] = 2.0**15, 2.0**-10, -(2.0**15), 2.0**-10, 2.0**-10
    found = multiply_dense(kind, a, b, np.zeros((1, 1, 16), np.float32))
    assert found[0, 0, 0] == 2.0**-9 and not found[0, 0, 1:].any()
    swallowed = multiply_dense(kind, a, b, np.full((1, 1, 16), 2.0**-9, np.float32))
    assert swallowed[0, 0, 0] == 2.0**-9


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row_and_lane(kind: str, number: float) -> None:
    rng = np.random.default_rng(5)
    a, b = normal(rng, max(DENSE_ROWS), 9), normal(rng, max(VECTORS), 9, 16).astype(DTYPES[kind])
    target = normal(rng, max(DENSE_ROWS), max(VECTORS), 16)
    clean = multiply_dense(kind, a, b, target)
    bad = b.copy()
    bad[-1, 4, 3] = number
    found = multiply_dense(kind, a, bad, target)
    assert not np.isfinite(found[:, -1, 3]).any()
    found[:, -1, 3] = clean[:, -1, 3]
    np.testing.assert_array_equal(found, clean)
    bad_row = a.copy()
    bad_row[-1, 4] = number
    found = multiply_dense(kind, bad_row, b, target)
    assert not np.isfinite(found[-1]).any()
    np.testing.assert_array_equal(found[:-1], clean[:-1])


# --- Codes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_codes_are_exact(rows: int, pairs: int, bits: int) -> None:
    """Any 16-bit factors times any codes, and no more rows and vectors than asked for."""
    rng = np.random.default_rng(bits)
    coded = Coded.random(rng, bits, 9, 1, 2 * pairs)
    a = random_factors(rng, max(ROWS), 2 * pairs)
    for vectors in range(1, 10):
        found, want = plain_sums(coded, a, rows, vectors), wanted_sums(coded, a, rows, vectors)
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_sums_of_one_part_of_the_steps_are_exact(vectors: int, parts: int, pairs: int, bits: int) -> None:
    """As where channels have scales in groups: those of a part only, in every vector, from any vector on."""
    rng = np.random.default_rng(bits)
    coded = Coded.random(rng, bits, 6, parts, 2 * pairs)
    a = random_factors(rng, max(ROWS), 2 * pairs)
    for part in range(parts):
        for first in (0, 1, 6 - vectors):
            for rows in ROWS:
                shape = rows, vectors, first, part
                np.testing.assert_array_equal(plain_sums(coded, a, *shape), wanted_sums(coded, a, *shape))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", ROWS)
def test_the_largest_sum_of_codes_that_there_can_be_is_exact(rows: int, sign: int, bits: int) -> None:
    """256 of the lowest code times 32767; where a sum saturates or wraps it would show."""
    lowest = -(2 ** (bits - 1))
    coded = Coded.pack(np.full((2, 1, 256, 16), lowest), bits)
    a = np.full((rows, 256), sign * 32767, np.int16)
    np.testing.assert_array_equal(plain_sums(coded, a, rows, 2), np.float32(sign * 256 * lowest * 32767))
    a[:, ::2] *= -1
    np.testing.assert_array_equal(plain_sums(coded, a, rows, 2), 0)


def scaled_call(
    rng: np.random.Generator, coded: Coded, rows: int, vectors: int, per_lane: bool, fresh: bool, noted: bool
) -> Call:
    """A call whose products are at most 1, as what they are added to is; the rows' addresses are in any order."""

    def numbers(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    steps, largest = coded.codes.shape[2], 32767 * 2 ** (coded.bits - 1)
    targets, tops = list(numbers(rows, vectors + 3, 16)), list(numbers(rows, 16))
    order = rng.permutation(rows)
    tops[-1][:] = -np.inf
    scales, centres = (numbers(vectors, 16) if per_lane else None for _ in range(2))
    factors = (numbers(rows) / (largest * steps)).astype(np.float32)
    return Call(
        random_factors(rng, rows, steps), [targets[i] for i in order], factors, numbers(rows), scales, centres,
        [tops[i] for i in order] if noted else None, fresh, 2,
    )  # fmt: skip


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("per_lane", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_codes_are_scaled_and_added(rows: int, bits: int, per_lane: bool, fresh: bool, noted: bool) -> None:
    """factor * scale * sum + offset * centre; the largest of what is written is kept, if that is asked for."""
    rng = np.random.default_rng(6)
    for vectors in (1, 3):
        coded = Coded.random(rng, bits, 3, 1, 48)
        call = scaled_call(rng, coded, rows, vectors, per_lane, fresh, noted)
        before, before_tops = np.array(call.targets), None if call.tops is None else np.array(call.tops)
        multiply_codes(coded, call, rows, vectors)
        found = np.array(call.targets)
        sums = exact_sums(coded, call.a)[:, :vectors].astype(np.float64)
        scale, centre = (np.ones((vectors, 16)) if x is None else x for x in (call.scales, call.centres))
        products = sums * scale * call.factors[:, None, None].astype(np.float64)
        products += centre * call.offsets[:, None, None].astype(np.float64)
        want = before.astype(np.float64)
        want[:, 2 : 2 + vectors] = products + (0 if fresh else want[:, 2 : 2 + vectors])
        np.testing.assert_allclose(found, want, rtol=0, atol=4e-7)
        for columns in (slice(0, 2), slice(2 + vectors, None)):
            np.testing.assert_array_equal(found[:, columns], before[:, columns])
        if before_tops is not None:
            written = found[:, 2 : 2 + vectors].max(axis=1)
            np.testing.assert_array_equal(call.tops, np.maximum(before_tops, written))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("per_lane", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_row_of_codes_alone_has_the_bits_that_it_has_among_others(
    rows: int, bits: int, per_lane: bool, fresh: bool
) -> None:
    """And a vector of them."""
    rng = np.random.default_rng(7)
    coded = Coded.random(rng, bits, 4, 1, 80)
    call = scaled_call(rng, coded, rows, 4, per_lane, fresh, True)
    before, before_tops = np.array(call.targets), np.array(call.tops)
    multiply_codes(coded, call, rows, 4)
    for row in range(rows):
        one = slice(row, row + 1)
        alone = Call(
            call.a[one], before[one].copy(), call.factors[one], call.offsets[one], call.scales, call.centres,
            before_tops[one].copy(), fresh, 2,
        )  # fmt: skip
        for vector in range(4):
            alone.column = 2 + vector
            if per_lane:
                alone.scales, alone.centres = call.scales[vector:], call.centres[vector:]
            multiply_codes(coded, alone, 1, 1, vector)
        np.testing.assert_array_equal(alone.targets[0], call.targets[row])
        np.testing.assert_array_equal(alone.tops[0], call.tops[row])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_whatever_is_in_a_fresh_target_never_shows(bits: int, fresh: bool) -> None:
    rng = np.random.default_rng(8)
    coded = Coded.random(rng, bits, 1, 1, 16)
    for number in (np.nan, np.inf, -np.inf):
        call = Call(
            random_factors(rng, 1, 16), np.full((1, 1, 16), number, np.float32), np.ones(1, np.float32),
            np.zeros(1, np.float32), fresh=fresh,
        )  # fmt: skip
        multiply_codes(coded, call, 1, 1)
        want = exact_sums(coded, call.a).astype(np.float32)
        np.testing.assert_array_equal(call.targets, want if fresh else np.full_like(want, number))


@pytest.mark.parametrize("bits", BITS)
def test_factors_that_are_not_numbers_spoil_their_own_row_only(bits: int) -> None:
    rng = np.random.default_rng(9)
    rows = max(ROWS)
    coded = Coded.random(rng, bits, 2, 1, 16)
    for name in ("factors", "offsets"):
        found = []
        for number in (1.0, np.nan):
            call = scaled_call(np.random.default_rng(10), coded, rows, 2, True, True, False)
            getattr(call, name)[rows // 2] = number
            multiply_codes(coded, call, rows, 2)
            found.append(np.array(call.targets))
        assert np.isnan(found[1][rows // 2, 2:4]).all()
        others = np.arange(rows) != rows // 2
        np.testing.assert_array_equal(found[1][others], found[0][others])
