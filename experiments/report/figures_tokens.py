"""What single predictions cost: their distribution, and the worst of them."""

import math
from collections.abc import Sequence

from ..tables import Row
from .figures import LEGEND, SWEEP, Figure, Missing, Spec, axis, default_policy, number, policy_select, tip
from .summary import Summary


def distribution(summaries: Sequence[Summary]) -> Figure | Missing:
    """Histograms of the KL of single predictions, of two policies."""
    title = "Distribution of the divergence"
    data = {str(s.index): rows for s in summaries if (rows := _histogram(s))}
    able = [summary for summary in summaries if str(summary.index) in data]
    if not able:
        return Missing(title, "no row with a histogram of the KL", SWEEP)
    first = default_policy(able)
    worst = min(able, key=lambda s: s.bytes_old or math.inf)
    selects = (policy_select(able, "Policy", first), policy_select(able, "Beside", worst))
    text = (
        "How the KL of single predictions is spread: the share of all predictions in each bin of a logarithmic axis. "
        "The leftmost step holds all that is smaller still.",
    )
    colour = axis("policy", "", "nominal", legend=LEGEND, sort=None)
    spec: Spec = {
        "height": 280, "data": {"name": "rows"},
        "mark": {"type": "area", "interpolate": "step-after", "line": True, "fillOpacity": 0.22},
        "encoding": {
            "x": axis("kl", "KL of a prediction (nats)", scale={"type": "log", "nice": False},
                      axis={"format": "~e", "tickCount": 7}),
            "y": axis("share", "share of predictions", stack=None, axis={"format": "~%"}),
            "color": colour,
            "tooltip": [tip("policy", "policy"), tip("kl", "KL from", ".2~g"), tip("share", "share", ".2%")],
        },
    }  # fmt: skip
    return Figure("distribution", title, text, spec, data, selects)


def _histogram(summary: Summary) -> list[Row]:
    """Steps of the pieces' histograms, added up where they have the bins of the first."""
    found = [row["histogram"] for row in summary.rows if row.get("histogram")]
    if not found:
        return []
    first = found[0]
    same = [h for h in found if all(h[name] == first[name] for name in ("low", "high", "per_decade"))]
    counts = [
        sum(h.get("below") or 0 for h in same),
        *(sum(each) for each in zip(*(h["counts"] for h in same), strict=True)),
    ]
    total = sum(counts)
    used = [i for i, count in enumerate(counts) if count]
    if not total:
        return []
    ends = range(max(used[0] - 1, 0), min(used[-1] + 3, len(counts) + 1))
    return [
        {
            "policy": summary.label, "kl": number(10 ** (first["low"] + (i - 1) / first["per_decade"])),
            "share": number((counts[i] if i < len(counts) else 0) / total),
        }
        for i in ends
    ]  # fmt: skip


def worst_tokens(summary: Summary, most: int = 12) -> list[Row]:
    """The predictions of the largest KL of all pieces, largest first."""
    every = [{**item, "document": row["document"]} for row in summary.rows for item in row.get("worst") or []]
    return sorted(every, key=lambda item: -(item.get("kld") or 0))[:most]
