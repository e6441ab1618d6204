"""Session: one sequence of tokens on a model, with its cache. It owns the position; the layers do not."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..models.errors import NumericalError, PromptError, UsageError
from ..models.load import Model
from ..models.transformer import Step
from .cache import Cache
from .policy import CachePolicy

Float32 = NDArray[np.float32]
Rows = Literal["all", "last"] | None

CHUNK = 512  # tokens of one pass through the layers; what a query sees does not depend on it


class Session:
    """A sequence being read and written by a model, with its key-value cache.

    Args:
        model: what ``mixkv.load`` returned.
        policy: how the cache is kept; the default is 4 bits behind a window of 128 tokens.
        context: most tokens the session may hold; the model's own limit unless given.
        chunk: tokens processed in one pass; changes time and memory, not what a query sees.

    Raises:
        UsageError: a context or chunk out of range.

    """

    def __init__(
        self, model: Model, policy: CachePolicy | None = None, *, context: int | None = None, chunk: int = CHUNK
    ) -> None:
        limit = model.config.max_position_embeddings
        if context is not None and (type(context) is not int or not 1 <= context <= limit):
            raise UsageError(f"context must be from 1 to {limit} tokens (the model's limit), found {context!r}")
        if type(chunk) is not int or chunk < 1:
            raise UsageError(f"chunk must be a whole number, 1 or more, found {chunk!r}")
        self.model = model
        self.policy = CachePolicy() if policy is None else policy
        self.context = limit if context is None else context
        self.chunk = chunk
        self.position = 0
        self._in_flight = False
        config = model.config
        self.policy.check_model(config.num_hidden_layers, config.head_dim)
        self.cache = Cache(
            self.policy, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.context
        )

    def forward(
        self,
        token_ids: Sequence[int] | NDArray[np.integer],
        logits: Rows = "all",
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Float32 | None:
        """Run tokens through the model, behind those already in the session.

        Args:
            token_ids: (T,) integers, T >= 1.
            logits: "all" for (T, V) float32, "last" for (V,) of the last token, None for none.
            progress: called with the number of tokens done, after each chunk.

        Raises:
            PromptError: no token, an id outside of the vocabulary, or more tokens than the context holds.
            NumericalError: logits that are NaN or all -inf, or a value beyond the cache's dtype.

        An error or interrupt leaves the session where the last complete chunk ended.
        """
        if logits not in ("all", "last", None):
            raise UsageError(f"logits must be 'all', 'last' or None, found {logits!r}")
        ids = self.check_fits(token_ids)
        rows: list[Float32] = []
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            is_last = first + len(part) == len(ids)
            wanted: Rows = "all" if logits == "all" else ("last" if logits and is_last else None)
            result = self._step(part, wanted)
            if result is not None:
                rows.append(result)
            if progress is not None:
                progress(first + len(part))
        if logits == "last":
            return rows[0][0]
        return None if logits is None else np.concatenate(rows)

    def nbytes(self) -> dict[str, int]:
        """Bytes that the cache uses: {"sink", "old", "recent", "total"}."""
        return self.cache.nbytes()

    def check_fits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """The ids as int64 (T,), or PromptError where ``forward`` could not take them now."""
        ids = np.asarray(token_ids)
        if ids.size == 0:
            raise PromptError("the prompt is empty: at least one token is needed")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PromptError(f"token_ids must be a flat sequence of integers, found {ids.dtype} {ids.shape}")
        vocab = self.model.config.vocab_size
        if ids.min() < 0 or ids.max() >= vocab:
            bad = ids[(ids < 0) | (ids >= vocab)][0]
            raise PromptError(f"token id {bad} is outside of the vocabulary, 0 to {vocab - 1}")
        if self.position + len(ids) > self.context:
            raise PromptError(
                f"{len(ids)} tokens do not fit: {self.position} of the context's {self.context} are in use"
                if self.position
                else f"{len(ids)} tokens do not fit into the context of {self.context}"
            )
        return ids.astype(np.int64)

    def _step(self, ids: NDArray[np.int64], wanted: Rows) -> Float32 | None:
        """One pass through the layers. It counts from the assignment of the position on; before, nothing of it does."""
        if self._in_flight:  # the last pass was interrupted, or failed
            self.cache.truncate(self.position)
        self._in_flight = True
        stop = self.position + len(ids)
        step = Step(ids, np.arange(self.position, stop), [(self.cache, 0, len(ids))])
        healthy = True

        def watch(layer: int, x: Float32) -> None:  # NaN in any layer is NaN in the last; the cache must not keep it
            nonlocal healthy
            if layer == len(self.cache.layers) - 1:
                healthy = bool(np.isfinite(x).all())

        with np.errstate(invalid="ignore", over="ignore"):  # NaN is looked for here; NumPy need not warn of it as well
            result = self.model.transformer.forward(step, wanted, on_layer=watch)
            if not healthy or (result is not None and not np.isfinite(result.max(axis=1)).all()):
                self._explain(step)
        self.position = stop
        self.cache.commit(stop)
        self._in_flight = False
        return result

    def _explain(self, step: Step) -> None:
        """Raise NumericalError for logits that are NaN, infinite or all -inf: run the step again, layer by layer."""
        self.cache.truncate(self.position)
        where = f"positions {step.positions[0]} to {step.positions[-1]}"

        def check(layer: int, x: Float32) -> None:
            if not np.isfinite(x).all():
                raise NumericalError(f"{where}: layer {layer} gives NaN or infinity; are the weights damaged?")

        self.model.transformer.forward(step, None, on_layer=check)
        raise NumericalError(f"{where}: the logits of the output head are NaN, infinite or all -inf")
