"""A results file: JSON Lines that grow row by row, and are never torn: a row is there whole, or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import filelock

from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_RESULT_LINE_BYTES

NEWLINE = b"\n"
BEGINNING = b'{"kind": "'  # of each row that is written here


class Journal:
    """A results file that one process at a time appends to.

    Entered, it is locked (by a file beside it) and read. A last line that breaks off is what a process left that was killed
    while it wrote: it is cut off, and ``torn`` says how many bytes it had. A row is on the disk when ``append`` returns.

    Args:
        path: made if there is none.

    Attributes:
        keys: of the rows that are in it.
        torn: bytes that were cut off.

    """

    def __init__(self, path: Path) -> None:
        self.path, self.keys, self.torn = path, set[str](), 0
        self._lock = filelock.FileLock(f"{path}.lock", timeout=0)
        self._file = -1

    def __enter__(self) -> "Journal":
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(f"{self.path}: another process is writing to it") from None
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be locked: {error.strerror}") from None
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._read()
        except OSError as error:
            self.__exit__()
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def _read(self) -> None:
        whole = 0
        with open(os.dup(self._file), "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_RESULT_LINE_BYTES + 1), b""), 1):
                if line.endswith(NEWLINE):
                    self.keys |= _key(line, f"{self.path}:{number}")
                    whole += len(line)
                elif len(line) > MAX_RESULT_LINE_BYTES:
                    raise UsageError(f"{self.path}:{number}: a line of more than {MAX_RESULT_LINE_BYTES} bytes")
                elif line.startswith(BEGINNING[: len(line)]) and not _is_whole(line):
                    self.torn = len(line)
                    os.ftruncate(self._file, whole)
                else:
                    self.keys |= _key(line, f"{self.path}:{number}")
                    os.write(self._file, NEWLINE)

    def rows(self, keys: set[str]) -> list[dict[str, Any]]:
        """The rows that have these keys, in the order of the file."""
        with self.path.open("rb") as file:
            rows = (json.loads(line) for line in file)
            return [row for row in rows if row.get("key") in keys]

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, whose first key is "kind"; UsageError where there is no room, and the file is then as it was."""
        assert next(iter(row)) == "kind"
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + NEWLINE
        before = os.fstat(self._file).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from None
        if isinstance(key := row.get("key"), str):
            self.keys.add(key)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _key(line: bytes, where: str) -> set[str]:
    """The key of a row, if it has one; UsageError for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not a JSON object: {shown(line[:60])}; is this a results file?")
    return {row["key"]} if isinstance(row.get("key"), str) else set()
