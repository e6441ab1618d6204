"""Weights in the safetensors format: one file, or a folder as Hugging Face lays it out, read one tensor at a time.

The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data without holes).
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from .check import listed, parse_json_object, read_json_object, refuse_impostor, shown
from .errors import ModelError
from .limits import MAX_SAFETENSORS_DIMS, MAX_SAFETENSORS_HEADER_BYTES, MAX_SAFETENSORS_ITEMS

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}  # BF16 as its bits
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    _raw: Mapping[str, npt.NDArray[np.uint8]]

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor ``name`` as a new C-ordered float32 array of its shape.

        The bytes come straight from the map, not through the library: the header has been checked, so what is left
        is one view and one cast, while the library's NumPy route needs ml_dtypes for BF16 and then a second copy.

        Raises:
            ModelError: no such tensor, a stored type other than F32, F16, BF16, F64, or an F64 value beyond float32.

        """
        if name not in self.shapes:
            raise ModelError(f"{self.where}: no tensor named {shown(name)}")
        kind = self.stored_types[name]
        if kind not in _READABLE:
            raise ModelError(f"{self.where}: tensor {shown(name)} is {kind}; supported: {', '.join(_READABLE)}")
        values = self._raw[name].view(_READABLE[kind])
        if kind == "BF16":  # the upper half of a float32; as fast as ml_dtypes' cast, 13 times astype and shift
            return np.left_shift(values, np.uint32(16), dtype=np.uint32).view(np.float32).reshape(self.shapes[name])
        try:
            with np.errstate(over="raise"):
                return values.astype(np.float32).reshape(self.shapes[name])
        except FloatingPointError as error:
            raise ModelError(f"{self.where}: tensor {shown(name)} holds F64 values beyond float32") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of a header: where a tensor lies, in bytes from the start of the data."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
        return _source([_inside(folder, single.name)], {}, str(folder))
    if os.path.lexists(index):
        weight_map = _weight_map(_inside(folder, index.name))
        shards = [_inside(folder, name) for name in sorted(set(weight_map.values()))]
        return _source(shards, weight_map, str(folder))
    names = sorted(entry.name for entry in folder.iterdir())
    _refuse_pickle(names, str(folder))
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; it has {listed(map(shown, others))}: name one file, or add the index" if others else ""
    raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json found{hint}")


def _refuse_pickle(names: list[str], where: str) -> None:
    pickles = [name for name in names if name.endswith(_PICKLES)]
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


def _inside(folder: Path, name: str) -> Path:
    """``folder / name``, refused when links lead out of the folder or, for a hub snapshot, out of its model's cache."""
    try:
        home = folder.resolve()
        target = (home / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ModelError(f"{folder / name}: the link cannot be followed") from error
    # The hub's cache is models--owner--name/{snapshots/revision/file -> ../../blobs/hash}.
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            home = parent.parent
            break
    if not target.is_relative_to(home):
        raise ModelError(f"{folder / name}: a link to {target}, outside {home}; put the file itself there")
    return folder / name


def _source(files: list[Path], weight_map: Mapping[str, str], where: str) -> SafetensorsSource:
    """Open ``files`` and join their tensors; what ``weight_map`` promises (tensor -> file name) has to be there."""
    home: dict[str, str] = {}
    entries: list[_Entry] = []
    raw: dict[str, npt.NDArray[np.uint8]] = {}
    missing = [file.name for file in files if not file.is_file()]
    for file in files:
        if file.name in missing:
            continue
        mapped = _map(file)
        found, start = _read_header(mapped, str(file))
        for entry in found:
            if entry.name in home:
                raise ModelError(f"{where}: tensor {shown(entry.name)} is in both {home[entry.name]} and {file.name}")
            home[entry.name] = file.name
            raw[entry.name] = np.frombuffer(mapped, np.uint8, entry.end - entry.begin, start + entry.begin)
        entries += found
    absent = [
        f"{shown(tensor)} (of {shown(name)})"
        for tensor, name in weight_map.items()
        if name not in missing and home.get(tensor) != name
    ]
    problems = [f"{len(missing)} files missing: {listed(map(shown, missing))}"] if missing else []
    problems += [f"{len(absent)} tensors absent from the file the index names: {listed(absent)}"] if absent else []
    if problems:
        raise ModelError(f"{where}: {'; '.join(problems)}")
    return SafetensorsSource(
        shapes=MappingProxyType({entry.name: entry.shape for entry in entries}),
        stored_types=MappingProxyType({entry.name: entry.kind for entry in entries}),
        nbytes=sum(entry.end - entry.begin for entry in entries),
        where=where,
        _raw=MappingProxyType(raw),
    )


def _map(file: Path) -> mmap.mmap:
    """Map ``file`` for reading, once its first bytes look like safetensors with a header that fits."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        head = opened.read(64)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{":
            refuse_impostor(head, str(file))
        if size < 8:
            raise ModelError(f"{file}: {size} bytes; safetensors begins with 8 bytes of header length")
        if length > MAX_SAFETENSORS_HEADER_BYTES:
            allowed = MAX_SAFETENSORS_HEADER_BYTES
            raise ModelError(f"{file}: a header of {length} bytes, at most {allowed} allowed: not safetensors")
        if length > size - 8:
            raise ModelError(f"{file}: truncated: a header of {length} bytes in a file of {size}")
        if head[8:9] != b"{":
            raise ModelError(f"{file}: the header must begin with '{{', found {shown(head[8:9])}: not safetensors")
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(mapped: mmap.mmap, where: str) -> tuple[list[_Entry], int]:
    """The entries of a mapped file in order of their bytes, and where its data begins."""
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = parse_json_object(mapped[8:start], f"{where}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ModelError(f"{where}: __metadata__ is {shown(metadata)}; it must be an object")
    entries = [_entry(name, value, f"{where}: tensor {shown(name)}") for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end, previous = 0, "the header"
    for entry in entries:
        if entry.begin < end:
            raise ModelError(
                f"{where}: tensor {shown(entry.name)} begins at byte {entry.begin} and overlaps {previous}"
            )
        if entry.begin > end:
            raise ModelError(f"{where}: a hole of {entry.begin - end} bytes before tensor {shown(entry.name)}")
        end, previous = entry.end, shown(entry.name)
    present = len(mapped) - start
    if end != present:
        fault = "truncated" if end > present else "bytes that belong to no tensor"
        raise ModelError(f"{where}: {fault}: the header describes {end} bytes of data, the file holds {present}")
    return entries, start


def _entry(name: str, value: Any, where: str) -> _Entry:
    if not isinstance(value, dict):
        raise ModelError(f"{where} is {shown(value)}; an object with dtype, shape and data_offsets was expected")
    kind, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(kind, str) or kind not in _BITS:
        raise ModelError(f"{where}: dtype is {shown(kind)}; supported: {', '.join(_READABLE)}")
    dims, items = MAX_SAFETENSORS_DIMS, MAX_SAFETENSORS_ITEMS
    if not _are_counts(shape) or len(shape) > dims or math.prod(max(n, 1) for n in shape) > items:
        raise ModelError(
            f"{where}: shape is {shown(shape)}; at most {dims} counts from 0, of product {items}, are allowed"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where}: data_offsets is {shown(offsets)}; a begin and an end after it were expected")
    bits = math.prod(shape) * _BITS[kind]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ModelError(f"{where}: {kind} of shape {shape} takes {bits / 8:g} bytes, data_offsets gives {offsets}")
    return _Entry(name, kind, tuple(shape), *offsets)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
