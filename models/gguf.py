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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.weights import W4, W4M, W8, CodedRows
from .check import refuse_impostor, shown
from .errors import ModelError
from .gguf_metadata import Cursor, Kind, MetaValue, kind_name, of_kind
from .limits import MAX_GGUF_ALIGNMENT, MAX_GGUF_DIMS, MAX_GGUF_KEYS, MAX_GGUF_TENSORS, MIN_GGUF_ALIGNMENT

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_VALUES_AT_ONCE = 1 << 17  # a chunk and its temporaries stay in the L2 cache: 0.3 s for the default model, not 0.75


class _Blocks(NamedTuple):
    """How a tensor type is stored: ``values`` numbers in each ``nbytes`` bytes."""

    name: str
    values: int
    nbytes: int


# The types that gguf.quants turns into float32, by their number in the file. Spelled out because importing gguf costs
# more than opening a file does; a test compares the table with the package's.
TENSOR_TYPES: Mapping[int, _Blocks] = {
    0: _Blocks("F32", 1, 4),
    1: _Blocks("F16", 1, 2),
    2: _Blocks("Q4_0", 32, 18),
    3: _Blocks("Q4_1", 32, 20),
    6: _Blocks("Q5_0", 32, 22),
    7: _Blocks("Q5_1", 32, 24),
    8: _Blocks("Q8_0", 32, 34),
    10: _Blocks("Q2_K", 256, 84),
    11: _Blocks("Q3_K", 256, 110),
    12: _Blocks("Q4_K", 256, 144),
    13: _Blocks("Q5_K", 256, 176),
    14: _Blocks("Q6_K", 256, 210),
    16: _Blocks("IQ2_XXS", 256, 66),
    17: _Blocks("IQ2_XS", 256, 74),
    18: _Blocks("IQ3_XXS", 256, 98),
    19: _Blocks("IQ1_S", 256, 50),
    20: _Blocks("IQ4_NL", 32, 18),
    21: _Blocks("IQ3_S", 256, 110),
    22: _Blocks("IQ2_S", 256, 82),
    23: _Blocks("IQ4_XS", 256, 136),
    29: _Blocks("IQ1_M", 256, 56),
    30: _Blocks("BF16", 1, 2),
    34: _Blocks("TQ1_0", 256, 54),
    35: _Blocks("TQ2_0", 256, 66),
}
_KERNEL_KINDS = {"Q4_0": W4, "Q4_1": W4M, "Q8_0": W8}
_BY_NAME = {blocks.name: blocks for blocks in TENSOR_TYPES.values()}


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
        stored = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return _dequantize(stored, _BY_NAME[tensor.type_name]).reshape(tensor.shape)

    def _tensor(self, which: str | GGUFTensor) -> GGUFTensor:
        if isinstance(which, GGUFTensor):
            return which
        if which not in self.tensors:
            raise ModelError(f"{self.path}: there is no tensor {shown(which)}")
        return self.tensors[which]

    def blocks(self, which: str | GGUFTensor) -> CodedRows | None:
        """The rows of a matrix as the codes that the file holds, views into it; None for types that the kernels lack."""
        tensor = self._tensor(which)
        kind = _KERNEL_KINDS.get(tensor.type_name)
        if kind is None or len(tensor.shape) != 2:
            return None
        block = _BY_NAME[tensor.type_name]
        stored = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        stored = stored.reshape(tensor.shape[0], tensor.shape[1] // block.values, block.nbytes)
        numbers = 2 if kind == W4M else 1  # the scale, and after it the minimum
        scales, minima = (stored[..., 2 * i : 2 * i + 2].view(np.float16)[..., 0] for i in (0, numbers - 1))
        return CodedRows(kind, stored[..., 2 * numbers :].view(np.uint32), scales, minima if numbers == 2 else None)

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
        raise ModelError(f"{what} has the type number {code}, supported are {', '.join(_BY_NAME)}")
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


def _dequantize(stored: npt.NDArray[np.uint8], blocks: _Blocks) -> npt.NDArray[np.float32]:
    """The float32 values, flat, of the stored blocks, flat."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[blocks.name]
    values = np.empty(stored.size // blocks.nbytes * blocks.values, np.float32)
    step = _VALUES_AT_ONCE // blocks.values
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf scales pass through; checking weights is apart
        for first in range(0, stored.size // blocks.nbytes, step):
            # As a single row: gguf.quants cuts what it is given into groups of 16 rows, which would be too small.
            part = stored[first * blocks.nbytes : (first + step) * blocks.nbytes].reshape(1, -1)
            values[first * blocks.values : (first + step) * blocks.values] = dequantize(part, kind)[0]
    return values
