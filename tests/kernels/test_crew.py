"""Workers that do tasks together: each share once, tasks in their order, and a share that fails ends nobody's waiting."""

import subprocess
import sys

import numpy as np
import pytest
from numba import prange, types

from mixkv.kernels import simd
from mixkv.kernels.crew import TASK_NBYTES, begin_tasks, do_task, have_failed
from mixkv.kernels.jit import SHARE, parallel_kernel, standalone

TASKS = 200


@standalone(SHARE)
def note(at, share, shares, task, fail, _1, _2, _3, _4):  # type: ignore[no-untyped-def]
    """Write down that a share of a task was done, and how many of the task before had been when it was."""
    if task == fail and share == 1:
        raise ValueError("a share that fails")
    done = np.int64(0)
    for i in range(shares if task else 0):
        done += simd.integer_at(at + 8 * (8 * (task - 1) + i))
    if task and done < (shares - 1 if fail == task - 1 and shares > 1 else shares):
        simd.store_integer(at + 8 * (8 * task + share), np.int64(1000))  # too early
    own = at + 8 * (8 * task + share)
    simd.store_integer(own, simd.integer_at(own) + 1)


@standalone(types.void(*[types.int64] * 6))
def follow(kernel, at, tasks, shares, count, fail):  # type: ignore[no-untyped-def]
    """One worker's part in all tasks."""
    none = np.int64(0)
    for i in range(count):
        do_task(kernel, at, shares, np.int64(i), fail, none, none, none, none, tasks + i * TASK_NBYTES)


_follow = follow.call


@parallel_kernel
def run(follow_at, note_at, found, tasks, shares, workers, fail):  # type: ignore[no-untyped-def]
    """All tasks by so many workers; whether a share failed."""
    count = len(found)
    begin_tasks(np.int64(tasks.ctypes.data), count)
    for _ in prange(workers):
        _follow(
            follow_at, note_at, found.ctypes.data, tasks.ctypes.data, np.int64(shares), np.int64(count), np.int64(fail)
        )
    return have_failed(np.int64(tasks.ctypes.data), count)


@pytest.mark.parametrize("shares", [1, 2, 8])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("fail", [-1, 7])
def test_every_share_is_done_once_and_after_the_task_before(shares: int, workers: int, fail: int) -> None:
    """Also with more workers than there are threads."""
    tasks = np.full(TASKS * TASK_NBYTES // 8, 99, np.int64)
    for _ in range(20):
        found = np.zeros((TASKS, 8), np.int64)
        assert run(follow.address(), note.address(), found, tasks, shares, workers, fail) == (fail >= 0 and shares > 1)
        expected = np.zeros((TASKS, 8), np.int64)
        expected[:, :shares] = 1
        if fail >= 0 and shares > 1:
            expected[fail, 1] = 0
        np.testing.assert_array_equal(found, expected)


OUT_OF_MEMORY = """
import resource, numpy as np
from mixkv.kernels.flash import flash_attention
flash_attention(*(np.ones((4, heads, 64), np.float32) for heads in (4, 2, 2)))  # compiled, and threads are there
q, k, v = (np.ones((128, heads, 4096), np.float32) for heads in (4, 2, 2))
out, state = np.zeros_like(q), np.zeros((4, 128, 2), np.float32)
state[..., 0] = -np.inf
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)
try:
    flash_attention(q, k, v, out=out, state=state)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_workers_without_memory_end_in_an_error() -> None:
    found = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "attention ran out of memory\n"
