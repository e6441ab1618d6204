"""Numbers of a text from those of its tokens, each against its plainest formula."""

import json
import math
import statistics
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkv.experiments import metrics
from mixkv.experiments.divergence import Comparison

Float64 = NDArray[np.float64]
INF, NAN = math.inf, math.nan
EIGHTHS = st.integers(-8_000, 8_000).map(lambda n: n / 8)  # their sums and products are exact


def comparison(
    kld: Any = None, same: Any = None, nll_reference: Any = None, nll: Any = None, n: int | None = None
) -> Comparison:
    """Tokens of which only these numbers are of interest."""
    given_ = next((len(x) for x in (kld, same, nll) if x is not None), n)
    zeros = np.zeros(given_)
    wide = [zeros if x is None else np.array(x, np.float64) for x in (nll_reference, nll, kld)]
    differs = np.zeros(given_, np.int64) if same is None else 1 - np.array(same, np.int64)
    return Comparison(*wide, np.zeros(given_, np.int64), differs)


# --- quantiles ----------------------------------------------------------------------------------------------------


@given(st.lists(EIGHTHS, min_size=1, max_size=60), st.integers(0, 1000))
def test_a_quantile_is_numpys(values: list[float], thousandths: int) -> None:
    ordered = np.sort(values)
    found = metrics.quantile(ordered, thousandths / 1000)
    assert found == pytest.approx(np.quantile(ordered, thousandths / 1000), rel=1e-12, abs=1e-10)
    assert ordered[0] <= found <= ordered[-1]


@pytest.mark.parametrize("q", ["0.5", "0.9", "0.95", "0.99", "0.999", "1.0"])
def test_a_quantile_is_infinite_where_it_reaches_into_what_is(q: str) -> None:
    """Any part of an infinite neighbour is infinite; none of it is none, and no NaN."""
    for n in range(1, 300):
        for infinite in range(min(n, 3) + 1):
            ordered = np.array([1.0] * (n - infinite) + [INF] * infinite)
            reaches = math.ceil(Fraction(q) * (n - 1)) >= n - infinite
            assert metrics.quantile(ordered, float(q)) == (INF if reaches else 1), (n, infinite)


# --- standard errors, correlation ---------------------------------------------------------------------------------


@given(st.lists(EIGHTHS, min_size=2, max_size=60))
def test_the_standard_error_is_the_deviation_by_the_root_of_n(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert metrics.standard_error(np.array(values)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("values", [[], [3.0], [1.0, INF], [1.0, NAN, 2.0], [INF, INF]], ids=repr)
def test_there_is_no_standard_error_of_one_number_or_infinite_ones(values: list[float]) -> None:
    assert metrics.standard_error(np.array(values)) is None


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=2, max_size=60))
def test_the_correlation_is_pearsons(pairs: list[tuple[float, float]]) -> None:
    x, y = (np.array(side) for side in zip(*pairs, strict=True))
    found = metrics.correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
        return
    assert found == pytest.approx(statistics.correlation(x.tolist(), y.tolist()), rel=1e-9, abs=1e-9)
    assert found == metrics.correlation(y, x)


@pytest.mark.parametrize("value", [0.1, math.log(258), 1e-8, 1e8 / 3])
def test_there_is_no_correlation_with_a_constant_whose_mean_is_rounded(value: float) -> None:
    """Of three times 0.1 the mean is more than 0.1: what is left of it would be taken for a variation."""
    for n in range(1, 100):
        constant, other = np.full(n, value), np.random.default_rng(n).standard_normal(n)
        for x, y in ((constant, other), (other, constant), (constant, constant)):
            assert metrics.correlation(x, y) is None, n


def test_no_correlation_is_beyond_one() -> None:
    for values in np.random.default_rng(0).standard_normal((1000, 7)):
        assert metrics.correlation(values, values) == pytest.approx(1)
        assert metrics.correlation(values, values) <= 1  # type: ignore[operator]
        assert metrics.correlation(values, -values) >= -1  # type: ignore[operator]


@pytest.mark.parametrize("other", [INF, -INF, NAN])
def test_there_is_no_correlation_of_what_is_infinite(other: float) -> None:
    x, y = np.array([1.0, 2, 3]), np.array([1.0, other, 2])
    assert metrics.correlation(x, y) is metrics.correlation(y, x) is None


