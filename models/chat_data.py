"""What a chat template gets into its hands: plain text, numbers, lists and dicts, copied from what the caller gave."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import PromptError
from .limits import MAX_CHAT_DEPTH, MAX_CHAT_INTEGER

Message = Mapping[str, Any]


def plain(value: Any, where: str, *, mapping: bool = False) -> tuple[Any, int]:
    """A copy of a value in Python's own types, and how many characters it has.

    Text counts as its characters, everything else as one. ``where`` names the value in errors. Raises PromptError for
    what is not text, a finite number, a boolean, None, a list or a mapping by text of these, or is nested deeper than
    MAX_CHAT_DEPTH; with ``mapping``, also for what is no mapping.
    """
    if mapping and not isinstance(value, Mapping):
        raise PromptError(f"{where}: must be a mapping, found {type(value).__name__}")
    return _copied(value, where, 0)


def _copied(value: Any, where: str, depth: int) -> tuple[Any, int]:
    if isinstance(value, str):
        return str(value), len(value)
    if value is None or isinstance(value, bool):
        return value, 1
    if isinstance(value, int) and abs(value) <= MAX_CHAT_INTEGER:
        return int(value), 1
    if isinstance(value, float) and math.isfinite(value):
        return float(value), 1
    if not isinstance(value, Mapping | Sequence) or isinstance(value, bytes | bytearray | memoryview):
        found = "a number that is too large" if isinstance(value, int) else type(value).__name__
        found = f"{float(value)}" if isinstance(value, float) else found
        raise PromptError(f"{where}: must be text, a number, a list or a mapping of these, found {found}")
    if depth == MAX_CHAT_DEPTH:
        raise PromptError(f"{where}: nested deeper than {MAX_CHAT_DEPTH} lists and mappings")
    size = 1
    if isinstance(value, Mapping):
        fields: dict[str, Any] = {}
        for name, each in value.items():
            if not isinstance(name, str):
                raise PromptError(f"{where}: the name of a field must be text, found {type(name).__name__}")
            place = f"{where}: {name[:40]!r}" if depth == 0 else where
            fields[str(name)], characters = _copied(each, place, depth + 1)
            size += len(name) + characters
        return fields, size
    items = []
    for each in value:
        item, characters = _copied(each, where, depth + 1)
        items.append(item)
        size += characters
    return items, size
