"""How long a warm start takes: from a new process to the first character of an answer, and what of that each part takes.

Two processes a repetition. One is ``mixkv generate``; the time to its first character is the total. The other goes
through the same parts and tells when each ended; tokenizing is part of the first token. What the parts leave of the
total is the rest: parsing options, printing, and chance, which can make it negative.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..models.errors import MixkvError, UsageError
from ..models.load import open_model
from ..models.pack import check_weights_option
from . import machine
from .bench_plan import check_repetitions
from .tables import Column, Row

PROMPT_TOKENS = 16
LONGEST_PROMPT = 256  # characters in which they should be found
ANSWER_TOKENS = 16  # the first ones may have no text of their own
PARTS = ("imports", "load", "kernels", "first_token")
# What the command line imports counts too; a layer below it may not import it, a process of its own may.
_STAGES = (
    "import mixkv.cli, rich.progress; mixkv.cli.collect_seldom(); "
    "from mixkv.experiments.startup import stages; stages()"
)


def stages() -> None:
    """What the process that is measured does: arguments are JSON in sys.argv[1], results JSON on stdout.

    The arguments are model, weights, threads, prompt, and when the process was started, in nanoseconds of
    ``time.perf_counter_ns``, which all processes share. The results are nanoseconds of each part, and the number of
    functions that were compiled because the cache did not have them.
    """
    given = json.loads(sys.argv[1])
    import threadpoolctl

    from ..engine.generate import generate
    from ..engine.session import Session
    from ..kernels.threads import set_num_threads
    from ..kernels.warmup import compilations, warm_up
    from ..models.load import load

    set_num_threads(given["threads"])
    threadpoolctl.threadpool_limits(given["threads"])
    marks = [given["started"], time.perf_counter_ns()]
    with compilations() as compiled:
        model = load(given["model"], given["weights"])
        marks.append(time.perf_counter_ns())
        warm_up()
        marks.append(time.perf_counter_ns())
        next(generate(Session(model), model.encode(given["prompt"]), max_tokens=ANSWER_TOKENS))
        marks.append(time.perf_counter_ns())
    spans = [stop - start for start, stop in zip(marks, marks[1:], strict=False)]
    sys.stdout.write(json.dumps({**dict(zip(PARTS, spans, strict=True)), "compiled": compiled()}))


def find_prompt(model: str, *, progress: Callable[[int, int], None] | None = None) -> tuple[str, int]:
    """A text of 16 tokens of a model, or as few more as its tokenizer makes of "a a a ...", and how many they are.

    Args:
        model: what ``load`` takes.
        progress: called with (bytes, bytes in all) while a registry model is fetched for the first time.

    Raises:
        UsageError: a model without a tokenizer.

    """
    tokenizer = open_model(model, progress=progress).read_tokenizer()
    if tokenizer is None:
        raise UsageError(f"model {model!r} has no tokenizer, and a start is measured up to the first character")
    longest = ("a " * LONGEST_PROMPT)[:LONGEST_PROMPT]
    prompts = ((longest[:n], len(tokenizer.encode(longest[:n]))) for n in range(1, LONGEST_PROMPT))
    enough = next((found for found in prompts if found[1] >= PROMPT_TOKENS), None)
    return enough or (longest, len(tokenizer.encode(longest)))


def first_character(arguments: Sequence[str]) -> int:
    """Nanoseconds from the start of ``python -m mixkv`` with these arguments to the first byte on its stdout.

    Raises:
        MixkvError: the process failed, or wrote nothing.

    """
    begun = time.perf_counter_ns()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mixkv", *arguments], bufsize=0,  # -P: nothing is imported from the current folder
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)
        spent = time.perf_counter_ns() - begun
        _, stderr = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode or not first:
        raise MixkvError(machine.failure(process.returncode, stderr.decode("utf-8", "replace")))
    return spent


class Startup:
    """Measures the start of a model, with each weight format and number of threads.

    Args:
        model: what ``load`` takes.
        weights: weight formats.
        threads: numbers of threads.
        repetitions: how often; medians are given.
        warmup: start once before that, so that files are in memory and kernels in their cache.
        progress: called with (starts done, starts in all, what comes next).
        download_progress: called with (bytes, bytes in all) while a registry model is fetched for the first time.

    Raises:
        UsageError: repetitions out of range, or a weight format that is none.

    """

    def __init__(
        self,
        model: str,
        weights: Sequence[str],
        threads: Sequence[int],
        repetitions: int = 5,
        warmup: bool = True,
        *,
        progress: Callable[[int, int, str], None] | None = None,
        download_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_repetitions(repetitions)
        for name in weights:
            check_weights_option(name)
        self._model, self._combinations = model, [(name, count) for name in weights for count in threads]
        self._repetitions, self._warmup = repetitions, warmup
        self._progress, self._download_progress = progress, download_progress

    def rows(self) -> Iterator[Row]:
        """A row for each combination, as it is measured; MixkvError where a process fails."""
        prompt, count = find_prompt(self._model, progress=self._download_progress)
        described = machine.describe()
        for done, (weights, threads) in enumerate(self._combinations):
            samples = []
            for i in range(-int(self._warmup), self._repetitions):
                if self._progress is not None:
                    now, every = done * self._repetitions + max(i, 0), len(self._combinations) * self._repetitions
                    self._progress(now, every, f"{weights}, {threads} threads")
                sample = self._start(weights, threads, prompt)
                if i >= 0:
                    samples.append(sample)
            named = {"model": self._model, "weights": weights, "threads": threads, "n_prompt": count}
            yield {**named, **summary(samples), **described}

    def _start(self, weights: str, threads: int, prompt: str) -> dict[str, int]:
        """The parts, the total, and what was compiled, of one start."""
        options = ["-m", self._model, "--weights", weights, "--threads", str(threads), "-n", str(ANSWER_TOKENS)]
        total = first_character(["generate", prompt, *options, "--raw", "--quiet"])
        given = {"model": self._model, "weights": weights, "threads": threads, "prompt": prompt}
        started = {"started": time.perf_counter_ns()}
        parts: dict[str, int] = json.loads(machine.run_python("-c", _STAGES, json.dumps({**given, **started})))
        return {**parts, "total": total}


def summary(samples: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Medians in nanoseconds of each part, of the total and what is left of it; all samples; functions compiled in all."""
    every = {part: [sample[part] for sample in samples] for part in (*PARTS, "total")}
    medians = {part: round(statistics.median(values)) for part, values in every.items()}
    rest = medians["total"] - sum(medians[part] for part in PARTS)
    return {
        **{f"{part}_ns": medians[part] for part in PARTS},
        "rest_ns": rest,
        "total_ns": medians["total"],
        "compiled": sum(sample["compiled"] for sample in samples),
        "samples_ns": every,
    }


def heading(rows: list[Row]) -> str:
    """What is said above the table."""
    compiled = sum(row["compiled"] for row in rows)
    lines = [
        machine.described(rows[0]),
        f"milliseconds to the first character of an answer to {rows[0]['n_prompt']} tokens, medians; "
        f"{compiled or 'no'} functions had to be compiled",
    ]
    return "\n".join(f"{line}  " for line in lines)


def _milliseconds(title: str, key: str) -> Column:
    return Column(title, lambda row: f"{row[key] / 1e6:.0f}")


COLUMNS = (
    Column("model", lambda row: row["model"], right=False),
    Column("weights", lambda row: row["weights"], right=False),
    Column("threads", lambda row: str(row["threads"])),
    _milliseconds("python and imports", "imports_ns"),
    _milliseconds("model", "load_ns"),
    _milliseconds("kernels", "kernels_ns"),
    _milliseconds("first token", "first_token_ns"),
    _milliseconds("rest", "rest_ns"),
    _milliseconds("total", "total_ns"),
)
