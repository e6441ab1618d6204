"""Whether numbers are sound, looked for in one pass that makes no array."""

import numpy as np

from .jit import kernel

_EXPONENT = np.int32(0x7F800000)  # all of it is set in infinities and NaN
_NUMBER = np.int32(0x7FFFFFFF)  # all but the sign


@kernel
def are_finite(x):  # type: ignore[no-untyped-def]
    """Whether all numbers of x, float32 (rows, columns), C order, are finite."""
    bits, bad = x.view(np.int32), False
    for row in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            bad |= bits[row, i] & _EXPONENT == _EXPONENT
    return not bad


@kernel
def are_below(ids, stop):  # type: ignore[no-untyped-def]
    """Whether all of int64 (N,) are from 0 to stop - 1."""
    bad = False
    for i in range(len(ids)):
        bad |= (ids[i] < 0) | (ids[i] >= stop)
    return not bad


@kernel
def have_largest(x):  # type: ignore[no-untyped-def]
    """Whether the largest number of each row of x, float32 (rows, columns), C order, is finite; -inf may be among them."""
    bits, sound = x.view(np.int32), True
    for row in range(bits.shape[0]):
        bad, finite = False, False
        for i in range(bits.shape[1]):
            own = bits[row, i]
            bad |= (own & _NUMBER > _EXPONENT) | (own == _EXPONENT)  # NaN, or infinity
            finite |= own & _EXPONENT != _EXPONENT
        sound &= finite & (not bad)
    return sound
