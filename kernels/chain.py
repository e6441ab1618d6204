"""Links and chains of linear layers, as ``run_chain`` takes them (project.py)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .activations import GROUP_NBYTES, SILU
from .crew import TASK_NBYTES
from .dots import GROUP, TILE_ROWS
from .jit import kernel
from .project import (
    ALL_BLOCKS,
    ATTEND,
    BIAS,
    BY_ROW,
    COLUMNS,
    EPS,
    FIRST_CHANNEL,
    GATE,
    HAS_CODES,
    HAS_FLOATS,
    HEAD_DIM,
    HEADS,
    HOW,
    LAYER,
    LINK_FIELDS,
    LINK_TASKS,
    MULTIPLY_KERNEL,
    N_PARTS,
    NORM_WEIGHT,
    ONTO,
    OUT_COLUMNS,
    OWN_BUFFERS,
    PART_FIELDS,
    PREPARE_KERNEL,
    ROTARY_DIM,
    ROW_KERNEL,
    ROWS,
    SOURCE,
    TARGET,
    follow_chain,
    multiply_blocks,
    normalize_rows,
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
        how: what is done with the input first: PLAIN, NORM or a gate (activations.py).
        norm_weight: float32 (columns,), for NORM; eps: its epsilon.

    Attributes:
        rows, columns: of all parts together.
        in_columns: of the input: twice the columns for a gate.

    """

    def __init__(
        self, parts: Sequence[Matrix], bias: Float32 | None, how: int, norm_weight: Float32 | None, eps: float
    ) -> None:
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns
        self.in_columns = self.columns * (2 if how >= SILU else 1)
        padded = _padded(np.zeros(0, np.float32) if norm_weight is None else norm_weight, self.columns)
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

    def __call__(self, x: Float32, workers: int) -> Float32:
        """X float32 (T, in_columns), C order, to float32 (T, rows).

        Raises:
            ValueError: an x that does not fit.

        """
        if x.ndim != 2 or x.shape[1] != self.in_columns or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x must be C-ordered float32 (T, {self.in_columns}), found {x.dtype} {x.shape}")
        out = np.empty((len(x), self.rows), np.float32)
        room = np.empty(room_nbytes(self._alone, len(x)), np.uint8)
        if len(x):
            tasks, addresses = chain_addresses(1, room, [x, out])
            run_chain(self._alone, 0, addresses, len(x), workers)
            del tasks, room  # in use until here
        return out

    def take(self, ids: NDArray[np.int64], out: Float32) -> None:
        """Rows of the matrix, which has one part, as float32 into ``out`` (len(ids), columns), C order."""
        if out.shape != (len(ids), self.columns) or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-ordered float32 {(len(ids), self.columns)}, found {out.dtype} {out.shape}")
        if not take_rows(self._alone, ids, out):
            raise ValueError(f"ids must be from 0 to {self.rows - 1}, found {ids.min()} to {ids.max()}")


@kernel
def address_of(array):  # type: ignore[no-untyped-def]
    """Where an array begins; NumPy takes ten times as long to say so."""
    return array.ctypes.data


def rotation(turns: int, buffer: int, heads: int, head_dim: int, rotary_dim: int, width: int) -> list[int]:
    """A row of a chain's table: rotary embedding of the first heads in a buffer whose rows are ``width`` wide.

    turns: the buffer of cosines and sines, rows of ``rotary_dim``.
    """
    fields = [0] * LINK_FIELDS
    fields[HOW], fields[SOURCE], fields[TARGET], fields[OUT_COLUMNS] = BY_ROW, turns, buffer, width
    fields[HEADS], fields[HEAD_DIM], fields[ROTARY_DIM] = heads, head_dim, rotary_dim
    fields[ROW_KERNEL] = rotate_rows.address()
    return fields


def attention(layer: int, source: int, target: int) -> list[int]:
    """A row of a chain's table: the attention of a layer, as ATTENTIONS describes it (project.py)."""
    fields = [0] * LINK_FIELDS
    fields[HOW], fields[SOURCE], fields[TARGET], fields[LAYER] = ATTEND, source, target, layer
    return fields


