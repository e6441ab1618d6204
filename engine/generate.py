"""The loop: prefill, decode, sample."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..models.errors import UsageError
from ..models.limits import MAX_STOPS, MAX_TOKENS
from .sampler import Sampler, SamplingParams
from .session import Session

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. ``text`` is what can be shown after it: whole characters, possibly none, possibly several."""

    id: int
    text: str
    finish_reason: FinishReason | None = None


def check_options(max_tokens: int, stop: Sequence[str]) -> None:
    """UsageError for a number of tokens or stop strings out of range."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 1 <= max_tokens <= MAX_TOKENS:
        raise UsageError(f"max_tokens must be a whole number from 1 to {MAX_TOKENS}, found {max_tokens!r}")
    if not isinstance(stop, (list, tuple)) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise UsageError(f"stop must be at most {MAX_STOPS} strings, none empty, found {stop!r}")


def generate(
    session: Session,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int = 64,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Token]:
    """Read the prompt, then yield tokens one by one.

    The session ends behind the last token that was fed to the model: the prompt and all generated tokens but the last.
    An end-of-text token is yielded with an empty text. The last token carries the reason of the end: "stop" (end of
    text, or a stop string, which is not part of the text), "length" (``max_tokens``), "context" (the session is full).

    Args:
        session: continues where it stands.
        prompt_ids: at least one token.
        max_tokens: from 1 to 2^24.
        sampling: greedy unless given.
        stop: strings at which to end; none of them empty. They need a tokenizer.
        ignore_eos: go on behind an end-of-text token.
        progress: called with the number of prompt tokens read so far.

    Raises:
        UsageError: an option out of range, checked before the first token is read.
        PromptError: an empty prompt, or one that does not fit into the context.

    """
    check_options(max_tokens, stop)
    if stop and session.model.tokenizer is None:
        raise UsageError("stop strings need a tokenizer, and this model has none")
    params = SamplingParams() if sampling is None else sampling
    ids = [int(token) for token in session.check_fits(prompt_ids)]
    return _tokens(session, ids, max_tokens, Sampler(params), _Text(session, stop), ignore_eos, progress)


def _tokens(
    session: Session,
    prompt_ids: list[int],
    max_tokens: int,
    sampler: Sampler,
    text: "_Text",
    ignore_eos: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[Token]:
    ends = () if ignore_eos else session.model.config.eos_token_ids
    seen = {*session.token_ids.tolist(), *prompt_ids}
    logits = session.forward(prompt_ids, "last", progress=progress)
    for count in range(1, max_tokens + 1):
        assert logits is not None
        token = sampler(logits, seen)
        seen.add(token)
        if token in ends:
            yield Token(token, text.finish(), "stop")
            return
        shown = text.push(token)
        if text.stopped:
            yield Token(token, shown, "stop")
            return
        reason: FinishReason | None = None
        if count == max_tokens:
            reason = "length"
        elif session.position == session.context:
            reason = "context"
        if reason is not None:
            yield Token(token, shown + text.finish(), reason)
            return
        yield Token(token, shown)
        logits = session.forward([token], "last")


class _Text:
    """The text of the tokens so far: whole characters only, and held back while it may be the start of a stop string."""

    def __init__(self, session: Session, stops: Sequence[str]) -> None:
        tokenizer = session.model.tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        if self._stream is None:
            return ""
        return self._release(self._stream.push(token), final=False)

    def finish(self) -> str:
        """The rest."""
        if self._stream is None:
            return ""
        return self._release(self._stream.finish(), final=True)

    def _release(self, more: str, *, final: bool) -> str:
        text = self._held + more
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that is a beginning of ``stop``, in characters."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
