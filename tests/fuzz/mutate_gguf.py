"""Changes to GGUF files: keys, values, tensors, counts."""

import contextlib
import random
import struct
from dataclasses import dataclass

from .mutators import INTEGERS, Scramble, plain

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
