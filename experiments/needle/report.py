"""Rows of ``needle`` as people read them: what was found by length and depth, how sure that is, what it does not say."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from .. import machine
from ..tables import Column, Markdown, Row, Writer, make_writer

NORMAL_95 = 1.959963984540054  # 97.5 % of the normal distribution lie below
UNSEEN = (
    "What this does not see: a policy may find every key and still be far from the reference, so look at the KL column "
    "and at `mixkv eval`; and where the reference itself misses a key, a miss says nothing about the cache, which is why "
    "such trials are counted apart."
)


def wilson(found: int, trials: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson's score interval of a fraction: all p with |found / trials - p| <= z * sqrt(p (1 - p) / trials).

    E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.

    Args:
        found: from 0 to ``trials``.
        trials: 1 or more, as if independent of each other.
        z: standard deviations; those of 95 % unless given.

    """
    rate, part = found / trials, z * z / trials
    middle = (rate + part / 2) / (1 + part)
    half = z / (1 + part) * math.sqrt(rate * (1 - rate) / trials + part / (4 * trials))
    return max(0.0, middle - half) if found else 0.0, min(1.0, middle + half) if found < trials else 1.0


def writer(output: str) -> Writer:
    """The writer of a format: aggregated tables for "md", rows for the others; UsageError for one that there is not."""
    return Tables() if output == "md" else make_writer(output, (), lambda rows: "")


class Tables:
    """Markdown, at the end: a table length x depth for the reference and each policy, and one line for each below."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def row(self, row: Row) -> str:
        """Nothing yet."""
        self._rows.append(row)
        return ""

    def end(self) -> str:
        """All tables."""
        if not self._rows:
            return ""
        groups = _by(self._rows, lambda row: row["policy"])
        first: dict[object, Row] = {}
        for row in self._rows:
            first.setdefault((row["length"], row["depth"], row["trial"]), row)
        reference = [_of_reference(row) for row in first.values()]
        parts = [_heading(self._rows), _grid(reference, "Found by the reference")]
        parts += [_grid(rows, f"Found with {rows[0]['spec']}") for rows in groups]
        parts += [_table([_summary(rows) for rows in (reference, *groups)], SUMMARY), UNSEEN]
        return "\n\n".join(parts) + "\n"


def _by(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    """Rows in groups of the same key, in the order in which they come."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _of_reference(row: Row) -> Row:
    """The row that the reference itself would have, its policy's name being "reference"."""
    return {
        **row, "spec": "reference", "policy": "reference",
        "correct": row["reference_correct"], "nll": row["nll_reference"], "kld": 0.0,
    }  # fmt: skip


def _heading(rows: Sequence[Row]) -> str:
    row = rows[0]
    trials = max(row["trial"] for row in rows) + 1
    keys = f", {row['keys']} keys" if row["task"] == "multikey" else ""
    lines = [
        machine.described(row),
        f"{row['model']}, weights {row['weights']}; reference: a cache of float32, weights {row['reference_weights']}",
        f"task {row['task']}{keys}, {'chat template' if row['chat'] else 'plain text'}, text {row['document']}, "
        f"seed {row['seed']}; trials for each length and depth: {trials}",
    ]
    return "\n".join(f"{line}  " for line in lines)


def _table(rows: Iterable[Row], columns: Sequence[Column], title: str = "") -> str:
    table = Markdown(columns, lambda _: title)
    for row in rows:
        table.row(row)
    return table.end().strip("\n")


def _grid(rows: Sequence[Row], title: str) -> str:
    """The fraction of keys that were found, lengths down, depths across."""
    depths = list(dict.fromkeys(row["depth"] for row in rows))

    def cell(depth: float) -> Callable[[Row], str]:
        return lambda line: _fraction([row["correct"] for row in line["rows"] if row["depth"] == depth])

    columns = [Column("length \\ depth", lambda line: str(line["length"]))]
    columns += [Column(f"{depth:g}", cell(depth)) for depth in depths]
    lines = [{"length": each[0]["length"], "rows": each} for each in _by(rows, lambda row: row["length"])]
    return _table(lines, columns, f"{title}:")


def _summary(rows: Sequence[Row]) -> Row:
    """What all rows of one policy say together. A number that is missing in one of them is infinite."""
    correct = [row["correct"] for row in rows]
    return {
        "policy": rows[0]["spec"],
        "correct": correct,
        "interval": wilson(sum(correct), len(correct)),
        "kept": [row["correct"] for row in rows if row["reference_correct"]],
        "apart": [row["correct"] for row in rows if not row["reference_correct"]],
        "nll": _mean(row["nll"] for row in rows),
        "nll_reference": _mean(row["nll_reference"] for row in rows),
        "kld": _mean(row["kld"] for row in rows),
        "kld_max": max(_numbers(row["kld"] for row in rows)),
    }


def _numbers(values: Iterable[float | None]) -> Iterator[float]:
    return (math.inf if value is None else value for value in values)


def _mean(values: Iterable[float | None]) -> float:
    numbers = list(_numbers(values))
    return sum(numbers) / len(numbers)


def _fraction(found: Sequence[bool]) -> str:
    """A fraction as a percentage, a dash for one of nothing."""
    return f"{100 * sum(found) / len(found):.0f} %" if found else "-"


def _count(found: Sequence[bool]) -> str:
    return f"{sum(found)}/{len(found)}"


SUMMARY = (
    Column("policy", lambda row: row["policy"], right=False),
    Column("found", lambda row: f"{_count(row['correct'])} = {100 * sum(row['correct']) / len(row['correct']):.1f} %"),
    Column("95 % interval", lambda row: "{:.1f} - {:.1f} %".format(*(100 * end for end in row["interval"]))),
    Column("of those the reference found", lambda row: _count(row["kept"])),
    Column("apart: of those it missed", lambda row: _count(row["apart"])),
    Column("nll", lambda row: f"{row['nll']:.4g}"),
    Column("reference nll", lambda row: f"{row['nll_reference']:.4g}"),
    Column("mean KL", lambda row: f"{row['kld']:.3g}"),
    Column("largest KL", lambda row: f"{row['kld_max']:.3g}"),
)
