"""How far one model's predictions are from another's: logits of both -> a few numbers a token, in float64."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.errors import NumericalError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROWS = 8  # rows of logits that are widened to float64 at once


class Comparison(NamedTuple):
    """Numbers of n predicted tokens, each (n,). Logarithms are natural."""

    nll_reference: Float64
    """Negative log likelihood of the token that came, under the reference."""
    nll: Float64
    """The same under the candidate."""
    kld: Float64
    """KL(reference || candidate), 0 or more."""
    top1_reference: NDArray[np.int64]
    """The reference's likeliest token; of tokens equally likely, that of the lowest id, as in greedy decoding."""
    top1: NDArray[np.int64]
    """The candidate's."""

    @property
    def same_top1(self) -> NDArray[np.bool_]:
        """Whether the two are the same."""
        return self.top1 == self.top1_reference


def compare(reference: Float32, candidate: Float32, targets: NDArray[np.integer]) -> Comparison:
    """Compare what two models predict.

    A logit of -inf is probability 0. Where the candidate has it and the reference has not, KL is inf; so is the
    likelihood's logarithm where a target has it. A KL that float64's rounding makes negative (by less than 1e-14, times
    the largest logit where that is above 1) is 0: it cannot be negative.

    Args:
        reference, candidate: logits (n, V) float32, n >= 1.
        targets: (n,) the token that came, from 0 to V - 1.

    Raises:
        NumericalError: a row with NaN or +inf, or of nothing but -inf.

    """
    blocks = [slice(at, at + ROWS) for at in range(0, len(targets), ROWS)]
    return joined([_compare(reference[rows], candidate[rows], targets[rows]) for rows in blocks])


def joined(parts: list[Comparison]) -> Comparison:
    """The numbers of several comparisons (at least one) in a row."""
    return Comparison(*map(np.concatenate, zip(*parts, strict=True)))


def log_softmax(logits: Float32, whose: str) -> Float64:
    """Logarithms of the probabilities, float64 (n, V); NumericalError as in ``compare``, which says ``whose`` they are."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=1, keepdims=True)
    if not np.isfinite(highest).all():
        raise NumericalError(f"the logits of the {whose} are NaN, +inf or nothing but -inf")
    wide -= highest
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _compare(reference: Float32, candidate: Float32, targets: NDArray[np.integer]) -> Comparison:
    log_p, log_q = log_softmax(reference, "reference"), log_softmax(candidate, "candidate")
    rows = np.arange(len(targets))
    return Comparison(
        nll_reference=-log_p[rows, targets],
        nll=-log_q[rows, targets],
        kld=_divergence(log_p, log_q),
        top1_reference=reference.argmax(axis=1).astype(np.int64),
        top1=candidate.argmax(axis=1).astype(np.int64),
    )


def _divergence(log_p: Float64, log_q: Float64) -> Float64:
    """Sum of p (ln p - ln q) over the last axis, in nats. A token with p = 0 adds nothing, whatever q."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # -inf - -inf and 0 * inf, which the two selections replace
        terms = p * (log_p - log_q)
    terms[p == 0] = 0
    terms[np.isneginf(log_q) & ~np.isneginf(log_p)] = np.inf  # also where p is too small for a float64
    return np.maximum(terms.sum(axis=1), 0)
