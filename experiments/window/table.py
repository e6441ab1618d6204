"""A window curve as one row of a results file, and as a table with a line for each window."""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.policy import CachePolicy
from ..keys import ids_digest, key
from ..machine import describe, described
from ..tables import Column, Row
from .curve import WindowCurve

KIND, SCHEMA = "window-curve", 1
_IDENTITY = ("kind", "schema", "mixkv", "weights", "policy", "document_digest", "tokens", "windows")


def row_of(
    curve: WindowCurve,
    *,
    model: str,
    model_digest: str,
    weights: str,
    policy: CachePolicy,
    document: str,
    token_ids: Sequence[int] | NDArray[np.integer],
    threads: int,
    command: str,
) -> Row:
    """Everything about one curve, as JSON can hold it.

    Args:
        curve: what was found.
        model, weights, policy: what it was found with; the policy with any window.
        model_digest: of the model as it is in memory (models/fingerprint.py); part of the key.
        document: name of the text.
        token_ids: of the text.
        threads: that were in use.
        command: the shell line that finds it again.

    Returns kind, key (16 hexadecimal digits, of what the numbers depend on), schema, machine, the arguments, and
    windows (W,), errors (W,), by_layer (W, n_layers), kv_bytes_per_token (W,), seconds, pass_seconds.
    """
    about: dict[str, Any] = {
        "kind": KIND, "schema": SCHEMA, **describe(), "model": model, "weights": weights, "policy": str(policy),
        "document": document, "document_digest": ids_digest(token_ids), "tokens": curve.tokens,
        "windows": list(curve.windows), "errors": curve.errors.tolist(), "by_layer": curve.by_layer.tolist(),
        "kv_bytes_per_token": list(curve.kv_bytes_per_token), "seconds": curve.seconds,
        "pass_seconds": curve.pass_seconds, "threads": threads, "command": command,
    }  # fmt: skip
    matters = {**{name: about[name] for name in _IDENTITY}, "digest": model_digest}
    return {"kind": KIND, "key": key(matters), **about}


def command_line(
    document: str | None, model: str, tokens: int, weights: str, policy: CachePolicy, windows: Sequence[int]
) -> str:
    """The shell line of a curve; ``document``: the file, or None for the text that needs none."""
    where = [] if document is None else [document]
    chosen = ["--windows", ranges_of(windows), "--policy", str(policy)]
    return shlex.join(["mixkv", "window-curve", *where, "-m", model, "-n", str(tokens), "--weights", weights, *chosen])


def ranges_of(windows: Sequence[int]) -> str:
    """Ascending numbers as --windows takes them: "0:1024:64" where the steps are equal, else "0,64,100"."""
    steps = set(np.diff(windows).tolist())
    if len(windows) > 2 and len(steps) == 1:
        return f"{windows[0]}:{windows[-1]}:{steps.pop()}"
    return ",".join(map(str, windows))


def lines_of(row: Row) -> list[Row]:
    """A flat row for each window: window, error, kv_bytes_per_token, and layer_0, layer_1, ..., each layer's error."""
    return [
        {
            "window": window, "error": error, "kv_bytes_per_token": nbytes,
            **{f"layer_{i}": x for i, x in enumerate(layers)},
        }
        for window, error, nbytes, layers in zip(
            row["windows"], row["errors"], row["kv_bytes_per_token"], row["by_layer"], strict=True
        )
    ]  # fmt: skip


def heading(row: Row) -> str:
    """What is said above the table."""
    times = f"{row['seconds']:.1f} s with {row['threads']} threads"
    if row["pass_seconds"] is not None:
        times += f"; a pass alone {row['pass_seconds']:.1f} s, so {row['seconds'] / row['pass_seconds']:.2f} passes"
    lines = [
        described(row),
        f"{row['model']}, weights {row['weights']}, policy {row['policy']} but for its window",
        f"{row['tokens']} tokens of {row['document']}, in {times}",
        "error: relative root mean square of attention outputs, over all layers and heads",
    ]
    return "\n".join(f"{line}  " for line in lines)


def _largest(line: Row) -> str:
    layers = [name for name in line if name.startswith("layer_")]
    worst = max(layers, key=lambda name: line[name])
    return f"{line[worst]:.5f} ({worst.removeprefix('layer_')})" if line[worst] else ""


COLUMNS = (
    Column("window", lambda line: str(line["window"])),
    Column("error", lambda line: f"{line['error']:.5f}"),
    Column("largest (layer)", _largest),
    Column("KV bytes/token", lambda line: f"{line['kv_bytes_per_token']:.1f}"),
)
