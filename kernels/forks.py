"""Whether the kernels can be used in this process: GNU OpenMP's threads do not survive a fork.

A child that was forked after its parent had started them is ended by Numba, with SIGTERM, as soon as a parallel kernel
runs in it; a pool of such children (multiprocessing's "fork") replaces them for ever and never gets an answer. Children
that were forked before, and all that were spawned, have threads of their own.
"""

import os

import numba

MESSAGE = (
    "the kernels cannot be used here: this process was forked from one that had used them, and their threads (GNU OpenMP) "
    "do not survive that; start it with multiprocessing's 'spawn' method, or before the kernels are used"
)

_forked = False


def _after_fork() -> None:
    """In the child: find out whether the parent had started the threads of a library that a fork breaks."""
    global _forked
    try:
        layer = numba.threading_layer()
    except ValueError:  # none was started
        return
    if layer == "omp":
        from numba.np.ufunc import omppool  # type: ignore[attr-defined]

        _forked = omppool.openmp_vendor == "GNU"


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)


def usable() -> bool:
    """Whether parallel kernels can run in this process; if not, ``MESSAGE`` says why."""
    return not _forked


def check_usable() -> None:
    """RuntimeError where they cannot."""
    if _forked:
        raise RuntimeError(MESSAGE)
