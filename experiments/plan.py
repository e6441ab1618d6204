"""``Planner``: which layers of a model need how many bits, measured on a text, and the best policy under a budget of bytes.

A layer's sensitivity is how far the model's predictions move, as mean KL divergence in nats, when the keys (or the values)
of that layer alone are kept in so many bits. Errors of different layers are nearly independent, so their divergences add
up, and what is left is a knapsack: one number of bits for the keys and one for the values of each layer, of the least sum
that the budget allows. It is solved exactly.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.cache import Cache
from ..engine.policy import CachePolicy, Override
from ..engine.session import Session
from ..models.check import shown
from ..models.errors import PromptError, UsageError
from ..models.limits import MAX_LAYER_ITEMS
from ..models.load import Model
from ..models.transformer import Midway, Step

Float32 = NDArray[np.float32]

BITS = (2, 3, 4, 8)
MEASURED = (2, 3)
INFERRED = {4: (7 / 15) ** 2, 8: (7 / 255) ** 2}  # of 3 bits: steps are so much smaller, errors the square of that
LOGITS_NBYTES = 1 << 27  # of the reference's logits, which are kept: so many positions are compared, the last ones
UNITS = {"b": 1, "byte": 1, "bytes": 1, "kb": 1000, "kib": 1024, "mb": 10**6, "mib": 1 << 20}


@dataclass(frozen=True, slots=True)
class Option:
    """Keys (side "k") or values ("v") of one layer in so many bits: its cost and its price."""

    layer: int
    side: str
    bits: int
    kld: float
    nbytes: float  # of an old token, scales included


@dataclass(frozen=True, slots=True)
class Planned:
    """A policy and what is to be expected of it.

    Attributes:
        nbytes: of an old token in all layers.
        predicted: mean KL divergence in nats: the sum of what its parts cost alone.
        measured: of the whole policy on the text that its layers were measured on.
        unseen: the same on the text behind it; None where there is too little.

    """

    policy: CachePolicy
    nbytes: float
    predicted: float
    measured: float = math.nan
    unseen: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, the policy in its one-line form."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "policy": str(self.policy)}


def parse_budget(text: str, values: int) -> float:
    """Bytes of an old token: "6KB/token", "5760", "4bits" (of each of ``values`` numbers); UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)\s*(?:/\s*token)?\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in (*UNITS, "", "bit", "bits"):
        raise UsageError(f"--budget must be like 6KB/token, 5760B/token or 4bits, found {shown(text)}")
    amount = float(match[1])
    return amount * values / 8 if unit.startswith("bit") else amount * UNITS.get(unit, 1)


class Reference:
    """What a model predicts for a text where nothing is rounded, at as many of its last positions as are kept.

    The text goes through the model in one pass, whose states between the layers are kept as well: what is coded in one
    layer changes nothing before it.

    Args:
        model: the model; with float32 weights, as rounded activations would drown what is measured.
        token_ids: (T,) integers.
        first: no position before this one counts.

    Raises:
        PromptError: a text of no more than ``first`` tokens, or of more than the context.

    """

    def __init__(self, model: Model, token_ids: Sequence[int] | NDArray[np.integer], first: int) -> None:
        self.model = model
        self.token_ids = Session(model, CachePolicy.full()).check_fits(token_ids)
        rows = LOGITS_NBYTES // (4 * model.config.vocab_size)
        self.first = max(first, len(self.token_ids) - rows)
        if self.first >= len(self.token_ids):
            raise PromptError(f"the text must have more than {first} tokens, found {len(self.token_ids)}")
        self._midway: list[Midway] = []
        self._log_p = _log_softmax(self._logits(CachePolicy.full(), self._keep, None))

    def _keep(self, at: Midway) -> None:
        self._midway.append(Midway(at.layer, at.x.copy(), at.qkv.copy()))

    def _logits(
        self, policy: CachePolicy, on_attention: Callable[[Midway], None] | None, begin: Midway | None
    ) -> Float32:
        """Of the positions that count, (positions, V)."""
        config, ids = self.model.config, self.token_ids
        shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        cache = Cache(policy, *shape, len(ids), config.sliding_windows)
        step, x = Step(ids, np.arange(len(ids)), [(cache, 0, len(ids))]), []

        def last(out: Float32) -> None:
            x.append(out[self.first :].copy())

        transformer = self.model.transformer
        transformer.forward(step, None, on_output=last, on_attention=on_attention, begin=begin)
        return transformer.logits(x[0])

    def divergence(self, policy: CachePolicy, layer: int = 0) -> float:
        """Mean KL(reference || policy) in nats, over the positions that count. It rounds nothing before ``layer``."""
        log_q = _log_softmax(self._logits(policy, None, self._midway[layer]))
        total = np.einsum("tv,tv->", np.exp(self._log_p), self._log_p - log_q, dtype=np.float64)
        return max(float(total) / len(log_q), 0.0)


