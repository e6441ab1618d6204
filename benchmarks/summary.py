"""What `engines.py` found, as tables in Markdown."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

Row = dict[str, Any]
NONE = "-"


def table(head: list[str], rows: list[list[str]], words: int) -> str:
    """A table; the first ``words`` columns are set to the left, figures to the right."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rates(rows: list[Row]) -> dict[tuple[str, float, str], dict[int, float]]:
    """Tokens a second by (test, bits, engine) and round."""
    found: dict[tuple[str, float, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if "error" not in row:
            found[row["test"], row["bits"], row["engine"]][row["round"]] = row["tokens_per_second"]
    return found


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The median of the rounds' ratios, of rounds that both have; above 1, ours is faster."""
    both = [ours[i] / theirs[i] for i in ours if i in theirs]
    return median(both) if both else None


def best(candidates: list[dict[int, float]]) -> dict[int, float]:
    """Who has the highest median."""
    return max((x for x in candidates if x), key=lambda x: median(x.values()), default={})


def shown(value: float | None, form: str = ".2f") -> str:
    """A figure in a cell."""
    return NONE if value is None else format(value, form)


def in_order(rows: list[Row], name: str) -> list[Any]:
    """The values of a column, each once, as they first come."""
    return list(dict.fromkeys(row[name] for row in rows))


def ratio_table(rows: list[Row], engines: list[str], absent: Mapping[str, str]) -> str:
    """Tokens/s, the medians of the rounds, and ours (the first of ``engines``) as a multiple of each peer's.

    ``absent`` says why there is nothing of an engine.

    The best peer is looked for among those of as many bits as ours, and in the last column among all of the test's.
    """
    ours, *peers = engines
    found, kvs = rates(rows), defaultdict(dict)
    for row in rows:
        kvs[row["bits"]][row["engine"]] = row["kv"]
    head = ["test", "KV: " + ", ".join(engines), *engines]
    head += [f"{ours} / {peer}" for peer in peers] + [f"{ours} / best", f"{ours} / best at any KV"]
    lines = []
    for test in in_order(rows, "test"):
        everybody = best([rate for (t, _, name), rate in found.items() if t == test and name != ours])
        for level in sorted({row["bits"] for row in rows if row["test"] == test}, reverse=True):
            mine = found.get((test, level, ours), {})
            theirs = [found.get((test, level, peer), {}) for peer in peers]
            names = ", ".join(kvs[level].get(name, NONE) for name in engines)
            cells = [absent.get(name, NONE) for name in engines]
            for i, rate in enumerate([mine, *theirs]):
                if rate:
                    cells[i] = f"{median(rate.values()):.1f}"
            ratios = [ratio(mine, rate) for rate in [*theirs, best(theirs), everybody]]
            lines.append([test, names, *cells, *map(shown, ratios)])
    return table(head, lines, 2)


def spread_table(rows: list[Row]) -> str:
    """Every contender by itself: its rounds' extremes, its memory, the loading of its model."""
    lines = []
    groups = defaultdict(list)
    for row in rows:
        groups[row["engine"], row["kv"], row["test"]].append(row)
    for (name, kv, test), group in groups.items():
        good = [row for row in group if "error" not in row]
        if len(good) < len(group):
            lines.append([name, kv, test, "failed", *[NONE] * 5])
        if good:
            rate = [row["tokens_per_second"] for row in good]
            peak, load = max(row["peak_bytes"] for row in good), median(row["load_seconds"] for row in good)
            figures = [f"{x:.1f}" for x in (median(rate), min(rate), max(rate))]
            lines.append([name, kv, test, *figures, str(len(good)), f"{peak / 1e6:.0f}", f"{load:.1f}"])
    head = ["engine", "KV", "test", "median tokens/s", "lowest", "highest", "rounds", "peak MB", "load s"]
    return table(head, lines, 3)


def check_table(rows: list[Row], ours: str) -> str:
    """The first tokens of everybody's answer, and how many of them are those of ours with the most bits."""
    yardstick: dict[str, list[int]] = {}
    first: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if "error" not in row:
            first.setdefault((row["test"], row["engine"], row["kv"]), row)
    for (test, name, _), row in sorted(first.items(), key=lambda item: item[1]["bits"]):
        if name == ours:
            yardstick[test] = row["ids"]
    lines = []
    for row in first.values():
        wanted = yardstick.get(row["test"], [])
        pairs = list(zip(row["ids"], wanted, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        ids = " ".join(map(str, row["ids"]))
        lines.append([row["test"], row["engine"], row["kv"], f"{same} of {len(row['ids'])}" if wanted else NONE, ids])
    return table(["test", "engine", "KV", f"as {ours}", "first token ids"], lines, 5)


def quality_table(rows: list[Row]) -> str:
    """How far from float32, in nats."""
    head = ["engine", "KV", "mean KL", "median", "99 %", "max", "same top token", "perplexity", "of float32"]
    lines = []
    for row in rows:
        found = row.get("quality")
        if not found:
            lines.append([row["engine"], row["kv"], "failed", *[NONE] * 6])
            continue
        figures = [f"{found[name]:.3g}" for name in ("mean", "median", "p99", "max")]
        perplexities = [f"{found[name]:.3f}" for name in ("perplexity", "reference_perplexity")]
        lines.append([row["engine"], row["kv"], *figures, f"{found['same_top']:.1%}", *perplexities])
    return table(head, lines, 2)
