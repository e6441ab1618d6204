"""``evaluate``: two sessions read one text side by side; how likely each finds it, and how far apart they are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.session import Session
from ..models.errors import NumericalError, PromptError, UsageError
from .divergence import Comparison, Float64, compare, joined

CHUNK = 64  # tokens of one pass, and so the most rows of logits of each session that exist at once


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || candidate) over all predicted tokens, in nats; quantiles are interpolated linearly."""

    mean: float
    median: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``evaluate`` found. Logarithms are natural; inf where a probability is 0, never NaN.

    Attributes:
        tokens: of the text, all of them read by both sessions.
        predicted_tokens: those compared: all but the first, which nothing comes before, or those behind a later one.
        ppl, ppl_reference: perplexity, exp of the mean negative log likelihood; inf beyond the range of a float.
        ln_ppl_ratio: ln(ppl / ppl_reference), the mean difference of the tokens' negative log likelihoods.
        ln_ppl_ratio_se: its standard error, as if tokens were independent of each other; None where there is none: for a
            single token, and for an infinite difference.
        kld: KL(reference || candidate).
        top1: the fraction of tokens for which both have the same likeliest token.
        kv_bytes_per_token, kv_bytes_per_token_reference: bytes of the cache that holds the whole text, over ``tokens``.

    """

    tokens: int
    predicted_tokens: int
    ppl: float
    ppl_reference: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    kld: Divergence
    top1: float
    kv_bytes_per_token: float
    kv_bytes_per_token_reference: float

    def to_dict(self) -> dict[str, Any]:
        """The same as a dictionary that JSON can hold: infinite numbers are None, ``kld`` is a dictionary."""
        return _finite(asdict(self))


def evaluate(
    reference: Session,
    candidate: Session,
    token_ids: Sequence[int] | NDArray[np.integer],
    *,
    chunk: int = CHUNK,
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Read a text with both sessions; both end behind it.

    Each chunk's logits are reduced to four numbers a token before the next chunk is read: memory is that of the two caches,
    of 2 * chunk rows of logits and of a few rows in float64.

    Args:
        reference, candidate: two sessions that have read nothing, of the same vocabulary.
        token_ids: (T,) integers, T >= 2.
        chunk: tokens read at once; it changes time, memory and rounding, not what is computed.
        first: what is predicted from before this position is not compared, only read; from 0 to T - 2.
        progress: called with (tokens read, tokens in all) after each chunk.

    Raises:
        UsageError: sessions that cannot be compared, or a chunk out of range.
        PromptError: fewer than 2 tokens, more than a context holds, an id outside of the vocabulary.
        NumericalError: NaN or infinite logits, or a token of the text that the reference gives probability 0.

    """
    ids = _checked(reference, candidate, token_ids, chunk)
    if type(first) is not int or not 0 <= first <= len(ids) - 2:
        raise UsageError(f"first must be from 0 to {len(ids) - 2}, so that a token is predicted, found {first!r}")
    parts: list[Comparison] = []
    starts = [*range(0, first, chunk), *range(first, len(ids) - 1, chunk)]
    for start, stop in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        if start < first:
            for session in (reference, candidate):
                session.forward(ids[start:stop], None)
        else:
            parts.append(_read(reference, candidate, ids[start:stop], ids[start + 1 : stop + 1]))
        if progress is not None:
            progress(stop, len(ids))
    for session in (reference, candidate):  # the last token predicts nothing, but the cache is to hold it
        session.forward(ids[-1:], None)
    if progress is not None:
        progress(len(ids), len(ids))
    tokens = joined(parts)
    _refuse_impossible(tokens.nll_reference, ids[first:], first)
    sizes = [session.nbytes()["total"] / len(ids) for session in (candidate, reference)]
    return _summary(tokens, len(ids), *sizes)


def _checked(
    reference: Session, candidate: Session, token_ids: Sequence[int] | NDArray[np.integer], chunk: int
) -> NDArray[np.int64]:
    if type(chunk) is not int or chunk < 1:
        raise UsageError(f"chunk must be a whole number, 1 or more, found {chunk!r}")
    if reference is candidate:
        raise UsageError("reference and candidate must be two sessions, found one and the same")
    if reference.position or candidate.position:
        raise UsageError(
            "reference and candidate must have read nothing, "
            f"found {reference.position} and {candidate.position} tokens in them"
        )
    sizes = [session.model.config.vocab_size for session in (reference, candidate)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"reference and candidate must have one vocabulary, found {sizes[0]} and {sizes[1]} tokens")
    if np.size(token_ids) < 2:
        raise PromptError(f"at least 2 tokens are needed, of which the second is predicted, found {np.size(token_ids)}")
    reference.check_fits(token_ids)
    return candidate.check_fits(token_ids)


def _read(reference: Session, candidate: Session, ids: NDArray[np.int64], targets: NDArray[np.int64]) -> Comparison:
    """One chunk; a function of its own, so that its logits are gone before the next chunk's are made."""
    expected, found = reference.forward(ids, "all"), candidate.forward(ids, "all")
    assert expected is not None and found is not None
    return compare(expected, found, targets)


def _refuse_impossible(nll_reference: Float64, ids: NDArray[np.int64], first: int) -> None:
    """NumericalError for a text that the reference says cannot be: every ratio to that would be NaN or -inf."""
    impossible = np.flatnonzero(np.isinf(nll_reference))
    if impossible.size:
        at = int(impossible[0]) + 1
        raise NumericalError(f"position {first + at}: the reference gives token {ids[at]} of the text probability 0")


def _summary(tokens: Comparison, n_tokens: int, nbytes: float, nbytes_reference: float) -> Evaluation:
    difference, n = tokens.nll - tokens.nll_reference, len(tokens.nll)
    known = n > 1 and bool(np.isfinite(difference).all())
    kld = np.sort(tokens.kld)
    return Evaluation(
        tokens=n_tokens,
        predicted_tokens=n,
        ppl=_exp(float(tokens.nll.mean())),
        ppl_reference=_exp(float(tokens.nll_reference.mean())),
        ln_ppl_ratio=float(difference.mean()),
        ln_ppl_ratio_se=float(difference.std(ddof=1)) / math.sqrt(n) if known else None,
        kld=Divergence(float(kld.mean()), *(_quantile(kld, q) for q in (0.5, 0.99, 0.999, 1.0))),
        top1=float(tokens.same_top1.mean()),
        kv_bytes_per_token=nbytes,
        kv_bytes_per_token_reference=nbytes_reference,
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _quantile(ordered: Float64, q: float) -> float:
    """The quantile of n >= 1 ascending values, interpolated linearly; values may be inf, which NumPy's makes NaN of."""
    at = q * (len(ordered) - 1)
    low, high = float(ordered[math.floor(at)]), float(ordered[math.ceil(at)])
    return low if low == high else low + (at - math.floor(at)) * (high - low)


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _finite(x) if isinstance(x, dict) else None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in numbers.items()
    }
