"""The parts of a report's page that are no figures: the table of policies, texts side by side, and the script's data."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..tables import Row
from .figures import Figure, Spec
from .figures_cost import amount, tokens_that_fit
from .figures_tokens import worst_tokens
from .summary import Summary, front, weight

if TYPE_CHECKING:
    from .page import Report


def page_data(figures: Sequence[Figure], summaries: Sequence[Summary], themes: dict[str, Spec]) -> dict[str, Any]:
    """What the page's script needs, as JSON."""
    return {
        "themes": themes,
        "figures": {figure.id: {"title": figure.title, "spec": figure.spec, "data": figure.data} for figure in figures},
        "policies": [
            {
                "label": s.label, "policy": s.policy, "commands": s.commands,
                "facts": [
                    [name, text]
                    for name, text in (
                        ("mean KL", _pm(s.kl["mean"], s.kl["se"])), ("99.9 %", number(s.kl["p999"])),
                        ("largest", number(s.kl["max"])), ("bytes an old token", number(s.bytes_old, 6)),
                        ("bits a value", number(s.mean("bits_per_value"), 3)),
                    )
                    if text
                ],
            }
            for s in summaries
        ],
        "worst": {str(s.index): _shortened(worst) for s in summaries if (worst := worst_tokens(s))},
        "texts": texts(summaries),
    }  # fmt: skip


def _shortened(items: Sequence[Row]) -> list[Row]:
    names = ("document", "position", "before", "token", "after", "top_reference", "top")
    return [
        {
            **{name: item.get(name) for name in names},
            **{name: number(item.get(name), 3) for name in ("kld", "p_reference", "p")},
        }
        for item in items
    ]


def texts(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Continuations: {"pieces": [{name, prompt}], "policies": {index: {piece: {ids, tokens}}}}.

    An index is that of a summary, or "reference".
    """
    pieces: dict[tuple[object, ...], int] = {}
    described: list[dict[str, str]] = []
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for row in summary.rows:
            if not (row.get("continuation") or {}).get("tokens"):
                continue
            names = ("document", "document_digest", "start", "tokens", "model", "reference_weights")
            key = *(row.get(name) for name in names), len(row["continuation"]["tokens"])
            if key not in pieces:
                pieces[key] = len(pieces)
                described.append({"name": _piece(row), "prompt": row.get("prompt_tail") or ""})
            own = {"reference": row.get("reference_continuation"), str(summary.index): row["continuation"]}
            for index, said in own.items():
                if (said or {}).get("tokens"):
                    tokens = {"ids": said.get("token_ids") or [], "tokens": said["tokens"]}
                    found.setdefault(index, {}).setdefault(str(pieces[key]), tokens)
    return {"pieces": described, "policies": found}


def _piece(row: Row) -> str:
    start, tokens = row.get("start"), row.get("tokens")
    if tokens is None:
        return str(row["document"])
    return f"{row['document']}, " + (f"tokens {start:,} to {start + tokens:,}" if start else f"{tokens:,} tokens")


_Column = tuple[str, str, Callable[[Summary], float | None], Callable[[float], str]]


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: number(value, digits)


def _percent(digits: int) -> Callable[[float], str]:
    return lambda value: f"{100 * value:.{digits}f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _columns(report: "Report") -> list[_Column]:
    """(title, explanation, value, text) of each column behind the policy's name."""
    right = found_again(report.results.rows["needle"])
    columns: list[_Column] = [
        ("bits", "bits a value of an old token, scales included", lambda s: s.mean("bits_per_value"), _plain(3)),
        ("bytes", "bytes of an old token, all layers", lambda s: s.bytes_old, _whole),
        ("mean KL", "mean KL of predictions, nats", lambda s: s.kl["mean"], _plain(3)),
        ("±", "one standard error of the mean KL", lambda s: s.kl["se"], _plain(2)),
        ("median", "median KL", lambda s: s.kl["median"], _plain(3)),
        ("99 %", "99 % quantile of the KL", lambda s: s.kl["p99"], _plain(3)),
        ("99.9 %", "99.9 % quantile of the KL", lambda s: s.kl["p999"], _plain(3)),
        ("largest", "largest KL", lambda s: s.kl["max"], _plain(3)),
        ("same top-1", "share of predictions with the same likeliest token", lambda s: s.mean("top1"), _percent(2)),
        ("Δp", "root mean square change of the right token's probability", lambda s: s.mean("dp", "rms"), _percent(2)),
        ("ln ppl ratio", "ln of the perplexity over the reference's", lambda s: s.mean("ln_ppl_ratio"), _plain(3)),
        ("bytes/token", "of the whole cache over its tokens", lambda s: s.mean("kv_bytes_per_token"), _whole),
        ("tokens/s", "generated, measured in passing", lambda s: s.mean("decode_tokens_per_second"), lambda x: f"{x:.1f}"),
        ("tokens that fit", f"in {amount(report.memory)}", lambda s: tokens_that_fit(s, report.memory), _whole),
        ("needles", "share of needles found again", lambda s: right.get(which_cache(s.rows[0])), _percent(0)),
        ("pieces", "pieces of text", lambda s: len(s.rows), _whole),
    ]  # fmt: skip
    return [column for column in columns if any(column[2](summary) is not None for summary in report.summaries)]


def policy_columns(report: "Report") -> list[tuple[str, str]]:
    """(title, explanation) of the table's columns behind the policy's name; without those that are empty."""
    return [(title, explanation) for title, explanation, _, _ in _columns(report)]


def policy_rows(report: "Report") -> list[dict[str, Any]]:
    """A row of the table for each policy: its summary, whether it is on the front, and (number, text) of each column."""
    best = {summary.index for summary in front(report.summaries, lambda s: s.kl["mean"])}
    columns = _columns(report)
    rows = []
    for summary in report.summaries:
        cells = []
        for _, _, value, text in columns:
            found = value(summary)
            cells.append((found, "" if found is None else text(found)))
        rows.append({"summary": summary, "front": summary.index in best, "cells": cells})
    return rows


def found_again(rows: Iterable[Row]) -> dict[tuple[object, ...], float]:
    """The share of right answers among needle rows, by ``which_cache``."""
    own: dict[tuple[object, ...], list[bool]] = {}
    for row in rows:
        own.setdefault(which_cache(row), []).append(row["correct"])
    return {cache: sum(correct) / len(correct) for cache, correct in own.items()}


def which_cache(row: Row) -> tuple[object, ...]:
    """Model, weights and policy: what a row of predictions and one of needles must have in common to be of one cache."""
    return tuple(row.get(name) for name in ("model", "weights", "policy"))


def pieces(summaries: Sequence[Summary]) -> list[Row]:
    """The pieces of documents that were read: name, start, tokens, predictions; in their order."""
    every = {
        (row["document"], row.get("document_digest"), row.get("start"), row.get("tokens"), row.get("first")): row
        for summary in summaries
        for row in summary.rows
    }
    return [
        {"document": key[0], "start": key[2], "tokens": key[3], "predictions": weight(row)}
        for key, row in every.items()
    ]


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it; "" for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) and digits >= 4 else f"{value:.{digits}g}"


def _pm(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error, 2)}"
