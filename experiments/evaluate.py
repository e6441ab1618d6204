"""``evaluate``: sessions read one text side by side; how likely each finds it, and how far apart they are."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..engine.session import Session
from ..models.errors import NumericalError, PromptError, UsageError
from ..models.linear import FloatLinear
from ..models.load import Model
from .divergence import Comparison, Float32, Float64, compare, joined
from .metrics import (
    Divergence,
    ProbabilityChange,
    by_distance,
    correlation,
    divergence,
    exp,
    finite,
    probability_change,
    standard_error,
    times,
)

__all__ = ["CHUNK", "REGIMES", "Divergence", "Evaluation", "ProbabilityChange", "Regime", "evaluate", "evaluate_each"]

Regime = Literal["chunked", "decode"]
REGIMES = ("chunked", "decode")
CHUNK = 256  # tokens compared at once, and so the most rows of logits of two sessions that exist at once


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``evaluate`` found. Logarithms are natural; inf where a probability is 0, never NaN.

    Standard errors (``_se``) are those of independent tokens, None where there is none: for a single token, and for an
    infinite number.

    Attributes:
        tokens: of the text, all of them read by both sessions.
        predicted_tokens: those compared: all but the first, which nothing comes before, or those behind a later one.
        ppl, ppl_reference: perplexity, exp of the mean negative log likelihood; inf beyond the range of a float.
        ppl_ratio: ppl / ppl_reference.
        ln_ppl_ratio: its logarithm, the mean difference of the tokens' negative log likelihoods.
        nll_correlation: Pearson's, of the tokens' negative log likelihoods; None where one side is constant or infinite.
        kld: KL(reference || candidate).
        dp: change of the right token's probability.
        top1: the fraction of tokens for which both have the same likeliest token.
        by_distance: KL and top-1 by how many tokens have left the candidate's window (metrics.py ``by_distance``).
        kv_bytes_per_token, kv_bytes_per_token_reference: bytes of the cache that holds the whole text, over ``tokens``.
        tokens_per_second: of the candidate's passes, those whose tokens are compared.
        mass: mean share of each segment of the candidate's cache in the attention; None unless asked for.
        mass_by_layer: (layers, segments), in the order of ``mass``.
        each: the numbers of each predicted token.
        digests: SHA-256 of all logits compared, of the reference and the candidate; None unless asked for.
        next_logits: of what comes behind the text, (V,) float32 each, of the reference and the candidate.

    """

    tokens: int
    predicted_tokens: int
    ppl: float
    ppl_se: float | None
    ppl_reference: float
    ppl_reference_se: float | None
    ppl_ratio: float
    ppl_ratio_se: float | None
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    nll_correlation: float | None
    kld: Divergence
    dp: ProbabilityChange
    top1: float
    top1_se: float | None
    by_distance: list[dict[str, Any]]
    kv_bytes_per_token: float
    kv_bytes_per_token_reference: float
    tokens_per_second: float = field(compare=False)
    mass: dict[str, float] | None = None
    mass_by_layer: list[list[float]] | None = None
    each: Comparison = field(kw_only=True, repr=False, compare=False)
    digests: tuple[str, str] | None = None
    next_logits: tuple[Float32, Float32] = field(kw_only=True, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the text as a dictionary that JSON can hold: infinite ones are None, ``kld`` a dictionary."""
        found = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("each", "digests", "next_logits")
        }
        for name in ("kld", "dp"):
            found[name] = {f.name: getattr(found[name], f.name) for f in fields(found[name])}
        return finite(found)


def evaluate(
    reference: Session,
    candidate: Session,
    token_ids: Sequence[int] | NDArray[np.integer],
    **options: Any,
) -> Evaluation:
    """Read a text with both sessions; both end behind it. ``evaluate_each`` with one candidate, and its options."""
    return evaluate_each(reference, [candidate], token_ids, **options)[0]


def evaluate_each(
    reference: Session,
    candidates: Sequence[Session],
    token_ids: Sequence[int] | NDArray[np.integer],
    *,
    chunk: int = CHUNK,
    first: int = 0,
    regime: Regime = "chunked",
    mass: bool = False,
    digest: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Read a text with a reference and with each candidate beside it; all end behind it.

    Each chunk's logits are reduced to a few numbers a token before the next chunk is read: memory is that of the caches,
    of 2 * chunk rows of logits and of a few rows in float64.

    Args:
        reference, candidates: sessions that have read nothing, of the same vocabulary; at least one candidate.
        token_ids: (T,) integers, T >= 2.
        chunk: tokens compared at once; it changes time, memory and rounding, not what is computed.
        first: what is predicted from before this position is not compared, only read; from 0 to T - 2.
        regime: "chunked" reads the text as a prompt, "decode" token by token, as it would be generated. With packed
            weights both give the same bits.
        mass: also find the segments' shares of the attention.
        digest: also hash the logits, so that two runs can be compared bit for bit.
        progress: called with (tokens read, tokens in all) after each chunk, all sessions together.

    Raises:
        UsageError: sessions that cannot be compared, or an option out of range.
        PromptError: fewer than 2 tokens, more than a context holds, an id outside of the vocabulary.
        NumericalError: NaN or infinite logits, or a token of the text that the reference gives probability 0.

    """
    ids = _checked(reference, candidates, token_ids, chunk, regime)
    if type(first) is not int or not 0 <= first <= len(ids) - 2:
        raise UsageError(f"first must be from 0 to {len(ids) - 2}, so that a token is predicted, found {first!r}")
    readers = [
        _Reader(session, regime == "decode", mass and i > 0) for i, session in enumerate((reference, *candidates))
    ]
    parts: list[list[Comparison]] = [[] for _ in candidates]
    starts = [*range(0, first, chunk), *range(first, len(ids) - 1, chunk)]
    for start, stop in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        if start < first:
            for reader in readers:
                reader.skip(ids[start:stop])
        else:
            _read(readers, ids[start:stop], ids[start + 1 : stop + 1], parts, digest)
        if progress is not None:
            progress(stop * len(readers), len(ids) * len(readers))
    for reader in readers:  # nothing comes that it could be compared with, but the cache is to hold it
        reader.next_logits = reader.session.forward(ids[-1:], "last")
    if progress is not None:
        progress(len(ids) * len(readers), len(ids) * len(readers))
    tokens = [joined(each) for each in parts]
    _refuse_impossible(tokens[0].nll_reference, ids[first:], first)
    return [
        _summary(each, ids, first, readers[0], reader, digest) for each, reader in zip(tokens, readers[1:], strict=True)
    ]


class _Reader:
    """One session of an evaluation: its logits, how long they took, and what is known of its attention."""

    def __init__(self, session: Session, one_by_one: bool, mass: bool) -> None:
        self.session, self._one_by_one, self._mass = session, one_by_one, mass
        self.seconds, self.rows, self.hash = 0.0, 0, hashlib.sha256()
        self.names: list[str] = []
        self.next_logits: Float32 | None = None
        self._shares: Float64 | float = 0.0

    def skip(self, ids: NDArray[np.int64]) -> None:
        """Read tokens, and nothing more."""
        for part in ids[:, None] if self._one_by_one else [ids]:
            self.session.forward(part, None)

    def logits(self, ids: NDArray[np.int64]) -> Float32:
        """Read tokens; what is predicted behind each, (T, V)."""
        ledger = self.session.keep_ledger() if self._mass else None
        begun = time.perf_counter()
        rows = [self.session.forward(part, "all") for part in (ids[:, None] if self._one_by_one else [ids])]
        self.seconds += time.perf_counter() - begun
        self.rows += len(ids)
        if ledger is not None:
            self.names = ledger.names
            self._shares += ledger.shares().sum(axis=0).mean(axis=1)  # over queries, then heads
            self.session.keep_ledger(False)
        assert rows[0] is not None
        return rows[0] if len(rows) == 1 else np.concatenate(rows)  # type: ignore[arg-type]

    def shares(self) -> Float64 | None:
        """Mean shares of the attention, (layers, segments); None where nobody asked."""
        return self._shares / self.rows if self.names else None  # type: ignore[return-value]


def _checked(
    reference: Session,
    candidates: Sequence[Session],
    token_ids: Sequence[int] | NDArray[np.integer],
    chunk: int,
    regime: str,
) -> NDArray[np.int64]:
    if type(chunk) is not int or chunk < 1:
        raise UsageError(f"chunk must be a whole number, 1 or more, found {chunk!r}")
    if regime not in REGIMES:
        raise UsageError(f"regime must be one of {', '.join(REGIMES)}, found {regime!r}")
    if not candidates:
        raise UsageError("there must be a candidate, found none")
    sessions = [reference, *candidates]
    if len({id(session) for session in sessions}) < len(sessions):
        raise UsageError("reference and candidate must be two sessions, found one and the same")
    if any(session.position for session in sessions):
        raise UsageError(
            "reference and candidate must have read nothing, "
            f"found {' and '.join(str(session.position) for session in sessions)} tokens in them"
        )
    sizes = [session.model.config.vocab_size for session in sessions]
    if len(set(sizes)) > 1:
        raise UsageError(
            f"reference and candidate must have one vocabulary, found {' and '.join(map(str, sizes))} tokens"
        )
    if np.size(token_ids) < 2:
        raise PromptError(f"at least 2 tokens are needed, of which the second is predicted, found {np.size(token_ids)}")
    return [session.check_fits(token_ids) for session in sessions][0]


def _read(
    readers: Sequence[_Reader],
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    parts: list[list[Comparison]],
    digest: bool,
) -> None:
    """One chunk; a function of its own, so that its logits are gone before the next chunk's are made."""
    expected = readers[0].logits(ids)
    if digest:
        readers[0].hash.update(expected.data)
    for reader, part in zip(readers[1:], parts, strict=True):
        found = reader.logits(ids)
        if digest:
            reader.hash.update(found.data)
        part.append(compare(expected, found, targets))
        del found


def _refuse_impossible(nll_reference: Float64, ids: NDArray[np.int64], first: int) -> None:
    """NumericalError for a text that the reference says cannot be: every ratio to that would be NaN or -inf."""
    impossible = np.flatnonzero(np.isinf(nll_reference))
    if impossible.size:
        at = int(impossible[0]) + 1
        raise NumericalError(f"position {first + at}: the reference gives token {ids[at]} of the text probability 0")


def _summary(
    tokens: Comparison, ids: NDArray[np.int64], first: int, reference: _Reader, reader: _Reader, digest: bool
) -> Evaluation:
    difference, n = tokens.nll - tokens.nll_reference, len(tokens.nll)
    ppl, ppl_reference, ratio = (exp(float(x.mean())) for x in (tokens.nll, tokens.nll_reference, difference))
    top1, positions = float(tokens.same_top1.mean()), first + np.arange(n)
    shares = reader.shares()
    sizes = [session.nbytes()["total"] / len(ids) for session in (reader.session, reference.session)]
    return Evaluation(
        tokens=len(ids),
        predicted_tokens=n,
        ppl=ppl,
        ppl_se=times(ppl, standard_error(tokens.nll)),
        ppl_reference=ppl_reference,
        ppl_reference_se=times(ppl_reference, standard_error(tokens.nll_reference)),
        ppl_ratio=ratio,
        ppl_ratio_se=times(ratio, standard_error(difference)),
        ln_ppl_ratio=float(difference.mean()),
        ln_ppl_ratio_se=standard_error(difference),
        nll_correlation=correlation(tokens.nll_reference, tokens.nll),
        kld=divergence(tokens.kld),
        dp=probability_change(tokens),
        top1=top1,
        top1_se=math.sqrt(top1 * (1 - top1) / (n - 1)) if n > 1 else None,
        by_distance=by_distance(tokens, positions, reader.session.policy.window),
        kv_bytes_per_token=sizes[0],
        kv_bytes_per_token_reference=sizes[1],
        tokens_per_second=reader.rows / reader.seconds if reader.seconds else math.inf,
        mass=None if shares is None else dict(zip(reader.names, shares.mean(axis=0).tolist(), strict=True)),
        mass_by_layer=None if shares is None else shares.tolist(),
        each=tokens,
        next_logits=(reference.next_logits, reader.next_logits),  # type: ignore[arg-type]
        digests=(reference.hash.hexdigest(), reader.hash.hexdigest()) if digest else None,
    )


def is_packed(model: Model) -> bool:
    """Whether all weight matrices are codes or 16-bit floats, so that a row's bits do not depend on the other rows."""
    return not any(isinstance(linear, FloatLinear) for linear in model.transformer.weights.linears())
