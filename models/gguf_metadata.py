"""The metadata of a GGUF file: reading its values one after the other, within the limits.

The layout of the values is that of docs/gguf.md of the ggml project, little-endian.
"""

import mmap
from struct import Struct
from typing import Any, TypeVar, get_args, get_origin

from .check import shown
from .errors import ModelError
from .limits import MAX_GGUF_ARRAY_ITEMS, MAX_GGUF_METADATA_BYTES, MAX_GGUF_NAME_BYTES, MAX_GGUF_STRING_BYTES

MetaScalar = bool | int | float | str
MetaValue = MetaScalar | list[bool] | list[int] | list[float] | list[str]
Kind = TypeVar("Kind", bound=MetaValue)

_UINT32, _UINT64 = Struct("<I"), Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_WORDS: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


class Cursor:
    """A position (bytes) in what comes before the tensor data; every step is checked against the end and the limits.

    The methods raise ModelError, which names ``what`` was being read.
    """

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position
        self._end = min(len(data), MAX_GGUF_METADATA_BYTES)
        self._items_left = MAX_GGUF_ARRAY_ITEMS  # of all arrays together: a list takes more memory than its bytes here

    def uint32(self, what: str) -> int:
        """The next unsigned 32-bit integer."""
        return int(_UINT32.unpack_from(self._data, self._advance(_UINT32.size, what))[0])

    def uint64(self, what: str) -> int:
        """The next unsigned 64-bit integer."""
        return int(_UINT64.unpack_from(self._data, self._advance(_UINT64.size, what))[0])

    def name(self, what: str) -> str:
        """The next string, which must not be empty and has at most MAX_GGUF_NAME_BYTES bytes."""
        name = self._string(what, MAX_GGUF_NAME_BYTES)
        if not name:
            raise ModelError(f"{what} is empty")
        return name

    def value(self, what: str) -> MetaValue:
        """The next metadata value with the type in front of it; arrays become lists."""
        code = self.uint32(f"the type of {what}")
        if code in _NUMBERS:
            return self._numbers(code, 1, what)[0]
        if code == _STRING:
            return self._string(what, MAX_GGUF_STRING_BYTES)
        if code == _ARRAY:
            return self._array(what)
        raise ModelError(f"{what} has the unknown type {code}, expected 0 to 12")

    def _advance(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` bytes and return where they start."""
        start = self.position
        if nbytes > self._end - start:
            if self._end < len(self._data):
                raise ModelError(f"{what} lies beyond the first {self._end} bytes, the most that metadata may take")
            raise ModelError(f"{what} needs {nbytes} bytes, but the file ends after {self._end - start}")
        self.position = start + nbytes
        return start

    def _string(self, what: str, limit: int) -> str:
        length = self.uint64(f"the length of {what}")
        if length > limit:
            raise ModelError(f"{what} has {length} bytes, at most {limit} are allowed")
        start = self._advance(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise ModelError(f"{what} is not valid UTF-8") from None

    def _numbers(self, code: int, count: int, what: str) -> list[bool] | list[int] | list[float]:
        layout = Struct(f"<{count}{_NUMBERS[code]}")
        values = list(layout.unpack_from(self._data, self._advance(layout.size, what)))
        if code != _BOOL:
            return values
        if max(values, default=0) > 1:
            raise ModelError(f"{what} is a boolean stored as {max(values)}, expected 0 or 1")
        return [value == 1 for value in values]

    def _strings(self, count: int, what: str) -> list[str]:
        # The vocabulary comes through here: one slice and one decode an item, and no calls of our own.
        data, position, end, unpack = self._data, self.position, self._end, _UINT64.unpack_from
        items = []
        for _ in range(count):
            start = position + 8
            if start > end:
                break
            position = start + unpack(data, position)[0]
            if position > end:
                break
            items.append(data[start:position])
        if len(items) < count:
            raise ModelError(f"item {len(items)} of {what} runs past the end of the file or of what metadata may take")
        self.position = position
        try:
            return [item.decode() for item in items]
        except UnicodeDecodeError:
            raise ModelError(f"{what} has a string that is not valid UTF-8") from None

    def _array(self, what: str) -> MetaValue:
        code = self.uint32(f"the item type of {what}")
        count = self.uint64(f"the length of {what}")
        if code == _ARRAY:
            raise ModelError(f"{what} is an array of arrays, only arrays of strings, numbers or booleans are supported")
        if code != _STRING and code not in _NUMBERS:
            raise ModelError(f"{what} has items of the unknown type {code}, expected 0 to 12")
        smallest = _UINT64.size if code == _STRING else Struct("<" + _NUMBERS[code]).size
        left = self._end - self.position
        if count * smallest > left:
            raise ModelError(f"{what} claims {count} items of {smallest} or more bytes, but only {left} bytes are left")
        if count > self._items_left:
            raise ModelError(f"{what} has {count} items, all arrays together may have {MAX_GGUF_ARRAY_ITEMS}")
        self._items_left -= count
        return self._strings(count, what) if code == _STRING else self._numbers(code, count, what)


def of_kind(key: str, value: MetaValue, kind: type[Kind]) -> Kind:
    """``value`` if it is of ``kind`` (bool, int, float, str, or a list of one of them), else ModelError naming ``key``.

    An integer passes as a float. The items of an array are all of one type, so the first one tells.
    """
    if kind is float and type(value) is int:
        value = float(value)
    items = get_args(kind)
    fits = type(value) is (get_origin(kind) or kind)
    if fits and items and isinstance(value, list) and value:
        fits = type(value[0]) is items[0]
    if not fits:
        found = f"an array of {_WORDS[type(value[0])]}s" if isinstance(value, list) and value else shown(value)
        raise ModelError(f"metadata key {shown(key)} is {found}, expected {kind_name(kind)}")
    return value  # type: ignore[return-value]  # just checked


def kind_name(kind: type[Any]) -> str:
    """``kind`` in words: "an integer", "an array of strings"."""
    items = get_args(kind)
    return f"an array of {_WORDS[items[0]]}s" if items else f"a{'n' if kind is int else ''} {_WORDS[kind]}"
