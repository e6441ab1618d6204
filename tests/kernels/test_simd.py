"""The vector operations against NumPy, on this CPU. Those on lesser ones are in test_other_cpus.py.

The microkernels, which are made of some of them, are in test_microkernel.py.
"""

import numpy as np
import pytest

from mixkv.kernels import simd
from mixkv.kernels.jit import kernel

from .other_process import exp_error, exponentials, spread, wrong_halves, wrong_stored_halves


def vectors(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 16), dtype=np.float32)


def awkward() -> tuple[np.ndarray, np.ndarray]:
    """Every pair of these numbers, in two arrays of vectors."""
    numbers = np.array([0.0, -0.0, 1, -2.5, 1e-40, 3e38, np.inf, -np.inf], np.float32)
    a, b = np.meshgrid(numbers, numbers)
    return a.reshape(-1, 16).copy(), b.reshape(-1, 16).copy()


# --- exp -----------------------------------------------------------------------------------------------------------------


def test_exp_is_as_close_as_it_says() -> None:
    """Within 2 + |x|/4 units in the last place."""
    assert exp_error() <= 1


def test_exp_is_nearly_as_close_above_zero() -> None:
    """Only the soft-cap asks for that."""
    assert exp_error(0, 88) <= 1.05


def test_exp_at_its_edges() -> None:
    low = np.float32(-87.3)
    x = [0, -0.0, np.nextafter(low, np.float32(-np.inf)), -1e4, -np.finfo(np.float32).max, -np.inf]
    np.testing.assert_array_equal(exponentials(np.array(x, np.float32)), np.array([1, 1, 0, 0, 0, 0], np.float32))
    assert np.isnan(exponentials(np.array([np.nan, -np.nan, np.nan], np.float32))).all()
    inside = exponentials(np.array([low, 88], np.float32))
    np.testing.assert_allclose(inside, np.exp(np.array([low, 88], np.float64)), rtol=3e-6)


@kernel
def _tanh(source, target):
    for i in range(0, source.size, 16):
        y = simd.load_f32(source.ctypes.data + 4 * i)
        e = simd.exp(simd.smaller(simd.splat(np.float32(40)), simd.add(y, y)))
        simd.store_f32(target.ctypes.data + 4 * i, simd.tanh_from_exp(y, e))


