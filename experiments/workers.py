"""Processes that measure cells side by side, each with its share of the cores.

They are spawned, never forked: OpenMP's threads do not survive a fork. A worker talks to its parent through a pipe of its
own, so it ends when the parent is gone, however that ended.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ..engine.policy import CachePolicy
from ..models.errors import MixkvError
from .pieces import Piece, Setting


@dataclass(frozen=True, slots=True)
class Task:
    """Cells that one worker measures beside one pass of the reference: some policies on one piece."""

    piece: Piece
    policies: tuple[CachePolicy, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has its models: their fingerprints."""

    fingerprints: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Progress:
    """So much of its task a worker has done."""

    task: Task
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """The rows of a task, in the order of its policies."""

    task: Task
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Failed:
    """A task that could not be measured, and why; no task where the worker could not even load its models."""

    task: Task | None
    error: MixkvError


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
        context = multiprocessing.get_context("spawn")
        for _ in range(self._n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._setting, self._threads), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the worker
            self._processes.append(process)
            self._pipes.append(ours)
            self._tasks[ours] = None
        return self

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
            message = self._receive(self._pipes[0])
            if isinstance(message, Failed):
                raise message.error
            self._fingerprints = message.fingerprints
        return self._fingerprints

    def run(self, tasks: Sequence[Task]) -> Iterator[Progress | Done | Failed]:
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
                if isinstance(message, Failed) and message.task is None:
                    raise message.error
                yield message
                if not isinstance(message, Progress):
                    busy -= 1
                    self._tasks[pipe] = None
                    busy += self._give(pipe, left)

    def _give(self, pipe: Connection, left: list[Task]) -> int:
        """Send the next task, if there is one; how many were sent."""
        if not left:
            return 0
        self._tasks[pipe] = left.pop()
        try:
            pipe.send(self._tasks[pipe])
        except BrokenPipeError:
            while isinstance(message := self._receive(pipe), Ready):  # what it said before it ended, then its end
                pass
            if isinstance(message, Failed):
                raise message.error from None
        return 1

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[self._pipes.index(pipe)]
            process.join(5)
            code = process.exitcode
            how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            more = "; was there too little memory?" if code == -signal.SIGKILL else ""
            raise MixkvError(f"a worker process {how}{more}") from None


def _work(pipe: Connection, setting: Setting, threads: int) -> None:
    """What a worker does: load, then measure what comes through the pipe, until there is nobody at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C the parent hears, and ends its workers
    try:
        pair = _load(setting, threads)
        pipe.send(Ready(pair.fingerprints))
        while True:
            task = pipe.recv()
            pipe.send(_answer(pipe, pair, setting, task))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody waits for threads of a kernel that is still at work
    except MixkvError as error:
        pipe.send(Failed(None, error))
    except BaseException as error:
        pipe.send(Failed(None, MixkvError(f"a worker failed: {traceback.format_exception_only(error)[-1].strip()}")))


def _load(setting: Setting, threads: int) -> Any:
    import numba
    import threadpoolctl

    from ..kernels.warmup import warm_up
    from ..models.load import load
    from .cells import Pair

    numba.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
    candidate = load(setting.model, setting.weights)
    same = setting.weights == setting.reference_weights
    reference = candidate if same else load(setting.model, setting.reference_weights)
    warm_up()
    return Pair(candidate, reference)


def _answer(pipe: Connection, pair: Any, setting: Setting, task: Task) -> Done | Failed:
    from .cells import measure

    begun = time.perf_counter()
    try:
        found = measure(
            pair, setting, task.piece, task.policies, lambda done, total: pipe.send(Progress(task, done, total))
        )
    except MixkvError as error:
        return Failed(task, error)
    seconds = (time.perf_counter() - begun) / len(found)
    return Done(task, [{**row, "seconds": seconds} for row, _ in found])
