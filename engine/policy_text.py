"""A cache policy as text, in its one-line form and by short names: fields and their values, both ways.

The one-line form is words of key=value, in any order, a key once:

    sinks=4 recent=128:f16 tile=64 old=k4c/v4t64     window and dense; the tiles; a tier
    old=512:k8c/v8t old=k4c/v2t32                    two tiers: tokens are sure to stay in the first to the age of 512
    rot=kv scales=fit rollback=64                    what is rotated; how scales are found; how far a session can go back
    layers=0..1+-2..-1[old=k8c/v8t]                  what is otherwise in some layers, in the same words

k4c are keys of 4 bits with scales by channel, v4t64 values with scales by token, one for 64 channels (none named: the
default group), k16 float16. A field can also be named alone, as it is in Python: ``k_bits=8``. With ``*`` in the place of
the first tier's format, only its age and the tiers after it are meant.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_POLICY_CHARS
from .policy_fields import BITS, DENSE_BITS, DENSE_NAMES, ROTATIONS, SCALARS, SIDE_AXES, SIDES, Override, Tier

SUFFIXES = ("window", "sinks", "tile", "dense")  # of short names
KEYS = ("sinks", "recent", "tile", "old", "rot", "scales", "rollback", "layers")
_WORD = re.compile(r"([a-z_]+)=([^\s\[\]]*)(?:\[([^\[\]]*)\])?(?:\s+|$)")
_FORMAT = re.compile("k([0-9]+)([ct]?)([0-9]*)/v([0-9]+)([ct]?)([0-9]*)")
_AXES = {"c": "channel", "t": "token"}


def one_line(fields: Mapping[str, Any]) -> str:
    """The canonical form of all the fields of a policy, or of those that an override names."""
    left, found = dict(fields), []
    overrides = left.pop("overrides", ())
    if "sinks" in left:
        found.append(f"sinks={left.pop('sinks')}")
    if {"window", "dense"} <= left.keys():
        found.append(f"recent={left.pop('window')}:{left.pop('dense')}")
    if "tile" in left:
        found.append(f"tile={left.pop('tile')}")
    if "older" in left:
        formats, older = ["*"], left.pop("older")
        if left.keys() >= set(SIDES):
            formats = [_format({name: left.pop(name) for name in SIDES})]
        ages = [f"{tier.after}:" for tier in older] + [""]
        formats += [_format(asdict(tier)) for tier in older]
        found += [f"old={age}{text}" for age, text in zip(ages, formats, strict=True)]
    if {"rotate_k", "rotate_v"} <= left.keys():
        pair = left.pop("rotate_k"), left.pop("rotate_v")
        found.append(f"rot={next(name for name, rotated in ROTATIONS.items() if rotated == pair)}")
    found += [f"{name}={str(value).lower()}" for name, value in left.items()]
    found += [f"layers={override.layers}[{one_line(dict(override.fields))}]" for override in overrides]
    return " ".join(found)


def _format(fields: Mapping[str, Any]) -> str:
    """The format of a tier: k4c/v4t64."""
    return "/".join(
        f"{side}{bits}" if (bits := fields[f"{side}_bits"]) in DENSE_BITS
        else f"{side}{bits}{fields[f'{side}_axis'][0]}{fields[f'{side}_group'] or ''}"
        for side in SIDE_AXES
    )  # fmt: skip


def is_one_line(text: str) -> bool:
    """Whether a text begins as the one-line form does, with a key, and is no short name."""
    return re.match("[a-z_]+=", text) is not None


def fields_of_line(text: str) -> dict[str, Any]:
    """The fields that the one-line form names, or the words in the brackets of an override.

    Raises:
        UsageError: a word that is none, a field that is given twice, or what ``Tier`` and ``Override`` refuse.

    """
    fields: dict[str, Any] = {}
    overrides, tiers = [], []

    def put(name: str, value: object) -> None:
        if name in fields:
            raise UsageError(f"{name} must be given once, found it twice")
        fields[name] = value

    at, text = 0, text.strip()
    while at < len(text):
        word = _WORD.match(text, at)
        if word is None or (word[3] is not None) != (word[1] == "layers"):
            raise UsageError(f"words must be like sinks=4 or layers=0..1[tile=32], found {shown(text[at:])}")
        key, value, at = word[1], word[2], word.end()
        if key == "layers":
            overrides.append(_override(value, word[3]))
        elif key == "recent":
            window, colon, dense = value.partition(":")
            if not colon:
                raise UsageError(f"recent must be like 128:f16, found {shown(value)}")
            put("window", number(window))
            put("dense", dense)
        elif key == "old":
            tiers.append(value)
        elif key == "rot":
            for name, rotated in zip(("rotate_k", "rotate_v"), rotation("rot", value), strict=True):
                put(name, rotated)
        elif key in SCALARS:
            put(key, {"true": True, "false": False}.get(value, number(value)))
        else:
            raise UsageError(f"a key must be one of {', '.join(KEYS)}, or a field's name, found {shown(key)}")
    if tiers:
        first, older = _tiers(tiers)
        for name, value in [*first.items(), ("older", older)]:
            put(name, value)
    if overrides:
        put("overrides", tuple(overrides))
    return fields


def _override(layers: str, words: str) -> Override:
    try:
        return Override(layers, **fields_of_line(words))
    except UsageError as error:
        raise UsageError(f"layers={shown(layers)}: {error}") from None


def _tiers(words: list[str]) -> tuple[dict[str, Any], tuple[Tier, ...]]:
    """The fields of the first of the tiers that the ``old=`` stand for, and the others."""
    ages, formats = [], []
    for i, word in enumerate(words):
        age, colon, text = word.rpartition(":")
        if bool(colon) != (i + 1 < len(words)):
            raise UsageError(f"old must be like 512:k4c/v4t, the last one without an age, found {shown(word)}")
        ages.append(number(age))
        formats.append({} if text == "*" and i == 0 else _sides(text))
    older = zip(ages, formats[1:], strict=False)  # an age is that from which on the tier after it may hold tokens
    return formats[0], tuple(Tier(after=age, **sides) for age, sides in older)


def _sides(text: str) -> dict[str, Any]:
    """The fields of a format such as k4c/v4t64."""
    match = _FORMAT.fullmatch(text)
    if match is None:
        raise UsageError(f"old must be a format like k4c/v4t64 or k16/v16, found {shown(text)}")
    fields: dict[str, Any] = {}
    for side, bits, letter, group in (("k", *match.group(1, 2, 3)), ("v", *match.group(4, 5, 6))):
        kept = number(bits)
        if kept in BITS and (kept in DENSE_BITS) == bool(letter):
            rule = "no axis, they have no scales" if letter else "the axis of their scales, c or t"
            raise UsageError(f"old must name after {side}{kept} {rule}, found {shown(text)}")
        axis = _AXES.get(letter, SIDE_AXES[side])
        fields |= {f"{side}_bits": kept, f"{side}_axis": axis, f"{side}_group": number(group) if group else 0}
    return fields


def number(text: str) -> Any:
    """The whole number that digits are; any other text as it is, for the field's own check to refuse."""
    return int(text) if re.fullmatch(f"[0-9]{{1,{MAX_POLICY_CHARS}}}", text) else text