def test_tanh_is_as_precise_relatively_for_small_numbers() -> None:
    y = np.concatenate([np.linspace(-25, 25, 100_001), 10.0 ** np.linspace(-37, 1, 10_000), [np.inf, -np.inf, 0]])
    y = np.resize(y, -(-len(y) // 16) * 16).astype(np.float32)
    found = np.zeros_like(y)
    _tanh(y, found)
    np.testing.assert_allclose(found, np.tanh(y.astype(np.float64)), rtol=6e-7, atol=0)


# --- Conversions ---------------------------------------------------------------------------------------------------------


def test_every_float16_becomes_its_own_value() -> None:
    assert wrong_halves() == []


def test_float32_is_rounded_to_float16_as_NumPy_does() -> None:
    assert wrong_stored_halves() == []


@kernel
def _widen_bf16(source, target):
    for i in range(0, source.size, 16):
        simd.store_f32(target.ctypes.data + 4 * i, simd.load_bf16(source.ctypes.data + 2 * i))


def test_every_bfloat16_is_the_upper_half_of_a_float32() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    found = np.zeros(patterns.shape, np.float32)
    _widen_bf16(patterns, found)
    np.testing.assert_array_equal(found.view(np.uint32), patterns.astype(np.uint32) << 16)


@kernel
def _from_integers(source, lows, highs):
    simd.store_f32(lows.ctypes.data, simd.load_low(source.ctypes.data))
    simd.store_f32(highs.ctypes.data, simd.load_high(source.ctypes.data))


def test_integers_become_floats() -> None:
    """Pairs of unsigned 16 bits, low and high."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 16, dtype=np.uint32)
    words[:3] = 0xFFFFFFFF, 0x8000FFFF, 0xFFFF0000
    lows, highs = np.zeros((2, 16), np.float32)
    _from_integers(words, lows, highs)
    np.testing.assert_array_equal(lows, words & 0xFFFF)
    np.testing.assert_array_equal(highs, words >> 16)


# --- Codes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_come_out_of_their_words(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for words in (
        rng.integers(0, 1 << 32, (3, 16), dtype=np.uint32),
        np.full((3, 16), 0xFFFFFFFF, np.uint32),
        np.zeros((3, 16), np.uint32),
    ):
        found, want = spread(bits, words)
        np.testing.assert_array_equal(found, want)


@kernel
def _codes_to_words(values, bits, words):
    """All 16 pairs of two vectors of codes each, packed as quantizing does it, each of two planes on its own."""
    plane = 2 if bits == 3 else bits
    low, high = simd.zero_words(), simd.zero_words()
    for i in range(16 // plane):
        at = values.ctypes.data + 128 * i
        pairs = simd.pair_codes(simd.load_f32(at), simd.load_f32(at + 64))
        low = simd.insert_codes(low, pairs, 0, plane, i * plane)
        high = simd.insert_codes(high, pairs, 2, 1, i)
    simd.store_words(words.ctypes.data, low)
    simd.store_words(words.ctypes.data + 64, high)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_go_into_their_words(bits: int) -> None:
    """Rounded to the nearest, half to even; each in its half of the word, the lower bits and the third one apart."""
    count = 16 // (2 if bits == 3 else bits)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (count, 2, 16))
    halves = rng.choice(np.array([-0.5, -0.49, 0, 0.49, 0.5]), codes.shape)
    values = np.clip(codes + halves, 0, 2**bits - 1).astype(np.float32)
    rounded = np.rint(values).astype(np.uint32)
    words = np.zeros((2, 16), np.uint32)
    _codes_to_words(values, bits, words)
    low, high = np.zeros((2, 16), np.uint32)
    for i in range(count):
        for half in range(2):
            plane = 2 if bits == 3 else bits
            low |= (rounded[i, half] & ((1 << plane) - 1)) << (16 * half + plane * i)
            high |= (rounded[i, half] >> 2 & 1) << (16 * half + i)
    np.testing.assert_array_equal(words[0], low)
    if bits == 3:
        np.testing.assert_array_equal(words[1], high)


@kernel
def _flip(low, high, bits, words):
    pairs = simd.pair_codes(simd.load_f32(low.ctypes.data), simd.load_f32(high.ctypes.data))
    simd.store_words(words.ctypes.data, simd.flip_bits(pairs, bits))


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 8, 128, 0xFFFF, 0x8001])
def test_bits_are_inverted_in_both_halves(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << 16, (2, 16))
    codes[:, :2] = [0, 0xFFFF]
    words = np.zeros((16, 2), np.uint16)
    _flip(*codes.astype(np.float32), bits, words)
    np.testing.assert_array_equal(words, codes.T ^ bits)


@kernel
def _pair_factors(low, high, factor, target):
    for i in range(low.shape[0]):
        at = 64 * i
        pairs = simd.pair_factors(
            simd.load_f32(low.ctypes.data + at), simd.load_f32(high.ctypes.data + at), simd.splat(np.float32(factor))
        )
        simd.store_words(target.ctypes.data + at, pairs)


def test_pairs_of_factors_are_rounded_to_the_nearest_and_to_even() -> None:
    whole = np.arange(-32767, 32768, dtype=np.float64)
    x = np.concatenate([whole, whole[:-1] + 0.5, whole[:-1] + 0.25, whole[1:] - 0.25])
    x = np.resize(x, -(-len(x) // 32) * 32).astype(np.float32)
    for factor in (1.0, 4.0, -0.125):  # exact, so that a fused and a separate multiplication agree
        low, high = (x / np.float32(factor)).reshape(2, -1, 16)
        found = np.zeros((len(low), 16, 2), np.int16)
        _pair_factors(low, high, factor, found)
        want = np.stack([np.rint(low * np.float32(factor)), np.rint(high * np.float32(factor))], axis=-1)
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_factor_that_is_not_a_number_leaves_the_other_ones_alone(number: float) -> None:
    low, high = np.arange(-8, 8, dtype=np.float32).reshape(1, 16), np.full((1, 16), 5, np.float32)
    want, found = np.zeros((2, 1, 16, 2), np.int16)
    _pair_factors(low, high, 3.0, want)
    for side, half in ((low, 0), (high, 1)):
        kept = side[0, 6]
        side[0, 6] = number
        _pair_factors(low, high, 3.0, found)
        side[0, 6] = kept
        found[0, 6, half] = want[0, 6, half]  # it may be any
        np.testing.assert_array_equal(found, want)


# --- Lane by lane --------------------------------------------------------------------------------------------------------

OPERATIONS = ("add", "sub", "mul", "div", "maximum", "larger", "smaller", "larger_magnitude", "zero_where_zero")


@kernel
def _lane_by_lane(a, b, found):
    for i in range(a.shape[0]):
        x, y, at = (
            simd.load_f32(a.ctypes.data + 64 * i),
            simd.load_f32(b.ctypes.data + 64 * i),
            found.ctypes.data + 576 * i,
        )
        simd.store_f32(at, simd.add(x, y))
        simd.store_f32(at + 64, simd.sub(x, y))
        simd.store_f32(at + 128, simd.mul(x, y))
        simd.store_f32(at + 192, simd.div(x, y))
        simd.store_f32(at + 256, simd.maximum(x, y))
        simd.store_f32(at + 320, simd.larger(x, y))
        simd.store_f32(at + 384, simd.smaller(x, y))
        simd.store_f32(at + 448, simd.larger_magnitude(x, y))
        simd.store_f32(at + 512, simd.zero_where_zero(x, y))


def lane_by_lane(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    found = np.zeros((len(a), len(OPERATIONS), 16), np.float32)
    _lane_by_lane(a, b, found)
    return {name: found[:, i] for i, name in enumerate(OPERATIONS)}


def test_arithmetic_lane_by_lane() -> None:
    for a, b in ((vectors(2, 50), vectors(3, 50)), awkward()):
        with np.errstate(all="ignore"):
            want = {
                "add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "maximum": np.maximum(a, b),
                "larger": np.maximum(a, b), "smaller": np.minimum(a, b),
                "larger_magnitude": np.maximum(np.abs(a), np.abs(b)), "zero_where_zero": np.where(b == 0, 0, a),
            }  # fmt: skip
        for name, found in lane_by_lane(a, b).items():
            np.testing.assert_array_equal(found, want[name], err_msg=name)


def test_what_is_not_a_number_lane_by_lane() -> None:
    nan, numbers = np.full((1, 16), np.nan, np.float32), np.arange(16, dtype=np.float32)[None]
    first, second, both = lane_by_lane(nan, numbers), lane_by_lane(numbers, nan), lane_by_lane(nan, nan)
    for name in ("add", "sub", "mul", "div", "maximum"):
        assert np.isnan(first[name]).all() and np.isnan(second[name]).all(), name
    for name in ("larger", "smaller"):  # dropped in the first place, kept in the second
        np.testing.assert_array_equal(first[name], numbers)
        assert np.isnan(second[name]).all() and np.isnan(both[name]).all()
    for found in (first, second):  # either of them
        value = found["larger_magnitude"]
        assert (np.isnan(value) | (value == numbers)).all()
    np.testing.assert_array_equal(lane_by_lane(nan, np.zeros_like(nan))["zero_where_zero"], 0)


@kernel
def _more(a, b, c, place, least, found):
    x, y, z = simd.load_f32(a.ctypes.data), simd.load_f32(b.ctypes.data), simd.load_f32(c.ctypes.data)
    simd.store_f32(found.ctypes.data, simd.fma(x, y, z))
    simd.store_f32(found.ctypes.data + 64, simd.replace_fourth(x, y, place))
    simd.store_f32(found.ctypes.data + 128, simd.inverse_above(x, np.float32(3), np.float32(least)))
    simd.store_f32(found.ctypes.data + 192, simd.splat_at(b.ctypes.data + 4 * place))
    simd.store_f32(found.ctypes.data + 256, simd.splat(simd.scalar_at(b.ctypes.data + 4 * place)))
    simd.store_f32(found.ctypes.data + 320, simd.lane_numbers())
    simd.store_f32(found.ctypes.data + 384, x)
    simd.store_scalar(found.ctypes.data + 384 + 4 * place, np.float32(least))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_other_operations_lane_by_lane(place: int) -> None:
    a, b, c = vectors(4, 3)
    a[2], a[5], a[6] = 0.25, 0, np.nan
    found = np.zeros((7, 16), np.float32)
    _more(a, b, c, place, 0.25, found)
    np.testing.assert_allclose(found[0], a.astype(np.float64) * b + c, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[1], np.where(np.arange(16) % 4 == place, b, a))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found[2], np.where(a > 0.25, np.float32(3) / a, np.float32(0)))
    np.testing.assert_array_equal(found[3:5], b[place])
    np.testing.assert_array_equal(found[5], np.arange(16))
    a[place] = 0.25
    np.testing.assert_array_equal(found[6], a)


# --- Across lanes --------------------------------------------------------------------------------------------------------


@kernel
def _reduce(x, first, stop, kept, sums):
    values = simd.load_f32(x.ctypes.data)
    sums[0], sums[1] = simd.sum_lanes(values), simd.max_lanes(values)
    simd.store_f32(kept.ctypes.data, simd.keep_lanes(values, np.int32(first), np.int32(stop), np.float32(-np.inf)))


def reduce(x: np.ndarray, first: int = 0, stop: int = 16) -> tuple[np.ndarray, np.ndarray]:
    kept, sums = np.zeros(16, np.float32), np.zeros(2, np.float32)
    _reduce(x, first, stop, kept, sums)
    return kept, sums


def test_sum_and_maximum_of_the_lanes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        x = rng.integers(-1000, 1000, 16).astype(np.float32)
        np.testing.assert_array_equal(reduce(x)[1], (x.sum(), x.max()))
    x = np.full(16, -np.inf, np.float32)
    np.testing.assert_array_equal(reduce(x)[1], np.full(2, -np.inf))
    for lane in range(16):
        x = np.arange(16, dtype=np.float32)
        x[lane] = np.nan
        assert np.isnan(reduce(x)[1]).all()


@pytest.mark.parametrize(("first", "stop"), [(0, 16), (-5, 40), (3, 9), (15, 16), (0, 0), (7, 7), (16, 20), (-9, -1)])
def test_lanes_outside_a_range_are_filled(first: int, stop: int) -> None:
    lanes = np.arange(16)
    x = np.where((lanes >= first) & (lanes < stop), lanes, np.nan).astype(np.float32)
    found, _ = reduce(x, first, stop)
    np.testing.assert_array_equal(found, np.where(np.isnan(x), np.float32(-np.inf), x))


@kernel
def _reduce_four(x, sums, largest, alone):
    simd.store_f32(sums.ctypes.data, simd.sum_four(x.ctypes.data))
    simd.store_f32(largest.ctypes.data, simd.largest_four(x.ctypes.data))
    for i in range(4):
        alone[i] = simd.sum_lanes(simd.load_f32(x.ctypes.data + 64 * i))


def test_four_vectors_are_reduced_as_each_alone() -> None:
    """In the same order, so with the same bits."""
    rng = np.random.default_rng(3)
    for size in (1.0, 1e10, 1e-40):
        x = (size * rng.standard_normal((4, 16))).astype(np.float32)
        x[2, :15] = -np.inf
        sums, largest, alone = np.zeros(16, np.float32), np.zeros(16, np.float32), np.zeros(4, np.float32)
        _reduce_four(x, sums, largest, alone)
        np.testing.assert_array_equal(sums, np.repeat(alone, 4))
        np.testing.assert_array_equal(largest, np.repeat(x.max(axis=1), 4))
        finite = [0, 1, 3]
        sum_of_magnitudes = np.abs(x[finite].astype(np.float64)).sum(axis=1)
        error = np.abs(alone[finite] - x[finite].astype(np.float64).sum(axis=1))
        assert (error <= 5 * 2.0**-24 * sum_of_magnitudes).all()


@pytest.mark.parametrize("lane", range(16))
def test_the_largest_of_lanes_of_which_one_is_not_a_number(lane: int) -> None:
    """It is any of them, and the other three vectors' are their own."""
    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    x[1, lane] = np.nan
    sums, largest, alone = np.zeros(16, np.float32), np.zeros(16, np.float32), np.zeros(4, np.float32)
    _reduce_four(x, sums, largest, alone)
    assert np.isnan(sums[4:8]).all() and np.isnan(alone[1])
    assert all(np.isnan(found) or found in x[1] for found in largest[4:8])
    others = [0, 2, 3]
    np.testing.assert_array_equal(largest.reshape(4, 4)[others], np.repeat(x[others].max(axis=1)[:, None], 4, axis=1))


@kernel
def _turn_quads(source, target):
    simd.store_f32(target.ctypes.data, simd.turn_quads(simd.load_f32(source.ctypes.data)))
    simd.store_integer(source.ctypes.data, simd.integer_at(source.ctypes.data + 8) + 1)


def test_a_square_of_four_is_turned_and_integers_are_moved() -> None:
    x, found = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    x.view(np.int64)[1] = -(2**61)
    before = x.copy()
    _turn_quads(x, found)
    np.testing.assert_array_equal(found.reshape(4, 4), before.reshape(4, 4).T)
    assert x.view(np.int64)[0] == 1 - 2**61
    np.testing.assert_array_equal(x[2:], before[2:])


@kernel
def _transpose(source, target):
    simd.transpose(source.ctypes.data, target.ctypes.data)


def test_a_square_of_lanes_is_transposed() -> None:
    x = np.arange(256, dtype=np.float32).reshape(16, 16)
    found = np.zeros_like(x)
    _transpose(x, found)
    np.testing.assert_array_equal(found, x.T)
