"""The sampler against distributions worked out by hand, and against frequencies counted with fixed seeds."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import mixkv
from mixkv.engine.sampler import MAX_SEED, Sampler, SamplingParams, penalize, softmax
from mixkv.models.errors import UsageError

# Token i has the i-th of these probabilities; the order of the ids is not that of the probabilities.
PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + np.float32(3)
DRAWS = 4000


def frequencies(logits: NDArray[np.float32], seen: tuple[int, ...] = (), **params: float) -> NDArray[np.float64]:
    """How often each token is drawn in 4,000 draws with a fixed seed."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **params}))  # type: ignore[arg-type]
    counts = Counter(sampler(logits, seen) for _ in range(DRAWS))
    return np.array([counts[i] for i in range(len(logits))]) / DRAWS


def check(found: NDArray[np.float64], expected: list[float]) -> None:
    """Frequencies within 4.5 standard errors of the expected ones; what should never be drawn never is."""
    wanted = np.array(expected) / sum(expected)
    assert (found[wanted == 0] == 0).all(), found
    assert (np.abs(found - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / DRAWS)).all(), (found, wanted)


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_most_likely_token_and_the_first_of_equals() -> None:
    sampler = Sampler(SamplingParams())
    assert {sampler(LOGITS) for _ in range(20)} == {1}
    assert sampler(np.array([1, 5, 2, 5], np.float32)) == 1
    assert sampler(np.array([-np.inf, -3, -np.inf], np.float32)) == 1


def test_temperature_zero_ignores_the_filters_and_the_seed() -> None:
    for params in (SamplingParams(top_k=3, seed=1), SamplingParams(top_p=0.1, min_p=1, seed=2)):
        assert Sampler(params)(LOGITS) == 1


def test_temperature_one_draws_the_softmax_itself() -> None:
    check(frequencies(LOGITS), PROBABILITIES.tolist())


@pytest.mark.parametrize("temperature", [0.5, 2.0, 100.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    check(frequencies(LOGITS, temperature=temperature), (PROBABILITIES ** (1 / temperature)).tolist())


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert frequencies(LOGITS, temperature=temperature).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 1, 0, 0, 0]),
        (2, [0, 40, 0, 25, 0]),
        (3, [0, 40, 0, 25, 20]),
        (5, [5, 40, 10, 25, 20]),
        (0, [5, 40, 10, 25, 20]),
        (1 << 31, [5, 40, 10, 25, 20]),
    ],
)
def test_top_k_keeps_the_k_most_likely(top_k: int, expected: list[float]) -> None:
    check(frequencies(LOGITS, top_k=top_k), expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [0, 1, 0, 0, 0]),
        (0.39, [0, 1, 0, 0, 0]),
        (0.41, [0, 40, 0, 25, 0]),
        (0.64, [0, 40, 0, 25, 0]),
        (0.66, [0, 40, 0, 25, 20]),
        (0.84, [0, 40, 0, 25, 20]),
        (0.94, [0, 40, 10, 25, 20]),
        (0.96, [5, 40, 10, 25, 20]),
        (1.0, [5, 40, 10, 25, 20]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it_together(top_p: float, expected: list[float]) -> None:
    check(frequencies(LOGITS, top_p=top_p), expected)


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (0.0, [5, 40, 10, 25, 20]),
        (0.12, [5, 40, 10, 25, 20]),  # 0.05 of 0.4 is 0.125
        (0.13, [0, 40, 10, 25, 20]),
        (0.26, [0, 40, 0, 25, 20]),
        (0.51, [0, 40, 0, 25, 0]),
        (0.63, [0, 1, 0, 0, 0]),
        (1.0, [0, 1, 0, 0, 0]),
    ],
)
def test_min_p_keeps_what_is_at_least_that_fraction_as_likely_as_the_best(min_p: float, expected: list[float]) -> None:
    check(frequencies(LOGITS, min_p=min_p), expected)


def test_filters_apply_in_the_documented_order() -> None:
    # top_k first: of the three left, 0.4 / 0.85 is 0.47 and with 0.25 it is 0.76, so top_p = 0.7 leaves two. In the
    # other order, top_p = 0.7 would have left three of the five (0.4 + 0.25 < 0.7).
    check(frequencies(LOGITS, top_k=3, top_p=0.7), [0, 40, 0, 25, 0])
    # Temperature last: it would otherwise flatten the distribution, and top_p = 0.5 leave three.
    check(frequencies(LOGITS, top_p=0.5, temperature=100.0), [0, 1, 0, 1, 0])
    # min_p and top_p together: the stricter decides, whichever it is.
    check(frequencies(LOGITS, top_p=0.96, min_p=0.26), [0, 40, 0, 25, 20])
    check(frequencies(LOGITS, top_p=0.41, min_p=0.13), [0, 40, 0, 25, 0])


