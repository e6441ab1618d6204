"""``mixkv convert``: a GGUF model as a folder of safetensors, kept only if it is read back as the same model."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.memory import available_nbytes
from ..engine.policy import CachePolicy
from ..engine.session import Session
from ..models.convert import OPTIONS, check_dtype, rounded, stored_nbytes, write_folder
from ..models.errors import MixkvError, PromptError, UsageError
from ..models.hf_write import in_hf_form
from ..models.hub.files import check_room, sync_folder
from ..models.load import Model, Opened, Source, open_model, read_weights
from ..models.names import expected_tensors
from ..models.safetensors_write import DTYPES
from ..models.tokenizer import Tokenizer
from ..models.transformer import Transformer

Progress = Callable[[int, int], None]
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def fib(n):\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\n",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ÀÉ 😀👩‍👩‍👧 日本語のテキスト مرحبا",
    "1234567890 3.14159 2026-11-29 $5,000.00 <|not a token|> I'll we've",
)
"""Texts whose ids are compared: words, code, other scripts, numbers."""
LOGITS_TOKENS = 16
_SMALL_BYTES = 64 << 20  # tokenizer and config, generously


def convert(
    model: str, folder: Path, dtype: str = "f32", *, logits: bool = True, writing: Progress | None = None,
    checking: Progress | None = None, download: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a GGUF model into a new folder, read it back and compare; the folder appears only if all is the same.

    Args:
        model: a name of a GGUF model, as for ``load``.
        folder: of the result; must not exist.
        dtype: "f32", which changes no number, "bf16" or "f16".
        logits: compare logits too, for which the model must fit into memory as float32.
        writing, checking: called with the bytes of tensors written, or compared, and in all.
        download: called with bytes while the model is fetched.

    Returns:
        What was compared: see ``compare``, with "folder", "bytes" and "files".

    Raises:
        UsageError: a folder that exists, no GGUF model, or too little memory or room.
        ModelError, DownloadError: as for ``load``; and what cannot be written as such a folder.
        MixkvError: the folder cannot be written.

    """
    check_dtype(dtype)
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: exists already; nothing is overwritten: name a new folder")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder}: {folder.parent} is no folder")
    with _beside(folder):  # what cannot be written is refused before anything is fetched
        pass
    opened = in_hf_form(open_model(model, progress=download))
    _check_memory(opened, logits)
    check_room(str(folder), folder.parent, stored_nbytes(opened, dtype) + _SMALL_BYTES, UsageError)
    with _beside(folder) as work:
        write_folder(opened, work, dtype, writing or (lambda done, total: None))
        report = compare(opened, work, dtype, logits=logits, progress=checking)
        files = sorted(work.iterdir())
        report |= {"bytes": sum(path.stat().st_size for path in files), "files": [path.name for path in files]}
        if report["same"]:
            os.rename(work, folder)
            sync_folder(folder.parent)
    return {"model": model, "folder": str(folder), **report}


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder in a temporary one next to the one that is to be; gone at the end, unless it was renamed."""
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
        ) as place:
            work = Path(place) / folder.name
            work.mkdir()
            yield work
    except BrokenPipeError:
        raise  # of a progress bar whose reader has gone: the command line's to handle
    except OSError as error:
        raise MixkvError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _check_memory(opened: Opened, logits: bool) -> None:
    needed, room = stored_nbytes(opened, "f32"), available_nbytes()
    if logits and room is not None and needed > room:
        raise UsageError(
            f"{opened.name}: comparing logits takes {needed} bytes of memory, {room} are available; --no-logits compares "
            "only tensors, config and ids"
        )


def compare(
    opened: Opened, folder: Path, dtype: str, *, logits: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Hold a folder against the GGUF model that it was made of.

    Every tensor must have the bits of the GGUF's values, rounded to the type; config, token ids of ``TEXTS`` and what a
    tokenizer knows must be the same, and so the bits of the logits of a few tokens with those rounded weights.

    Returns:
        {"dtype", "tensors", "texts", "logits_tokens": how many were compared, "differences": list of sentences, "same",
        "logits_change": how far logits are from those of the file's own weights at most, None where not computed}.

    """
    back = open_model(str(folder))
    differences = _config_differences(opened, back)
    differences += _tensor_differences(opened, back, dtype, progress or (lambda done, total: None))
    ours, theirs = opened.read_tokenizer(), back.read_tokenizer()
    differences += _tokenizer_differences(ours, theirs)
    report: dict[str, Any] = {"dtype": dtype, "tensors": len(expected_tensors(opened.config))}
    report |= {"texts": len(TEXTS) if ours else 0, "logits_tokens": 0, "logits_change": None}
    if logits and not differences:
        ids = _ids(opened, ours)
        found, expected = _logits(opened, back.source, ids), _logits(opened, _Rounded(opened, dtype), ids)
        if not np.array_equal(found.view(np.int32), expected.view(np.int32)):
            differences.append(f"logits of {len(ids)} tokens differ by up to {np.abs(found - expected).max():.3g}")
        plain = expected if dtype == "f32" else _logits(opened, opened.source, ids)
        report |= {"logits_tokens": len(ids), "logits_change": float(np.abs(found - plain).max())}
    return report | {"differences": differences, "same": not differences}


