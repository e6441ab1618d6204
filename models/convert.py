"""A GGUF model written as a folder that Hugging Face's libraries, and mixkv, read: config, tokenizer and safetensors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bpe import BPETokenizer
from .errors import ModelError, UsageError
from .hf_tokenizer import hf_tokenizer
from .hf_write import generation_config, hf_config, hf_name
from .load import Opened
from .names import expected_tensors
from .safetensors_write import DTYPES, INDEX, index_of, shards, write_safetensors

OPTIONS = {kind.lower(): kind for kind in DTYPES}
"""What --dtype is, and the type of the file's tensors."""


def check_dtype(dtype: str) -> None:
    """UsageError for a type that there is not."""
    if dtype not in OPTIONS:
        raise UsageError(f"dtype must be one of {', '.join(OPTIONS)}, found {dtype!r}")


def stored_nbytes(opened: Opened, dtype: str) -> int:
    """Bytes of all weights in ``dtype``, a key of OPTIONS."""
    shapes = expected_tensors(opened.config).values()
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes) * DTYPES[OPTIONS[dtype]].itemsize


def rounded(opened: Opened, name: str, dtype: str) -> NDArray[Any]:
    """A tensor as the folder has it: the GGUF file's values as float32, rounded to nearest even in other types.

    Raises ModelError for a finite value that is beyond the type.
    """
    values = opened.source.read(name)
    opened.source.forget(name)
    with np.errstate(over="ignore"):
        found = values.astype(DTYPES[OPTIONS[dtype]], copy=False)
    if dtype != "f32":
        lost = np.isfinite(values) & ~np.isfinite(found.astype(np.float32))
        if lost.any():
            largest = float(np.abs(values[lost]).max())
            raise ModelError(f"{opened.name}: tensor {name} holds {largest:.6g}, which {dtype} cannot hold; use f32")
    return found


def write_folder(opened: Opened, folder: Path, dtype: str, progress: Callable[[int, int], None]) -> None:
    """Write an open GGUF model into an empty folder. ``progress`` is called with the bytes written, and in all.

    Args:
        opened: of models/load.py ``open_model``, in Hugging Face's form (hf_write.py).
        folder: exists and is empty.
        dtype: "f32", which changes no number, "bf16" or "f16".
        progress: see above.

    Raises:
        UsageError: no such dtype, or a model without a GGUF file.
        ModelError: an architecture, tokenizer or value that cannot be written.
        OSError: a full disk.

    """
    check_dtype(dtype)
    if opened.path is None or opened.path.suffix != ".gguf":
        raise UsageError(f"{opened.name}: only GGUF files are converted")
    kind, total = OPTIONS[dtype], stored_nbytes(opened, dtype)
    ours = {hf_name(opened.config, name): name for name in expected_tensors(opened.config)}
    shapes = {name: opened.source.shapes[own] for name, own in ours.items()}
    texts: dict[str, Any] = {
        "config.json": hf_config(opened.config, kind),
        "generation_config.json": generation_config(opened.config),
    }
    tokenizer = opened.read_tokenizer()
    if isinstance(tokenizer, BPETokenizer):
        texts |= hf_tokenizer(tokenizer, opened.config.max_position_embeddings)
    elif tokenizer is not None:
        raise ModelError(f"{opened.name}: its tokenizer, {type(tokenizer).__name__}, has no form as tokenizer.json")
    files, done = shards(shapes, kind), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for shard in files:
        own = {name: shapes[name] for name in shard.names}
        write_safetensors(folder / shard.file, own, kind, lambda name: rounded(opened, ours[name], dtype), written)
    if len(files) > 1:
        texts[INDEX] = index_of(files, shapes, kind)
    for name, content in texts.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
