"""Rows of results that nobody measured, for tests of the report: seeded, plausible, of the default model's shape.

    python tests/experiments/report/make_results.py results.jsonl     (in an environment with mixkv)

Bytes are those that the policies really take; divergences follow a formula that falls about tenfold every two bits.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mixkv.engine.policy import CachePolicy

Row = dict[str, Any]
LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 30, 9, 3, 64, 8192
DENSE_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 2 * 2  # of a token in float16
PARAMETERS = 537_900_000
MACHINE = {
    "mixkv": "0.1.0", "cpu_info": "AMD EPYC 9R14", "os": "Linux-6.1.0-x86_64-with-glibc2.36", "python": "3.11.7",
    "numpy": "2.3.5", "numba": "0.62.1",
}  # fmt: skip
MODEL = {
    "schema": 1, **MACHINE, "model": "smollm2", "weights": "f32", "reference_weights": "f32",
    "parameters_bytes": PARAMETERS, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "context": CONTEXT,
}  # fmt: skip
TEXT = (
    "the cache keeps recent tokens at high precision and everything older in few bits so that a long text still fits "
    "into memory ; when a tile is sealed its keys and values are rounded once , and what was said at the very "
    "beginning of the conversation can still be found by whoever looks for it later , if the codes have kept enough "
    "of it ."
)
WORDS = TEXT.split()
DOCUMENTS = ("topics", "alice.txt")


def policies(count: int = 48) -> list[str]:
    """Texts of ``count`` policies: bits of keys and values, windows, tiles, tiers, an override."""
    grid = [f"k{k}v{v}" for k in (8, 4, 3, 2) for v in (8, 4, 3, 2)]
    texts = ["f16", "tiny", "old=k4c/v3t layers=0..1+-1[k_bits=8]", *grid]
    texts += [f"{name}:window={window}" for window in (64, 256) for name in grid]
    texts += [f"{name}:tile=128" for name in grid]
    return texts[:count]


def _hex(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _bytes(policy: CachePolicy) -> tuple[float, float]:
    """Bytes of an old and of a recent token, all layers."""
    each = [policy.for_layer(layer, LAYERS).nbytes_per_token(KV_HEADS, HEAD_DIM) for layer in range(LAYERS)]
    return sum(tiers[-1] for tiers, _ in each), sum(dense for _, dense in each)


def _divergence(policy: CachePolicy) -> float:
    """The mean KL that such a policy might have: keys cost more than values, a long window helps a little."""
    tier = policy.tiers[-1]
    k, v = min(tier.k_bits, 11), min(tier.v_bits, 11)
    own = 0.35 * 10 ** (-0.62 * k) + 0.06 * 10 ** (-0.6 * v)
    return own * (128 / max(policy.window, 32)) ** 0.15 * (1.15 if policy.tile == 128 else 1) + 2e-7


def _text(rng: np.random.Generator, words: int) -> str:
    start = int(rng.integers(0, len(WORDS)))
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(words))


def _worst(rng: np.random.Generator, kl: np.ndarray, predicted: int) -> list[Row]:
    rows = []
    for value in np.sort(kl)[::-1][:20]:
        p_reference = float(rng.uniform(0.02, 0.9))
        rows.append(
            {
                "position": int(rng.integers(200, 200 + predicted)), "token_id": int(rng.integers(0, 49152)),
                "token": " " + str(rng.choice(WORDS)), "before": _text(rng, 11), "after": " " + _text(rng, 10),
                "kld": float(value), "p_reference": p_reference,
                "p": float(np.clip(p_reference * np.exp(-value * rng.uniform(0.2, 1.2)), 1e-6, 1)),
                "top_reference": " " + str(rng.choice(WORDS)), "top": " " + str(rng.choice(WORDS)),
            }
        )  # fmt: skip
    return rows


def _histogram(kl: np.ndarray) -> Row:
    low, high, per_decade = -9, 2, 5
    edges = np.linspace(low, high, (high - low) * per_decade + 1)
    logs = np.clip(np.log10(np.maximum(kl, 1e-30)), -40, high - 1e-9)
    counts = np.histogram(logs, edges)[0]
    return {
        "low": low,
        "high": high,
        "per_decade": per_decade,
        "counts": counts.tolist(),
        "below": int((logs < low).sum()),
    }


def _by_distance(rng: np.random.Generator, mean: float, length: int, window: int) -> list[Row]:
    rows: list[Row] = []
    low, high = None, 0
    while low is None or low <= length - window:
        tokens = min(window, length) if low is None else min(high, length - window) - low + 1
        factor = 0.0 if low is None else 0.35 + 0.16 * np.log2(high)
        kld = mean * factor * float(rng.uniform(0.9, 1.1))
        rows.append({"from": low, "to": high, "tokens": tokens, "kld": kld, "kld_se": kld * 2.2 / max(1, tokens) ** 0.5,
                     "top1": float(np.exp(-1.2 * np.sqrt(kld)))})  # fmt: skip
        low, high = (1, 64) if low is None else (high + 1, high * 2)
    return rows


def _mass(rng: np.random.Generator, policy: CachePolicy) -> Row:
    names = ["sink", "old", *(f"old{i + 2}" for i in range(len(policy.older))), "recent"]
    layers = np.arange(LAYERS)
    sink = 0.25 + 0.45 * np.exp(-(((layers - 14) / 9) ** 2)) + rng.normal(0, 0.03, LAYERS)
    old = (1 - sink) * np.clip(0.35 + 0.2 * np.sin(layers / 3), 0.05, 0.9)
    tiers = len(names) - 2
    shares = np.column_stack([sink, *[old / tiers] * tiers, 1 - sink - old])
    return {
        "mass": dict(zip(names, shares.mean(0).tolist(), strict=True)),
        "mass_by_layer": {"names": names, "shares": shares.tolist()},
    }


def _local_errors(rng: np.random.Generator, policy: CachePolicy) -> Row | None:
    if policy.tiers[-1].k_bits >= 16:
        return None
    tier = policy.tiers[-1]
    pattern = np.exp(rng.normal(0, 0.25, (LAYERS, HEADS)) + 0.4 * np.cos(np.arange(LAYERS) / 4)[:, None])
    k, v = pattern * 0.9 * 2.0**-tier.k_bits, pattern[::-1] * 0.6 * 2.0**-tier.v_bits
    return {"k": k.tolist(), "v": v.tolist(), "both": np.hypot(k, v).tolist()}


def _continuation(rng: np.random.Generator, mean: float, words: int = 48) -> tuple[Row, Row]:
    """What the policy says, and the reference: the same up to a place that comes the sooner the larger the KL is."""
    start = int(rng.integers(0, len(WORDS)))
    tokens = [" " + WORDS[(start + i) % len(WORDS)] for i in range(words)]
    same = int(np.clip(rng.geometric(min(1.0, 2.5 * np.sqrt(mean) + 1e-9)), 1, words))
    other = tokens[:same] + [" " + str(w) for w in rng.permutation(WORDS)[: words - same]]
    return tuple(  # type: ignore[return-value]
        {"token_ids": [hash_ % 49152 for hash_ in (int(_hex(t), 16) for t in ts)], "tokens": ts, "text": "".join(ts)}
        for ts in (other, tokens)
    )


def eval_row(rng: np.random.Generator, text: str, document: str, start: int, length: int = 2048) -> Row:
    """One policy on one piece."""
    policy = CachePolicy.parse(text)
    old, recent = _bytes(policy)
    mean = _divergence(policy) * {"topics": 1.0, "alice.txt": 1.35}[document] * float(rng.uniform(0.93, 1.07))
    predicted = length - 1
    kl = np.exp(rng.normal(0, 1.6, predicted))
    kl *= mean / kl.mean()
    kl[: policy.window] *= 1e-7
    q = {name: float(np.quantile(kl, p)) for name, p in
         {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}.items()}  # fmt: skip
    rms = float(np.sqrt(kl.mean()) * 0.35)
    points = {"p001": -4.2, "p01": -3.0, "p05": -1.5, "p10": -1, "p25": -0.3, "median": 0, "p75": 0.3, "p90": 1,
              "p95": 1.5, "p99": 3.0, "p999": 4.2}  # fmt: skip
    dp = {"mean": rms / 30, "se": rms / 45, "rms": rms, "min": max(-1.0, -6 * rms), "max": min(1.0, 6 * rms)}
    ours, theirs = _continuation(rng, mean)
    ppl = {"topics": 9.81, "alice.txt": 17.42}[document]
    counts = len(policy.older) + 1, len(policy.overrides)
    total = (old * max(0, length - policy.window - 4) + recent * min(length, policy.window + 4)) / length
    line = str(policy)
    return {
        "kind": "eval", "key": _hex(line, document, start), **MODEL, "policy": line, "policy_digest": policy.digest,
        "spec": policy.spec,
        **{name: getattr(policy, name) for name in ("window", "sinks", "tile", "k_bits", "v_bits", "dense", "k_axis",
           "v_axis", "k_group", "v_group", "rotate_k", "rotate_v", "scales")},
        "n_tiers": counts[0], "n_overrides": counts[1], "document": document, "document_digest": _hex(document, start),
        "seed": 0, "start": start, "tokens": length, "predicted_tokens": predicted, "first": 0, "regime": "chunked",
        "ppl": ppl * float(np.exp(mean * 0.4)), "ppl_se": ppl * 0.03, "ppl_reference": ppl, "ppl_reference_se": ppl * 0.03,
        "ppl_ratio": float(np.exp(mean * 0.4)), "ppl_ratio_se": mean * 0.2, "ln_ppl_ratio": mean * 0.4,
        "ln_ppl_ratio_se": mean * 0.2, "nll_correlation": 1 - mean / 3,
        "kld": {"mean": float(kl.mean()), "se": float(kl.std() / np.sqrt(predicted)), **q},
        "dp": {**dp, **{name: x * rms * 0.9 for name, x in points.items()}},
        "top1": float(np.exp(-0.5 * np.sqrt(mean))), "top1_se": 0.003,
        "by_distance": _by_distance(rng, float(kl.mean()), length, policy.window), "histogram": _histogram(kl),
        "worst": _worst(rng, kl, predicted), **_mass(rng, policy), "local_errors": _local_errors(rng, policy),
        "kv_bytes_per_token": total, "kv_bytes_per_token_reference": 2.0 * DENSE_BYTES, "kv_bytes_per_old_token": old,
        "kv_bytes_per_recent_token": recent, "bits_per_value": 8 * old / (DENSE_BYTES / 2),
        "prefill_tokens_per_second": float(rng.normal(620, 12)),
        "decode_tokens_per_second": float(rng.normal(64, 0.4) - old / 2200), "decode_depth": length,
        "continuation": ours, "reference_continuation": theirs, "prompt_tail": _text(rng, 34), "threads": 1,
        "workers": 2, "seconds": 41.5,
        "command": f"mixkv eval {document} -n {length} --weights f32 --policy '{line}'",
    }  # fmt: skip


def window_row(rng: np.random.Generator, document: str) -> Row:
    """The error by window."""
    windows = [0, 64, 128, 256, 512, 1024, 2048]
    layers = 0.09 * np.exp(rng.normal(0, 0.4, LAYERS))
    falls = np.array([np.exp(-w / 900) * (1 + 0.8 * np.exp(-w / 60)) for w in windows])
    by_layer = falls[:, None] * layers[None, :]
    line = str(CachePolicy())
    return {
        "kind": "window-curve", "key": _hex("w", document), "schema": 1, **MACHINE, "model": "smollm2", "weights": "f32",
        "policy": line, "document": document, "document_digest": _hex(document), "tokens": 4096, "windows": windows,
        "errors": np.sqrt((by_layer**2).mean(1)).tolist(), "by_layer": by_layer.tolist(),
        "kv_bytes_per_token": [6480 + (DENSE_BYTES - 6480) * w / 4096 for w in windows], "seconds": 18.0,
        "pass_seconds": 7.2, "command": f"mixkv window-curve {document} -n 4096",
    }  # fmt: skip


def needle_rows(rng: np.random.Generator, text: str, trials: int = 4) -> list[Row]:
    """Whether a number hidden in a text is found again."""
    policy = CachePolicy.parse(text)
    mean, rows = _divergence(policy), []
    for task in ("passkey", "multikey"):
        for length in (1024, 2048, 4096):
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                for trial in range(trials):
                    hard = mean * (3 if task == "multikey" else 1) * length / 1024 * (1.0 - 0.7 * abs(2 * depth - 1))
                    correct = bool(rng.uniform() < np.exp(-6 * hard))
                    rows.append(
                        {
                            "kind": "needle", "key": _hex(text, task, length, depth, trial), "schema": 1, **MACHINE,
                            "model": "smollm2", "weights": "f32", "policy": str(policy), "spec": policy.spec,
                            "policy_digest": policy.digest, "task": task, "length": length, "depth": depth,
                            "trial": trial, "seed": 0, "prompt_tokens": length + 40, "expected": "48213",
                            "answer": "48213" if correct else "48273", "correct": correct, "nll": 0.1 + hard,
                            "nll_reference": 0.1, "kld": hard, "reference_correct": True,
                            "command": f"mixkv needle --task {task} --lengths {length} --policy '{policy}'",
                        }
                    )  # fmt: skip
    return rows


def bench_rows(rng: np.random.Generator) -> list[Row]:
    """Speed by depth, as ``mixkv bench -o jsonl`` writes it."""
    rows = []
    for kv in ("f16", "k8v8", "k4v4", "k3v3", "k2v2"):
        old, _ = _bytes(CachePolicy.parse(kv))
        for depth in (0, 1024, 2048, 4096, 7900):
            speed = 1 / (1 / 270 + old * depth / 21e9 + depth * 2e-7)
            for test, n_prompt, n_gen in (("pp512", 512, 0), ("tg128", 0, 128)):
                rate = speed * (1 if n_gen else 4) * float(rng.normal(1, 0.01))
                rows.append(
                    {
                        "model": "smollm2", "weights": "auto", "weight_bytes": 96_400_000, "threads": 2, "kv": kv,
                        "test": test + (f" @ d{depth}" if depth else ""), "n_prompt": n_prompt, "n_gen": n_gen,
                        "n_depth": depth, "test_time": "2026-11-24T15:00:00+00:00", "avg_ns": int(1e9 / rate),
                        "stddev_ns": 10_000, "avg_ts": rate, "stddev_ts": rate * 0.012, "samples_ns": [1, 2],
                        "samples_ts": [rate, rate], "kv_bytes": int(old * depth), "roofline": None, **MACHINE,
                    }
                )  # fmt: skip
    return rows


def make(count: int = 48, seed: int = 0, *, evals: bool = True, rest: bool = True) -> list[Row]:
    """Rows of ``count`` policies on two documents; with ``rest``, window-curve, needle and bench rows besides."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    if evals:
        rows += [eval_row(rng, text, document, 0) for text in policies(count) for document in DOCUMENTS]
    if rest:
        rows += [window_row(rng, document) for document in DOCUMENTS]
        rows += [row for text in ("f16", "k4v4", "k2v2") for row in needle_rows(rng, text)]
        rows += bench_rows(rng)
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as a file of JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]), make())
