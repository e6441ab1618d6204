"""What a figure of a report is: a Vega-Lite specification, its data, and what can be chosen; how figures look.

Colours, widths and fonts are in the themes alone, so that the page can draw the same specification light and dark.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables import Row
from .summary import Summary

Spec = dict[str, Any]
SWEEP = "mixkv sweep -o results.jsonl"  # the command that measures most of what figures need
STATIC_WIDTH = 640  # pixels of a figure in a file; in the page it is as wide as there is room


@dataclass(frozen=True, slots=True)
class Select:
    """A choice above a figure.

    Attributes:
        name: of a parameter of the specification, or "" where whole data are chosen.
        label: for people.
        options: (label, value): the parameter's value, or the key of ``Figure.data``.
        chosen: the index of what is chosen at first.

    """

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    chosen: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure, drawn by Vega-Lite.

    Attributes:
        id: a name for files and anchors.
        title: for people.
        text: sentences: what it shows, how to read it, what is left out.
        spec: a Vega-Lite specification without data; they are called "rows".
        data: key -> the data that stand for a choice; those of all selects without a name are shown together.
        selects: choices, in their order.

    """

    id: str
    title: str
    text: tuple[str, ...]
    spec: Spec
    data: dict[str, list[Row]]
    selects: tuple[Select, ...] = field(default=())

    def static(self) -> Spec:
        """The specification with the data of what is chosen at first, of a fixed width: for files."""
        keys = [select.options[select.chosen][1] for select in self.selects if not select.name] or list(self.data)
        rows = [row for key in dict.fromkeys(keys) for row in self.data[key]]
        title = {"text": self.title, "subtitle": ", ".join(select.options[select.chosen][0] for select in self.selects)}
        return {**self.spec, "width": STATIC_WIDTH, "title": title, "datasets": {"rows": rows}, "background": "white"}


@dataclass(frozen=True, slots=True)
class Missing:
    """A figure that cannot be drawn: what it would have been, what is missing, and the command that would measure it."""

    title: str
    what: str
    command: str


def number(value: float | None, digits: int = 4) -> float | None:
    """A number with so many digits, as data of a figure: what nobody can see takes up room."""
    return None if value is None else float(f"{value:.{digits - 1}e}")


def params(selects: Iterable[Select]) -> list[Spec]:
    """Parameters of a specification for selects that have a name."""
    return [{"name": select.name, "value": select.options[select.chosen][1]} for select in selects if select.name]


def policy_select(summaries: Sequence[Summary], label: str = "Policy", chosen: Summary | None = None) -> Select:
    """A choice among policies, whose data have their index as the key."""
    options = tuple((summary.label, str(summary.index)) for summary in summaries)
    at = [summary.index for summary in summaries].index(chosen.index) if chosen in summaries and chosen else 0
    return Select("", label, options, at)


def default_policy(summaries: Sequence[Summary]) -> Summary:
    """The one that is shown first: that of 4 bits or the next above, else that of the most."""
    bits = [(summary.mean("bits_per_value"), summary) for summary in summaries]
    enough = [(value, summary.index, summary) for value, summary in bits if value is not None and value >= 4]
    return min(enough, key=lambda item: item[:2])[2] if enough else summaries[-1]


def left_out(shown: Sequence[Summary], every: Sequence[Summary]) -> str:
    """How many policies a figure does not show; "" where it shows all."""
    out = len(every) - len(shown)
    return f"{out} of {len(every)} policies {'is' if out == 1 else 'are'} left out." if out else ""


def axis(field_: str, title: str, kind: str = "quantitative", **more: Any) -> Spec:
    """An encoding of a field with its title."""
    return {"field": field_, "type": kind, "title": title, **more}


def tip(field_: str, title: str, form: str | None = None) -> Spec:
    """A line of a tooltip."""
    return {
        "field": field_,
        "title": title,
        "type": "quantitative" if form else "nominal",
        **({"format": form} if form else {}),
    }


# Only powers of ten have a label, on a short axis also what begins with 2 or 5: for others there is no room.
_LABELLED = (
    "indexof('1' + (domain('y')[1] > 101 * domain('y')[0] ? '' : '25'), slice(format(datum.value, '.0e'), 0, 1)) >= 0"
)
_DIGITS = "datum.value < 0.001 ? format(datum.value, '~e') : format(datum.value, '~g')"
LOG_AXIS: Spec = {"labelExpr": f"{_LABELLED} ? ({_DIGITS}) : ''", "tickCount": 6}
SI_AXIS: Spec = {"labelExpr": "datum.value ? format(datum.value, '~s') : '0'", "tickCount": 6}
WHOLE_AXIS: Spec = {"format": ",d", "tickCount": 6, "labelOverlap": True}
LEGEND: Spec = {"orient": "bottom", "title": None, "labelLimit": {"expr": "min(width, 330)"}}
LAYERS: Spec = {
    "field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0, "labelOverlap": True},
}  # fmt: skip
RELATIVE_ERROR: Spec = {
    "field": "error", "type": "quantitative", "title": "relative error",
    "legend": {"orient": "bottom", "format": ".2~g", "titleLimit": 200},
}  # fmt: skip
ON_DARK, ON_LIGHT = (
    "#ffffff",
    "#101418",
)  # text upon the ends of the scale of colours of heat maps, which both themes share


def cell_text(is_dark: str) -> Spec:
    """The colour of a text upon a cell of a heat map; ``is_dark`` is an expression that is true where the cell is dark."""
    return {"condition": {"test": is_dark, "value": ON_DARK}, "value": ON_LIGHT}


def lines(field_: str, names: Sequence[str]) -> Spec:
    """Encodings that give each of these names a colour and a shape, in one legend."""
    legend = {**LEGEND, "direction": "vertical", "columns": {"expr": "width < 480 ? 1 : 2"}}
    one = axis(field_, "", "nominal", scale={"domain": list(names)}, legend=legend)
    return {"color": one, "shape": one}


_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) without the yellow, which white swallows; two more at the end.
_LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4fa0", "#4d4d4d"]
_DARK = ["#4aa8e0", "#ff8a47", "#1fc79a", "#e7a3cb", "#ffb733", "#9ad7f7", "#b9a3ea", "#d0d0d0"]


def theme(dark: bool) -> Spec:
    """The Vega-Lite configuration of the page's light or dark colours."""
    ink, muted, grid = ("#e6e8eb", "#9aa4b0", "#2b313a") if dark else ("#1c1f24", "#5b6470", "#e4e7eb")
    colours = _DARK if dark else _LIGHT
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 600}
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {**text, "gridColor": grid, "domainColor": muted, "tickColor": muted, "labelLimit": 220, "titlePadding": 8},
        "legend": {**text, "labelLimit": 300, "symbolSize": 80, "gradientLength": 180, "rowPadding": 4},
        "range": {"category": colours, "symbol": _SHAPES, "ramp": {"scheme": "viridis"}, "heatmap": {"scheme": "viridis"}},
        "title": {"anchor": "start", "color": ink, "subtitleColor": muted, "fontSize": 15, "offset": 14},
        "mark": {"color": colours[0]},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": muted},
        "rect": {"stroke": None},
        "style": {"ring": {"stroke": colours[0], "strokeWidth": 1.5}},
    }  # fmt: skip
