"""How many threads the kernels use: Numba's own functions, so that no other layer imports Numba."""

from numba import config, get_num_threads, set_num_threads, threading_layer

__all__ = ["get_num_threads", "most_threads", "set_num_threads", "threading_layer"]


def most_threads() -> int:
    """The most that ``set_num_threads`` takes: what NUMBA_NUM_THREADS says, or the number of cores."""
    return int(config.NUMBA_NUM_THREADS)
