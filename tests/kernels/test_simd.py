"""The vector operations against NumPy, on this CPU. Those on lesser ones are in test_other_cpus.py."""

import numpy as np
import pytest

from mixkv.kernels import simd
from mixkv.kernels.jit import kernel

from .other_process import exp_error, exponentials, pair_sums, spread, wrong_halves, wrong_stored_halves

ROUND_FACTOR = 1.0 / 32767


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
def _from_integers(source, lows, highs, whole):
    simd.store_f32(lows.ctypes.data, simd.load_low(source.ctypes.data))
    simd.store_f32(highs.ctypes.data, simd.load_high(source.ctypes.data))
    simd.store_f32(whole.ctypes.data, simd.load_int32(source.ctypes.data))


def test_integers_become_floats() -> None:
    """Pairs of unsigned 16 bits, low and high, and signed 32 bits."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 16, dtype=np.uint32)
    words[:3] = 0xFFFFFFFF, 0x8000FFFF, 0xFFFF0000
    lows, highs, whole = np.zeros((3, 16), np.float32)
    _from_integers(words, lows, highs, whole)
    np.testing.assert_array_equal(lows, words & 0xFFFF)
    np.testing.assert_array_equal(highs, words >> 16)
    np.testing.assert_array_equal(whole, words.view(np.int32).astype(np.float32))


# --- Codes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_come_out_of_their_words(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for words in (rng.integers(0, 1 << 32, (3, 16), dtype=np.uint32), np.full((3, 16), 0xFFFFFFFF, np.uint32)):
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
    simd.store_words(words.ctypes.data + 128, simd.load_words(words.ctypes.data))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_go_into_their_words(bits: int) -> None:
    """Rounded to the nearest, half to even; each in its half of the word, the lower bits and the third one apart."""
    count = 16 // (2 if bits == 3 else bits)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (count, 2, 16))
    halves = rng.choice(np.array([-0.5, -0.49, 0, 0.49, 0.5]), codes.shape)
    values = np.clip(codes + halves, 0, 2**bits - 1).astype(np.float32)
    rounded = np.rint(values).astype(np.uint32)
    words = np.zeros((3, 16), np.uint32)
    _codes_to_words(values, bits, words)
    low, high = np.zeros((2, 16), np.uint32)
    for i in range(count):
        for half in range(2):
            plane = 2 if bits == 3 else bits
            low |= (rounded[i, half] & ((1 << plane) - 1)) << (16 * half + plane * i)
            high |= (rounded[i, half] >> 2 & 1) << (16 * half + i)
    np.testing.assert_array_equal(words[0], low)
    np.testing.assert_array_equal(words[2], low)
    if bits == 3:
        np.testing.assert_array_equal(words[1], high)


@kernel
def _store_pairs(low, high, factor, target):
    for i in range(low.shape[0]):
        at = 64 * i
        simd.store_pairs(
            target.ctypes.data + at, simd.load_f32(low.ctypes.data + at), simd.load_f32(high.ctypes.data + at),
            simd.splat(np.float32(factor)),
        )  # fmt: skip


def test_pairs_are_rounded_to_the_nearest_and_to_even() -> None:
    whole = np.arange(-32767, 32768, dtype=np.float64)
    x = np.concatenate([whole, whole[:-1] + 0.5, whole[:-1] + 0.25, whole[1:] - 0.25])
    x = np.resize(x, -(-len(x) // 32) * 32).astype(np.float32)
    for factor in (1.0, 4.0, -0.125):  # exact, so that a fused and a separate multiplication agree
        low, high = (x / np.float32(factor)).reshape(2, -1, 16)
        found = np.zeros((len(low), 16, 2), np.int16)
        _store_pairs(low, high, factor, found)
        want = np.stack([np.rint(low * np.float32(factor)), np.rint(high * np.float32(factor))], axis=-1)
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
    sums[0], sums[1], sums[2] = simd.sum_lanes(values), simd.max_lanes(values), simd.largest_lane(values)
    simd.store_f32(kept.ctypes.data, simd.keep_lanes(values, np.int32(first), np.int32(stop), np.float32(-np.inf)))


def reduce(x: np.ndarray, first: int = 0, stop: int = 16) -> tuple[np.ndarray, np.ndarray]:
    kept, sums = np.zeros(16, np.float32), np.zeros(3, np.float32)
    _reduce(x, first, stop, kept, sums)
    return kept, sums


def test_sum_and_maximum_of_the_lanes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        x = rng.integers(-1000, 1000, 16).astype(np.float32)
        np.testing.assert_array_equal(reduce(x)[1], (x.sum(), x.max(), x.max()))
    x = np.full(16, -np.inf, np.float32)
    np.testing.assert_array_equal(reduce(x)[1], np.full(3, -np.inf))
    for lane in range(16):
        x = np.arange(16, dtype=np.float32)
        x[lane] = np.nan
        total, top, largest = reduce(x)[1]
        assert np.isnan(total) and np.isnan(top) and (np.isnan(largest) or largest in x)


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
        vector = simd.load_f32(x.ctypes.data + 64 * i)
        alone[i], alone[4 + i] = simd.sum_lanes(vector), simd.largest_lane(vector)


def test_four_vectors_are_reduced_as_each_alone() -> None:
    """In the same order, so with the same bits."""
    rng = np.random.default_rng(3)
    for size in (1.0, 1e10, 1e-40):
        x = (size * rng.standard_normal((4, 16))).astype(np.float32)
        x[2, :15] = -np.inf
        sums, largest, alone = np.zeros(16, np.float32), np.zeros(16, np.float32), np.zeros(8, np.float32)
        _reduce_four(x, sums, largest, alone)
        np.testing.assert_array_equal(sums, np.repeat(alone[:4], 4))
        np.testing.assert_array_equal(largest, np.repeat(alone[4:], 4))
        np.testing.assert_array_equal(alone[4:], x.max(axis=1))
        finite = [0, 1, 3]
        sum_of_magnitudes = np.abs(x[finite].astype(np.float64)).sum(axis=1)
        error = np.abs(alone[finite] - x[finite].astype(np.float64).sum(axis=1))
        assert (error <= 5 * 2.0**-24 * sum_of_magnitudes).all()


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


# --- The microkernels ----------------------------------------------------------------------------------------------------

SHAPES = [(rows, blocks) for rows in range(1, 5) for blocks in range(1, 5)]


@kernel
def _multiply_floats(a, b, target, count, rows, blocks):
    """Rows of ``a`` times vectors of ``b``, added to ``target``; the strides are those of larger arrays."""
    simd.multiply_floats(
        a.ctypes.data, 4 * a.shape[1], b.ctypes.data, 64 * b.shape[1], count, rows, blocks, target.ctypes.data,
        64 * target.shape[1], 64, a.ctypes.data, a.ctypes.data + 4 * a.size,
    )  # fmt: skip


def multiply_floats(a: np.ndarray, b: np.ndarray, target: np.ndarray, count: int, rows: int, blocks: int) -> np.ndarray:
    found = target.copy()
    _multiply_floats(a, b, found, count, rows, blocks)
    return found


@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_products_in_float32(count: int, rows: int, blocks: int) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((4, 70), np.float32), vectors(5, 4, 66)
    target = vectors(6, 4, 5)
    found = multiply_floats(a, b, target, count, rows, blocks)
    want = target.astype(np.float64)
    want[:rows, :blocks] += np.einsum("ri,vil->rvl", a[:rows, :count], b[:blocks, :count], dtype=np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)
    untouched = np.ones((4, 5), bool)
    untouched[:rows, :blocks] = False
    np.testing.assert_array_equal(found[untouched], target[untouched])
    for row in range(rows):  # a row's bits are its own
        alone = multiply_floats(a[row:], b, target[row:], count, 1, 1)[0, 0]
        np.testing.assert_array_equal(found[row, 0], alone)
    begun = multiply_floats(a, b, target, count // 2, rows, blocks) if count > 1 else target
    rest, columns = np.roll(a, -(count // 2), axis=1), np.roll(b, -(count // 2), axis=1)
    np.testing.assert_array_equal(multiply_floats(rest, columns, begun, count - count // 2, rows, blocks), found)


@pytest.mark.parametrize("steps", [8, 16, 64, 256])
@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_products_of_pairs_are_exact(steps: int, rows: int, blocks: int) -> None:
    """Any 16-bit factors times any codes of 8 bits."""
    rng = np.random.default_rng(steps)
    a = rng.integers(-32767, 32768, (4, steps)).astype(np.int16)
    b = rng.integers(0, 256, (4, 16, steps)).astype(np.int16)
    found = pair_sums(a, b, rows, blocks)
    want = np.einsum("ri,vli->rvl", a.astype(np.int64), b.astype(np.int64))
    np.testing.assert_array_equal(found[:rows, :blocks], want[:rows, :blocks].astype(np.float32))
    untouched = np.ones((4, 4), bool)
    untouched[:rows, :blocks] = False
    np.testing.assert_array_equal(found[untouched], 7)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_of_pairs_that_there_can_be_is_exact(sign: int) -> None:
    """256 times 255 * 32767 just fits 32 bits; where a sum saturates or wraps it would show."""
    a = np.full((4, 256), sign * 32767, np.int16)
    b = np.full((4, 16, 256), 255, np.int16)
    np.testing.assert_array_equal(pair_sums(a, b, 4, 4), np.float32(sign * 256 * 255 * 32767))
    a[:, ::2] *= -1
    np.testing.assert_array_equal(pair_sums(a, b, 4, 4), 0)


@kernel
def _sum_packed(bits, a, b, rows, blocks, target):
    x, y, z = a.ctypes.data, b.ctypes.data, target.ctypes.data
    strides = 4 * a.shape[1], 64 * b.shape[1]  # a word a pair, a vector of words a step
    if bits == 8:
        simd.sum_packed8(x, strides[0], y, strides[1], a.shape[1], rows, blocks, z, x, x)
    elif bits == 4:
        simd.sum_packed4(x, strides[0], y, strides[1], a.shape[1], rows, blocks, z, x, x)
    else:
        simd.sum_packed2(x, strides[0], y, strides[1], a.shape[1], rows, blocks, z, x, x)
    return a.size + b.size + target.size


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("pairs", [8, 40, 128])
def test_sums_over_packed_codes_are_exact(bits: int, pairs: int) -> None:
    """For every size of block; codes that are all ones and factors of the largest size are among them."""
    rng = np.random.default_rng(bits)
    factors = rng.integers(-32767, 32768, (4, pairs, 2)).astype(np.int16)
    factors[0] = 32767
    codes = rng.integers(0, 1 << bits, (4, pairs, 16, 2))  # vector, pair, lane, half
    codes[1] = (1 << bits) - 1
    per_word = 16 // bits
    places = codes.reshape(4, pairs // per_word, per_word, 16, 2) << (bits * np.arange(per_word)[:, None, None])
    words = np.ascontiguousarray(places.sum(axis=2).astype(np.uint16)).view(np.uint32)[..., 0]
    want = np.einsum("rpk,vplk->rvl", factors.astype(np.int64), codes)
    for rows in range(1, 5):
        for blocks in range(1, 5):
            found = np.full((4, 4, 16), 7, np.int32)
            _sum_packed(bits, factors.view(np.int32)[..., 0], words, rows, blocks, found)
            np.testing.assert_array_equal(found[:rows, :blocks], want[:rows, :blocks])
            assert (found[rows:] == 7).all() and (found[:, blocks:] == 7).all()


@kernel
def _multiply_pairs(a, b, targets, column, fresh, factors, offsets, scales, minima, per_lane, tops, rows, blocks):
    simd.multiply_pairs(
        a.ctypes.data, 2 * a.shape[1], b.ctypes.data, 64 * b.shape[1], a.shape[1] // 2, rows, blocks, targets.ctypes.data,
        column, fresh, factors.ctypes.data, offsets.ctypes.data, scales.ctypes.data if per_lane else 0,
        minima.ctypes.data if per_lane else 0, tops.ctypes.data if tops.size else 0, a.ctypes.data, a.ctypes.data + 64,
    )  # fmt: skip


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("fresh", [0, 1])
@pytest.mark.parametrize("per_lane", [False, True])
@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_sums_of_pairs_are_scaled_and_added(rows: int, blocks: int, per_lane: bool, fresh: int, noted: bool) -> None:
    """(sum * scale * factor) + minimum * offset; the rows' targets are anywhere. What is written is noted if larger."""
    rng = np.random.default_rng(6)
    a = rng.integers(-32767, 32768, (4, 32)).astype(np.int16)
    b = rng.integers(0, 256, (4, 16, 32)).astype(np.int16)
    pairs = np.ascontiguousarray(b.reshape(4, 16, 2, 16).transpose(0, 3, 1, 2))  # step i and i + 16, lane by lane
    words = np.ascontiguousarray(a.reshape(4, 2, 16).transpose(0, 2, 1)).reshape(4, 32)
    factors, offsets = np.zeros(16, np.float32), np.zeros(16, np.float32)
    factors[:4], offsets[:4] = 1e-8 * vectors(7)[:4], vectors(8)[:4]
    scales, minima = vectors(9, 4), vectors(10, 4)
    before = vectors(11, 4, 6)
    target = before.copy()
    order = np.array([2, 0, 3, 1])
    targets = target.ctypes.data + order.astype(np.int64) * 6 * 64
    tops = vectors(12, 4)
    tops[2] = -np.inf
    before_tops = tops.copy()
    top_addresses = tops.ctypes.data + order.astype(np.int64) * 64
    _multiply_pairs(
        words, pairs.reshape(4, 16, 32), targets, 64, fresh, factors, offsets, scales, minima, per_lane,
        top_addresses if noted else top_addresses[:0], rows, blocks,
    )  # fmt: skip
    sums = np.einsum("ri,vli->rvl", a.astype(np.float64), b.astype(np.float64))
    scale, minimum = (scales, minima) if per_lane else (np.ones((4, 16)), np.ones((4, 16)))
    product = sums * scale * factors[:4, None, None] + minimum * offsets[:4, None, None].astype(np.float64)
    want = before.astype(np.float64)
    for r in range(rows):
        old = 0 if fresh else want[order[r], 1 : 1 + blocks]
        want[order[r], 1 : 1 + blocks] = old + product[r, :blocks]
    np.testing.assert_allclose(target, want, rtol=0, atol=2e-6)
    untouched = want == before
    np.testing.assert_array_equal(target[untouched], before[untouched])
    want_tops = before_tops.copy()
    for r in range(rows if noted and fresh else 0):
        want_tops[order[r]] = np.maximum(before_tops[order[r]], target[order[r], 1 : 1 + blocks].max(axis=0))
    np.testing.assert_array_equal(tops, want_tops)