def test_the_repeat_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = np.array([2.0, -2.0, 3.0, 0.0, 4.0], np.float32)
    assert penalize(logits, (0, 1, 3), 2.0).tolist() == [1, -4, 3, 0, 4]
    assert penalize(logits, {0, 1}, 0.5).tolist() == [4, -1, 3, 0, 4]
    assert penalize(logits, [4, 4, 4], 2.0).tolist() == [2, -2, 3, 0, 2]  # once, however often it was seen
    assert logits.tolist() == [2, -2, 3, 0, 4]
    assert Sampler(SamplingParams(repeat_penalty=2.0))(logits, {4}) == 2
    assert Sampler(SamplingParams(repeat_penalty=2.0))(logits) == 4
    assert Sampler(SamplingParams(repeat_penalty=1.0))(logits, {4}) == 4


def test_the_repeat_penalty_applies_before_the_filters() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert frequencies(logits, (0,), repeat_penalty=10.0, top_k=1).tolist() == [0, 1, 0]
    exponentials = np.exp([0.3, 2.0, 1.0])
    check(frequencies(logits, (0,), repeat_penalty=10.0), exponentials.tolist())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_strongest_penalties_overflow_nothing(penalty: float) -> None:
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    assert 0 <= Sampler(SamplingParams(temperature=1, repeat_penalty=penalty, seed=0))(logits, {0, 1, 2}) < 3


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 0.0], np.float32)
    for params in (
        {},
        {"top_p": 0.999},
        {"min_p": 0.01},
        {"top_k": 4},
        {"temperature": 100.0},
        {"repeat_penalty": 2.0},
    ):
        found = frequencies(logits, (0, 1), **params)
        assert found[0] == found[2] == 0 and found[1] > 0


def test_large_logits_do_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert softmax(np.array([1e30, 0.0], np.float32)).tolist() == [1, 0]
        assert softmax(np.array([-1e30, -1e30], np.float32)).tolist() == [0.5, 0.5]


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_whatever_the_filters_a_token_comes_out_that_they_allow(
    values: list[float], top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = np.array(values, np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = Sampler(params)(logits)
    probabilities = np.exp(logits.astype(float) - logits.max())
    likelier = int((logits > logits[token]).sum())
    assert likelier < (top_k or len(values))
    assert probabilities[token] >= min_p * (1 - 1e-9)
    kept = np.sort(probabilities)[::-1][: top_k or None]
    assert kept[:likelier].sum() / kept.sum() < top_p + 1e-9


# --- seeds --------------------------------------------------------------------------------------------------------


def drawn(seed: int | None) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
    return [sampler(LOGITS) for _ in range(60)]


def test_a_seed_repeats_itself_and_another_gives_another_row() -> None:
    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert drawn(0) == drawn(0)
    assert drawn(MAX_SEED) == drawn(MAX_SEED)


def test_without_a_seed_every_generation_differs() -> None:
    assert drawn(None) != drawn(None)


# --- fault row 21 -------------------------------------------------------------------------------------------------

NUMBERS = {
    "temperature": ([-0.1, 100.1, -math.inf], "from 0 to 100"),
    "top_p": ([0, 0.0, 2, -0.5, 1.0001], "above 0 and at most 1"),
    "min_p": ([-0.01, 1.5], "from 0 to 1"),
    "repeat_penalty": ([0, 0.0, -1.0, 0.009, 101], "from 0.01 to 100"),
}


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_sampling_number_out_of_range_is_refused_with_name_found_and_allowed(name: str) -> None:
    values, allowed = NUMBERS[name]
    for value in [*values, math.nan, math.inf, "1", None, True, [0.5]]:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value) == f"{name} must be a number {allowed}, found {value!r}"
        assert isinstance(caught.value, ValueError)


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize(("name", "most"), [("top_k", 1 << 31), ("seed", MAX_SEED)])
def test_top_k_and_seed_out_of_range_are_refused_with_name_found_and_allowed(name: str, most: int) -> None:
    for value in [-1, most + 1, 1.0, math.nan, "1", True, [1]]:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value) == f"{name} must be a whole number from 0 to {most}, found {value!r}"
    assert getattr(SamplingParams(**{name: most}), name) == most
    with pytest.raises(UsageError, match="top_k"):
        SamplingParams(top_k=None)  # type: ignore[arg-type]


def test_params_are_frozen_and_greedy_by_default() -> None:
    params = SamplingParams()
    assert params == SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repeat_penalty=1, seed=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    assert not hasattr(params, "__dict__")
    assert mixkv.SamplingParams is SamplingParams