def test_exp_is_infinite_beyond_a_float_and_nothing_is_scaled_by_that() -> None:
    assert metrics.exp(0) == 1 and metrics.exp(-1e9) == 0 and metrics.exp(710) == metrics.exp(INF) == INF
    assert metrics.exp(709) == pytest.approx(math.e**709)
    assert metrics.times(2.0, 0.25) == 0.5
    assert metrics.times(2.0, None) is metrics.times(INF, 0.25) is metrics.times(INF, None) is None


# --- divergence and change of probability -------------------------------------------------------------------------


def test_the_divergence_is_numpys_statistics() -> None:
    kld = np.random.default_rng(0).exponential(0.01, 777)
    found = metrics.divergence(kld)
    quantiles = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1}
    expected = {"mean": kld.mean(), "se": kld.std(ddof=1) / np.sqrt(777)}
    expected |= {name: np.quantile(kld, q) for name, q in quantiles.items()}
    assert {name: getattr(found, name) for name in found.__slots__} == pytest.approx(expected, rel=1e-12)


def test_the_change_is_of_probabilities_candidate_minus_reference() -> None:
    p_reference, p = np.random.default_rng(1).uniform(0.001, 1, (2, 501))
    found = metrics.probability_change(comparison(nll_reference=-np.log(p_reference), nll=-np.log(p)))
    change = p - p_reference
    steps = {
        "min": 0, "p001": 0.001, "p01": 0.01, "p05": 0.05, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75,
        "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1,
    }  # fmt: skip
    rms = np.sqrt((change**2).mean())
    expected = {"mean": change.mean(), "se": change.std(ddof=1) / np.sqrt(501), "rms": rms}
    expected["rms_se"] = (change**2).std(ddof=1) / np.sqrt(501) / (2 * rms)  # d sqrt(x) = dx / (2 sqrt(x))
    expected |= {name: np.quantile(change, q) for name, q in steps.items()}
    assert {name: getattr(found, name) for name in found.__slots__} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_impossible_token_has_probability_0_and_no_change_has_no_error() -> None:
    found = metrics.probability_change(comparison(nll_reference=[math.log(2), 1.0], nll=[INF, 1.0]))
    assert (found.min, found.max, found.mean) == (-0.5, 0, -0.25)
    unchanged = metrics.probability_change(comparison(nll_reference=[1.0, 2], nll=[1.0, 2]))
    assert (unchanged.rms, unchanged.rms_se, unchanged.se) == (0, None, 0)
    single = metrics.probability_change(comparison(nll_reference=[1.0], nll=[2.0]))
    assert single.se is single.rms_se is None and single.rms == -single.mean == -single.p001


# --- by distance --------------------------------------------------------------------------------------------------


def interval(behind: int) -> tuple[int | None, int]:
    """The one that so many tokens behind the window's edge fall into."""
    if behind <= 0:
        return None, 0
    low, high = 1, 64
    while behind > high:
        low, high = high + 1, 2 * high
    return low, high


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=200),
    st.integers(0, 4000),
    st.randoms(use_true_random=False),
)
def test_each_token_counts_once_where_it_belongs(positions: list[int], window: int, random: Any) -> None:
    kld = [random.choice([0.0, 0.5, 1.0, 3.0]) for _ in positions]
    same = [random.random() < 0.5 for _ in positions]
    expected: dict[tuple[int | None, int], list[int]] = {}
    for i, position in enumerate(positions):
        expected.setdefault(interval(position + 1 - window), []).append(i)
    found = metrics.by_distance(comparison(kld, same), np.array(positions), window)
    assert [(x["from"], x["to"]) for x in found] == sorted(expected, key=lambda x: x[1])
    for row in found:
        own = expected[row["from"], row["to"]]
        assert list(row) == ["from", "to", "tokens", "kld", "kld_se", "top1"]
        assert row["tokens"] == len(own)
        assert row["kld"] == pytest.approx(statistics.mean(kld[i] for i in own))
        assert row["top1"] == pytest.approx(sum(same[i] for i in own) / len(own))
        if len(own) == 1:
            assert row["kld_se"] is None
        else:
            se = statistics.stdev(kld[i] for i in own) / math.sqrt(len(own))
            assert row["kld_se"] == pytest.approx(se, abs=1e-12)


def test_the_edges_of_distance() -> None:
    """Of a whole text behind a window of 10: the query at 9 sees all within it, that at 10 is the first with one behind."""
    found = metrics.by_distance(comparison(n=523), np.arange(523), 10)
    edges = [(x["from"], x["to"], x["tokens"]) for x in found]
    assert edges == [(None, 0, 10), (1, 64, 64), (65, 128, 64), (129, 256, 128), (257, 512, 256), (513, 1024, 1)]


