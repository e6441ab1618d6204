"""The fields of a golden file, checked one by one: they may come from anybody. UsageError names a field that is wrong."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ...models.check import shown
from ...models.errors import UsageError
from ...models.limits import (
    MAX_CONTEXT,
    MAX_GOLDEN_ALTERNATIVES,
    MAX_GOLDEN_DEPTH,
    MAX_GOLDEN_FACT_CHARS,
    MAX_GOLDEN_FACTS,
    MAX_GOLDEN_PROMPTS,
    MAX_GOLDEN_STEPS,
    MAX_GOLDEN_TENSORS,
    MAX_PROMPT_BYTES,
    MAX_VOCAB_SIZE,
)
from ...models.pack import WEIGHTS

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_DIGEST = re.compile(r"[a-z0-9+ ]{1,64} [0-9a-f]{16}")


def about_of(value: object) -> dict[str, Any]:
    """The fields of ``About``; the policy is still a text."""
    facts = ("versions", "cpu", "code")
    found = _object(value, ("model", "weights", "policy", "chat", "config", "tensors", *facts), "about")
    for name in ("model", "policy"):
        _text(found[name], f"about.{name}", MAX_GOLDEN_FACT_CHARS)
    if found["weights"] is not None and found["weights"] not in WEIGHTS:
        raise _wrong("about.weights", found["weights"], f"null or one of {', '.join(WEIGHTS)}")
    if not isinstance(found["chat"], bool):
        raise _wrong("about.chat", found["chat"], "true or false")
    _check_config(found["config"])
    _check_names(found["tensors"], "about.tensors", MAX_GOLDEN_TENSORS)
    for name, digest in found["tensors"].items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _wrong(f"about.tensors.{name}", digest, "a format and 16 hexadecimal digits")
    for name in facts:
        if not isinstance(found[name], dict) or len(found[name]) > MAX_GOLDEN_FACTS:
            raise _wrong(f"about.{name}", found[name], f"an object of at most {MAX_GOLDEN_FACTS} texts")
        for pair in found[name].items():
            for text in pair:
                _text(text, f"about.{name}", MAX_GOLDEN_FACT_CHARS)
    return found


def prompts_of(value: object) -> list[dict[str, Any]]:
    """The fields of each ``Recorded``; lengths agree, and the token taken is the first alternative."""
    prompts = _list(value, "prompts", 1, MAX_GOLDEN_PROMPTS)
    return [_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]


def _prompt(value: object, where: str) -> dict[str, Any]:
    names = ("text", "prompt_ids", "generated", "token_ids", "logprobs", "alternatives")
    found = _object(value, names, where)
    for name in ("text", "generated"):
        if found[name] is not None:
            _text(found[name], f"{where}.{name}", MAX_PROMPT_BYTES)
    _each(found["prompt_ids"], f"{where}.prompt_ids", 1, MAX_CONTEXT, _id)
    steps = len(_each(found["token_ids"], f"{where}.token_ids", 1, MAX_GOLDEN_STEPS, _id))
    found["logprobs"] = _each(found["logprobs"], f"{where}.logprobs", steps, steps, _logprob)
    found["alternatives"] = _each(found["alternatives"], f"{where}.alternatives", steps, steps, _alternatives)
    for i, (token, logprob, alternatives) in enumerate(
        zip(found["token_ids"], found["logprobs"], found["alternatives"], strict=True)
    ):
        if alternatives[0] != (token, logprob):
            raise _wrong(f"{where}.alternatives[{i}][0]", alternatives[0], f"the token taken, {(token, logprob)}")
    return found


def _alternatives(value: object, where: str) -> list[tuple[int, float]]:
    pairs: list[tuple[int, float]] = []
    for i, pair in enumerate(_list(value, where, 1, MAX_GOLDEN_ALTERNATIVES)):
        token, logprob = _list(pair, f"{where}[{i}]", 2, 2)
        pairs.append((_id(token, f"{where}[{i}][0]"), _logprob(logprob, f"{where}[{i}][1]")))
    if len({token for token, _ in pairs}) < len(pairs):
        raise _wrong(where, value, "tokens that are not the same")
    if any(one[1] < two[1] for one, two in zip(pairs, pairs[1:], strict=False)):
        raise _wrong(where, value, "in the order of their log-probabilities, the highest first")
    return pairs


# --- values ---------------------------------------------------------------------------------------------------------


def _wrong(where: str, found: object, allowed: str) -> UsageError:
    return UsageError(f"{where} must be {allowed}, found {shown(found)}")


def _object(value: object, names: Sequence[str], where: str) -> dict[str, Any]:
    """A copy of an object that has exactly these names."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    if missing := [name for name in names if name not in value]:
        raise UsageError(f"{where} lacks {missing[0]}")
    if strange := [name for name in value if name not in names]:
        raise UsageError(f"{where} must have {', '.join(names)} only, found {shown(strange[0])}")
    return dict(value)


def _list(value: object, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        count = f"{least}" if least == most else f"{least} to {most}"
        found = f"{len(value)} of them" if isinstance(value, list) else shown(value)
        raise UsageError(f"{where} must be a list of {count} items, found {found}")
    return value


def _each(value: object, where: str, least: int, most: int, check: Callable[[object, str], Any]) -> list[Any]:
    return [check(x, f"{where}[{i}]") for i, x in enumerate(_list(value, where, least, most))]


def _id(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_VOCAB_SIZE:  # bool is a subclass of int, hence type()
        raise _wrong(where, value, f"a token id from 0 to {MAX_VOCAB_SIZE - 1}")
    return value


def _logprob(value: object, where: str) -> float:
    if type(value) not in (int, float) or not -math.inf < value <= 0:  # type: ignore[operator]
        raise _wrong(where, value, "a logarithm of a probability: a finite number, 0 or less")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise _wrong(where, value, "within the range of a float64") from None


def _text(value: object, where: str, most: int) -> None:
    try:
        if not isinstance(value, str) or len(value.encode()) > most:
            raise _wrong(where, value, f"a text of at most {most} bytes")
    except UnicodeEncodeError:
        raise _wrong(where, value, "text without lone surrogates") from None


def _check_names(value: object, where: str, most: int) -> None:
    if not isinstance(value, dict) or not 1 <= len(value) <= most:
        raise _wrong(where, value, f"an object of 1 to {most} items")
    for name in value:
        if not _NAME.fullmatch(name):
            raise _wrong(f"a name in {where}", name, "letters, digits, dots, dashes and underscores, at most 200")


def _check_config(value: object) -> None:
    """Names and plain values, in objects and lists: those of any architecture, also of one that we do not know."""
    left = MAX_GOLDEN_FACTS

    def check(x: object, where: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_GOLDEN_DEPTH:
            raise UsageError(
                f"about.config must be at most {MAX_GOLDEN_FACTS} values, {MAX_GOLDEN_DEPTH} deep, found more"
            )
        if isinstance(x, dict):
            if x:
                _check_names(x, where, MAX_GOLDEN_FACTS)
            for name, item in x.items():
                check(item, f"{where}.{name}", depth + 1)
        elif isinstance(x, list):
            for i, item in enumerate(x):
                check(item, f"{where}[{i}]", depth + 1)
        elif isinstance(x, str):
            _text(x, where, MAX_GOLDEN_FACT_CHARS)
        elif isinstance(x, float) and not math.isfinite(x):
            raise _wrong(where, x, "a finite number")

    if not isinstance(value, dict):
        raise _wrong("about.config", value, "an object")
    check(value, "about.config", 0)
