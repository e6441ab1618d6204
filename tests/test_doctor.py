"""``mixkv doctor``: each thing that it looks at is broken once, and what it says then is read."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixkv.cli import app
from mixkv.experiments import doctor
from mixkv.experiments.doctor import NOTE, OK, PROBLEM, Check, caches, machine, software
from mixkv.experiments.doctor.run import _tried
from mixkv.kernels import compiled
from mixkv.models import hub
from mixkv.models.hub.registry import RegistryEntry, Wheel

from .models.fake_hub import FakeHub

CONTENT = b"GGUF" + bytes(range(256)) * 40
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache with a registry of one small model, ``tiny``."""
    import hashlib

    digest = hashlib.sha256(CONTENT).hexdigest()
    entry = RegistryEntry("tiny", "", "", (Wheel("tiny", "1", digest, 1_000, "m"),), "tiny.gguf", digest, len(CONTENT))
    for module in ("mixkv.models.hub.registry", "mixkv.models.hub", "mixkv.experiments.doctor.machine"):
        monkeypatch.setattr(f"{module}.REGISTRY", {"tiny": entry})
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        compiled, "_temporary", lambda: tmp_path / "temporary"
    )  # other tests leave kernels in the real one
    return tmp_path / "cache"


def says(check: Check, state: str, *words: str) -> None:
    assert check.state == state, check
    assert check.text.isprintable()
    for word in words:
        assert word in check.text, (word, check.text)
    json.dumps(check.details)


# --- the whole ------------------------------------------------------------------------------------------------------


def test_a_healthy_place_is_ok_and_every_check_has_a_sentence(tmp_path: Path) -> None:
    """In a process of its own, with the kernels' own cache; the models' folder is the user's, whatever is in it."""
    done = subprocess.run(
        [sys.executable, "-m", "mixkv", "doctor", "--json"], capture_output=True, text=True, timeout=600
    )
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert list(checks) == [
        "python", "dependencies", "extras", "cpu", "threads", "memory", "models folder", "default model", "other models",
        "kernels", "self-test",
    ]  # fmt: skip
    assert all(check["text"] and check["state"] in (OK, NOTE, PROBLEM) for check in checks.values())
    assert done.returncode == (0 if found["ok"] else 8)
    for name in ("python", "dependencies", "extras", "self-test"):
        assert checks[name]["state"] == OK, checks[name]
    tested = checks["self-test"]["details"]
    assert tested["right"] and tested["error_of_attention"] < 5e-4 and tested["text"] and tested["layer"]


def test_problems_make_the_exit_code_and_notes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("a", OK, "fine"), Check("b", NOTE, "so so")]
    monkeypatch.setattr(doctor, "diagnose", lambda progress: checks)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and result.stdout.splitlines() == ["ok       a  fine", "note     b  so so"]
    checks.append(Check("c", PROBLEM, "broken"))
    result = CliRunner().invoke(app, ["doctor", "--quiet"])
    assert result.exit_code == 8 and result.stderr == "mixkv: 1 problem: c\n"
    assert result.stdout.splitlines() == ["note     b  so so", "problem  c  broken"]
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["ok"] is False and found["checks"][2]["text"] == "broken"


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on() -> None:
    def broken() -> Check:
        raise RuntimeError("two\nlines")

    found = _tried("cpu", broken)
    assert isinstance(found, Check)
    says(found, PROBLEM, "could not be made", "RuntimeError", "two lines")


# --- machine --------------------------------------------------------------------------------------------------------


def test_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_cpu({}).details["vectors"] in machine.check_cpu({}).text
    says(machine.check_cpu({"NUMBA_CPU_NAME": "generic"}), NOTE, "NUMBA_CPU_NAME=generic", "unset it")
    old = {"machine": "x86_64", "vectors": "128 bits", "dot product of 16-bit pairs": "pmaddwd (SSE2)"}
    monkeypatch.setattr("mixkv.kernels.routes.cpu", lambda: old)
    says(machine.check_cpu({}), NOTE, "no AVX2")


def groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "25000\n",
          "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 0.25),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": "1 0"}, None),
    ],
)  # fmt: skip
def test_the_control_groups_share_of_cpus(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert machine.cpu_quota(groups(tmp_path, files)) == quota


def test_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    blas = [{"library": "openblas", "architecture": "Zen", "threads": 4}]
    monkeypatch.setattr(machine, "_blas", lambda: blas)
    quiet = groups(tmp_path, {"proc/loadavg": "0.10 0.10 0.10 1/100 1\n"})
    says(machine.check_threads({}, "omp", quiet), OK, "4 threads on 4 cores (omp)", "openblas (Zen, 4 threads)")
    says(machine.check_threads({}, "workqueue", quiet), NOTE, "pip install tbb")
    limited = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}
    says(machine.check_threads({}, "omp", groups(quiet, limited)), NOTE, "allows 1.5 CPUs", "--threads 1")
    busy = groups(tmp_path / "busy", {"proc/loadavg": "9.00 0.10 0.10 1/100 1\n"})
    says(machine.check_threads({}, "omp", busy), NOTE, "load is 9 on 4 cores")
    blas[0]["architecture"] = "Prescott"
    says(
        machine.check_threads({"OPENBLAS_CORETYPE": "Prescott"}, "omp", quiet),
        PROBLEM,
        "OPENBLAS_CORETYPE=Prescott: unset",
    )
    says(machine.check_threads({}, "omp", quiet), NOTE, "kernel for Prescott")
    blas[0] |= {"architecture": "Zen", "threads": 16}
    says(machine.check_threads({}, "omp", quiet), NOTE, "16 threads on 4 cores", "OPENBLAS_NUM_THREADS=4")
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    says(machine.check_threads({}, "omp", quiet), NOTE, "NUMBA_NUM_THREADS=1 leaves 3 of 4 cores idle")


