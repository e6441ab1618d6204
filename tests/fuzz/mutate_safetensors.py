"""Changes to safetensors files, and to session files, which are safetensors with a checksum."""

import hashlib
import json
import random
from typing import Any

from .mutators import INTEGERS, Mutator, Scramble, changed, dumped, plain


def safetensors(words: list[Any], *, digest: bool) -> Mutator:
    """A mutator of safetensors files: header, tensors, both in step or not. digest: of the whole file, in its metadata."""

    def mutate(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            tensors = {
                name: _body(data[8 + length :], entry) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return plain(data, rng, scramble)
        if rng.randrange(16) == 0:
            return plain(data, rng, scramble)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            header, tensors = _change_file(header, tensors, rng, scramble, words)
        if rng.randrange(8):
            _lay_out(header, tensors)
        body = b"".join(tensors.values())
        if digest and rng.randrange(16):
            return _with_digest(header, body)
        text = dumped(header)
        return len(text).to_bytes(8, "little") + text + body

    return mutate


def _body(body: bytes, entry: Any) -> bytes:
    start, stop = entry["data_offsets"]
    return body[start:stop]


def _change_file(
    header: dict[str, Any], tensors: dict[str, bytes], rng: random.Random, scramble: Scramble, words: list[Any]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    header, tensors = dict(header), dict(tensors)
    name = rng.choice([name for name in tensors if name in header] or [""])
    metadata = header.get("__metadata__")
    kind = rng.randrange(8)
    if kind < 3 and isinstance(metadata, dict) and metadata:
        header["__metadata__"] = _change_metadata(metadata, rng, scramble, words)
    elif kind == 3 and name in tensors:  # a tensor less
        header.pop(name, None), tensors.pop(name)
    elif kind == 4 and name in tensors:  # a tensor under another name
        new = rng.choice([*tensors, scramble(name.encode()).decode("utf-8", "replace")])
        header[new], tensors[new] = header[name], tensors[name]
    elif kind == 5 and len(tensors.get(name, b"")) >= 8:  # numbers in a tensor
        numbers = bytearray(tensors[name])
        at = rng.randrange(len(numbers) // 8) * 8
        value = int.from_bytes(numbers[at : at + 8], "little") + rng.choice((-2, -1, 1, 2))
        numbers[at : at + 8] = (rng.choice((value, rng.choice(INTEGERS))) & (1 << 64) - 1).to_bytes(8, "little")
        tensors[name] = bytes(numbers)
    elif kind == 6 and name in tensors:  # bytes of a tensor, their number too
        tensors[name] = scramble(tensors[name])
    else:
        header = changed(header, rng, scramble, words)
    return (header if isinstance(header, dict) else {"__metadata__": header}), tensors


def _change_metadata(
    metadata: dict[str, Any], rng: random.Random, scramble: Scramble, words: list[Any]
) -> dict[str, Any]:
    """Metadata of which one value is otherwise; what is JSON inside of a text is changed as JSON."""
    metadata, key = dict(metadata), rng.choice(list(metadata))
    try:
        inside = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError):
        metadata[key] = changed(metadata[key], rng, scramble, words)
        return metadata
    new = changed(inside, rng, scramble, words)
    metadata[key] = json.dumps(new)
    return metadata


def _lay_out(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    """Offsets that fit the tensors, one behind the other; a first dimension that fits where the others do."""
    at = 0
    for name, data in tensors.items():
        entry = header.get(name)
        if isinstance(entry, dict):
            header[name] = {**entry, "data_offsets": [at, at + len(data)]}
        at += len(data)


def _with_digest(header: dict[str, Any], body: bytes) -> bytes:
    zeros = "0" * 64
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "sha256" in metadata:
        header = {**header, "__metadata__": {**metadata, "sha256": zeros}}
    text = dumped(header)
    whole = len(text).to_bytes(8, "little") + text + body
    return whole.replace(zeros.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)
