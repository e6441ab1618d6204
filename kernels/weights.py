"""How weight matrices lie in memory: 16 rows side by side, so that one vector holds a number of each.

    codes of 8 or 4 bits   [blocks of 16 rows] of [units] of [scales][minima][codes]
        a unit             one group with minima, or two without, whose scales fill a cache line too; the last may be a half
        scales, minima     [groups of the unit][16 rows] float16, 64 bytes
        8 bits             [8 words][16 rows] of 32 bits: bytes without a sign, code + 128, four columns a word
        4 bits             [4 words][16 rows]: the lower half of byte b of word w is column 4 w + b, the upper 16 + 4 w + b
    float16, bfloat16, float32    [blocks of 16 rows][columns][16 rows]

What is used together lies together: a block is read as one run of memory, which AMD's processors fetch ahead by themselves.
With all scales of a block before its codes they did not, and the matrices of a token took 1.2 to 1.3 times as long.

A group is 32 columns. A value is ``scale * (code - middle)``, or ``scale * code + minimum``. Rows are filled up to 16 and
columns to 32 with zeros.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import simd
from .dots import GROUP
from .jit import inner
from .memory import large_pages
from .simd import LANES

Bytes = NDArray[np.uint8]

W8, W4, W4M, WBF16, WF16, WF32 = range(6)
NAMES = ("q8", "q4", "q4 with minima", "bf16", "f16", "f32")
CODE_BITS = {W8: 8, W4: 4, W4M: 4}
DENSE = {WBF16: np.dtype(ml_dtypes.bfloat16), WF16: np.dtype(np.float16), WF32: np.dtype(np.float32)}
PARAMS_NBYTES = 64  # of a unit
UNIT_GROUPS = {W8: 2, W4: 2, W4M: 1}


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a matrix as codes, row after row: what files hold, before ``pack``.

    Attributes:
        kind: W8 (signed bytes), W4 (codes less 8) or W4M.
        words: uint32 (rows, groups, 8 or 4), the bytes of a group in order; for 4 bits column c < 16 is the lower half of
            byte c, column 16 + c the upper half.
        scales, minima: float16 (rows, groups); minima are None but for W4M.

    """

    kind: int
    words: NDArray[np.uint32]
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None

    def take(self, order: NDArray[np.int64] | slice) -> "CodedRows":
        """Some of the rows, in some order; those of a slice are views."""
        minima = None if self.minima is None else self.minima[order]
        return CodedRows(self.kind, self.words[order], self.scales[order], minima)


