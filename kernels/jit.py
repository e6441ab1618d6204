"""Every Numba flag of the package, and where compiled kernels are kept.

No ``fastmath``: the empty state is (M, S) = (-inf, 0), and LLVM may not be allowed to assume that infinities or NaN do
not exist; nor may it reorder sums, since a row's bits must not depend on how the call was cut. Vectors are explicit
(simd.py), so nothing is lost by it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import platformdirs


def _sources_hash() -> str:
    """A name for this state of the kernels. Numba's own check looks only at the file of the function it compiles."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels are stored: below MIXKV_CACHE or NUMBA_CACHE_DIR if set, else in the user's cache folder.

    Where none of them can be written, a folder of this state of the kernels among the system's temporary files.
    """
    environment = os.environ.get("MIXKV_CACHE") or os.environ.get("NUMBA_CACHE_DIR")
    root = environment or platformdirs.user_cache_dir("mixkv", appauthor=False)
    wanted = Path(root).absolute() / "kernels" / _sources_hash()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        user = getattr(os, "getuid", lambda: "")()
        return Path(tempfile.gettempdir()) / f"mixkv-kernels-{user}" / _sources_hash()


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


kernel = _compiler()
parallel_kernel = _compiler(parallel=True)
inner: Callable[[Any], Any] = numba.njit(nogil=True, error_model="numpy")
"""A function that is only called by kernels: it is compiled into them, so a cache entry of its own would be waste."""