def test_without_a_window_something_is_always_behind_and_a_large_one_holds_everything() -> None:
    found = metrics.by_distance(comparison(n=65), np.arange(65), 0)
    assert [(x["from"], x["to"], x["tokens"]) for x in found] == [(1, 64, 64), (65, 128, 1)]
    for window in (65, 66, 1 << 24):
        found = metrics.by_distance(comparison(n=65), np.arange(65), window)
        assert [(x["from"], x["to"], x["tokens"]) for x in found] == [(None, 0, 65)]
    assert metrics.by_distance(comparison(n=0), np.arange(0), 0) == []


def test_an_infinite_divergence_stays_in_its_distance() -> None:
    near, far = metrics.by_distance(comparison([1.0, 2.0, INF, 1.0]), np.array([0, 1, 70, 71]), 2)
    assert (near["kld"], near["kld_se"], far["kld"], far["kld_se"]) == (1.5, 0.5, INF, None)


# --- histogram ----------------------------------------------------------------------------------------------------

EDGES = [Decimal(10) ** (metrics.LOW + Decimal(i) / metrics.PER_DECADE) for i in range(56)]


@given(st.lists(st.floats(-12, 4).map(lambda x: 10.0**x), max_size=50))
def test_each_divergence_is_in_the_bin_whose_edges_are_around_it(values: list[float]) -> None:
    """But for those on an edge, where a logarithm's last bit decides."""
    exact = [Decimal(x) for x in values]
    assume(all(abs(x / edge - 1) > 1e-12 for x in exact for edge in EDGES))
    found = metrics.histogram(np.array(values))
    below = sum(x < EDGES[0] for x in exact)
    counts = [sum(low <= x < high for x in exact) for low, high in zip(EDGES, EDGES[1:], strict=False)]
    counts[-1] += sum(x >= EDGES[-1] for x in exact)
    assert found == {"low": -9, "high": 2, "per_decade": 5, "counts": counts, "below": below}


def test_the_edges_of_the_histogram() -> None:
    """A power of ten begins a bin."""
    for exponent in range(-9, 2):
        found = metrics.histogram(np.array([10.0**exponent]))
        assert found["counts"].index(1) == 5 * (exponent + 9) and found["below"] == 0
    values = np.array([0, 5e-324, 9.9e-10, 1e-9, 99, 100, 1e6, 1e300, INF])
    found = metrics.histogram(values)
    assert (found["below"], found["counts"][0], found["counts"][-1], sum(found["counts"])) == (3, 1, 5, 6)
    assert len(found["counts"]) == 55 and json.dumps(found)
    assert metrics.histogram(np.empty(0))["counts"] == [0] * 55


# --- the worst, and what JSON holds -------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, INF]), max_size=30), st.integers(0, 40))
def test_the_worst_come_first_and_of_equal_ones_the_earlier(kld: list[float], n: int) -> None:
    expected = sorted(range(len(kld)), key=lambda i: (-kld[i], i))[:n]
    assert metrics.worst(np.array(kld), n) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.floats().map(np.float64) | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_what_is_finite_is_what_json_holds(numbers: Any) -> None:
    """JSON with NaN and Infinity, read with those as null, is the same thing."""
    found = metrics.finite(numbers)
    expected = json.loads(json.dumps(numbers), parse_constant=lambda name: None)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected


def test_finite_leaves_everything_else_as_it_is() -> None:
    numbers = {"a": (1, 2.5), "b": [INF, {"c": -INF, "d": NAN, "e": True}], "f": "inf", "g": None, "h": np.float64(INF)}
    expected = {"a": [1, 2.5], "b": [None, {"c": None, "d": None, "e": True}], "f": "inf", "g": None, "h": None}
    assert metrics.finite(numbers) == expected and numbers["b"][0] == INF  # type: ignore[index]


def test_flat_joins_names_and_leaves_lists_out() -> None:
    numbers = {"a": 1, "b": {"c": 2, "d": {"e": None}, "f": [3]}, "g": [{"h": 4}], "i": {}, "j": "text"}
    assert metrics.flat(numbers) == {"a": 1, "b_c": 2, "b_d_e": None, "j": "text"}
    assert list(metrics.flat({"kld": {"mean": 1, "max": 2}, "top1": 3})) == ["kld_mean", "kld_max", "top1"]
