"""The table of benchmarks: every case that is timed is right, and what checks it can tell."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("cases", "check", "machine", "timing", "peers", "attention")
KEYS, QUERIES = 600, 40  # more than a split and a block of rows, and not a whole number of tiles


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The scripts by name, imported as they import each other; none stays importable."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("cases", "check", "machine", "timing", "attention")}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def test_every_case_of_the_table_is_right(benchmarks: dict[str, ModuleType]) -> None:
    found = {case.name: benchmarks["check"].check(case, KEYS, QUERIES) for case in benchmarks["cases"].CASES}
    assert {name: result for name, result in found.items() if not result.right} == {}
    assert len(found) == len(benchmarks["cases"].CASES), "two cases have the same name"


@pytest.mark.parametrize("side", ["k", "v"])
def test_the_check_notices_a_wrong_code(benchmarks: dict[str, ModuleType], side: str) -> None:
    check = benchmarks["check"]
    case = next(case for case in benchmarks["cases"].CASES if case.name == "decode-d64-h9/3-n4096-q8")
    case = check.reduced(case, 64, 1)
    rng = np.random.default_rng(0)
    segment = check.quantize_as(case, *(check.normal(rng, 64, 3, 64) for _ in range(2)))
    stored = check.oracle.read_segment(segment, ("q8c", "q8t"), 64)
    assert check.check_attend(case, (segment, *stored)).right
    layout, page = check.layout_of(case), segment.owner[0]
    codes = layout.codes(page, layout.k if side == "k" else layout.v)[0, 0]
    assert codes.size == 64 * 64
    codes ^= 0x80
    assert not check.check_attend(case, (segment, *stored)).right


def test_a_number_that_is_none_is_not_right(benchmarks: dict[str, ModuleType]) -> None:
    assert not benchmarks["check"].Result(float("nan"), 1.0, "").right


def test_contests_name_cases_of_one_shape(benchmarks: dict[str, ModuleType]) -> None:
    by_name = {case.name: case for case in benchmarks["cases"].CASES}
    for contest in benchmarks["cases"].CONTESTS:
        assert len({by_name[name].shape for name in contest.ours}) == 1


def test_products_are_counted_by_hand(benchmarks: dict[str, ModuleType]) -> None:
    """Three keys, two queries of which the first does not see the last key, two heads on one, four channels."""
    case = benchmarks["cases"].Case("", "", "attend", 2, 1, 4, 3, 2, k_bits=4, v_bits=4, causal=True)
    assert case.pairs == 5
    assert case.byte_products == 5 * 2 * 4 * 2 * 2  # pairs, heads, channels, K and V, two bytes a factor
    assert replace(case, v_bits=16).byte_products == 5 * 2 * 4 * 2
    assert replace(case, precision="f32").byte_products == 0


def test_copies_are_equal_and_apart(benchmarks: dict[str, ModuleType]) -> None:
    """What is timed on a copy of the keys gives the bits that the keys themselves give."""
    check, timing = benchmarks["check"], benchmarks["timing"]
    case = next(case for case in benchmarks["cases"].CASES if case.name == "decode-d64-h9/3-n4096-q4")
    case = check.reduced(case, 600, 1)
    rng = np.random.default_rng(0)
    segment = check.quantize_as(case, *(check.normal(rng, 600, 3, 64) for _ in range(2)))
    copy = timing.copy_segment(case, segment)
    assert not np.intersect1d(copy.table[:10], segment.table[:10]).size
    assert len(copy.owner) == len(segment.owner) == 2
    assert not any(np.shares_memory(a, b) for a in copy.owner for b in segment.owner)
    q = check.normal(rng, 1, 9, 64)
    call = timing.attention_call(case, q)
    np.testing.assert_array_equal(call(copy), call(segment))


def test_every_kernel_is_timed(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = benchmarks["timing"]
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    names = (
        "decode-d64-h9/3-n4096-f16", "decode-d64-h9/3-n4096-q4", "prefill-d64-h9/3-n4096-causal-q4", "quantize-d64-h3-q4",
        "merge-d64-h9-t1", "matvec-576x576",
    )  # fmt: skip
    check = benchmarks["check"]
    cases = [check.reduced(case, 130, 20) for case in benchmarks["cases"].CASES if case.name in names]
    machine = benchmarks["machine"].Machine(2, "", 1.0, 1.0, "", 1.0, 1.0)

    class Meter:
        def measure(self, *, blas: bool) -> object:
            return machine

    rows = {row.name: row for _, group in timing.time_cases(cases, Meter(), 3) for row in group}
    assert set(rows) == set(names)
    f16, q4, prefill, quantize, merge, matvec = (rows[name] for name in names)
    assert all(row.seconds > 0 and row.rounds == 3 for row in rows.values())
    tiles, values, pairs = 3, 2 * 3 * 64 * 64, 3 * (64 + 64)  # of three KV heads: by channel, and by token in one group
    assert f16.bytes_read == tiles * values * 2
    assert q4.bytes_read == tiles * (values // 2 + pairs * 4)
    assert quantize.bytes_read == values * 4
    assert matvec.bytes_read == 130 * 576 * 4
    assert f16.x_f16 == 1 and q4.x_f16 > 0 and prefill.x_f16 is None
    assert q4.core_ns_per_key == pytest.approx(q4.seconds * 1e9 * 2 / (130 * 3))
    assert q4.gigabytes_a_second == q4.of_bandwidth == pytest.approx(q4.bytes_read / q4.seconds / 1e9)
    assert q4.of_dot_peak == pytest.approx(2 * 130 * 9 * 64 * 2 / q4.seconds / 1e9)
    seen = sum(range(111, 131))
    assert prefill.gflops == prefill.of_blas == pytest.approx(4 * seen * 9 * 64 / prefill.seconds / 1e9)
    assert f16.of_dot_peak is f16.gflops is merge.of_bandwidth is prefill.gigabytes_a_second is None
    benchmarks["attention"].print_rows(list(rows.values()))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line][1:] == list(rows)


def test_the_loop_that_measures_products_does_its_work(benchmarks: dict[str, ModuleType]) -> None:
    """It refuses to give a rate otherwise."""
    assert benchmarks["machine"].dot_rate(2, 100) > 0


def test_the_machine_is_measured_with_one_buffer(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = benchmarks["machine"]
    made: list[np.ndarray] = []

    def small() -> np.ndarray:
        made.append(np.ones(1 << 16, np.uint8))
        return made[-1]

    monkeypatch.setattr(machine, "cold_buffer", small)
    monkeypatch.setattr(machine, "blas_rate", lambda: 7.0)
    monkeypatch.setattr(machine, "dot_rate", lambda threads: float(threads))
    meter = machine.Meter(2)
    found = meter.measure(blas=False)
    assert len(made) == 1 and found.gigabytes > 0 and found.blas_gflops == 0
    assert (meter.best.blas_gflops, meter.best.dot_products_thread, meter.best.dot_products) == (7, 1, 2)
