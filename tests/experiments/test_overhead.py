"""What a step costs besides its arithmetic: measured with an injected clock, never against a bound."""

import itertools

import numba
import pytest

from mixkv.experiments.overhead import overhead


def test_each_call_of_a_clock_that_ticks_evenly_costs_one_tick() -> None:
    """Links then cost nothing more, so all of a step is Python."""
    ticks = itertools.count()
    found = overhead(3, numba.get_num_threads(), clock=lambda: float(next(ticks)))
    assert (found.python_seconds, found.handover_seconds) == (1, 0)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_layer_has_five_parallel_regions(layers: int) -> None:
    found = overhead(layers, 1)
    assert found.regions_per_layer == 5
    assert found.python_seconds + found.handover_seconds > 0
