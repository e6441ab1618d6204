"""What the fields of each kind of row must be. Rows come from files: whoever uses them must be able to rely on this.

A field may always be absent or null, but for those that are required. Fields that are not named here are not looked at.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from ...models.check import shown
from ...models.errors import UsageError
from ...models.limits import MAX_RESULT_BINS

TEXT, NUMBER, COUNT, FLAG = "a text", "a number up to 1e100", "a whole number from 0 on", "true or false"
Rule: TypeAlias = "str | list[Rule] | dict[str, Rule]"
Row = dict[str, Any]

_MACHINE: dict[str, Rule] = dict.fromkeys(("mixkv", "cpu_info", "os", "python", "numpy", "numba", "test_time"), TEXT)
_RUN: dict[str, Rule] = {
    **_MACHINE, **dict.fromkeys(("key", "model", "weights", "policy", "spec", "policy_digest", "command"), TEXT),
}  # fmt: skip
_KLD: dict[str, Rule] = dict.fromkeys(("mean", "se", "median", "p90", "p95", "p99", "p999", "max"), NUMBER)
_WORST: dict[str, Rule] = {
    **dict.fromkeys(("token", "before", "after", "top_reference", "top"), TEXT), "position": COUNT,
    **dict.fromkeys(("kld", "p_reference", "p"), NUMBER),
}  # fmt: skip
_TOKENS: dict[str, Rule] = {"token_ids": [COUNT], "tokens": [TEXT]}
_EVAL: dict[str, Rule] = {
    **_RUN,
    **dict.fromkeys(("reference_weights", "document", "document_digest", "regime", "prompt_tail", "dense"), TEXT),
    **dict.fromkeys(("k_axis", "v_axis", "scales"), TEXT),
    **dict.fromkeys(("rotate_k", "rotate_v"), FLAG),
    **dict.fromkeys(("parameters_bytes", "n_layers", "n_heads", "n_kv_heads", "head_dim", "context"), COUNT),
    **dict.fromkeys(("window", "sinks", "tile", "k_bits", "v_bits", "k_group", "v_group", "n_tiers"), COUNT),
    **dict.fromkeys(("n_overrides", "seed", "start", "tokens", "predicted_tokens", "decode_depth"), COUNT),
    **dict.fromkeys(("ppl", "ppl_reference", "ppl_ratio", "ln_ppl_ratio", "top1", "bits_per_value"), NUMBER),
    **dict.fromkeys(("kv_bytes_per_token", "kv_bytes_per_old_token", "kv_bytes_per_recent_token"), NUMBER),
    **dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), NUMBER),
    "kld": _KLD,
    "dp": {"rms": NUMBER},
    "by_distance": [{"from": COUNT, "to": COUNT, "tokens": COUNT, "kld": NUMBER, "kld_se": NUMBER, "top1": NUMBER}],
    "histogram": {"low": NUMBER, "high": NUMBER, "per_decade": COUNT, "counts": [COUNT], "below": COUNT},
    "worst": [_WORST],
    "mass_by_layer": {"names": [TEXT], "shares": [[NUMBER]]},
    "local_errors": {"k": [[NUMBER]], "v": [[NUMBER]], "both": [[NUMBER]]},
    "continuation": _TOKENS,
    "reference_continuation": _TOKENS,
}  # fmt: skip
_WINDOW_CURVE: dict[str, Rule] = {
    **_RUN, "document": TEXT, "tokens": COUNT, "windows": [COUNT], "errors": [NUMBER], "by_layer": [[NUMBER]],
    "kv_bytes_per_token": [NUMBER],
}  # fmt: skip
_NEEDLE: dict[str, Rule] = {
    **_RUN, "task": TEXT, "length": COUNT, "depth": NUMBER, "correct": FLAG, "reference_correct": FLAG, "nll": NUMBER,
    "nll_reference": NUMBER, "kld": NUMBER,
}  # fmt: skip
_BENCH: dict[str, Rule] = {
    **_MACHINE, "model": TEXT, "weights": TEXT, "threads": COUNT, "kv": TEXT, "test": TEXT, "n_prompt": COUNT,
    "n_gen": COUNT, "n_depth": COUNT, "avg_ts": NUMBER, "stddev_ts": NUMBER, "kv_bytes": COUNT,
}  # fmt: skip

KINDS: dict[str, tuple[dict[str, Rule], tuple[str, ...]]] = {
    "eval": (_EVAL, ("model", "policy", "spec", "document", "kld")),
    "window-curve": (_WINDOW_CURVE, ("model", "policy", "document", "windows", "errors")),
    "needle": (_NEEDLE, ("model", "policy", "spec", "task", "length", "depth", "correct")),
    "bench": (_BENCH, ("model", "weights", "kv", "test", "n_gen", "n_depth", "avg_ts")),
}
"""The kinds of rows that are read: the rules of their fields, and the fields that must be there."""


def check_row(kind: str, row: Row, where: str) -> None:
    """UsageError, beginning with ``where``, for a row of one of KINDS that is not as its kind says."""
    rules, required = KINDS[kind]
    try:
        missing = [name for name in required if row.get(name) is None]
        if missing:
            raise _Wrong(f"{missing[0]} must be there in a row of kind {kind}")
        _check(row, rules, "")
        _SHAPES.get(kind, lambda _: None)(row)
    except _Wrong as wrong:
        raise UsageError(f"{where}: {wrong}") from None


class _Wrong(Exception):
    """What is wrong with a row, without the place."""


def _check(value: Any, rule: Rule, path: str) -> None:
    if value is None:
        return
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            raise _Wrong(f"{path} must be an object, found {shown(value)}")
        for name, own in rule.items():
            _check(value.get(name), own, f"{path}.{name}" if path else name)
    elif isinstance(rule, list):
        if not isinstance(value, list):
            raise _Wrong(f"{path} must be a list, found {shown(value)}")
        for i, item in enumerate(value):
            if item is None and rule[0] != NUMBER:
                raise _Wrong(f"{path}[{i}] must not be null")
            _check(item, rule[0], f"{path}[{i}]")
    elif not _is(value, rule):
        raise _Wrong(f"{path} must be {rule}, found {shown(value)}")


def _is(value: Any, rule: str) -> bool:
    if rule == TEXT:
        return isinstance(value, str)
    if rule == FLAG:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if rule == COUNT:
        return isinstance(value, int) and 0 <= value < 1 << 63
    return abs(value) <= 1e100  # powers and sums of such numbers are still finite


def _check_eval(row: Row) -> None:
    """Lists in a row of kind "eval" that must be as long as others; a histogram that can be drawn."""
    mass = row.get("mass_by_layer") or {}
    _same(mass.get("shares"), len(mass.get("names") or []), "mass_by_layer.shares", "names")
    for name, layers in (row.get("local_errors") or {}).items():
        if name in ("k", "v", "both") and layers is not None:
            _same(layers, len(layers[0]) if layers else 0, f"local_errors.{name}", "heads in the first layer")
    histogram = row.get("histogram")
    if histogram is not None:
        low, high, per_decade, counts = (histogram.get(name) for name in ("low", "high", "per_decade", "counts"))
        if None in (low, high, per_decade, counts):
            raise _Wrong("histogram must have low, high, per_decade and counts")
        if not (-300 <= low < high <= 300 and len(counts) == round((high - low) * per_decade) <= MAX_RESULT_BINS):
            raise _Wrong(
                f"histogram must have per_decade counts for each decade from low to high, found {len(counts)} counts"
            )


def _check_window_curve(row: Row) -> None:
    windows = len(row["windows"])
    for name in ("errors", "by_layer", "kv_bytes_per_token"):
        values = row.get(name)
        if values is not None and len(values) != windows:
            raise _Wrong(f"{name} must have an item for each of the {windows} windows, found {len(values)}")
    layers = row.get("by_layer")
    if layers:
        _same(layers, len(layers[0]), "by_layer", "layers of the first window")


def _same(lists: Sequence[Sequence[Any]] | None, length: int, path: str, what: str) -> None:
    """Each list must have so many items."""
    for i, items in enumerate(lists or []):
        if len(items) != length:
            raise _Wrong(f"{path}[{i}] must have {length} items, one for each of the {what}, found {len(items)}")


_SHAPES = {"eval": _check_eval, "window-curve": _check_window_curve}
