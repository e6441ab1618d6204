"""Files in the cache: where it is, digests, locks, and writing that leaves the old file or the new one."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from ..check import shown
from ..errors import DownloadError, MixkvError, ModelError

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all (0 where nobody knows yet); what it raises ends the download."""

CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """The folder of model files: $MIXKV_CACHE/models, or "models" in the system's cache folder for mixkv."""
    root = os.environ.get("MIXKV_CACHE")
    return (Path(root) if root else platformdirs.user_cache_path("mixkv", appauthor=False)).absolute() / "models"


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sha256(text: object) -> bool:
    """Whether it is written as a SHA-256 in hex: 64 digits, small letters."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_plain_path(name: str) -> bool:
    """Whether a relative path with "/" stays below its folder, and means the same on every system."""
    path = PurePosixPath(name)
    plain = name.isprintable() and not set(name) & set('\\:*?"<>|') and len(name) <= 255
    return plain and name == str(path) and not path.is_absolute() and not {"..", "."} & set(path.parts)


@contextmanager
def locked(folder: Path, name: str, who: str, *, wait: bool = True) -> Iterator[None]:
    """One process at a time: the lock is ``.name.lock`` in the folder, which is made.

    DownloadError where it is taken and nobody is to wait; ``who`` is the model in its message. ModelError for a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    if path.is_symlink():
        raise ModelError(f"{path} is a link, and is to be a file of the cache: remove the link")
    lock = FileLock(path)
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise DownloadError(f"{who}: another process is fetching it; wait for it or end it") from None


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file at once: written beside its place, made safe on disk and renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)  # it may be a link
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let new names survive a power cut, where folders can be flushed (not on Windows)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_room(name: str, folder: Path, needed: int, kind: type[MixkvError] = DownloadError) -> None:
    """An error of that kind where the disk of ``folder`` has fewer bytes free than are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise kind(f"{name}: {folder} has room for {free:,} bytes, {needed:,} are needed")


def disk_nbytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what cannot be looked at counts 0. Links are not followed."""
    nbytes = 0
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(disk_nbytes(each) for each in path.iterdir())
        nbytes = path.lstat().st_size
    return nbytes


def check_no_link(path: Path) -> None:
    """ModelError where a folder from the cache folder down to ``path`` is a link: what it leads to is not ours."""
    for folder in [path, *path.parents]:
        if folder == cache_folder():
            return
        if folder.is_symlink():
            raise ModelError(
                f"{folder} is a link, and the cache follows none below its own folder: remove the link; to keep models "
                f"elsewhere, set MIXKV_CACHE, or let {cache_folder()} be a link"
            )
    raise ModelError(f"{path} is not in the cache, {cache_folder()}")


def check_removable(path: Path, *, folder: bool = False) -> None:
    """ModelError for what lies outside of the cache or behind a link, and for a folder in the place of a file."""
    check_no_link(path.parent)
    if not folder and path.is_dir() and not path.is_symlink():
        raise ModelError(f"{path} is a folder, where a file of the cache is to be: remove it")


def remove(path: Path, *, folder: bool = False) -> int:
    """Remove a file, or a folder with all that is in it, from the cache; how many bytes came free.

    A link goes, not what it leads to. Nothing is removed where ``check_removable`` raises. What another process removes
    meanwhile, as a pip does that notices the end of the mixkv it worked for, is simply gone.
    """
    check_removable(path, folder=folder)
    nbytes = disk_nbytes(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_raise_unless_gone)
    else:
        path.unlink(missing_ok=True)
    return nbytes


def _raise_unless_gone(function: Callable[..., object], path: str, info: tuple[Any, Any, Any]) -> None:
    """What ``shutil.rmtree`` calls with each error."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def remove_empty(path: Path, folder: Path) -> None:
    """Remove the folders between a path that was removed and ``folder`` that have nothing in them now."""
    for place in path.parents:
        if place == folder:
            return
        with suppress(OSError):  # of one that is not empty
            place.rmdir()


def cannot_store(name: str, folder: Path, error: OSError) -> DownloadError:
    """What to say where the system refuses to write."""
    return DownloadError(f"{name}: cannot store it in {folder}: {error.strerror or shown(str(error))}")
