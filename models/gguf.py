"""Reading GGUF files: metadata, the table of tensors, and their values as float32.

The format is described in docs/gguf.md of the ggml project; versions 2 and 3, little-endian. Everything before the
tensor data is checked when a file is opened, every count against the bytes that are left before anything is made of it.
"""

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ..kernels.weights import CodedRows
from .check import refuse_impostor, shown
from .errors import ModelError
from .gguf_blocks import CODE_KINDS, TENSOR_TYPES, codes_of_rows, dequantize
from .gguf_metadata import Cursor, Kind, MetaValue, kind_name, of_kind
from .limits import MAX_GGUF_ALIGNMENT, MAX_GGUF_DIMS, MAX_GGUF_KEYS, MAX_GGUF_TENSORS, MIN_GGUF_ALIGNMENT

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies: ``shape`` in NumPy's order, rows first; ``offset`` and ``nbytes`` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int

    def parts(self) -> list["GGUFTensor"]:
        """The items along the first axis, each a tensor of its own."""
        count, nbytes = self.shape[0], self.nbytes // self.shape[0]
        return [
            replace(self, shape=self.shape[1:], offset=self.offset + i * nbytes, nbytes=nbytes) for i in range(count)
        ]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open, memory-mapped GGUF file; made by `open_gguf`. Safe to read from several threads."""

    path: Path
    metadata: Mapping[str, MetaValue]
    tensors: Mapping[str, GGUFTensor]
    _data: mmap.mmap

    def read(self, which: str | GGUFTensor) -> npt.NDArray[np.float32]:
        """The values of a tensor: float32, C order, of the shape in ``tensors``, owned by the caller.

        Raises ModelError if the file has no tensor of that name.
        """
        tensor = self._tensor(which)
        return dequantize(self._bytes(tensor), tensor.type_name).reshape(tensor.shape)

    def _tensor(self, which: str | GGUFTensor) -> GGUFTensor:
        if isinstance(which, GGUFTensor):
            return which
        if which not in self.tensors:
            raise ModelError(f"{self.path}: there is no tensor {shown(which)}")
        return self.tensors[which]

    def _bytes(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """A tensor as it is stored, a view into the file."""
        return np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)

    def codes(self, which: str | GGUFTensor) -> CodedRows | None:
        """The rows of a matrix as codes of the kind in CODE_KINDS; None for other types, and where a scale does not fit."""
        tensor = self._tensor(which)
        if tensor.type_name not in CODE_KINDS or len(tensor.shape) != 2:
            return None
        return codes_of_rows(self._bytes(tensor).reshape(tensor.shape[0], -1), tensor.type_name)

    def forget(self, which: str | GGUFTensor) -> None:
        """Give back the memory that reading a tensor took up; reading it again is all right."""
        tensor, page = self._tensor(which), mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            start = tensor.offset // page * page
            self._data.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)

    def expect(self, key: str, kind: type[Kind]) -> Kind:
        """The metadata value of ``key``, which must be of ``kind``: bool, int, float, str or a list such as list[str].

        A float may be written as an integer. Raises ModelError if the key is missing or its value is of another kind.
        """
        value = self.optional(key, kind)
        if value is None:
            raise ModelError(f"{self.path}: the metadata has no {key}, expected {kind_name(kind)}")
        return value

    def optional(self, key: str, kind: type[Kind]) -> Kind | None:
        """Like `expect`, but None if the key is missing."""
        value = self.metadata.get(key)
        if value is None:
            return None
        try:
            return of_kind(key, value, kind)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None


def open_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file into memory and check everything in front of its tensor data.

    Raises ModelError, naming the file and the field, for anything damaged, oversized or not supported.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as handle:
            _check_start(handle.read(64), path)
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        metadata, tensors = _read_header(data)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(tensors), data)


def _check_start(head: bytes, path: Path) -> None:
    """Refuse what is not a GGUF file of a supported version, and say what it is instead where that is plain."""
    if not head:
        raise ModelError(f"{path}: the file is empty")
    if not head.startswith(b"GGUF"):
        refuse_impostor(head, str(path))
        raise ModelError(f"{path}: not a GGUF file: it starts with {head[:4]!r}, expected b'GGUF'")
    version = int.from_bytes(head[4:8], "little")
    supported = f"supported are little-endian files of version {' or '.join(map(str, _VERSIONS))}"
    if len(head) < 8:
        raise ModelError(f"{path}: the file ends before its version")
    if version and version & 0xFFFF == 0:  # a small number with its bytes in the other order
        raise ModelError(f"{path}: a big-endian GGUF file; {supported}")
    if version not in _VERSIONS:
        raise ModelError(f"{path}: a GGUF file of version {version}; {supported}")


def _read_header(data: mmap.mmap) -> tuple[dict[str, MetaValue], dict[str, GGUFTensor]]:
    cursor = Cursor(data, position=8)  # after the magic and the version
    tensor_count = cursor.uint64("the number of tensors")
    key_count = cursor.uint64("the number of metadata keys")
    if tensor_count > MAX_GGUF_TENSORS:
        raise ModelError(f"the header claims {tensor_count} tensors, at most {MAX_GGUF_TENSORS} are allowed")
    if key_count > MAX_GGUF_KEYS:
        raise ModelError(f"the header claims {key_count} metadata keys, at most {MAX_GGUF_KEYS} are allowed")
    metadata: dict[str, MetaValue] = {}
    for index in range(key_count):
        key = cursor.name(f"metadata key {index}")
        if key in metadata:
            raise ModelError(f"metadata key {shown(key)} appears twice")
        metadata[key] = cursor.value(f"metadata key {shown(key)}")
    alignment = _alignment(metadata)
    tensors: dict[str, GGUFTensor] = {}
    for index in range(tensor_count):
        tensor = _read_tensor(cursor, index, alignment)
        if tensor.name in tensors:
            raise ModelError(f"tensor {shown(tensor.name)} appears twice")
        tensors[tensor.name] = tensor
    start = -(-cursor.position // alignment) * alignment
    return metadata, {tensor.name: tensor for tensor in _placed(tensors.values(), start, len(data))}


def _alignment(metadata: Mapping[str, MetaValue]) -> int:
    key = "general.alignment"
    alignment = of_kind(key, metadata.get(key, _DEFAULT_ALIGNMENT), int)
    if not MIN_GGUF_ALIGNMENT <= alignment <= MAX_GGUF_ALIGNMENT or alignment & (alignment - 1):
        raise ModelError(
            f"{key} is {alignment}, expected a power of two from {MIN_GGUF_ALIGNMENT} to {MAX_GGUF_ALIGNMENT}"
        )
    return alignment


def _read_tensor(cursor: Cursor, index: int, alignment: int) -> GGUFTensor:
    """One row of the table of tensors; its offset is still relative to the tensor data."""
    name = cursor.name(f"the name of tensor {index}")
    what = f"tensor {shown(name)}"
    dimensions = cursor.uint32(f"the number of dimensions of {what}")
    if not 1 <= dimensions <= MAX_GGUF_DIMS:
        raise ModelError(f"{what} has {dimensions} dimensions, expected 1 to {MAX_GGUF_DIMS}")
    shape = tuple(cursor.uint64(f"the shape of {what}") for _ in range(dimensions))[::-1]
    code = cursor.uint32(f"the type of {what}")
    offset = cursor.uint64(f"the offset of {what}")
    if code not in TENSOR_TYPES:
        known = ", ".join(blocks.name for blocks in TENSOR_TYPES.values())
        raise ModelError(f"{what} has the type number {code}, supported are {known}")
    blocks = TENSOR_TYPES[code]
    if 0 in shape:
        raise ModelError(f"{what} has the shape {shape}, every dimension must be at least 1")
    if shape[-1] % blocks.values:
        raise ModelError(f"{what} has {shape[-1]} columns, {blocks.name} needs a multiple of {blocks.values}")
    if offset % alignment:
        raise ModelError(f"{what} has the offset {offset}, expected a multiple of the alignment, {alignment}")
    return GGUFTensor(name, shape, blocks.name, offset, math.prod(shape) // blocks.values * blocks.nbytes)


def _placed(tensors: Iterable[GGUFTensor], start: int, file_size: int) -> list[GGUFTensor]:
    """The tensors with absolute offsets, in the order of the file; none overlaps another or passes the end."""
    placed: list[GGUFTensor] = []
    end, previous = start, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        offset = start + tensor.offset
        if offset < end:
            raise ModelError(f"tensors {shown(previous)} and {shown(tensor.name)} overlap at byte {offset}")
        end, previous = offset + tensor.nbytes, tensor.name
        if end > file_size:
            raise ModelError(f"tensor {shown(previous)} should end at byte {end}, but the file has {file_size} bytes")
        placed.append(replace(tensor, offset=offset))
    return placed
