"""Rotary embedding as config.json describes it: at the top level and in rope_scaling (old), or in rope_parameters (new)."""

from typing import Any

from .architectures import LAYER_TYPES, Family
from .check import positive_float, shown, whole
from .errors import ModelError
from .limits import MAX_CONTEXT
from .rope import ROPE_TYPES, Rope, longrope_attention_factor, yarn_attention_factor

_KEYS = {  # of an object that describes one embedding, by type; what all of them may have comes first
    "": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
        "mscale", "mscale_all_dim",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip
_IDLE = {"finetuned"}  # a remark, not a number
_OLD_NAMES = {"su": "longrope"}  # of rope types


def ropes_from_keys(keys: dict[str, Any], fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields rope, rope_local, rotary_dim, and max_position_embeddings, of ``ModelConfig``.

    Args:
        keys: of config.json.
        fields: of the config that have been read, head_dim and max_position_embeddings among them.
        family: what models of this kind may have, and what they are unless said.

    """
    new, old = (_object(keys, key) for key in ("rope_parameters", "rope_scaling"))
    if not new and not old:
        new = family.rope
    top: dict[str, Any] = {key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in keys}
    places = {"": top, "rope_scaling": old, "rope_parameters": new}
    local: dict[str, dict[str, Any]] = {}
    if family.local_rope:
        if strange := sorted(new.keys() - set(LAYER_TYPES)):
            raise ModelError(f"rope_parameters has {shown(strange[0])}; supported: {' and '.join(LAYER_TYPES)}")
        whole_place, local_place = (f"rope_parameters.{kind}" for kind in LAYER_TYPES)
        base = "rope_local_base_freq"
        places = {"": top, "rope_scaling": old, whole_place: _object(new, LAYER_TYPES[0])}
        local = {"": {"rope_theta": keys[base]} if base in keys else {}, local_place: _object(new, LAYER_TYPES[1])}
    merged = _agreed(places, family)
    part = int(fields["head_dim"] * merged.get("partial_rotary_factor", 1))
    if part == 0:
        raise ModelError(f"partial_rotary_factor is {merged['partial_rotary_factor']:g}; no channel would turn")
    place = "rope_scaling" if old else next(reversed(places))
    rope = _rope(place, {"rope_theta": family.theta, **merged}, keys, fields, family)
    result: dict[str, Any] = {"rope": rope, "rotary_dim": part % fields["head_dim"]}
    if local:
        second = {"rope_theta": family.local_theta, **_agreed(local, family, {"rope_theta": base})}
        result["rope_local"] = _rope(local_place, second, keys, fields, family)
    if rope.rope_type == "dynamic":  # its max_position_embeddings is the context before it was stretched
        result["max_position_embeddings"] = min(int(rope.original_context * rope.factor), MAX_CONTEXT)
    return result


def _check_place(place: str, found: dict[str, Any], family: Family) -> None:
    """ModelError for a type that is not known here, or a part of the channels where all have to turn."""
    rope_types = family.rope_types
    kinds = [found[key] for key in ("rope_type", "type") if found.get(key) is not None]
    for kind in kinds:
        if not isinstance(kind, str) or _OLD_NAMES.get(kind, kind) not in rope_types:
            raise ModelError(f"{place} has the rope type {shown(kind)}; supported: {', '.join(rope_types)}")
    if len({_OLD_NAMES.get(kind, kind) for kind in kinds}) > 1:
        raise ModelError(
            f"{place} has the rope types {kinds[0]} and {kinds[1]}; supported: {rope_types[0]}, or both the same"
        )
    # Without a type, anything beyond the base (a factor, a table per kind of layer) has a meaning we would miss
    if place and not kinds and (strange := sorted(found.keys() - _KEYS[""])):
        raise ModelError(f"{place} has {shown(strange[0])}, without a rope_type; supported: {', '.join(rope_types)}")
    part = found.get("partial_rotary_factor", 1)
    name = f"{place}.partial_rotary_factor".lstrip(".")
    if isinstance(part, bool) or (part != 1 and not family.partial_rope):
        raise ModelError(f"{name} is {shown(part)}; supported: 1")
    if positive_float(name, part) > 1:
        raise ModelError(f"{name} is {shown(part)}; it must be at most 1")


def _object(keys: dict[str, Any], key: str) -> dict[str, Any]:
    value = keys.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ModelError(f"{key} is {shown(value)}; it must be null or an object")
    return value


def _agreed(places: dict[str, dict[str, Any]], family: Family, top: dict[str, str] | None = None) -> dict[str, Any]:
    """All keys of all places; ModelError where two say different things. ``top``: other names of keys at the top."""
    merged: dict[str, Any] = {}
    where: dict[str, str] = {}
    for place, found in places.items():
        _check_place(place, found, family)
        for key, value in found.items():
            name = f"{place}.{key}" if place else (top or {}).get(key, key)
            if key in merged and merged[key] != value:
                raise ModelError(f"{where[key]} is {shown(merged[key])}; {name} is {shown(value)}; they must agree")
            merged[key], where[key] = value, name
    return merged


def _rope(place: str, found: dict[str, Any], keys: dict[str, Any], fields: dict[str, Any], family: Family) -> Rope:
    """One rotary embedding from its keys, whose type ``_check_place`` has seen."""
    supported = ", ".join(family.rope_types)
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = _OLD_NAMES.get(kind, kind)
    # A key without meaning for the type has one that we would miss
    if strange := sorted(key for key in found.keys() - _KEYS[""] - _KEYS[kind] - _IDLE if found[key] is not None):
        raise ModelError(
            f"{place} has {shown(strange[0])}, which rope type {kind} does not know; supported: {supported}"
        )
    numbers = {key: found[key] for key in _KEYS[kind] if found.get(key) is not None}
    for name in ("short_factor", "long_factor"):
        if isinstance(numbers.get(name), list):
            numbers[name] = tuple(numbers[name])
    if missing := sorted(_NEEDED.get(kind, set()) - numbers.keys()):
        raise ModelError(f"{place}: the rope type {kind} needs {', '.join(missing)}; supported: {supported}")
    original = _original(place, kind, numbers.pop("original_max_position_embeddings", None), keys, fields)
    if original:
        numbers["original_context"] = original
    if kind in ("yarn", "longrope"):
        numbers["attention_factor"] = _attention_factor(kind, numbers, fields["max_position_embeddings"] / original)
    if kind == "longrope":
        numbers.pop("factor", None)  # it is in the attention factor, and nowhere else
    return Rope(rope_type=kind, theta=found["rope_theta"], **numbers)


def _original(place: str, kind: str, inside: Any, keys: dict[str, Any], fields: dict[str, Any]) -> int:
    """The context before it was stretched, 0 where that does not count."""
    key, context = "original_max_position_embeddings", fields["max_position_embeddings"]
    if kind not in ("dynamic", "llama3", "yarn", "longrope"):
        return 0
    if kind == "dynamic":
        return int(context)
    top = keys.get(key)
    if None not in (top, inside) and top != inside:
        raise ModelError(f"{key} is {shown(top)}; {place}.{key} is {shown(inside)}; they must agree")
    found = next((value for value in (top, inside) if value is not None), context)
    return whole(key, found, 2 if kind == "longrope" else 1, MAX_CONTEXT)


_NEEDED = {
    "linear": {"factor"}, "dynamic": {"factor"}, "yarn": {"factor"}, "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


def _attention_factor(kind: str, numbers: dict[str, Any], stretched: float) -> float:
    """By what cosines and sines are multiplied; takes what only matters for it out of ``numbers``."""
    given = numbers.pop("attention_factor", None)
    factor = positive_float("rope factor", numbers.get("factor", stretched))
    weights = {
        key: positive_float(f"rope {key}", value)
        for key in ("mscale", "mscale_all_dim")
        if (value := numbers.pop(key, None))
    }
    if given is not None:
        return positive_float("rope attention_factor", given)
    if kind == "longrope":
        return longrope_attention_factor(factor, numbers["original_context"])
    return yarn_attention_factor(factor, **weights) if len(weights) == 2 else yarn_attention_factor(factor)


assert set(_KEYS) - {""} == set(ROPE_TYPES)
