"""Calls of the microkernels with arrays, and what they must give, in integers and in float64.

How codes lie in words is written from the description in kernels/layout.py, apart from the kernels and from oracle.py,
which reads them the other way round.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixkv.kernels import microkernel
from mixkv.kernels.jit import kernel

from .oracle import DTYPES

BITS = (8, 4, 3, 2)


# --- How many rows and vectors a call may have ----------------------------------------------------------------------------


@kernel
def _counts(asked, rows, vectors):
    for i in range(asked.size):
        rows[i], vectors[i] = microkernel.next_rows(asked[i]), microkernel.next_vectors(asked[i])
    return microkernel.most_dense_rows()


def counts(most: int = 40) -> dict[str, list[int]]:
    """What this CPU takes in one call: rows of codes, rows of dense numbers and vectors of dense numbers."""
    asked = np.arange(1, most + 1)
    rows, vectors = np.zeros_like(asked), np.zeros_like(asked)
    dense_rows = int(_counts(asked, rows, vectors))
    for taken in (rows, vectors):  # always the largest one that there is and that is wanted
        there = np.unique(taken)
        np.testing.assert_array_equal(taken, [max(x for x in there if x <= want) for want in asked])
    return {
        "rows": np.unique(rows).tolist(),
        "dense rows": list(range(1, dense_rows + 1)),
        "vectors": np.unique(vectors).tolist(),
    }


# --- Dense numbers --------------------------------------------------------------------------------------------------------


@kernel
def _multiply_dense(kind, a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, vector_stride):
    if kind == 0:
        microkernel.multiply_f32(
            a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, vector_stride, 0
        )  # fmt: skip
    elif kind == 1:
        microkernel.multiply_f16(
            a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, vector_stride, 0
        )  # fmt: skip
    else:
        microkernel.multiply_bf16(
            a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, vector_stride, 0
        )  # fmt: skip


def multiply_dense(
    kind: str, a: np.ndarray, b: np.ndarray, target: np.ndarray, rows: int | None = None, vectors: int | None = None
) -> np.ndarray:
    """``target`` (rows, vectors, 16) plus a (rows, steps) times b (vectors, steps, 16), in the strides that they have.

    So many of the rows and vectors; the others stay as they are. The arguments do, too.
    """
    count = a.shape[1]
    assert a.dtype == target.dtype == np.float32 and b.dtype == DTYPES[kind] and b.shape[1:] == (count, 16)
    assert a.strides[1] == 4 and b.strides[2] == b.itemsize and target.strides[2] == 4
    found = np.empty_like(target)  # keeps the order of the strides
    found[:] = target
    _multiply_dense(
        list(DTYPES).index(kind), a.ctypes.data, a.strides[0], b.ctypes.data, b.strides[1], b.strides[0], count,
        len(a) if rows is None else rows, len(b) if vectors is None else vectors, found.ctypes.data, found.strides[0],
        found.strides[1],
    )  # fmt: skip
    return found


def wrong_dense_products() -> list[str]:
    """Products of whole numbers, which float32 and the halves hold exactly, that are not exact; and what is beside them."""
    rng = np.random.default_rng(18)
    there, wrong = counts(), []
    for kind, dtype in DTYPES.items():
        for steps in (1, 7, 64):
            a = rng.integers(-100, 101, (max(there["dense rows"]), steps)).astype(np.float32)
            b = rng.integers(-100, 101, (max(there["vectors"]), steps, 16)).astype(dtype)
            target = rng.integers(-1000, 1001, (len(a), len(b), 16)).astype(np.float32)
            for rows in there["dense rows"]:
                for vectors in there["vectors"]:
                    want = target.copy()
                    sums = np.einsum("ri,vil->rvl", a[:rows].astype(np.float64), b[:vectors].astype(np.float64))
                    want[:rows, :vectors] += sums.astype(np.float32)
                    if not np.array_equal(multiply_dense(kind, a, b, target, rows, vectors), want):
                        wrong.append(f"{kind} {steps} {rows} {vectors}")
    return wrong


# --- Codes ----------------------------------------------------------------------------------------------------------------


@kernel
def _multiply_codes(
    bits, a, a_stride, b, b_stride, tops, first_pair, count, rows, vectors, targets, column, fresh, factors, offsets,
    scales, centres, scale_step, largest,
):  # fmt: skip
    if bits == 8:
        microkernel.multiply_codes8(
            a, a_stride, b, b_stride, tops, first_pair, count, rows, vectors, targets, column, fresh, factors, offsets,
            scales, centres, scale_step, largest, 0,
        )  # fmt: skip
    elif bits == 4:
        microkernel.multiply_codes4(
            a, a_stride, b, b_stride, tops, first_pair, count, rows, vectors, targets, column, fresh, factors, offsets,
            scales, centres, scale_step, largest, 0,
        )  # fmt: skip
    elif bits == 3:
        microkernel.multiply_codes3(
            a, a_stride, b, b_stride, tops, first_pair, count, rows, vectors, targets, column, fresh, factors, offsets,
            scales, centres, scale_step, largest, 0,
        )  # fmt: skip
    else:
        microkernel.multiply_codes2(
            a, a_stride, b, b_stride, tops, first_pair, count, rows, vectors, targets, column, fresh, factors, offsets,
            scales, centres, scale_step, largest, 0,
        )  # fmt: skip


def pack_plane(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields (pairs, 2, 16 lanes) of so many bits in words, uint32 (words, 16 lanes), from the lowest bits of both halves.

    What is left of the last word has all bits set.
    """
    a_half = 16 // bits
    missing = -len(fields) % a_half
    fields = np.concatenate([fields, np.full((missing, 2, 16), 2**bits - 1)])
    fields = fields.astype(np.uint32).reshape(-1, a_half, 2, 16)
    words = np.zeros((len(fields), 16), np.uint32)
    for i in range(a_half):
        for half in range(2):
            words |= fields[:, i, half] << np.uint32(16 * half + bits * i)
    return words


