"""All rows about one policy as one: the numbers of a report's table and of its figures."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...engine.policy import PRESETS, CachePolicy
from ..tables import Row

QUANTILES = {"mean": "mean", "median": "median", "p99": "99 %", "p999": "99.9 %", "max": "largest"}
"""The numbers of a KL distribution that a report shows: names in rows, and for people."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was measured of a policy, the pieces that it was measured on taken together.

    Attributes:
        index: its place in the report, from 0 on: ordered by bytes of an old token.
        label: a short name that no other one of the report has.
        rows: of kind "eval"; one for each piece of a document.
        kl: name -> nats: "mean", "se", and the others of QUANTILES. Means are weighted by the predicted tokens; quantiles
            are the weighted means of the pieces' quantiles, "max" is the largest of all, and "se" is that of the mean
            where the pieces are independent.
        bytes_old: bytes of an old token in all layers, None if unknown.
        commands: the shell lines that measure it again.

    """

    index: int
    label: str
    rows: tuple[Row, ...]
    kl: dict[str, float | None]
    bytes_old: float | None
    commands: tuple[str, ...]

    @property
    def bytes_token(self) -> float | None:
        """Bytes of the whole cache over the tokens in it, window and sinks included; None if unknown."""
        return self.mean("kv_bytes_per_token")

    @property
    def policy(self) -> str:
        """The canonical line."""
        return str(self.rows[0]["policy"])

    def mean(self, *path: str) -> float | None:
        """The mean of a field of the rows, or of a field within one, weighted by the predicted tokens."""
        return weighted((deep(row, path), weight(row)) for row in self.rows)

    def first(self, name: str) -> object:
        """A field that is the same in all rows, from the first."""
        return self.rows[0].get(name)


PIECE = ("document", "document_digest", "seed", "start", "tokens", "first")
"""What makes two rows of one policy be about the same predictions."""


def weight(row: Row) -> int:
    """What a row counts in a mean: the predictions that it is about."""
    return row.get("predicted_tokens") or 1


def deep(row: Row, path: Sequence[str]) -> float | None:
    """A number within objects; None where any of them is absent."""
    value: object = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def weighted(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The weighted mean of numbers that are known; None where none is."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each policy, ordered by bytes of an old token, then by mean KL.

    Rows of another model, weight format or regime are another summary; its label says so where these differ in ``rows``.
    """
    told_apart = [name for name in ("model", "weights", "reference_weights", "regime") if len(values(rows, name)) > 1]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        own = groups.setdefault((row["policy"], *(row.get(name) for name in told_apart)), [])
        same = [i for i, other in enumerate(own) if all(other.get(name) == row.get(name) for name in PIECE)]
        if same:  # measured twice, perhaps once with more: the same predictions count once
            own[same[0]] = {**row, **{name: x for name, x in own[same[0]].items() if x is not None}}
        else:
            own.append(row)
    ordered = sorted(groups.values(), key=lambda own: (_bytes(own) or 0.0, _kl(own)["mean"] or 0.0, own[0]["policy"]))
    labels = _labels(ordered, told_apart)
    return [
        Summary(i, label, tuple(own), _kl(own), _bytes(own), _commands(own))
        for i, (own, label) in enumerate(zip(ordered, labels, strict=True))
    ]


def one_line(text: object) -> str:
    """A text as a name: whatever separates lines or words in it is a space."""
    return " ".join(str(text).split())


def values(rows: Iterable[Row], name: str) -> list[object]:
    """The different values of a field, in the order in which they come; without null."""
    return list(dict.fromkeys(row[name] for row in rows if row.get(name) is not None))


def front(summaries: Iterable[Summary], cost: Callable[[Summary], float | None]) -> list[Summary]:
    """Those that no other beats in bytes a token and cost at once, fewest bytes first; of equal ones the first."""
    priced = [(s.bytes_token, cost(s), s) for s in summaries]
    known = [(nbytes, value, s) for nbytes, value, s in priced if nbytes is not None and value is not None]
    best: list[Summary] = []
    least = float("inf")
    for _, value, summary in sorted(known, key=lambda item: (item[0], item[1], item[2].index)):
        if value < least:
            best.append(summary)
            least = value
    return best


def spread(items: Sequence[Summary], most: int) -> list[Summary]:
    """At most so many, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def chosen(summaries: Sequence[Summary], most: int = 8) -> list[Summary]:
    """Policies that stand for all in figures with a line each: along the front of the mean KL; any, where it is one."""
    best = front(summaries, lambda summary: summary.kl["mean"])
    return spread(best, most) if len(best) > 1 else list(summaries[:most])


def short(spec: str) -> str:
    """The name of a policy; of a whole line, the preset that it is, or the words that are not as by default."""
    preset = next((name for name, policy in PRESETS.items() if str(policy) == spec), None)
    usual = str(CachePolicy()).split(" ")
    words = [word for word in spec.split(" ") if word not in usual] if spec.startswith("sinks=") else [spec]
    return one_line(preset or " ".join(words) or spec)


def _bytes(rows: Sequence[Row]) -> float | None:
    return weighted((row.get("kv_bytes_per_old_token"), 1) for row in rows)


def _commands(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["command"] for row in rows if row.get("command")))


def _kl(rows: Sequence[Row]) -> dict[str, float | None]:
    found = {name: weighted((row["kld"].get(name), weight(row)) for row in rows) for name in QUANTILES}
    largest = [row["kld"]["max"] for row in rows if row["kld"].get("max") is not None]
    return {**found, "max": max(largest, default=None), "se": _standard_error(rows)}


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Of the weighted mean of independent means; None where one of them is unknown."""
    errors = [row["kld"].get("se") for row in rows]
    if None in errors:
        return None
    total = sum(weight(row) for row in rows)
    return sum((weight(row) / total * error) ** 2 for row, error in zip(rows, errors, strict=True)) ** 0.5


def _labels(groups: Sequence[Sequence[Row]], told_apart: Sequence[str]) -> list[str]:
    """A name for each group: the policy's, what tells groups apart, and the digest where that is not enough."""
    names = [", ".join([short(own[0]["spec"]), *(one_line(own[0].get(name)) for name in told_apart)]) for own in groups]
    unique = [
        name if names.count(name) == 1 else f"{name} ({one_line(own[0].get('policy_digest') or i)})"
        for i, (name, own) in enumerate(zip(names, groups, strict=True))
    ]
    return unique if len(set(unique)) == len(unique) else [f"{i}: {name}" for i, name in enumerate(unique)]
