"""Speed of reading prompts and of generating, by weights, threads, cache policy and depth; the habits are llama-bench's.

Token ids are random, the same for every policy and repetition; nothing is sampled. Every repetition has a session of its
own: a session cannot go back to a depth, so it is filled anew up to there, which is not timed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.policy import CachePolicy
from ..engine.session import Session
from ..models.linear import PackedLinear
from ..models.load import Model
from . import machine
from .bench_plan import Case, Plan
from .overhead import Overhead, overhead
from .tables import Column, Row

SEED = 0


def repeat(
    model: Model, policy: CachePolicy, case: Case, token_ids: NDArray[np.int64], clock: Callable[[], int]
) -> tuple[int, int]:
    """One repetition in a session of its own: (nanoseconds of what is timed, bytes of the cache in the middle of it).

    ``token_ids`` are those of the depth, the prompt and the generation, one behind the other. The middle is that of the
    passes, so for a generation the cache has the mean of the depths that its tokens see; a prompt is one pass.
    """
    session = Session(model, policy)
    prefix, rest = token_ids[: case.n_depth], token_ids[case.n_depth :]
    if case.n_depth:
        session.forward(prefix, None)
    prompt, generated = rest[: case.n_prompt], rest[case.n_prompt :]
    passes = [*([prompt] if case.n_prompt else []), *generated[:, None]]
    middle = (len(passes) + 1) // 2
    spent, kv_bytes = 0, 0
    for part in (passes[:middle], passes[middle:]):
        begun = clock()
        for ids in part:
            session.forward(ids, "last")
        spent += clock() - begun
        kv_bytes = kv_bytes or session.nbytes()["total"]
    return spent, kv_bytes


def statistics(n_tokens: int, samples_ns: Sequence[int]) -> dict[str, Any]:
    """Mean and sample standard deviation (0 for one sample) of nanoseconds and of tokens a second, and the samples.

    The mean rate is that of the samples' rates, as llama-bench has it.
    """
    samples_ts = [n_tokens * 1e9 / max(ns, 1) for ns in samples_ns]
    avg_ns, stddev_ns = _mean_and_deviation(samples_ns)
    avg_ts, stddev_ts = _mean_and_deviation(samples_ts)
    return {
        "avg_ns": round(avg_ns), "stddev_ns": round(stddev_ns), "avg_ts": avg_ts, "stddev_ts": stddev_ts,
        "samples_ns": list(samples_ns), "samples_ts": samples_ts,
    }  # fmt: skip


def _mean_and_deviation(samples: Sequence[float]) -> tuple[float, float]:
    deviation = float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0
    return float(np.mean(samples)), deviation


class Bench:
    """Runs a plan on a model, row by row.

    Args:
        plan: what is measured.
        load: weight format -> the model.
        set_threads: makes a number of threads the one in force.
        progress: called with (repetitions done, repetitions in all, what comes next).
        clock: nanoseconds.
        bandwidth: number of threads -> bytes a second that they read from memory.

    """

    def __init__(
        self,
        plan: Plan,
        load: Callable[[str], Model],
        set_threads: Callable[[int], object],
        *,
        progress: Callable[[int, int, str], None] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
        bandwidth: Callable[[int], float] = machine.bandwidth,
    ) -> None:
        self._plan, self._load, self._set_threads = plan, load, set_threads
        self._progress, self._clock, self._bandwidth = progress, clock, bandwidth
        self._machine = machine.describe()
        self._rates: dict[int, float] = {}
        self._aside: dict[tuple[int, int], Overhead] = {}
        self._done = 0

    def rows(self) -> Iterator[Row]:
        """A row for each combination, as it is measured.

        Raises:
            UsageError: a case beyond the model's context, before anything is measured.
            MixkvError: the bandwidth could not be measured.

        """
        for weights in self._plan.weights:
            yield from self._rows_of(self._load(weights), weights)

    def _rows_of(self, model: Model, weights: str) -> Iterator[Row]:
        self._plan.check_fits(model)
        for threads in self._plan.threads:
            self._set_threads(threads)
            for policy in self._plan.policies:
                for case in self._plan.cases:
                    measured = self._measure(model, policy, case, threads)
                    yield {
                        "model": model.name,
                        "weights": weights,
                        "weight_bytes": weight_bytes(model),
                        "threads": threads,
                        "kv": policy.spec,
                        "test": case.name,
                        "n_prompt": case.n_prompt,
                        "n_gen": case.n_gen,
                        "n_depth": case.n_depth,
                        "test_time": datetime.now(UTC).isoformat(timespec="seconds"),
                        **measured,
                        **self._overhead(model, threads),
                        "peak_memory_bytes": machine.peak_memory(),
                        **self._machine,
                    }

    def _measure(self, model: Model, policy: CachePolicy, case: Case, threads: int) -> Row:
        """What is measured of one case."""
        what = f"{case.name}, {policy.spec}"
        ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size, case.n_depth + case.n_timed)
        generates = case.n_prompt == 0
        if generates and threads not in self._rates:
            self._tell("memory bandwidth")
            self._rates[threads] = self._bandwidth(threads)
        self._tell(what)
        if self._plan.warmup:
            first = Case(case.n_prompt, min(case.n_gen, 1), 0)
            repeat(model, policy, first, ids[: first.n_timed], self._clock)
        samples, kv_bytes = [], 0
        for _ in range(self._plan.repetitions):
            spent, kv_bytes = repeat(model, policy, case, ids, self._clock)
            samples.append(spent)
            self._done += 1
            self._tell(what)
        found = statistics(case.n_timed, samples)
        rate = self._rates[threads] if generates else None
        return {**found, "kv_bytes": kv_bytes, **_traffic(weight_bytes(model) + kv_bytes, found["avg_ts"], rate)}

    def _overhead(self, model: Model, threads: int) -> Row:
        """What a step costs besides arithmetic; None where layers are float32, which are not run by chains alone."""
        names = "python_seconds", "handover_seconds", "handovers_per_layer"
        if not all(isinstance(linear, PackedLinear) for linear in model.transformer.weights.linears()):
            return dict.fromkeys(names)
        key = model.config.num_hidden_layers, threads  # that is all it depends on
        if key not in self._aside:
            self._aside[key] = overhead(*key)
        return {name: getattr(self._aside[key], name) for name in names}

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            plan = self._plan
            rows = len(plan.weights) * len(plan.threads) * len(plan.policies) * len(plan.cases)
            self._progress(self._done, rows * plan.repetitions, what)


def weight_bytes(model: Model) -> int:
    """Bytes of all weights that a decode step reads."""
    return model.transformer.weights.nbytes_a_token


def _traffic(bytes_per_token: int, tokens_per_second: float, rate: float | None) -> Row:
    """Bytes that a generated token reads, those a second, and as a part of what memory gives; None without a rate."""
    if rate is None:
        return dict.fromkeys(("bytes_per_token", "bytes_per_second", "memory_bytes_per_second", "roofline"))
    bytes_per_second = bytes_per_token * tokens_per_second
    return {
        "bytes_per_token": bytes_per_token,
        "bytes_per_second": bytes_per_second,
        "memory_bytes_per_second": rate,
        "roofline": bytes_per_second / rate,
    }


def heading(rows: list[Row]) -> str:
    """What is said above the table: machine, bandwidth, memory."""
    rates = {row["threads"]: row["memory_bytes_per_second"] for row in rows if row["memory_bytes_per_second"]}
    lines = [machine.described(rows[0])]
    if rates:
        each = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads} threads" for threads, rate in rates.items())
        lines.append(f"memory is read at {each}; roofline: GB/s as a part of that")
    aside = {row["threads"]: row for row in rows if row["handovers_per_layer"]}
    lines += [
        f"besides arithmetic, a token takes {row['python_seconds'] * 1e3:.2f} ms in Python and "
        f"{row['handover_seconds'] * 1e3:.2f} ms in handing work to {threads} threads "
        f"({row['handovers_per_layer']} times a layer)"
        for threads, row in aside.items()
    ]
    lines.append(f"peak resident memory {rows[-1]['peak_memory_bytes'] / 1e6:.0f} MB")
    return "\n".join(f"{line}  " for line in lines)


COLUMNS = (
    Column("model", lambda row: row["model"], right=False),
    Column("weights", lambda row: row["weights"], right=False),
    Column("weights MB", lambda row: f"{row['weight_bytes'] / 1e6:.1f}"),
    Column("threads", lambda row: str(row["threads"])),
    Column("kv", lambda row: row["kv"], right=False),
    Column("test", lambda row: row["test"]),
    Column("t/s", lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    Column("KV MB", lambda row: f"{row['kv_bytes'] / 1e6:.2f}"),
    Column("GB/s", lambda row: "" if row["roofline"] is None else f"{row['bytes_per_second'] / 1e9:.2f}"),
    Column("roofline", lambda row: "" if row["roofline"] is None else f"{row['roofline']:.1%}"),
)
