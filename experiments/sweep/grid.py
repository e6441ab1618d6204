"""What a sweep goes through: policies, documents and seeds, from options or from a TOML file."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...engine.policy import CachePolicy
from ...engine.policy_fields import SCALARS
from ...engine.policy_text import rotation
from ...engine.policy_toml import of_file, parse_toml
from ...models.check import shown
from ...models.errors import UsageError
from ...models.limits import MAX_CELLS, MAX_SWEEP_SEED, MAX_WINDOW
from ..pieces import DEFAULT_TOKENS, Setting
from ..ranges import parse_numbers, split_words
from ..texts import DEFAULT

ROTATE = "rotate"  # both rotations as one word, as the command line has them
AXES = (*(name for name in SCALARS if name not in ("rotate_k", "rotate_v")), ROTATE)
"""Fields of a policy that a grid can go through."""
NUMBERS = tuple(f.name for f in fields(CachePolicy) if f.type in (int, "int") and f.name in AXES)


@dataclass(frozen=True, slots=True)
class Grid:
    """All that a sweep measures: each policy on each document, by each seed.

    Attributes:
        setting: what all cells have in common.
        policies: no two alike.
        merged: how many more the lists made, that came out as one of them.
        documents: names; see texts.py.
        seeds: of the pieces; see pieces.py.

    """

    setting: Setting
    policies: tuple[CachePolicy, ...]
    merged: int = 0
    documents: tuple[str, ...] = (DEFAULT,)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, values in (("policies", self.policies), ("documents", self.documents), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{name} must be one or more, none twice, found {shown(list(values))}")
        if self.n_cells > MAX_CELLS:
            raise UsageError(f"a sweep must be at most {MAX_CELLS} cells, found {self.n_cells}")

    @property
    def n_cells(self) -> int:
        """How many rows a whole sweep has."""
        return len(self.policies) * len(self.documents) * len(self.seeds)


def multiply(bases: Sequence[CachePolicy], axes: Mapping[str, Sequence[Any]]) -> tuple[tuple[CachePolicy, ...], int]:
    """Each base with every combination of values, in their order, and how many came out like another.

    Args:
        bases: policies.
        axes: a field of ``AXES`` -> the values it takes, at least one.

    Raises:
        UsageError: a combination that is no policy, which it names.

    """
    n = len(bases)
    for values in axes.values():
        n *= len(values)
    if n > MAX_CELLS:
        raise UsageError(f"a sweep must be at most {MAX_CELLS} cells, found {n} policies")
    found: dict[CachePolicy, None] = {}
    for base, values in itertools.product(bases, itertools.product(*axes.values())):
        own = dict(zip(axes, values, strict=True))
        if ROTATE in own:
            own["rotate_k"], own["rotate_v"] = rotation(ROTATE, own.pop(ROTATE))
        try:
            found[replace(base, **own)] = None
        except UsageError as error:
            which = " ".join(f"{name}={value}" for name, value in zip(axes, values, strict=True))
            raise UsageError(f"the combination {which}: {error}") from None
    return tuple(found), n - len(found)


def parse_axis(name: str, texts: Sequence[str], label: str | None = None) -> list[Any]:
    """Values of a field, as options give them: words separated by commas; for numbers also ranges like 0:512:128.

    ``label`` is what messages call it, the option unless given.
    """
    option = f"--{name.replace('_', '-')}" if label is None else label
    return list(parse_numbers(option, texts, 0, MAX_WINDOW) if name in NUMBERS else split_words(option, texts))


def parse_policies(texts: Sequence[str]) -> list[CachePolicy]:
    """Policies by their names, lines, or files ending in .toml."""
    return [CachePolicy.load(text) if text.endswith(".toml") else CachePolicy.parse(text) for text in texts]


_SETTING = {f.name: f for f in fields(Setting)}
_KEYS = ("documents", "seeds", "policies", "grid", *_SETTING)


def load(path: Path) -> tuple[dict[str, Any], list[str], dict[str, list[Any]], dict[str, Any]]:
    """What a TOML file says: fields of ``Setting``, policies as texts, axes, and "documents" and "seeds".

    Raises:
        UsageError: which names the file: no TOML, unknown keys, wrong types.

    """
    return of_file(path, "grid", lambda text: _of_table(parse_toml(text, "grid")))


def _of_table(table: dict[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, list[Any]], dict[str, Any]]:
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        raise UsageError(f"unknown keys {', '.join(map(shown, unknown))}; known are {', '.join(_KEYS)}")
    setting = {name: _typed(name, table[name], type(_SETTING[name].default)) for name in _SETTING if name in table}
    lists = {
        name: _list(name, table[name], kind)
        for name, kind in (("documents", str), ("seeds", int), ("policies", str))
        if name in table
    }
    grid = _typed("grid", table.get("grid", {}), dict)
    strange = [key for key in grid if key not in AXES]
    if strange:
        raise UsageError(f"grid has unknown fields {', '.join(map(shown, strange))}; known are {', '.join(AXES)}")
    axes = {name: _axis(name, value) for name, value in grid.items()}
    return setting, lists.pop("policies", []), axes, lists


def _typed(name: str, value: Any, kind: type) -> Any:
    """A value of a type; None stands for a whole number that need not be given."""
    kind = int if kind is type(None) else kind
    if type(value) is not kind:
        names = {bool: "true or false", int: "a whole number", str: "a text", dict: "a table"}
        raise UsageError(f"{name} must be {names[kind]}, found {shown(value)}")
    return value


def _list(name: str, value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list) or not value or any(type(x) is not kind for x in value):
        raise UsageError(
            f"{name} must be a list of {'texts' if kind is str else 'whole numbers'}, found {shown(value)}"
        )
    return value


def _axis(name: str, value: Any) -> list[Any]:
    """A list of values, a text as options have it, or one value."""
    if isinstance(value, str):
        return parse_axis(name, [value], f"grid: {name}")
    values = value if isinstance(value, list) else [value]
    kind = int if name in NUMBERS else str
    if not values or any(type(x) is not kind for x in values):
        what = "whole numbers, or a text like '2,4' or '0:512:128'" if kind is int else "texts"
        raise UsageError(f"grid: {name} must be a list of {what}, found {shown(value)}")
    return values


def make(
    setting: Mapping[str, Any],
    policies: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    documents: Sequence[str],
    seeds: Sequence[int],
) -> Grid:
    """The grid of what was said; what was not is as by default: the policy balanced, 2,048 tokens of the default text."""
    documents = documents or (DEFAULT,)
    setting = {"tokens": DEFAULT_TOKENS, **setting}
    found, merged = multiply(parse_policies(policies or ["balanced"]), axes)
    if any(not 0 <= seed <= MAX_SWEEP_SEED for seed in seeds):
        raise UsageError(f"seeds must be from 0 to {MAX_SWEEP_SEED}, found {shown(list(seeds))}")
    return Grid(Setting(**setting), found, merged, tuple(documents), tuple(seeds or (0,)))
