"""Compiling the kernels that a session runs, step by step, so that somebody can watch. Later runs load them from disk."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from numba.core import event

from .activations import PLAIN
from .attention import KERNELS
from .chain import Projection, address_of
from .flash import flash_attention
from .health import are_below, are_finite, have_largest
from .matmul import matvec
from .project import follow_chain, multiply_blocks, normalize_rows, prepare_rows, rotate_rows
from .segment import quantize
from .sight import look, renew_calls
from .tables import CALL_FIELDS, STEP
from .threads import get_num_threads
from .weights import W8, empty_matrix


def _attention(n_queries: int, n_keys: int) -> None:
    q, kv = np.ones((n_queries, 1, 16), np.float32), np.ones((n_keys, 1, 16), np.float32)
    flash_attention(q, kv, kv)


def _linear() -> None:
    layer = Projection([empty_matrix(W8, 16, 32)], None, PLAIN, None, 0.0)
    layer(np.ones((1, 32), np.float32), get_num_threads())
    layer.take(np.zeros(1, np.int64), np.empty((1, 32), np.float32))


def _steps() -> None:
    """What a session does around a pass."""
    none, row = np.zeros(1, np.int64), np.zeros((1, 1), np.float32)
    look(0, none, 64, 0, 0, 1, 1, 0, 1, np.empty((6, 1), np.int64), np.empty(CALL_FIELDS - STEP, np.int64))
    renew_calls(np.zeros((0, 4), np.int64), none[:0])
    are_below(none, 1)
    are_finite(row)
    have_largest(row)
    address_of(row)


_STANDALONE = (*KERNELS.values(), multiply_blocks, prepare_rows, rotate_rows, normalize_rows, follow_chain)
STEPS: dict[str, Callable[[], object]] = {
    **{kernel.function.__name__.replace("_", " "): kernel.address for kernel in _STANDALONE},
    "attention": lambda: _attention(1, 1),
    "merging": lambda: _attention(1, 513),
    "quantizing": lambda: quantize(np.ones((1, 1, 16), np.float32), np.ones((1, 1, 16), np.float32)),
    "linear layers": _linear,
    "steps": _steps,
    "matrix-vector product": lambda: matvec(np.ones((4, 16), np.float32), np.ones(16, np.float32)),
}
"""What each step compiles, or loads from the cache, by its name."""


def warm_up(progress: Callable[[int, int, str], None] | None = None) -> None:
    """Make every kernel ready; ``progress`` is called with (steps done, steps in all, name of the next)."""
    names = list(STEPS)
    for i, name in enumerate(names):
        if progress is not None:
            progress(i, len(names), name)
        STEPS[name]()
    if progress is not None:
        progress(len(names), len(names), "")


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts the functions that are compiled meanwhile, because the cache does not have them."""
    with event.install_recorder("numba:compile") as recorder:
        yield lambda: sum(record.is_start for _, record in recorder.buffer)
