"""Workers that do tasks together, one task after the other, within one parallel region.

A task is cut into shares. Whoever is free takes the next one, and when none is left waits until all are done: then the next
task begins. So one worker that is held up is helped by the others; it does not matter how many there are, nor whether they
really run at the same time; and going from task to task costs a fraction of a microsecond, where a parallel region costs
two or three. A share that raises an error, for want of memory, counts as done, or the others would wait for it. Whoever
began the region asks ``have_failed`` behind it.
"""

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import simd
from .jit import attempt_share, inner
from .simd import _IS_X86, _operation

TASK_NBYTES = 64  # of counters: shares taken, shares done, shares failed; a cache line
_DONE, _FAILED = 8, 16
# In the place of the number of workers: as many as there are threads in force. Python takes 30 us to say how many.
ALL_WORKERS = 0
_ROUNDS = 2000  # of waiting, some 20 us, before the core is offered to others


@_operation(types.int64, types.intp, types.int64)
def _add_atomically(_: Any, builder: Any, address: Any, number: Any) -> Any:
    """Add to an int64 that others add to as well; what it was before."""
    pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
    return builder.atomic_rmw("add", pointer, number, "seq_cst")


@_operation(types.int64, types.intp)
def _read_atomically(_: Any, builder: Any, address: Any) -> Any:
    """An int64 that others write to; what they wrote before is seen from here on."""
    return builder.load_atomic(builder.inttoptr(address, ir.IntType(64).as_pointer()), "seq_cst", 8)


@_operation(types.void, types.int64)
def _rest(_: Any, builder: Any, rounds: Any) -> None:
    """Wait a moment, the longer ``rounds`` there were already."""
    if _IS_X86:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "pause", "", [], True)
    if sys.platform != "win32":
        with builder.if_then(builder.icmp_signed(">", rounds, ir.Constant(rounds.type, _ROUNDS)), likely=False):
            signature = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, "sched_yield"), [])


@_operation(types.int64)
def threads_in_force(_: Any, builder: Any) -> Any:
    """How many threads a region has; for parallel kernels alone, as others are loaded without the library that says it."""
    signature = ir.FunctionType(ir.IntType(types.intp.bitwidth), [])
    number = builder.call(cgutils.get_or_insert_function(builder.module, signature, "get_num_threads"), [])
    return builder.sext(number, ir.IntType(64))


@inner
def begin_tasks(tasks, count):  # type: ignore[no-untyped-def]
    """Before the region: the counters of so many tasks, at this address, are zeros."""
    for i in range(0, count * TASK_NBYTES, 8):
        simd.store_integer(tasks + i, np.int64(0))


@inner
def have_failed(tasks, count):  # type: ignore[no-untyped-def]
    """Behind the region: whether a share of one of the tasks raised an error."""
    failed = np.int64(0)
    for i in range(count):
        failed += simd.integer_at(tasks + i * TASK_NBYTES + _FAILED)
    return failed > 0


@inner
def attempt(kernel, made_for, share, shares, a, b, c, d, e, f, task):  # type: ignore[no-untyped-def]
    """Do something of the type SHARE, and note it in a task if it fails. kernel: its address."""
    if attempt_share(kernel, made_for, share, shares, a, b, c, d, e, f):
        _add_atomically(task + _FAILED, 1)


@inner
def do_task(kernel, made_for, shares, a, b, c, d, e, f, task):  # type: ignore[no-untyped-def]
    """A worker's part in a task, and waiting until all of it is done.

    kernel: the address of what does a share, of the type SHARE; made_for, a .. f: its arguments. task: the address of the
    task's counters.
    """
    share = _add_atomically(task, 1)
    while share < shares:
        attempt(kernel, made_for, share, shares, a, b, c, d, e, f, task)
        _add_atomically(task + _DONE, 1)
        share = _add_atomically(task, 1)
    rounds = 0
    while _read_atomically(task + _DONE) < shares:
        rounds += 1
        _rest(rounds)
