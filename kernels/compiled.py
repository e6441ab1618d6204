"""Where compiled kernels are kept, a folder for each state of the kernels, and removing those of other states."""

import atexit
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import numba
import platformdirs

_STATE = re.compile(r"[0-9a-f]{16}")
_WRITTEN = re.compile(r"\.nb[ic](\.tmp\.\w+)?$")  # by Numba, of kernels


def _sources_hash() -> str:
    """A name for this state of the kernels. Numba's own check looks only at the file of the function it compiles."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def wanted_folder() -> Path:
    """Where compiled kernels belong: below MIXKV_CACHE or NUMBA_CACHE_DIR if set, else in the user's cache folder."""
    environment = os.environ.get("MIXKV_CACHE") or os.environ.get("NUMBA_CACHE_DIR")
    root = environment or platformdirs.user_cache_dir("mixkv", appauthor=False)
    return Path(root).absolute() / "kernels" / _sources_hash()


def cache_folder() -> Path:
    """Where compiled kernels are stored: where they belong, if that can be written.

    Else a folder of this state of the kernels among the system's temporary files, if nobody else can write to it; else one
    for this process alone, of which a RuntimeWarning speaks.
    """
    wanted = wanted_folder()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        return (_temporary() if _is_private(_temporary(), make=True) else _for_this_process()) / _sources_hash()


def _temporary() -> Path:
    user = getattr(os, "getuid", lambda: "")()
    return Path(tempfile.gettempdir()) / f"mixkv-kernels-{user}"


def _is_private(folder: Path, *, make: bool = False) -> bool:
    """Whether it is a folder, and no link to one, of this user that nobody else can write to: code is loaded from it."""
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows has a temporary folder for each user
        return folder.is_dir()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@functools.cache
def _for_this_process() -> Path:
    """A new folder that only this user can read or write, removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="mixkv-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"{wanted_folder()} cannot be written, and {_temporary()} is no folder that only you can write to: kernels are "
        "compiled for this process alone; set MIXKV_CACHE to another folder, or remove that one",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def nbytes(folder: Path) -> int:
    """Bytes of the files in a folder of compiled kernels."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def others() -> list[Path]:
    """Folders of kernels that other versions of mixkv, of Numba or of a checkout have compiled."""
    current = _sources_hash()
    roots = {wanted_folder().parent} | {folder for folder in (_temporary(),) if _is_private(folder)}
    found = [path for root in roots if root.is_dir() for path in root.iterdir()]
    return sorted(p for p in found if _STATE.fullmatch(p.name) and p.name != current and _has_only_kernels(p))


def _has_only_kernels(folder: Path) -> bool:
    """Whether it is a folder, and no link, with nothing in it that Numba would not have written."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.is_dir() or _WRITTEN.search(path.name) for path in folder.rglob("*"))


def remove_others() -> int:
    """Remove them; how many bytes came free. A process of such a version that runs compiles anew what it still needs."""
    freed = 0
    for folder in others():
        freed += nbytes(folder)
        shutil.rmtree(folder)
    return freed
