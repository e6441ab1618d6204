"""The figure of needles in a haystack."""

from collections.abc import Sequence

from ..tables import Row
from .figures import Figure, Missing, Select, Spec, axis, cell_text, number, params, tip
from .summary import one_line, short, values, weighted


def needles(rows: Sequence[Row]) -> Figure | Missing:
    """How often what was hidden in a text is found again, by length and depth."""
    title = "Needles in a haystack"
    if not rows:
        return Missing(title, "no rows of kind needle", "mixkv needle -o jsonl > needles.jsonl")
    labels = _labels(rows)
    names, tasks = list(dict.fromkeys(labels)), [str(task) for task in values(rows, "task")]
    data = {str(i): _cells(name, rows, labels) for i, name in enumerate(names)}
    selects = (
        Select("", "Policy", tuple((name, str(i)) for i, name in enumerate(names)), _fewest(rows, labels, names)),
        Select("task", "Task", tuple((one_line(task), one_line(task)) for task in tasks)),
    )
    text = (
        "The share of answers that were right, by the length of the text and how far down in it the answer stands (0: "
        "at its beginning).",
    )
    cell = {"x": axis("length", "tokens", "ordinal", axis={"labelAngle": 0}),
            "y": axis("depth", "depth", "ordinal")}  # fmt: skip
    tips = [
        tip("length", "tokens"),
        tip("depth", "depth"),
        tip("right", "right"),
        tip("nll", "nats a token of the answer", ".3~g"),
    ]
    colour = axis("share", "share", scale={"domain": [0, 1]}, legend=None)
    spec: Spec = {
        "height": max(40 * len(values(rows, "depth")), 80), "params": params(selects), "data": {"name": "rows"},
        "transform": [{"filter": "datum.task === task"}], "encoding": cell,
        "layer": [
            {"mark": "rect", "encoding": {"color": colour, "tooltip": tips}},
            {"mark": "text", "encoding": {"text": {"field": "right"}, "color": cell_text("datum.share < 0.6")}},
        ],
    }  # fmt: skip
    return Figure("needles", title, text, spec, data, selects)


def _labels(rows: Sequence[Row]) -> list[str]:
    """The policy of each needle row, with the weights where these differ."""
    others = [name for name in ("model", "weights") if len(values(rows, name)) > 1]
    return [", ".join([short(row["spec"]), *(one_line(row.get(name)) for name in others)]) for row in rows]


def _fewest(rows: Sequence[Row], labels: Sequence[str], names: Sequence[str]) -> int:
    """The place among ``names`` of the policy with the smallest share of right answers: there is most to see."""
    found = [[row["correct"] for row, label in zip(rows, labels, strict=True) if label == name] for name in names]
    shares = [sum(correct) / len(correct) for correct in found]
    return shares.index(min(shares))


def _cells(name: str, rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """A row for each task, length and depth of a policy."""
    groups: dict[tuple[str, int, float], list[Row]] = {}
    for row, label in zip(rows, labels, strict=True):
        if label == name:
            groups.setdefault((row["task"], row["length"], row["depth"]), []).append(row)
    return [
        {
            "task": one_line(task), "length": length, "depth": depth, "share": number(right / len(own)),
            "right": f"{right}/{len(own)}", "nll": number(weighted((row.get("nll"), 1) for row in own)),
        }
        for (task, length, depth), own in sorted(groups.items())
        for right in [sum(row["correct"] for row in own)]
    ]  # fmt: skip
