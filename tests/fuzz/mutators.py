"""Changes to files that keep enough of their form to get past a reader's first checks.

A mutator gets a file's bytes, a source of random numbers, and ``scramble``, which changes bytes without a plan.
"""

import contextlib
import hashlib
import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Scramble = Callable[[bytes], bytes]
Mutator = Callable[[bytes, random.Random, Scramble], bytes]

INTEGERS = [
    0, 1, 2, 3, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 1023, 4095, 4096, 65535, 65536, 1 << 20,
    1 << 24, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 62) - 1, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1,
]  # fmt: skip


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, left out, put in or doubled."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        some = rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + some]
        elif kind == 3:
            out[at:at] = rng.randbytes(some)
        elif kind == 4:
            out[at : at + 8] = (rng.choice(INTEGERS) & (1 << 64) - 1).to_bytes(8, "little")
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + some]
    return bytes(out)


def plain(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
    """Bytes changed without a plan; now and then the file is cut."""
    return data[: rng.randrange(len(data) + 1)] if rng.randrange(20) == 0 else scramble(data)


_WORD = re.compile(rb"\w+|\s+|\W")


def of_words(words: list[bytes]) -> Mutator:
    """A mutator of texts in a language: words changed, moved, doubled, or others of ``words`` put in."""

    def mutate(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
        if rng.randrange(4) == 0:
            return plain(data, rng, scramble)
        parts = _WORD.findall(data) or [b"a"]
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, some = rng.randrange(len(parts) + 1), rng.choice((0, 1, 1, 3, 9))
            start = rng.randrange(len(parts) + 1)
            new = rng.choice(
                ([], [rng.choice(words)], [rng.choice(words)], parts[start : start + rng.choice((1, 4, 20))])
            )
            parts[at : at + some] = new
        return b"".join(parts)

    return mutate


# --- JSON ---------------------------------------------------------------------------------------------------------

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 0.5, 1e308, float("nan"), float("inf"), "", "a", "\ud800", "x" * 5000, [], {}, [[]],
    {"": None}, 1 << 63, -(1 << 63), 10**400, "__class__", "../x",
]  # fmt: skip


def changed(value: Any, rng: random.Random, scramble: Scramble, words: list[Any]) -> Any:
    """A JSON value in which one place is otherwise; ``words`` are what this kind of file may say somewhere."""
    if isinstance(value, dict) and value and rng.randrange(8):
        value, key = dict(value), rng.choice(list(value))
        kind = rng.randrange(12)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[str(rng.choice(words))] = value[key]
        elif kind == 2:
            value[key] = value[rng.choice(list(value))]
        else:
            value[key] = changed(value[key], rng, scramble, words)
        return value
    if isinstance(value, list) and value and rng.randrange(8):
        value, i = list(value), rng.randrange(len(value))
        kind = rng.randrange(12)
        if kind == 0:
            del value[i]
        elif kind == 1:
            value[i:i] = [value[i]] * rng.choice((1, 1, 100))
        elif kind == 2:
            value[i] = value[rng.randrange(len(value))]
        else:
            value[i] = changed(value[i], rng, scramble, words)
        return value
    kind = rng.randrange(6)
    if isinstance(value, str) and kind < 3:
        return scramble(value.encode("utf-8", "surrogatepass")).decode(
            "utf-8", rng.choice(("replace", "surrogateescape"))
        )
    if type(value) is int and kind < 3 and value.bit_length() < 2000:
        return rng.choice((value + 1, value - 1, -value, value * 2, value % 99 / 2, str(value), rng.choice(INTEGERS)))
    return rng.choice(_VALUES if kind < 5 else words)


def json_text(words: list[Any]) -> Mutator:
    """A mutator of JSON files that may say ``words``."""

    def mutate(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return plain(data, rng, scramble)
        if rng.randrange(8) == 0:
            return plain(data, rng, scramble)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = changed(value, rng, scramble, words)
        return _dumped(value)

    return mutate


def json_lines(words: list[Any]) -> Mutator:
    """A mutator of files with a JSON value in each line."""
    one = json_text(words)

    def mutate(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
        lines = data.split(b"\n")
        if rng.randrange(6) == 0 or not any(lines):
            return plain(data, rng, scramble)
        i = rng.randrange(len(lines))
        lines[i : i + 1] = rng.choice(
            ([], [lines[i]] * 2, [one(lines[i], rng, scramble)], [one(lines[i], rng, scramble)])
        )
        return b"\n".join(lines)

    return mutate


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


# --- safetensors, and session files, which are safetensors with a checksum ----------------------------------------


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
        text = _dumped(header)
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
    text = _dumped(header)
    whole = len(text).to_bytes(8, "little") + text + body
    return whole.replace(zeros.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)


# --- GGUF ---------------------------------------------------------------------------------------------------------

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_TYPES = [*range(40), 1 << 31]


@dataclass
class _Gguf:
    """A GGUF file taken apart: values as they stand there, with their type in front."""

    keys: list[tuple[bytes, int, bytes]]  # name, type, value
    tensors: list[tuple[bytes, list[int], int, int]]  # name, dimensions, type, offset
    data: bytes


def gguf(data: bytes, rng: random.Random, scramble: Scramble) -> bytes:
    """A GGUF file changed by its structure: keys, values, tensors, counts; then perhaps without a plan."""
    try:
        file = _taken_apart(data)
    except (struct.error, KeyError, ValueError):
        return plain(data, rng, scramble)
    if rng.randrange(6) == 0:
        return plain(data, rng, scramble)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(struct.error, OverflowError):  # a value that a change before has put out of order
            _change_gguf(file, rng, scramble)
    counts = [len(file.tensors), len(file.keys)]
    if rng.randrange(20) == 0:
        counts[rng.randrange(2)] = rng.choice(INTEGERS)
    out = bytearray(b"GGUF" + struct.pack("<IQQ", rng.choice((3, 3, 3, 3, 2)), *(n & (1 << 64) - 1 for n in counts)))
    for name, kind, value in file.keys:
        out += _text(name) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in file.tensors:
        dims_count = len(dims) if rng.randrange(50) else rng.choice((0, 5, 1 << 31))
        out += _text(name) + struct.pack(f"<I{len(dims)}QIQ", dims_count, *dims, kind, offset)
    return bytes(out + b"\0" * (-len(out) % 32) + file.data)


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _taken_apart(data: bytes) -> _Gguf:
    if data[:4] != b"GGUF":
        raise ValueError
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    if n_tensors > 500 or n_keys > 500:
        raise ValueError
    at = 24

    def number(width: int) -> int:
        nonlocal at
        if at + width > len(data):
            raise ValueError
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def string() -> bytes:
        nonlocal at
        length = number(8)
        if at + length > len(data):
            raise ValueError
        at += length
        return data[at - length : at]

    keys = []
    for _ in range(n_keys):
        name, kind, start = string(), number(4), at
        if kind == _STRING:
            string()
        elif kind == _ARRAY:
            inner, count = number(4), number(8)
            if count > len(data):
                raise ValueError
            for _ in range(count):
                string() if inner == _STRING else number(_WIDTHS[inner])
        else:
            number(_WIDTHS[kind])
        keys.append((name, kind, data[start:at]))
    tensors = []
    for _ in range(n_tensors):
        name, count = string(), number(4)
        if count > 8:
            raise ValueError
        tensors.append((name, [number(8) for _ in range(count)], number(4), number(8)))
    return _Gguf(keys, tensors, data[-(-at // 32) * 32 :])


def _change_gguf(file: _Gguf, rng: random.Random, scramble: Scramble) -> None:
    kind = rng.randrange(10)
    if kind < 5 and file.keys:
        i = rng.randrange(len(file.keys))
        name, code, value = file.keys[i]
        if kind == 0:
            file.keys[i : i + 1] = rng.choice(([], [file.keys[i]] * 2))
        elif kind == 1:
            file.keys[i] = (rng.choice((scramble(name), rng.choice(file.keys)[0])), code, value)
        elif kind == 2:
            file.keys[i] = (name, *rng.choice(file.keys)[1:])
        else:
            file.keys[i] = (name, *_changed_value(code, value, rng, scramble))
    elif kind < 9 and file.tensors:
        i = rng.randrange(len(file.tensors))
        name, dims, code, offset = file.tensors[i]
        what = rng.randrange(5)
        if what == 0:
            file.tensors[i : i + 1] = rng.choice(([], [file.tensors[i]] * 2))
        elif what == 1:
            name = rng.choice((scramble(name), rng.choice(file.tensors)[0]))
        elif what == 2:
            j = rng.randrange(len(dims)) if dims else 0
            other = rng.choice((*INTEGERS, *(d * k for d in dims for k in (2, 3))))
            dims = [*dims[:j], other, *dims[j + rng.randrange(2) :]]
        elif what == 3:
            code = rng.choice(_TYPES)
        else:
            offset = rng.choice((*INTEGERS, offset + 32, offset - 32, *(t[3] for t in file.tensors))) & (1 << 64) - 1
        if what:
            file.tensors[i] = (name, [d & (1 << 64) - 1 for d in dims], code, offset)
    else:
        file.data = scramble(file.data) if rng.randrange(3) else file.data[: rng.randrange(len(file.data) + 1)]


def _changed_value(code: int, value: bytes, rng: random.Random, scramble: Scramble) -> tuple[int, bytes]:
    """Another metadata value: of its own type in most cases."""
    number = rng.choice(INTEGERS) & (1 << 64) - 1
    if rng.randrange(6) == 0:
        return (
            rng.choice(((10, struct.pack("<Q", number)), (4, struct.pack("<I", number & 0xFFFFFFFF)), (7, b"\1"))) + ()
        )
    if code == _STRING:
        return code, rng.choice((_text(scramble(value[8:])), struct.pack("<Q", number) + value[8:]))
    if code == _ARRAY:
        inner, count = struct.unpack_from("<IQ", value)
        items = value[12:]
        choice = rng.randrange(4)
        if choice == 0:
            return code, struct.pack("<IQ", rng.choice((*_WIDTHS, _STRING, _ARRAY, 13)), count) + items
        if choice == 1:
            return code, struct.pack("<IQ", inner, number) + items
        if choice == 2 and inner == _STRING and count:  # one of its texts
            texts, at = [], 12
            for _ in range(count):
                length = struct.unpack_from("<Q", value, at)[0]
                texts.append(value[at + 8 : at + 8 + length])
                at += 8 + length
            i = rng.randrange(count)
            texts[i : i + 1] = rng.choice(([], [texts[i]] * 2, [scramble(texts[i])], [rng.choice(texts)]))
            return code, struct.pack("<IQ", inner, len(texts)) + b"".join(map(_text, texts))
        return code, struct.pack("<IQ", inner, count) + scramble(items)
    return code, rng.choice((struct.pack("<Q", number), scramble(value).ljust(8, b"\0")))[: len(value)]
