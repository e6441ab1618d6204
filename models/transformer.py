"""The transformer: flat rows of tokens in, logits out. Differences between architectures are fields of the config.

Rows belong to sequences only through ``spans``, and only attention looks at them: one sequence in a chunk, or many in a
batch, are the same code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.rotary import rotate
from .config import ModelConfig
from .linear import Linear

Float32 = NDArray[np.float32]


class AttentionCache(Protocol):
    """What a layer needs of the cache of a sequence."""

    def attend(self, layer: int, qkv: Float32, position: int, scale: float) -> Float32:
        """Append keys and values from ``position`` on, and attend with the queries there: (T, n_heads, head_dim).

        qkv: (T, n_heads + 2 * n_kv_heads, head_dim), the queries, keys and values of each token, C order.
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


class Transformer:
    """A decoder-only transformer of the Llama family."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        self._inverse_frequencies = (1.0 / np.float32(config.rope_theta) ** half).astype(np.float32)

    def forward(
        self,
        step: Step,
        logits: Literal["all", "last"] | None,
        *,
        on_layer: Callable[[int, Float32], None] | None = None,
    ) -> Float32 | None:
        """Run the rows of ``step`` through all layers.

        Returns logits float32 (T, V) for "all", (len(spans), V) of each span's last row for "last", None for None.
        ``on_layer`` is called with the number of each layer and its output (T, E).
        """
        weights = self.weights
        cos, sin = self._rotary(step.positions)
        x = weights.embedding.take(step.token_ids)  # (T, E)
        for i, layer in enumerate(weights.layers):
            layer.o(self._attention(i, layer, x, cos, sin, step), onto=x)
            layer.down(layer.gate_up(x), onto=x)
            if on_layer is not None:
                on_layer(i, x)
        if logits is None:
            return None
        if logits == "last":
            x = x[[stop - 1 for _, _, stop in step.spans]]
        return weights.head(x)

    def _attention(self, i: int, layer: Layer, x: Float32, cos: Float32, sin: Float32, step: Step) -> Float32:
        config, n_rows = self.config, len(x)
        n_heads, n_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = layer.qkv(x).reshape(n_rows, n_heads + 2 * n_kv_heads, head_dim)
        rotate(qkv, n_heads + n_kv_heads, cos, sin)
        o = [
            cache.attend(i, qkv[start:stop], int(step.positions[start]), head_dim**-0.5)
            for cache, start, stop in step.spans
        ]
        return (o[0] if len(o) == 1 else np.concatenate(o)).reshape(n_rows, -1)

    def _rotary(self, positions: NDArray[np.int64]) -> tuple[Float32, Float32]:
        """Cos and sin (T, head_dim / 2), from float32 angles, as the models were trained."""
        angles = positions.astype(np.float32)[:, None] * self._inverse_frequencies
        return np.cos(angles), np.sin(angles)
