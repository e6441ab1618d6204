"""What one rendering of a chat template may cost, and what each operation of it does cost.

The jinja2 sandbox keeps a template away from Python's internals but bounds neither time nor memory. Here every
operation is charged before it runs, in units of about one nanosecond and at most four bytes: a character read or
made is one unit, an item of a list or an operation of any kind is ITEM. The sum over a rendering is limited.
"""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain
from typing import Any

from jinja2 import Undefined

from .errors import PromptError
from .limits import MAX_TEMPLATE_DEPTH, MAX_TEMPLATE_INT_BITS, MAX_TEMPLATE_STEPS, MAX_TEMPLATE_WORK

ITEM = 64  # what one simple thing costs, in characters: half a million of them take half a second
_SCALARS = (int, float, bool, type(None))
_SIMPLE_FORMAT = re.compile(r"%(?:(?:\.\d)?[sdifr]|%)")

COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda item, container: item in container,
    "notin": lambda item, container: item not in container,
}


def refused(problem: str) -> PromptError:
    """The error for a template: one line, of a bearable length."""
    line = " ".join(problem.split())
    return PromptError(f"chat template: {line if len(line) <= 300 else line[:300] + '...'}")


class Budget:
    """What is left of one rendering; every method charges, and raises PromptError when nothing is left.

    A template may go over the characters of the conversation some 64 times, and do about a thousand simple things
    for each message, besides what every conversation has.
    """

    __slots__ = ("_allowed", "_left", "_steps")

    def __init__(self, characters: int = 0, messages: int = 0) -> None:
        self._allowed = MAX_TEMPLATE_WORK + 64 * characters + 1024 * ITEM * messages
        self._left = self._allowed
        self._steps = 0

    def step(self, steps: int = 1) -> None:
        """One more loop iteration, or macro call, which is several steps."""
        self._steps += steps
        if self._steps > MAX_TEMPLATE_STEPS:
            raise refused(f"more than {MAX_TEMPLATE_STEPS} steps (loop iterations, and macro calls, four each)")

    def charge(self, units: int) -> None:
        """Something that costs this many units is about to happen."""
        self._left -= units
        if self._left < 0:
            raise refused(f"it handles more than the {self._allowed} characters allowed for this conversation")

    def weigh(self, value: object, per_character: int = 1, per_level: int = 0, *, closed: bool = False) -> None:
        """Charge for going over all of a value as deep as it reaches, every repetition counted.

        ``per_level`` is added once for each level that an item is nested (indentation). With ``closed``, anything
        that is not text, a number, a list or a dict is refused: its size as text is not known.
        """
        stack: list[Iterator[object]] = [iter((value,))]
        while stack:
            for each in stack[-1]:
                self.charge(ITEM + (len(stack) - 1) * per_level)
                inside: Iterator[object] | None = None
                if type(each) is str:
                    self.charge(len(each) * per_character)
                elif isinstance(each, list | tuple):
                    inside = iter(each)
                elif type(each) is dict:
                    inside = chain(each, each.values())
                elif type(each) is int:
                    _check_bits(each.bit_length())
                elif closed and not isinstance(each, (*_SCALARS, Undefined)):
                    raise refused(f"a {type(each).__name__} cannot be written as text")
                if inside is not None:
                    if len(stack) > MAX_TEMPLATE_DEPTH:
                        raise refused(f"a value is nested deeper than {MAX_TEMPLATE_DEPTH}")
                    stack.append(inside)
                    break
            else:
                stack.pop()

    def text(self, value: object) -> str:
        """``str(value)`` where that is safe."""
        if type(value) is str:
            self.charge(2 * ITEM + len(value))
            return value
        self.charge(ITEM)
        self.weigh(value, 4, closed=True)  # a character takes up to ten in a repr; the memory is charged below
        written = str(value)
        self.charge(len(written))
        return written

    def drained(self, value: Iterable[Any], cost: int = ITEM) -> list[Any]:
        """The items of anything that can be looped over, each charged ``cost``."""
        if isinstance(value, Sized):
            self.charge(cost * len(value))
            return list(value)
        items = []
        for item in value:
            self.charge(cost)
            items.append(item)
        return items

    def search(self, text: str, wanted: object, *, backwards: bool = False) -> None:
        """Charge for a search; Python's backward search may take the product of both lengths."""
        length = len(wanted) if isinstance(wanted, str) else 0
        self.charge(len(text) * (1 + (length if backwards else min(length, 128)) // 8))

    def compare(self, name: str, left: Any, right: Any) -> Any:
        """``left OP right`` where OP is one of COMPARISONS."""
        self.charge(ITEM)
        if name in ("in", "notin"):
            self._membership(left, right)
        elif type(left) is str and type(right) is str:
            if name not in ("eq", "ne") or len(left) == len(right):
                self.charge(min(len(left), len(right)))
        else:
            self.weigh_containers(left, right)
        return COMPARISONS[name](left, right)

    def weigh_containers(self, *values: object) -> None:
        """Weigh those that are lists or dicts: comparing or hashing them goes all the way down."""
        for value in values:
            if isinstance(value, list | tuple | dict):
                self.weigh(value)

    def _membership(self, item: object, container: object) -> None:
        self.weigh_containers(item)
        if type(container) is str:
            self.search(container, item)
        elif isinstance(container, list | tuple):
            self.charge(ITEM * len(container))
            if type(item) is str:
                equally_long = sum(type(each) is str and len(each) == len(item) for each in container)
                self.charge(len(item) * equally_long)
            elif not isinstance(item, _SCALARS):
                self.weigh(container)
        elif isinstance(container, range):
            self.charge(ITEM * len(container))
        elif not isinstance(container, dict | Undefined):
            raise refused(f"'in' does not work with a {type(container).__name__}")

    def arithmetic(self, symbol: str, left: Any, right: Any) -> None:
        """Charge for ``left SYMBOL right`` before it happens."""
        self.charge(ITEM)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(max(left.bit_length(), right.bit_length()))
            if symbol == "**" and right > 0:
                _check_bits(left.bit_length() * right)
        elif isinstance(left, str) and symbol == "%":
            self._format(left, right)
        elif symbol == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            self.charge(_units(left) + _units(right))
        elif symbol == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, _SEQUENCES) and isinstance(times, int):
                    self.charge(_units(sequence) * max(times, 0))

    def _format(self, pattern: str, values: object) -> None:
        if "%" in _SIMPLE_FORMAT.sub("", pattern):
            raise refused("in a '%' format only %s, %d, %i, %f, %r and %% are allowed, without a width")
        self.charge(2 * len(pattern) + 400 * pattern.count("%"))  # a float may have 309 digits before the point
        self.weigh(values, 10, closed=True)


_SEQUENCES = (str, list, tuple)


def _units(value: Any) -> int:
    return len(value) * (1 if isinstance(value, str) else ITEM)


def _check_bits(bits: int) -> None:
    if bits > MAX_TEMPLATE_INT_BITS:
        raise refused(f"an integer of {bits} bits, at most {MAX_TEMPLATE_INT_BITS} are allowed")
