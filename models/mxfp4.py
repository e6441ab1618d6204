"""MXFP4: groups of 32 numbers of 4 bits (a sign, two bits of exponent, one of mantissa) that share a power of two, a byte.

The format is that of https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf. Its numbers are
multiples of a half, so they are kept as whole ones, twice as large, with half of the scale: 2^(exponent - 128).
"""

import numpy as np
from numpy.typing import NDArray

from ..kernels.weights import W8, CodedRows

GROUP = 32
_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # of each code
_BIAS = 128
_EXPONENTS = range(_BIAS - 24, _BIAS + 16)  # whose powers of two are float16, subnormal ones included


def as_numbers(codes: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 (rows, groups * 32) of codes, 0 .. 15 (rows, groups, 32), and of exponents (rows, groups)."""
    with np.errstate(over="ignore"):
        numbers = np.ldexp(_TWICE[codes].astype(np.float32), exponents.astype(np.int32)[..., None] - _BIAS)
    return numbers.reshape(len(codes), -1)


def as_coded_rows(codes: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> CodedRows | None:
    """The same numbers as signed bytes with float16 scales; None where a scale that counts is no float16."""
    twice = _TWICE[codes]
    fits = (exponents >= _EXPONENTS.start) & (exponents < _EXPONENTS.stop)
    if not (fits | ~twice.any(axis=2)).all():
        return None
    scales = np.where(fits, np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS), 0).astype(np.float16)
    return CodedRows(W8, twice.view(np.uint32), scales)


def halves(words: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The lower and the upper codes of bytes."""
    return words & np.uint8(15), words >> np.uint8(4)
