"""What a cache policy is made of: the rule of each field, tiers of age, and overrides for layers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..kernels.layout import AXES, MAX_HEAD_DIM, TILES
from ..kernels.simd import LANES
from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_LAYER_ITEMS, MAX_LAYERS, MAX_ROLLBACK, MAX_SINKS, MAX_TIERS, MAX_WINDOW

BITS = (2, 3, 4, 8, 16, 32)
DENSE_BITS = (16, 32)  # float16 or bfloat16, and float32: without scales
DENSE_NAMES = ("f16", "bf16", "f32")
SCALES = ("fit", "range")
ROTATIONS = {"none": (False, False), "k": (True, False), "v": (False, True), "kv": (True, True)}

SIDE_AXES = {"k": "channel", "v": "token"}  # K or V, and the axis of its scales unless a policy says otherwise
SIDES = ("k_bits", "v_bits", "k_axis", "v_axis", "k_group", "v_group")  # the format of a tier
_RANGES = {
    "window": (0, MAX_WINDOW), "sinks": (0, MAX_SINKS), "rollback": (0, MAX_ROLLBACK), "after": (0, MAX_WINDOW),
}  # fmt: skip
_CHOICES: dict[str, Sequence[Any]] = {
    "k_bits": BITS, "v_bits": BITS, "tile": TILES, "dense": DENSE_NAMES, "scales": SCALES, "k_axis": AXES, "v_axis": AXES,
    "k_group": range(0, MAX_HEAD_DIM + 1, LANES), "v_group": range(0, MAX_HEAD_DIM + 1, LANES),
}  # fmt: skip
# The fields of a policy that hold one number, name or truth, in its order
SCALARS = (
    "window", "sinks", "k_bits", "v_bits", "tile", "dense", "k_axis", "v_axis", "k_group", "v_group",
    "rotate_k", "rotate_v", "scales", "rollback",
)  # fmt: skip
_OVERRIDABLE = (*(name for name in SCALARS if name != "rollback"), "older")


def check_field(name: str, value: object) -> None:
    """UsageError where a value is none that the field of this name (a scalar, or ``after``) may have."""
    if name in ("rotate_k", "rotate_v"):
        if not isinstance(value, bool):
            raise UsageError(f"{name} must be true or false, found {shown(value)}")
        return
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if name in _RANGES:
        low, high = _RANGES[name]
        if number is None or not low <= number <= high:
            near = "" if number is None else f"; the nearest is {min(max(number, low), high)}"
            raise UsageError(f"{name} must be a whole number from {low} to {high}, found {shown(value)}{near}")
        return
    choices = _CHOICES[name]
    if isinstance(choices[0], str):
        if not isinstance(value, str) or value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, found {shown(value)}")
    elif number is None or number not in choices:
        near = "" if number is None else f"; the nearest is {nearest(number, choices)}"
        allowed = f"one of {', '.join(map(str, choices))}"
        if isinstance(choices, range):
            allowed = f"0 or a multiple of {choices.step} up to {choices[-1]}"
        raise UsageError(f"{name} must be {allowed}, found {shown(value)}{near}")


def nearest(number: int, allowed: Sequence[int]) -> int:
    """The allowed number that is nearest to another one; of two the smaller."""
    return min(allowed, key=lambda a: abs(a - number))


def settled_groups(fields: Mapping[str, Any], tile: int | None = None) -> dict[str, int]:
    """The groups of K and V, 0 where a group by channel is the tile; of a side only if all its three fields are there.

    Args:
        fields: names and values of ``SIDES``, each legal alone.
        tile: tokens a tile, where that is known.

    Raises:
        UsageError: an axis or a group for 16 or 32 bits, which have no scales; a group by channel that is not the tile.

    """
    groups = {}
    for side, usual in SIDE_AXES.items():
        if not {f"{side}_bits", f"{side}_axis", f"{side}_group"} <= fields.keys():
            continue
        bits, axis, group = (fields[f"{side}_{name}"] for name in ("bits", "axis", "group"))
        if bits in DENSE_BITS:
            for name, only, value in ((f"{side}_axis", usual, axis), (f"{side}_group", 0, group)):
                if value != only:
                    raise UsageError(
                        f"{name} must be {only} at {side}_bits {bits}, which have no scales, found {value}"
                    )
        elif axis == "channel" and tile is not None:
            if group not in (0, tile):
                near = nearest(group, (0, tile))
                raise UsageError(
                    f"{side}_group by channel must be 0 or the tile, {tile}, found {group}; the nearest is {near}"
                )
            group = 0
        groups[f"{side}_group"] = group
    return groups


@dataclass(frozen=True, slots=True)
class Tier:
    """How old tokens of one range of age are kept. Frozen, and checked when it is made.

    Attributes:
        after: tokens; each of the last ``after`` is guaranteed to be in a younger tier, or dense.
        k_bits, v_bits, k_axis, v_axis, k_group, v_group: as of a ``CachePolicy``.

    Raises:
        UsageError: (a ValueError) a value out of its range, with the range.

    """

    after: int
    k_bits: int = 4
    v_bits: int = 4
    k_axis: str = SIDE_AXES["k"]
    v_axis: str = SIDE_AXES["v"]
    k_group: int = 0
    v_group: int = 0

    def __post_init__(self) -> None:
        for name in ("after", *SIDES):
            check_field(name, getattr(self, name))
        settled_groups(asdict(self))


def settled_tiers(older: object, window: int, tile: int) -> tuple[Tier, ...]:
    """Further tiers as a policy of this window and tile keeps them: groups by channel that are the tile are 0.

    Raises:
        UsageError: too many of them, ages that do not grow, or groups by channel that are not the tile.

    """
    tiers, below, known_as = [], window, "window"
    for i, tier in enumerate(tiers_of(older)):
        name = f"older[{i}]"
        if tier.after <= below:
            raise UsageError(
                f"{name}.after must be above {known_as}, {below}, found {tier.after}"
                + (f"; the nearest is {below + 1}" if below < MAX_WINDOW else "")
            )
        below, known_as = tier.after, f"{name}.after"
        fields = asdict(tier)
        try:
            fields |= settled_groups(fields, tile)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        tiers.append(Tier(**fields))
    return tuple(tiers)


def tiers_of(older: object) -> tuple[Tier, ...]:
    """A sequence of tiers as a tuple; UsageError where it is none, or too long."""
    if not isinstance(older, list | tuple) or not all(isinstance(tier, Tier) for tier in older):
        raise UsageError(f"older must be a tuple of Tier, found {shown(older)}")
    if len(older) >= MAX_TIERS:
        raise UsageError(f"older must be at most {MAX_TIERS - 1} tiers, found {len(older)}")
    return tuple(older)


_ITEM = re.compile(r"(-?[0-9]{1,9})(?:\.\.(-?[0-9]{1,9}))?")


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Override:
    """What a policy does otherwise in some layers: ``Override("0..1+-2..-1", k_bits=8, v_bits=8)``.

    Attributes:
        layers: items joined by "+": a layer's number or an inclusive range a..b; a negative number counts from the end.
        fields: the fields named and their values, in the policy's order.

    Raises:
        UsageError: (a ValueError) layers that are none, no field, one that no override may name, or a value out of range.

    """

    layers: str
    fields: tuple[tuple[str, Any], ...]

    def __init__(self, layers: str, **fields: Any) -> None:
        items = _layer_items(layers)
        if not fields:
            raise UsageError(f"layers {shown(layers)}: an override must name a field, found none")
        for name, value in fields.items():
            if name not in _OVERRIDABLE:
                raise UsageError(f"an override's fields must be of {', '.join(_OVERRIDABLE)}, found {shown(name)}")
            if name != "older":
                check_field(name, value)
        if "older" in fields:
            fields["older"] = tiers_of(fields["older"])
        settled_groups(fields)
        text = "+".join(str(first) if first == last else f"{first}..{last}" for first, last in items)
        object.__setattr__(self, "layers", text)
        object.__setattr__(self, "fields", tuple((name, fields[name]) for name in _OVERRIDABLE if name in fields))

    def __repr__(self) -> str:
        return f"Override({self.layers!r}, {', '.join(f'{name}={value!r}' for name, value in self.fields)})"

    def spans(self, n_layers: int) -> list[tuple[int, int]]:
        """The layers of a model with so many: (first, last), both from 0 to n_layers - 1.

        Raises:
            UsageError: a layer that the model has not, or a range that is empty in it.

        """
        spans = []
        for first, last in _layer_items(self.layers):
            for number in (first, last):
                if not -n_layers <= number < n_layers:
                    near = min(max(number, -n_layers), n_layers - 1)
                    raise UsageError(
                        f"layers {self.layers}: {number} must be from 0 to {n_layers - 1}, or from -{n_layers} to -1 "
                        f"counted from the end, in a model of {n_layers} layers; the nearest is {near}"
                    )
            if first % n_layers > last % n_layers:
                raise UsageError(f"layers {self.layers}: {first}..{last} is empty in a model of {n_layers} layers")
            spans.append((first % n_layers, last % n_layers))
        return spans

    def covers(self, layer: int, n_layers: int) -> bool:
        """Whether a layer (from 0 on) is one of those named; UsageError as ``spans``."""
        return any(first <= layer <= last for first, last in self.spans(n_layers))


def _layer_items(text: object) -> list[tuple[int, int]]:
    """The items of ``Override.layers`` as (first, last), negative numbers as they are; UsageError where it is none."""
    if not isinstance(text, str):
        raise UsageError(f"layers must be text like 0..1+-2..-1, found {shown(text)}")
    items: list[tuple[int, int]] = []
    for item in text.split("+", MAX_LAYER_ITEMS):
        if len(items) == MAX_LAYER_ITEMS:
            raise UsageError(f"layers must be at most {MAX_LAYER_ITEMS} items joined by +, found {shown(text)}")
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UsageError(
                f"layers must be numbers and ranges a..b, of one to nine digits, joined by +, found {shown(text)}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        for number in (first, last):
            if not -MAX_LAYERS <= number < MAX_LAYERS:
                near = min(max(number, -MAX_LAYERS), MAX_LAYERS - 1)
                raise UsageError(
                    f"layers must be from -{MAX_LAYERS} to {MAX_LAYERS - 1}, found {number}; the nearest is {near}"
                )
        if (first < 0) == (last < 0) and first > last:
            raise UsageError(f"layers must be ranges from the lower to the higher number, found {shown(item)}")
        items.append((first, last))
    return items
