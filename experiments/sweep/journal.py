"""A results file: JSON Lines that grow row by row, and are never torn: a row is there whole, or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import filelock

from ...models.check import shown
from ...models.errors import UsageError
from ...models.limits import MAX_RESULT_LINE_BYTES

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
            if self.path.exists() and not self.path.is_file():
                raise UsageError(f"{self.path}: not a file")  # a pipe would keep us waiting
            if not self.path.parent.is_dir():  # the lock would make it
                raise UsageError(f"{self.path}: there is no folder {self.path.parent}")
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
                where = f"{self.path}:{number}"
                if len(line.removesuffix(NEWLINE)) > MAX_RESULT_LINE_BYTES:
                    raise UsageError(f"{where}: a line of more than {MAX_RESULT_LINE_BYTES} bytes")
                if line.endswith(NEWLINE):
                    self.keys |= _key(line, where)
                    whole += len(line)
                elif not line.startswith(BEGINNING[: len(line)]):  # what is not ours is not to be changed
                    raise _not_ours(line, where)
                elif _parsed(line) is None:
                    self.torn = len(line)
                    os.ftruncate(self._file, whole)
                else:
                    self.keys |= _key(line, where)
                    os.write(self._file, NEWLINE)

    def rows(self, keys: set[str]) -> list[dict[str, Any]]:
        """The rows that have these keys, in the order of the file; of two with one key the first."""
        found: dict[str, dict[str, Any]] = {}
        with self.path.open("rb") as file:
            for line in file:
                row = json.loads(line)
                if isinstance(key := row.get("key"), str) and key in keys:
                    found.setdefault(key, row)
        return list(found.values())

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, whose first key is "kind".

        Raises:
            UsageError: there is no room, or the row is too long to be read again; the file is then as it was.

        """
        assert next(iter(row)) == "kind"
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + NEWLINE
        if len(line) > MAX_RESULT_LINE_BYTES + 1:
            raise UsageError(
                f"{self.path}: a row of {len(line) - 1} bytes, more than the {MAX_RESULT_LINE_BYTES} of a line"
            )
        before = os.fstat(self._file).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from None
        if isinstance(key := row.get("key"), str):
            self.keys.add(key)


def _parsed(line: bytes) -> Any:
    """What a line says as JSON; None for what is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _key(line: bytes, where: str) -> set[str]:
    """The key of a row, if it has one; UsageError for what is no row."""
    row = _parsed(line)
    if not isinstance(row, dict):
        raise _not_ours(line, where)
    return {row["key"]} if isinstance(row.get("key"), str) else set()


def _not_ours(line: bytes, where: str) -> UsageError:
    return UsageError(f"{where}: not a row: {shown(line[:60])}; is this a results file?")
