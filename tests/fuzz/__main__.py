"""Fuzzing by coverage, for as long as one likes; needs ``pip install atheris`` (Linux).

    python -m tests.fuzz gguf --minutes 30      (in the root of a clone, in an environment with mixkv)

Every input that a reader neither takes nor refuses, or over which it goes beyond its bounds, is kept in
tests/data/regressions, where a test reads it from then on. Inputs that found new code are kept in --corpus, if given.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REGRESSIONS = Path(__file__).parents[1] / "data" / "regressions"
NAMES = [
    "gguf", "session", "safetensors", "config", "tokenizer", "template", "policy", "grid", "golden", "results", "journal",
]  # fmt: skip  # of targets.py
HANG_SECONDS = 30  # of the clock, when not even Python's own code runs; processor time is bounded in bounds.py


def main() -> None:
    """Run a process that fuzzes, and another one where that was killed by what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one reader.")
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--corpus", type=Path, help="a folder of inputs to begin with, and to keep new ones in")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus or Path(scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        _fuzz(options.target, corpus, Path(scratch), 60 * options.minutes, options.seed)


def _fuzz(target: str, corpus: Path, scratch: Path, seconds: float, seed: int) -> None:
    end, executed, found = time.monotonic() + seconds, 0, 0
    while (left := int(end - time.monotonic())) > 0:
        command = [sys.executable, "-m", "tests.fuzz.child", target, str(corpus), f"-artifact_prefix={scratch}/hard-"]
        command += [
            f"-max_total_time={left}",
            f"-timeout={HANG_SECONDS}",
            "-rss_limit_mb=0",
            f"-report_slow_units={HANG_SECONDS}",
            "-print_final_stats=1",
        ]
        done = subprocess.Popen([*command, f"-seed={seed}", "-max_len=1000000"], stderr=subprocess.PIPE, text=True)
        seed += 1
        lines = []
        assert done.stderr is not None
        for line in done.stderr:
            lines.append(line)
            found += line.startswith("found: ")
            if not line.startswith("INFO: Instrumenting"):
                sys.stderr.write(line)
        code, text = done.wait(), "".join(lines[-4000:])
        executed += max(map(int, re.findall(r"(?:\n#|_executed_units: )([0-9]+)", text)), default=0)
        for artifact in scratch.glob("hard-*"):  # killed by a signal, or not to be stopped
            found += 1
            (REGRESSIONS / target).mkdir(parents=True, exist_ok=True)
            shutil.move(artifact, REGRESSIONS / target / artifact.name.removeprefix("hard-")[:30])
        if code and "INFO: Seed" not in text:  # it did not even begin
            raise SystemExit(f"the process that fuzzes ended with {code}:\n{text[-2000:]}")
    covered = [re.findall(r"cov: ([0-9]+)", line) for line in lines if " cov: " in line]
    edges = covered[-1][0] if covered else 0
    print(f"{target}: {executed} inputs in {seconds / 60:g} minutes, {edges} edges, {found} findings")


if __name__ == "__main__":
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    main()
