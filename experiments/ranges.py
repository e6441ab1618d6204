"""Lists of numbers and words as options give them, with llama-bench's ranges, and those of slices, their ends included."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_VALUES

_COLONS = re.compile(r"([0-9]{1,9}):([0-9]{1,9})(?::([0-9]{1,9}))?")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:([+*])([0-9]{1,9}))?)?")
_FRACTION = re.compile(r"[0-9](?:\.[0-9]{1,9})?|\.[0-9]{1,9}")


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


def parse_fractions(option: str, texts: Sequence[str]) -> list[float]:
    """Numbers from 0 to 1, written "0,0.5,1", or "0:1:0.25", from the first to the second in steps of the third.

    Steps are added in decimal: 0:1:0.1 has 0.3 in it, and ends with 1.

    Args:
        option: its name, for messages.
        texts: one or several lists, put one behind the other.

    Raises:
        UsageError: what is no number or range, numbers beyond 0 to 1, more than 1,000 of them, and ranges that are empty
            or do not grow.

    """
    found: list[float] = []
    for word in split_words(option, texts):
        parts = word.split(":")
        if len(parts) not in (1, 3) or not all(map(_FRACTION.fullmatch, parts)):
            raise UsageError(f"{option} must be numbers like 0,0.5,1 or ranges like 0:1:0.25, found {shown(word)}")
        first, last, step = (Decimal(parts[i]) for i in ((0, 1, 2) if len(parts) == 3 else (0, 0, 0)))
        if first > 1 or last > 1:
            raise UsageError(f"{option} must be from 0 to 1, found {word}")
        if last < first or (step == 0 and len(parts) == 3):
            raise UsageError(f"{option}: the range {word} {'ends before it begins' if step else 'does not grow'}")
        count = int((last - first) / step) + 1 if step else 1
        if len(found) + count > MAX_VALUES:
            raise UsageError(f"{option} takes at most {MAX_VALUES} numbers, found more")
        found += [float(first + i * step) for i in range(count)]
    return found


def _values(option: str, word: str) -> Iterator[int]:
    """The numbers of one word, which is a number or a range."""
    colons = _COLONS.fullmatch(word)
    match = _RANGE.fullmatch(word if colons is None else f"{colons[1]}-{colons[2]}+{colons[3] or 1}")
    if match is None:
        raise UsageError(f"{option} must be numbers like 512,1024 or ranges like 0-4096+1024, found {shown(word)}")
    first, sign = int(match[1]), match[3] or "+"
    last = first if match[2] is None else int(match[2])
    step = 1 if match[4] is None else int(match[4])
    if last < first:
        raise UsageError(f"{option}: the range {word} ends before it begins")
    if first < last and (step == 0 if sign == "+" else step < 2 or first == 0):
        raise UsageError(f"{option}: the range {word} does not grow")
    while first <= last:
        yield first
        if first == last:
            return
        first = first + step if sign == "+" else first * step