def test_a_core_type_that_is_set_reaches_numpy_and_is_found() -> None:
    """OpenBLAS itself, in a process of its own; where NumPy has another BLAS there is nothing to find."""
    program = (
        "import json, os; from mixkv.experiments.doctor import machine\n"
        "found = machine.check_threads(dict(os.environ), 'omp')\n"
        "print(json.dumps([found.state, found.text, found.details]))"
    )
    env = os.environ | {"OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    state, text, details = json.loads(done.stdout)
    if not any(each["architecture"] == "Nehalem" for each in details["blas"]):
        pytest.skip("NumPy's BLAS does not know this variable here")
    assert state == PROBLEM and "OPENBLAS_CORETYPE=Nehalem: unset it" in text


def test_memory(cache: Path) -> None:
    says(machine.check_memory("tiny", 1 << 40), OK, "available")
    says(machine.check_memory("tiny", 1_000_000_000), NOTE, "enough for tiny")
    says(machine.check_memory("tiny", 1_000_000), PROBLEM, "1 MB are available", "end other programs")
    says(machine.check_memory("tiny", None), OK, "does not say")


# --- caches ---------------------------------------------------------------------------------------------------------


def test_a_models_folder_that_is_not_there_yet_is_fine_and_is_not_made(cache: Path) -> None:
    says(caches.check_models_folder("tiny"), OK, str(cache / "models"))
    assert not cache.exists()


def test_a_folder_whose_place_is_taken(cache: Path) -> None:
    cache.write_text("a file")
    says(caches.check_models_folder("tiny"), PROBLEM, "is no folder", "set MIXKV_CACHE")
    says(caches.check_kernels_folder(1, 0.1), PROBLEM, "is no folder", "set MIXKV_CACHE")


def test_a_folder_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so it is the system's answer that is changed."""
    (cache / "models").mkdir(parents=True)
    real = tempfile.TemporaryFile

    def read_only(*args: Any, dir: Any = None, **options: Any) -> Any:
        if dir is not None and Path(dir).is_relative_to(cache):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    says(caches.check_models_folder("tiny"), PROBLEM, "cannot be written (Read-only file system)", "MIXKV_CACHE")
    says(caches.check_kernels_folder(1, 0.1), PROBLEM, "Read-only file system", "MIXKV_CACHE")


def test_a_disk_that_is_full_or_nearly(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**12, 10**12, 10_000))
    says(caches.check_models_folder("tiny"), PROBLEM, "has 0 MB free", "to fetch tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**12, 10**12, 500_000_000))
    says(caches.check_models_folder("tiny"), NOTE, "only 500 MB free")


def test_a_disk_without_inodes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = namedtuple("Counts", "f_files f_favail f_bavail f_blocks f_bfree f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda place: fake(1_000, 0, 10**9, 10**9, 10**9, 4096))
    says(caches.check_models_folder("tiny"), PROBLEM, "can hold no more files")


def test_what_stopped_downloads_have_left(cache: Path) -> None:
    part = cache / "models" / "hf" / "org--x" / ("0" * 40) / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(3_000_000))
    says(caches.check_models_folder("tiny"), NOTE, "3 MB are left of stopped downloads", "mixkv rm --partial")


def test_the_default_model(cache: Path) -> None:
    says(caches.check_default_model("tiny"), NOTE, "not fetched yet", "mixkv pull tiny")
    path = cache / "models" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    says(caches.check_default_model("tiny"), OK, str(path), "SHA-256 right")
    assert hub.cached_file("tiny") == path  # verified and noted
    stamp = path.stat().st_mtime_ns
    path.write_bytes(CONTENT[:-1] + b"x")
    os.utime(path, ns=(stamp, stamp))  # as a bit that rots: no other look would notice
    assert hub.cached_file("tiny") == path
    says(caches.check_default_model("tiny"), PROBLEM, "sha256", "remove it, then `mixkv pull tiny`")
    path.write_bytes(CONTENT[:100])
    says(caches.check_default_model("tiny"), PROBLEM, "100 bytes")


def test_other_models(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.publish("org/a", {"a.gguf": CONTENT})
        server.publish("org/b", {"b.gguf": CONTENT})
        a, b = hub.pull("hf:org/a"), hub.pull("hf:org/b")
    says(caches.check_other_models("tiny"), OK, "hf:org/a:a.gguf", "hf:org/b:b.gguf")
    a.write_bytes(CONTENT[:-1])
    b.unlink()
    check = caches.check_other_models("tiny")
    says(check, PROBLEM, "mixkv rm hf:org/a:a.gguf", "hf:org/b:b.gguf lacks files: `mixkv pull hf:org/b:b.gguf`")
    (a.parents[1] / "index.json").write_text("{")
    says(caches.check_other_models("tiny"), PROBLEM, "index.json", "hf:org/b:b.gguf lacks files")


# --- kernels --------------------------------------------------------------------------------------------------------


def test_kernels_that_were_cold_or_are_of_other_versions(cache: Path) -> None:
    says(caches.check_kernels_folder(17, 0.2), OK, str(cache / "kernels"))
    says(caches.check_kernels_folder(0, 31.0), NOTE, "not all kernels were compiled yet", "31 s")
    old = cache / "kernels" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "a.nbc").write_bytes(bytes(2_000_000))
    (cache / "kernels" / "something else").mkdir()
    says(caches.check_kernels_folder(17, 0.2), NOTE, "1 other versions have left 2 MB", "mixkv rm --kernels")


def test_kernels_of_other_versions_are_removed_and_ours_stay(cache: Path) -> None:
    own, old, other = (cache / "kernels" / name for name in (compiled.wanted_folder().name, "0" * 16, "keep me"))
    for folder in (own, old, other):
        folder.mkdir(parents=True)
        (folder / "a.nbc").write_bytes(bytes(1_000_000))
    (cache / "kernels" / ("1" * 16)).symlink_to(other)
    notes = cache / "kernels" / ("2" * 16)  # whose name is by chance that of a state
    notes.mkdir()
    (notes / "thesis.txt").write_bytes(b"mine")
    assert compiled.others() == [old]
    result = CliRunner().invoke(app, ["rm", "--kernels"])
    assert result.exit_code == 0 and "1.00 MB came free" in result.stdout
    assert not old.exists() and (own / "a.nbc").exists() and (other / "a.nbc").exists()
    assert compiled.remove_others() == 0 and (notes / "thesis.txt").read_bytes() == b"mine"


# --- software -------------------------------------------------------------------------------------------------------


def test_dependencies() -> None:
    says(software.check_dependencies(), OK, "numpy", "numba")
    says(software.check_dependencies(["numpy>=999.0"]), PROBLEM, "numpy is", "pip install 'numpy>=999.0'")
    says(software.check_dependencies(["no-such-package>=2"]), PROBLEM, "no-such-package is missing")
    says(software.check_dependencies(['no-such-package>=2; extra == "hub"']), OK)


def test_extras() -> None:
    says(software.check_extras(), OK, "report", "hub")
    says(software.check_extras(['no-such-package>=2; extra == "hub"']), NOTE, "hf:org/name", "pip install 'mixkv[hub]'")


def test_versions_are_compared_as_versions_on_both_sides() -> None:
    name, version = "typer", software.importlib.metadata.version("typer")
    says(software.check_dependencies([f"{name}<0.9,>=0.1"]), PROBLEM, f"{name} is {version}, <0.9,>=0.1 is needed")
    says(software.check_dependencies([f"{name}<9.10,>=0.9"]), OK)
    says(software.check_dependencies([f"{name}!={version}"]), PROBLEM, "is needed")
    says(software.check_dependencies(["no-such-package; python_version < '3'"]), OK)
    says(software.check_extras(["numpy[x]>=1; extra == 'hub'", "numpy>=1; extra == 'test'"]), OK, "hub")


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    says(software.check_python(), OK, sys.executable)
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    says(software.check_python(), PROBLEM, "32 bits")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["signal 11"]),
        ("raise RuntimeError('no threading layer')", ["no threading layer"]),
        ("import sys; sys.exit(3)", ["nothing was said"]),
    ],
)
def test_kernels_that_crash_do_not_take_the_doctor_with_them(
    monkeypatch: pytest.MonkeyPatch, program: str, words: list[str]
) -> None:
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", program], **options))
    says(software.check_self_test(software.self_test()), PROBLEM, "could not be generated", *words)