def rotation(name: str, text: str) -> tuple[bool, bool]:
    """(rotate_k, rotate_v) of one of ``ROTATIONS``; UsageError that names the option or key."""
    if text not in ROTATIONS:
        raise UsageError(f"{name} must be one of {', '.join(ROTATIONS)}, found {shown(text)}")
    return ROTATIONS[text]


# --- short names --------------------------------------------------------------------------------------------------


def named(name: str) -> dict[str, Any]:
    """The fields that a short name stands for: a dense type alone, or like "k4v2"; none for what is no name."""
    if name in DENSE_NAMES:
        bits = 32 if name == "f32" else 16
        return {
            "window": 0, "sinks": 0, "k_bits": bits, "v_bits": bits, "dense": name, "rotate_k": False, "rotate_v": False,
        }  # fmt: skip
    codes = re.fullmatch("k([0-9]+)v([0-9]+)", name)
    return {} if codes is None else {"k_bits": number(codes[1]), "v_bits": number(codes[2])}


def fields_of_short(text: str, presets: Collection[str]) -> dict[str, Any]:
    """The fields of a short name with its suffixes; ``presets`` are names that the caller knows, for the message."""
    name, *suffixes = text.split(":")
    fields, given = named(name), set()
    if not fields:
        raise UsageError(
            f"the name must be one of {', '.join(DENSE_NAMES)}, or like k4v4, or a preset "
            f"({', '.join(presets)}), or words like recent=128:f16, found {shown(name)}"
        )
    for suffix in suffixes:
        field, _, value = suffix.partition("=")
        if field not in SUFFIXES or field in given:
            raise UsageError(f"after the name, {', '.join(SUFFIXES)} may follow once, found {shown(suffix)}")
        given.add(field)
        fields[field] = number(value)
    return fields


def check_length(text: str) -> None:
    """UsageError for a text longer than a policy may be written."""
    if len(text) > MAX_POLICY_CHARS:
        raise UsageError(f"the text must be at most {MAX_POLICY_CHARS} characters, found {len(text)}")
