"""Where, when and with what `engines.py` ran."""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def machine(threads: int) -> str:
    """What machine.py measures, in a process of its own."""
    script = Path(__file__).with_name("machine.py")
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    return done.stdout.strip() or "not measured: " + "".join(done.stderr.splitlines()[-1:])


def cpu() -> str:
    """The name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(options: argparse.Namespace, report: dict[str, Any]) -> str:
    """Where, when and with what."""
    lines = [
        f"{report['date']}, {report['cpu']}, {os.cpu_count()} cores, {platform.system()}, {options.threads} threads"
    ]
    lines += [f"Machine, {when}: {what}" for when, what in report["machine"].items()]
    lines.append(f"Load average before: {report['load_average']}")
    for name, said in report["versions"].items():
        if "missing" in said:
            lines.append(f"{name}: not installed ({said['missing']})")
        elif "failed" in said:
            lines.append(f"{name}: failed: {said['failed'].splitlines()[-1]}")
        else:
            about = f" ({said['about']})" if "about" in said else ""
            lines.append(f"{name}: {said['name']} {said['version']}{about}")
    lines.append(f"Model: {Path(report['model']).name}, mixkv's weights: {options.weights}. {report['prompt']}")
    return "\n".join(f"* {line}" for line in lines)