def test_kernels_that_compute_something_else() -> None:
    found = {"error": "", "right": False, "error_of_attention": 0.3, "allowed": 1e-3, "text": "x"}
    says(software.check_self_test(found), PROBLEM, "0.3 from float64", "may be 0.001")


def test_what_numba_prints_before_the_self_test_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(text: str) -> None:
        done = subprocess.CompletedProcess([], 0, text, "")
        monkeypatch.setattr(software.subprocess, "run", lambda *_, **__: done)

    printed('[cache] data loaded\n{"right": true}\n')
    assert software.self_test() == {"error": "", "right": True}
    for text in ("", "no JSON", "[1]"):
        printed(text)
        says(software.check_self_test(software.self_test()), PROBLEM, "it printed")


@pytest.mark.parametrize("missing", ["numba", "platformdirs", "packaging"])
def test_without_a_dependency_the_other_checks_are_made(missing: str, cache: Path) -> None:
    """And which one is missing is said, in the place of a traceback."""
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['mixkv', 'doctor', '--json']\n"
    code += "from mixkv.experiments.doctor import software; software.self_test = lambda: {'error': 'left out'}\n"
    code += "from mixkv.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 8 and "Traceback" not in done.stderr, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["python"]["state"] == OK and len(checks) == 11
    broken = [check["text"] for check in checks.values() if check["state"] == PROBLEM]
    assert any(missing in text for text in broken), broken
