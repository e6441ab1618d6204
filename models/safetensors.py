"""Weights in the safetensors format: one file, or a folder as Hugging Face lays it out, read one tensor at a time.

The library checks headers (https://huggingface.co/docs/safetensors) and reads tensors. Here is what it leaves to its
caller: which files may be opened, wrong kinds of file said in words, names that appear twice, and float32.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that the library asks it for
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from .check import listed, parse_json_object, read_json_object, refuse_impostor, shown
from .errors import ModelError
from .folder import PICKLES, inside
from .limits import MAX_SAFETENSORS_DIMS, MAX_SAFETENSORS_HEADER_BYTES, MAX_SAFETENSORS_ITEMS

_READABLE = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsSource:
    """Tensors of one or more mapped files; names and shapes are those of the files. Made by open_safetensors.

    ``stored_types`` maps each name to its type in the format's spelling ("BF16"); ``nbytes`` is the sum of all
    tensors in bytes, as stored. The files stay mapped until the object is collected.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored_types: Mapping[str, str]
    nbytes: int
    where: str
    _opened: Mapping[str, Any]  # tensor -> the safe_open of its file

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor ``name`` as a new C-ordered float32 array of its shape. Threads may read at the same time.

        Raises:
            ModelError: no such tensor, a stored type other than F32, F16, BF16, F64, an F64 value beyond float32, or
                a file that can no longer be read.

        """
        return self._read(name, widened=True)

    def stored(self, name: str) -> npt.NDArray[Any]:
        """Like ``read``, but float16 and bfloat16 stay what they are."""
        return self._read(name, widened=False)

    def part(self, name: str, place: int) -> npt.NDArray[np.float32]:
        """One item along the first axis of tensor ``name``, as ``read`` gives the whole."""
        return self._read(name, widened=True, place=place)

    def packed(self, name: str, place: int) -> npt.NDArray[np.uint8]:
        """One item along the first axis of tensor ``name``, whose type is U8, as it is stored."""
        return self._read(name, widened=False, place=place, readable=("U8",))

    def forget(self, name: str) -> None:
        """Nothing to do: what was read is a copy."""

    def _read(
        self, name: str, *, widened: bool, place: int | None = None, readable: tuple[str, ...] = _READABLE
    ) -> npt.NDArray[Any]:
        if name not in self.shapes:
            raise ModelError(f"{self.where}: no tensor named {shown(name)}")
        kind = self.stored_types[name]
        if kind not in readable:
            raise ModelError(f"{self.where}: tensor {shown(name)} is {kind}; supported: {', '.join(readable)}")
        try:
            opened = self._opened[name]  # both are a copy of the file's bytes already
            values = opened.get_tensor(name) if place is None else opened.get_slice(name)[place]
            if not widened and kind in ("F16", "BF16", "U8"):
                return values
            with np.errstate(over="raise"):
                return values.astype(np.float32, copy=False)
        except FloatingPointError as error:
            raise ModelError(f"{self.where}: tensor {shown(name)} holds F64 values beyond float32") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.where}: tensor {shown(name)} cannot be read: {shown(str(error))}") from error


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Check and map the weights of ``folder``: model.safetensors, or the shards of model.safetensors.index.json.

    ``folder`` may also be one ``.safetensors`` file, which is then opened wherever its name leads. Every header is
    checked in full before this returns; no tensor is read.

    Raises:
        ModelError: weights missing (all named at once), damaged, outside the folder, or in a format that is refused.

    """
    try:
        return _open(folder)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error})") from error


def _open(folder: Path) -> SafetensorsSource:
    if not folder.is_dir():
        _refuse_pickle([folder.name], str(folder))
        return _source([folder], {}, str(folder))
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return _source([inside(folder, single.name)], {}, str(folder))
    if os.path.lexists(index):
        weight_map = _weight_map(inside(folder, index.name))
        shards = [inside(folder, name) for name in sorted(set(weight_map.values()))]
        return _source(shards, weight_map, str(folder))
    names = sorted(entry.name for entry in folder.iterdir())
    _refuse_pickle(names, str(folder))
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; it has {listed(map(shown, others))}: name one file, or add the index" if others else ""
    raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json found{hint}")


