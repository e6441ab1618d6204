"""The machine and the versions that a measurement is made on, and what a process of its own measures of it."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..models.errors import MixkvError

_STATUS, _CPUINFO = Path("/proc/self/status"), Path("/proc/cpuinfo")
VERSIONS = {"mixkv": "mixkv", "Python": "python", "NumPy": "numpy", "Numba": "numba"}
_BANDWIDTH = "import sys; from mixkv.kernels.bandwidth import read_bandwidth; print(read_bandwidth(int(sys.argv[1])))"


def describe() -> dict[str, str]:
    """Names of the CPU and the system, and the versions of mixkv, Python, NumPy and Numba."""
    return {
        "cpu_info": _field(_CPUINFO, "model name") or platform.processor() or platform.machine(),
        "os": platform.platform(),
        "mixkv": __version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
    }


def described(machine: dict[str, str]) -> str:
    """What ``describe`` found, as one line."""
    versions = ", ".join(f"{name} {machine[key]}" for name, key in VERSIONS.items())
    return f"{machine['cpu_info']}; {machine['os']}; {versions}"


def peak_memory() -> int:
    """Bytes of memory that this process has had resident at most.

    Linux is asked for the peak of the program; what getrusage has there begins with the peak of the process that started
    it (https://man7.org/linux/man-pages/man5/proc_pid_status.5.html, VmHWM).
    """
    if own := _field(_STATUS, "VmHWM"):
        return int(own.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory, by a process of its own: its buffer is not our memory."""
    return float(run_python("-c", _BANDWIDTH, str(threads)))


def run_python(*arguments: str) -> str:
    """What a new Python process prints; MixkvError with the last line of what went wrong where it fails."""
    command = [sys.executable, "-P", *arguments]  # -P: nothing is imported from the current folder
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise MixkvError(failure(done.returncode, done.stderr))
    return done.stdout


def failure(code: int, stderr: str) -> str:
    """What to say of a process that ended with this exit code and wrote this."""
    lines = stderr.strip().splitlines() or ["nothing on stderr"]
    return f"a process that was to be measured ended with exit code {code}: {lines[-1]}"


def _field(file: Path, name: str) -> str:
    """The first value of a name in a file of "name: value" lines; empty where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")
