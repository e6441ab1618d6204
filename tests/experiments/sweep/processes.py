"""Sweeps in processes of their own, as they are killed: they and their workers are known by a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 60.0  # seconds that anything may take on a busy machine


class Run:
    """``mixkv sweep`` in a process group of its own; a context manager that leaves no process behind."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        # The session is new, so SIGINT is not ignored because of how the tests were started
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mixkv", "sweep", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "MIXKV_TEST_MARK": self.mark},
        )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE)

    def alive(self) -> list[int]:
        """The ids of its processes that are alive: itself, its workers, and what Python starts beside them."""
        return list(self._marked(f"MIXKV_TEST_MARK={self.mark}".encode()))

    def workers(self) -> list[int]:
        """The ids of its workers."""
        return [pid for pid in self.alive() if b"spawn_main" in _read(pid, "cmdline") and pid != self.process.pid]

    @staticmethod
    def _marked(mark: bytes) -> Iterator[int]:
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and mark in _read(int(folder.name), "environ"):
                yield int(folder.name)

    def kill(self) -> None:
        """SIGKILL to the process itself alone: its workers have to notice."""
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def interrupt(self) -> None:
        """What a terminal does for Ctrl-C: SIGINT for all of them."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stdout, stderr


def wait_for(what: Callable[[], object], run: Run | None = None) -> bool:
    """Wait until something is so; False where the run ended before."""
    until = time.monotonic() + PATIENCE
    while not what():
        if run is not None and run.process.poll() is not None:
            return False
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.005)
    return True


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has just ended
        return b""


def lines(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cpu_seconds(pid: int) -> float:
    """Time that a process has computed, all its threads together."""
    numbers = _read(pid, "stat").rpartition(b")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK") if numbers else 0.0
