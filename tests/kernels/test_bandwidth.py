"""The meter of memory: that it reads everything, and refuses to give a rate otherwise."""

from types import SimpleNamespace

import numba
import numpy as np
import pytest

from mixkv.kernels import bandwidth
from mixkv.kernels.memory import aligned_zeros


def ones(nbytes: int) -> np.ndarray:
    buffer = aligned_zeros(nbytes)
    buffer[:] = 1
    return buffer


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [2, 5, 64])
def test_a_buffer_of_ones_has_a_rate(threads: int, steps: int) -> None:
    assert bandwidth.read_bandwidth(threads, ones(steps * bandwidth.STEP_BYTES)) > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_any_byte_that_is_not_one_is_noticed(threads: int) -> None:
    """So every line is read: each in turn holds what must not be there."""
    buffer = ones(3 * bandwidth.STEP_BYTES)
    for at in range(7, len(buffer), 64):
        buffer[at] = 2
        with pytest.raises(AssertionError, match="the loop made"):
            bandwidth.read_bandwidth(threads, buffer)
        buffer[at] = 1


@pytest.mark.parametrize("threads", [0, -1, 1000])
def test_threads_out_of_range_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to {numba.get_num_threads()}, found {threads}"):
        bandwidth.read_bandwidth(threads, ones(1024))


@pytest.mark.parametrize("nbytes", [0, 1024, 2047, 3000])
def test_a_buffer_that_cannot_be_shared_out_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"1024 bytes or a multiple for each thread, found {nbytes}"):
        bandwidth.read_bandwidth(2, ones(nbytes))


def test_the_rate_is_bytes_by_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert bandwidth.best_seconds(lambda: None, 3) == 2.0


def test_the_buffer_is_large_and_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bandwidth.SMALLEST_BUFFER == 512 * 2**20
    monkeypatch.setattr(bandwidth, "SMALLEST_BUFFER", 5000)
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: 3000)
    buffer = bandwidth.cold_buffer()
    assert len(buffer) == 5 * bandwidth.STEP_BYTES and (buffer == 1).all()
