"""A cache policy as TOML: its fields as keys, its tiers and overrides as arrays of tables. Fields and values, both ways.

And how any TOML is read that people write: from a file of bounded size, in bounded time.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_POLICY_BYTES, MAX_POLICY_DOTS
from .policy_fields import SCALARS, SIDES, Override, Tier

_TIER = ("after", *SIDES)
_T = TypeVar("_T")


def toml(fields: Mapping[str, Any]) -> str:
    """All the fields of a policy as TOML, its tiers and overrides as arrays of tables."""
    lines = _pairs(fields)
    for tier in fields["older"]:
        lines += ["", "[[older]]", *_pairs(asdict(tier))]
    for override in fields["overrides"]:
        own = dict(override.fields)
        lines += ["", "[[overrides]]", f'layers = "{override.layers}"', *_pairs(own)]
        if own.get("older") == ():
            lines.append("older = []")
        for tier in own.get("older", ()):
            lines += ["", "[[overrides.older]]", *_pairs(asdict(tier))]
    return "\n".join(lines) + "\n"


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {str(value).lower()}"
        for name, value in fields.items()
        if name not in ("older", "overrides")
    ]


def of_file(path: Path, what: str, read: Callable[[str], _T]) -> _T:
    """What is read from the text of a TOML file of at most 1 MiB; UsageError, which names the file, where it is refused."""
    try:
        if not path.is_file():  # also keeps pipes and devices, which never end, from being opened
            raise UsageError("no such file")
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
        if len(data) > MAX_POLICY_BYTES:
            raise UsageError(f"a {what} must be at most {MAX_POLICY_BYTES} bytes, found more")
        return read(data.decode("utf-8"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """The table of a TOML text, in bounded time.

    Raises:
        UsageError: what is no TOML, or takes tomllib too long.

    """
    if len(text) > MAX_POLICY_BYTES:
        raise UsageError(f"a {what} must be at most {MAX_POLICY_BYTES} characters, found {len(text)}")
    for i, line in enumerate(text.split("\n")):
        if line.count(".") > MAX_POLICY_DOTS and not line.lstrip().startswith("#"):
            raise UsageError(f"line {i + 1} must have at most {MAX_POLICY_DOTS} dots, found {line.count('.')}")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UsageError("not valid TOML: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {str(error)[:200]}") from None
    except ValueError:  # Python reads no decimal number of more than 4,300 digits
        key = re.search(r"([A-Za-z0-9_-]+)[\"']?[ \t]*=[ \t\n\[]*[+-]?[0-9_]{4300}", text)
        where = key[1][:100] if key else "a value"
        raise UsageError(f"{where} must be a number of few digits, found one of thousands") from None


def fields_of_toml(text: str) -> dict[str, Any]:
    """The fields of a policy in TOML.

    Raises:
        UsageError: what is no TOML, or takes tomllib too long; unknown keys; tables and arrays in the place of others.

    """
    table = parse_toml(text, "policy")
    fields = _known(table, "", (*SCALARS, "older", "overrides"))
    if "older" in fields:
        fields["older"] = _older(fields["older"], "older")
    if "overrides" in fields:
        fields["overrides"] = tuple(
            _override_of_table(own, f"overrides[{i}]")
            for i, own in enumerate(_tables(fields["overrides"], "overrides"))
        )
    return fields


def _override_of_table(table: dict[str, Any], where: str) -> Override:
    fields = _known(table, f"{where}: ", ("layers", *SCALARS, "older"), "layers")
    if "older" in fields:
        fields["older"] = _older(fields["older"], f"{where}.older")
    try:
        return Override(**fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _older(value: object, where: str) -> tuple[Tier, ...]:
    tiers = []
    for i, table in enumerate(_tables(value, where)):
        try:
            tiers.append(Tier(**_known(table, "", _TIER, "after")))
        except UsageError as error:
            raise UsageError(f"{where}[{i}]: {error}") from None
    return tuple(tiers)


def _tables(value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(f"{name} must be tables, [[{re.sub('[^a-z.]', '', name)}]], found {shown(value)}")
    return value


def _known(table: dict[str, Any], where: str, known: tuple[str, ...], needed: str | None = None) -> dict[str, Any]:
    for key in table:
        if key not in known:
            raise UsageError(f"{where}a key must be one of {', '.join(known)}, found {shown(key)}")
    if needed is not None and needed not in table:
        raise UsageError(f"{where}{needed} must be given, found none")
    return dict(table)
