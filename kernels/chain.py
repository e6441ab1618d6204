"""Links and chains of linear layers, as ``run_chain`` takes them (project.py)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .activations import GATE, GROUP_NBYTES
from .dots import GROUP, TILE_ROWS
from .project import (
    ALL_BLOCKS,
    BIAS,
    COLUMNS,
    EPS,
    HAS_CODES,
    HAS_FLOATS,
    HEAD_DIM,
    HEADS,
    HOW,
    LINK_FIELDS,
    MULTIPLY_KERNEL,
    N_PARTS,
    NORM_WEIGHT,
    ONTO,
    OUT_COLUMNS,
    OWN_BUFFERS,
    PREPARE_KERNEL,
    ROTATE,
    ROTATE_KERNEL,
    SOURCE,
    TARGET,
    multiply_blocks,
    prepare_rows,
    rotate_rows,
    run_chain,
    take_rows,
)
from .weights import CODE_BITS, Matrix

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class Projection:
    """One linear layer as the kernels take it. It keeps what its addresses point to.

    Args:
        parts: matrices of the same number of columns, whose rows follow one another.
        bias: float32, one for every row of all parts, or None.
        how: PLAIN, NORM or GATE: what is done with the input first (activations.py).
        norm_weight: float32 (columns,), for NORM; eps: its epsilon.

    Attributes:
        rows, columns: of all parts together.
        in_columns: of the input: twice the columns for GATE.

    """

    def __init__(
        self, parts: Sequence[Matrix], bias: Float32 | None, how: int, norm_weight: Float32 | None, eps: float
    ) -> None:
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns
        self.in_columns = self.columns * (2 if how == GATE else 1)
        padded = np.zeros(-(-self.columns // GROUP) * GROUP, np.float32)
        if norm_weight is not None:
            padded[: self.columns] = norm_weight
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        self._kept = list(parts), padded, bias
        first = np.cumsum([0, *(part.rows for part in parts)]).tolist()
        fields = [0] * LINK_FIELDS
        fields[HOW], fields[COLUMNS], fields[OUT_COLUMNS] = how, self.columns, self.rows
        fields[NORM_WEIGHT], fields[BIAS] = padded.ctypes.data, 0 if bias is None else bias.ctypes.data
        fields[EPS] = int(np.float32(eps).view(np.uint32))
        fields[HAS_CODES] = any(part.kind in CODE_BITS for part in parts)
        fields[HAS_FLOATS] = any(part.kind not in CODE_BITS for part in parts)
        fields[N_PARTS], fields[ALL_BLOCKS] = len(parts), sum(part.blocks for part in parts)
        fields[MULTIPLY_KERNEL], fields[PREPARE_KERNEL] = multiply_blocks.address(), prepare_rows.address()
        for i, part in enumerate(parts):
            fields += [part.kind, part.data.ctypes.data, part.block_nbytes, part.blocks, part.rows, first[i]]
        self._fields = fields
        self._alone = np.array([self.link(OWN_BUFFERS, OWN_BUFFERS + 1)], np.int64)

    def link(self, source: int, target: int, *, onto: bool = False) -> list[int]:
        """A row of a chain's table: from one buffer into another, or added to what it holds."""
        fields = self._fields.copy()
        fields[SOURCE], fields[TARGET], fields[ONTO] = source, target, onto
        return fields

    def room_nbytes(self, rows: int) -> int:
        """Bytes that so many rows made ready take."""
        groups, n_tiles = -(-self.columns // GROUP), -(-rows // TILE_ROWS)
        codes, floats = self._fields[HAS_CODES], self._fields[HAS_FLOATS]
        return n_tiles * groups * (GROUP_NBYTES * codes + TILE_ROWS * 4 * GROUP * floats) + 64

    def __call__(self, x: Float32, workers: int) -> Float32:
        """X float32 (T, in_columns), C order, to float32 (T, rows).

        Raises:
            ValueError: an x that does not fit.

        """
        if x.ndim != 2 or x.shape[1] != self.in_columns or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x must be C-ordered float32 (T, {self.in_columns}), found {x.dtype} {x.shape}")
        out = np.empty((len(x), self.rows), np.float32)
        room = np.empty(self.room_nbytes(len(x)) if len(x) > 1 else 1, np.uint8)
        if len(x):
            addresses = np.array([room.ctypes.data, 0, 0, x.ctypes.data, out.ctypes.data])
            run_chain(self._alone, addresses, len(x), workers, workers, workers)
        return out

    def take(self, ids: NDArray[np.int64], out: Float32) -> None:
        """Rows of the matrix, which has one part, as float32 into ``out`` (len(ids), columns), C order."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise ValueError(f"ids must be from 0 to {self.rows - 1}, found {ids.min()} to {ids.max()}")
        if out.shape != (len(ids), self.columns) or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-ordered float32 {(len(ids), self.columns)}, found {out.dtype} {out.shape}")
        take_rows(self._alone, ids, out)


def rotation(buffer: int, heads: int, head_dim: int, all_heads: int) -> list[int]:
    """A row of a chain's table: rotary embedding of the first of ``all_heads`` heads in a buffer."""
    fields = [0] * LINK_FIELDS
    fields[HOW], fields[TARGET], fields[COLUMNS] = ROTATE, buffer, head_dim * all_heads
    fields[HEADS], fields[HEAD_DIM], fields[ROTATE_KERNEL] = heads, head_dim, rotate_rows.address()
    return fields


def chain_table(links: Sequence[list[int]]) -> Int64:
    """The table of a chain: its links, filled up to the longest."""
    table = np.zeros((len(links), max(map(len, links))), np.int64)
    for row, fields in zip(table, links, strict=True):
        row[: len(fields)] = fields
    return table
