"""Threads and processes around the kernels: sessions in a pool of threads, and in forked and spawned processes.

All in processes of their own, so that a deadlock is an error and not the end of the tests.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixkv import Session
from mixkv.kernels import flash_attention, quantize
from mixkv.models.load import Model, load

PRELUDE = """
import multiprocessing, os, signal, sys
import numpy as np
import mixkv
from mixkv.kernels import flash_attention, quantize
from mixkv.models.errors import MixkvError

IDS = np.random.default_rng(0).integers(0, 258, (4, 120))

MODELS = {weights: mixkv.load("toy", weights) for weights in ("q8", "f32")}

def read(i, weights="q8"):
    session = mixkv.Session(MODELS[weights], mixkv.CachePolicy.parse("k4v2:window=32:tile=32"))
    rows = [session.forward(IDS[i][:100]), *(session.forward([token]) for token in IDS[i][100:])]
    return np.concatenate(rows)

def attend(_=0):
    q, k = np.ones((1, 2, 16), np.float32), np.ones((40, 2, 16), np.float32)
    return float(flash_attention(q, k, k).sum())

def in_child(function):
    "What a forked child says of a function: its result, or its error."
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = f"result {function()}"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(theirs, answer.encode())
        os._exit(0)
    os.close(theirs)
    _, status = os.waitpid(pid, 0)
    return os.read(ours, 10_000).decode() if status == 0 else f"status {status}"
"""


@pytest.fixture(scope="module", autouse=True)
def compiled(toy: Model) -> None:
    """Kernels in the cache before anything has a minute's time."""
    k = np.ones((64, 2, 16), np.float32)
    flash_attention(k[:1], k, k)
    quantize(k, k)
    for model in (toy, load("toy", "q8")):
        session = Session(model)
        session.forward(range(200))
        session.forward([1])


def run(source: str, tmp_path: Path) -> list[str]:
    """The lines that a script prints behind the prelude, in less than a minute and without an error."""
    script = tmp_path / "script.py"  # a spawned process imports it
    script.write_text(PRELUDE + source)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


@pytest.mark.fault("fork")
def test_sessions_in_a_pool_of_threads_have_the_bits_that_they_have_alone(tmp_path: Path) -> None:
    source = """
import numba
from concurrent.futures import ThreadPoolExecutor

alone = [read(i) for i in range(len(IDS))]
if numba.threading_layer() == "workqueue":  # which several threads may not use at once, and which says so
    print("True")
    sys.exit()
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(read, list(range(len(IDS))) * 2))
print(all(np.array_equal(a, b) for a, b in zip(alone * 2, together, strict=True)))
"""
    assert run(source, tmp_path) == ["True"]


@pytest.mark.fault("fork")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' OpenMP is not GNU's")
def test_a_child_forked_after_the_kernels_were_used_is_told_so(tmp_path: Path) -> None:
    source = """
attend()
read(0)
session = mixkv.Session(MODELS["q8"])
def forward():
    return session.forward([1, 2, 3])
def f32():
    return read(0, "f32")
for function in (lambda: read(0), f32, forward, attend, lambda: in_child(forward)):
    print(in_child(function))
print(in_child(lambda: int(quantize(np.ones((64, 1, 16), np.float32), np.ones((64, 1, 16), np.float32)).stop)))
print(session.position, forward().shape, read(0).shape)
"""
    *refusals, grandchild, codes, parent = run(source, tmp_path)
    kinds = [line.split(": ")[0] for line in refusals]
    assert kinds == ["MixkvError", "MixkvError", "MixkvError", "RuntimeError"]
    assert grandchild.startswith("result MixkvError: ")
    for line in (*refusals, grandchild):
        assert "the kernels cannot be used here" in line and "forked" in line and "'spawn'" in line
    assert codes == "result 64", "what runs in one thread is no trouble"
    assert parent == "0 (3, 258) (120, 258)", "the parent can go on"


@pytest.mark.fault("fork")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' OpenMP is not GNU's")
def test_a_forked_pool_gets_the_error_and_a_spawned_one_the_answer(tmp_path: Path) -> None:
    """Children that are ended by a signal would be replaced for ever, and the pool would wait for ever."""
    source = """
if __name__ == "__main__":
    expected = attend()
    for function in (read, attend):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            try:
                print(pool.map(function, [0, 1, 2]))
            except (MixkvError, RuntimeError) as error:
                print(type(error).__name__, str(error)[:31])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(attend, [0]) == [expected])
"""
    refused = "the kernels cannot be used here"
    assert run(source, tmp_path) == [f"MixkvError {refused}", f"RuntimeError {refused}", "True"]


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="nothing forks here")
def test_a_child_forked_before_the_kernels_were_used_can_use_them(tmp_path: Path) -> None:
    source = """
def digest():
    return float(np.abs(read(0)).sum()), attend()
first, second = in_child(digest), in_child(digest)
print(first == second == f"result {digest()}")
"""
    assert run(source, tmp_path) == ["True"]
