"""Numba as it is, whatever folder the process was started in; ``kernels/__init__`` imports this before anything of Numba.

Numba takes settings from a file ``.numba_config.yaml`` of the current folder
(https://numba.readthedocs.io/en/stable/reference/envvars.html), which may be a stranger's: a model's. Such a file can name
modules to import, have kernels compiled for another CPU, or switch compiling off. Environment variables still work.
"""

import sys
import warnings

if "numba" not in sys.modules:
    _ABSENT = object()
    _yaml = sys.modules.get("yaml", _ABSENT)
    sys.modules["yaml"] = None  # type: ignore[assignment]  # Numba reads the file if it can import this
    warnings.filterwarnings("ignore", "A Numba config file is found")  # it looks again whenever it compiles
    try:
        import numba.core.config  # noqa: F401
    finally:
        if _yaml is _ABSENT:
            del sys.modules["yaml"]
        else:
            sys.modules["yaml"] = _yaml  # type: ignore[assignment]
