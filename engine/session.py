"""Session: one sequence of tokens on a model, with its cache. It owns the position; the layers do not."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..kernels.health import are_below, are_finite, have_largest
from ..models.errors import NumericalError, PromptError, UsageError
from ..models.fingerprint import fingerprint
from ..models.load import Model
from ..models.transformer import Step
from .cache import Cache
from .layer import LayerCache
from .ledger import MassLedger
from .policy import CachePolicy
from .shadow import PARTS, ShadowLayer

Float32 = NDArray[np.float32]
Rows = Literal["all", "last"] | None

CHUNK = 384  # tokens of one pass through the layers, all of them dense for a while; what a query sees is the same


class Session:
    """A sequence being read and written by a model, with its key-value cache.

    Args:
        model: what ``mixkv.load`` returned.
        policy: how the cache is kept; the default is 4 bits behind a window of 128 tokens.
        context: most tokens the session may hold; the model's own limit unless given.
        chunk: tokens processed in one pass; changes time and memory, not what a query sees.
        shadow: keep everything densely too, and compare (``local_errors``); several times slower.

    Raises:
        UsageError: a context or chunk out of range, or a policy that does not fit the model.

    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy | None = None,
        *,
        context: int | None = None,
        chunk: int = CHUNK,
        shadow: bool = False,
    ) -> None:
        limit = _check_limits(model, context, chunk)
        self.model = model
        self.policy = CachePolicy() if policy is None else policy
        self.context = limit if context is None else context
        self.chunk, self.shadow = chunk, shadow
        self.position = 0
        self._history = np.empty(0, np.int64)  # ids of all tokens below the position, and room
        self.metadata: dict[str, str] = {}  # of the file that it was loaded from
        self._in_flight = False
        config = model.config
        self.policy.check_model(config.num_hidden_layers, config.head_dim)
        self.cache = self._new_cache(self.policy)

    def _new_cache(self, policy: CachePolicy) -> Cache:
        config = self.model.config
        return Cache(
            policy, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.context,
            config.sliding_windows, layer_type=ShadowLayer if self.shadow else LayerCache,
        )  # fmt: skip

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
            NumericalError: logits that are NaN or all -inf, or a value that a tier cannot hold.

        An error or interrupt leaves the session where the last complete chunk ended.
        """
        if logits not in ("all", "last", None):
            raise UsageError(f"logits must be 'all', 'last' or None, found {logits!r}")
        ids = self.check_fits(token_ids)
        rows: list[Float32] = []
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            left = len(ids) - first - len(part)
            wanted: Rows = "all" if logits == "all" else ("last" if logits and not left else None)
            # One token is seldom the last one, and a tile that goes may go two tokens before the next one begins
            coming = min(left, self.chunk) if len(ids) > 1 else min(2, self.context - self.position - 1)
            result = self._step(part, wanted, coming)
            if result is not None:
                rows.append(result)
            if progress is not None:
                progress(first + len(part))
        if logits == "last":
            return rows[0][0]
        if logits is None:
            return None
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def nbytes(self) -> dict[str, int]:
        """Bytes that the cache uses: {"sink", "old", "recent", "total"}. What it shares with a fork is counted in both."""
        return self.cache.nbytes()

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The ids of all tokens read, (position,)."""
        return self._history[: self.position].copy()

    def truncate(self, position: int, *, replay: bool = False) -> None:
        """Go back: the session is then as if it had never gone further.

        At least the last ``policy.rollback`` tokens can be taken back; how far it goes beyond depends on which tiles are
        kept as codes only.

        Args:
            position: how many tokens to keep, from 0 to all.
            replay: where that is too far back, read the tokens kept again from the first one; else it is refused.

        Raises:
            UsageError: a position out of range, or too far back without ``replay``. Nothing has changed then.

        """
        if type(position) is not int or not 0 <= position <= self.position:
            raise UsageError(f"position must be a whole number from 0 to {self.position}, found {position!r}")
        self._settle()
        if position >= (lowest := self.cache.lowest):
            # From here on it is done in the end, whatever comes between
            self._in_flight, self.position = True, position
            self._settle()
        elif replay or position == 0:
            again = Session(self.model, self.policy, context=self.context, chunk=self.chunk, shadow=self.shadow)
            if position:
                again.forward(self._history[:position], None)
            again.cache.continue_ledger(self.cache, position)
            self.cache, self.position = again.cache, position
        else:
            raise UsageError(
                f"position must be {lowest} or more, found {position}: what came before is kept as codes only "
                f"(rollback={self.policy.rollback}); replay=True reads the tokens again"
            )

    def fork(self) -> "Session":
        """A second session at the same place. The two share what is old; each goes its own way from here on."""
        self._settle()
        other = Session(self.model, self.policy, context=self.context, chunk=self.chunk, shadow=self.shadow)
        other.cache, other.position, other._history = self.cache.fork(), self.position, self.token_ids
        other.metadata = dict(self.metadata)
        return other

    def retier(self, policy: CachePolicy) -> dict[str, int]:
        """Keep what there is by another policy from now on. What has been rounded stays so, and may be rounded once more.

        Returns numbers of tokens, in the layer where there are most: {"tokens": read so far; "requantized": coded by the
        old policy and coded anew, from the old codes, by the new one; "not_restored": dense by the new policy, but there
        are only their codes}.

        Raises:
            UsageError: a policy that does not fit the model.
            NumericalError: a value that a tier of the new policy cannot hold. Nothing has changed then.

        """
        self._settle()
        policy.check_model(self.model.config.num_hidden_layers, self.model.config.head_dim)
        if self.cache.ledger is not None:
            raise UsageError("a ledger is kept, whose segments the new policy may not have: keep_ledger(False) first")
        cache = self._new_cache(policy)
        found = cache.take_over(self.cache, self.position)
        self.cache, self.policy = cache, policy
        return found

    def keep_ledger(self, on: bool = True) -> MassLedger | None:
        """Begin a ledger of how much attention each segment gets (ledger.py), from the next token on; or end it.

        UsageError for a model with sink logits: they take a share of their own, which no segment has.
        """
        if on and self.model.config.sink_logits:
            raise UsageError(
                "a ledger counts the shares of segments, but this model's sink logits take one beside them"
            )
        return self.cache.keep_ledger(on)

    def local_errors(self) -> dict[str, NDArray[np.float64]]:
        """The local errors of all layers and heads, {"k", "v", "both"} of (layers, H) each; see shadow.py.

        Raises:
            UsageError: a session that is not in shadow mode.

        """
        layers = [layer for layer in self.cache.layers if isinstance(layer, ShadowLayer)]
        if not layers:
            raise UsageError("local errors are known in shadow mode only: Session(..., shadow=True)")
        return {part: np.stack([layer.errors.relative(part) for layer in layers]) for part in PARTS}

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the session to a file; ``load`` goes on from there, bit for bit. The format is described in storage.py.

        Args:
            path: replaced at once when all is written, or left as it is.
            metadata: names and texts to keep with it; those of the file that it was loaded from unless given.

        Raises:
            SessionFileError: the file cannot be written.
            UsageError: a name that the format needs for itself.

        """
        from .storage import save

        self._settle()
        metadata = self.metadata if metadata is None else metadata
        save(Path(path), self.cache, self._fingerprint(self.model), self.token_ids, self.context, metadata)

    @classmethod
    def load(cls, model: Model, path: str | Path, *, context: int | None = None, chunk: int = CHUNK) -> "Session":
        """A session that ``save`` wrote; ``metadata`` is then what was kept with it.

        Args:
            model: the one it was saved with, its weights in the same format.
            context: as saved unless given; at least the tokens that there are.

        Raises:
            SessionFileError: a file that is damaged, cut off, of another model or version, or cannot be read.
            UsageError: a context or chunk out of range.

        """
        from .storage import load

        def make(policy: CachePolicy, saved_context: int) -> Cache:
            made.append(cls(model, policy, context=saved_context, chunk=chunk))
            return made[0].cache

        _check_limits(model, context, chunk)
        made: list[Session] = []
        saved, _ = load(Path(path), cls._fingerprint(model), model.config.vocab_size, make)
        session = made[0]
        if context is not None:
            sinks = max(layer.policy.sinks for layer in session.cache.layers)
            least = max(saved.position, min(sinks, saved.context))
            if context < least or (context > saved.context < sinks):
                raise UsageError(f"context must be {least} or more for this file, or as it was, {saved.context}")
            if any(rope.stretch(context) != rope.stretch(saved.context) for rope in model.config.ropes):
                raise UsageError(
                    f"context must stay {saved.context}: the angles of this model's rotary embedding depend on it"
                )
            session.context = context
        session.position, session._history, session.metadata = saved.position, saved.token_ids, saved.added
        return session

    @staticmethod
    def _fingerprint(model: Model) -> str:
        return fingerprint(model.config, model.transformer.weights)

    def _settle(self) -> None:
        """Forget what a pass that was interrupted, or failed, left in the cache."""
        if self._in_flight:
            self.cache.truncate(self.position)
            self._in_flight = False

    def check_fits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """The ids as int64 (T,), or PromptError where ``forward`` could not take them now."""
        ids = np.asarray(token_ids)
        if ids.size == 0:
            raise PromptError("the prompt is empty: at least one token is needed")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PromptError(f"token_ids must be a flat sequence of integers, found {ids.dtype} {ids.shape}")
        vocab = self.model.config.vocab_size
        found = ids.astype(np.int64)
        if not are_below(found, vocab):
            bad = ids[(ids < 0) | (ids >= vocab)][0]
            raise PromptError(f"token id {bad} is outside of the vocabulary, 0 to {vocab - 1}")
        if self.position + len(ids) > self.context:
            raise PromptError(
                f"{len(ids)} tokens do not fit: {self.position} of the context's {self.context} are in use"
                if self.position
                else f"{len(ids)} tokens do not fit into the context of {self.context}"
            )
        return found

    def _step(self, ids: NDArray[np.int64], wanted: Rows, coming: int) -> Float32 | None:
        """One pass through the layers, before so many tokens more.

        It counts from the assignment of the position on; before, nothing of it does.
        """
        self._settle()
        self._in_flight = True
        stop = self.position + len(ids)
        if stop > len(self._history):
            self._history = np.concatenate([self._history, np.empty(max(stop, 2 * len(self._history)), np.int64)])
        self._history[self.position : stop] = ids
        step = Step(ids, np.arange(self.position, stop), [(self.cache, 0, len(ids))], self.context)
        healthy = True

        def watch(x: Float32) -> None:  # NaN in any layer is NaN in the last; the cache must not keep it
            nonlocal healthy
            healthy = healthy and are_finite(x)

        with np.errstate(invalid="ignore", over="ignore"):  # NaN is looked for here; NumPy need not warn of it as well
            result = self.model.transformer.forward(step, wanted, watch=watch)
            if not healthy or (result is not None and not have_largest(result)):
                self._explain(step)
        self.position = stop
        self.cache.commit(stop, stop + coming)
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


def _check_limits(model: Model, context: int | None, chunk: int) -> int:
    """The model's limit of tokens; UsageError for a context or chunk out of range."""
    limit = model.config.max_position_embeddings
    if context is not None and (type(context) is not int or not 1 <= context <= limit):
        raise UsageError(f"context must be from 1 to {limit} tokens (the model's limit), found {context!r}")
    if type(chunk) is not int or chunk < 1:
        raise UsageError(f"chunk must be a whole number, 1 or more, found {chunk!r}")
    return limit
