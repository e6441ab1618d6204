"""Readers of foreign files take what they are given or refuse it, in bounded time and memory: damaged files, for seconds.

``python -m tests.fuzz`` does the same for hours, by coverage; what that has found is in tests/data/regressions.
"""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .__main__ import NAMES, REGRESSIONS
from .bounds import MAX_NBYTES, MAX_SECONDS, BoundError, check
from .mutators import scrambled
from .targets import TARGETS

FOUND = sorted(path for path in REGRESSIONS.rglob("*") if path.is_file()) if REGRESSIONS.is_dir() else []
FAULTS = {
    "gguf": "gguf-lengths",
    "session": "session-file",
    "config": "config-values",
    "safetensors": "safetensors-damage",
}
EXAMPLES = {"gguf": 150, "session": 150, "results": 60, "journal": 60}


@cache
def seeds_of(name: str) -> list[bytes]:
    return list(TARGETS[name].seeds())


def test_every_target_has_its_name() -> None:
    assert list(TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_fuzzing_begins_with_is_taken(name: str) -> None:
    for data in seeds_of(name):
        assert check(TARGETS[name].run, data)


@pytest.mark.fault("config-values", "safetensors-damage", "gguf-lengths", "chat-template", "session-file")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_taken_or_refused_within_bounds(name: str) -> None:
    target, refused = TARGETS[name], 0

    @settings(
        max_examples=EXAMPLES.get(name, 200), deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.integers(0, len(seeds_of(name)) - 1), st.integers(0, 1 << 32), st.integers(1, 3))
    def go(which: int, seed: int, times: int) -> None:
        nonlocal refused
        rng, data = random.Random(seed), seeds_of(name)[which]
        for _ in range(times):
            data = target.mutate(data, rng, lambda some: scrambled(some, rng))
        refused += not check(target.run, data)

    go()
    assert refused > 10  # else nothing was damaged


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_went_wrong_does_not_again(path: Path) -> None:
    check(TARGETS[path.parent.name].run, path.read_bytes())


def test_what_was_found_belongs_to_a_target() -> None:
    assert {path.parent.name for path in FOUND} <= set(NAMES)


# --- the bounds themselves ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system refuses no addresses")
def test_too_much_memory_is_noticed_also_where_it_is_swallowed() -> None:
    def greedy(data: bytes) -> None:
        bytearray(2 * MAX_NBYTES)  # the heap may have had some to spare

    def swallowing(data: bytes) -> None:
        from mixkv.models.errors import ModelError

        try:
            greedy(data)
        except MemoryError as error:
            raise ModelError("cannot be read") from error

    for run in (greedy, swallowing):
        with pytest.raises(BoundError):
            check(run, b"")
    assert check(lambda data: bytearray(MAX_NBYTES // 2), b"")  # type: ignore[arg-type, return-value]


def test_too_much_time_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.process_time", iter([0, MAX_SECONDS + 1, 10, 11 + MAX_SECONDS]).__next__)
    with pytest.raises(BoundError, match="processor time"):
        check(lambda data: None, b"")
    monkeypatch.setattr("time.process_time", iter([0, MAX_SECONDS + 1, 10, 11]).__next__)
    assert check(lambda data: None, b"")  # slow once


@pytest.mark.parametrize("fault", [lambda data: 1 / 0, lambda data: [][1], lambda data: int("x")])
def test_what_is_no_refusal_comes_through(fault: Callable[[bytes], None]) -> None:
    with pytest.raises((ZeroDivisionError, IndexError, ValueError)):
        check(fault, b"")
