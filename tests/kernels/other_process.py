"""What the tests also run in a process of its own, under another environment: ``python -m tests.kernels.other_process``.

Every function returns a dictionary that JSON can hold; the tests call the same functions in their own process too.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np

from .oracle import DTYPES, expected, normal, read_segment

ROOT = Path(__file__).parents[2]


def run_process(command: str, environment: dict[str, str]) -> Any:
    """The result of one function below in a new process."""
    return finish(start_process(command, environment))


def start_process(command: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Begin it; Numba's own settings are not inherited, the place of mixkv's compiled kernels is."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.other_process", command],
        cwd=ROOT, env={**inherited, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Any:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, f"exit code {process.returncode}: {stderr[-2000:]}"
    return json.loads(stdout)


def where() -> dict[str, str]:
    """The package that this process uses."""
    import mixkv.kernels

    return {"file": os.path.realpath(mixkv.kernels.__file__)}


def attention_bits() -> dict[str, str]:
    """Hashes of outputs and states of a few calls that take both routes through the kernel, in several formats."""
    from mixkv.kernels import empty_state, flash_attention, quantize

    rng = np.random.default_rng(11)
    hashes = {}
    for t, n in ((1, 1300), (7, 900), (150, 700)):
        q, k, v = normal(rng, t, 6, 64), normal(rng, n, 2, 64), normal(rng, n, 2, 64)
        half = k.astype(np.float16), v.astype(np.float16)
        forms = {"f32": (k, v), "f16": half, "q8": (quantize(k, v, k_bits=8, v_bits=8),), "q4": (quantize(k, v),)}
        for form, keys in forms.items():
            state = empty_state(6, t)
            out = flash_attention(q, *keys, causal=True, max_bias=8.0, softcap=30.0, state=state)
            hashes[f"{form} {t} {n}"] = hashlib.sha256(out.tobytes() + state.tobytes()).hexdigest()
    return hashes


def bits() -> dict[str, Any]:
    return {"threads": numba.get_num_threads(), **attention_bits()}


def merge() -> dict[str, Any]:
    """One merge, the smallest kernel: the result, and whether it was compiled here or loaded from disk."""
    from mixkv.kernels import merge_states
    from mixkv.kernels.jit import cache_folder
    from mixkv.kernels.state import merge_partials

    out1, out2 = np.full((1, 1, 16), 1, np.float32), np.full((1, 1, 16), 4, np.float32)
    state1, state2 = np.array([[[0.5, 1]]], np.float32), np.array([[[0.5, 2]]], np.float32)
    out, state = merge_states(out1, state1, out2, state2)
    hits = sum(merge_partials.stats.cache_hits.values())
    folder, used = str(cache_folder()), str(merge_partials.stats.cache_path)
    return {"out": out.ravel().tolist(), "state": state.ravel().tolist(), "hits": hits, "folder": folder, "used": used}


def cpu() -> dict[str, Any]:
    """What the kernels compute on the CPU that this process compiles for."""
    from numba.core.registry import cpu_target

    from mixkv.kernels import simd

    context = cpu_target.target_context
    features = {name: simd.cpu_has(context, name) for name in ("f16c", "fma", "avx2", "avx512f")}
    errors = {"halves": wrong_halves(), "exp": exp_error(), "attention": attention_errors()}
    return {"features": features, "bits": attention_bits(), **errors}


def attention_errors() -> dict[str, float]:
    """Largest difference from float64, relative to the largest |v|, by format, over both routes through the kernel."""
    from mixkv.kernels import flash_attention, quantize

    rng = np.random.default_rng(12)
    errors: dict[str, float] = {}
    for t, n in ((1, 600), (3, 40)):
        q, k, v = normal(rng, t, 4, 64), normal(rng, n, 2, 64), normal(rng, n, 2, 64)
        for form in (*DTYPES, "q8", "q4"):
            if form in DTYPES:
                keys: tuple = k.astype(DTYPES[form]), v.astype(DTYPES[form])
                stored = keys
            else:
                pair = int(form[1:]), int(form[1:])
                keys = (quantize(k, v, k_bits=pair[0], v_bits=pair[1]),)
                stored = read_segment(keys[0], pair, 64)
            found, want = flash_attention(q, *keys, causal=True), expected(q, *stored, causal=True)[0]
            errors[form] = max(errors.get(form, 0.0), float(np.abs(found - want).max() / np.abs(v).max()))
    return errors


def _probes() -> tuple[Any, Any]:
    """Two small kernels of the tests: float16 bits to float32, and exp, over arrays of a multiple of 16."""
    from mixkv.kernels import simd
    from mixkv.kernels.jit import kernel

    @kernel
    def widen(source, target):
        for i in range(0, source.size, 16):
            simd.store_f32(target.ctypes.data + 4 * i, simd.load_f16(source.ctypes.data + 2 * i))

    @kernel
    def exponential(source, target):
        for i in range(0, source.size, 16):
            simd.store_f32(target.ctypes.data + 4 * i, simd.exp(simd.load_f32(source.ctypes.data + 4 * i)))

    return widen, exponential


def wrong_halves() -> list[int]:
    """The float16 bit patterns, of all 65536, that do not become their own value in float32 (any NaN for a NaN)."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    found = np.full(patterns.shape, 7, np.float32)
    _probes()[0](patterns, found)
    want = patterns.view(np.float16).astype(np.float32)
    same = found.view(np.uint32) == want.view(np.uint32)
    return np.flatnonzero(~(same | (np.isnan(found) & np.isnan(want)))).tolist()


def exponentials(x: np.ndarray) -> np.ndarray:
    """The kernels' exp of float32 numbers."""
    padded = np.zeros(-(-x.size // 16) * 16, np.float32)
    padded[: x.size] = x
    found = np.full_like(padded, 7)
    _probes()[1](padded, found)
    return found[: x.size]


def exp_error() -> float:
    """Largest error of exp over its range, in units in the last place of the result."""
    rng = np.random.default_rng(13)
    borders = (np.arange(-252, 256)[:, None] / 2 * np.log(2) + np.linspace(-1e-4, 1e-4, 201)).ravel()
    tiny = 2.0 ** -rng.uniform(0, 149, 20_000) * rng.choice([-1, 1], 20_000)
    x = np.concatenate([np.linspace(-87.3, 88.7, 500_001), rng.uniform(-30, 30, 500_000), borders, tiny])
    x = x.astype(np.float32)
    x = x[(x >= np.float32(-87.3)) & (x <= np.float32(88.7))]
    want = np.exp(x.astype(np.float64))
    return float((np.abs(exponentials(x) - want) / np.spacing(want.astype(np.float32))).max())


COMMANDS = {"where": where, "bits": bits, "merge": merge, "cpu": cpu}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]]()))
