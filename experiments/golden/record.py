"""End-to-end decode tests: what a model decodes greedily is recorded, and later read again token by token and compared.

Both happen in the regime in which text is generated: the prompt is prefilled, then one token after the other. A check reads
the tokens that were recorded, whatever it would have chosen itself, so that every step can be compared. NumPy's BLAS, which
float32 weights go through, runs on one thread meanwhile: with any other number its sums may come out otherwise in the last
bits, and then a code of the cache can fall on the other side of a rounding boundary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from ...engine import memory
from ...engine.session import Session
from ...models.check import shown
from ...models.errors import PromptError, UsageError
from ...models.limits import MAX_GOLDEN_PROMPTS, MAX_GOLDEN_STEPS
from ...models.load import Model
from ..divergence import log_softmax
from .compare import Check, Step, Tolerances, compare
from .file import Recorded
from .prompts import default_prompts, ids_of

TOP = 5  # alternatives of a step that are kept

MakeSession = Callable[[], Session]
Progress = Callable[[int, int], None]


def record(
    make_session: MakeSession,
    prompts: Sequence[str | Sequence[int]] | None = None,
    *,
    max_tokens: int = 32,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[Recorded]:
    """Decode greedily behind each prompt.

    Args:
        make_session: a new session, for each prompt.
        prompts: texts, or ids; our own unless given (prompts.py).
        max_tokens: to generate behind each; fewer where the text ends.
        chat: whether texts are turns in the model's chat template.
        progress: called with (tokens generated, tokens at most).

    Raises:
        UsageError: a number out of range; a text for a model without a tokenizer or, with ``chat``, without a template.
        PromptError: no prompt, or one that does not fit; checked before the first is read.
        NumericalError: NaN.

    """
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_GOLDEN_STEPS:
        raise UsageError(f"max_tokens must be a whole number from 1 to {MAX_GOLDEN_STEPS}, found {shown(max_tokens)}")
    first = _new(make_session)
    model, tokenizer = first.model, first.model.tokenizer
    asked = default_prompts(model, first.policy, max_tokens) if prompts is None else prompts
    if not 1 <= len(asked) <= MAX_GOLDEN_PROMPTS:
        raise PromptError(f"1 to {MAX_GOLDEN_PROMPTS} prompts are needed, found {len(asked)}")
    every = [ids_of(model, prompt, chat=chat) for prompt in asked]
    _check_fit(first, every, [max_tokens] * len(every))
    found = []
    for i, (prompt, ids) in enumerate(zip(asked, every, strict=True)):
        session = _new(make_session)
        steps = decode(session, ids, max_tokens=max_tokens, progress=_part(progress, i, len(every), max_tokens))
        taken = [step.token for step in steps]
        found.append(
            Recorded(
                prompt if isinstance(prompt, str) else None, ids, None if tokenizer is None else tokenizer.decode(taken),
                taken, [step.alternatives[0][1] for step in steps], [step.alternatives for step in steps],
            )
        )  # fmt: skip
    return found


def check(
    recorded: Sequence[Recorded],
    make_session: MakeSession,
    tolerances: Tolerances,
    *,
    chat: bool = False,
    progress: Progress | None = None,
) -> Check:
    """Read what was recorded, token by token, and compare.

    Args:
        recorded: what ``record`` returned, or a file held.
        make_session: a new session, for each prompt.
        tolerances: what may differ.
        chat: as it was recorded.
        progress: called with (tokens read, tokens in all), without the prompts'.

    Raises:
        UsageError: a model whose vocabulary or context is too small for what was recorded.
        NumericalError: NaN.

    """
    first = _new(make_session)
    model = first.model
    try:
        _check_fit(first, [x.prompt_ids for x in recorded], [len(x.token_ids) for x in recorded])
        for prompt in recorded:
            first.check_fits(prompt.token_ids)
    except PromptError as error:
        raise UsageError(f"model {model.name!r} cannot read what was recorded: {error}") from None
    total, done, found = sum(len(prompt.token_ids) for prompt in recorded), 0, []
    for prompt in recorded:
        steps = decode(
            _new(make_session), prompt.prompt_ids, forced=prompt.token_ids, progress=_part(progress, done, total, 1)
        )  # fmt: skip
        done += len(steps)
        found.append(compare(prompt, steps, model.tokenizer, tolerances, _tokenized(model, prompt, chat)))
    return Check(found, tolerances)


def decode(
    session: Session,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int = MAX_GOLDEN_STEPS,
    forced: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Step]:
    """Prefill a prompt, then go on token by token: with the likeliest, or with those that are ``forced``.

    Returns a step for each token: ``max_tokens``, or fewer where an end-of-text token comes; or all those forced.
    """
    ends = session.model.config.eos_token_ids
    steps: list[Step] = []
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        feed = list(prompt_ids)
        for i in range(max_tokens if forced is None else len(forced)):
            logits = session.forward(feed, "last")
            assert logits is not None
            steps.append(_step(logits, None if forced is None else forced[i]))
            if progress is not None:
                progress(len(steps))
            if forced is None and steps[-1].taken in ends:
                break
            feed = [steps[-1].taken]
    return steps


def _new(make_session: MakeSession) -> Session:
    """A session that has read nothing; UsageError for another."""
    session = make_session()
    if session.position:
        raise UsageError(f"each session must be a new one, found one that has read {session.position} tokens")
    return session


def _check_fit(session: Session, prompts: Sequence[Sequence[int]], more: Sequence[int]) -> None:
    """PromptError for a prompt that a new session cannot read with so many tokens behind it, UsageError for no memory."""
    for i, (ids, n) in enumerate(zip(prompts, more, strict=True)):
        try:
            session.check_fits(np.asarray(ids))
        except PromptError as error:
            raise PromptError(f"prompt {i}: {error}") from None
        if len(ids) + n - 1 > session.context:  # the last token is not read
            raise PromptError(
                f"prompt {i}: {len(ids)} tokens and {n} behind them do not fit into the context of {session.context}"
            )
    most = max(len(ids) + n - 1 for ids, n in zip(prompts, more, strict=True))
    memory.check_fits(session.model.config, session.policy, most, context=session.context)


def _step(logits: np.ndarray[Any, np.dtype[np.float32]], forced: int | None) -> Step:
    """What one row of logits (V,) says; of equal ones the lowest id counts, as in greedy decoding."""
    logprobs = log_softmax(logits[None], "model")[0]
    top = min(TOP, len(logits))
    least = np.partition(logits, len(logits) - top)[len(logits) - top]
    candidates = np.flatnonzero(logits >= least)
    order = candidates[np.argsort(-logits[candidates], kind="stable")][:top]
    alternatives = [(int(token), float(logprobs[token])) for token in order if np.isfinite(logprobs[token])]
    token = alternatives[0][0]
    taken = token if forced is None else forced
    return Step(token, taken, float(logprobs[taken]), float(logits[token]) - float(logits[taken]), alternatives)


def _part(progress: Progress | None, done: int, total: int, each: int) -> Callable[[int], None] | None:
    """The progress of one part of the work: ``done`` and ``total`` are counted in parts of ``each``."""
    return None if progress is None else lambda n: progress(done * each + n, total * each)


def _tokenized(model: Model, prompt: Recorded, chat: bool) -> list[int] | None:
    """The ids that a text has now, none where the model cannot make any; None where ids were given."""
    if prompt.text is None:
        return None
    able = model.has_chat_template if chat else model.tokenizer is not None
    return ids_of(model, prompt.text, chat=chat) if able else []
