"""Rotary embedding as config.json describes it: at the top level and in rope_scaling (old), or in rope_parameters (new)."""

from typing import Any

from .check import positive_float, shown, whole
from .errors import ModelError
from .limits import MAX_CONTEXT
from .rope import ROPE_TYPES, Rope, longrope_attention_factor, yarn_attention_factor

_LAYER_TYPES = ("full_attention", "sliding_attention")
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


def ropes_from_keys(
    keys: dict[str, Any], fields: dict[str, Any], rope_types: tuple[str, ...], *, partial: bool, local: bool
) -> dict[str, Any]:
    """The fields rope, rope_local, rotary_dim, and max_position_embeddings, of ``ModelConfig``.

    Args:
        keys: of config.json.
        fields: of the config that have been read, head_dim and max_position_embeddings among them.
        rope_types: those that models of this kind are known to have.
        partial: whether only a part of the channels may turn.
        local: whether layers with a sliding window may have an embedding of their own.

    """
    new, old = (_object(keys, key) for key in ("rope_parameters", "rope_scaling"))
    parts = {kind: _object(new, kind) for kind in _LAYER_TYPES if kind in new} if local else {}
    if parts and (strange := sorted(new.keys() - parts.keys() - {"rope_theta", "rope_type", "type"})):
        raise ModelError(f"rope_parameters has {strange[0]} beside {' and '.join(parts)}")
    top: dict[str, Any] = {key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in keys}
    places: dict[str, dict[str, Any]] = {
        "": top,
        "rope_scaling": old,
        "rope_parameters": parts.get("full_attention", {}) if parts else new,
    }
    for place, found in places.items():
        _check_place(place, found, rope_types, partial)
    merged = _agreed(places)
    rope = _rope("rope_parameters" if new else "rope_scaling", merged, keys, fields, rope_types)
    result: dict[str, Any] = {
        "rope": rope, "rotary_dim": int(fields["head_dim"] * merged.get("partial_rotary_factor", 1)) % fields["head_dim"],
    }  # fmt: skip
    second = parts.get("sliding_attention")
    if second is None and local:
        second = {"rope_theta": keys.get("rope_local_base_freq", 10_000.0)}
    if second is not None:
        _check_place("rope_parameters.sliding_attention", second, rope_types, partial)
        result["rope_local"] = _rope("rope_parameters.sliding_attention", second, keys, fields, rope_types)
    if rope.rope_type == "dynamic":  # its max_position_embeddings is the context before it was stretched
        result["max_position_embeddings"] = min(int(rope.original_context * rope.factor), MAX_CONTEXT)
    return result


def _check_place(place: str, found: dict[str, Any], rope_types: tuple[str, ...], partial: bool) -> None:
    """ModelError for a type that is not known here, or a part of the channels where all have to turn."""
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
    if isinstance(part, bool) or (part != 1 and not partial):
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


def _agreed(places: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All keys of all places; ModelError where two say different things."""
    merged: dict[str, Any] = {}
    where: dict[str, str] = {}
    for place, found in places.items():
        for key, value in found.items():
            name = f"{place}.{key}".lstrip(".")
            if key in merged and merged[key] != value:
                raise ModelError(f"{where[key]} is {shown(merged[key])}; {name} is {shown(value)}; they must agree")
            merged[key], where[key] = value, name
    return merged


def _rope(
    place: str, found: dict[str, Any], keys: dict[str, Any], fields: dict[str, Any], rope_types: tuple[str, ...]
) -> Rope:
    """One rotary embedding from its keys, whose type ``_check_place`` has seen."""
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = _OLD_NAMES.get(kind, kind)
    # A key without meaning for the type has one that we would miss
    if strange := sorted(key for key in found.keys() - _KEYS[""] - _KEYS[kind] - _IDLE if found[key] is not None):
        raise ModelError(
            f"{place} has {shown(strange[0])}, which rope type {kind} does not know; supported: {', '.join(rope_types)}"
        )
    numbers = {key: found[key] for key in _KEYS[kind] if found.get(key) is not None}
    for name in ("short_factor", "long_factor"):
        if isinstance(numbers.get(name), list):
            numbers[name] = tuple(numbers[name])
    original = numbers.pop("original_max_position_embeddings", None)
    if kind in ("llama3", "yarn", "longrope") and keys.get("original_max_position_embeddings") is not None:
        original = keys["original_max_position_embeddings"]  # where it stands at the top, that counts (transformers)
    context = fields["max_position_embeddings"]
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        original = context if original is None or kind == "dynamic" else original
        whole("original_max_position_embeddings", original, 1, MAX_CONTEXT)
        numbers["original_context"] = original
        stretched = context / original
        if kind in ("yarn", "longrope"):
            numbers["attention_factor"] = _attention_factor(kind, numbers, stretched, original)
        if kind == "longrope":
            numbers.pop("factor", None)  # it is in the attention factor, and nowhere else
    missing = sorted(_NEEDED.get(kind, set()) - numbers.keys())
    if missing:
        raise ModelError(
            f"{place}: the rope type {kind} needs {', '.join(missing)}; supported: {', '.join(rope_types)}"
        )
    theta = {"theta": found["rope_theta"]} if "rope_theta" in found else {}
    return Rope(rope_type=kind, **theta, **numbers)


_NEEDED = {
    "linear": {"factor"}, "dynamic": {"factor"}, "yarn": {"factor"}, "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


def _attention_factor(kind: str, numbers: dict[str, Any], stretched: float, original: int) -> float:
    """By what cosines and sines are multiplied; takes what only matters for it out of ``numbers``."""
    given = numbers.pop("attention_factor", None)
    if kind == "yarn":
        numbers.setdefault("factor", stretched)
    factor = positive_float("rope factor", numbers.get("factor", stretched))
    weights = {
        key: positive_float(f"rope {key}", numbers.pop(key)) for key in ("mscale", "mscale_all_dim") if numbers.get(key)
    }
    for key in ("mscale", "mscale_all_dim"):
        numbers.pop(key, None)
    if given is not None:
        return positive_float("rope attention_factor", given)
    if kind == "longrope":
        return longrope_attention_factor(factor, original)
    return yarn_attention_factor(factor, **weights) if len(weights) == 2 else yarn_attention_factor(factor)


assert set(_KEYS) - {""} == set(ROPE_TYPES)
