"""Changes to files that keep enough of their form to get past a reader's first checks.

A mutator gets a file's bytes, a source of random numbers, and ``scramble``, which changes bytes without a plan.
"""

import json
import random
import re
from collections.abc import Callable
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
        return dumped(value)

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


def dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
