"""Checks of the machine: CPU, threads, memory."""

import os
from pathlib import Path
from typing import Any

from ...engine.memory import available_nbytes
from ...models.hub import REGISTRY
from ..machine import describe
from .check import NOTE, PROBLEM, Check, cores, judged, megabytes, text_of

# OpenBLAS's kernels for CPUs without AVX2, by the names that it gives its core types
_OLD_CORES = {"prescott", "core2", "penryn", "dunnington", "nehalem", "sandybridge", "athlon", "opteron", "opteron_sse3",
              "barcelona", "bobcat", "atom", "nano", "katmai", "coppermine", "northwood", "banias", "generic",
              "bulldozer"}  # fmt: skip
_BUSY = 1.5  # load a core, from which figures of speed say little
_LITTLE_MEMORY = 2_000_000_000
_WORK_NBYTES = 200_000_000  # beside the weights: the cache of a conversation, buffers, Python


def check_cpu(environment: dict[str, str]) -> Check:
    """Which instructions the kernels use, and whether something keeps them from better ones."""
    from ...kernels.routes import cpu

    found: list[tuple[str, str]] = []
    details: dict[str, Any] = {"cpu": describe()["cpu_info"], **cpu()}
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        if environment.get(name):
            about = f"{name}={environment[name]} makes the kernels use other instructions than the CPU has: unset it"
            found.append((NOTE, about))
    if details["machine"] in ("x86_64", "AMD64") and details["vectors"] == "128 bits" and not found:
        found.append((NOTE, f"{details['cpu']} has no AVX2: everything works, several times slower than on newer CPUs"))
    well = f"{details['cpu']}: vectors of {details['vectors']}, {details['dot product of 16-bit pairs']}"
    return judged("cpu", well, found, details)


def check_threads(environment: dict[str, str], layer: str | None, root: Path = Path("/")) -> Check:
    """How many threads there will be, and whether they get in each other's way.

    ``layer`` is Numba's threading layer, if one could be started; ``root`` is where /sys and /proc are.
    """
    from ...kernels.threads import most_threads

    n_cores, most = cores(), most_threads()
    quota, load = cpu_quota(root), _load(root)
    blas = _blas()
    details: dict[str, Any] = {
        "cores": n_cores, "threads": min(n_cores, most), "layer": layer, "cgroup_cpus": quota, "load": load, "blas": blas,
    }  # fmt: skip
    found: list[tuple[str, str]] = []
    if quota is not None and quota < details["threads"] - 0.01:
        fits = max(1, int(quota))
        about = f"the control group allows {quota:g} CPUs, and {details['threads']} threads would wait for each other"
        found.append((NOTE, f"{about}: use --threads {fits}, or set NUMBA_NUM_THREADS={fits}"))
    if most < n_cores:
        found.append((NOTE, f"NUMBA_NUM_THREADS={most} leaves {n_cores - most} of {n_cores} cores idle: unset it"))
    if layer == "workqueue":
        about = "Numba found neither OpenMP nor TBB, and its own threads cannot be used from two Python threads at once"
        found.append((NOTE, f"{about}: install libgomp1, or pip install tbb"))
    if load is not None and load > _BUSY * n_cores:
        found.append((NOTE, f"the load is {load:g} on {n_cores} cores: other programs take their share"))
    found += _judge_blas(blas, environment, n_cores)
    well = f"{details['threads']} threads on {n_cores} cores ({layer}); BLAS is " + (
        ", ".join(f"{each['library']} ({each['architecture']}, {each['threads']} threads)" for each in blas)
        or "unknown"
    )
    return judged("threads", well, found, details)


def _judge_blas(blas: list[dict[str, Any]], environment: dict[str, str], n_cores: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    forced = environment.get("OPENBLAS_CORETYPE", "")
    for each in blas:
        if str(each["architecture"]).lower() in _OLD_CORES:
            cause = (
                f"OPENBLAS_CORETYPE={forced}: unset it" if forced else "reinstall NumPy, or expect prompts to be slow"
            )
            about = f"NumPy's BLAS uses its kernel for {each['architecture']}, an old CPU; {cause}"
            found.append((PROBLEM if forced else NOTE, about))
        if (each["threads"] or 0) > n_cores:
            about = f"NumPy's BLAS has {each['threads']} threads on {n_cores} cores: set OPENBLAS_NUM_THREADS={n_cores}"
            found.append((NOTE, about))
    return found


def _blas() -> list[dict[str, Any]]:
    """The BLAS libraries that NumPy has loaded."""
    import numpy as np
    import threadpoolctl

    np.ones((2, 2)) @ np.ones((2, 2))
    return [
        {"library": each["internal_api"], "architecture": each.get("architecture"), "threads": each["num_threads"]}
        for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"
    ]  # fmt: skip


def cpu_quota(root: Path) -> float | None:
    """CPUs that the control groups allow this process, the least of its own and those above; None for no limit.

    Version 2 has cpu.max, "quota period" in microseconds, version 1 the two in files of their own
    (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    limits: list[float] = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        version2 = number == "0" and not controllers
        if not version2 and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" if version2 else root / "sys/fs/cgroup/cpu"
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for n in range(len(parts) + 1):
            folder = top.joinpath(*parts[:n])
            if version2:
                words = text_of(folder / "cpu.max").split()
            else:
                words = [text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
                limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def _load(root: Path) -> float | None:
    """Processes that wanted to run, over the last minute."""
    words = text_of(root / "proc/loadavg").split()
    try:
        return float(words[0]) if words else os.getloadavg()[0]
    except (OSError, ValueError, AttributeError):
        return None


def check_memory(model: str, available: int | None) -> Check:
    """Whether a model and its cache have room. ``available``: bytes of ``available_nbytes``, None where nobody knows."""
    needed = REGISTRY[model].file_nbytes + _WORK_NBYTES
    details = {"available_bytes": available, "needed_bytes": needed}
    found: list[tuple[str, str]] = []
    if available is None:
        return judged("memory", "how much is available, this system does not say", found, details)
    if available < needed:
        about = f"{megabytes(available)} are available, {model} takes some {megabytes(needed)}"
        found.append((PROBLEM, f"{about}: end other programs, or raise the control group's limit"))
    elif available < _LITTLE_MEMORY:
        about = f"{megabytes(available)} are available: enough for {model}"
        found.append((NOTE, f"{about}, little for larger models or --weights f32"))
    return judged("memory", f"{megabytes(available)} are available", found, details)


def memory_here() -> int | None:
    """Bytes of memory that can be had."""
    return available_nbytes()
