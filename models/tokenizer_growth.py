"""How much longer a tokenizer.json may make a text before it is cut into tokens: its steps multiply.

The steps are those of https://huggingface.co/docs/tokenizers/api/normalizers. Thirty that each turn "a" into "aa" make a
gigabyte of one letter.
"""

from collections.abc import Iterator
from typing import Any

from .check import shown
from .errors import ModelError
from .limits import MAX_TOKENIZER_GROWTH, MAX_TOKENIZER_STEPS

# The most bytes of UTF-8 that one byte can become
_GROWTH = {
    "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "ByteLevel": 2, "Metaspace": 3, "Precompiled": 11,
    "BertNormalizer": 3,
}  # fmt: skip


def check_growth(content: dict[str, Any], where: str) -> None:
    """Raise ModelError, beginning with ``where``, if a tokenizer.json has too many steps, or lets a text grow too much."""
    steps, growth = 0, 1
    for part, inside in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        for step in _steps(content.get(part), inside):
            steps, growth = steps + 1, growth * _grows(step)
            if steps > MAX_TOKENIZER_STEPS:
                raise ModelError(f"{where}: more than {MAX_TOKENIZER_STEPS} steps before a text is cut into tokens")
            if growth > MAX_TOKENIZER_GROWTH:
                raise ModelError(
                    f"{where}: the {part} may make a text {growth} times as long, at most {MAX_TOKENIZER_GROWTH} is "
                    f"allowed: {shown(step)}"
                )


def _steps(part: Any, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, and those of sequences in it, in their order."""
    left = [part]
    while left:
        step = left.pop()
        if isinstance(step, dict) and isinstance(step.get(inside), list):
            left += reversed(step[inside])
        elif isinstance(step, dict):
            yield step


def _grows(step: dict[str, Any]) -> int:
    """How many bytes a step may make of one. What is no step at all the library refuses."""
    kind = step.get("type")
    if kind == "Replace":
        pattern, new = step.get("pattern"), len(str(step.get("content", "")).encode("utf-8", "replace"))
        old = pattern.get("String") if isinstance(pattern, dict) else pattern
        # A regular expression may match nothing, between any two characters
        return max(1, -(-new // len(old.encode("utf-8", "replace")))) if isinstance(old, str) and old else new + 1
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend", "")).encode("utf-8", "replace"))
    return _GROWTH.get(str(kind), 1)
