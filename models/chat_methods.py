"""The methods and functions that a chat template may call, each with what it costs.

A list of what is allowed, not of what is forbidden: what is missing here does not exist for a template.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from .chat_budget import ITEM, Budget, refused
from .limits import MAX_TEMPLATE_STEPS

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits
_DATE = re.compile(r"(?:[^%]|%-?[a-zA-Z%])*")
Cost = Callable[..., Any]


# Methods: cost(budget, the object itself, *arguments)


def whole_text(budget: Budget, text: str, *arguments: object) -> None:
    """The text is read once and perhaps copied."""
    budget.charge(2 * len(text))
    budget.weigh(arguments)


def _find(budget: Budget, text: str, wanted: object = None, *rest: object) -> None:
    whole_text(budget, text, wanted, *rest)
    budget.search(text, wanted)


def _rfind(budget: Budget, text: str, wanted: object = None, *rest: object) -> None:
    whole_text(budget, text, wanted, *rest)
    budget.search(text, wanted, backwards=True)


def _split(budget: Budget, text: str, separator: object = None, *rest: object) -> None:
    _rfind(budget, text, separator, *rest)
    budget.charge(ITEM * (text.count(separator) if isinstance(separator, str) and separator else len(text) // 2 + 1))


def _splitlines(budget: Budget, text: str, *rest: object) -> None:
    whole_text(budget, text, *rest)
    budget.charge(ITEM * sum(map(text.count, LINE_ENDS)))


def replaced_text(budget: Budget, text: str, old: object = None, new: object = None, count: object = -1) -> None:
    """The text with some parts replaced is made."""
    _find(budget, text, old, new)
    if isinstance(old, str) and isinstance(new, str):
        found = text.count(old)
        if isinstance(count, int) and count >= 0:
            found = min(found, count)
        budget.charge(found * max(len(new) - len(old), 0))


def _join(budget: Budget, text: str, items: Iterable[object] = (), *rest: object) -> None:
    if not isinstance(items, str | list | tuple):
        raise refused("the method 'join' takes a list")
    budget.weigh(items)
    budget.charge(len(text) * len(items))


def _seek(budget: Budget, items: object, wanted: object = None, *rest: object) -> None:
    budget.compare("in", wanted, items)


def _get(budget: Budget, mapping: object, key: object = None, *rest: object) -> None:
    budget.weigh_containers(key)


def _entries(budget: Budget, mapping: Mapping[Any, Any]) -> None:
    budget.charge(2 * ITEM * len(mapping))


_WHOLE = (
    "capitalize casefold endswith isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle isupper "
    "lower lstrip removeprefix removesuffix rstrip startswith strip swapcase title upper"
)
METHODS: Mapping[type, Mapping[str, Cost]] = {
    str: dict.fromkeys(_WHOLE.split(), whole_text)
    | dict.fromkeys(("count", "find", "index", "partition"), _find)
    | dict.fromkeys(("rfind", "rindex", "rpartition"), _rfind)
    | {"join": _join, "replace": replaced_text, "rsplit": _split, "split": _split, "splitlines": _splitlines},
    list: {"count": _seek, "index": _seek},
    tuple: {"count": _seek, "index": _seek},
    dict: {"get": _get, "items": _entries, "keys": _entries, "values": _entries},
}


# Functions


def raise_exception(message: object) -> None:
    """How a template says that a conversation does not suit it."""
    raise TemplateError(str(message) if isinstance(message, str | int | float) else "raise_exception was called")


def strftime_now(pattern: str) -> str:
    """The local time; only single-letter directives, since the C library also knows widths."""
    if len(pattern) > 256 or not _DATE.fullmatch(pattern):
        raise refused("strftime_now takes a short pattern of single-letter directives like %d")
    return datetime.now().strftime(pattern)


def bounded_range(*limits: int) -> range:
    """``range`` of at most MAX_TEMPLATE_STEPS numbers."""
    numbers = range(*limits)
    try:
        length = len(numbers)
    except OverflowError:
        length = MAX_TEMPLATE_STEPS + 1
    if length > MAX_TEMPLATE_STEPS:
        raise refused(f"a range of more than {MAX_TEMPLATE_STEPS} numbers")
    return numbers
