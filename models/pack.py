"""From the tensors of a file to linear layers, in the format that was asked for.

"auto" changes no number where the kernels know the stored format (gguf_blocks.CODE_KINDS, bfloat16, float16, float32), but
the scales of Q4_K, which become float16; float64 becomes float32, and what they do not know, Q6_K for example, is kept as
q8. Every other choice converts everything that is stored otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.simd import LANES
from ..kernels.weights import (
    DENSE,
    NAMES,
    W4,
    W4M,
    W8,
    WBF16,
    WF16,
    WF32,
    CodedRows,
    Matrix,
    Stored,
    block_nbytes,
    code_rows,
    empty_matrix,
    store_coded,
    store_dense,
)
from .check import check_finite, shown
from .errors import ModelError, UsageError
from .gguf_blocks import CODE_KINDS
from .linear import Before, FloatLinear, Linear, PackedLinear

Float32 = NDArray[np.float32]
WEIGHTS = ("auto", "f32", "bf16", "q8", "q4")
_STORED_AT_ONCE = 1 << 22  # bytes of codes
_KINDS = {"bf16": WBF16, "q8": W8, "q4": W4M}
_KNOWN = {"F32": None, "F64": None, "F16": WF16, "BF16": WBF16, **CODE_KINDS}


class TensorSource(Protocol):
    """What packing needs of a source of tensors."""

    def read(self, name: str) -> Float32:
        """One tensor as float32, C order."""

    def stored(self, name: str) -> Stored:
        """One matrix as the file holds it, if the kernels know how; else as float32."""

    def forget(self, name: str) -> None:
        """Give back the memory that reading a tensor took up."""


def check_weights_option(weights: str) -> str:
    """The weight format for an option; UsageError where it is not one."""
    if weights not in WEIGHTS:
        raise UsageError(f"weights must be one of {', '.join(WEIGHTS)}, found {weights!r}")
    return weights


def _kind(weights: str, stored_type: str) -> int | None:
    """The kernels' format for it; None is float32, which is packed only beside parts that are."""
    if weights == "f32":
        return None
    if weights == "auto":
        return _KNOWN.get(stored_type, W8)
    if weights == "q4" and stored_type == "Q4_0":
        return W4
    return _KINDS[weights]


