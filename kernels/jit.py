"""Every Numba flag of the package.

No ``fastmath``: the empty state is (M, S) = (-inf, 0), and LLVM may not be allowed to assume that infinities or NaN do
not exist; nor may it reorder sums, since a row's bits must not depend on how the call was cut. Vectors are explicit
(simd.py), so nothing is lost by it.
"""

import os
from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from .compiled import cache_folder

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # How long an idle worker of the OpenMP pool spins before it sleeps. The default, milliseconds, starves NumPy's BLAS,
    # whose threads want the same cores; this many rounds (some 25 us) bridge the gap from one kernel to the next.
    os.environ["GOMP_SPINCOUNT"] = "5000"

_FOLDER = str(cache_folder())


def _compiler(**flags: Any) -> Callable[[Any], Any]:
    """A decorator that compiles with these flags, and keeps the result in our folder; others' functions keep theirs."""

    def decorate(function: Any) -> Any:
        theirs, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _FOLDER
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", **flags)(function)
        finally:
            numba.config.CACHE_DIR = theirs

    return decorate


kernel = _compiler(no_cfunc_wrapper=True)
parallel_kernel = _compiler(parallel=True, no_cfunc_wrapper=True)
inner: Callable[[Any], Any] = register_jitable(nogil=True, error_model="numpy", no_cfunc_wrapper=True)
"""A function that is only called by kernels: it is compiled into them, so a cache entry of its own would be waste.

With ``njit`` it would be compiled for Python and for C to call, too, and anew for each constant that it is called with.
"""


def _by_address(signature: Any, *, attempts: bool = False) -> Any:
    """An intrinsic that calls the kernel of ``signature`` at an address, its first argument; the others are the kernel's.

    attempts: an error is not passed on; the result, int64, says whether there was one (1) or not (0).
    """

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        convention, parameters = context.call_conv, signature.args
        pointer = convention.get_function_type(signature.return_type, parameters).as_pointer()
        status, _ = convention.call_function(
            builder, builder.inttoptr(args[0], pointer), signature.return_type, parameters, args[1:]
        )
        if attempts:
            return builder.zext(status.is_error, context.get_value_type(types.int64))
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    names = ", ".join(f"a{i}" for i in range(len(signature.args) + 1))
    result = types.int64 if attempts else types.void
    scope: dict[str, Any] = {"made": result(types.intp, *signature.args), "codegen": codegen}
    # Numba reads the number of arguments from the function's own signature, so it has to be spelled out.
    exec(f"def call(typingctx, {names}):\n    return made, codegen", scope)  # noqa: S102
    scope["call"].__module__ = __name__
    return intrinsic(scope["call"])


_standalone_kernel = _compiler(no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Standalone:
    """A kernel that other kernels call by its address, and so do not contain.

    What a kernel contains is compiled with it once more, and parallel kernels are compiled four times over. ``call`` is
    for kernels: its first argument is ``address()``, which the caller's caller has to pass down; the others are those of
    the function, of exactly the types of its signature. Python calls those of the signature SHARE by ``do_share``.
    """

    def __init__(self, function: Any, signature: Any) -> None:
        self.function, self._signature = _standalone_kernel(function), signature
        self._address = 0
        self.call = _by_address(signature)

    def address(self) -> int:
        """Where its machine code is; compiled, or loaded from the cache, at the first time."""
        if not self._address:
            self.function.compile(self._signature)
            compiled = self.function.overloads[self._signature.args]
            self._address = int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
        return self._address


SHARE = types.void(*[types.int64] * 9)
"""A share of a task (crew.py): what it is done for, the share, how many there are, and six numbers that the task knows."""
attempt_share = _by_address(SHARE, attempts=True)
_call_share = _by_address(SHARE)


@kernel
def do_share(address, a, b, c, d, e, f, g, h, i):  # type: ignore[no-untyped-def]
    """Call a standalone kernel whose signature is SHARE, or the same; its address comes first."""
    _call_share(address, a, b, c, d, e, f, g, h, i)


def standalone(signature: Any) -> Callable[[Any], Standalone]:
    """A decorator that makes a ``Standalone`` kernel of a function that returns nothing."""
    return lambda function: Standalone(function, signature)
