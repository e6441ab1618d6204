"""How long the cases of the table take."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Case
from check import layout_of, normal, quantize_as
from machine import COLD_BYTES, Machine, Meter

from mixkv.kernels import Segment, empty_state, flash_attention, merge_states
from mixkv.kernels.flash import attend
from mixkv.kernels.layout import F32, TileLayout
from mixkv.kernels.matmul import matvec
from mixkv.kernels.quantize import quantize_tile, store_rows
from mixkv.kernels.segment import TileStore

LEAST_ROUNDS = 7
BUDGET = 4.0  # seconds that the cases of one shape may take together, unless that is under LEAST_ROUNDS
Call = Callable[[], float]  # does it once, and returns the seconds


@dataclass(frozen=True)
class Row:
    """One line of the output; None where a figure has no meaning. README.md says what each is."""

    name: str
    measures: str
    seconds: float
    best_seconds: float
    rounds: int
    x_f16: float | None
    core_ns_per_key: float | None
    bytes_read: int
    gigabytes_a_second: float | None
    of_bandwidth: float | None
    best_of_bandwidth: float | None
    of_dot_peak: float | None
    best_of_dot_peak: float | None
    gflops: float | None
    of_blas: float | None


class Ring:
    """Copies of the same data in memory of their own, that are read in turn: COLD_BYTES lie between two readings of one."""

    def __init__(self, first: Any, nbytes: int, copy: Callable[[], Any], cold: bool = True) -> None:
        count = max(2, math.ceil(COLD_BYTES / nbytes)) if cold else 1
        self.nbytes = nbytes  # of one copy
        self._copies: Iterator[Any] = itertools.cycle([first, *(copy() for _ in range(count - 1))])

    def __next__(self) -> Any:
        """The copy whose turn it is."""
        return next(self._copies)


def copy_segment(case: Case, segment: Segment) -> Segment:
    """The same keys in new pages, as a cache has them."""
    store = TileStore(layout_of(case), lasting=True)
    for t in range(-(-segment.stop // case.tile)):
        page, slot = store.place(t)
        if slot == 0:
            page[:] = segment.owner[t // store.layout.page_tiles]
        store.append()
    store.finish()
    return store.segment(segment.start, segment.stop)


def keys_nbytes(case: Case) -> int:
    """Bytes of the keys and values of a case."""
    return -(-case.keys // case.tile) * layout_of(case).nbytes


def _segments(case: Case) -> Ring:
    rng = np.random.default_rng(0)
    shape = (case.keys, case.kv_heads, case.head_dim)
    segment = quantize_as(case, normal(rng, *shape), normal(rng, *shape))
    # Many queries read the keys many times, from the caches: copies would change nothing.
    return Ring(segment, keys_nbytes(case), lambda: copy_segment(case, segment), cold=case.queries == 1)


def _tiles(case: Case) -> Ring:
    rng = np.random.default_rng(0)
    dense = TileLayout(case.kv_heads, case.head_dim, case.tile, F32, F32)
    tile = dense.empty_page()
    store_rows(dense, tile, 0, *(normal(rng, case.tile, case.kv_heads, case.head_dim) for _ in range(2)))

    def copy() -> Any:
        mine = dense.empty_page()
        mine[:] = tile
        return mine

    return Ring(tile, tile.nbytes, copy)


def _partials(case: Case) -> Ring:
    rng = np.random.default_rng(0)
    q, k = (normal(rng, n, heads, case.head_dim) for n, heads in ((case.queries, case.q_heads), (96, case.kv_heads)))
    found: list[Any] = []
    for keys in (k[:32], k[32:]):
        state = empty_state(case.q_heads, case.queries)
        found += [flash_attention(q, keys, keys, state=state), state]
    return Ring(found, sum(x.nbytes for x in found), list, cold=False)


def _weights(case: Case) -> Ring:
    weight = normal(np.random.default_rng(0), case.rows, case.columns)
    return Ring(weight, weight.nbytes, weight.copy)


DATA: dict[str, Callable[[Case], Ring]] = {
    "attend": _segments,
    "quantize": _tiles,
    "merge": _partials,
    "matvec": _weights,
}


def attention_call(case: Case, q: Any) -> Callable[[Segment], Any]:
    """The inside of ``flash_attention`` over a whole segment: its output, which each call allocates."""
    starts, stops = np.zeros(case.queries, np.int64), np.full(case.queries, case.keys, np.int64)
    if case.causal:
        stops -= np.arange(case.queries - 1, -1, -1)
    exact, scale = case.precision == "f32", case.head_dim**-0.5

    def attend_once(segment: Segment) -> Any:
        out, state = np.empty_like(q), np.empty((case.q_heads, case.queries, 2), np.float32)
        attend(q, segment, starts, stops, out, state, scale=scale, exact=exact, fresh=True)
        return out

    return attend_once


def make_call(case: Case, ring: Ring) -> Call:
    """What is timed in a case: a function that does it once, on the next copy, and returns the seconds it took."""
    rng = np.random.default_rng(1)
    if case.kernel == "attend":
        q = normal(rng, case.queries, case.q_heads, case.head_dim)
        work: Callable[[Any], object] = attention_call(case, q)
    elif case.kernel == "quantize":
        dense, target = TileLayout(case.kv_heads, case.head_dim, case.tile, F32, F32), layout_of(case)
        work = lambda tile: quantize_tile(tile, dense, target)  # noqa: E731
    elif case.kernel == "merge":
        work = lambda partials: merge_states(*partials)  # noqa: E731
    else:
        x = normal(rng, case.columns)
        work = lambda weight: matvec(weight, x)  # noqa: E731

    def call() -> float:
        data = next(ring)
        begun = time.perf_counter()
        work(data)
        return time.perf_counter() - begun

    return call


def time_rounds(calls: list[Call], most_rounds: int) -> list[list[float]]:
    """Seconds of every call in every round. The calls take turns, so that a change of the machine meets them alike."""
    for call in calls:
        call()  # compiles, or loads from the cache
    once = sum(call() for call in calls)
    rounds = max(min(most_rounds, LEAST_ROUNDS), min(most_rounds, int(BUDGET / once)))
    return [list(times) for times in zip(*([call() for call in calls] for _ in range(rounds)), strict=True)]


def make_row(case: Case, times: list[float], f16_times: list[float] | None, nbytes: int, machine: Machine) -> Row:
    """The figures of a case."""
    seconds, best = statistics.median(times), min(times)
    ratio = statistics.median(a / b for a, b in zip(times, f16_times, strict=True)) if f16_times else None
    many = case.kernel == "attend" and case.queries > 1
    rate = None if many else nbytes / seconds / 1e9
    attends = case.kernel == "attend"
    gflops = 4 * case.pairs * case.q_heads * case.head_dim / seconds / 1e9 if many else None
    products = case.byte_products / seconds / 1e9
    of_bandwidth = None if rate is None or case.kernel == "merge" else rate / machine.gigabytes
    of_dot_peak = products / machine.dot_products if products else None
    return Row(
        name=case.name,
        measures=case.measures,
        seconds=seconds,
        best_seconds=best,
        rounds=len(times),
        x_f16=ratio,
        core_ns_per_key=seconds * 1e9 * machine.threads / (case.pairs * case.kv_heads) if attends else None,
        bytes_read=nbytes,
        gigabytes_a_second=rate,
        of_bandwidth=of_bandwidth,
        best_of_bandwidth=of_bandwidth and of_bandwidth * seconds / best,
        of_dot_peak=of_dot_peak,
        best_of_dot_peak=of_dot_peak and of_dot_peak * seconds / best,
        gflops=gflops,
        of_blas=None if gflops is None else gflops / machine.blas_gflops,
    )


def time_cases(cases: list[Case], meter: Meter, most_rounds: int) -> Iterator[tuple[Machine, list[Row]]]:
    """The rows of every shape, one shape after the other, and what the machine could do before or after it."""
    shapes: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        shapes.setdefault(case.shape, []).append(case)
    groups, rings = list(shapes.values()), dict[tuple[object, ...], Ring]()
    for i, group in enumerate(groups):
        for case in group:
            if case.stored not in rings:
                rings[case.stored] = DATA[case.kernel](case)
        # Two cases on the same keys share a ring, or one would find in the cache what the other has just read.
        calls = [make_call(case, rings[case.stored]) for case in group]
        blas = group[0].kernel == "attend" and group[0].queries > 1
        before = meter.measure(blas=blas)
        times = time_rounds(calls, most_rounds)
        machine = before.best(meter.measure(blas=blas))
        f16 = next((times[j] for j, case in enumerate(group) if case.is_f16), None)
        yield (
            machine,
            [
                make_row(case, mine, f16, rings[case.stored].nbytes, machine)
                for case, mine in zip(group, times, strict=True)
            ],
        )
        later = {case.stored for rest in groups[i + 1 :] for case in rest}
        rings = {stored: ring for stored, ring in rings.items() if stored in later}