Stored = CodedRows | NDArray[np.generic]
"""What a file holds of a matrix: codes, or an array (rows, columns) of float32, float16 or bfloat16."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix. ``data`` is uint8, aligned to 64 bytes; ``block_nbytes`` is the size of 16 rows in it."""

    kind: int
    rows: int
    columns: int
    data: Bytes
    block_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, padding included."""
        return self.data.nbytes

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows, the last one maybe padded."""
        return -(-self.rows // LANES)


def block_nbytes(kind: int, columns: int) -> int:
    """Bytes of a block of 16 rows."""
    if kind in DENSE:
        return columns * LANES * DENSE[kind].itemsize
    groups = -(-columns // GROUP)
    return -(-groups // UNIT_GROUPS[kind]) * PARAMS_NBYTES + groups * GROUP * LANES * CODE_BITS[kind] // 8


def empty_matrix(kind: int, rows: int, columns: int) -> Matrix:
    """A matrix of zeros."""
    size = block_nbytes(kind, columns)
    return Matrix(kind, rows, columns, large_pages.zeros(-(-rows // LANES) * size), size)


def store_coded(matrix: Matrix, first: int, source: CodedRows) -> None:
    """Write rows ``first`` and following, which begin a block, from what a file holds. The codes stay what they are."""
    rows, groups, n_words = source.words.shape
    begin, blocks = first // LANES, -(-rows // LANES)
    held = matrix.data.reshape(matrix.blocks, -1)[begin : begin + blocks]
    most = UNIT_GROUPS[matrix.kind]
    whole, start = groups - groups % most, 0
    for group, stop, each in ((0, whole, most), (whole, groups, 1)):  # the groups of whole units, and of a half
        units = (stop - group) // each
        nbytes = PARAMS_NBYTES + each * n_words * LANES * 4
        place = held[:, start : start + units * nbytes].reshape(blocks, units, nbytes)
        params = place[..., :PARAMS_NBYTES].view(np.float16).reshape(blocks, units, 2, LANES)
        _interleave(params[:, :, :each], source.scales[:, group:stop].reshape(rows, units, each))
        if source.minima is not None:
            _interleave(params[:, :, 1:], source.minima[:, group:stop].reshape(rows, units, 1))
        codes = place[..., PARAMS_NBYTES:].view(np.uint32).reshape(blocks, units, each, n_words, LANES)
        _interleave(codes, source.words[:, group:stop].reshape(rows, units, each, n_words))
        if matrix.kind == W8:
            np.bitwise_xor(codes, np.uint32(0x80808080), out=codes)
        start += units * nbytes


def _interleave(target: NDArray[np.generic], source: NDArray[np.generic]) -> None:
    """target[block, ..., lane] = source[16 * block + lane, ...]."""
    whole = len(source) // LANES
    inside = np.moveaxis(source[: whole * LANES].reshape(whole, LANES, *source.shape[1:]), 1, -1)
    target[:whole] = inside
    if whole < len(target):
        target[whole, ..., : len(source) - whole * LANES] = np.moveaxis(source[whole * LANES :], 0, -1)


def store_dense(matrix: Matrix, first: int, values: NDArray[np.generic]) -> None:
    """Write rows ``first`` and following, which begin a block, of numbers in the matrix's own type."""
    blocks = -(-len(values) // LANES)
    held = matrix.data.reshape(matrix.blocks, -1)[first // LANES : first // LANES + blocks]
    target = held.view(DENSE[matrix.kind]).reshape(blocks, matrix.columns, LANES)
    _interleave(target, values)


def code_rows(values: NDArray[np.float32], kind: int) -> CodedRows:
    """Round rows of float32 (rows, columns) to codes of ``kind``: W8 around 0, W4M between least and largest of a group.

    Raises:
        OverflowError: a scale or minimum beyond float16, or a value that is not a number.

    """
    rows, columns = values.shape
    groups = -(-columns // GROUP)
    padded = values if columns == groups * GROUP else np.pad(values, ((0, 0), (0, groups * GROUP - columns)))
    x = np.ascontiguousarray(padded, np.float32).reshape(rows, groups, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == W8:
            scales = (np.abs(x).max(axis=2) / np.float32(127)).astype(np.float16)
            low = np.zeros_like(scales)
        else:
            low = x.min(axis=2).astype(np.float16)
            scales = ((x.max(axis=2) - low.astype(np.float32)) / np.float32(15)).astype(np.float16)
    if not (np.isfinite(scales).all() and np.isfinite(low).all()):
        raise OverflowError(f"values up to {np.abs(values).max()}, whose scale is beyond float16")
    divisor = np.where(scales == 0, np.float32(np.inf), scales.astype(np.float32))[..., None]
    codes = np.rint((x - low.astype(np.float32)[..., None]) / divisor)
    if kind == W8:
        return CodedRows(W8, np.clip(codes, -127, 127).astype(np.int8).view(np.uint32), scales)
    codes = np.clip(codes, 0, 15).astype(np.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return CodedRows(W4M, packed.view(np.uint32), scales, low)


@inner
def row_of(kind, block, lane, columns, target):  # type: ignore[no-untyped-def]
    """One row of a block, as float32 at address ``target``. Addresses."""
    if kind > W4M:
        for c in range(columns):
            at = block + (c * LANES + lane) * (4 if kind == WF32 else 2)
            x = simd.scalar_at(at) if kind == WF32 else simd.bf16_at(at) if kind == WBF16 else simd.f16_at(at)
            simd.store_scalar(target + 4 * c, x)
        return
    n_words, middle = (8, np.float32(128)) if kind == W8 else (4, np.float32(8) if kind == W4 else np.float32(0))
    each = 1 if kind == W4M else 2
    for c in range(columns):
        group, b = c // GROUP, c % GROUP
        unit = block + group // each * (PARAMS_NBYTES + each * n_words * LANES * 4)
        scale = simd.f16_at(unit + 2 * (group % each * LANES + lane))
        minimum = simd.f16_at(unit + 2 * (LANES + lane)) if kind == W4M else np.float32(0)
        word, half = (b // 4, 0) if kind == W8 else (b % 16 // 4, b // 16)
        byte = simd.byte_at(unit + PARAMS_NBYTES + ((group % each * n_words + word) * LANES + lane) * 4 + b % 4)
        code = byte if kind == W8 else (byte >> (4 * half)) & 15
        simd.store_scalar(target + 4 * c, (np.float32(code) - middle) * scale + minimum)
