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

from .microkernels import summary
from .oracle import CODED, DTYPES, expected, normal, quantize_as, read_segment, segment_tiles
from .projections import projection_bits, projections

ROOT = Path(__file__).parents[2]


PRECISIONS = ("default", "f32")
# Formats of K and V: all bits, each axis on each side, and groups smaller than the largest
CODED_PAIRS = (
    ("q8", "q8"), ("q4", "q4"), ("q3", "q3"), ("q2", "q2"), ("q8t", "q2c"), ("q4t16", "q3t16"),
    ("q3t", "q4c"), ("q2t32", "q8c"),
)  # fmt: skip


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
    """Hashes of outputs and states of a few calls that are cut in every way, in every format and both precisions."""
    from mixkv.kernels import empty_state, flash_attention

    rng = np.random.default_rng(11)
    hashes = {}
    for t, n in ((1, 1300), (7, 900), (150, 700)):
        q, k, v = normal(rng, t, 6, 64), normal(rng, n, 2, 64), normal(rng, n, 2, 64)
        forms: dict[str, tuple] = {form: (k.astype(DTYPES[form]), v.astype(DTYPES[form])) for form in DTYPES}
        forms |= {"/".join(kinds): (quantize_as(kinds, k, v),) for kinds in CODED_PAIRS}
        for form, keys in forms.items():
            for precision in PRECISIONS if form not in DTYPES else PRECISIONS[:1]:
                state = empty_state(6, t)
                out = flash_attention(
                    q, *keys, causal=True, max_bias=8.0, softcap=30.0, state=state, precision=precision
                )  # fmt: skip
                digest = hashlib.sha256(out.tobytes() + state.tobytes()).hexdigest()
                hashes[f"{form} {precision} {t} {n}"] = digest
    return hashes


def bits() -> dict[str, Any]:
    return {"threads": numba.get_num_threads(), **attention_bits()}


def projection() -> dict[str, Any]:
    return {"threads": numba.get_num_threads(), **projection_bits()}


def merge() -> dict[str, Any]:
    """One merge, the smallest kernel: the result, and whether it was compiled here or loaded from disk."""
    from mixkv.kernels import merge_states
    from mixkv.kernels.jit import cache_folder
    from mixkv.kernels.state import merge_parts

    out1, out2 = np.full((1, 1, 16), 1, np.float32), np.full((1, 1, 16), 4, np.float32)
    state1, state2 = np.array([[[0.5, 1]]], np.float32), np.array([[[0.5, 2]]], np.float32)
    out, state = merge_states(out1, state1, out2, state2)
    hits = sum(merge_parts.function.stats.cache_hits.values())
    folder, used = str(cache_folder()), str(merge_parts.function.stats.cache_path)
    return {"out": out.ravel().tolist(), "state": state.ravel().tolist(), "hits": hits, "folder": folder, "used": used}


def cpu() -> dict[str, Any]:
    """What the kernels compute on the CPU that this process compiles for."""
    from numba.core.registry import cpu_target

    from mixkv.kernels import simd

    context = cpu_target.target_context
    features = {name: simd.cpu_has(context, name) for name in ("f16c", "fma", "avx2", "avx512f")}
    errors = {
        "halves": wrong_halves(), "stored halves": wrong_stored_halves(), "exp": exp_error(),
        "attention": attention_errors(), "microkernels": summary(), "codes": wrong_codes(),
        "projections": projections(),
    }  # fmt: skip
    return {"features": features, "bits": attention_bits(), "tiles": tile_hashes(), **errors}


def attention_errors() -> dict[str, float]:
    """Largest difference from float64, relative to the largest |v|, by formats and precision, few queries and one."""
    from mixkv.kernels import flash_attention

    rng = np.random.default_rng(12)
    errors: dict[str, float] = {}
    for t, n in ((1, 600), (3, 40)):
        q, k, v = normal(rng, t, 4, 64), normal(rng, n, 2, 64), normal(rng, n, 2, 64)
        cases: dict[str, tuple] = {}
        for form in DTYPES:
            cases[form] = ((k.astype(DTYPES[form]), v.astype(DTYPES[form])),) * 2
        for kinds in CODED_PAIRS:
            segment = quantize_as(kinds, k, v)
            cases["/".join(kinds)] = (segment,), read_segment(segment, kinds, 64)
        for form, (keys, stored) in cases.items():
            want = expected(q, *stored, causal=True)[0]
            for precision in PRECISIONS:
                found = flash_attention(q, *keys, causal=True, precision=precision)
                error = float(np.abs(found - want).max() / np.abs(stored[1]).max())
                name = f"{form} {precision}"
                errors[name] = max(errors.get(name, 0.0), error)
    return errors


