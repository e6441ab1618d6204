"""Processes that measure cells side by side, each with its share of the cores.

They are spawned, never forked: OpenMP's threads do not survive a fork. Each has a pipe of its own to its parent.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from ...models.errors import MixkvError
from ..pieces import Setting
from .worker import Done, Failed, Progress, Ready, Task, work

_SAFE_PATH = "PYTHONSAFEPATH"  # as ``python -P``, which multiprocessing passes on only if the parent was started so


class Workers:
    """Some workers; a context manager, whose end is theirs.

    Args:
        n: of them.
        threads: of each.
        setting: what they measure.

    """

    def __init__(self, n: int, threads: int, setting: Setting) -> None:
        self._n, self._threads, self._setting = n, threads, setting
        self._fingerprints: tuple[str, str] | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._tasks: dict[Connection, Task | None] = {}

    def __enter__(self) -> "Workers":
        with _no_current_folder():
            self._start()
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        try:
            resource_tracker.ensure_running()  # it takes the mask of signals away that is set below
            for _ in range(self._n):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(target=work, args=(theirs, self._setting, self._threads), daemon=True)
                self._tasks[ours] = None
                with _no_interrupts():
                    process.start()
                    self._processes.append(process)
                theirs.close()  # so that the pipe ends with the worker
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def fingerprints(self) -> tuple[str, str]:
        """Those of the models, when the first worker has them. Its error is raised."""
        if self._fingerprints is None:
            self._receive(self._pipes[0])
        assert self._fingerprints is not None
        return self._fingerprints

    def run(self, tasks: Sequence[Task]) -> Iterator[Progress | Done]:
        """Hand out the tasks, in their order; what the workers say, as it comes.

        Raises:
            MixkvError: a worker ended, or could not load its models.

        """
        left = list(reversed(tasks))
        busy = 0
        for pipe in self._pipes[: len(left)]:  # a worker that is still loading finds its task when it is done
            busy += self._give(pipe, left)
        while busy:
            waited = {pipe: pipe for pipe, task in self._tasks.items() if task is not None}
            for pipe in [waited[each] for each in wait(list(waited))]:  # type: ignore[index]
                message = self._receive(pipe)
                if isinstance(message, Ready):
                    continue
                yield message
                if isinstance(message, Done):
                    busy -= 1
                    self._tasks[pipe] = None
                    busy += self._give(pipe, left)

    def _give(self, pipe: Connection, left: list[Task]) -> int:
        """Send the next task, if there is one; how many were sent."""
        if not left:
            return 0
        self._tasks[pipe] = left.pop()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever waits for the answer learns why
            pipe.send(self._tasks[pipe])
        return 1

    def _receive(self, pipe: Connection) -> Ready | Progress | Done:
        """The next message of a worker; MixkvError where it has ended or cannot go on."""
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[self._pipes.index(pipe)]
            process.join(5)
            code = process.exitcode
            how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            more = "; was there too little memory?" if code == -signal.SIGKILL else ""
            raise MixkvError(f"a worker process {how}{more}") from None
        if isinstance(message, Failed):
            raise message.error
        if isinstance(message, Ready):
            if self._fingerprints not in (None, message.fingerprints):
                raise MixkvError("a worker has loaded another model than the one before: have its files been changed?")
            self._fingerprints = message.fingerprints
        return message


@contextlib.contextmanager
def _no_current_folder() -> Iterator[None]:
    """Python processes that are started meanwhile import nothing from the current folder, which may be a stranger's."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """What is started meanwhile never hears of a Ctrl-C, not even while it is still starting; we hear of it afterwards."""
    heard: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda *about: heard.append(about))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if ours:
            signal.signal(signal.SIGINT, handler)
    if heard and callable(handler):
        handler(*heard[0])
