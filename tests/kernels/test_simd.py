"""The vector operations, on this CPU and on lesser ones that the compiler is told to target."""

import platform

import numpy as np
import pytest
from llvmlite import binding

from mixkv.kernels import simd
from mixkv.kernels.jit import kernel

from .oracle import TOLERANCE
from .other_process import attention_bits, attention_errors, exp_error, exponentials, run_process, wrong_halves

EXP_ULP = 2.0
X86 = platform.machine().lower() in ("x86_64", "amd64")
HASWELL = ("f16c", "fma", "avx2")


# --- exp -----------------------------------------------------------------------------------------------------------------


def test_exp_is_within_two_units_in_the_last_place() -> None:
    assert exp_error() <= EXP_ULP


def test_exp_at_its_edges() -> None:
    low, high = np.float32(-87.3), np.float32(88.7)
    x = np.array(
        [0, -0.0, np.nextafter(low, -np.inf, dtype=np.float32), -1e4, -np.finfo(np.float32).max, -np.inf], np.float32
    )
    np.testing.assert_array_equal(exponentials(x), np.array([1, 1, 0, 0, 0, 0], np.float32))
    x = np.array([np.nextafter(high, np.inf, dtype=np.float32), 1e4, np.finfo(np.float32).max, np.inf], np.float32)
    assert np.isposinf(exponentials(x)).all()
    assert np.isnan(exponentials(np.array([np.nan, -np.nan, np.nan], np.float32))).all()
    inside = exponentials(np.array([low, high]))
    np.testing.assert_allclose(inside, np.exp(np.array([low, high], np.float64)), rtol=3e-7)


# --- Conversions ---------------------------------------------------------------------------------------------------------


def test_every_float16_becomes_its_own_value() -> None:
    assert wrong_halves() == []


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
def _codes(words, shift, mask, target):
    simd.store_f32(target.ctypes.data, simd.bits_to_float(simd.load_words(words.ctypes.data), shift, mask))


@pytest.mark.parametrize(("shift", "mask"), [(0, 15), (4, 15), (28, 15), (0, 255), (24, 255)])
def test_codes_come_out_of_their_words(shift: int, mask: int) -> None:
    words = np.random.default_rng(1).integers(0, 1 << 32, 16, dtype=np.uint32)
    found = np.zeros(16, np.float32)
    _codes(words, shift, mask, found)
    np.testing.assert_array_equal(found, (words >> np.uint32(shift)) & np.uint32(mask))


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
    np.testing.assert_array_equal(reduce(x)[1], (-np.inf, -np.inf))
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
def _maximum(a, b, target):
    simd.store_f32(target.ctypes.data, simd.maximum(simd.load_f32(a.ctypes.data), simd.load_f32(b.ctypes.data)))


def test_the_maximum_of_a_number_and_nan_is_nan() -> None:
    numbers = np.array([1, -np.inf, np.inf, np.nan] * 4, np.float32)
    others = np.repeat(np.array([2, np.nan, -np.inf, np.inf], np.float32), 4)
    found = np.zeros(16, np.float32)
    for a, b in ((numbers, others), (others, numbers)):
        _maximum(a, b, found)
        np.testing.assert_array_equal(found, np.maximum(a, b))


# --- Other CPUs ----------------------------------------------------------------------------------------------------------


def test_attention_on_this_cpu() -> None:
    for kind, error in attention_errors().items():
        assert error <= TOLERANCE["out", kind], kind


def host_has(*features: str) -> bool:
    return X86 and all(binding.get_host_cpu_features().get(name, False) for name in features)


@pytest.mark.skipif(not X86, reason="these are names of x86 CPUs")
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("generic", ()),
        pytest.param("haswell", HASWELL, marks=pytest.mark.skipif(not host_has(*HASWELL), reason="needs AVX2")),
    ],
)
def test_a_cpu_without_avx512_or_avx2_computes_the_same(name: str, features: tuple[str, ...]) -> None:
    """The kernels compile once more there (half a minute, once): halves by integers, multiply and add apart."""
    flags = ",".join(f"+{feature}" for feature in features)
    found = run_process("cpu", {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": flags})
    assert found["features"] == {x: x in features for x in ("f16c", "fma", "avx2", "avx512f")}
    assert found["halves"] == []
    assert found["exp"] <= EXP_ULP
    assert found["attention"].keys() == {kind for _, kind in TOLERANCE if kind != "any"}
    for kind, error in found["attention"].items():
        assert error <= TOLERANCE["out", kind], kind
    if "fma" in features:  # the order of every sum is fixed: only an unfused multiply and add changes bits
        assert found["bits"] == attention_bits()
