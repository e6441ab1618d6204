"""Every format, read back by a parser that is not ours."""

import csv
import io
import json
from typing import Any

import pytest

from mixkv.experiments.tables import OUTPUTS, Column, make_writer
from mixkv.models.errors import UsageError

ROWS: list[dict[str, Any]] = [
    {"name": 'a "quoted", ünïcode | name', "count": 3, "rate": 0.1, "nothing": None, "samples": [1, 2]},
    {"name": "b\nc", "count": -1, "rate": 1e300, "nothing": 2.5, "samples": []},
]
COLUMNS = (
    Column("name", lambda row: row["name"], right=False),
    Column("how many there are", lambda row: str(row["count"])),
    Column("x", lambda row: f"{row['rate']:.2g}"),
)


def heading(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)} rows"


def written(output: str, rows: list[dict[str, Any]]) -> list[str]:
    """What is printed with each row, and at the end."""
    writer = make_writer(output, COLUMNS, heading)
    return [*(writer.row(row) for row in rows), writer.end()]


def test_json_is_one_list_at_the_end() -> None:
    *early, text = written("json", ROWS)
    assert early == ["", ""] and json.loads(text) == ROWS and text.endswith("]\n")


def test_json_lines_come_with_their_rows() -> None:
    *lines, end = written("jsonl", ROWS)
    assert [json.loads(line) for line in lines] == ROWS and end == ""
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines)


def test_csv_comes_with_its_rows_and_without_lists() -> None:
    first, second, end = written("csv", ROWS)
    assert end == "" and first.startswith("name,count,rate,nothing\n")
    found = list(csv.DictReader(io.StringIO(first + second, newline="")))
    assert [row["name"] for row in found] == [row["name"] for row in ROWS]
    assert [float(row["rate"]) for row in found] == [0.1, 1e300]
    assert [row["nothing"] for row in found] == ["", "2.5"]


def test_markdown_is_a_table_below_its_heading_at_the_end() -> None:
    *early, text = written("md", ROWS)
    assert early == ["", ""]
    assert text.split("\n") == [
        "2 rows",
        "",
        r'| name                        | how many there are |      x |',
        r'| --------------------------- | -----------------: | -----: |',
        r'| a "quoted", ünïcode \| name |                  3 |    0.1 |',
        r'| b c                         |                 -1 | 1e+300 |',
        "",
    ]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_rows_make_no_text(output: str) -> None:
    assert written(output, []) == [""]


@pytest.mark.parametrize("output", ["", "sql", "MD", "x" * 5000])
def test_an_output_that_is_none_is_refused(output: str) -> None:
    with pytest.raises(UsageError, match="md, csv, json, jsonl, found '") as caught:
        make_writer(output, COLUMNS, heading)
    assert len(str(caught.value)) < 200
