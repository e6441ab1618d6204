"""Whether the answer depends on how a prompt was cut: read at once, in pieces and token by token, logit by logit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...engine.policy import CachePolicy
from ...engine.session import Session
from ...models.check import shown
from ...models.errors import UsageError
from ...models.linear import FloatLinear
from ...models.load import Model

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CutDifference:
    """Where logits of a prompt that was cut differ from those of the prompt read at once.

    Attributes:
        cut: "in pieces" or "token by token".
        position: the first token at which they do; ``rows`` is how many there are, of ``tokens``.
        largest: largest difference of a logit, and ``top1`` how many tokens have another likeliest one.

    """

    cut: str
    position: int
    rows: int
    tokens: int
    largest: float
    top1: int

    def __str__(self) -> str:
        return (
            f"read {self.cut}, a prompt of {self.tokens} tokens has other logits than read at once: from position "
            f"{self.position} on, at {self.rows} of them, by up to {self.largest:.6g}; the likeliest token is another at "
            f"{self.top1}"
        )


def cut_difference(
    model: Model, policy: CachePolicy, ids: Sequence[int], cuts: Sequence[int], *, tolerance: float = 0.0
) -> CutDifference | None:
    """Read a prompt at once, in pieces and token by token, and compare the logits of every token with the first way's.

    Args:
        model, policy: of the three sessions.
        ids: the prompt, at least two tokens.
        cuts: positions, ascending, at which the pieces begin, from 1 to len(ids) - 1.
        tolerance: largest difference of a logit that is none; at 0 the bits must be the same.

    Returns:
        The first way that differs, or None.

    Raises:
        UsageError: cuts or a tolerance that are none; a tolerance of 0 for weights in float32, which BLAS multiplies.
        PromptError: ids that are none, or too many.

    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance must be a finite number, 0 or more, found {shown(tolerance)}")
    session = Session(model, policy, chunk=max(len(ids), 1))
    checked = session.check_fits(np.asarray(ids))
    n = len(checked)
    starts = [0, *cuts, n]
    if not cuts or not all(type(x) is int for x in cuts) or any(a >= b for a, b in pairwise(starts)):
        raise UsageError(f"cuts must be ascending positions from 1 to {n - 1}, at least one, found {shown(list(cuts))}")
    if not tolerance and any(isinstance(x, FloatLinear) for x in model.transformer.weights.linears()):
        raise UsageError(
            "weights in float32 go through BLAS, whose sums depend on the number of rows: load the model with weights "
            "'q8', or give a tolerance above 0"
        )
    expected = session.forward(checked, "all")
    assert expected is not None
    for cut, pieces in (("in pieces", list(pairwise(starts))), ("token by token", [(i, i + 1) for i in range(n)])):
        found = _differences(cut, expected, _read(Session(model, policy, chunk=n), checked, pieces), tolerance)
        if found is not None:
            return found
    return None


def _read(session: Session, ids: NDArray[np.int64], pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Float32]]:
    """Where each piece begins, and its logits."""
    for start, stop in pieces:
        logits = session.forward(ids[start:stop], "all")
        assert logits is not None
        yield start, logits


def _differences(
    cut: str, expected: Float32, pieces: Iterator[tuple[int, Float32]], tolerance: float
) -> CutDifference | None:
    rows, top1, largest = [], 0, 0.0
    for start, logits in pieces:
        beside = expected[start : start + len(logits)]
        with np.errstate(invalid="ignore"):  # -inf - -inf, where both are the same
            apart = np.where(beside == logits, 0.0, np.abs(beside.astype(np.float64) - logits))
        changed = (beside.view(np.uint32) != logits.view(np.uint32)) if not tolerance else apart > tolerance
        rows += (start + np.flatnonzero(changed.any(axis=1))).tolist()
        top1 += int((beside.argmax(axis=1) != logits.argmax(axis=1)).sum())
        largest = max(largest, float(apart.max()))
    return CutDifference(cut, rows[0], len(rows), len(expected), largest, top1) if rows else None
