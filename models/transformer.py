"""The transformer: flat rows of tokens in, logits out. Differences between architectures are fields of the config.

Rows belong to sequences only through ``spans``, and only attention looks at them: one sequence in a chunk, or many in a
batch, are the same code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .linear import Linear

Float32 = NDArray[np.float32]


class AttentionCache(Protocol):
    """What a layer needs of the cache of a sequence."""

    def attend(self, layer: int, q: Float32, k: Float32, v: Float32, position: int, scale: float) -> Float32:
        """Append k, v (T, n_kv_heads, head_dim) from ``position`` on; attention of q (T, n_heads, head_dim) there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: ``token_ids`` (T,) at ``positions`` (T,); rows start .. stop of each span belong to that span's cache."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    spans: list[tuple[AttentionCache, int, int]]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. qkv and gate_up are fused: their rows follow one another."""

    input_norm: Float32
    qkv: Linear
    o: Linear
    post_attention_norm: Float32
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model."""

    embedding: Float32  # (V, E)
    layers: list[Layer]
    norm: Float32
    head: Linear

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
        config, weights = self.config, self.weights
        cos, sin = self._rotary(step.positions)
        x = weights.embedding[step.token_ids]  # (T, E)
        for i, layer in enumerate(weights.layers):
            normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
            x = x + self._attention(i, layer, normed, cos, sin, step)
            normed = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps)
            x = x + layer.down(silu_gate(layer.gate_up(normed)))
            if on_layer is not None:
                on_layer(i, x)
        if logits is None:
            return None
        if logits == "last":
            x = x[[stop - 1 for _, _, stop in step.spans]]
        return weights.head(rms_norm(x, weights.norm, config.rms_norm_eps))

    def _attention(self, i: int, layer: Layer, x: Float32, cos: Float32, sin: Float32, step: Step) -> Float32:
        config, n_rows = self.config, len(x)
        n_heads, n_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = layer.qkv(x).reshape(n_rows, n_heads + 2 * n_kv_heads, head_dim)
        qk = rotate(qkv[:, : n_heads + n_kv_heads], cos, sin)
        q, k, v = qk[:, :n_heads], qk[:, n_heads:], qkv[:, n_heads + n_kv_heads :]
        o = np.empty((n_rows, n_heads, head_dim), np.float32)
        for cache, start, stop in step.spans:
            rows = slice(start, stop)
            o[rows] = cache.attend(i, q[rows], k[rows], v[rows], int(step.positions[start]), head_dim**-0.5)
        return layer.o(o.reshape(n_rows, -1))

    def _rotary(self, positions: NDArray[np.int64]) -> tuple[Float32, Float32]:
        """Cos and sin (T, 1, head_dim / 2), from float32 angles, as the models were trained."""
        angles = positions.astype(np.float32)[:, None, None] * self._inverse_frequencies
        return np.cos(angles), np.sin(angles)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """X / sqrt(mean(x^2) + eps) * weight over the last axis (https://arxiv.org/abs/1910.07467)."""
    square = np.einsum("te,te->t", x, x) / np.float32(x.shape[1])
    return x * (1.0 / np.sqrt(square + np.float32(eps)))[:, None] * weight


def rotate(x: Float32, cos: Float32, sin: Float32) -> Float32:
    """Rotary embedding of x (T, heads, head_dim): channel i turns with channel i + head_dim / 2.

    https://arxiv.org/abs/2104.09864, in the half-split order of Hugging Face's Llama.
    """
    half = x.shape[2] // 2
    first, second = x[..., :half], x[..., half:]
    turned = np.empty_like(x)
    turned[..., :half] = first * cos - second * sin
    turned[..., half:] = second * cos + first * sin
    return turned


def silu_gate(gate_up: Float32) -> Float32:
    """SiLU(gate) * up for gate_up (T, 2F), whose first half is the gate (https://arxiv.org/abs/2002.05202)."""
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    with np.errstate(over="ignore"):  # exp overflows to infinity for very negative gates, where SiLU is 0
        denominator: Float32 = np.float32(1) + np.exp(-gate)
    return gate / denominator * up
