"""What tests of others assert (testing.py): that two sides decode the same, in whatever way they are given; KL."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ...engine.policy import CachePolicy
from ...engine.session import Session
from ...models.check import shown
from ...models.errors import UsageError
from ...models.load import Model
from ..evaluate import evaluate
from .about import describe, reasons
from .compare import Check, Tolerances, compare, recorded_steps
from .file import About, Golden, Recorded, read
from .prompts import topics_text
from .record import MakeSession, check, record
from .text import render, summary

Policy = CachePolicy | str
Side = Model | tuple[Model, Policy] | Callable[[], Session] | str | Path
STATISTICS = ("mean", "p99", "p999", "max")


def as_policy(policy: Policy) -> CachePolicy:
    """A policy, or the one of a text ("k4v4")."""
    if isinstance(policy, CachePolicy):
        return policy
    if isinstance(policy, str):
        return CachePolicy.parse(policy)
    raise UsageError(f"policy must be a CachePolicy or a text, found {shown(policy)}")


def same_decode(
    a: Side,
    b: Side,
    prompts: Sequence[str | Sequence[int]] | None,
    max_tokens: int | None,
    tolerances: Tolerances,
) -> str | None:
    """What differs, as text, where ``b`` reads what ``a`` decodes; None for nothing. If one is a golden file, it is ``a``.

    See testing.py ``assert_same_decode`` for the arguments and errors.
    """
    files = [read(Path(side)) if isinstance(side, str | Path) else None for side in (a, b)]
    policy = next((file.about.policy for file in files if file is not None), CachePolicy())
    first, second = (file or _sessions(side, policy) for file, side in zip(files, (a, b), strict=True))
    if isinstance(second, Golden) and not isinstance(first, Golden):
        first, second = second, first
    if isinstance(first, Golden):
        if prompts is not None or max_tokens is not None:
            raise UsageError("prompts and max_tokens have no effect with a golden file, which has its own")
        recorded, chat = first.prompts, first.about.chat
    else:
        recorded, chat = record(first, prompts, max_tokens=32 if max_tokens is None else max_tokens), False
    if isinstance(second, Golden):
        found = _compared(recorded, second.prompts, tolerances)
    else:
        found = check(recorded, second, tolerances, chat=chat)
    if not found.failed:
        return None
    why = reasons(_about(first), _about(second))
    return f"{summary(found)}\n{render(found, why)}"


def _sessions(side: Side, usual: CachePolicy) -> MakeSession:
    """What makes the sessions of a side that is no golden file; with the usual policy where it is a model alone."""
    if isinstance(side, Model):
        side = side, usual
    if isinstance(side, tuple) and len(side) == 2 and isinstance(side[0], Model):
        model, policy = side[0], as_policy(side[1])
        return lambda: Session(model, policy)
    if callable(side):
        return side
    raise UsageError(
        "a side must be a model, a model and its policy, a function that makes sessions, or the path of a golden file, "
        f"found {shown(side)}"
    )


def _about(side: MakeSession | Golden) -> About:
    if isinstance(side, Golden):
        return side.about
    session = side()
    return describe(session.model, session.policy)


def _compared(first: Sequence[Recorded], second: Sequence[Recorded], tolerances: Tolerances) -> Check:
    """Two golden files, prompt by prompt, each up to the token at which they part."""
    if len(first) != len(second):
        raise UsageError(f"the two files must have the same prompts, found {len(first)} and {len(second)}")
    pairs = zip(first, second, strict=True)
    return Check([compare(one, recorded_steps(one, two), None, tolerances, None) for one, two in pairs], tolerances)


def measured_kl(
    model: Model,
    policy: Policy,
    text: str | Sequence[int] | None,
    reference: Model | tuple[Model, Policy] | None,
    statistic: str,
    tokens: int,
    limit: float,
) -> tuple[float, str]:
    """A statistic of KL(reference || model with the policy), and all that was measured, as text.

    See testing.py ``assert_kl_below`` for the arguments and errors.
    """
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise UsageError(f"limit must be a finite number of nats, above 0, found {shown(limit)}")
    if statistic not in STATISTICS:
        raise UsageError(f"statistic must be one of {', '.join(STATISTICS)}, found {shown(statistic)}")
    if type(tokens) is not int or tokens < 2:
        raise UsageError(f"tokens must be a whole number, 2 or more, found {shown(tokens)}")
    if text is None:
        text = topics_text(model, tokens)
    ids = (model.encode(text) if isinstance(text, str) else list(text))[:tokens]
    other = model if reference is None else reference
    pair = other if isinstance(other, tuple) else (other, CachePolicy.full())
    candidate, yardstick = Session(model, as_policy(policy)), Session(pair[0], as_policy(pair[1]))
    kld = evaluate(yardstick, candidate, ids).kld
    numbers = {name: float(getattr(kld, name)) for name in STATISTICS}
    about = ", ".join(f"{name} {x:.6g}" for name, x in numbers.items())
    return numbers[statistic], (
        f"  of {len(ids)} tokens: {about}\n  measured: {model.name}, {candidate.policy}\n"
        f"  reference: {pair[0].name}, {yardstick.policy}"
    )
