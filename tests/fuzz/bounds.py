"""What a reader may take for one foreign file of at most a megabyte: processor time, and memory beyond what there was."""

import contextlib
import ctypes
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mixkv.models.errors import MixkvError

MAX_FILE_NBYTES = 1_000_000
MAX_SECONDS = 2.0
MAX_NBYTES = 256 << 20
_M_ARENA_MAX = -8  # malloc.h: by default each thread's first allocation reserves 64 MB of addresses


class BoundError(AssertionError):
    """A reader that took longer, or more memory, than it may."""


def check(run: Callable[[bytes], None], data: bytes) -> bool:
    """Run a reader on a file's bytes, within the bounds; whether it took them (or refused them by a MixkvError).

    Anything else that it raises comes through. What was slow once, because something was compiled or the machine was
    busy, is not: it is run again. Memory is bounded on Linux only, where the system can refuse addresses.

    Raises:
        BoundError: too slow twice, too much memory.

    """
    assert len(data) <= MAX_FILE_NBYTES
    for _ in range(2):
        started = time.process_time()
        taken = _run(run, data)
        took = time.process_time() - started
        if took <= MAX_SECONDS:
            return taken
    raise BoundError(f"{took:.1f} s of processor time, at most {MAX_SECONDS} are allowed")


def _run(run: Callable[[bytes], None], data: bytes) -> bool:
    try:
        with _less_memory(), warnings.catch_warnings():
            warnings.simplefilter("error")  # it would be a line on stderr that says nothing to people
            run(data)
    except MixkvError as error:
        cause: BaseException | None = error
        while cause is not None:  # a reader may have taken the system's refusal for the file's fault
            if isinstance(cause, MemoryError):
                raise BoundError(f"more than {MAX_NBYTES} bytes, refused as: {error}") from error
            cause = cause.__cause__ or cause.__context__
        if "\n" in str(error):
            raise AssertionError(f"a refusal of several lines: {error}") from error
        return False
    except MemoryError as error:
        raise BoundError(f"more than {MAX_NBYTES} bytes") from error
    return True


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    """A limit on addresses, MAX_NBYTES above those in use."""
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_NBYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
