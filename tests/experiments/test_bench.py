"""Measuring, with a clock that the test holds, on the toy model; what is timed, and what is said of it."""

import json
import statistics as oracle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixkv
from mixkv.engine.policy import CachePolicy
from mixkv.experiments import bench
from mixkv.experiments.bench import Bench, repeat, statistics
from mixkv.experiments.bench_plan import Case, Plan
from mixkv.experiments.tables import make_writer
from mixkv.models.errors import UsageError
from mixkv.models.toy import VOCAB

POLICY = CachePolicy(window=16, sinks=2, tile=32)


class Recorder(mixkv.Session):
    """A session that writes down what it was given, and between which readings of the clock."""

    made: list["Recorder"] = []
    now = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[tuple[list[int], object]] = []
        Recorder.made.append(self)

    def forward(self, token_ids: Any, logits: Any = "all", **options: Any) -> Any:
        self.calls.append((list(map(int, token_ids)), logits))
        Recorder.now += 1000 * len(token_ids)  # what it takes
        return super().forward(token_ids, logits, **options)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    monkeypatch.setattr(bench, "Session", Recorder)
    Recorder.made, Recorder.now = [], 0
    yield Recorder
    Recorder.made = []


def rows_of(toy: mixkv.Model, plan: Plan, **options: Any) -> list[dict[str, Any]]:
    standard: dict[str, Any] = {"bandwidth": lambda threads: 1e9 * threads, "clock": lambda: Recorder.now}
    return list(Bench(plan, lambda weights: toy, lambda threads: None, **{**standard, **options}).rows())


# --- one repetition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (Case(5, 0, 0), [5]),
        (Case(5, 0, 70), [70, 5]),
        (Case(0, 3, 0), [1, 1, 1]),
        (Case(0, 1, 40), [40, 1]),
        (Case(6, 2, 9), [9, 6, 1, 1]),
    ],
)
def test_only_what_lies_behind_the_depth_is_timed(
    toy: mixkv.Model, recorder: type[Recorder], case: Case, calls: list[int]
) -> None:
    ids = np.arange(case.n_depth + case.n_timed) % VOCAB
    spent, _ = repeat(toy, POLICY, case, ids, lambda: Recorder.now)
    (session,) = recorder.made
    assert spent == 1000 * case.n_timed
    assert [len(given) for given, _ in session.calls] == calls
    assert sum((given for given, _ in session.calls), []) == ids.tolist()
    wanted = ([None] if case.n_depth else []) + ["last"] * (len(calls) - bool(case.n_depth))
    assert [logits for _, logits in session.calls] == wanted
    assert session.policy == POLICY and session.position == len(ids)


@pytest.mark.parametrize("n_gen", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("depth", [0, 20, 100])
def test_the_cache_is_counted_at_the_mean_depth(toy: mixkv.Model, n_gen: int, depth: int) -> None:
    """The n tokens see depth + 1, .. depth + n tokens, whose mean is depth + (n + 1) / 2."""
    ids = np.random.default_rng(1).integers(0, VOCAB, depth + n_gen)
    _, nbytes = repeat(toy, POLICY, Case(0, n_gen, depth), ids, lambda: 0)
    session = mixkv.Session(toy, POLICY)
    session.forward(ids[: depth + int(np.mean(range(1, n_gen + 1)) + 0.5)])
    assert nbytes == session.nbytes()["total"]


def test_of_a_prompt_the_cache_is_counted_behind_it(toy: mixkv.Model) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 100)
    _, nbytes = repeat(toy, POLICY, Case(70, 0, 30), ids, lambda: 0)
    session = mixkv.Session(toy, POLICY)
    session.forward(ids)
    assert nbytes == session.nbytes()["total"]


# --- statistics ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=20), st.integers(1, 4096))
def test_statistics_are_those_of_the_standard_library(samples: list[int], n_tokens: int) -> None:
    found = statistics(n_tokens, samples)
    rates = [n_tokens / (ns / 1e9) for ns in samples]
    assert found["samples_ns"] == samples and found["samples_ts"] == pytest.approx(rates)
    assert found["avg_ns"] == pytest.approx(oracle.mean(samples), rel=1e-9, abs=1)
    assert found["stddev_ns"] == pytest.approx(oracle.stdev(samples), rel=1e-6, abs=1)
    assert found["avg_ts"] == pytest.approx(oracle.mean(rates))
    assert found["stddev_ts"] == pytest.approx(oracle.stdev(rates), rel=1e-6, abs=1e-9 * max(rates))
    assert isinstance(found["avg_ns"], int) and isinstance(found["stddev_ns"], int)