def _config_differences(opened: Opened, back: Opened) -> list[str]:
    ours, theirs = asdict(opened.config), asdict(back.config)
    return [f"config: {name} is {theirs[name]}, was {ours[name]}" for name in ours if ours[name] != theirs[name]]


def _tensor_differences(opened: Opened, back: Opened, dtype: str, progress: Progress) -> list[str]:
    shapes, found = expected_tensors(opened.config), back.source.shapes
    if dict(found) != shapes:
        return [f"tensors: {len(found)} with other names or shapes than the {len(shapes)} expected"]
    differences, done, total = [], 0, stored_nbytes(opened, dtype)
    bits = np.dtype(f"u{DTYPES[OPTIONS[dtype]].itemsize}")
    for name in shapes:
        kind, ours, theirs = back.source.stored_types[name], rounded(opened, name, dtype), _stored(back, name)
        if kind != OPTIONS[dtype]:
            differences.append(f"tensor {name} is stored as {kind}")
        elif unlike := int((ours.view(bits) != theirs.view(bits)).sum()):
            differences.append(f"tensor {name}: {unlike} of {ours.size} numbers differ")
        done += ours.nbytes
        progress(done, total)
    return differences


def _stored(back: Opened, name: str) -> NDArray[Any]:
    values = back.source.stored(name)
    assert isinstance(values, np.ndarray)  # safetensors hold no codes
    return values


def _tokenizer_differences(ours: Tokenizer | None, theirs: Tokenizer | None) -> list[str]:
    if ours is None or theirs is None:
        return [] if ours is theirs else ["tokenizer: only one of both has one"]
    names = ("vocab_size", "bos_token", "eos_token", "chat_template")
    differences = [
        f"tokenizer: {name} is {getattr(theirs, name)!r:.200}, was {getattr(ours, name)!r:.200}"
        for name in names if getattr(ours, name) != getattr(theirs, name)
    ]  # fmt: skip
    strange = [text for text in TEXTS if _encoded(ours, text) != _encoded(theirs, text)]
    differences += [f"tokenizer: {text[:20]!r}... gives other ids" for text in strange]
    # A token that the GGUF file calls unused has no text here, and is like any other in a tokenizer.json.
    spelled = ((i, ours.decode([i])) for i in range(min(ours.vocab_size, theirs.vocab_size)))
    unlike = [i for i, text in spelled if text and theirs.decode([i]) != text]
    if unlike:
        differences.append(f"tokenizer: {len(unlike)} tokens have another text, the first is {unlike[0]}")
    return differences


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | str:
    """The ids of a text, or why the vocabulary cannot spell it."""
    try:
        return tokenizer.encode(text)
    except PromptError as error:
        return str(error)


def _ids(opened: Opened, tokenizer: Tokenizer | None) -> list[int]:
    """A few tokens: of the first text, or of the start of the vocabulary."""
    some = _encoded(tokenizer, TEXTS[0]) if tokenizer is not None else ""
    ids = some if isinstance(some, list) else list(range(opened.config.vocab_size))
    return ids[: min(LOGITS_TOKENS, opened.config.max_position_embeddings)]


class _Rounded:
    """The tensors of a GGUF model, rounded to a type, as float32."""

    def __init__(self, opened: Opened, dtype: str) -> None:
        self._opened, self._dtype = opened, dtype
        self.shapes, self.nbytes = opened.source.shapes, opened.source.nbytes
        self.stored_types = dict.fromkeys(self.shapes, "F32")

    def read(self, name: str) -> NDArray[np.float32]:
        return rounded(self._opened, name, self._dtype).astype(np.float32)

    def stored(self, name: str) -> NDArray[np.float32]:
        return self.read(name)

    def forget(self, name: str) -> None:
        self._opened.source.forget(name)


def _logits(opened: Opened, source: Source, ids: list[int]) -> NDArray[np.float32]:
    """(T, V) logits, everything in float32, with the weights of a source."""
    transformer = Transformer(opened.config, read_weights(opened.config, source, "f32"))
    found = Session(Model(opened.name, opened.config, transformer, None), CachePolicy.full()).forward(ids)
    assert found is not None
    return found
