"""What a check finds."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""All is well; it works, and could do better; it does not work, or not as it should."""

_WORST = {OK: 0, NOTE: 1, PROBLEM: 2}


@dataclass(frozen=True, slots=True)
class Check:
    """A name, a state, one sentence, and the facts behind it as JSON can have them."""

    name: str
    state: str
    text: str
    details: dict[str, Any] = field(default_factory=dict)


def judged(name: str, well: str, found: list[tuple[str, str]], details: dict[str, Any]) -> Check:
    """A check of several things: ``found`` has (state, sentence) of what is not well; ``well`` is said otherwise."""
    if not found:
        return Check(name, OK, well, details)
    found = sorted(found, key=lambda each: -_WORST[each[0]])
    return Check(name, found[0][0], "; ".join(text for _, text in found), details)


def megabytes(nbytes: int) -> str:
    """Bytes as people read them."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.1f} GB"


def cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text_of(path: Path) -> str:
    """A small file of the system; empty where there is none."""
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
