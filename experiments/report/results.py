"""Files of results, JSON Lines that `mixkv sweep`, `mixkv bench -o jsonl` and others write, as checked rows by kind."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

from ...models.check import listed, shown
from ...models.errors import UsageError
from ...models.limits import MAX_RESULT_LINE_BYTES, MAX_RESULT_ROWS
from ..tables import Row
from .fields import KINDS, check_row


@dataclass(frozen=True, slots=True)
class Results:
    """The rows of one or several files, in their order.

    Attributes:
        rows: of the kinds that are known, a list for each of KINDS.
        notes: lines about what was left out, for people.

    """

    rows: dict[str, list[Row]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    notes: list[str] = field(default_factory=list)

    @property
    def every(self) -> list[Row]:
        """All rows, kind after kind."""
        return [row for rows in self.rows.values() for row in rows]


def read(sources: Iterable[tuple[str, BinaryIO]]) -> Results:
    """The rows of files that are open, each with the name that messages call it by.

    A last line without its newline that is no JSON was torn while it was written: it is left out, and noted. So are rows
    of other kinds, and rows whose key has been seen before.

    Raises:
        UsageError: a line that is no JSON object, or a row whose fields are not what the schema says, with file, line and
            field; a line too long; too many rows; no row that a report could be made of.

    """
    results, seen, repeated = Results(), set[str](), 0
    unknown: Counter[str] = Counter()
    names = []
    count = 0
    for name, stream in sources:
        names.append(name)
        for where, row in _objects(name, stream, results.notes):
            count += 1
            if count > MAX_RESULT_ROWS:
                raise UsageError(f"{where}: a report is made of at most {MAX_RESULT_ROWS} rows, found more")
            kind = kind_of(row)
            key = row.get("key")
            if kind not in KINDS:
                unknown[shown(row.get("kind"))] += 1
            elif isinstance(key, str) and key in seen:
                repeated += 1
            else:
                check_row(kind, row, where)
                seen.update([key] if isinstance(key, str) else [])
                results.rows[kind].append(row)
    if repeated:
        results.notes.append(f"{repeated} rows stand there more than once (the same key): each is taken once")
    if unknown:
        found = listed(f"{kind} ({count})" for kind, count in unknown.items())
        results.notes.append(f"rows of kinds that a report does not know are left out: {found}")
    if not results.every:
        raise UsageError(f"{listed(names)}: no row of the kinds {', '.join(KINDS)}: `mixkv sweep -o FILE` writes them")
    return results


def kind_of(row: Row) -> str:
    """What a row says that it is; rows of ``mixkv bench`` do not say, and are known by their fields."""
    kind = row.get("kind")
    if kind is None and "test" in row and "avg_ts" in row:
        return "bench"
    return kind if isinstance(kind, str) else ""


class _Torn(ValueError):
    """Text that ends, or goes on, where no JSON can: what a line looks like whose writing was interrupted."""


def _objects(name: str, stream: BinaryIO, notes: list[str]) -> Iterable[tuple[str, Row]]:
    """The objects of a file's lines, each with its place."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_RESULT_LINE_BYTES + 1), b""), 1):
        where = f"{name}:{number}"
        if len(line) > MAX_RESULT_LINE_BYTES:
            raise UsageError(f"{where}: a line must have at most {MAX_RESULT_LINE_BYTES} bytes, found more")
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if isinstance(error, _Torn) and not line.endswith(b"\n"):
                notes.append(f"{where}: the last line was not written to its end, and is left out")
                return
            raise UsageError(f"{where}: a line must be a JSON object, found {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a line must be a JSON object, found {shown(row)}")
        yield where, row


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; ValueError, whose text says what was found, where there is none."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant}: numbers that are not finite must be null")

    try:
        return json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise _Torn(f"what is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _Torn(f"{shown(error.doc[:60])}: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("brackets nested too deep") from None
