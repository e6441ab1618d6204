"""Checks that every reader of model files shares: JSON without surprises, impostor files, tensors that fit."""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ModelError
from .limits import MAX_JSON_BYTES

_LISTED = 20  # names that one error message lists before it only counts the rest
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100

_IMPOSTORS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a Git-LFS pointer, the small text that stands for the real file: run 'git lfs pull' in its folder",
    ),
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "is an HTML or XML page, probably an error or sign-in page saved in place of the file: download it again",
    ),
    ((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04"), "is a PyTorch pickle or a ZIP archive under another name"),
    ((b"GGUF",), "is a GGUF file under another name"),
)


def shown(value: object) -> str:
    """``repr(value)``, shortened so that a hostile value cannot fill an error message; always one line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "an enormous number"


def listed(names: Iterable[str]) -> str:
    """``names`` joined by commas: the first 20, then how many more there are."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def refuse_impostor(head: bytes, where: str) -> None:
    """Raise ModelError when ``head``, the first bytes of a file (64 are enough), is a well-known wrong kind of file.

    For files that failed a first look: a safetensors header of 640 bytes begins like a pickle.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginnings, sentence in _IMPOSTORS:
        # A binary beginning counts only at byte 0, a page may be indented and in either case.
        if head.startswith(beginnings) or (beginnings[0].startswith(b"<") and start.startswith(beginnings)):
            raise ModelError(f"{where}: {sentence}")


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data`` (UTF-8); ``where`` names the file in errors.

    NaN and Infinity parse as floats, so that the caller can refuse them by the name of their key.

    Raises:
        ModelError: not UTF-8, not JSON, not an object, nested too deeply, or a key that appears twice in one object.

    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelError(f"{where}: the name {shown(twice)} appears twice in one JSON object")
        return mapping

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except ModelError:
        raise
    except RecursionError as error:
        raise ModelError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{where}: not valid JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: a JSON object was expected, found {shown(value)}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``, of at most MAX_JSON_BYTES bytes.

    Raises:
        ModelError: the file is missing, unreadable, too large, an impostor, or what parse_json_object refuses.

    """
    try:
        if not path.is_file():  # also keeps pipes and devices, which never end, from being opened
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: larger than the {MAX_JSON_BYTES} bytes allowed for a JSON file")
    refuse_impostor(data[:64], str(path))
    return parse_json_object(data, str(path))


def whole(field: str, value: object, smallest: int, largest: int) -> int:
    """``value``, which must be a whole number in a range; ModelError names the field, what was found and the range."""
    if type(value) is not int or not smallest <= value <= largest:  # bool is a subclass of int, hence type()
        raise ModelError(f"{field} is {shown(value)}; it must be a whole number from {smallest} to {largest}")
    return value


def positive_float(field: str, value: object, largest: float = _LARGEST) -> float:
    """``value`` as a float from 1 / ``largest`` to ``largest``, unless said what float32 can hold; ModelError names it."""
    smallest = max(1 / largest, _SMALLEST)
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not smallest <= number <= largest:
        raise ModelError(
            f"{field} is {shown(value)}; it must be a finite number above 0, from {smallest:.3g} to {largest:.3g}"
        )
    return number


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors that a configuration asks for with those of a file; both map names to shapes.

    Tensors that are found but not expected are no error: old files carry rotary tables and the like.

    Raises:
        ModelError: once, with every missing tensor and every tensor of another shape (20 of each, then a count).

    """
    missing = [name for name in expected if name not in found]
    unlike = [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors missing: {listed(missing)}")
    if unlike:
        problems.append(f"{len(unlike)} with a shape unlike the configuration: {listed(unlike)}")
    if problems:
        raise ModelError(f"{where}: {'; '.join(problems)}")


def check_finite(name: str, array: npt.NDArray[np.floating[Any]], where: str) -> None:
    """Raise ModelError naming the tensor, the counts and the first position if ``array`` (any shape) has NaN or Inf."""
    finite = np.isfinite(array)
    if finite.all():
        return
    nans = int(np.isnan(array).sum())
    infs = int(finite.size - finite.sum()) - nans
    first = [int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape)]
    raise ModelError(f"{where}: tensor {name} holds {nans} NaN and {infs} infinite values, the first at {first}")
