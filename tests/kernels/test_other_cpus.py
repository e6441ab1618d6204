"""The same kernels on lesser CPUs that the compiler is told to target, in processes of their own."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import pytest
from llvmlite import binding
from numba.core.registry import cpu_target

from mixkv.kernels import simd

from .microkernels import summary
from .oracle import TOLERANCE
from .other_process import attention_bits, attention_errors, finish, start_process, tile_hashes, wrong_codes
from .projections import projection_bits, projections

X86 = platform.machine().lower() in ("x86_64", "amd64")
HASWELL = ("f16c", "fma", "avx2")


def assert_close(errors: dict[str, float]) -> None:
    for name, error in errors.items():
        form, precision = name.split()
        kind = form if "/" not in form else "codes" if precision == "default" else "f32"
        assert error <= TOLERANCE["out", kind], f"{name}: {error:.3g}"


def microkernels(features: Sequence[str]) -> dict[str, Any]:
    """What there is on a CPU with these features, as many rows as its registers hold, and that all of it is exact."""
    if "avx512f" in features:
        found = {"rows": [1, 2, 3, 4, 8], "dense rows": [1, 2, 3, 4], "vectors": [1, 2, 4]}
    elif "avx2" in features:
        found = {"rows": [1, 2], "dense rows": [1, 2], "vectors": [1, 2]}
    else:
        found = {"rows": [1], "dense rows": [1], "vectors": [1, 2]}
    return {"counts": found, "products": []}


def check_projections(found: dict[str, Any], features: Sequence[str]) -> None:
    """Dot products of bytes are exact, for as many rows as there are registers for, and layers are close to float64."""
    rows = [1, 2, 4, 8] if "avx512f" in features else [1, 2] if "avx2" in features else [1]
    assert (found["byte rows"], found["wrong"]) == (rows, [])
    assert found["errors"].keys() == projections()["errors"].keys() and max(found["errors"].values()) <= 1, found


def test_this_cpu() -> None:
    context = cpu_target.target_context
    features = [x for x in ("avx2", "avx512f") if simd.cpu_has(context, x)]
    assert_close(attention_errors())
    assert summary() == microkernels(features)
    assert wrong_codes() == []
    check_projections(projections(), features)


def host_has(*features: str) -> bool:
    return X86 and all(binding.get_host_cpu_features().get(name, False) for name in features)


LESSER = {"generic": (), "haswell": HASWELL}


@pytest.fixture(scope="module")
def lesser_cpus() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each of them; they compile all kernels once more (a minute, once), so they do it side by side."""
    threads, processes = str(numba.config.NUMBA_NUM_THREADS), {}
    for name, features in LESSER.items():
        if host_has(*features):
            flags = ",".join(f"+{feature}" for feature in features)
            environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": flags, "NUMBA_NUM_THREADS": threads}
            processes[name] = start_process("cpu", environment)
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.fault("other-cpus")
@pytest.mark.skipif(not X86, reason="these are names of x86 CPUs")
@pytest.mark.parametrize(
    "name",
    [
        "generic",
        pytest.param("haswell", marks=pytest.mark.skipif(not host_has(*HASWELL), reason="needs AVX2")),
    ],
)
def test_a_cpu_without_avx512_or_avx2_computes_the_same(
    name: str, lesser_cpus: dict[str, subprocess.Popen[str]]
) -> None:
    """Halves by integers, multiply and add apart, and registers of other sizes change nothing that may not change."""
    features, found = LESSER[name], finish(lesser_cpus[name])
    assert found["features"] == {x: x in features for x in ("f16c", "fma", "avx2", "avx512f")}
    assert found["halves"] == [] and found["stored halves"] == []
    assert found["microkernels"] == microkernels(features) and found["codes"] == []
    assert found["tiles"] == tile_hashes()
    assert found["attention"].keys() == attention_errors().keys()
    assert_close(found["attention"])
    check_projections(found["projections"], features)
    if "fma" in features:  # the order of every sum is fixed: only an unfused multiply and add changes bits
        assert found["bits"] == attention_bits() and found["projections"]["bits"] == projection_bits()
    # Without a fused multiply-add, what rounding x / ln 2 costs is not undone.
    assert found["exp"] <= (1 if "fma" in features else 4.2)
