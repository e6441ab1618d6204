"""What nbytes says is what the operating system sees: a cache of over 512 MB in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STATM = Path("/proc/self/statm")

# 8 KV heads of 128 channels, as in models of 7 billion weights, 4 layers. The kernel is left out: its time grows with
# the square of the tokens, it keeps nothing, and a hundred thousand tokens would take it minutes. The random rows are
# drawn once and used again; what is written into the cache is new memory all the same. Dense parts are float32, because
# NumPy takes as long to round a chunk to float16 as we take to quantize it.
PROGRAM = """
import gc, json, os
import numpy as np
import mixkv.engine.layer
from mixkv.engine.cache import Cache
from mixkv.engine.policy import CachePolicy
from mixkv.kernels.jit import do_share
from mixkv.kernels.append import store_rows_of
from mixkv.kernels.quantize import quantize_share
from mixkv.kernels.tables import JOB_STARTS, MAX_ROUNDS
from mixkv.models.transformer import Softmax

CHUNK, CHUNKS, LAYERS, HEADS, DIM = 512, 230, 4, 8, 128

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def store_and_seal(call, qkv, *_):
    store_rows_of(call, qkv)
    for i in range(MAX_ROUNDS):
        if call[JOB_STARTS + i] < call[JOB_STARTS + i + 1]:
            do_share(quantize_share.address(), call.ctypes.data, 0, 1, i, 0, 0, 0, 0, 0)

mixkv.engine.layer.attend_segments = store_and_seal
generator = np.random.default_rng(0)
q = np.zeros((CHUNK, HEADS, DIM), np.float32)
k, v = (generator.standard_normal((CHUNK, HEADS, DIM), np.float32) for _ in range(2))

def fill(chunks):
    cache = Cache(CachePolicy(window=128, dense="f32"), LAYERS, HEADS, DIM)
    for i in range(chunks):
        for layer in range(LAYERS):
            cache.attend(layer, np.concatenate((q, k, v), axis=1), i * CHUNK, Softmax(DIM**-0.5))
        cache.commit((i + 1) * CHUNK)
    return cache

fill(2)  # whatever is allocated once
gc.collect()
before = resident()
cache = fill(CHUNKS)
grown = resident() - before
print(json.dumps({"grown": grown, **cache.nbytes(), "tokens": CHUNK * CHUNKS}))
"""


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
def test_resident_memory_grows_by_what_nbytes_says(clean_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean_env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] >= 512 << 20
    assert found["total"] == found["sink"] + found["old"] + found["recent"]
    assert abs(found["grown"] - found["total"]) <= 0.02 * found["total"], found
    # A cache of float16 would have been more than three times as large.
    float16 = found["tokens"] * 4 * 8 * 128 * 2 * 2
    assert found["grown"] <= 0.33 * float16
