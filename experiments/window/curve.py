"""``measure``: what every size of the recent window costs in local error, from one pass of a model over a text.

The pass goes on with the outputs over keys and values in the dense type, so no layer's inputs have seen a code. In each
layer the local error of a window is how far the output over sinks, codes and that window is from that one, as
engine/shadow.py has it. layer.py finds it for all windows together.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...engine import memory
from ...engine.layer import LayerCache
from ...engine.policy import MAX_WINDOW, CachePolicy
from ...engine.session import Session
from ...kernels.threads import get_num_threads
from ...models.check import shown
from ...models.config import ModelConfig
from ...models.errors import NumericalError, UsageError
from ...models.load import Model
from ...models.transformer import Softmax, Step
from .layer import Float32, Float64, LayerWindows, room_nbytes

Look = Callable[[int, Float32, Softmax, Float32], None]

POINTS = 64  # windows unless somebody says which, at most


@dataclass(frozen=True, slots=True)
class WindowCurve:
    """What ``measure`` found.

    Attributes:
        tokens: of the text.
        windows: in tokens, ascending (W,).
        squares: (W, n_layers, H), of each layer's and head's errors, added up over the text's queries.
        outputs: (n_layers, H), of the outputs over dense keys and values, likewise.
        kv_bytes_per_token: bytes of a cache with each window that holds the text, over ``tokens``.
        seconds: of the pass that found it.
        pass_seconds: of one without anything to find; None where that was not asked for.

    """

    tokens: int
    windows: tuple[int, ...]
    squares: Float64
    outputs: Float64
    kv_bytes_per_token: tuple[float, ...]
    seconds: float
    pass_seconds: float | None = None

    @property
    def errors(self) -> Float64:
        """Of all layers and heads, (W,): the root of the sum of all squared errors over that of all squared outputs."""
        return _relative(self.squares.sum(axis=(1, 2)), self.outputs.sum())

    @property
    def by_layer(self) -> Float64:
        """Of all heads of each layer, (W, n_layers)."""
        return _relative(self.squares.sum(axis=2), self.outputs.sum(axis=1))

    @property
    def by_head(self) -> Float64:
        """Of each layer and head, (W, n_layers, H): what ``Session.local_errors()["both"]`` is for one window."""
        return _relative(self.squares, self.outputs)


def _relative(squares: Float64, outputs: Float64 | np.float64) -> Float64:
    found: Float64 = np.sqrt(squares / np.where(outputs > 0, outputs, 1))
    return found


def default_windows(tokens: int, tile: int) -> list[int]:
    """Multiples of the tile from 0 up to the text's length, as many as there are, or every second, third ..., up to 64."""
    step = tile * -(-(tokens // tile + 1) // POINTS)
    return list(range(0, tokens + 1, step))


def measure(
    model: Model,
    token_ids: Sequence[int] | NDArray[np.integer],
    policy: CachePolicy,
    windows: Sequence[int] | None = None,
    *,
    compare_time: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WindowCurve:
    """The local error of each window. All tokens go through a layer at once.

    Args:
        model: the model; with float32 weights, as the inputs of the layers are then exact.
        token_ids: (T,) integers.
        policy: one tier, no overrides; everything but its window counts.
        windows: in tokens; each is measured once, in ascending order. Those of ``default_windows`` unless given.
        compare_time: time a pass without anything to find as well.
        progress: called with (layers done, layers in all).

    Raises:
        UsageError: a policy with further tiers or overrides, a window out of range, more memory than there is.
        PromptError: no tokens, or more than the context holds.
        NumericalError: weights that give NaN, or keys and values that the codes cannot hold.

    """
    check_policy(policy)
    ids = Session(model, policy).check_fits(token_ids)
    wanted = default_windows(len(ids), policy.tile) if windows is None else sorted(set(windows))
    if not wanted or any(type(w) is not int or not 0 <= w <= MAX_WINDOW for w in wanted):
        raise UsageError(f"windows must be whole numbers from 0 to {MAX_WINDOW}, found {shown(wanted)}")
    check_memory(model.config, policy, len(ids))
    config = model.config
    measuring = _Measuring(config, policy, wanted)
    if compare_time:  # what is done once a process belongs to neither of the two
        _pass(model, ids[: 2 * policy.tile], measuring.look, None)
    seconds = _pass(model, ids, measuring.look, progress)
    pass_seconds = _pass(model, ids, None, None) if compare_time else None
    sizes = [memory.plan(config, replace(policy, window=w), len(ids)).total / len(ids) for w in wanted]
    found = measuring.squares, measuring.outputs, tuple(sizes), seconds, pass_seconds
    return WindowCurve(len(ids), tuple(wanted), *found)


def check_policy(policy: CachePolicy) -> None:
    """UsageError for a policy that there is no curve of."""
    if policy.older or policy.overrides:
        raise UsageError(
            f"the policy must have one tier and no overrides, found {1 + len(policy.older)} tiers and "
            f"{len(policy.overrides)} overrides"
        )


def check_memory(config: ModelConfig, policy: CachePolicy, tokens: int, available: int | None = None) -> int:
    """The bytes that ``measure`` will take up besides the model.

    Only one layer's caches exist at a time: one of dense tiles and of codes, or, in the pass that times are compared with,
    one of float32. The buffers of the pass are of all tokens.

    Args:
        config, policy, tokens: what is to be measured.
        available: bytes that there are; those of the system unless given. Where nobody knows, everything fits.

    Raises:
        UsageError: more than there are.

    """
    layer = replace(config, num_hidden_layers=1, sliding_layers=(), no_rope_layers=(), dense_layers=())  # sees all
    kept = replace(policy, window=0), replace(policy, window=min(tokens, MAX_WINDOW))
    caches = sum(memory.plan(layer, each, tokens).total for each in kept)
    caches = max(caches, memory.plan(layer, CachePolicy.full(), tokens).total)
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    queries = 2 * config.num_attention_heads  # turned and padded, and the output of storing
    widest = 2 * config.intermediate_size  # once in its buffer, once as it comes out of a product
    width = 2 * config.hidden_size + (heads + queries) * config.head_dim + 2 * widest
    needed = caches + 4 * tokens * width + room_nbytes(get_num_threads())
    room = memory.available_nbytes() if available is None else available
    if room is not None and needed > room:
        raise UsageError(
            f"the curve of {tokens} tokens needs {needed} bytes, {room} bytes of memory are available: "
            "--tokens takes fewer of them"
        )
    return needed


class _Measuring:
    """The sums of ``WindowCurve``, a layer at a time."""

    def __init__(self, config: ModelConfig, policy: CachePolicy, windows: Sequence[int]) -> None:
        shape = len(windows), config.num_hidden_layers, config.num_attention_heads
        self.squares, self.outputs = np.zeros(shape), np.zeros(shape[1:])
        self._find = LayerWindows(policy, np.array(windows), config.num_key_value_heads, config.head_dim)
        self._sliding_windows = config.sliding_windows

    def look(self, layer: int, qkv: Float32, softmax: Softmax, out: Float32) -> None:
        """Fill in what belongs to a layer; ``qkv``, ``softmax`` and ``out`` as of ``LayerWindows``."""
        self.squares[:, layer], self.outputs[layer] = self._find(qkv, softmax, out, self._sliding_windows[layer])
        if not (np.isfinite(self.squares[:, layer]).all() and np.isfinite(self.outputs[layer]).all()):
            raise NumericalError(f"layer {layer}: outputs are NaN, or their squares beyond float32")


class _WholeText:
    """What a pass attends with: each layer's keys and values, of all tokens at once, forgotten when the layer is done.

    ``look`` attends itself, over keys and values in the dense type; without it they are float32.
    """

    def __init__(self, config: ModelConfig, look: Look | None) -> None:
        self._shape, self._sliding_windows = (config.num_key_value_heads, config.head_dim), config.sliding_windows
        self._look = look

    def attentions(self, *_: object) -> None:
        """As the models' ``AttentionCache``: layers are looked at one by one."""

    def attend(self, layer: int, qkv: Float32, position: int, softmax: Softmax, out: Float32, first: int = 0) -> None:
        """As the models' ``AttentionCache``, with all queries."""
        if self._look is None:
            cache = LayerCache(CachePolicy.full(), *self._shape, len(qkv), self._sliding_windows[layer])
            cache.attend(qkv, position, softmax, out)
        else:
            self._look(layer, qkv, softmax, out)


def _pass(
    model: Model,
    ids: NDArray[np.int64],
    look: Look | None,
    progress: Callable[[int, int], None] | None,
) -> float:
    """Take all tokens through the layers, and look at each layer's queries, keys and values; returns the seconds."""

    def done(layer: int, x: Float32) -> None:
        if not np.isfinite(x).all():
            raise NumericalError(f"layer {layer} gives NaN or infinity; are the weights damaged?")
        if progress is not None:
            progress(layer + 1, model.config.num_hidden_layers)

    step = Step(ids, np.arange(len(ids)), [(_WholeText(model.config, look), 0, len(ids))])
    begun = time.perf_counter()
    with np.errstate(invalid="ignore", over="ignore"):  # NaN is looked for here; NumPy need not warn of it as well
        model.transformer.forward(step, None, on_layer=done)
    return time.perf_counter() - begun
