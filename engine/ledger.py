"""The attention-mass ledger: how much of each query's attention went to each segment, by layer and head.

A segment's share is S_j exp(M_j - M) / S: the sum of its softmax weights. The kernel leaves the state after each segment
(kernels/attention.py, LEDGER); a share is what a segment added to it. Nothing is computed before somebody asks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..models.errors import UsageError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class MassLedger:
    """Shares of the segments of all queries since it was begun, or since the position that it was cut back to.

    Attributes:
        names: of the segments, in the order of age: "sink", the tiers from the oldest, ..., "old2", "old", "recent".

    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._steps: list[tuple[int, int, list[Float32]]] = []  # first and last + 1 position, the states of each layer

    def add(self, position: int, states: list[Float32]) -> None:
        """States (segments, H, T, 2) after each segment, one a layer, of the T queries from a position on."""
        self._steps.append((position, position + states[0].shape[2], states))

    def truncate(self, position: int) -> None:
        """Forget the queries from a position on."""
        kept = []
        for first, stop, states in self._steps:
            if stop > position > first:
                states = [x[:, :, : position - first] for x in states]
            if first < position:
                kept.append((first, min(stop, position), states))
        self._steps = kept

    @property
    def positions(self) -> NDArray[np.int64]:
        """Of the queries, (T,)."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(first, stop) for first, stop, _ in self._steps)])

    def shares(self) -> Float64:
        """(T, layers, H, segments), adding up to 1 over the segments. A layer with fewer tiers has 0 for those it lacks.

        Raises:
            UsageError: no query has been entered.

        """
        if not self._steps:
            raise UsageError("the ledger has no queries yet")
        return np.concatenate([self._shares(states) for _, _, states in self._steps])

    def _shares(self, states: list[Float32]) -> Float64:
        layers = []
        for state in states:
            m, s = state[..., 0].astype(np.float64), state[..., 1].astype(np.float64)
            with np.errstate(invalid="ignore"):  # -inf - -inf where there was no key yet, and s is 0
                upto = np.where(s > 0, s * np.exp(m - m[-1]), 0) / s[-1]
            own = np.diff(upto, axis=0, prepend=0)  # (segments, H, T)
            lacking = len(self.names) - len(own)  # the oldest tiers, right behind the sinks
            layers.append(np.concatenate([own[:1], np.zeros((lacking, *own.shape[1:])), own[1:]]))
        return np.stack(layers).transpose(3, 0, 2, 1)

    def mean(self) -> dict[str, float]:
        """The mean share of each segment over all queries, layers and heads; UsageError where there is no query."""
        shares = self.shares().mean(axis=(0, 1, 2))
        return dict(zip(self.names, shares.tolist(), strict=True))
