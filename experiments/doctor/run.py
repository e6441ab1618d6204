"""All checks, in the order in which they are told."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from . import software
from .check import PROBLEM, Check

DEFAULT_MODEL = "smollm2"


def diagnose(model: str = DEFAULT_MODEL, progress: Callable[[str], None] | None = None) -> list[Check]:
    """Every check. ``progress`` is called with the name of each part before it begins.

    A check that cannot be made is a problem of its own: nothing is raised.
    """
    say = progress or (lambda name: None)
    environment = dict(os.environ)
    say("kernels")
    before = _tried("kernels", lambda: _part("caches").compiled_files())
    say("self-test")
    tested = software.self_test()
    say("checks")
    seconds, layer = tested.get("ready_seconds"), tested.get("layer")
    checks: dict[str, Callable[[], Check]] = {
        "python": software.check_python,
        "dependencies": software.check_dependencies,
        "extras": software.check_extras,
        "cpu": lambda: _part("machine").check_cpu(environment),
        "threads": lambda: _part("machine").check_threads(environment, layer),
        "memory": lambda: _part("machine").check_memory(model, _part("machine").memory_here()),
        "models folder": lambda: _part("caches").check_models_folder(model),
        "default model": lambda: _part("caches").check_default_model(model),
        "other models": lambda: _part("caches").check_other_models(model),
        "kernels": lambda: _part("caches").check_kernels_folder(before if isinstance(before, int) else 0, seconds),
        "self-test": lambda: software.check_self_test(tested),
    }
    found = [_tried(name, check) for name, check in checks.items()]
    return [each for each in found if isinstance(each, Check)]


def _part(name: str) -> Any:
    """A module of checks, imported when it is needed: where a dependency is missing, this is for the others to say."""
    return importlib.import_module(f".{name}", __package__)


def _tried(name: str, check: Callable[[], "Check | int"]) -> "Check | int":
    """What a check finds; whatever it raises is a problem with its name."""
    try:
        return check()
    except Exception as error:  # so that one broken part does not hide the others
        about = " ".join(str(error).split()) or type(error).__name__
        return Check(name, PROBLEM, f"this check could not be made ({type(error).__name__}: {about:.200})")
