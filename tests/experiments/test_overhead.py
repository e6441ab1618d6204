"""What a step costs besides its arithmetic: measured with an injected clock, never against a bound."""

import itertools

import numba
import pytest

import mixkv
from mixkv import CachePolicy
from mixkv.experiments.bench import Bench, heading
from mixkv.experiments.bench_plan import Case, Plan
from mixkv.experiments.overhead import overhead


def test_each_call_of_a_clock_that_ticks_evenly_costs_one_tick() -> None:
    """Links then cost nothing more, so all of a step is Python."""
    ticks = itertools.count()
    found = overhead(3, numba.get_num_threads(), clock=lambda: float(next(ticks)))
    assert (found.python_seconds, found.handover_seconds) == (1, 0)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_layer_is_handed_over_seven_times(layers: int) -> None:
    found = overhead(layers, 1)
    assert found.handovers_per_layer == 7
    assert found.python_seconds + found.handover_seconds > 0


@pytest.mark.parametrize(("weights", "handovers"), [("q8", 7), ("f32", None)])
def test_a_benchmark_says_so_where_all_weights_are_packed(weights: str, handovers: int | None) -> None:
    """Layers of float32 go through NumPy one by one: what chains cost says nothing about them."""
    model, plan = mixkv.load("toy", weights), Plan([weights], [1], [CachePolicy()], [Case(1, 0, 0)], 1, warmup=False)
    (row,) = Bench(plan, lambda _: model, lambda _: None).rows()
    assert row["handovers_per_layer"] == handovers
    assert ("besides arithmetic" in heading([row])) == (handovers is not None)
    assert (row["python_seconds"] is None) == (row["handover_seconds"] is None) == (handovers is None)