def test_one_sample_has_no_deviation() -> None:
    found = statistics(4, [2_000_000])
    assert (found["avg_ns"], found["stddev_ns"], found["avg_ts"], found["stddev_ts"]) == (2_000_000, 0, 2000.0, 0.0)
    assert statistics(4, [0])["avg_ts"] > 0  # a clock that did not move


# --- rows ---------------------------------------------------------------------------------------------------------


def test_everything_multiplies_out_in_a_fixed_order(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    policies = [POLICY, CachePolicy.full()]
    plan = Plan(["auto", "f32"], [1, 2], policies, [Case(4, 0, 0), Case(0, 2, 6)], 3, warmup=False)
    loaded: list[str] = []
    in_force: list[int] = []

    def load(weights: str) -> mixkv.Model:
        loaded.append(weights)
        return toy

    rows = list(Bench(plan, load, in_force.append, bandwidth=lambda threads: 1e9).rows())
    found = [(row["weights"], row["threads"], row["kv"], row["test"]) for row in rows]
    assert found == [
        (weights, threads, kv, test)
        for weights in ("auto", "f32")
        for threads in (1, 2)
        for kv in ("k4v4:window=16:sinks=2:tile=32", "f32")
        for test in ("pp4", "tg2 @ d6")
    ]
    assert loaded == ["auto", "f32"] and in_force == [1, 2, 1, 2]
    assert len(recorder.made) == 3 * len(rows), "every repetition has a session of its own"
    assert all(len(row["samples_ns"]) == 3 for row in rows)
    assert len({frozenset(row) for row in rows}) == 1, "every row has the same keys"


def test_the_same_ids_for_every_policy_and_repetition(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    rows_of(toy, Plan(["auto"], [1], [POLICY, CachePolicy.full()], [Case(9, 4, 20)], 2, warmup=False))
    given = [[ids for ids, _ in session.calls] for session in recorder.made]
    assert len(given) == 4 and all(ids == given[0] for ids in given)
    every = sum(given[0], [])
    assert len(set(every)) > 20 and min(every) >= 0 and max(every) < VOCAB


def test_a_warmup_runs_the_prompt_and_one_token_without_depth(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    plan = Plan(["auto"], [1], [POLICY], [Case(7, 0, 30), Case(0, 5, 30), Case(7, 5, 30)], 1)
    rows = rows_of(toy, plan)
    lengths = [[len(ids) for ids, _ in session.calls] for session in recorder.made]
    assert lengths == [[7], [30, 7], [1], [30, *[1] * 5], [7, 1], [30, 7, *[1] * 5]]
    assert [row["samples_ns"] for row in rows] == [[7000], [5000], [12000]]


def test_a_row_of_a_generation_says_what_was_read_and_how_fast(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    plan = Plan(["auto"], [1, 2], [POLICY], [Case(0, 4, 0), Case(8, 0, 0)], 2, warmup=False)
    asked: list[int] = []

    def bandwidth(threads: int) -> float:
        asked.append(threads)
        return threads * 1e9

    rows = rows_of(toy, plan, bandwidth=bandwidth)
    # by hand: (64 x 160 + 96 x 64 + 64 x 256 + 128 x 64) x 3 layers and the head, float32
    weights = 4 * (3 * (160 * 64 + 64 * 96 + 256 * 64 + 64 * 128) + 258 * 64)
    for row, threads in zip(rows[::2], (1, 2), strict=True):
        assert row["weight_bytes"] == weights and row["kv_bytes"] > 0
        assert row["bytes_per_token"] == weights + row["kv_bytes"]
        assert row["avg_ts"] == pytest.approx(1e6)  # 1,000 ns a token
        assert row["bytes_per_second"] == pytest.approx(row["bytes_per_token"] * 1e6)
        assert row["memory_bytes_per_second"] == threads * 1e9
        assert row["roofline"] == pytest.approx(row["bytes_per_token"] * 1e6 / (threads * 1e9))
        assert row["peak_memory_bytes"] > 1 << 20 and row["mixkv"] == mixkv.__version__
    for row in rows[1::2]:
        assert row["bytes_per_token"] is row["bytes_per_second"] is row["roofline"] is None
    assert asked == [1, 2], "once for each number of threads"


def test_without_a_generation_the_memory_is_not_measured(toy: mixkv.Model) -> None:
    def refuse(threads: int) -> float:
        raise AssertionError

    assert len(rows_of(toy, Plan(["auto"], [1], [POLICY], [Case(3, 0, 0), Case(3, 3, 0)], 1), bandwidth=refuse)) == 2


def test_progress_goes_from_nothing_to_everything(toy: mixkv.Model) -> None:
    told: list[tuple[int, int, str]] = []
    plan = Plan(["auto"], [1], [POLICY, CachePolicy()], [Case(0, 2, 0), Case(2, 0, 0)], 3)
    rows_of(toy, plan, progress=lambda *what: told.append(what))
    done = [now for now, _, _ in told]
    assert done == sorted(done) and (done[0], done[-1]) == (0, 12) and {every for _, every, _ in told} == {12}
    assert {what for _, _, what in told} >= {"memory bandwidth", "tg2, k4v4", "pp2, k4v4:window=16:sinks=2:tile=32"}


def test_what_does_not_fit_is_refused_before_anything_is_measured(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    plan = Plan(["auto"], [1], [POLICY], [Case(1, 0, 0), Case(0, 2, 16_383)], 1)
    with pytest.raises(UsageError, match="tg2 @ d16383 needs a context of 16385 tokens"):
        rows_of(toy, plan)
    assert recorder.made == []


def test_rows_are_given_out_as_they_are_measured(toy: mixkv.Model, recorder: type[Recorder]) -> None:
    plan = Plan(["auto"], [1], [POLICY], [Case(1, 0, 0), Case(2, 0, 0)], 1, warmup=False)
    rows = Bench(plan, lambda weights: toy, lambda threads: None).rows()
    assert recorder.made == []
    assert next(rows)["test"] == "pp1" and len(recorder.made) == 1
    assert next(rows)["test"] == "pp2" and len(recorder.made) == 2


# --- as text ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Callable[..., list[dict[str, Any]]]:
    toy = mixkv.load("toy", "q8")
    ticks = iter(range(0, 10**9, 1_000_000))
    plan = Plan(["q8"], [2], [POLICY], [Case(8, 0, 0), Case(0, 4, 16)], 2, warmup=False)
    return rows_of(toy, plan, clock=lambda: next(ticks), bandwidth=lambda threads: 2e9)


def test_a_table_says_what_the_rows_do(measured: list[dict[str, Any]]) -> None:
    writer = make_writer("md", bench.COLUMNS, bench.heading)
    text = "".join([*map(writer.row, measured), writer.end()])
    lines = text.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == [
        "model", "weights", "weights MB", "threads", "kv", "test", "t/s", "KV MB", "GB/s", "roofline",
    ]  # fmt: skip
    kv = "k4v4:window=16:sinks=2:tile=32"
    kv_mb = [f"{row['kv_bytes'] / 1e6:.2f}" for row in measured]
    per_second = measured[1]["bytes_per_token"] * 2000
    assert table[2] == ["toy", "q8", "0.1", "2", kv, "pp8", "4000.00 ± 0.00", kv_mb[0], "", ""]
    assert table[3][:8] == ["toy", "q8", "0.1", "2", kv, "tg4 @ d16", "2000.00 ± 0.00", kv_mb[1]]
    assert table[3][8:] == [f"{per_second / 1e9:.2f}", f"{per_second / 2e9:.1%}"]
    assert len(table) == 4 and measured[0]["cpu_info"] in lines[0] and "2.0 GB/s with 2 threads" in lines[1]
    assert lines[2].endswith("(7 times a layer)  ")
    assert lines[3].startswith("peak resident memory ")


def test_rows_are_json(measured: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
