"""What tells one model in memory from another: a digest of its description and of its weights as they are kept."""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .linear import FloatLinear, Linear, Norm, PackedLinear
from .transformer import Weights

WINDOWS, WINDOW_NBYTES = 16, 4096  # of an array larger than all of them, so many pieces of so many bytes are looked at


def fingerprint(config: ModelConfig, weights: Weights) -> str:
    """32 hexadecimal digits of SHA-256. The same weights in another format are another model: they compute other bits.

    Of large arrays 16 pieces of 4 kB are digested, spread evenly: enough to tell models from one another, fine-tuned ones
    too, and done in milliseconds; no proof against somebody who wants to deceive.
    """
    digest = hashlib.sha256(repr(config).encode())
    linears = [_arrays(linear) for linear in (weights.embedding, *weights.linears())]
    loose = [[norm.weight for norm in layer.norms()] for layer in weights.layers]
    sinks = [layer.sink_logits for layer in weights.layers if layer.sink_logits is not None]
    for arrays in (*linears, *loose, sinks):
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            data = array.reshape(-1).view(np.uint8)
            if data.nbytes <= WINDOWS * WINDOW_NBYTES:
                digest.update(data.data)
                continue
            for start in np.linspace(0, data.nbytes - WINDOW_NBYTES, WINDOWS).astype(int):
                digest.update(data[start : start + WINDOW_NBYTES].data)
    return digest.hexdigest()[:32]


def _arrays(linear: Linear) -> Iterator[NDArray[np.generic]]:
    """All the numbers of a layer, C-ordered."""
    assert isinstance(linear, FloatLinear | PackedLinear)
    yield from [part.data for part in linear.parts] if isinstance(linear, PackedLinear) else [linear.weight]
    if linear.bias is not None:
        yield linear.bias
    if isinstance(linear.before, Norm):
        yield linear.before.weight
