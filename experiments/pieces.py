"""What an experiment has in common (``Setting``), and the pieces of texts that it is made on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.errors import PromptError, UsageError
from ..models.limits import MAX_CONTINUATION
from .evaluate import REGIMES
from .keys import ids_digest

DEFAULT_TOKENS = 2048  # of the default text


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells of an experiment have in common.

    Attributes:
        model: what ``load`` takes.
        weights, reference_weights: formats; the same one is loaded once, for both.
        tokens: of a piece; None for the whole text.
        first: what is predicted from before this position is not compared.
        regime: "chunked", "decode", or "both": as chunked, and checked to be the same as decode.
        shadow: also find the local errors of each layer and head, in a pass of its own.
        continuation: tokens to generate behind the piece, greedily; 0 for none.

    """

    model: str = "smollm2"
    weights: str = "f32"
    reference_weights: str = "f32"
    tokens: int | None = None
    first: int = 0
    regime: str = "chunked"
    shadow: bool = False
    continuation: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 2:
            raise UsageError(f"--tokens must be 2 or more, found {self.tokens}")
        if self.first < 0:
            raise UsageError(f"--first must be 0 or more, found {self.first}")
        if self.regime not in (*REGIMES, "both"):
            raise UsageError(f"--regime must be one of {', '.join(REGIMES)}, both, found {self.regime}")
        if not 0 <= self.continuation <= MAX_CONTINUATION:
            raise UsageError(f"--continue must be from 0 to {MAX_CONTINUATION}, found {self.continuation}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, as token ids."""

    document: str
    seed: int
    start: int
    ids: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the ids' SHA-256."""
        return ids_digest(self.ids)


def piece(document: str, ids: Sequence[int], setting: Setting, seed: int, context: int, bos: int | None) -> Piece:
    """The piece of a document that a seed stands for: 0 for its beginning, others for a place drawn by that number.

    Args:
        document: its name.
        ids: of all of it, with the model's token for the beginning of a text where it wants one. So has every piece.
        setting: says how many tokens.
        seed: 0 or more.
        context: of the model.
        bos: that token's id, or None.

    Raises:
        PromptError: fewer tokens than are wanted, or more than the context holds.
        UsageError: a seed for a whole text, or a first position behind it.

    """
    if seed and setting.tokens is None:
        raise UsageError(f"--seed {seed} has no effect on a whole text: --tokens says how long a piece is")
    n, room = setting.tokens, context - setting.continuation
    if n is None and len(ids) > room:
        raise PromptError(
            f"{document}: the text has {len(ids)} tokens, the context {context}"
            + (f", {setting.continuation} of them to be generated" if setting.continuation else "")
            + ": --tokens takes the first of them"
        )
    n = min(n or len(ids), len(ids)) if seed == 0 else n or len(ids)
    if n > room:
        raise PromptError(
            f"{n} tokens do not fit into the context of {context}"
            + (f" with {setting.continuation} to be generated" if setting.continuation else "")
        )
    if n > len(ids):
        raise PromptError(f"{document}: the text has {len(ids)} tokens, fewer than the {n} asked for")
    if n < 2:
        raise PromptError(f"at least 2 tokens are needed, of which the second is predicted, found {n}")
    if setting.first > n - 2:
        raise UsageError(f"first must be from 0 to {n - 2}, so that a token is predicted, found {setting.first}")
    start = int(np.random.default_rng(seed).integers(0, len(ids) - n + 1)) if seed else 0
    own = np.array(ids[start : start + n], np.int64)
    if bos is not None and ids[0] == bos:
        own[0] = bos
    return Piece(document, seed, start, own)
