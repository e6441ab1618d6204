"""Workers that do tasks together, one task after the other, within one parallel region.

A task is cut into shares. Whoever is free takes the next one, and when none is left waits until all are done: then the next
task begins. So one worker that is held up is helped by the others; it does not matter how many there are, nor whether they
really run at the same time; and going from task to task costs a fraction of a microsecond, where a parallel region costs
two or three. A share must not raise an error: the others would wait for it.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .jit import inner
from .simd import _IS_X86, _operation

TASK_NBYTES = 64  # of counters: shares taken, shares done; a cache line
_DONE = 8
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


@inner
def take_share(task):  # type: ignore[no-untyped-def]
    """The number of the next share of a task, from 0 on. ``task`` is the address of its counters, which begin as zeros."""
    return _add_atomically(task, 1)


@inner
def finish_share(task):  # type: ignore[no-untyped-def]
    """Say that a share that was taken is done."""
    _add_atomically(task + _DONE, 1)


@inner
def wait_for_all(task, shares):  # type: ignore[no-untyped-def]
    """Wait until all shares are done, none being left to take."""
    rounds = 0
    while _read_atomically(task + _DONE) < shares:
        rounds += 1
        _rest(rounds)
