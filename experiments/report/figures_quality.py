"""Figures of what policies cost: by bits of keys and values, and by distance."""

import math
from collections import Counter
from collections.abc import Sequence

from ..tables import Row
from .figures import LOG_AXIS, SWEEP, Figure, Missing, Spec, axis, cell_text, left_out, lines, number, tip
from .summary import Summary, chosen, weighted

_FIXED = (
    "window", "sinks", "tile", "dense", "k_axis", "v_axis", "k_group", "v_group", "rotate_k", "rotate_v", "scales",
)  # fmt: skip
_SAME = (*_FIXED, "model", "weights", "reference_weights", "regime")


def bits(summaries: Sequence[Summary]) -> Figure | Missing:
    """Mean KL by bits of keys and of values, all else the same."""
    title = "Bits of keys, bits of values"
    plain = [
        s
        for s in summaries
        if s.first("n_tiers") == 1 and not s.first("n_overrides") and s.kl["mean"] is not None
        and s.first("k_bits") is not None and s.first("v_bits") is not None
    ]  # fmt: skip
    combos = Counter(tuple(s.first(name) for name in _SAME) for s in plain)
    if not combos:
        return Missing(title, "no row of a policy with one tier and no overrides", SWEEP)
    fixed, count = combos.most_common(1)[0]
    if count < 2:
        return Missing(title, "no two policies that differ in the bits alone", f"{SWEEP} --k-bits 2,3,4 --v-bits 2,3,4")
    own = [s for s in plain if tuple(s.first(name) for name in _SAME) == fixed]
    logs = [math.log(max(s.kl["mean"] or 0, 1e-12)) for s in own]
    middle = (min(logs) + max(logs)) / 2
    rows = [
        {
            "k": s.first("k_bits"), "v": s.first("v_bits"), "kl": number(s.kl["mean"]), "level": number(math.exp(log)),
            "policy": s.label, "dark": log < middle,
        }
        for s, log in zip(own, logs, strict=True)
    ]  # fmt: skip
    words = [f"{name} {_word(value)}" for name, value in zip(_FIXED, fixed, strict=False) if value is not None]
    text = (
        f"Mean KL where everything else is the same: {', '.join(words)}.",
        f"The most common of {len(combos)} such combinations." if len(combos) > 1 else "",
        left_out(own, summaries),
    )
    height = max(48 * len({row["v"] for row in rows}), 120)
    return Figure("bits", title, text, {"height": height, **_bits_spec()}, {"": rows})


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _bits_spec() -> Spec:
    cell = {"x": axis("k", "bits of keys", "ordinal", axis={"labelAngle": 0, "orient": "bottom"}),
            "y": axis("v", "bits of values", "ordinal", sort="descending")}  # fmt: skip
    colour = axis("level", "mean KL", scale={"type": "log"}, legend=None)
    tips = [tip("policy", "policy"), tip("kl", "mean KL", ".4~g")]
    return {
        "data": {"name": "rows"}, "encoding": cell,
        "layer": [
            {"mark": "rect", "encoding": {"color": colour, "tooltip": tips}},
            {"mark": "text", "encoding": {
                "text": {"field": "kl", "type": "quantitative", "format": ".2~g"}, "color": cell_text("datum.dark")}},
        ],
    }  # fmt: skip


def distance(summaries: Sequence[Summary]) -> Figure | Missing:
    """Mean KL by how far the text reaches behind the window, a line a policy."""
    title = "Divergence by distance"
    able = [summary for summary in summaries if any(row.get("by_distance") for row in summary.rows)]
    shown = chosen(able)
    rows = [row for summary in shown for row in _distances(summary)]
    if not rows:
        return Missing(title, "no row with a KL by distance above 0", SWEEP)
    text = (
        "Mean KL by how many tokens lie behind the window's edge when a token is predicted. The further right, the "
        "more of what is seen has been rounded; as long as there are none, nothing has.",
        "Policies along the front of the mean KL. " + left_out(shown, summaries),
    )
    order = list(dict.fromkeys(row["tokens"] for row in sorted(rows, key=lambda row: row["to"])))
    spec: Spec = {
        "height": 340, "data": {"name": "rows"}, "mark": {"type": "line", "point": {"size": 55}, "strokeWidth": 1.8},
        "encoding": {
            "x": axis("tokens", "tokens behind the window", "ordinal", sort=order, axis={"labelAngle": -40}),
            "y": axis("kl", "mean KL (nats)", scale={"type": "log"}, axis=LOG_AXIS),
            **lines("policy", [s.label for s in shown]),
            "tooltip": [tip("policy", "policy"), tip("tokens", "behind the window"), tip("kl", "mean KL", ".4~g"),
                        tip("predictions", "predictions", ",.0f")],
        },
    }  # fmt: skip
    return Figure("distance", title, text, spec, {"": rows})


def _distances(summary: Summary) -> list[Row]:
    """Of each bucket the mean over the pieces, weighted by its tokens; without those of no KL, which a log axis has not."""
    every = [bucket for row in summary.rows for bucket in row.get("by_distance") or []]
    rows = []
    ends = {(bucket.get("from"), bucket.get("to")) for bucket in every if bucket.get("to") is not None}
    for low, high in sorted(ends, key=lambda end: end[1]):
        own = [b for b in every if (b.get("from"), b.get("to")) == (low, high)]
        kl = weighted((b.get("kld"), b.get("tokens") or 1) for b in own)
        if kl is not None and kl > 0:
            name = "none" if low is None else f"{low}–{high}"
            tokens = sum(b.get("tokens") or 0 for b in own)
            rows.append({"policy": summary.label, "to": high, "tokens": name, "kl": number(kl), "predictions": tokens})
    return rows
