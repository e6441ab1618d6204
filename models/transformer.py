"""The transformer: flat rows of tokens in, logits out. Differences between architectures are fields of the config.

Rows belong to sequences only through ``spans``, and only attention looks at them: one sequence in a chunk, or many in a
batch, are the same code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels import forks
from .chain import Apply, Buffers, Chain, Rotate
from .config import ModelConfig
from .errors import MixkvError
from .linear import Linear

Float32 = NDArray[np.float32]


class AttentionCache(Protocol):
    """What a layer needs of the cache of a sequence."""

    def attend(self, layer: int, qkv: Float32, position: int, scale: float, out: Float32) -> object:
        """Append keys and values from ``position`` on, and attend with the queries there.

        qkv: (T, n_heads + 2 * n_kv_heads, head_dim), the queries, keys and values of each token, C order. out: (T, n_heads,
        head_dim), C order, receives the output.
        """


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: ``token_ids`` (T,) at ``positions`` (T,); rows start .. stop of each span belong to that span's cache."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    spans: list[tuple[AttentionCache, int, int]]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. qkv and gate_up are fused: their rows follow one another.

    The norms belong to the layers that they stand in front of, qkv and gate_up, and the gate to down.
    """

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model."""

    embedding: Linear  # only its rows are taken
    layers: list[Layer]
    head: Linear  # with the last norm in front

    def linears(self) -> Iterator[Linear]:
        """Every matrix that a decode step reads whole."""
        for layer in self.layers:
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)
        yield self.head


X, QKV, ATTENDED, GATE_UP = range(4)  # the buffers of a pass


@dataclass(frozen=True, slots=True)
class Midway:
    """Where a pass stands before the attention of a layer: x (T, E), and qkv (T, heads, head_dim), float32."""

    layer: int
    x: Float32
    qkv: Float32


class Transformer:
    """A decoder-only transformer of the Llama family."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        self._inverse_frequencies = (1.0 / np.float32(config.rope_theta) ** half).astype(np.float32)
        self._heads = config.num_attention_heads, config.num_attention_heads + 2 * config.num_key_value_heads
        self._widths = (
            config.hidden_size, self._heads[1] * config.head_dim, self._heads[0] * config.head_dim,
            2 * config.intermediate_size,
        )  # fmt: skip
        # What comes before the first attention, between two, and behind the last
        before = [self._queries(layer) for layer in weights.layers]
        after = [
            [Apply(layer.o, ATTENDED, X, True), Apply(layer.gate_up, X, GATE_UP), Apply(layer.down, GATE_UP, X, True)]
            for layer in weights.layers
        ]
        self.chains = [
            Chain([*behind, *ahead]) for behind, ahead in zip([[], *after], [*before, []], strict=True)
        ]  # fmt: skip

    def _queries(self, layer: Layer) -> list[Apply | Rotate]:
        config, all_heads = self.config, self._heads[1]
        rotated = config.num_attention_heads + config.num_key_value_heads
        return [Apply(layer.qkv, X, QKV), Rotate(QKV, rotated, all_heads, config.head_dim)]

    def forward(
        self,
        step: Step,
        logits: Literal["all", "last"] | None,
        *,
        on_layer: Callable[[int, Float32], None] | None = None,
        on_attention: Callable[[Midway], None] | None = None,
        begin: Midway | None = None,
    ) -> Float32 | None:
        """Run the rows of ``step`` through all layers.

        Returns logits float32 (T, V) for "all", (len(spans), V) of each span's last row for "last", None for None.
        ``on_layer`` is called with the number of each layer and its output (T, E), ``on_attention`` before each attention,
        with arrays that are written to afterwards. ``begin``: where an earlier pass of the same rows stood, to go on there.
        MixkvError in a process that was forked from one that had used the kernels.
        """
        if not forks.usable():
            raise MixkvError(forks.MESSAGE)
        weights, n_rows = self.weights, len(step.token_ids)
        buffers = Buffers(n_rows, self._widths, *self._rotary(step.positions), self._room_nbytes(n_rows))
        x = buffers.arrays[X]
        qkv = buffers.arrays[QKV].reshape(n_rows, self._heads[1], -1)
        attended = buffers.arrays[ATTENDED].reshape(n_rows, self._heads[0], -1)
        if begin is None:
            x[:] = weights.embedding.take(step.token_ids)
            self.chains[0](buffers)
        else:
            x[:], qkv[:] = begin.x, begin.qkv
        for i in range(0 if begin is None else begin.layer, len(weights.layers)):
            if on_attention is not None:
                on_attention(Midway(i, x, qkv))
            for cache, start, stop in step.spans:
                position = int(step.positions[start])
                cache.attend(i, qkv[start:stop], position, self.config.head_dim**-0.5, attended[start:stop])
            self.chains[i + 1](buffers)
            if on_layer is not None:
                on_layer(i, x)
        if logits is None:
            return None
        if logits == "last":
            x = x[[stop - 1 for _, _, stop in step.spans]]
        return weights.head(x)

    def _room_nbytes(self, rows: int) -> int:
        return 1 if rows == 1 else max(chain.room_nbytes(rows) for chain in self.chains)

    def _rotary(self, positions: NDArray[np.int64]) -> tuple[Float32, Float32]:
        """Cos and sin (T, head_dim / 2), from float32 angles, as the models were trained."""
        angles = positions.astype(np.float32)[:, None] * self._inverse_frequencies
        return np.cos(angles), np.sin(angles)