class Packer:
    """Makes linear layers of a source's tensors.

    Args:
        source: the tensors.
        stored_types: how the file calls the type of each.
        shapes: of each.
        weights: one of WEIGHTS.
        checked: None, or where the tensors come from: then NaN and infinite values are refused.

    """

    def __init__(
        self,
        source: TensorSource,
        stored_types: Callable[[str], str],
        shapes: Callable[[str], tuple[int, ...]],
        weights: str,
        checked: str | None,
    ) -> None:
        self._source, self._type, self._shape = source, stored_types, shapes
        self._weights, self._checked = weights, checked

    def read(self, name: str) -> Float32:
        """One tensor as float32."""
        array = self._source.read(name)
        if self._checked is not None:
            check_finite(name, array, self._checked)
        self._source.forget(name)
        return array

    def linear(
        self, names: Sequence[str], *, biased: bool = False, before: Before = None, exact: bool = False
    ) -> Linear:
        """The layer whose rows are those of some matrices, one after the other.

        ``exact``: as float32 in the kernels' layout, whatever was asked for: no number is rounded, and a row's bits depend
        on no other row.
        """
        weights = [f"{name}.weight" for name in names]
        bias = np.concatenate([self.read(f"{name}.bias") for name in names]) if biased else None
        parts: list[Matrix] = []
        for kind, run in self._runs(weights, exact):
            if kind is None:
                return FloatLinear(self._floats(weights), bias, before)
            matrix = empty_matrix(kind, *self._whole_shape(run))
            first = 0
            for name in run:
                self._store(matrix, first, name)
                first += self._shape(name)[0]
            parts.append(matrix)
        return PackedLinear(parts, bias, before)

    def _runs(self, names: Sequence[str], exact: bool) -> Sequence[tuple[int | None, Sequence[str]]]:
        """Which matrices follow each other in one format; None is float32, row after row, and then it is all of them."""
        kinds = [_kind(self._weights, self._type(name)) for name in names]
        if set(kinds) == {None} and not exact:
            return [(None, names)]
        return _runs([WF32 if exact or kind is None else kind for kind in kinds], names, self._shape)

    def _whole_shape(self, names: Sequence[str]) -> tuple[int, int]:
        """Of matrices one below the other."""
        return sum(self._shape(name)[0] for name in names), self._shape(names[0])[1]

    def _floats(self, names: Sequence[str]) -> Float32:
        """Rows read straight into their place, so nothing is held twice."""
        rows = [self._shape(name)[0] for name in names]
        weight = np.empty(self._whole_shape(names), np.float32)
        for name, stop, count in zip(names, np.cumsum(rows), rows, strict=True):
            weight[stop - count : stop] = self.read(name)
        return weight

    def _store(self, matrix: Matrix, first: int, name: str) -> None:
        """One tensor into its rows of a matrix: as stored where that is the matrix's format, else converted."""
        stored = self._source.stored(name)
        if not isinstance(stored, CodedRows) or stored.kind != matrix.kind:
            if isinstance(stored, CodedRows):
                stored = self._source.read(name)
            if self._checked is not None:
                check_finite(name, np.asarray(stored, np.float32), self._checked)
            if matrix.kind in DENSE:
                with np.errstate(over="ignore"):
                    store_dense(matrix, first, stored.astype(DENSE[matrix.kind], copy=False))
                self._source.forget(name)
                return
            stored = self._coded(name, np.asarray(stored, np.float32), matrix.kind)
        elif self._checked is not None:
            for numbers in (stored.scales, stored.minima):
                if numbers is not None:
                    check_finite(name, numbers, self._checked)
        rows = max(_STORED_AT_ONCE // (stored.words[0].nbytes * LANES), 1) * LANES
        for begin in range(0, len(stored.words), rows):
            store_coded(matrix, first + begin, stored.take(slice(begin, begin + rows)))
            self._source.forget(name)  # what was read so far, or a large matrix would be in memory twice

    def _coded(self, name: str, values: Float32, kind: int) -> CodedRows:
        try:
            return code_rows(values, kind)
        except OverflowError as error:
            raise ModelError(f"tensor {shown(name)} cannot be kept in {NAMES[kind]}: {error}") from None


class Counter(Packer):
    """Stands in for a Packer, and only notes what it would keep: ``noted`` has (stored types, format, bytes)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[tuple[set[str], str, int]] = []

    def read(self, name: str) -> Float32:
        """Zeros in its shape."""
        return np.zeros(self._shape(name), np.float32)

    def linear(
        self, names: Sequence[str], *, biased: bool = False, before: Before = None, exact: bool = False
    ) -> Linear:
        """A layer without rows. A bias is not counted."""
        for kind, run in self._runs([f"{name}.weight" for name in names], exact):
            rows, columns = self._whole_shape(run)
            nbytes = 4 * rows * columns if kind is None else -(-rows // LANES) * block_nbytes(kind, columns)
            self.noted.append((set(map(self._type, run)), NAMES[WF32 if kind is None else kind], nbytes))
        return FloatLinear(np.empty((0, columns), np.float32))


def _runs(
    kinds: Sequence[int], names: Sequence[str], shape: Callable[[str], tuple[int, ...]]
) -> list[tuple[int, list[str]]]:
    """Neighbours of one format go into one matrix, as long as each ends with a whole block of rows."""
    runs: list[tuple[int, list[str]]] = []
    whole = False
    for kind, name in zip(kinds, names, strict=True):
        if runs and whole and runs[-1][0] == kind:
            runs[-1][1].append(name)
        else:
            runs.append((kind, [name]))
        whole = shape(name)[0] % LANES == 0
    return runs
