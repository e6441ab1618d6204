"""What happens between two attentions, or in all layers: links from one buffer of a pass into another.

Links of packed weights, and what is done row by row, that follow one another are one call of the kernels; layers of float32
go through NumPy, and experts choose their rows one layer at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.chain import Normalization, address_of, attention, chain_addresses, chain_table, room_nbytes, rotation
from ..kernels.crew import ALL_WORKERS
from ..kernels.project import OWN_BUFFERS, run_chain
from .experts import Experts
from .linear import Linear, Norm, PackedLinear

Float32 = NDArray[np.float32]


class Buffers:
    """The arrays of one pass of some rows: float32 (rows, width) for each of ``widths``, numbered from 0.

    links, room_nbytes: of the longest chain, and what the chains need besides.
    """

    def __init__(self, rows: int, widths: Sequence[int], links: int, room_nbytes: int) -> None:
        self.arrays = [np.empty((rows, width), np.float32) for width in widths]
        self._room = np.empty(room_nbytes, np.uint8)
        self.rows = rows
        self._tasks, self.addresses = chain_addresses(links, self._room, self.arrays)

    def replace(self, which: int, array: Float32) -> None:
        """Take another array, float32 (rows, any), C order, in the place of one."""
        self.arrays[which] = array
        self.addresses[OWN_BUFFERS + which] = address_of(array)


class Link(Protocol):
    """A step of a chain."""

    def row(self) -> list[int] | None:
        """It as the kernels take it (kernels/chain.py), or None where they cannot."""

    def __call__(self, buffers: Buffers) -> None:
        """Run it without them; of a link that they can run, never called."""


@dataclass(frozen=True, slots=True)
class Apply:
    """A linear layer, or experts, from one buffer into another, or ``onto`` what it holds."""

    linear: Linear | Experts
    source: int
    target: int
    onto: bool = False

    def row(self) -> list[int] | None:
        """See ``Link``."""
        if not isinstance(self.linear, PackedLinear):
            return None
        return self.linear.projection.link(OWN_BUFFERS + self.source, OWN_BUFFERS + self.target, onto=self.onto)

    def __call__(self, buffers: Buffers) -> None:
        """See ``Link``."""
        y, target = self.linear(buffers.arrays[self.source]), buffers.arrays[self.target]
        if self.onto:
            target += y
        else:
            target[:] = y


@dataclass(frozen=True, slots=True)
class Attend:
    """The attention of a layer, from one buffer into another, where the kernels run all layers in one go."""

    layer: int
    source: int
    target: int

    def row(self) -> list[int] | None:
        """See ``Link``."""
        return attention(self.layer, OWN_BUFFERS + self.source, OWN_BUFFERS + self.target)

    def __call__(self, buffers: Buffers) -> None:
        """See ``Link``."""
        raise AssertionError("the kernels run it")


class ByRow:
    """What the kernels do with each row by itself; links of this kind keep what their addresses point to."""

    def __init__(self, fields: list[int], kept: object = None) -> None:
        self._fields, self._kept = fields, kept

    def row(self) -> list[int] | None:
        """See ``Link``."""
        return self._fields

    def __call__(self, buffers: Buffers) -> None:
        """See ``Link``."""
        raise AssertionError("the kernels run it")


def rotate(turns: int, buffer: int, heads: int, head_dim: int, rotary_dim: int, width: int) -> ByRow:
    """Rotary embedding of the first ``heads`` heads in a buffer, by the cosines and sines in another."""
    return ByRow(rotation(OWN_BUFFERS + turns, OWN_BUFFERS + buffer, heads, head_dim, rotary_dim, width))


def normalize(
    norm: Norm, source: int, target: int, width: int, *, first: int = 0, count: int = 1, onto: bool = False
) -> ByRow:
    """A norm of ``count`` runs of channels from ``first`` on, each as long as its weight, into a buffer as wide."""
    kept = Normalization(norm.weight, norm.eps, first, count, width)
    return ByRow(kept.link(OWN_BUFFERS + source, OWN_BUFFERS + target, onto=onto), kept)


class Chain:
    """Links that run one after the other on the same buffers."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._runs: list[NDArray[np.int64] | Link] = []
        self._links = list(links)  # what they keep
        rows: list[list[int]] = []
        for link in links:
            if (row := link.row()) is not None:
                rows.append(row)
                continue
            self._runs += [chain_table(rows), link] if rows else [link]
            rows = []
        if rows:
            self._runs.append(chain_table(rows))

    @property
    def handovers(self) -> int:
        """How often one row is handed from all workers to all workers: the links that the kernels run."""
        return sum(len(run) for run in self._runs if isinstance(run, np.ndarray))

    @property
    def table(self) -> NDArray[np.int64] | None:
        """All links as the kernels take them; None where some of them cannot be."""
        only = self._runs[0]
        return only if len(self._runs) == 1 and isinstance(only, np.ndarray) else None

    @property
    def links(self) -> int:
        """How many links it has."""
        return len(self._links)

    def room_nbytes(self, rows: int) -> int:
        """Bytes that the buffers' room must have for so many rows."""
        return max([1, *(room_nbytes(run, rows) for run in self._runs if isinstance(run, np.ndarray))])

    def __call__(self, buffers: Buffers) -> None:
        """Run all links."""
        for run in self._runs:
            if isinstance(run, np.ndarray):
                run_chain(run, 0, buffers.addresses, buffers.rows, ALL_WORKERS)
            else:
                run(buffers)
