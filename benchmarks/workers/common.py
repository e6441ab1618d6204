"""What the workers of `engines.py` have in common: a job comes in on stdin, one line of JSON goes out on stdout.

A worker runs in the Python of its engine, where mixkv may be missing: this file needs NumPy alone.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = 8  # ids of the answer that a worker reports
NOT_INSTALLED = 3  # exit code of a worker whose engine cannot be found


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        kind: "decode": ``tokens`` greedy steps behind the prompt; "prefill": read the prompt; "reference": store the
            logits of the prompt's tokens in ``folder``; "quality": compare with what is stored there.
        model: path of a GGUF file (mixkv: whatever ``mixkv.load`` takes).
        ids: token ids of the prompt, (T,).
        kv: format of the KV cache, as the engine calls it.
        threads: threads of everything.
        tokens: decode steps that are timed.
        weights: mixkv only: what ``mixkv.load`` takes.
        state: llama.cpp only: a file that keeps the prompt's cache for the next round; "" for none.
        folder: of the reference's logits.

    """

    kind: str
    model: str
    ids: list[int]
    kv: str
    threads: int
    tokens: int = 64
    weights: str = "auto"
    state: str = ""
    folder: str = ""


@dataclasses.dataclass
class Row:
    """What a worker found.

    Attributes:
        load_seconds: opening the model, not part of ``seconds``.
        read_seconds: reading the prompt before the steps of "decode"; 0 where it came from a state file.
        seconds: of ``tokens`` decode steps, or of reading the prompt and choosing the next token.
        tokens: tokens that ``seconds`` is about.
        step_seconds: each step of "decode".
        ids: the first tokens of the answer.
        quality: figures of a "quality" job.
        details: what the engine says about itself.

    """

    load_seconds: float = 0.0
    read_seconds: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    quality: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def warm_ids(job: Job) -> list[int]:
    """The beginning of the prompt, to be read, with a step behind it, and forgotten before anything is timed.

    The reading of a prompt is full speed only after one of some length: memory, buffers, and code made for shapes.
    """
    return job.ids[: 1024 if job.kind == "prefill" else 256]


def decode(step: Callable[[int], int], last: int, row: Row, tokens: int) -> None:
    """Time greedy steps: ``step`` takes a token and gives the next. ``last`` is the answer's first token.

    The first step is not timed: an engine may still arrange what it has just read.
    """
    ids = [last]
    for _ in range(tokens + 1):
        begun = time.perf_counter()
        ids.append(step(ids[-1]))
        row.step_seconds.append(time.perf_counter() - begun)
    del row.step_seconds[0]
    row.seconds, row.tokens, row.ids = sum(row.step_seconds), tokens, ids[:SHOWN]


def peak_bytes() -> int:
    """The most memory this process ever had resident.

    Linux: VmHWM, since ru_maxrss of a new process begins at what its parent had.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(library: str, version: Callable[[], dict[str, Any]], run: Callable[[Job], Row]) -> None:
    """The whole of a worker. With the argument ``--version`` it says what ``version`` gives, and does nothing else.

    Exit code ``NOT_INSTALLED`` where the module ``library`` cannot be found.
    """
    try:
        if sys.argv[1:] == ["--version"]:
            said = version()
        else:
            row = run(Job(**json.load(sys.stdin)))
            said = {**dataclasses.asdict(row), "peak_bytes": peak_bytes()}
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    print(json.dumps(said), flush=True)
