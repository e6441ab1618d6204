"""Linear layers. ``Linear`` hides how a weight is stored; today float32 through NumPy's BLAS."""

import numpy as np
from numpy.typing import NDArray

from ..kernels.matmul import matvec
from ..kernels.simd import LANES
from .errors import UsageError

Float32 = NDArray[np.float32]
WEIGHTS = ("auto", "f32")


def check_weights_option(weights: str) -> str:
    """The weight format for an option; UsageError where it is not supported."""
    if weights not in WEIGHTS:
        raise UsageError(f"weights must be one of {', '.join(WEIGHTS)}, found {weights!r}")
    return "f32"


class Linear:
    """y = x W^T + b, with W float32 (out, in)."""

    def __init__(self, weight: Float32, bias: Float32 | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        """Bytes read by one application."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Float32) -> Float32:
        """X (T, in) float32 -> (T, out) float32."""
        if len(x) == 1 and self.weight.shape[1] % LANES == 0:
            y = matvec(self.weight, np.ascontiguousarray(x[0]))[None]
        else:
            y = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y
