"""The figure that a report begins with: the divergence of all policies against their bytes, and which are the best."""

import math
from collections.abc import Sequence

from ..tables import Row
from .figures import LOG_AXIS, SI_AXIS, SWEEP, Figure, Missing, Select, Spec, axis, number, params
from .summary import QUANTILES, Summary, front


def pareto(summaries: Sequence[Summary]) -> Figure | Missing:
    """KL against the bytes of the whole cache a token, with the front."""
    title = "Divergence against bytes"
    rows, drawn = [], set[int]()
    for name in QUANTILES:
        points = [s for s in summaries if s.bytes_token is not None and (s.kl[name] or 0) > 0]
        best = front(points, lambda s, name=name: s.kl[name])  # type: ignore[misc]
        indices, named = {summary.index for summary in best}, _apart(points, best, name)
        drawn |= {summary.index for summary in points}
        rows += [_point(summary, name, summary.index in indices, summary.index in named) for summary in points]
    if not rows:
        return Missing(title, "no row with the bytes of a cache and a KL above 0", SWEEP)
    found = dict.fromkeys(str(row["measure"]) for row in rows)
    select = Select("measure", "KL of a prediction", tuple((QUANTILES[name], name) for name in found))
    without = len(summaries) - len(drawn)
    text = (
        "The lower and the further left, the better. Filled points, which the line joins, are the front: no other "
        "policy is better in both. Hover over a point, or tap it, for what it is and the command that measures it again.",
        "Bytes are those of the whole cache over the tokens in it, window and sinks included: behind a longer text a "
        "window costs less.",
        _averaged(summaries),
        "Bars are one standard error of the mean." if any(s.kl["se"] for s in summaries) else "",
        f"{without} policies are not drawn: their bytes are unknown, or their KL is 0 or unknown." if without else "",
    )
    return Figure("pareto", title, text, _pareto_spec(select, rows), {"": rows}, (select,))


def _point(summary: Summary, name: str, best: bool, is_named: bool) -> Row:
    kl, error = summary.kl[name], summary.kl["se"] if name == "mean" else None
    assert kl is not None
    bars = {"low": number(max(kl - (error or 0), kl / 10)), "high": number(kl + (error or 0))}
    return {
        "index": summary.index, "policy": summary.label, "measure": name, "bytes": number(summary.bytes_token, 6),
        "bits": number(summary.mean("bits_per_value")), "kl": number(kl), **bars, "front": best,
        "command": _commands(summary), **({"name": _short(summary.label)} if is_named else {}),
    }  # fmt: skip


def _commands(summary: Summary) -> str:
    """The command of a point; of several pieces the first, and how many more there are below the figure."""
    more = len(summary.commands) - 1
    return (summary.commands[0] if summary.commands else "") + (f" (and {more} more below)" if more > 0 else "")


def _short(label: str) -> str:
    return label if len(label) <= 22 else label[:20] + "…"


def _apart(points: Sequence[Summary], best: Sequence[Summary], name: str) -> set[int]:
    """Indices of the points of a front whose names have room: none is written over the one before."""
    logs = [math.log(summary.kl[name] or 1) for summary in points]
    wide = [summary.bytes_token or 0 for summary in points]
    named: list[tuple[float, float, int]] = []
    for summary in best:
        y, x = math.log(summary.kl[name] or 1), summary.bytes_token or 0
        far = [
            (abs(x - x0) / (max(wide) - min(wide) or 1), abs(y - y0) / (max(logs) - min(logs) or 1))
            for x0, y0, _ in named
        ]
        if all(dx > 0.25 or dy > 0.055 for dx, dy in far):
            named.append((x, y, summary.index))
    return {index for _, _, index in named}


def _pareto_spec(select: Select, rows: Sequence[Row]) -> Spec:
    least, most = (end(row["bytes"] for row in rows) for end in (min, max))
    left = max(least - 0.2 * (most - least), 0)  # room for names
    x = axis(
        "bytes", "bytes of the cache a token", axis=SI_AXIS,
        scale={"zero": False, "domainMin": {"expr": f"width < 480 ? {least} : {left}"}, "padding": 12},
    )  # fmt: skip
    y = axis("kl", "KL divergence (nats)", scale={"type": "log"}, axis=LOG_AXIS)
    on = "pointerover,click"
    near = {"name": "near", "select": {"type": "point", "nearest": True, "fields": ["index"], "on": on, "clear": False}}
    # For ``nearest`` Vega-Lite draws cells, whose datum is a point, and forgets that for texts in tooltips.
    own = "(datum.datum || datum)"
    numbers = {"KL": ("kl", ".4~g"), "bytes": ("bytes", ",.0f"), "bits a value": ("bits", ".2f")}
    facts = ", ".join(f"'{title}': format({own}.{name}, '{form}')" for title, (name, form) in numbers.items())
    tips = {"expr": f"{{'policy': {own}.policy, {facts}, 'command': {own}.command}}"}
    hit, best = {"param": "near", "empty": False, "value": 1}, {"test": "datum.front", "value": 1}
    return {
        "height": 400, "params": params([select]), "data": {"name": "rows"},
        "transform": [{"filter": "datum.measure === measure"}], "encoding": {"x": x},
        "layer": [
            {"transform": [{"filter": "datum.front"}], "encoding": {"y": y},
             "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8}},
            {"mark": "rule", "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "opacity": 1, "style": "ring"}, "encoding": {
                "y": y, "fillOpacity": {"condition": best, "value": 0},
                "strokeOpacity": {"condition": [hit, best], "value": 0.55},
                "size": {"condition": {**hit, "value": 260}, "value": 70}}},
            {"transform": [{"filter": "isValid(datum.name)"}],
             "mark": {"type": "text", "align": "right", "baseline": "top", "dx": -6, "dy": 5, "fontSize": 11,
                      "opacity": {"expr": "width < 480 ? 0 : 1"}},
             "encoding": {"y": y, "text": {"field": "name"}}},
            {"params": [near], "mark": {"type": "point", "opacity": 0, "size": 300, "tooltip": tips},
             "encoding": {"y": y, "description": {"field": "policy", "type": "nominal"}}},
        ],
    }  # fmt: skip


def _averaged(summaries: Sequence[Summary]) -> str:
    """What is to be said of policies that were measured on several pieces; "" where each was on one."""
    counts = sorted({len(summary.rows) for summary in summaries})
    if counts == [1]:
        return ""
    how_many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"Each policy's {how_many} pieces of text are averaged, weighted by their predictions; a quantile is the mean "
        "of the pieces' quantiles, the largest KL that of all pieces."
    )