def _log_softmax(logits: Float32) -> Float32:
    """In float32 but for the sum: its error, about 1e-7, is far below what a layer's rounding does."""
    logits = logits - logits.max(axis=1, keepdims=True)
    result: Float32 = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return result


def exact(policy: CachePolicy) -> CachePolicy:
    """The same policy with everything in float32: what a layer in codes is compared with."""
    plain = {"k_bits": 32, "v_bits": 32, "k_axis": "channel", "v_axis": "token", "k_group": 0, "v_group": 0}
    return replace(policy, **plain, dense="f32", older=(), overrides=())  # type: ignore[arg-type]


def measure(
    reference: Reference, policy: CachePolicy, progress: Callable[[int, int], None] | None = None
) -> list[Option]:
    """The sensitivity of every layer, keys and values apart, to every number of bits.

    Args:
        reference: of the model and the text.
        policy: whatever is not bits is kept as it says: window, sinks, tile, axes, groups, rotation.
        progress: called with (runs done, runs in all).

    """
    config = reference.model.config
    n_layers = config.num_hidden_layers
    total = n_layers * 2 * len(MEASURED) + 1
    base, options = exact(policy), []
    for layer in range(n_layers):
        for side in "kv":
            found = {}
            for bits in MEASURED:
                if progress is not None:
                    progress(len(MEASURED) * (2 * layer + "kv".index(side)) + MEASURED.index(bits) + 1, total)
                format_ = {
                    f"{side}_bits": bits,
                    **{f"{side}_{x}": getattr(policy, f"{side}_{x}") for x in ("axis", "group")},
                }
                coded = replace(base, overrides=(Override(str(layer), **format_),))
                found[bits] = reference.divergence(coded, layer)
            found |= {bits: part * found[3] for bits, part in INFERRED.items()}
            nbytes = {bits: _nbytes(policy, side, bits, config.num_key_value_heads, config.head_dim) for bits in BITS}
            options += [Option(layer, side, bits, found[bits], nbytes[bits]) for bits in BITS]
    if progress is not None:
        progress(total, total)
    return options


def _nbytes(policy: CachePolicy, side: str, bits: int, n_kv_heads: int, head_dim: int) -> float:
    """Bytes of one token's keys or values in one layer."""
    layout = replace(policy, **{f"{side}_bits": bits}, older=(), overrides=()).tier_layouts(n_kv_heads, head_dim)[0]  # type: ignore[arg-type]
    part = layout.k if side == "k" else layout.v
    return n_kv_heads * (part.codes_nbytes + part.params_nbytes) / layout.tile


