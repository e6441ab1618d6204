"""Checks of the software: Python, what mixkv depends on, and whether the kernels compute what they should."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from .check import NOTE, OK, PROBLEM, Check, judged

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_FOR = {"report": "the figures of `mixkv report`", "hub": "models by hf:org/name"}
_SELF_TEST_SECONDS = 900


def check_python() -> Check:
    """The interpreter."""
    details = {"python": platform.python_version(), "implementation": platform.python_implementation()}
    details |= {"platform": platform.platform(), "executable": sys.executable}
    found: list[tuple[str, str]] = []
    if details["implementation"] != "CPython":
        found.append((PROBLEM, f"this is {details['implementation']}; Numba needs CPython"))
    if sys.maxsize < 1 << 32:
        found.append((PROBLEM, "this Python is of 32 bits; models need one of 64"))
    return judged("python", f"{details['python']} at {sys.executable}", found, details)


def check_dependencies(requirements: list[str] | None = None) -> Check:
    """Whether what mixkv is made for is installed, in a version that it is made for."""
    found: list[tuple[str, str]] = []
    details: dict[str, Any] = {}
    for wanted in _wanted(requirements, ""):
        details[wanted.name] = version = _version(wanted.name)
        remedy = f"pip install '{wanted.name}{wanted.specifier}'"
        if version is None:
            found.append((PROBLEM, f"{wanted.name} is missing: {remedy}"))
        elif not wanted.specifier.contains(version, prereleases=True):
            found.append((PROBLEM, f"{wanted.name} is {version}, {wanted.specifier} is needed: {remedy}"))
    main = ", ".join(
        f"{name} {details[name]}" for name in ("numpy", "numba", "tokenizers", "safetensors") if name in details
    )
    return judged("dependencies", main, found, details)


def check_extras(requirements: list[str] | None = None) -> Check:
    """Which optional parts can be used."""
    found: list[tuple[str, str]] = []
    details: dict[str, Any] = {}
    for extra, purpose in _FOR.items():
        for wanted in _wanted(requirements, extra):
            details[extra] = version = _version(wanted.name)
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                found.append((NOTE, f"for {purpose}: pip install 'mixkv[{extra}]'"))
    return judged("extras", ", ".join(details) or "none known", found, details)


def _wanted(requirements: list[str] | None, extra: str) -> "list[Requirement]":
    """What mixkv needs, or what an extra of it needs besides: of its metadata, unless they are given."""
    from packaging.requirements import Requirement

    everything = importlib.metadata.requires("mixkv") or [] if requirements is None else requirements
    marked = map(Requirement, everything)
    if not extra:
        return [each for each in marked if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [
        each
        for each in marked
        if each.marker is not None
        and each.marker.evaluate({"extra": extra})
        and not each.marker.evaluate({"extra": ""})
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def self_test() -> dict[str, Any]:
    """What selftest.py finds in a process of its own: a CPU that lacks an instruction would end this one.

    {"error": "" or one line, and what selftest.py prints}.
    """
    # -P: nothing is imported from the current folder
    command = [sys.executable, "-P", "-m", "mixkv.experiments.doctor.selftest"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SELF_TEST_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": " ".join(str(error).split())}
    if done.returncode == 0:
        try:
            return {"error": "", **json.loads(done.stdout.splitlines()[-1])}  # Numba may be asked to print before
        except (ValueError, TypeError, IndexError):
            return {"error": f"it printed {done.stdout[:80]!r}"}
    lines = done.stderr.strip().splitlines() or ["nothing was said"]
    signal = f"ended by signal {-done.returncode}: " if done.returncode < 0 else ""
    return {"error": f"{signal}{lines[-1]}"}


def check_self_test(found: dict[str, Any]) -> Check:
    """What ``self_test`` found, in words."""
    name = "self-test"
    if found["error"]:
        about = f"a token of the toy model could not be generated ({found['error']})"
        return Check(name, PROBLEM, f"{about}: unset NUMBA_ variables, try another MIXKV_CACHE, or reinstall", found)
    if not found["right"]:
        about = f"the kernels are {found['error_of_attention']:.2g} from float64, and may be {found['allowed']:.2g}"
        return Check(name, PROBLEM, f"{about}: `mixkv rm --kernels` and an empty MIXKV_CACHE make them anew", found)
    text = f"toy says {found['text']!r}; attention is within {found['error_of_attention']:.1g} of float64"
    return Check(name, OK, text, found)
