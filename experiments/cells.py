"""Cells of an experiment: cache policies on a piece of a text, beside one pass of the reference -> rows of numbers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..engine.generate import generate
from ..engine.policy import CachePolicy
from ..engine.session import Session
from ..models.errors import NumericalError
from ..models.fingerprint import fingerprint
from ..models.load import Model
from .evaluate import Evaluation, Regime, evaluate_each, is_packed
from .keys import key as digest
from .metrics import finite
from .pieces import Piece, Setting
from .rows import SCHEMA, row


@dataclass(frozen=True, slots=True)
class Pair:
    """The model of the candidates and that of the reference; one object where their weights have one format."""

    candidate: Model
    reference: Model

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Of both; see models/fingerprint.py."""
        found = {id(m): fingerprint(m.config, m.transformer.weights) for m in (self.candidate, self.reference)}
        return found[id(self.candidate)], found[id(self.reference)]


def key(setting: Setting, fingerprints: tuple[str, str], part: Piece, policy: CachePolicy) -> str:
    """16 hexadecimal digits of everything that a cell's numbers depend on, but for times."""
    own = {name: x for name, x in asdict(setting).items() if name not in ("model", "tokens")}
    what = {**own, "schema": SCHEMA, "mixkv": __version__, "models": fingerprints, "policy": str(policy)}
    what |= {"document": part.document, "seed": part.seed, "ids": part.digest}
    return digest(what)


def beside(setting: Setting, policy: CachePolicy) -> list[CachePolicy]:
    """The caches that there are beside a policy's own while it is measured alone: those of the reference, and of checks.

    One in shadow mode has codes, and everything densely; so its window is counted twice here.
    """
    again = [CachePolicy.full(), policy] if setting.regime == "both" else []
    shadow = [policy, CachePolicy.parse(policy.dense)] if setting.shadow else []
    return [CachePolicy.full(), *again, *shadow]


def measure(
    pair: Pair,
    setting: Setting,
    part: Piece,
    policies: Sequence[CachePolicy],
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[dict[str, Any], Evaluation]]:
    """The rows of some policies on one piece, beside one pass of the reference; and what was found of each token.

    Args:
        pair: the models, in the formats of the setting.
        setting, part: what is measured, and on what.
        policies: of the candidates.
        progress: called with (tokens read, tokens in all), those of all sessions together.

    Raises:
        UsageError: a policy that does not fit the model.
        NumericalError: as ``evaluate_each``; or, where both regimes are asked for, a session of packed weights whose
            logits are not the same bits in both.

    """
    both = setting.regime == "both"
    meter = _Meter(len(part.ids) * ((1 + len(policies)) * (1 + both) + setting.shadow * len(policies)), progress)
    sessions = _sessions(pair, policies)
    regime: Regime = "decode" if setting.regime == "decode" else "chunked"
    options: dict[str, Any] = {"first": setting.first, "digest": both, "progress": meter.report}
    found = evaluate_each(sessions[0], sessions[1:], part.ids, regime=regime, mass=True, **options)
    meter.next()
    checks: list[dict[str, Any] | None] = [None] * len(policies)
    if both:
        reference, *candidates = _sessions(pair, policies)
        again = evaluate_each(reference, candidates, part.ids, regime="decode", **options)
        checks = [_check_regimes(pair, *each) for each in zip(found, again, strict=True)]
        meter.next()
    errors = [_local_errors(pair.candidate, each, part.ids, meter) if setting.shadow else None for each in policies]
    expected = _continuation(sessions[0], found[0].next_logits[0], setting.continuation)
    rows = []
    for policy, session, one, check, error in zip(policies, sessions[1:], found, checks, errors, strict=True):
        own = _continuation(session, one.next_logits[1], setting.continuation)
        beside: dict[str, Any] = {"regimes": check, "local_errors": error, "reference_continuation": expected.text}
        beside |= {"continuation": own.text, "decode_tokens_per_second": own.tokens_per_second}
        beside["decode_depth"] = None if own.text is None else len(part.ids)
        rows.append((finite(row(pair.candidate, setting, part, policy, one) | beside), one))
    return rows


class _Meter:
    """Progress of several runs one after the other."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._before, self._total, self._last, self._progress = 0, total, 0, progress

    def report(self, done: int, _: int) -> None:
        """So many tokens of the present run."""
        self._last = done
        if self._progress is not None:
            self._progress(self._before + done, self._total)

    def next(self) -> None:
        """The present run is over."""
        self._before, self._last = self._before + self._last, 0


def _sessions(pair: Pair, policies: Sequence[CachePolicy]) -> list[Session]:
    """The reference's, then one for each policy."""
    return [Session(pair.reference, CachePolicy.full()), *(Session(pair.candidate, policy) for policy in policies)]


def _check_regimes(pair: Pair, chunked: Evaluation, decode: Evaluation) -> dict[str, Any]:
    """What the two regimes agree in; NumericalError where packed weights do not give the same bits in both."""
    assert chunked.digests is not None and decode.digests is not None
    agree = [a == b for a, b in zip(chunked.digests, decode.digests, strict=True)]
    for whose, model, same in zip(("reference", "candidate"), (pair.reference, pair.candidate), agree, strict=True):
        if is_packed(model) and not same:
            raise NumericalError(f"the {whose}'s logits are not the same bits read at once and token by token")
    one, other = chunked.each.kld, decode.each.kld
    with np.errstate(invalid="ignore"):  # inf - inf, which is no difference
        apart = np.where(one == other, 0, np.abs(one - other))
    return {
        "reference_same_bits": agree[0],
        "candidate_same_bits": agree[1],
        "largest_kld_difference": float(apart.max()),
    }


def _local_errors(model: Model, policy: CachePolicy, ids: NDArray[np.int64], meter: _Meter) -> dict[str, Any]:
    """The local errors of all layers and heads, {"k", "v", "both"} of (layers, H) lists."""
    session = Session(model, policy, shadow=True)
    session.forward(ids, None, progress=lambda done: meter.report(done, 0))
    meter.next()
    return {part: errors.tolist() for part, errors in session.local_errors().items()}


@dataclass(frozen=True, slots=True)
class _Continued:
    text: dict[str, Any] | None = None
    tokens_per_second: float | None = None


def _continuation(session: Session, next_logits: NDArray[np.float32], n: int) -> _Continued:
    """What a session says greedily behind a text that it has read, and how fast; nothing for 0 tokens."""
    if not n:
        return _Continued()
    ids, begun = [int(next_logits.argmax())], time.perf_counter()
    if n > 1:
        ids += [token.id for token in generate(session, ids, max_tokens=n - 1, ignore_eos=True)]
    seconds = time.perf_counter() - begun
    texts = _texts(session.model, ids)
    text = {"token_ids": ids, "tokens": texts, "text": "".join(texts)}
    return _Continued(text, (n - 1) / seconds if n > 1 else None)


def _texts(model: Model, ids: Sequence[int]) -> list[str]:
    """What can be shown after each token: whole characters only, but for one that is cut off at the end."""
    if model.tokenizer is None:
        return [""] * len(ids)
    stream = model.tokenizer.stream()
    texts = [stream.push(i) for i in ids]
    return [*texts[:-1], texts[-1] + stream.finish()]
