"""mixkv as `engines.py` runs it. A cache is called f16, f32 or k<bits>v<bits>; window and sinks are the default."""

import contextlib
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import quality
from common import Job, Row, decode, serve, warm_ids


def version() -> dict[str, Any]:
    """Who is here."""
    import mixkv

    found = {"name": "mixkv", "version": mixkv.__version__}
    command = ["git", "-C", str(Path(mixkv.__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["about"] = "commit " + subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return found


def policy_of(kv: str) -> Any:
    """The policy that a name stands for."""
    import mixkv

    found = re.fullmatch(r"f16|f32|k(\d+)v(\d+)", kv)
    if not found:
        raise SystemExit(f"a cache of mixkv is called f16, f32 or k<bits>v<bits>, found {kv!r}")
    if kv == "f32":
        return mixkv.CachePolicy.full()
    return mixkv.CachePolicy(k_bits=int(found[1] or 16), v_bits=int(found[2] or 16))


def open_model(job: Job) -> tuple[Any, float]:
    """(model, seconds of loading); the threads are set."""
    import mixkv

    begun = time.perf_counter()
    model = mixkv.load(job.model, job.weights)
    loaded = time.perf_counter() - begun
    import numba
    import threadpoolctl

    numba.set_num_threads(job.threads)
    threadpoolctl.threadpool_limits(job.threads)
    return model, loaded


def run(job: Job) -> Row:
    """Do a job."""
    import mixkv
    from mixkv.kernels.warmup import warm_up

    policy = policy_of(job.kv)
    model, loaded = open_model(job)
    row = Row(load_seconds=loaded, details={"policy": str(policy), "weights": job.weights})
    if job.kind == "reference":
        quality.store(job.folder, job.ids, mixkv.Session(model, policy).forward)
        return row
    if job.kind == "quality":
        row.quality = quality.compare(job.folder, job.ids, mixkv.Session(model, policy).forward)
        return row
    warm_up()
    session = mixkv.Session(model, policy)
    session.forward(warm_ids(job), logits="last")
    session.forward(job.ids[:1], logits="last")
    session = mixkv.Session(model, policy)
    begun = time.perf_counter()
    last = int(session.forward(job.ids, logits="last").argmax())
    row.seconds, row.tokens, row.ids = time.perf_counter() - begun, len(job.ids), [last]
    if job.kind == "decode":
        row.read_seconds = row.seconds
        decode(lambda token: int(session.forward([token], logits="last").argmax()), last, row, job.tokens)
    row.details["kv_bytes"] = session.nbytes()["total"]
    return row


if __name__ == "__main__":
    serve("mixkv", version, run)
