"""The MLP of a layer, and a mixture of experts: a few small MLPs that a router chooses for each token, added up.

A token's experts are added in the order of their numbers, so its bits do not depend on the tokens beside it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .linear import Linear

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MLP:
    """down(act(gate) * up). A norm may belong to gate_up, which it stands in front of; the gate belongs to down."""

    gate_up: Linear
    down: Linear

    @property
    def nbytes_a_token(self) -> int:
        """Bytes of weights that one token reads."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True)
class Experts:
    """All experts of a layer.

    Attributes:
        router: to a logit for each expert, (T, E) to (T, n).
        experts: all of them.
        chosen: how many see a token.
        normalized: the softmax is over the logits of those alone (so weights add up to 1), else over all.

    """

    router: Linear
    experts: list[MLP]
    chosen: int
    normalized: bool

    @property
    def nbytes_a_token(self) -> int:
        """Bytes of weights that one token reads: the router, and as many experts as see it."""
        every = sum(expert.nbytes_a_token for expert in self.experts)
        return self.router.nbytes + every * self.chosen // len(self.experts)

    def __call__(self, x: Float32) -> Float32:
        """What a layer adds to x (T, E)."""
        who, weights = self.route(x)
        out = np.zeros_like(x)
        for expert in np.unique(who).tolist():
            rows, place = np.nonzero(who == expert)
            own = self.experts[expert]
            out[rows] += weights[rows, place, None] * own.down(own.gate_up(np.ascontiguousarray(x[rows])))
        return out

    def route(self, x: Float32) -> tuple[NDArray[np.int64], Float32]:
        """Which experts see each token, and with what weights: (T, chosen) each; of equal logits the first expert wins."""
        logits = self.router(x)
        who = np.argsort(-logits, axis=1, kind="stable")[:, : self.chosen]
        best = np.take_along_axis(logits, who, axis=1)
        powers = np.exp(best - best[:, :1])
        whole = powers if self.normalized else np.exp(logits - best[:, :1])
        return who, powers / whole.sum(axis=1, keepdims=True)
