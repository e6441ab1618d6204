"""What the cache has, and removing it."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..check import listed
from ..errors import ModelError, UsageError
from . import huggingface, pypi, registry
from .files import cache_folder, disk_nbytes, locked, remove
from .shelf import DamagedShelf, ModelName, Shelf, all_shelves, open_shelf


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache: the name that finds it, where, bytes on disk, and the SHA-256 of each file by its path."""

    name: str
    path: Path
    nbytes: int
    license: str
    version: str
    sha256: dict[str, str]


def cached_models() -> list[CachedModel]:
    """Every model that the cache holds, of the registry, ``hf:`` and ``pypi:``, but for those of ``damaged_shelves``."""
    found = []
    for name, entry in registry.REGISTRY.items():
        if path := registry.cached_file(name):
            digests = {entry.file_name: entry.file_sha256}
            found.append(CachedModel(name, path, path.stat().st_size, entry.license, entry.wheels[0].version, digests))
    for shelf in all_shelves()[0]:
        for (version, file), files in shelf.models.items():
            folder = shelf.version_folder(version)
            nbytes = sum(disk_nbytes(folder / each) for each in files)
            digests = {each: known.sha256 for each, known in files.items()}
            full, about = shelf.full_name(version, file), shelf.licenses.get(version, "")
            found.append(CachedModel(full, shelf.path(version, file), nbytes, about, version, digests))
    return found


def damaged_shelves() -> list[DamagedShelf]:
    """Repositories and packages of which nobody knows what the cache holds, as their index is damaged."""
    return all_shelves()[1]


def partial_downloads() -> list[Path]:
    """What downloads that were stopped have left, and the next one of the same model would go on with.

    Also what those have that still run.
    """
    found = [path for path in map(registry.parts_folder, registry.REGISTRY.values()) if os.path.lexists(path)]
    return sorted(found + [path for shelf in all_shelves()[0] for path in shelf.remains()])


def remove_model(name: str) -> int:
    """Remove a model from the cache, with what a stopped download of it has left; how many bytes came free.

    Raises UsageError for a name that the cache does not have, DownloadError while it is being fetched, and ModelError for
    what lies behind a link.
    """
    left = ""
    if name in registry.REGISTRY:
        entry = registry.REGISTRY[name]
        present = [path for path in registry.belongings(entry) if os.path.lexists(path)]
        if present:
            with locked(cache_folder(), name, name, wait=False):
                return sum(remove(path, folder=path == registry.parts_folder(entry)) for path in present)
    elif shelf := _shelf_of(name):
        with shelf.locked(name, wait=False):
            shelf, asked = open_shelf(shelf.kind, shelf.name), _parsed(name)
            meant = shelf.meant(asked.revision, asked.file)
            several = shelf.models and not (meant or asked.revision or asked.file)
            remains = [] if several else shelf.remains_of(asked)
            if meant or remains:
                return (shelf.drop(*meant) if meant else 0) + shelf.remove(remains)
            if shelf.remains():
                left = f"; what stopped downloads of {shelf.name} have left goes with `mixkv rm --partial`"
    names = [model.name for model in cached_models()]
    raise UsageError(f"the cache has no model {name!r}; it has {listed(names) or 'none'}{left}")


def remove_all() -> int:
    """Remove every model and everything that stopped downloads have left; how many bytes came free.

    What is in ``damaged_shelves`` stays. ModelError for what else cannot be removed, when all the rest has been.
    """
    freed, problems = 0, []
    for name, entry in registry.REGISTRY.items():
        if any(map(os.path.lexists, registry.belongings(entry))):
            try:
                freed += remove_model(name)
            except ModelError as error:
                problems.append(str(error))
    for each in all_shelves()[0]:
        if each.models:
            with each.locked(each.name, wait=False):
                shelf = open_shelf(each.kind, each.name)
                for model in list(shelf.models):
                    try:
                        freed += shelf.drop(*model)
                    except ModelError as error:
                        problems.append(str(error))
                        shelf = open_shelf(each.kind, each.name)
    freed += remove_partial()
    if problems:
        raise ModelError(f"{'; '.join(problems)}; all else is removed, {freed:,} bytes came free")
    return freed


def remove_partial() -> int:
    """Remove what stopped downloads have left; how many bytes came free. DownloadError for one that still runs.

    What is in ``damaged_shelves`` stays.
    """
    freed, folder = 0, cache_folder()
    for name, entry in registry.REGISTRY.items():
        path = registry.parts_folder(entry)
        if os.path.lexists(path):
            with locked(folder, name, path.name, wait=False):
                freed += remove(path, folder=True)
    for each in all_shelves()[0]:
        if each.remains():
            with each.locked(each.name, wait=False):
                shelf = open_shelf(each.kind, each.name)
                freed += shelf.remove(shelf.remains())
    return freed


def _shelf_of(name: str) -> Shelf | None:
    if not name.startswith(("hf:", "pypi:")):
        return None
    shelf = open_shelf(name.partition(":")[0], _parsed(name).shelf)  # before its lock is made
    return shelf if shelf.folder.is_dir() else None


def _parsed(name: str) -> ModelName:
    return huggingface.parse(name) if name.startswith("hf:") else pypi.parse(name)
