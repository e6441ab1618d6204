"""What happens between two attentions: linear layers, additions and rotations, on the buffers of one pass.

Layers of packed weights that follow one another are one call of the kernels; layers of float32 go through NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels.chain import chain_table, rotation
from ..kernels.project import OWN_BUFFERS, run_chain
from ..kernels.rotary import rotate
from ..kernels.threads import get_num_threads
from .linear import Linear, PackedLinear

Float32 = NDArray[np.float32]


class Buffers:
    """The arrays of one pass of some rows: float32 (rows, width) for each of ``widths``, numbered from 0.

    cos, sin: float32 (rows, head_dim / 2). room_nbytes: what the chains need besides.
    """

    def __init__(self, rows: int, widths: Sequence[int], cos: Float32, sin: Float32, room_nbytes: int) -> None:
        self.arrays = [np.empty((rows, width), np.float32) for width in widths]
        self.cos, self.sin = np.ascontiguousarray(cos), np.ascontiguousarray(sin)
        self._room = np.empty(room_nbytes, np.uint8)
        self.rows, self.threads = rows, get_num_threads()
        own = self._room.ctypes.data, self.cos.ctypes.data, self.sin.ctypes.data
        self.addresses = np.array([*own, *(x.ctypes.data for x in self.arrays)])


@dataclass(frozen=True, slots=True)
class Apply:
    """A linear layer from one buffer into another, or ``onto`` what it holds."""

    linear: Linear
    source: int
    target: int
    onto: bool = False

    def __call__(self, buffers: Buffers) -> None:
        """Run it in NumPy."""
        y, target = self.linear(buffers.arrays[self.source]), buffers.arrays[self.target]
        if self.onto:
            target += y
        else:
            target[:] = y


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotary embedding of the first ``heads`` of ``all_heads`` heads in a buffer."""

    buffer: int
    heads: int
    all_heads: int
    head_dim: int

    def __call__(self, buffers: Buffers) -> None:
        """Run it alone."""
        x = buffers.arrays[self.buffer].reshape(buffers.rows, self.all_heads, self.head_dim)
        rotate(x, self.heads, buffers.cos, buffers.sin)


class Chain:
    """Links that run one after the other on the same buffers."""

    def __init__(self, links: Sequence[Apply | Rotate]) -> None:
        self._packed = [link for link in links if _is_packed(link)]
        self._runs: list[NDArray[np.int64] | Apply | Rotate] = []
        rows: list[list[int]] = []
        for link in links:
            if _is_packed(link) or (isinstance(link, Rotate) and rows):
                rows.append(_row(link))
                continue
            self._runs += [chain_table(rows), link] if rows else [link]
            rows = []
        if rows:
            self._runs.append(chain_table(rows))

    @property
    def regions(self) -> int:
        """Parallel regions of one row."""
        return len(self._packed)

    def room_nbytes(self, rows: int) -> int:
        """Bytes that the buffers' room must have for so many rows."""
        return max([1, *(link.linear.projection.room_nbytes(rows) for link in self._packed)])  # type: ignore[union-attr]

    def __call__(self, buffers: Buffers) -> None:
        """Run all links."""
        threads = buffers.threads
        for run in self._runs:
            if isinstance(run, np.ndarray):
                run_chain(run, buffers.addresses, buffers.rows, threads, threads, threads)
            else:
                run(buffers)


def _is_packed(link: Apply | Rotate) -> bool:
    return isinstance(link, Apply) and isinstance(link.linear, PackedLinear)


def _row(link: Apply | Rotate) -> list[int]:
    """The link as the kernels take it."""
    if isinstance(link, Rotate):
        return rotation(OWN_BUFFERS + link.buffer, link.heads, link.head_dim, link.all_heads)
    assert isinstance(link.linear, PackedLinear)
    return link.linear.projection.link(OWN_BUFFERS + link.source, OWN_BUFFERS + link.target, onto=link.onto)
