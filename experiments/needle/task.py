"""What ``needle`` asks: pass keys hidden in a text, in a prompt of exactly so many tokens, and what is right to answer.

Every piece of a prompt - what stands above, the text, the sentences, the question - is turned into tokens for itself, and
the tokens are put one behind the other, so that a length is met exactly whatever the tokenizer.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...models.check import shown
from ...models.errors import PromptError, UsageError
from ...models.load import Model

Ids = NDArray[np.int64]

TASKS = ("passkey", "multikey")
PLACES = (
    "vault", "garden", "harbor", "library", "kitchen", "museum", "tower", "stable", "mill", "chapel", "bakery", "theater",
    "school", "hospital", "station", "market", "castle", "cellar", "attic", "workshop",
)  # fmt: skip
NUMBERS = range(10_000, 100_000)
INTRODUCTIONS = {
    "passkey": f"The pass key of the {PLACES[0]} is hidden in this text. Remember it.\n\n",
    "multikey": "Some pass keys are hidden in this text. Remember them.\n\n",
}
FILLER = 32  # tokens of text for each key, at the least
FARTHEST = 256  # tokens from where a key is to stand to the end of a line or sentence, at the most
BEYOND = 4  # tokens that may be generated beyond those of the right answer
NOWHERE, LINE, LINE_END, SENTENCE = range(-1, 3)  # gaps: none; where a line begins; at its end; behind a sentence
_MARK = "MIXKV-PUTS-THE-TEXT-HERE"


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and the seed of everything that is drawn by lot.

    Attributes:
        name: "passkey", one key and a question for it, or "multikey", several of which one is asked for.
        keys: in a prompt; 1 for passkey, 2 to 20 for multikey.
        seed: 0 or more.
        chat: by the model's chat template; else as a plain text.

    Raises:
        UsageError: a value out of its range.

    """

    name: str = "passkey"
    keys: int = 1
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise UsageError(f"task must be one of {', '.join(TASKS)}, found {shown(self.name)}")
        low, high = (1, 1) if self.name == "passkey" else (2, len(PLACES))
        if type(self.keys) is not int or not low <= self.keys <= high:
            raise UsageError(f"keys of task {self.name} must be from {low} to {high}, found {shown(self.keys)}")
        if type(self.seed) is not int or self.seed < 0:
            raise UsageError(f"seed must be a whole number, 0 or more, found {shown(self.seed)}")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One question.

    Attributes:
        token_ids: (length,) up to where the answer begins.
        position: of the first token of the sentence with the key that is asked for.
        expected: the digits.
        answer_ids: the tokens of the right answer, a space and the digits.

    """

    token_ids: Ids
    position: int
    expected: str
    answer_ids: tuple[int, ...]

    def is_right(self, answer: str) -> bool:
        """Whether an answer begins, behind spaces, with the digits, and with no further ones: that is another number."""
        text = answer.lstrip()
        return text.startswith(self.expected) and not text[len(self.expected) :][:1].isdigit()


class _Fact(NamedTuple):
    """A sentence with a key, and the depth at which it is to stand."""

    depth: float
    forms: tuple[list[int], ...]  # its tokens in each kind of gap


class Prompts:
    """Makes the prompts of a task.

    A prompt is an introduction, a piece of the text that begins at a line drawn by lot, with the keys' sentences in it,
    the question, and the beginning of its answer. What is drawn depends on the task, length, depth and trial alone: a run
    of more depths or trials has those of a smaller one in it.

    Args:
        model: whose tokens they are made of.
        text: what the keys are hidden in.
        task: what is asked.

    Raises:
        UsageError: a model without tokenizer, or without a chat template where the task is to use it.
        PromptError: a text that cannot be tokenized, or a chat template with no place for it.

    """

    def __init__(self, model: Model, text: str, task: Task) -> None:
        self.model, self.task = model, task
        before, self._after = _frame(model) if task.chat else ("", "")
        self._head = model.encode(before + INTRODUCTIONS[task.name])
        self._text: Ids = np.array(model.encode(text)[len(model.encode("")) :], np.int64)  # without a beginning of text
        self._gaps = _gaps(model, self._text)

    def make(self, length: int, depth: float, trial: int) -> Prompt:
        """A prompt.

        Args:
            length: tokens of the prompt.
            depth: where in the text the key that is asked for stands, from 0, its beginning, to 1, its end; it comes to the
                nearest end of a line or sentence. Other keys are spread evenly.
            trial: 0 or more; each has another text and other keys.

        Raises:
            UsageError: a length that the task does not fit into, or that does not fit into the context.
            PromptError: a text that is too short, or in which no line or sentence ends near the depth.

        """
        task = self.task
        chance = random.Random(f"{task.name} {task.keys} {task.seed} {length} {depth!r} {trial}")
        places = [PLACES[0]] if task.name == "passkey" else chance.sample(PLACES, task.keys)
        numbers = [str(number) for number in chance.sample(NUMBERS, task.keys)]
        others = [(i + 0.5) / (task.keys - 1) for i in range(task.keys - 1)]
        facts = [self._fact(*each) for each in zip([depth, *others], places, numbers, strict=True)]
        claim = f"The pass key of the {places[0]} is"
        space = "" if self._after[-1:].isspace() else " "
        tail = self._behind("x", f"\n\nWhat is the pass key of the {places[0]}?{self._after}{space}{claim}")
        answer = self._behind("is", f" {numbers[0]}")
        size = length - len(self._head) - len(tail)
        self._check_length(length, length - size + _longest(facts), len(answer))
        most = self._check_text(length, size - sum(min(map(len, fact.forms)) for fact in facts))
        start = chance.choice(np.flatnonzero(self._gaps[: len(self._text) - most + 1] == LINE).tolist())
        middle, position = self._hide(facts, start, size)
        ids = np.concatenate([self._head, middle, tail]).astype(np.int64)
        return Prompt(ids, len(self._head) + position, numbers[0], tuple(answer))

    def _behind(self, before: str, text: str) -> list[int]:
        """The tokens of a text that stands behind another; PromptError where the tokenizer makes one of the two."""
        head, whole = self.model.encode(before), self.model.encode(before + text)
        if whole[: len(head)] != head:
            raise PromptError(f"the model's tokenizer does not part {shown(before)} from {shown(text)} behind it")
        return whole[len(head) :]

    def _fact(self, depth: float, place: str, number: str) -> _Fact:
        sentence = f"The pass key of the {place} is {number}. Remember it."
        forms = ("x\n", f"{sentence}\n"), ("x", f"\n{sentence}"), ("x.", f" {sentence}")
        return _Fact(depth, tuple(self._behind(*form) for form in forms))

    def _check_length(self, length: int, fixed: int, answer: int) -> None:
        task, context = self.task, self.model.config.max_position_embeddings
        least, most = fixed + FILLER * task.keys, context - answer - BEYOND
        if not least <= length <= most:
            raise UsageError(
                f"length must be from {least} to {most} tokens for task {task.name} ({fixed} that are not text, "
                f"and {FILLER} of text for each key, at the least; a context of {context}, with room for the answer), "
                f"found {length}"
            )

    def _check_text(self, length: int, most: int) -> int:
        """The tokens of text that are needed at most, if there are so many."""
        if most > len(self._text):
            raise PromptError(
                f"a prompt of {length} tokens needs up to {most} tokens of text, found {len(self._text)}: "
                "give a longer text"
            )
        return most

    def _hide(self, facts: list[_Fact], start: int, size: int) -> tuple[Ids, int]:
        """``size`` tokens, of the text from ``start`` on and of sentences in it; and where in them the first fact's begins.

        A depth is a part of what is left to the text if all sentences take the longest of their forms.
        """
        least = size - _longest(facts)
        spots = [(self._nearest(start, least, fact.depth), fact.depth, i) for i, fact in enumerate(facts)]
        parts, position, done = list[Ids | list[int]](), 0, start
        for at, _, i in sorted(spots):
            parts.append(self._text[done:at])
            if i == 0:
                position = sum(map(len, parts))
            parts.append(facts[i].forms[self._gaps[at]])
            done = at
        rest = size - sum(map(len, parts))
        return np.concatenate([*parts, self._text[done : done + rest]]), position

    def _nearest(self, start: int, size: int, depth: float) -> int:
        """The end of a line or sentence that is nearest to a depth of so many tokens of text; each begins at ``start``."""
        ends, wanted = np.flatnonzero(self._gaps[start : start + size + 1] != NOWHERE), depth * size
        distances = np.abs(ends - wanted)
        if distances.min() > FARTHEST:
            raise PromptError(
                f"no line or sentence of the text ends within {FARTHEST} tokens of depth {depth:g}, {wanted:.0f} tokens "
                f"behind its token {start}: there is no place for a key"
            )
        return start + int(ends[distances.argmin()])


def _longest(facts: list[_Fact]) -> int:
    """Tokens of all sentences in their longest forms."""
    return sum(max(map(len, fact.forms)) for fact in facts)


def _frame(model: Model) -> tuple[str, str]:
    """What the chat template puts before and behind what a user says."""
    before, found, after = model.chat_text([{"role": "user", "content": _MARK}]).partition(_MARK)
    if not found or _MARK in after:
        raise PromptError("the chat template does not say once what the user says: there is no place for the text")
    return before, after


def _gaps(model: Model, ids: Ids) -> NDArray[np.int8]:
    """What kind of gap there is for a key before each of n tokens, and at the end, (n + 1,).

    A tokenizer may make one token of a line's end and the spaces that the next line begins with: then there is a gap
    before it.
    """
    assert model.tokenizer is not None
    stream = model.tokenizer.stream()
    pieces = ["\n", *map(stream.push, ids.tolist()), ""]
    kinds = []
    for before, behind in zip(pieces, pieces[1:], strict=False):
        if before.endswith("\n"):
            kinds.append(LINE)
        elif behind.startswith("\n") and not behind.endswith("\n"):
            kinds.append(LINE_END)
        elif before.endswith((".", "!", "?")) and behind[:1].isspace():
            kinds.append(SENTENCE)
        else:
            kinds.append(NOWHERE)
    return np.array(kinds, np.int8)
