"""The types of GGUF tensors: how their blocks lie, and what becomes of them, numbers or the codes that kernels multiply."""

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..kernels.weights import W4, W4M, W8, CodedRows
from . import mxfp4

_VALUES_AT_ONCE = 1 << 17  # a chunk and its temporaries stay in the L2 cache: 0.3 s for the default model, not 0.75


class Blocks(NamedTuple):
    """How a tensor type is stored: ``values`` numbers in each ``nbytes`` bytes."""

    name: str
    values: int
    nbytes: int


# The types that gguf.quants turns into float32, by their number in the file. Spelled out because importing gguf costs
# more than opening a file does; a test compares the table with the package's.
TENSOR_TYPES: Mapping[int, Blocks] = {
    0: Blocks("F32", 1, 4),
    1: Blocks("F16", 1, 2),
    2: Blocks("Q4_0", 32, 18),
    3: Blocks("Q4_1", 32, 20),
    6: Blocks("Q5_0", 32, 22),
    7: Blocks("Q5_1", 32, 24),
    8: Blocks("Q8_0", 32, 34),
    10: Blocks("Q2_K", 256, 84),
    11: Blocks("Q3_K", 256, 110),
    12: Blocks("Q4_K", 256, 144),
    13: Blocks("Q5_K", 256, 176),
    14: Blocks("Q6_K", 256, 210),
    16: Blocks("IQ2_XXS", 256, 66),
    17: Blocks("IQ2_XS", 256, 74),
    18: Blocks("IQ3_XXS", 256, 98),
    19: Blocks("IQ1_S", 256, 50),
    20: Blocks("IQ4_NL", 32, 18),
    21: Blocks("IQ3_S", 256, 110),
    22: Blocks("IQ2_S", 256, 82),
    23: Blocks("IQ4_XS", 256, 136),
    29: Blocks("IQ1_M", 256, 56),
    30: Blocks("BF16", 1, 2),
    34: Blocks("TQ1_0", 256, 54),
    35: Blocks("TQ2_0", 256, 66),
    39: Blocks("MXFP4", 32, 17),
}
_BY_NAME = {blocks.name: blocks for blocks in TENSOR_TYPES.values()}
_DENSE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODE_KINDS: Mapping[str, int] = {
    "Q4_0": W4,
    "Q4_1": W4M,
    "Q4_K": W4M,
    "Q5_0": W8,
    "Q8_0": W8,
    "IQ4_NL": W8,
    "MXFP4": W8,
}
"""The types that are codes times scales of 32 columns, and the kernels' kind that holds them."""


def dequantize(stored: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """The float32 values, flat, of the stored blocks, flat; but for dense types, by the gguf package."""
    if type_name in _DENSE:
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return stored.view(_DENSE[type_name]).astype(np.float32)
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    kind, blocks = GGMLQuantizationType[type_name], _BY_NAME[type_name]
    values = np.empty(stored.size // blocks.nbytes * blocks.values, np.float32)
    step = _VALUES_AT_ONCE // blocks.values
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf scales pass through; checking weights is apart
        for first in range(0, stored.size // blocks.nbytes, step):
            # As a single row: gguf.quants cuts what it is given into groups of 16 rows, which would be too small.
            part = stored[first * blocks.nbytes : (first + step) * blocks.nbytes].reshape(1, -1)
            values[first * blocks.values : (first + step) * blocks.values] = quants.dequantize(part, kind)[0]
    return values


def codes_of_rows(stored: NDArray[np.uint8], type_name: str) -> CodedRows | None:
    """Rows of stored blocks, uint8 (rows, bytes), as codes. Those of Q4_0, Q4_1 and Q8_0 are views.

    Every number stays what it is, but for Q4_K: its scales and minima are products of a float16 and 6 bits, and are rounded
    to float16, by a part of 2^-11 at most while they are normal. None where such a product is too large for float16, or
    where a scale of MXFP4 is none.
    """
    rows, blocks = len(stored), _BY_NAME[type_name]
    stored = stored.reshape(rows, -1, blocks.nbytes)
    if type_name == "Q4_K":
        return _codes_of_q4_k(stored)
    if type_name == "MXFP4":
        return mxfp4.as_coded_rows(np.concatenate(mxfp4.halves(stored[..., 1:]), axis=2), stored[..., 0])
    scales = stored[..., :2].view(np.float16)[..., 0]
    kind, minima, words = CODE_KINDS[type_name], None, stored[..., 2:]
    if kind == W4M:
        minima, words = stored[..., 2:4].view(np.float16)[..., 0], stored[..., 4:]
    if type_name in ("Q5_0", "IQ4_NL"):  # codes in no order of ours: what the blocks stand for if their scale is 1
        alone = stored.copy()
        alone[..., :2] = np.ones(1, np.float16).view(np.uint8)
        words = dequantize(alone.reshape(-1), type_name).astype(np.int8).view(np.uint8).reshape(rows, -1, blocks.values)
    return CodedRows(kind, words.view(np.uint32), scales, minima)


def _codes_of_q4_k(stored: NDArray[np.uint8]) -> CodedRows | None:
    """Of blocks (rows, blocks, bytes): two float16, eight scales and minima of 6 bits, and the codes of 8 groups of 32."""
    from gguf.quants import Q4_K

    rows, blocks = stored.shape[:2]
    factors = np.ascontiguousarray(stored[..., :4]).view(np.float16).reshape(-1, 2, 1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        products = np.stack(Q4_K.get_scale_min(stored[..., 4:16].reshape(-1, 12)), axis=1) * factors
        params = (products * np.array([[1], [-1]], np.float32)).astype(np.float16).reshape(rows, blocks, 2, 8)
    if (np.isinf(params).reshape(products.shape) & np.isfinite(products)).any():
        return None
    # two groups share 32 bytes, the first has the lower halves; in a group of ours, columns 0 to 15 have them
    pairs = stored[..., 16:].reshape(rows, blocks, 4, 2, 16)
    words = np.empty((rows, blocks, 4, 2, 16), np.uint8)
    words[..., 0, :] = pairs[..., 0, :] & 15 | pairs[..., 1, :] << 4
    words[..., 1, :] = pairs[..., 0, :] >> 4 | pairs[..., 1, :] & 0xF0
    scales, minima = (np.ascontiguousarray(params[:, :, i]).reshape(rows, -1) for i in (0, 1))
    return CodedRows(W4M, words.reshape(rows, -1, 16).view(np.uint32), scales, minima)