@dataclass(frozen=True)
class Coded:
    """Codes less the middle one, (vectors, parts, steps, 16 lanes), in words as a head's part of a tile has them.

    A sum is over the steps of one part of one vector: the pairs of a word are (i, i + steps/2) of a part, and the parts
    of a vector follow one another.
    """

    bits: int
    codes: np.ndarray
    words: np.ndarray  # uint32 (words, 16); of 3 bits the plane of the lower two bits, and then that of the third ones
    tops: int  # where that one begins, in words

    @classmethod
    def pack(cls, codes: np.ndarray, bits: int) -> "Coded":
        vectors, parts, steps, _ = codes.shape
        pairs = codes.reshape(vectors, parts, 2, steps // 2, 16).swapaxes(2, 3).reshape(-1, 2, 16)
        stored = pairs.astype(np.int64) % 2**bits  # two's complement
        if bits != 3:
            return cls(bits, codes, pack_plane(stored, bits), 0)
        lower, upper = pack_plane(stored % 4, 2), pack_plane(stored // 4, 1)
        return cls(bits, codes, np.concatenate([lower, upper]), len(lower))

    @classmethod
    def random(cls, rng: np.random.Generator, bits: int, vectors: int, parts: int, steps: int) -> "Coded":
        """Any codes; the lowest and the highest ones all over the first two vectors where there are more."""
        middle = 2 ** (bits - 1)
        codes = rng.integers(-middle, middle, (vectors, parts, steps, 16))
        if vectors > 2:
            codes[0], codes[1] = -middle, middle - 1
        return cls.pack(codes, bits)

    def arguments(self, first_vector: int, part: int) -> tuple[int, int, int, int]:
        """b, its vector stride, the plane of third bits and the place of the first pair in it; all else than b in bytes."""
        _, parts, steps, _ = self.codes.shape
        pairs = steps // 2  # of a part
        first = (first_vector * parts + part) * pairs
        a_word = 8 if self.bits == 3 else 16 // self.bits
        base = self.words.ctypes.data
        if self.bits != 3:
            return base + first // a_word * 64, parts * pairs // a_word * 64, 0, 0
        return base + first // a_word * 64, parts * pairs // a_word * 64, base + self.tops * 64, first


@dataclass
class Call:
    """The other arguments of ``multiply_codes``, as arrays."""

    a: np.ndarray  # int16 (rows, steps)
    targets: Sequence[np.ndarray]  # float32 (vectors or more, 16), one a row
    factors: np.ndarray  # float32 (rows,)
    offsets: np.ndarray
    scales: np.ndarray | None = None  # float32 (vectors, 16); None: all are 1
    centres: np.ndarray | None = None
    tops: Sequence[np.ndarray] | None = None  # float32 (16,), one a row
    fresh: bool = True
    column: int = 0  # vectors


def addresses(rows: Sequence[np.ndarray]) -> np.ndarray:
    assert all(row.dtype == np.float32 and row.flags.c_contiguous for row in rows)
    return np.array([row.ctypes.data for row in rows], np.int64)


def multiply_codes(coded: Coded, call: Call, rows: int, vectors: int, first_vector: int = 0, part: int = 0) -> None:
    """So many of the rows and vectors of a call, by the microkernel; targets and tops are changed in place."""
    steps = coded.codes.shape[2]
    assert call.a.dtype == np.int16 and call.a.shape[1] == steps
    pairs = np.ascontiguousarray(call.a.reshape(-1, 2, steps // 2).swapaxes(1, 2))
    targets = addresses(call.targets)
    tops = None if call.tops is None else addresses(call.tops)
    scales, centres = call.scales, call.centres
    _multiply_codes(
        coded.bits, pairs.ctypes.data, pairs.strides[0], *coded.arguments(first_vector, part), steps // 2, rows, vectors,
        targets.ctypes.data, 64 * call.column, int(call.fresh), call.factors.ctypes.data, call.offsets.ctypes.data,
        0 if scales is None else scales.ctypes.data, 0 if centres is None else centres.ctypes.data,
        0 if scales is None else 64, 0 if tops is None else tops.ctypes.data,
    )  # fmt: skip


def exact_sums(coded: Coded, a: np.ndarray, part: int = 0) -> np.ndarray:
    """Sums of a (rows, steps) times the codes of one part, int64 (rows, vectors, 16 lanes)."""
    return np.einsum("ri,vil->rvl", a.astype(np.int64), coded.codes[:, part].astype(np.int64))


def plain_sums(
    coded: Coded, a: np.ndarray, rows: int, vectors: int, first_vector: int = 0, part: int = 0
) -> np.ndarray:
    """The kernel's sums as they are: float32 (rows, vectors, 16); what it does not write is 7."""
    found = np.full((len(a), len(coded.codes), 16), 7, np.float32)
    call = Call(a, found, np.ones(len(a), np.float32), np.zeros(len(a), np.float32))
    multiply_codes(coded, call, rows, vectors, first_vector, part)
    return found


def wanted_sums(
    coded: Coded, a: np.ndarray, rows: int, vectors: int, first_vector: int = 0, part: int = 0
) -> np.ndarray:
    """The same, from exact sums."""
    want = np.full((len(a), len(coded.codes), 16), 7, np.float32)
    exact = exact_sums(coded, a[:rows], part)[:, first_vector : first_vector + vectors]
    want[:rows, :vectors] = exact.astype(np.float32)
    return want


def random_factors(rng: np.random.Generator, rows: int, steps: int) -> np.ndarray:
    """Any 16-bit factors; the first row has the largest ones."""
    a = rng.integers(-32767, 32768, (rows, steps)).astype(np.int16)
    a[0] = 32767
    return a


def wrong_code_products() -> list[str]:
    """Sums of codes that are not exact, or that are written where they do not belong, for every number of rows."""
    rng = np.random.default_rng(16)
    wrong: list[str] = []
    for bits, pairs, parts in itertools.product(BITS, (8, 24, 128), (1, 3)):
        coded = Coded.random(rng, bits, 5, parts, 2 * pairs)
        a = random_factors(rng, max(counts()["rows"]), 2 * pairs)
        for rows, vectors, part in itertools.product(counts()["rows"], (1, 2, 5), range(parts)):
            shape = rows, vectors, 0, part
            if not np.array_equal(plain_sums(coded, a, *shape), wanted_sums(coded, a, *shape)):
                wrong.append(f"{bits} bits, {pairs} pairs, part {part} of {parts}, {rows} rows, {vectors} vectors")
    return wrong


def summary() -> dict[str, Any]:
    """What another process can tell of its CPU."""
    return {"counts": counts(), "products": wrong_code_products() + wrong_dense_products()}
