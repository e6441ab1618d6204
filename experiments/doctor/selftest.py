"""``python -m mixkv.experiments.doctor.selftest``: one token of the toy model, and attention beside float64; as JSON."""

import json
import time
from typing import Any

ALLOWED = 1e-3
"""How far attention over codes may be from float64 (docs/kernels.md promises 5e-4 and a little), of the largest output."""


def run() -> dict[str, Any]:
    """{"ready_seconds", "layer", "text", "error_of_attention", "allowed", "right"}."""
    from ...engine.generate import generate
    from ...engine.policy import CachePolicy
    from ...engine.sampler import SamplingParams
    from ...engine.session import Session
    from ...kernels.threads import threading_layer
    from ...kernels.warmup import warm_up
    from ...models.load import load

    start = time.perf_counter()
    warm_up()
    seconds = time.perf_counter() - start
    session = Session(load("toy", "q8"), CachePolicy(window=32, tile=32))
    prompt = [7 * i % 256 for i in range(200)]  # long enough for tiles in codes
    (token,) = generate(session, prompt, max_tokens=1, sampling=SamplingParams(temperature=0))
    error = _attention_error()
    return {"ready_seconds": seconds, "layer": threading_layer(), "text": token.text or f"token {token.id}",
            "error_of_attention": error, "allowed": ALLOWED, "right": error <= ALLOWED}  # fmt: skip


def _attention_error() -> float:
    """Largest difference from attention in float64, of the largest output, over numbers that codes of 4 bits can hold."""
    import numpy as np

    from ...kernels import flash_attention, quantize
    from ...kernels.reference import reference_attention

    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 4, 64), np.float32)  # (T, heads, head_dim)
    codes = generator.integers(0, 16, (2, 256, 2, 64))
    codes[0, ::32], codes[0, 1::32] = 0, 15  # the whole range in each channel of each tile,
    codes[1, ..., 0], codes[1, ..., 1] = 0, 15  # and in each token: so scales are 1/8, and minima -1
    k, v = (codes / 8 - 1).astype(np.float32)
    expected = reference_attention(q, k, v)[0]
    return float(np.abs(flash_attention(q, quantize(k, v)) - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    print(json.dumps(run()))  # noqa: T201
