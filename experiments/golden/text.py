"""A check of a golden file as people read it."""

from collections.abc import Mapping, Sequence

from ...models.check import shown
from .about import NOTHING
from .compare import Check, Choice, Divergence, PromptCheck


def render(check: Check, why: Mapping[str, Sequence[str]]) -> str:
    """A line for each prompt, below it what differs, and at the end why, where something does."""
    lines = [line for i, prompt in enumerate(check.prompts) for line in _prompt(i, prompt, check)]
    if check.failed:
        lines.append("what differs from the record:" if why else f"why: {NOTHING}")
        lines += [f"  {f'{where}:':9} {change}" for where, changes in why.items() for change in changes]
    return "\n".join(lines)


def summary(check: Check) -> str:
    """One line: how many prompts differ, of how many."""
    count = len(check.prompts)
    steps = sum(prompt.steps for prompt in check.prompts)
    tied = sum(prompt.status == "tie" for prompt in check.prompts)
    if check.failed:
        return (
            f"{check.failed} of {count} prompts {'differs' if check.failed == 1 else 'differ'} from what was recorded"
        )
    return f"{count} prompts, {steps} tokens: as recorded" + (f", with ties in {tied}" if tied else "")


def _prompt(i: int, prompt: PromptCheck, check: Check) -> list[str]:
    asked = f"{prompt.prompt_tokens} ids" if prompt.text is None else shown(prompt.text)
    lines = [f"prompt {i}: {prompt.status:7} {asked}"]
    lines += [f"  {note}" for note in prompt.notes]
    if prompt.first is not None:
        lines += _divergence(prompt.first, prompt, check)
    allowed = check.tolerances.logprob
    of = f"at step {prompt.largest_step}"
    if prompt.beyond:
        lines.append(
            f"  log-probabilities differ by up to {prompt.largest:.6g} nats, {of}; by more than {allowed:g} at "
            f"{prompt.beyond} of {prompt.steps} steps"
        )
    elif prompt.largest:
        lines[0] += f"  (log-probabilities differ by up to {prompt.largest:.2g} nats, {of})"
    return lines


def _divergence(parted: Divergence, prompt: PromptCheck, check: Check) -> list[str]:
    behind = "" if parted.before is None else f", behind {shown(parted.before)}"
    width = max(len(_token(choice)) for choice in (parted.recorded, parted.found))
    lines = [f"  step {parted.step} of {prompt.steps}{behind}"]
    lines += [
        f"    {name:8}  {_token(choice):{width}}  log-probability {_number(choice.recorded_logprob)} as recorded, "
        f"{_number(choice.logprob)} now"
        for name, choice in (("recorded", parted.recorded), ("found", parted.found))
    ]
    gap = "unknown" if parted.gap is None else f"{parted.gap:.6g} nats"
    within = "within" if parted.tied else "not within"
    more = prompt.divergences - 1
    lines.append(
        f"    gap of their logits now: {gap}, {within} the tie tolerance of {check.tolerances.tie:g}"
        + (f"; at {more} more step{'s' if more > 1 else ''} another token is likelier" if more else "")
    )
    return lines


def _token(choice: Choice) -> str:
    return f"{choice.id}" if choice.text is None else f"{choice.id} {shown(choice.text)}"


def _number(logprob: float | None) -> str:
    return "unknown" if logprob is None else f"{logprob:.6f}"
