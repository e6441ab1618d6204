"""What is said of the machine, and memory measured against what was allocated."""

import platform
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import mixkv
from mixkv.experiments import machine
from mixkv.models.errors import MixkvError


def test_the_machine_and_the_versions_are_named() -> None:
    found = machine.describe()
    assert list(found) == ["cpu_info", "os", "mixkv", "python", "numpy", "numba"]
    assert found["mixkv"] == mixkv.__version__ and found["python"] == platform.python_version()
    assert (found["numpy"], found["numba"]) == (np.__version__, numba.__version__)
    assert all(found.values()) and all(value in machine.described(found) for value in found.values())
    assert "\n" not in machine.described(found)


def test_the_cpu_is_the_first_that_the_system_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A CPU: 3 GHz\n\nmodel name\t: another\n")
    monkeypatch.setattr(machine, "_CPUINFO", file)
    assert machine.describe()["cpu_info"] == "A CPU: 3 GHz"
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert machine.describe()["cpu_info"] in (platform.processor(), platform.machine())


PEAK = """
import sys
from pathlib import Path
from mixkv.experiments import machine
if sys.argv[1] == "getrusage":
    machine._STATUS = Path("/nowhere")
before = machine.peak_memory()
memory = bytearray(b"x") * (300 << 20)
del memory
print(machine.peak_memory() - before, before)
"""


@pytest.mark.parametrize("way", ["status", "getrusage"])
def test_the_peak_is_that_of_memory_that_is_long_given_back(way: str) -> None:
    """In a process of its own, whose peak is its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, way], capture_output=True, text=True, check=True)
    more, before = map(int, done.stdout.split())
    if way == "status":
        assert 290 << 20 < more < 310 << 20 and 1 << 20 < before < 200 << 20
    else:  # which begins with the peak of the process that started it
        assert more + before > 300 << 20


def test_a_process_of_its_own_measures_the_bandwidth() -> None:
    assert 1e8 < machine.bandwidth(1) < 1e13


def test_a_process_that_fails_is_one_line() -> None:
    assert machine.run_python("-c", "print('here')") == "here\n"
    with pytest.raises(MixkvError, match=r"exit code 1: ValueError: nothing") as caught:
        machine.run_python("-c", "raise ValueError('nothing')")
    assert "\n" not in str(caught.value)
    with pytest.raises(MixkvError, match=r"exit code 3: nothing on stderr"):
        machine.run_python("-c", "raise SystemExit(3)")
