"""The reduction of logits to numbers per token, against 60 decimal digits."""

import decimal
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkv.experiments.divergence import ROWS, Comparison, compare
from mixkv.models.errors import NumericalError

Float32 = NDArray[np.float32]
DIGITS = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
HUGE = float(np.finfo(np.float32).max)


def log_probabilities(row: list[float]) -> list[Decimal]:
    finite = [Decimal(x) for x in row if x != -math.inf]
    top = max(finite)
    total = DIGITS.ln(sum((DIGITS.exp(DIGITS.subtract(x, top)) for x in finite), Decimal(0)))
    return [
        Decimal("-Infinity") if x == -math.inf else DIGITS.subtract(DIGITS.subtract(Decimal(x), top), total)
        for x in row
    ]


def exact(reference: list[float], candidate: list[float], target: int) -> tuple[float, float, float]:
    """NLL under the reference, under the candidate, and KL, of one row."""
    log_p, log_q = log_probabilities(reference), log_probabilities(candidate)
    if any(p.is_finite() and not q.is_finite() for p, q in zip(log_p, log_q, strict=True)):
        kld = math.inf
    else:
        pairs = [(p, q) for p, q in zip(log_p, log_q, strict=True) if p.is_finite()]
        terms = [DIGITS.multiply(DIGITS.exp(p), DIGITS.subtract(p, q)) for p, q in pairs]
        total = Decimal(0)
        for term in terms:
            total = DIGITS.add(total, term)
        kld = float(total)
    return float(-log_p[target]), float(-log_q[target]), kld


def check(found: Comparison, reference: Float32, candidate: Float32, targets: NDArray[np.int64]) -> None:
    for i, (p, q, target) in enumerate(zip(reference.tolist(), candidate.tolist(), targets.tolist(), strict=True)):
        scale = 1 + max(abs(x) for x in (*p, *q) if math.isfinite(x))
        expected = exact(p, q, target)
        assert [found.nll_reference[i], found.nll[i], found.kld[i]] == pytest.approx(
            expected, rel=1e-13, abs=1e-14 * scale
        )
        assert found.same_top1[i] == (p.index(max(p)) == q.index(max(q)))
        assert found.kld[i] >= 0


LOGITS = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(-HUGE, HUGE, width=32),
    st.sampled_from([-math.inf, 0.0, 1.0, HUGE, -HUGE]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Float32, Float32, NDArray[np.int64]]:
    """Logits of both, (n, V), each row with a finite one, and targets (n,)."""
    n, vocab = draw(st.integers(1, 2 * ROWS + 3)), draw(st.integers(1, 5))
    row = st.lists(LOGITS, min_size=vocab, max_size=vocab).filter(lambda x: max(x) > -math.inf)
    rows = st.lists(row, min_size=n, max_size=n)
    targets = st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n)
    return np.array(draw(rows), np.float32), np.array(draw(rows), np.float32), np.array(draw(targets))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_number_is_that_of_60_digits(case: tuple[Float32, Float32, NDArray[np.int64]]) -> None:
    reference, candidate, targets = case
    with np.errstate(all="raise", under="ignore"):
        found = compare(reference, candidate, targets)
    assert [x.shape for x in found] == [(len(targets),)] * 5
    assert [x.dtype for x in found] == [np.float64, np.float64, np.float64, np.int64, np.int64]
    check(found, reference, candidate, targets)


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3, 1.0])
def test_a_large_vocabulary(noise: float) -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((3, 2000), np.float32) * 5
    candidate = reference + generator.standard_normal(reference.shape, np.float32) * np.float32(noise)
    targets = generator.integers(0, 2000, 3)
    found = compare(reference, candidate, targets)
    check(found, reference, candidate, targets)
    assert (found.kld > 1e-14).all() == (noise > 0)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_a_model_does_not_diverge_from_itself(case: tuple[Float32, Float32, NDArray[np.int64]]) -> None:
    """Not in a single bit, -inf and all."""
    logits, _, targets = case
    found = compare(logits, logits.copy(), targets)
    assert (found.kld == 0).all() and found.same_top1.all()
    np.testing.assert_array_equal(found.nll, found.nll_reference)


