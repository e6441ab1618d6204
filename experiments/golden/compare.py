"""What was recorded beside what is found now: step by step, and for each prompt ok, tie or differs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ...models.check import shown
from ...models.errors import UsageError
from ...models.tokenizer import Tokenizer
from .file import Alternatives, Recorded

BEFORE = 60  # characters of the text in front of a divergence


class Step(NamedTuple):
    """What a model says at one step; logarithms are natural, float64."""

    token: int
    """The likeliest."""
    taken: int
    """The one that the text goes on with."""
    logprob: float | None
    """Of the token taken; None where it is not known."""
    gap: float | None
    """By how much the logit of the likeliest is above that of the token taken: 0 where they are one; None as above."""
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What may differ.

    Attributes:
        logprob: nats, of the log-probability of each recorded token.
        tie: nats, by which another token may be likelier than the recorded one.
        exact: nothing may, not the last bit, of the alternatives neither; both numbers are then 0.

    Raises:
        UsageError: a number that is none, or below 0.

    """

    logprob: float = 1e-3
    tie: float = 1e-3
    exact: bool = False

    def __post_init__(self) -> None:
        for name, field in (("tolerance", "logprob"), ("tie", "tie")):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a finite number of nats, 0 or more, found {shown(value)}")
            if self.exact:
                object.__setattr__(self, field, 0.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """A token at a divergence, and its log-probability as recorded and now; None where it is not known."""

    id: int
    text: str | None
    recorded_logprob: float | None
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """A step at which another token is likelier than the recorded one, by ``gap`` nats."""

    step: int
    before: str | None
    recorded: Choice
    found: Choice
    gap: float | None
    tied: bool


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """One prompt's comparison.

    Attributes:
        text: of the prompt, None where ids were recorded.
        prompt_tokens, steps: how many tokens were read, and how many steps compared.
        status: "ok": the same tokens, log-probabilities within the tolerance; "tie": so, but for tokens within the tie
            tolerance; "differs".
        divergences: steps at which another token is likelier; ``first`` is the first of those that are no tie, if any.
        largest: largest difference of a recorded token's log-probability, at step ``largest_step``; inf where it has none.
        beyond: steps at which it is larger than allowed.
        notes: what else differs: how the text becomes ids, and ids a text; with ``exact``, the alternatives.

    """

    text: str | None
    prompt_tokens: int
    steps: int
    status: Literal["ok", "tie", "differs"]
    divergences: int
    first: Divergence | None
    largest: float
    largest_step: int
    beyond: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Check:
    """All prompts' comparisons."""

    prompts: list[PromptCheck]
    tolerances: Tolerances

    @property
    def failed(self) -> int:
        """How many prompts differ."""
        return sum(prompt.status == "differs" for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """The same as a dictionary that JSON can hold: infinite numbers are None."""
        allowed = {"tolerance": self.tolerances.logprob, "tie": self.tolerances.tie, "exact": self.tolerances.exact}
        return _finite({"ok": not self.failed, "prompts": [asdict(x) for x in self.prompts], **allowed})


def compare(
    recorded: Recorded,
    steps: Sequence[Step],
    tokenizer: Tokenizer | None,
    tolerances: Tolerances,
    prompt_ids: Sequence[int] | None,
) -> PromptCheck:
    """Compare one prompt.

    Args:
        recorded: what was recorded.
        steps: what is found at each step, or at the first ones.
        tokenizer: of the model that found it.
        tolerances: what may differ.
        prompt_ids: what the prompt's text is now; None for what is not to be compared.

    """
    expected = recorded.logprobs[: len(steps)]
    differences = [
        abs(step.logprob - then) for step, then in zip(steps, expected, strict=True) if step.logprob is not None
    ]
    largest = max(differences, default=0.0)
    beyond = sum(not x <= tolerances.logprob for x in differences)
    parted = [i for i, step in enumerate(steps) if step.token != recorded.token_ids[i]]
    worse = [i for i in parted if not _tied(steps[i], tolerances)]
    notes = _notes(recorded, steps, tokenizer, tolerances, prompt_ids)
    first = next(iter(worse or parted), None)
    return PromptCheck(
        recorded.text, len(recorded.prompt_ids), len(steps),
        "differs" if beyond or worse or notes else "tie" if parted else "ok",
        len(parted), None if first is None else _divergence(recorded, steps[first], first, tokenizer, tolerances),
        largest, differences.index(largest) if differences else 0, beyond, notes,
    )  # fmt: skip


def _tied(step: Step, tolerances: Tolerances) -> bool:
    return step.gap is not None and step.gap <= tolerances.tie and not tolerances.exact


def _divergence(
    recorded: Recorded, step: Step, i: int, tokenizer: Tokenizer | None, tolerances: Tolerances
) -> Divergence:
    def text(ids: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids)

    def choice(token: int, then: float | None, now: float | None) -> Choice:
        return Choice(token, text([token]), then, now)

    before = text([*recorded.prompt_ids, *recorded.token_ids[:i]])
    then = dict(recorded.alternatives[i])
    return Divergence(
        i, None if before is None else before[-BEFORE:],
        choice(recorded.token_ids[i], recorded.logprobs[i], step.logprob),
        choice(step.token, then.get(step.token), dict(step.alternatives).get(step.token)),
        step.gap, _tied(step, tolerances),
    )  # fmt: skip


def _notes(
    recorded: Recorded,
    steps: Sequence[Step],
    tokenizer: Tokenizer | None,
    tolerances: Tolerances,
    prompt_ids: Sequence[int] | None,
) -> list[str]:
    notes = []
    if prompt_ids is not None and list(prompt_ids) != recorded.prompt_ids:
        pairs = zip(prompt_ids, recorded.prompt_ids, strict=False)
        at = next(
            (i for i, (now, then) in enumerate(pairs) if now != then), min(len(prompt_ids), len(recorded.prompt_ids))
        )
        what = (
            f"other tokens than recorded from number {at} on" if prompt_ids else "no tokens: the model cannot encode it"
        )
        notes.append(f"the prompt's text is now {what}")
    now = None if tokenizer is None else tokenizer.decode(recorded.token_ids)
    if now is not None and recorded.generated is not None and now != recorded.generated:
        notes.append(f"the recorded tokens are now the text {shown(now)}, not {shown(recorded.generated)}")
    if tolerances.exact:
        pairs_ = zip(steps, recorded.alternatives, strict=False)
        other = [
            i
            for i, (step, then) in enumerate(pairs_)
            if any(a != b for a, b in zip(step.alternatives, then, strict=False))
        ]
        if other:
            notes.append(
                f"the likeliest tokens or their log-probabilities differ, at {len(other)} steps from {other[0]} on"
            )
    return notes


def recorded_steps(reference: Recorded, other: Recorded) -> list[Step]:
    """The steps of another record of the same prompt, up to the first token at which they part: then texts differ.

    UsageError where it is another prompt.
    """
    if reference.prompt_ids != other.prompt_ids:
        raise UsageError("the two files must have the same prompts, found others")
    steps: list[Step] = []
    every = zip(reference.token_ids, other.token_ids, other.logprobs, other.alternatives, strict=False)
    for taken, token, highest, alternatives in every:
        logprob = dict(alternatives).get(taken)
        steps.append(Step(token, taken, logprob, None if logprob is None else highest - logprob, alternatives))
        if taken != token:
            break
    return steps


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
