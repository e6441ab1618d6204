"""Rows of a measurement as text: Markdown, CSV, JSON, or JSON Lines. A row is a flat dictionary, the same keys in each."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..models.check import shown
from ..models.errors import UsageError

Row = dict[str, Any]
OUTPUTS = ("md", "csv", "json", "jsonl")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a Markdown table: its title, a row's text in it, and whether it is set to the right."""

    title: str
    text: Callable[[Row], str]
    right: bool = True


class Writer(Protocol):
    """Takes rows as they are measured; what it returns is printed at once. No rows make no text."""

    def row(self, row: Row) -> str:
        """What can be printed after one more row."""

    def end(self) -> str:
        """The rest."""


def make_writer(output: str, columns: Sequence[Column], heading: Callable[[list[Row]], str]) -> Writer:
    """The writer of a format, "md", "csv", "json" or "jsonl"; UsageError for another.

    Args:
        output: the name of the format.
        columns: those of the Markdown table; the other formats have every key.
        heading: the text above that table, from all rows.

    """
    writers: dict[str, Callable[[], Writer]] = {
        "md": lambda: Markdown(columns, heading), "csv": Csv, "json": Json, "jsonl": JsonLines,
    }  # fmt: skip
    if output not in writers:
        raise UsageError(f"the output must be one of {', '.join(OUTPUTS)}, found {shown(output)}")
    return writers[output]()


class Markdown:
    """A table below its heading, at the end: columns are as wide as their widest text."""

    def __init__(self, columns: Sequence[Column], heading: Callable[[list[Row]], str]) -> None:
        self._columns, self._heading = columns, heading
        self._rows: list[Row] = []

    def row(self, row: Row) -> str:
        """Nothing yet."""
        self._rows.append(row)
        return ""

    def end(self) -> str:
        """Heading and table."""
        if not self._rows:
            return ""
        columns = [self._column(column) for column in self._columns]
        lines = [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
        return "\n".join([self._heading(self._rows), "", *lines, ""])

    def _column(self, column: Column) -> list[str]:
        """Title, rule and cells of one column, all of one width."""
        texts = [column.text(row).replace("|", "\\|").replace("\n", " ") for row in self._rows]
        width = max(3, len(column.title), *map(len, texts))
        rule = "-" * (width - 1) + (":" if column.right else "-")
        return [text.rjust(width) if column.right else text.ljust(width) for text in (column.title, rule, *texts)]


class Csv:
    """A line of names, then a line for each row, without what is a list or a dictionary."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def row(self, row: Row) -> str:
        """The row, below the names if it is the first."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        if not self._names:
            self._names = [name for name, value in row.items() if not isinstance(value, (list, dict))]
            lines.writerow(self._names)
        lines.writerow([row[name] for name in self._names])
        return text.getvalue()

    def end(self) -> str:
        """Nothing more."""
        return ""


class Json:
    """One list of objects, at the end."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def row(self, row: Row) -> str:
        """Nothing yet."""
        self._rows.append(row)
        return ""

    def end(self) -> str:
        """The list."""
        return json.dumps(self._rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n" if self._rows else ""


class JsonLines:
    """An object on a line of its own for each row, as it is measured."""

    def row(self, row: Row) -> str:
        """The row."""
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"

    def end(self) -> str:
        """Nothing more."""
        return ""
