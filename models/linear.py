"""Linear layers: what comes before the product (a norm, a gate), the product, and what it is added to, as one step.

``FloatLinear`` holds float32 and multiplies in NumPy's BLAS. ``PackedLinear`` holds codes of 8 or 4 bits, bfloat16 or
float16 in the kernels' layout; there a row's bits do not depend on the other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.activations import CLAMP, CLAMPED, CLAMPED_SLOPE, GELU, NORM, PLAIN, SILU
from ..kernels.chain import Projection
from ..kernels.matmul import matvec
from ..kernels.simd import LANES
from ..kernels.threads import get_num_threads
from ..kernels.weights import Matrix

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm of the input: x / sqrt(mean(x^2) + eps) * weight, weight float32 (in,)."""

    weight: Float32
    eps: float


@dataclass(frozen=True, slots=True)
class Gate:
    """act(gate) * up, of an input (T, 2 * in) whose first half is the gate. ``how``: one of ``GATES``."""

    how: int = SILU


GATES = {"silu": SILU, "gelu_tanh": GELU, "clamped": CLAMPED}


Before = Norm | Gate | None  # what stands in front of a product


class Linear(Protocol):
    """y = before(x) W^T + b, with W (out, in)."""

    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes read by one application."""

    def __call__(self, x: Float32) -> Float32:
        """X (T, in), or (T, 2 * in) behind a gate, to (T, out)."""

    def take(self, ids: NDArray[np.int64], out: Float32 | None = None) -> Float32:
        """Rows of W as float32 (len(ids), in), into ``out`` if it is there, C order: W as an embedding."""

    def behind(self, before: Before) -> "Linear":
        """The same weights, not copied, behind something else."""


class FloatLinear:
    """A linear layer of float32 weights, row after row."""

    def __init__(self, weight: Float32, bias: Float32 | None = None, before: Before = None) -> None:
        self.weight, self.bias, self.before = weight, bias, before
        self.rows, self.columns = weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes read by one application."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Float32) -> Float32:
        """See ``Linear``."""
        if isinstance(self.before, Norm):
            x = rms_norm(x, self.before.weight, self.before.eps)
        elif self.before is not None:
            x = gated(x, self.before.how)
        if len(x) == 1 and self.columns % LANES == 0:
            y = matvec(self.weight, np.ascontiguousarray(x[0]))[None]
        else:
            y = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y

    def take(self, ids: NDArray[np.int64], out: Float32 | None = None) -> Float32:
        """See ``Linear``."""
        return self.weight.take(ids, 0, out)

    def behind(self, before: Before) -> "FloatLinear":
        """See ``Linear``."""
        return FloatLinear(self.weight, self.bias, before)


class PackedLinear:
    """A linear layer of packed matrices, one below the other, with float32 biases."""

    def __init__(self, parts: Sequence[Matrix], bias: Float32 | None = None, before: Before = None) -> None:
        self.parts, self.bias, self.before = list(parts), bias, before
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns
        how = PLAIN if before is None else NORM if isinstance(before, Norm) else before.how
        weight, eps = (before.weight, before.eps) if isinstance(before, Norm) else (None, 0.0)
        self.projection = Projection(self.parts, bias, how, weight, eps)

    @property
    def nbytes(self) -> int:
        """Bytes read by one application."""
        return sum(part.nbytes for part in self.parts) + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Float32) -> Float32:
        """See ``Linear``."""
        return self.projection(x, get_num_threads())

    def take(self, ids: NDArray[np.int64], out: Float32 | None = None) -> Float32:
        """See ``Linear``."""
        out = np.empty((len(ids), self.columns), np.float32) if out is None else out
        self.projection.take(ids, out)
        return out

    def behind(self, before: Before) -> "PackedLinear":
        """See ``Linear``."""
        return PackedLinear(self.parts, self.bias, before)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """X / sqrt(mean(x^2) + eps) * weight over the last axis (https://arxiv.org/abs/1910.07467)."""
    square = np.einsum("te,te->t", x, x) / np.float32(x.shape[1])
    return x * (1.0 / np.sqrt(square + np.float32(eps)))[:, None] * weight


def gated(gate_up: Float32, how: int) -> Float32:
    """What kernels/activations.py makes of gate_up (T, 2F), whose first half is the gate."""
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    slope: float | Float32 = 1.0
    if how == CLAMPED:
        gate, up, slope = np.minimum(gate, CLAMP), np.clip(up, -CLAMP, CLAMP) + 1, CLAMPED_SLOPE
    with np.errstate(over="ignore"):  # exp overflows to infinity for very negative gates, where the product is 0
        if how == GELU:
            slope = np.float32(2 * (2 / np.pi) ** 0.5) * (1 + np.float32(0.044715) * gate * gate)
        denominator: Float32 = np.float32(1) + np.exp(-np.float32(1) * slope * gate)
    return (gate / denominator * up).astype(np.float32, copy=False)