def test_a_constant_added_to_all_logits_is_no_divergence() -> None:
    logits = np.random.default_rng(1).integers(-64, 64, (20, 50)).astype(np.float32)
    found = compare(logits, logits + 4096, np.arange(20))
    assert found.kld.max() <= 1e-14 and found.same_top1.all()


def test_rounding_makes_nothing_negative() -> None:
    """One unlikely token's logit moves by its last bit: KL is about 1e-20, and the sum's rounding 1e-16 either way."""
    reference = np.random.default_rng(3).standard_normal((200, 258), np.float32) * 4
    candidate, least = reference.copy(), (np.arange(200), reference.argmin(axis=1))
    candidate[least] = np.nextafter(candidate[least], np.float32(0))
    found = compare(reference, candidate, np.zeros(200, np.int64))
    assert found.kld.min() >= 0 and 0 < found.kld.max() <= 1e-14


def test_the_direction_is_from_the_reference() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln(4/3) / 2 and the other way round 3/4 ln 3 - ln 2."""
    half, quarter = np.zeros((1, 2), np.float32), np.array([[0, math.log(3)]], np.float32)
    assert compare(half, quarter, np.array([0])).kld[0] == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    assert compare(quarter, half, np.array([0])).kld[0] == pytest.approx(0.75 * math.log(3) - math.log(2), abs=1e-7)


def test_what_is_impossible_to_one_of_them() -> None:
    some, none = np.array([[0, 0, 0]], np.float32), np.array([[0, 0, -np.inf]], np.float32)
    target = np.array([2])
    lost, gained = compare(some, none, target), compare(none, some, target)
    assert (lost.kld[0], lost.nll[0], lost.nll_reference[0]) == pytest.approx((math.inf, math.inf, math.log(3)))
    assert (gained.kld[0], gained.nll_reference[0]) == pytest.approx((math.log(3 / 2), math.inf))
    tiny = np.array([[0, 0, -10_000]], np.float32)  # exp(-10,000) is 0 in float64, and above 0 all the same
    assert compare(tiny, none, target).kld[0] == math.inf
    assert compare(none, tiny, target).kld[0] == pytest.approx(0, abs=1e-15)


def test_of_tokens_equally_likely_the_first_is_the_likeliest() -> None:
    reference = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1]], np.float32)
    candidate = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 1]], np.float32)
    assert compare(reference, candidate, np.zeros(3, np.int64)).same_top1.tolist() == [True, False, False]


def test_what_a_row_gives_does_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(2)
    reference, candidate = (generator.standard_normal((3 * ROWS + 1, 300), np.float32) for _ in range(2))
    targets = generator.integers(0, 300, len(reference))
    together = compare(reference, candidate, targets)
    for i in range(len(targets)):
        alone = compare(reference[i : i + 1], candidate[i : i + 1], targets[i : i + 1])
        for name, x in alone._asdict().items():
            assert x[0] == getattr(together, name)[i], (i, name)


@pytest.mark.parametrize("bad", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf], [np.nan, -np.inf]], ids=repr)
def test_logits_that_are_no_numbers_are_an_error_and_it_says_whose(bad: list[float]) -> None:
    good, wrong = np.zeros((ROWS + 2, 2), np.float32), np.zeros((ROWS + 2, 2), np.float32)
    wrong[-1] = bad
    targets = np.zeros(ROWS + 2, np.int64)
    with pytest.raises(NumericalError, match=r"^the logits of the reference are NaN, \+inf or nothing but -inf$"):
        compare(wrong, good, targets)
    with pytest.raises(NumericalError, match="logits of the candidate"):
        compare(good, wrong, targets)
