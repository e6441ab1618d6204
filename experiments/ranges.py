"""Lists of numbers and words as options give them, with llama-bench's ranges."""

import re
from collections.abc import Iterator, Sequence

from ..models.check import shown
from ..models.errors import UsageError

MAX_VALUES = 1_000  # numbers of one option
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:([+*])([0-9]{1,9}))?|:([0-9]{1,9}):([0-9]{1,9}))?")


def split_words(option: str, texts: Sequence[str]) -> list[str]:
    """The words of an option given once or several times, separated by commas; UsageError for an empty one."""
    words = [word.strip() for text in texts for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} must be words separated by commas, none empty, found {shown(','.join(texts))}")
    return words


def parse_numbers(option: str, texts: Sequence[str], low: int, high: int) -> list[int]:
    """Whole numbers from ``low`` to ``high``: "512,1024", "1-4", "0-4096+1024" or "0:4096:1024" (step), "1-64*2" (factor).

    Args:
        option: its name, for messages.
        texts: one or several lists, put one behind the other.
        low, high: the range of every number.

    Raises:
        UsageError: what is no number or range, numbers out of the range, more than 1,000 of them, and ranges that are
            empty or do not grow.

    """
    found: list[int] = []
    for word in split_words(option, texts):
        for value in _values(option, word):
            if not low <= value <= high:
                raise UsageError(f"{option} must be from {low} to {high}, found {value}")
            if len(found) == MAX_VALUES:
                raise UsageError(f"{option} takes at most {MAX_VALUES} numbers, found more")
            found.append(value)
    return found


def parse_pairs(option: str, texts: Sequence[str], low: int, high: int) -> list[tuple[int, int]]:
    """Pairs of whole numbers from ``low`` to ``high``, each given as "512,128"; UsageError for anything else."""
    pairs = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            raise UsageError(f"{option} must be two numbers like 512,128, found {shown(text)}")
        first, second = (parse_numbers(option, [part], low, high)[0] for part in parts)
        pairs.append((first, second))
    return pairs


def _values(option: str, word: str) -> Iterator[int]:
    """The numbers of one word, which is a number or a range."""
    match = _RANGE.fullmatch(word)
    if match is None:
        raise UsageError(f"{option} must be numbers like 512,1024 or ranges like 0-4096+1024, found {shown(word)}")
    first, sign = int(match[1]), match[3] or "+"
    last = int(match[2] or match[5] or first)
    step = int(match[4] or match[6] or 1)
    if last < first:
        raise UsageError(f"{option}: the range {word} ends before it begins")
    if first < last and (step == 0 if sign == "+" else step < 2 or first == 0):
        raise UsageError(f"{option}: the range {word} does not grow")
    while first <= last:
        yield first
        if first == last:
            return
        first = first + step if sign == "+" else first * step
