"""Memory of a kernel's own, for as long as it runs."""

import numpy as np

from .jit import inner

_LINE = 64  # bytes


@inner
def own_memory(nbytes):  # type: ignore[no-untyped-def]
    """Memory of a kernel's own, whatever is in it: an array with room for so many bytes from ``begin_of`` on.

    Numba frees an array after its last mention, and addresses in it do not count as one: end with ``let_go``.
    """
    return np.empty(nbytes + _LINE, np.uint8)


@inner
def begin_of(memory):  # type: ignore[no-untyped-def]
    """The first address in it that is a multiple of 64."""
    return (np.int64(memory.ctypes.data) + _LINE - 1) // _LINE * _LINE


@inner
def let_go(memory):  # type: ignore[no-untyped-def]
    """Its last mention."""
    memory[0] = 0
