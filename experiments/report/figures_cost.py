"""Figures of speed and of memory."""

import re
from collections import Counter
from collections.abc import Sequence

from ...models.check import shown
from ...models.errors import UsageError
from ..tables import Row
from .figures import SI_AXIS, SWEEP, WHOLE_AXIS, Figure, Missing, Spec, axis, left_out, lines, number, tip
from .summary import Summary, chosen, one_line

_UNITS = {"b": 1, **{f"{letter}b": 10 ** (3 * i) for i, letter in enumerate("kmgt", 1)},
          **{f"{letter}ib": 1 << (10 * i) for i, letter in enumerate("kmgt", 1)}}  # fmt: skip
_MOST_LINES = 8


def parse_memory(text: str) -> int:
    """Bytes of "8GB" (10^9), "8GiB" (2^30), "512MB"; UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([A-Za-z]+)\s*", text)
    nbytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if not nbytes:
        raise UsageError(f"--memory must be above 0, and like 8GB, 512MB or 8GiB, found {shown(text)}")
    return nbytes


def speed(benches: Sequence[Row], summaries: Sequence[Summary]) -> Figure | Missing:
    """Tokens a second by depth, from rows of ``mixkv bench``, or those of the evaluations where there are none."""
    title = "Speed"
    generating = [row for row in benches if row["n_gen"] and not row.get("n_prompt")]
    if generating:
        return _speed_by_depth(title, generating)
    rows = [
        {"policy": s.label, "bytes": number(s.bytes_old, 6), "rate": number(s.mean("decode_tokens_per_second"))}
        for s in summaries
        if s.bytes_old is not None and s.mean("decode_tokens_per_second") is not None
    ]
    if not rows:
        return Missing(
            title,
            "no rows of `mixkv bench` that generate, and no speed in the others",
            "mixkv bench -p 0 -d 0,4096 --kv f16,k4v4 -o jsonl > bench.jsonl",
        )
    depths = sorted({row["decode_depth"] for s in summaries for row in s.rows if row.get("decode_depth") is not None})
    text = (
        f"Tokens generated a second behind {_range(depths)} tokens, as the evaluations measured it in passing: one run "
        "each, and others may have shared the machine. For speed by depth: mixkv bench -o jsonl.",
    )
    spec: Spec = {
        "height": 280, "data": {"name": "rows"}, "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {
            "x": axis("bytes", "bytes of an old token, all layers", scale={"zero": False}, axis=SI_AXIS),
            "y": axis("rate", "tokens a second", scale={"zero": False}),
            "tooltip": [tip("policy", "policy"), tip("rate", "tokens a second", ".1f"), tip("bytes", "bytes", ",.0f")],
        },
    }  # fmt: skip
    return Figure("speed", title, text, spec, {"": rows})


def _speed_by_depth(title: str, rows: Sequence[Row]) -> Figure:
    """Of the most common model, weights, threads and number of tokens; a line for each cache."""

    def run(row: Row) -> tuple[object, ...]:
        return row["model"], row["weights"], row.get("threads"), row["n_gen"]

    common, _ = Counter(run(row) for row in rows).most_common(1)[0]
    own = [row for row in rows if run(row) == common]
    caches = list(dict.fromkeys(one_line(row["kv"]) for row in own))
    shown_ = caches[:_MOST_LINES]
    data = [
        {
            "kv": one_line(row["kv"]), "depth": row["n_depth"], "rate": number(row["avg_ts"]),
            "low": number(max(row["avg_ts"] - (row.get("stddev_ts") or 0), 0)),
            "high": number(row["avg_ts"] + (row.get("stddev_ts") or 0)),
        }
        for row in own
        if one_line(row["kv"]) in shown_
    ]  # fmt: skip
    model, weights, threads, n_gen = common
    others = len(rows) - len(own)
    text = (
        f"Tokens a second while {n_gen} tokens are generated behind so many others: {model}, weights {weights}, {threads} "
        "threads. Bars are one standard deviation of the repetitions.",
        f"{others} rows of other models, weights, threads or numbers of tokens are left out." if others else "",
        f"{len(caches) - len(shown_)} of {len(caches)} caches are left out." if len(shown_) < len(caches) else "",
    )
    y = axis("rate", "tokens a second", scale={"zero": True})
    tips = [tip("kv", "cache"), tip("depth", "depth", ",.0f"), tip("rate", "tokens a second", ".1f")]
    spec: Spec = {
        "height": 320, "data": {"name": "rows"},
        "encoding": {"x": axis("depth", "tokens in the cache", axis=WHOLE_AXIS)},
        "layer": [
            {"mark": "rule", "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"mark": {"type": "line", "point": {"size": 55}, "strokeWidth": 1.8},
             "encoding": {"y": y, **lines("kv", shown_), "tooltip": tips}},
        ],
    }  # fmt: skip
    return Figure("speed", title, text, spec, {"": data})


def memory(summaries: Sequence[Summary], nbytes: int) -> Figure | Missing:
    """Tokens that fit into so many bytes beside the weights, by policy, and in float16."""
    title = f"What fits in {amount(nbytes)}"
    fits = {s.index: tokens for s in summaries if (tokens := tokens_that_fit(s, nbytes)) is not None}
    able = [summary for summary in summaries if summary.index in fits]
    if not able:
        return Missing(title, "no row with the bytes of a token and of the weights", SWEEP)
    shown_ = chosen(able, 11)
    rows: list[Row] = [{"policy": s.label, "tokens": fits[s.index]} for s in shown_]
    dense = _dense_tokens(able[0], nbytes)
    if dense is not None and not any(s.label == "f16" for s in shown_):
        rows.append({"policy": "all in float16", "tokens": dense})
    context = able[0].first("context")
    text = (
        f"Tokens of context whose cache fits beside the weights ({amount(able[0].rows[0]['parameters_bytes'])}) into "
        f"{amount(nbytes)}, by the bytes of recent and old tokens; buffers of a pass are not counted.",
        f"It is about memory alone: the model was made for {context:,} tokens." if isinstance(context, int) else "",
        "Policies along the front of the mean KL. " + left_out(shown_, summaries),
    )
    longest = max(1, *(row["tokens"] for row in rows))
    room = {
        "domainMax": {"expr": f"{longest} * (width < 480 ? 1.35 : 1.12)"},
        "nice": False,
    }  # for the numbers behind bars
    spec: Spec = {
        "height": 26 * len(rows), "data": {"name": "rows"},
        "encoding": {
            "y": axis("policy", "", "nominal", sort=None, axis={"title": None, "labelLimit": 130}),
            "x": axis("tokens", "tokens", axis=SI_AXIS, scale=room),
            "tooltip": [tip("policy", "policy"), tip("tokens", "tokens", ",.0f")],
        },
        "layer": [
            {"mark": {"type": "bar"}},
            {"mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 11},
             "encoding": {"text": {"field": "tokens", "type": "quantitative", "format": ".3~s"}}},
        ],
    }  # fmt: skip
    return Figure("memory", title, text, spec, {"": rows})


def tokens_that_fit(summary: Summary, nbytes: int) -> int | None:
    """Tokens whose cache fits into so many bytes beside the weights; None where the row does not say what they take.

    Sinks, window and one more tile count as recent tokens, all others as tokens of the oldest tier.
    """
    row = summary.rows[0]
    old, recent, parameters = summary.bytes_old, row.get("kv_bytes_per_recent_token"), row.get("parameters_bytes")
    if not old or not recent or parameters is None or old < 0 or recent < 0:
        return None
    room = max(nbytes - parameters, 0)
    dense = sum(row.get(name) or 0 for name in ("window", "sinks", "tile"))
    return int(room / recent if dense * recent >= room else dense + (room - dense * recent) / old)


def _dense_tokens(summary: Summary, nbytes: int) -> int | None:
    """The same for a cache of float16; None where the shape of the model is not known."""
    row = summary.rows[0]
    layers, heads, head_dim = (row.get(name) or 0 for name in ("n_layers", "n_kv_heads", "head_dim"))
    values = 2 * layers * heads * head_dim
    return max(nbytes - row["parameters_bytes"], 0) // (2 * values) if values else None


def amount(nbytes: float) -> str:
    """Bytes as people say them: 8 GB, 537.9 MB."""
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes")) if nbytes >= size
    )
    return f"{nbytes / (size or 1):.4g} {unit}"


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return "an unknown number of"
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
