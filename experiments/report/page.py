"""A report: result rows as one HTML page that needs no network, and its figures."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from .. import machine
from ..tables import Row
from . import (
    figures_cost,
    figures_front,
    figures_inside,
    figures_needles,
    figures_quality,
    figures_tokens,
    figures_window,
    render,
)
from .data import page_data, pieces, policy_columns, policy_rows, texts, which_cache
from .figures import SWEEP, Figure, Missing, default_policy, theme
from .results import Results
from .summary import PIECE, Summary, summarize, values

EMBEDDED_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Report:
    """What a page is made of.

    Attributes:
        title: of the page.
        results: the rows.
        summaries: one for each policy.
        figures: those that could be drawn, in their order.
        missing: those that could not.
        memory: bytes that "what fits" is about.

    """

    title: str
    results: Results
    summaries: list[Summary]
    figures: list[Figure]
    missing: list[Missing]
    memory: int


def make(results: Results, *, title: str | None = None, memory: int = 8 * 10**9) -> Report:
    """Summaries and figures of rows."""
    evals, curves = results.rows["eval"], results.rows["window-curve"]
    summaries = summarize(evals)
    found = [
        figures_front.pareto(summaries),
        figures_quality.bits(summaries),
        figures_quality.distance(summaries),
        figures_tokens.distribution(summaries),
        figures_inside.heads(summaries),
        figures_inside.mass(summaries),
        figures_cost.speed(results.rows["bench"], summaries),
        figures_cost.memory(summaries, memory),
        figures_window.window(curves),
        figures_window.window_layers(curves),
        figures_needles.needles(results.rows["needle"]),
    ]
    missing = [figure for figure in found if isinstance(figure, Missing)]
    if not texts(summaries)["pieces"]:
        missing.append(Missing("What the policies write", "no row with a continuation", f"{SWEEP} --continue 64"))
    models = ", ".join(str(model) for model in values(results.every, "model"))
    return Report(
        title or f"KV cache policies of {models}", results, summaries,
        [figure for figure in found if isinstance(figure, Figure)], missing, memory,
    )  # fmt: skip


def page(report: Report, *, figures_folder: str | None = None) -> str:
    """The HTML of a report.

    Everything that comes from rows is escaped by the template, or packed in base64, and the page's script shows it as text.
    Scripts are allowed by their hashes alone, and nothing may be fetched.

    Args:
        report: what to write.
        figures_folder: the relative address of the figures' files, for readers without JavaScript.

    """
    templates = files("mixkv.experiments.report") / "templates"
    style, script = ((templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    scripts = [render.javascript(), script]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((templates / "report.html.j2").read_text(encoding="utf-8"))
    themes = {"light": theme(False), "dark": theme(True)}
    chosen = default_policy(report.summaries) if report.summaries else None
    return template.render(
        report=report,
        policy_line=_policy(scripts, style),
        style=style,
        scripts=scripts,
        data=_packed(_json(page_data(report.figures, report.summaries, themes))),
        rows=_packed("".join(f"{_json(_rounded(row))}\n" for row in report.results.every)),
        n_rows=len(report.results.every),
        digits=EMBEDDED_DIGITS,
        facts=facts(report),
        texts=texts(report.summaries),
        columns=policy_columns(report),
        table=policy_rows(report),
        pieces=pieces(report.summaries),
        chosen=chosen.index if chosen else 0,
        figures_folder=figures_folder,
        notes=_notes(report),
    )


def facts(report: Report) -> list[tuple[str, str]]:
    """What stands at the head of the page: names and values."""
    rows = report.results.every
    versions = [f"{name} {_all(rows, key)}" for name, key in machine.VERSIONS.items() if values(rows, key)]
    found = {
        "Model": _all(rows, "model"), "Weights": _all(report.results.rows["eval"] or rows, "weights"),
        "Reference": _all(rows, "reference_weights"), "CPU": _all(rows, "cpu_info"), "System": _all(rows, "os"),
        "Policies": str(len(report.summaries)) if report.summaries else "", "Versions": ", ".join(versions),
        "Newest row": max((row["test_time"] for row in rows if row.get("test_time")), default="").replace("T", " "),
    }  # fmt: skip
    return [(name, value) for name, value in found.items() if value]


def _all(rows: Sequence[Row], name: str, most: int = 6) -> str:
    every = [str(value) for value in values(rows, name)]
    return " / ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def _notes(report: Report) -> list[str]:
    """What a reader must know to compare policies."""
    notes = []
    read = [frozenset(tuple(row.get(name) for name in PIECE) for row in s.rows) for s in report.summaries]
    if len(set(read)) > 1:
        notes.append(
            "Not all policies were measured on the same pieces of text: their means are not strictly comparable. The "
            "table says how many pieces each has."
        )
    if len(values(report.results.every, "model")) > 1:
        notes.append("The rows are of several models: bytes and divergences of different models do not compare.")
    known = {which_cache(row) for summary in report.summaries for row in summary.rows}
    strange = {which_cache(row) for row in report.results.rows["needle"]} - known
    if report.summaries and strange:
        notes.append(
            f"Needles were looked for with {len(strange)} caches that no predictions were measured with: their shares "
            "stand in the figure of needles, and not in the table."
        )
    return notes


def _policy(scripts: Sequence[str], style: str) -> str:
    """The Content-Security-Policy: these scripts and this style, pictures made in the page, nothing from anywhere."""

    def of(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {' '.join(of(text) for text in scripts)}; style-src {of(style)}; "
        "style-src-attr 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _packed(text: str) -> str:
    """A text by gzip, in base64: small, and no character of it means anything to HTML."""
    packed = gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)
    return base64.b64encode(packed).decode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{EMBEDDED_DIGITS - 1}e}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {name: _rounded(item) for name, item in value.items()} if isinstance(value, dict) else value