def tile_hashes() -> dict[str, str]:
    """Hashes of the bytes that quantizing makes, in every format, of numbers that are normal, tiny and large."""
    rng = np.random.default_rng(14)
    hashes = {}
    for d in (20, 64, 112):
        k, v = (normal(rng, 150, 2, d) * 10.0 ** rng.uniform(-6, 3, d).astype(np.float32) for _ in "kv")
        for kind in CODED:
            for axis in "ct":
                for tile in (32, 64, 128):
                    kinds = (kind + axis, kind + axis)
                    tiles = segment_tiles(quantize_as(kinds, k, v, tile), kinds, tile)
                    digest = hashlib.sha256(b"".join(x.tobytes() for x in tiles)).hexdigest()
                    hashes[f"{kind}{axis} {d} {tile}"] = digest
    return hashes


def _probes() -> tuple[Any, Any, Any]:
    """Small kernels of the tests over arrays of a multiple of 16: float16 bits to float32 and back, and exp."""
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

    @kernel
    def narrow(source, target):
        for i in range(0, source.size, 16):
            simd.store_f16(target.ctypes.data + 2 * i, simd.load_f32(source.ctypes.data + 4 * i))

    return widen, exponential, narrow


def wrong_stored_halves() -> list[str]:
    """The float32 numbers that are not stored as the float16 that NumPy rounds them to (any NaN for a NaN).

    All float16 numbers, what lies halfway between two of them and one float32 beside that, random bit patterns (which
    overflow, or are far below the smallest), and the specials.
    """
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = ((halves[:-1] + halves[1:]) / 2).astype(np.float32)
    random = np.random.default_rng(15).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, 65520.004, 1e30, np.inf, np.nan, 2.0**-25, 2.0**-26, 1e-45, 0], np.float32)
    up, down = (np.nextafter(between, np.float32(towards)) for towards in (np.inf, 0))
    x = np.concatenate([halves.astype(np.float32), between, up, down, edges])
    x = np.concatenate([x, -x, random])
    x = np.resize(x, -(-x.size // 16) * 16)
    found = np.full(x.shape, 7, np.uint16)
    _probes()[2](x, found)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    same = (found == want.view(np.uint16)) | (np.isnan(want) & np.isnan(found.view(np.float16)))
    return [f"{a:.9g}: {b:#x}" for a, b in zip(x[~same][:20], found[~same][:20], strict=True)]


def spread(bits: int, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that a spread makes of one or three (3 bits) vectors of words, and those that it should make.

    Both are uint16 (pairs, 16, 2). What a word holds are codes less the middle one; what comes out are the codes.
    """
    from mixkv.kernels import simd
    from mixkv.kernels.jit import kernel

    made = {8: simd.spread8, 4: simd.spread4, 2: simd.spread2}.get(bits)

    @kernel
    def spread_one(source, target):
        made(source.ctypes.data, target.ctypes.data)

    @kernel
    def spread_planes(source, target):
        simd.spread3(source.ctypes.data, source.ctypes.data + 128, target.ctypes.data)

    found = np.full((16, 16, 2), 7, np.uint16)
    (spread_planes if bits == 3 else spread_one)(words, found)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1)
    if bits != 3:
        stored = np.stack([halves[0] >> (bits * i) & (2**bits - 1) for i in range(16 // bits)])
        assert (found[len(stored) :] == 7).all()
    else:
        low = [halves[i // 8] >> (2 * (i % 8)) & 3 for i in range(16)]
        stored = np.stack([x + 4 * (halves[2] >> i & 1) for i, x in enumerate(low)])
    return found[: len(stored)], (stored + 2 ** (bits - 1)) % 2**bits


def wrong_codes() -> list[int]:
    """The numbers of bits whose codes do not come out of their words."""
    words = np.random.default_rng(17).integers(0, 1 << 32, (3, 16), dtype=np.uint32)
    return [bits for bits in (8, 4, 3, 2) if not np.array_equal(*spread(bits, words))]


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


def exp_error(low: float = -87.3, high: float = 0.0) -> float:
    """Largest error of exp from ``low`` to ``high``, in parts of the 2 + |x|/4 units in the last place that it may be."""
    rng = np.random.default_rng(13)
    borders = (np.arange(-252, 256)[:, None] / 2 * np.log(2) + np.linspace(-1e-4, 1e-4, 201)).ravel()
    tiny = 2.0 ** -rng.uniform(0, 149, 20_000) * rng.choice([-1, 1], 20_000)
    x = np.concatenate([np.linspace(-87.3, 88, 500_001), rng.uniform(-30, 30, 500_000), borders, tiny])
    x = x.astype(np.float32)
    x = x[(x >= np.float32(low)) & (x <= np.float32(high))]
    want = np.exp(x.astype(np.float64))
    units = np.abs(exponentials(x) - want) / np.spacing(want.astype(np.float32))
    return float((units / (2 + np.abs(x) / 4)).max())


COMMANDS = {"where": where, "bits": bits, "projection": projection, "merge": merge, "cpu": cpu}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]]()))
