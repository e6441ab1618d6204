"""Who runs when: engines in turns, each run in a process of its own, one at a time."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

WORKERS = Path(__file__).parent / "workers"
NOT_INSTALLED = 3  # exit code of a worker, see workers/common.py
TAIL = 15  # lines of stderr that are shown of a worker that failed


class WorkerError(Exception):
    """A worker that failed: the end of what it wrote to stderr."""


class NotInstalledError(WorkerError):
    """There is no such engine."""


@dataclass(frozen=True)
class Engine:
    """Somebody who takes part: its name, the Python that it is installed in, its worker, its formats of the cache."""

    name: str
    python: str
    script: str
    kvs: tuple[str, ...]


@dataclass(frozen=True)
class Test:
    """What is timed: "decode" behind a prompt of ``depth`` tokens, or "prefill", the reading of such a prompt."""

    kind: str
    depth: int

    def __str__(self) -> str:
        return f"{self.kind} {'at' if self.kind == 'decode' else 'of'} {self.depth:,}"


@dataclass(frozen=True)
class Turn:
    """One run of one worker."""

    round: int
    test: Test
    engine: Engine
    kv: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What is the same in every round."""
        return self.engine.name, self.kv, str(self.test)


def bits(kv: str) -> float:
    """Bits of a code by the name of a format, the mean of K's and V's: f16: 16, q8_0: 8, u4: 4, k8v4 or q8_0/q4_0: 6."""
    found = re.findall(r"[a-z](\d+)", kv)
    if not found:
        raise ValueError(f"{kv!r} does not say how many bits it has")
    return fmean(map(int, found))


def plan(engines: list[Engine], tests: list[Test], rounds: int) -> list[Turn]:
    """All turns in their order: what is compared with each other stands side by side, and everything comes again."""
    levels = sorted({bits(kv) for engine in engines for kv in engine.kvs}, reverse=True)
    return [
        Turn(i, test, engine, kv)
        for i in range(1, rounds + 1)
        for test in tests
        for level in levels
        for engine in engines
        for kv in engine.kvs
        if bits(kv) == level
    ]


def run_turns(
    turns: list[Turn], runner: Callable[[Turn], dict[str, Any]], say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """One row a turn. Who fails once is not tried again: its row has an "error". An interrupt ends it."""
    rows, failed = [], set()
    for turn in turns:
        if turn.key in failed:
            continue
        name, kv, test = turn.key
        row = {"round": turn.round, "engine": name, "kv": kv, "bits": bits(kv), "test": test}
        begin = f"round {turn.round}: {test:18} {name:10} {kv:10}"
        try:
            row |= runner(turn)
            row["tokens_per_second"] = row["tokens"] / row["seconds"]
            say(f"{begin} {row['tokens_per_second']:8.1f} tokens/s")
        except WorkerError as error:
            failed.add(turn.key)
            row["error"] = str(error)
            say(f"{begin} failed:\n{error}")
        except KeyboardInterrupt:
            say(f"{begin} interrupted; what there is until then follows")
            break
        rows.append(row)
    return rows


def call(engine: Engine, job: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    """Run a worker on a job; without one, ask for its version. ``timeout`` in seconds."""
    command = [engine.python, str(WORKERS / engine.script), *([] if job else ["--version"])]
    environment = dict(os.environ)
    if engine.python != sys.executable:
        environment.pop("PYTHONPATH", None)  # it is about this Python's packages
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, env=environment, timeout=timeout
        )
    except FileNotFoundError:
        raise NotInstalledError(f"there is no {engine.python}") from None
    except subprocess.TimeoutExpired:
        raise WorkerError(f"not done after {timeout:.0f} seconds") from None
    if done.returncode == NOT_INSTALLED:
        raise NotInstalledError(done.stderr.strip())
    if done.returncode:
        raise WorkerError("\n".join([f"exit code {done.returncode}", *done.stderr.splitlines()[-TAIL:]]))
    if not done.stdout:
        raise WorkerError("it said nothing")
    return json.loads(done.stdout.splitlines()[-1])
