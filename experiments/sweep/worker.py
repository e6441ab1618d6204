"""A worker of a sweep: a process that loads the models, and measures what its parent sends, until there is no parent."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ...engine.policy import CachePolicy
from ...models.errors import MixkvError
from ..pieces import Piece, Setting


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
    """The rows of a task, in the order of its policies; an error in the place of one that cannot be measured."""

    task: Task
    rows: list[dict[str, Any] | MixkvError]


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker that cannot go on, and why: it could not load its models, or met an error that nobody foresaw."""

    error: MixkvError


def work(pipe: Connection, setting: Setting, threads: int) -> None:
    """What a worker does: load, then measure what comes through the pipe, until there is nobody at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C the parent hears, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(_served(pipe, setting, threads))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody waits for threads of a kernel that is still at work


def _end_with_parent() -> None:
    """Nothing is sent to a parent, nor asked for, while a model loads or a text is generated; so it is watched besides."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _served(pipe: Connection, setting: Setting, threads: int) -> Failed:
    """Load, and measure what comes through the pipe, until something fails."""
    try:
        pair = _load(setting, threads)
        pipe.send(Ready(pair.fingerprints))
        while True:
            task = pipe.recv()
            pipe.send(Done(task, _rows(pipe, pair, setting, task)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except MixkvError as error:
        return Failed(error)
    except BaseException as error:
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        return Failed(MixkvError(f"a worker failed: {line}"))


def _load(setting: Setting, threads: int) -> Any:
    import threadpoolctl

    from ...kernels.threads import set_num_threads
    from ...kernels.warmup import warm_up
    from ...models.load import load
    from ..cells import Pair

    set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
    candidate = load(setting.model, setting.weights)
    same = setting.weights == setting.reference_weights
    reference = candidate if same else load(setting.model, setting.reference_weights)
    warm_up()
    return Pair(candidate, reference)


def _rows(pipe: Connection, pair: Any, setting: Setting, task: Task) -> list[dict[str, Any] | MixkvError]:
    """Measure the policies of a task side by side; where that fails, each by itself, so that only one's row is lost."""
    from ..cells import measure

    def rows(policies: Sequence[CachePolicy], before: int, n: int) -> list[dict[str, Any] | MixkvError]:
        """These of them: part ``before`` of ``n`` that the task takes, as far as progress goes."""

        def report(done: int, total: int) -> None:
            pipe.send(Progress(task, before * total + done, n * total))

        begun = time.perf_counter()
        try:
            found = measure(pair, setting, task.piece, policies, report)
        except MixkvError as error:
            if len(policies) == 1:
                return [error]
            return [row for i, policy in enumerate(policies) for row in rows([policy], i, len(policies))]
        seconds = (time.perf_counter() - begun) / len(found)
        return [{**row, "seconds": seconds} for row, _ in found]

    return rows(task.policies, 0, 1)
