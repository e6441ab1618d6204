"""Numbers of each predicted token -> those of a text. docs/metrics.md has the formulas and units.

Standard errors are those of a mean over tokens that are independent of each other. Tokens of one text are not quite, so
they are lower bounds; with one token, or where a number is infinite, there is none.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .divergence import Comparison, Float64

LOW, HIGH, PER_DECADE = -9, 2, 5  # of the histogram's decades


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || candidate) over all predicted tokens, in nats; quantiles are interpolated linearly."""

    mean: float
    se: float | None
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class ProbabilityChange:
    """Change of the right token's probability, candidate minus reference, from -1 to 1.

    ``p01`` is the quantile of 1 %, ``p001`` that of 0.1 %, ``p999`` that of 99.9 %.
    """

    mean: float
    se: float | None
    rms: float
    rms_se: float | None
    min: float
    p001: float
    p01: float
    p05: float
    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


def quantile(ordered: Float64, q: float) -> float:
    """The quantile of n >= 1 ascending values, interpolated linearly; values may be inf, which NumPy's makes NaN of."""
    at = q * (len(ordered) - 1)
    low, high = float(ordered[math.floor(at)]), float(ordered[math.ceil(at)])
    return low if low == high else low + (at - math.floor(at)) * (high - low)


def standard_error(values: Float64) -> float | None:
    """Of the mean of (n,) values; None where there is none."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def exp(x: float) -> float:
    """E to the power of x; inf beyond the range of a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def times(factor: float, error: float | None) -> float | None:
    """An error scaled; None for none, and for an infinite factor."""
    return None if error is None or not math.isfinite(factor) else factor * error


def correlation(x: Float64, y: Float64) -> float | None:
    """Pearson's, of (n,) values each; None where one of them is constant or infinite."""
    if not all(np.isfinite(values).all() and values.min() < values.max() for values in (x, y)):
        return None
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return min(max(float(x @ y) / norm, -1.0), 1.0) if norm else None


def divergence(kld: Float64) -> Divergence:
    """The statistics of (n,) divergences."""
    ordered = np.sort(kld)
    quantiles = (quantile(ordered, q) for q in (0.5, 0.9, 0.95, 0.99, 0.999, 1.0))
    return Divergence(float(kld.mean()), standard_error(kld), *quantiles)


def probability_change(tokens: Comparison) -> ProbabilityChange:
    """The statistics of the change of the right token's probability."""
    change = np.exp(-tokens.nll) - np.exp(-tokens.nll_reference)
    square, ordered = change * change, np.sort(change)
    rms = math.sqrt(float(square.mean()))
    rms_se = times(0.5 / rms, standard_error(square)) if rms else None
    steps = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
    return ProbabilityChange(
        float(change.mean()), standard_error(change), rms, rms_se, *(quantile(ordered, q) for q in steps)
    )


def by_distance(tokens: Comparison, positions: NDArray[np.int64], window: int) -> list[dict[str, Any]]:
    """KL and top-1 by how many tokens have left the window where a token is predicted.

    Args:
        tokens: n predicted tokens.
        positions: (n,) of the query that predicts each.
        window: of the policy.

    Returns dictionaries of "from", "to" (tokens behind the window's edge, both included: none, 1 to 64, 65 to 128, then
    twice as many each), "tokens" (predicted ones), "kld", "kld_se", "top1"; without those that no token falls into.
    """
    behind = positions + 1 - window
    found, low, high = list[dict[str, Any]](), None, 0
    while low is None or (len(behind) and low <= behind.max()):
        inside = behind <= high if low is None else (behind >= low) & (behind <= high)
        if inside.any():
            kld = tokens.kld[inside]
            mean, se = float(kld.mean()), standard_error(kld)
            row = {"from": low, "to": high, "tokens": len(kld), "kld": mean, "kld_se": se}
            found.append({**row, "top1": float(tokens.same_top1[inside].mean())})
        low, high = high + 1, max(64, 2 * high)
    return found


def histogram(kld: Float64) -> dict[str, Any]:
    """How many divergences lie in each fifth of a decade: {"low", "high", "per_decade", "counts", "below"}.

    counts[i] is for those from 10^(low + i / per_decade) on; "below" are those under 10^low; the last has all above.
    """
    with np.errstate(divide="ignore"):
        at = np.floor((np.log10(kld) - LOW) * PER_DECADE)
    n = (HIGH - LOW) * PER_DECADE
    counts = np.bincount(np.clip(at[at >= 0], 0, n - 1).astype(np.int64), minlength=n)
    below = int((at < 0).sum())
    return {"low": LOW, "high": HIGH, "per_decade": PER_DECADE, "counts": counts.tolist(), "below": below}


def worst(kld: Float64, n: int) -> list[int]:
    """Where the ``n`` largest divergences are, the largest first; of equal ones the first."""
    return np.argsort(-kld, kind="stable")[:n].tolist()


def finite(numbers: Any) -> Any:
    """The same dictionaries, lists and values, with None for numbers that JSON has not: infinite ones and NaN."""
    if isinstance(numbers, dict):
        return {name: finite(x) for name, x in numbers.items()}
    if isinstance(numbers, list | tuple):
        return [finite(x) for x in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def flat(numbers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, names joined by "_"; lists are left out."""
    found: dict[str, Any] = {}
    for name, x in numbers.items():
        if isinstance(x, dict):
            found |= {f"{name}_{key}": y for key, y in flat(x).items()}
        elif not isinstance(x, list):
            found[name] = x
    return found