def solve(options: Sequence[Option], budget: float) -> list[Option]:
    """One option for each layer and side, of the least sum of divergences whose bytes are within ``budget``.

    Raises:
        UsageError: a budget below the smallest options, with what these take.

    """
    groups: dict[tuple[int, str], list[Option]] = {}
    for option in options:
        groups.setdefault((option.layer, option.side), []).append(option)
    least = sum(min(option.nbytes for option in group) for group in groups.values())
    _refuse_below(least, budget)
    most = sum(max(option.nbytes for option in group) for group in groups.values())
    unit = float(np.gcd.reduce([round(64 * option.nbytes) for option in options])) / 64
    room = int(min(budget, most) / unit + 1e-9)
    best, choices = np.zeros(room + 1), []
    for group in groups.values():  # best[n]: the least sum so far with n units of room
        costs = np.full((len(group), room + 1), np.inf)
        for i, option in enumerate(group):
            size = round(option.nbytes / unit)
            if size <= room:
                costs[i, size:] = best[: room + 1 - size] + option.kld
        choices.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    chosen: list[Option] = []
    for group, choice in zip(reversed(groups.values()), reversed(choices), strict=True):
        option = group[int(choice[room])]
        chosen.append(option)
        room -= round(option.nbytes / unit)
    return chosen[::-1]


def _refuse_below(least: float, budget: float) -> None:
    if budget < least:
        raise UsageError(
            f"--budget must be at least {least:g} bytes a token, {min(BITS)} bits everywhere, found {budget:g}"
        )


def policy_of(chosen: Sequence[Option], policy: CachePolicy) -> Planned:
    """The policy that keeps every layer as chosen: what most layers have is its own, the others are overrides."""
    layers = sorted({option.layer for option in chosen})
    pairs = {
        layer: tuple(next(o.bits for o in chosen if (o.layer, o.side) == (layer, side)) for side in "kv")
        for layer in layers
    }
    formats = sorted(set(pairs.values()), key=lambda pair: -sum(own == pair for own in pairs.values()))
    overrides = tuple(
        Override("+".join(part), k_bits=pair[0], v_bits=pair[1])
        for pair in formats[1:]
        for part in _parts([layer for layer in layers if pairs[layer] == pair])
    )
    (k_bits, v_bits), kld = formats[0], sum(option.kld for option in chosen)
    made = replace(policy, k_bits=k_bits, v_bits=v_bits, older=(), overrides=overrides)
    return Planned(made, sum(option.nbytes for option in chosen), kld)


def _parts(layers: Sequence[int]) -> list[list[str]]:
    """Layers as items of overrides, runs as ranges, in as many overrides as they need."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    items = [f"{first}..{last}" if first < last else str(first) for first, last in runs]
    return [items[at : at + MAX_LAYER_ITEMS] for at in range(0, len(items), MAX_LAYER_ITEMS)]


def find(
    model: Model,
    token_ids: Sequence[int] | NDArray[np.integer],
    policy: CachePolicy,
    budget: float,
    *,
    n_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Planned:
    """Measure, solve, and measure what was found.

    Args:
        model: the model.
        token_ids: (T,) of a text; the first ``n_tokens`` are measured on, and as many behind them, where there are,
            checked on.
        policy: everything but the bits.
        budget: bytes of an old token in all layers.
        n_tokens: more than the window and a tile.
        progress: called with (runs done, runs in all).

    Raises:
        UsageError: a budget that is too small, too few tokens, a policy with further tiers or overrides.
        PromptError: a text that is too short, or tokens beyond the context.

    """
    if policy.older or policy.overrides:
        raise UsageError("the policy must have one tier and no overrides: these are what is searched for")
    first = policy.window + policy.tile
    if type(n_tokens) is not int or n_tokens <= first:
        raise UsageError(f"--tokens must be above {first}, the window and a tile, found {n_tokens!r}")
    ids = np.asarray(token_ids)
    reference = Reference(model, ids[:n_tokens], first)
    config = model.config
    least = sum(_nbytes(policy, side, min(BITS), config.num_key_value_heads, config.head_dim) for side in "kv")
    _refuse_below(config.num_hidden_layers * least, budget)  # before hours of measuring
    planned = policy_of(solve(measure(reference, policy, progress), budget), policy)
    rest, unseen = ids[n_tokens : 2 * n_tokens], None
    if len(rest) > first:
        unseen = Reference(model, rest, first).divergence(planned.policy)
    return replace(planned, measured=reference.divergence(planned.policy), unseen=unseen)
