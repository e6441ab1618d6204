"""What a model is, tensor by tensor, and what else its bits depend on; and what of that is another now."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ... import __version__
from ...engine.policy import CachePolicy
from ...kernels.routes import cpu
from ...models.digests import digests
from ...models.load import Model
from .file import About

CODE = ("kernels", "models", "engine")  # folders whose files decide what is computed
NAMED = 5  # tensors that are named; the others are counted
NOTHING = (
    "nothing that was recorded differs (config, tensors, policy, versions, CPU, code of kernels, models and engine): "
    "the session was made otherwise, a library computes otherwise, or numbers depend on something that they should not"
)


def describe(model: Model, policy: CachePolicy, *, weights: str | None = None, chat: bool = False) -> About:
    """What a model is, tensor by tensor, and what else decides over its bits. ``weights``: the format asked for."""
    root = Path(__file__).parents[2]
    code = {name: hashlib.sha256() for name in CODE}
    for name, digest in code.items():
        for file in sorted((root / name).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    packages = {name: version(name) for name in ("numpy", "numba", "llvmlite")}
    return About(
        model.name, weights, policy, chat, _plain(asdict(model.config)),
        digests(model.config, model.transformer.weights),
        {"mixkv": __version__, "python": platform.python_version(), **packages}, cpu(),
        {name: digest.hexdigest()[:16] for name, digest in code.items()},
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """A config's value as JSON gives it back."""
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def reasons(then: About, now: About) -> dict[str, list[str]]:
    """What differs, by where: {"config": ["rope.theta 100000.0 -> 50000.0"], "tensors": [...]}; empty for nothing."""
    found = {
        "model": _changes({"name": then.model}, {"name": now.model}),
        "weights": _changes({"format": then.weights}, {"format": now.weights}) if then.weights and now.weights else [],
        "config": _changes(_flat(then.config), _flat(now.config)),
        "tensors": _tensors(then.tensors, now.tensors),
        "policy": _changes(_policy_fields(then.policy), _policy_fields(now.policy)),
        "versions": _changes(then.versions, now.versions),
        "cpu": _changes(then.cpu, now.cpu),
        "code": [f"of {name}" for name in then.code | now.code if then.code.get(name) != now.code.get(name)],
    }
    return {where: changes for where, changes in found.items() if changes}


def _changes(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """The names whose values differ: "k_bits 4 -> 3", with "none" for what is not there."""
    nothing = "none"
    return [
        f"{name} {then.get(name, nothing)} -> {now.get(name, nothing)}"
        for name in {**then, **now}
        if then.get(name, nothing) != now.get(name, nothing)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A config's values as texts, by their paths: "rope.factor"."""
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for name, x in value.items():
            found |= _flat(x, f"{prefix}.{name}" if prefix else name)
        return found
    return {prefix: repr(value)}


def _tensors(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [name for name in then if name in now and then[name] != now[name]]
    formats = [{tensors[name].rsplit(" ", 1)[0] for name in changed} for tensors in (then, now)]
    kept = "" if formats[0] == formats[1] else f", kept as {' and '.join(sorted(formats[1]))}"
    was = f" instead of {' and '.join(sorted(formats[0]))}" if kept else ""
    sides = {
        f"changed{kept}{was}": changed,
        "no longer there": [name for name in then if name not in now],
        "new": [name for name in now if name not in then],
    }
    return [
        f"{len(names)} of {len(then)} {what}: {', '.join(names[:NAMED])}" + (", ..." if len(names) > NAMED else "")
        for what, names in sides.items()
        if names
    ]


def _policy_fields(policy: CachePolicy) -> dict[str, object]:
    return {field.name: getattr(policy, field.name) for field in fields(policy)}
