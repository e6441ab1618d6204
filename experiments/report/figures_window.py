"""Figures of how large a window must be."""

from collections.abc import Sequence

from ..tables import Row
from .figures import LAYERS, RELATIVE_ERROR, Figure, Missing, Select, Spec, axis, lines, number, tip
from .summary import one_line, values


def window(rows: Sequence[Row]) -> Figure | Missing:
    """The local error by the size of the window, a line a document and policy."""
    title = "How large a window"
    if not rows:
        return Missing(title, "no rows of kind window-curve", "mixkv window-curve -o jsonl > window.jsonl")
    names = _names(rows)
    data = [
        {"name": name, "window": size, "error": number(error), "bytes": number(nbytes, 6)}
        for row, name in zip(rows, names, strict=True)
        for size, error, nbytes in zip(row["windows"], row["errors"], _bytes(row), strict=True)
        if error is not None
    ]
    if not data:
        return Missing(title, "no error in the rows of kind window-curve", "mixkv window-curve -o jsonl > window.jsonl")
    text = (
        "The error of attention in all layers, relative to its output, if so many recent tokens stay at high "
        "precision. Where the curve is flat, a larger window buys nothing.",
    )
    sizes = sorted({row["window"] for row in data})
    spec: Spec = {
        "height": 300, "data": {"name": "rows"}, "mark": {"type": "line", "point": {"size": 55}, "strokeWidth": 1.8},
        "encoding": {
            "x": axis("window", "window (tokens)", scale={"type": "symlog", "constant": 32},
                      axis={"values": sizes, "labelOverlap": True, "format": "~d"}),
            "y": axis("error", "relative error", axis={"format": "~g"}), **lines("name", names),
            "tooltip": [tip("name", "text"), tip("window", "window", "~d"), tip("error", "relative error", ".4~g"),
                        tip("bytes", "bytes a token", ",.0f")],
        },
    }  # fmt: skip
    return Figure("window", title, text, spec, {"": data})


def window_layers(rows: Sequence[Row]) -> Figure | None:
    """The same by layer; None where no row has it."""
    able = [(i, row) for i, row in enumerate(rows) if row.get("by_layer")]
    if not able:
        return None
    names = _names(rows)
    data = {
        str(i): [
            {"window": size, "layer": layer, "error": number(error, 3)}
            for size, layers in zip(row["windows"], row["by_layer"], strict=True)
            for layer, error in enumerate(layers)
        ]
        for i, row in able
    }
    spec: Spec = {
        "height": 30 * max(len(row["windows"]) for _, row in able), "data": {"name": "rows"}, "mark": "rect",
        "encoding": {
            "x": LAYERS,
            "y": axis("window", "window", "ordinal", sort="descending"),
            "color": RELATIVE_ERROR,
            "tooltip": [tip("layer", "layer"), tip("window", "window"), tip("error", "relative error", ".3~g")],
        },
    }  # fmt: skip
    select = Select("", "Text", tuple((names[i], str(i)) for i, _ in able))
    text = ("The same by layer: which layers need the window.",)
    return Figure("window-layers", "How large a window, by layer", text, spec, data, (select,))


def _bytes(row: Row) -> list[float | None]:
    """Of a token of the cache, by window."""
    return row.get("kv_bytes_per_token") or [None] * len(row["windows"])


def _names(rows: Sequence[Row]) -> list[str]:
    """What tells the rows of window curves apart: the document, and whatever else differs."""
    others = [name for name in ("model", "weights", "policy", "tokens") if len(values(rows, name)) > 1]
    names = [", ".join([one_line(row["document"]), *(one_line(row.get(name)) for name in others)]) for row in rows]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
