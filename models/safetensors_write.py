"""Writing weights in the safetensors format, a tensor at a time, so that no more than one is in memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, the tensors.
The library writes only what is in memory as a whole.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

SHARD_NBYTES = 5_000_000_000  # as transformers does it
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8  # of the first tensor: the header is filled up with spaces


@dataclass(frozen=True, slots=True)
class Shard:
    """A file and the names of the tensors in it, in their order."""

    file: str
    names: tuple[str, ...]


def shards(shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int = SHARD_NBYTES) -> list[Shard]:
    """The files that tensors of these shapes go to, each of at most ``limit`` bytes unless one tensor alone has more."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, shape in shapes.items():
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        if nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(names)) for i, names in enumerate(groups, start=1)
    ]


def index_of(files: list[Shard], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    total = sum(prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: shard.file for shard in files for name in shard.names},
    }


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    read: Callable[[str], NDArray[Any]],
    written: Callable[[int], None],
) -> None:
    """Write tensors, which ``read`` gives by name in their type and shape, and flush them to disk.

    ``written`` is called with the bytes of each tensor. OSError where the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = np.asarray(read(name), order="C")
            assert values.shape == tuple(shape) and values.dtype == DTYPES[dtype], name
            file.write(values.reshape(-1).view(np.uint8).data)
            written(values.nbytes)
        file.flush()
        os.fsync(file.fileno())
