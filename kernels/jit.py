"""Every Numba flag of the package, and where compiled kernels are kept.

No ``fastmath``: the empty state is (M, S) = (-inf, 0), and LLVM may not be allowed to assume that infinities or NaN do
not exist; nor may it reorder sums, since a row's bits must not depend on how the call was cut. Vectors are explicit
(simd.py), so nothing is lost by it.
"""

import hashlib
import os
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
    """Where compiled kernels are stored: below MIXKV_CACHE where that is set, else in the user's cache folder."""
    root = os.environ.get("MIXKV_CACHE") or platformdirs.user_cache_dir("mixkv", appauthor=False)
    return Path(root) / "kernels" / _sources_hash()


if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # How long an idle worker of the OpenMP pool spins before it sleeps. The default, milliseconds, starves NumPy's BLAS,
    # whose threads want the same cores; this many rounds (some 25 us) bridge the gap from one kernel to the next.
    os.environ["GOMP_SPINCOUNT"] = "5000"

if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(cache_folder())

kernel: Callable[[Any], Any] = numba.njit(cache=True, nogil=True, error_model="numpy")
parallel_kernel: Callable[[Any], Any] = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)
inner: Callable[[Any], Any] = numba.njit(nogil=True, error_model="numpy")
"""A function that is only called by kernels: it is compiled into them, so a cache entry of its own would be waste."""
