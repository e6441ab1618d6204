"""Figures of what happens inside: errors by layer and head, attention by segment."""

from collections.abc import Callable, Sequence
from typing import Any

from ..tables import Row
from .figures import (
    LAYERS,
    LEGEND,
    RELATIVE_ERROR,
    SWEEP,
    Figure,
    Missing,
    Select,
    Spec,
    axis,
    default_policy,
    number,
    params,
    policy_select,
    tip,
)
from .summary import Summary, one_line, weight, weighted

_PARTS = {"both": "keys and values", "k": "keys alone", "v": "values alone"}


def heads(summaries: Sequence[Summary]) -> Figure | Missing:
    """Local errors by layer and head."""
    title = "Errors by layer and head"
    data = {str(s.index): rows for s in summaries if (rows := _errors(s))}
    able = [summary for summary in summaries if str(summary.index) in data]
    if not able:
        return Missing(title, "no row with local errors", f"{SWEEP} --shadow")
    found = {row["part"] for rows in data.values() for row in rows}
    parts = [name for name in _PARTS if name in found]
    part = Select("part", "What is rounded", tuple((_PARTS[name], name) for name in parts))
    text = (
        "How far each head's output is from what it would be had nothing been rounded, its inputs being the same: the "
        "root of the mean square of the difference, over that of the output. Colours span the range of what is shown.",
    )
    spec: Spec = {
        "height": 24 * max(1, *(len(row["errors"]) for rows in data.values() for row in rows)),
        "params": params([part]), "data": {"name": "rows"},
        "transform": [
            {"filter": "datum.part === part"}, {"calculate": "sequence(length(datum.errors))", "as": "heads"},
            {"flatten": ["errors", "heads"], "as": ["error", "head"]},
        ],
        "mark": "rect",
        "encoding": {
            "x": LAYERS,
            "y": axis("head", "head", "ordinal"),
            "color": RELATIVE_ERROR,
            "tooltip": [tip("layer", "layer"), tip("head", "head"), tip("error", "relative error", ".3~g")],
        },
    }  # fmt: skip
    return Figure("heads", title, text, spec, data, (policy_select(able, chosen=default_policy(able)), part))


def _errors(summary: Summary) -> list[Row]:
    """A row for each part and layer, with the errors of its heads: the root of the mean square over the pieces."""
    rows = []
    for part in _PARTS:
        found = [(weight(row), own) for row in summary.rows if (own := (row.get("local_errors") or {}).get(part))]
        if found:
            for layer, errors in enumerate(_together(found, lambda x: x * x, lambda x: x**0.5)):
                rows.append({"part": part, "layer": layer, "errors": errors})
    return rows


def _together(
    found: Sequence[tuple[int, list[list[Any]]]], into: Callable[[float], float], back: Callable[[float], float]
) -> list[list[float | None]]:
    """The weighted mean of matrices of one shape, in other numbers; those of another shape than the first are left out."""
    first = found[0][1]
    same = [(weight, m) for weight, m in found if len(m) == len(first) and len(m[0]) == len(first[0])]
    result = []
    for i, row in enumerate(first):
        means = [weighted((None if m[i][j] is None else into(m[i][j]), w) for w, m in same) for j in range(len(row))]
        result.append([None if mean is None else number(back(mean), 3) for mean in means])
    return result


def mass(summaries: Sequence[Summary]) -> Figure | Missing:
    """Shares of the attention by segment and layer."""
    title = "Where the attention goes"
    data = {str(s.index): rows for s in summaries if (rows := _shares(s))}
    able = [summary for summary in summaries if str(summary.index) in data]
    if not able:
        return Missing(title, "no row with shares of the attention by layer", SWEEP)
    text = (
        "Each layer's attention by what it falls on: the sinks, older tokens (several tiers of age are old, old2, "
        "...), and the recent window. Only what is old has been rounded to few bits.",
    )
    order = list(dict.fromkeys(row["segment"] for rows in data.values() for row in rows))
    order.sort(key=lambda name: (name != "sink", name == "recent", name))
    spec: Spec = {
        "height": 260, "data": {"name": "rows"}, "mark": {"type": "bar"},
        "encoding": {
            "x": LAYERS,
            "y": axis("share", "share of the attention", stack="zero", scale={"domainMax": 1}, axis={"format": "~%"}),
            "color": axis("segment", "", "nominal", scale={"domain": order},
                          legend={**LEGEND, "columns": {"expr": "width < 360 ? 3 : 6"}}),
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [tip("layer", "layer"), tip("segment", "segment"), tip("share", "share", ".1%")],
        },
    }  # fmt: skip
    return Figure("mass", title, text, spec, data, (policy_select(able, chosen=default_policy(able)),))


def _shares(summary: Summary) -> list[Row]:
    found = [(weight(row), own) for row in summary.rows if (own := row.get("mass_by_layer")) and own.get("shares")]
    if not found:
        return []
    names = found[0][1]["names"]
    layers = _together([(w, own["shares"]) for w, own in found if own["names"] == names], float, float)
    return [
        {"layer": layer, "segment": one_line(name), "share": share, "order": i}
        for layer, shares in enumerate(layers)
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
