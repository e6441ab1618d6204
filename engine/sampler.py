"""Choosing the next token from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.errors import UsageError
from ..models.limits import MAX_SEED, MAX_TOP_K

_RANGES: dict[str, tuple[float, float, bool, str]] = {  # lowest, highest, lowest is allowed, in words
    "temperature": (0.0, 100.0, True, "from 0 to 100"),
    "top_p": (0.0, 1.0, False, "above 0 and at most 1"),
    "min_p": (0.0, 1.0, True, "from 0 to 1"),
    "repeat_penalty": (0.01, 100.0, True, "from 0.01 to 100"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn: repeat penalty, then top_k, top_p and min_p, then temperature.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together reach this probability (https://arxiv.org/abs/1904.09751).
        min_p: only tokens at least this fraction as likely as the most likely (https://arxiv.org/abs/2407.01082).
        repeat_penalty: logits of tokens seen before are divided by it where positive, multiplied where negative
            (https://arxiv.org/abs/1909.05858); 1 for none.
        seed: of the random generator; None draws a new one for each generation.

    Raises:
        UsageError: (a ValueError) a value out of its range, with the range.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, closed, words) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not (low <= value <= high) or (value == low and not closed):
                raise UsageError(f"{name} must be a number {words}, found {value!r}")
        for name, most in (("top_k", MAX_TOP_K), ("seed", MAX_SEED)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise UsageError(f"{name} must be a whole number from 0 to {most}, found {value!r}")


class Sampler:
    """Draws tokens; holds the random generator of one generation."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = np.random.default_rng(params.seed)

    def __call__(self, logits: NDArray[np.floating], seen: Sequence[int] | set[int] = ()) -> int:
        """The next token for logits (V,); ``seen`` are the ids that the repeat penalty touches."""
        params = self.params
        if params.repeat_penalty != 1:
            logits = penalize(logits, seen, params.repeat_penalty)
        if params.temperature == 0:
            return int(logits.argmax())
        ids = np.argsort(-logits, kind="stable")
        if params.top_k:
            ids = ids[: params.top_k]
        ids = ids[: _nucleus(softmax(logits[ids]), params.top_p, params.min_p)]
        probabilities = softmax(logits[ids], params.temperature)
        return int(ids[np.searchsorted(np.cumsum(probabilities)[:-1], self._generator.random(), side="right")])


def penalize(logits: NDArray[np.floating], seen: Sequence[int] | set[int], penalty: float) -> NDArray[np.floating]:
    """A copy of logits (V,), in float64, with those of the tokens ``seen`` made less likely."""
    ids = np.fromiter(set(seen), dtype=np.int64)
    penalized = logits.astype(np.float64)
    penalized[ids] = np.where(penalized[ids] > 0, penalized[ids] / penalty, penalized[ids] * penalty)
    return penalized


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities of logits (n,), in float64."""
    below = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
        exponentials = np.exp(below / temperature)
    result: NDArray[np.float64] = exponentials / exponentials.sum()
    return result


def _nucleus(probabilities: NDArray[np.float64], top_p: float, min_p: float) -> int:
    """How many of the probabilities, most likely first, pass top_p and min_p; at least one."""
    count = len(probabilities)
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(probabilities), top_p, side="left")) + 1
    if min_p > 0:
        count = min(count, int((probabilities >= min_p * probabilities[0]).sum()))
    return max(1, min(count, len(probabilities)))