def _refuse_pickle(names: list[str], where: str) -> None:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{where}: only pickled weights ({listed(map(shown, pickles))}); opening a pickle can run any code it "
            "holds, so mixkv never does: convert the model to safetensors"
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is {shown(weight_map)}; it must map tensor names to file names")
    for name in weight_map.values():
        # One plain name: a separator, a drive or a stream (":") could lead elsewhere on some system.
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: weight_map names {shown(name)}; only .safetensors files of this folder are allowed"
            )
    return weight_map


def _source(files: list[Path], weight_map: Mapping[str, str], where: str) -> SafetensorsSource:
    """Open ``files`` and join their tensors; what ``weight_map`` promises (tensor -> file name) has to be there."""
    home: dict[str, str] = {}
    opened: dict[str, Any] = {}
    nbytes = 0
    missing = [file.name for file in files if not file.is_file()]
    for file in filter(Path.is_file, files):
        handle, size = _open_file(file)
        nbytes += size
        for name in handle.keys():  # noqa: SIM118  a method of the library, not a mapping
            if name in home:
                raise ModelError(f"{where}: tensor {shown(name)} is in both {home[name]} and {file.name}")
            home[name], opened[name] = file.name, handle
    absent = [
        f"{shown(tensor)} (of {shown(name)})"
        for tensor, name in weight_map.items()
        if name not in missing and home.get(tensor) != name
    ]
    problems = [f"{len(missing)} files missing: {listed(map(shown, missing))}"] if missing else []
    problems += [f"{len(absent)} tensors absent from the file the index names: {listed(absent)}"] if absent else []
    if problems:
        raise ModelError(f"{where}: {'; '.join(problems)}")
    views = {name: handle.get_slice(name) for name, handle in opened.items()}
    shapes = {name: _shape(view.get_shape(), name, f"{where}: {home[name]}") for name, view in views.items()}
    kinds = {name: view.get_dtype() for name, view in views.items()}
    return SafetensorsSource(MappingProxyType(shapes), MappingProxyType(kinds), nbytes, where, opened)


def _open_file(file: Path) -> tuple[Any, int]:
    """The library's handle of ``file``, and how many bytes its tensors take."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(64)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{":
            refuse_impostor(head, str(file))
        if length > MAX_SAFETENSORS_HEADER_BYTES:
            limit = MAX_SAFETENSORS_HEADER_BYTES
            raise ModelError(f"{file}: not safetensors, or a header of {length} bytes; at most {limit} are allowed")
        stream.seek(8)
        header = stream.read(length)
    if 8 + length <= size:  # otherwise truncated, as the library says
        parse_json_object(header, f"{file}: header")  # refuses names that appear twice; the library keeps the last
    try:
        handle = safe_open(file, framework="numpy")  # type: ignore[no-untyped-call, unused-ignore]
    except SafetensorError as error:
        reason = shown(str(error).removeprefix("Error while deserializing header: "))
        raise ModelError(f"{file}: damaged, or truncated at {size} bytes: {reason}") from error
    return handle, size - 8 - length  # the library has made sure that the tensors fill the rest


def _shape(shape: list[int], name: str, where: str) -> tuple[int, ...]:
    """The shape of tensor ``name``, refused where NumPy could not hold it: empty tensors may claim anything."""
    dims, items = MAX_SAFETENSORS_DIMS, MAX_SAFETENSORS_ITEMS
    if len(shape) > dims or math.prod(max(n, 1) for n in shape) > items:
        found = f"shape of tensor {shown(name)} is {shown(shape)}"
        raise ModelError(f"{where}: {found}; at most {dims} dimensions, of product {items}, allowed")
    return tuple(shape)