class Normalization:
    """RMSNorm of runs of channels, as a chain takes it: from one buffer into another of the same width, or onto it.

    It keeps what its addresses point to.

    Args:
        weight: float32 (size,), the same for each run.
        eps: its epsilon.
        first: the channel that the first run begins at.
        count: how many follow one another.
        width: of the buffers' rows.

    """

    def __init__(self, weight: Float32, eps: float, first: int, count: int, width: int) -> None:
        self._weight = _padded(weight, len(weight))
        fields = [0] * LINK_FIELDS
        fields[HOW], fields[HEADS], fields[HEAD_DIM], fields[FIRST_CHANNEL] = BY_ROW, count, len(weight), first
        fields[OUT_COLUMNS], fields[NORM_WEIGHT] = width, self._weight.ctypes.data
        fields[EPS], fields[ROW_KERNEL] = int(np.float32(eps).view(np.uint32)), normalize_rows.address()
        self._fields = fields

    def link(self, source: int, target: int, *, onto: bool = False) -> list[int]:
        """A row of a chain's table: from one buffer into another, or added to what it holds."""
        fields = self._fields.copy()
        fields[SOURCE], fields[TARGET], fields[ONTO] = source, target, onto
        return fields


def _padded(weight: Float32, columns: int) -> Float32:
    padded = np.zeros(-(-columns // GROUP) * GROUP, np.float32)
    padded[: len(weight)] = weight
    return padded


def chain_addresses(links: int, room: NDArray[np.uint8], buffers: Sequence[Float32]) -> tuple[Int64, Int64]:
    """What a chain of so many links or fewer runs on: memory for its tasks, which is to be kept, and all addresses."""
    tasks = np.empty(LINK_TASKS * links * TASK_NBYTES // 8 + 8, np.int64)
    at = -(-tasks.ctypes.data // 64) * 64
    return tasks, np.array([follow_chain.address(), at, 0, room.ctypes.data, *(x.ctypes.data for x in buffers)])


def chain_table(links: Sequence[list[int]]) -> Int64:
    """The table of a chain: its links, filled up to the longest, the first of two told of a gate between them (GATE)."""
    table = np.zeros((len(links), max(map(len, links))), np.int64)
    for row, fields in zip(table, links, strict=True):
        row[: len(fields)] = fields
    for row, following in zip(table[:-1], table[1:], strict=True):
        if _makes_ready(row, following):
            row[GATE] = following[HOW]
    return table


def _makes_ready(link: Int64, following: Int64) -> bool:
    """Whether a link, of codes, is gate and up of what comes next, of codes: one matrix, or each of them one."""
    products = link[N_PARTS] in (1, 2) and following[N_PARTS] > 0 and link[TARGET] == following[SOURCE]
    if not products or not SILU <= following[HOW] < BY_ROW or link[HOW] >= SILU or link[BIAS] or link[ONTO]:
        return False
    rows, width = link[LINK_FIELDS + ROWS :: PART_FIELDS][: link[N_PARTS]], following[COLUMNS]
    halves = bool((rows * link[N_PARTS] == 2 * width).all()) and width % GROUP == 0
    return halves and not (link[HAS_FLOATS] or following[HAS_FLOATS])


def room_nbytes(table: Int64, rows: int) -> int:
    """Bytes that the room of a chain must have for so many rows made ready and what comes of a gate; one row needs none."""
    if rows <= 1:
        return 1
    n_tiles, groups = -(-rows // TILE_ROWS), -(-table[:, COLUMNS] // GROUP)
    codes, floats = GROUP_NBYTES * table[:, HAS_CODES], 4 * TILE_ROWS * GROUP * table[:, HAS_FLOATS]
    each = n_tiles * groups * (codes + floats)
    return int((each + np.append(np.where(table[:-1, GATE] != 0, each[1:], 0), 0)).max()) + 64
