"""The row of a cell: everything that a reader of results may want to select, draw or do again, as JSON can hold it."""

import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.policy import CachePolicy
from ..models.load import Model
from .bench import weight_bytes
from .evaluate import Evaluation
from .machine import describe
from .metrics import histogram, worst
from .pieces import Piece, Setting
from .texts import DEFAULT

SCHEMA = 1  # another number is another meaning of the fields
WORST, AROUND = 20, 60  # tokens shown in context, and characters on each side of one
TAIL = 200  # characters of the text before a continuation
FIELDS = (
    "window", "sinks", "tile", "k_bits", "v_bits", "dense", "k_axis", "v_axis", "k_group", "v_group", "rotate_k",
    "rotate_v", "scales",
)  # fmt: skip


def row(model: Model, setting: Setting, part: Piece, policy: CachePolicy, found: Evaluation) -> dict[str, Any]:
    """All of a row but what takes a pass of its own, with infinite numbers in it; docs/metrics.md explains its fields."""
    config = model.config
    n_layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    each = [policy.for_layer(i, n_layers).nbytes_per_token(heads, head_dim) for i in range(n_layers)]
    old, recent = sum(tiers[-1] for tiers, _ in each), sum(dense for _, dense in each)
    shape = {"n_layers": n_layers, "n_heads": config.num_attention_heads, "n_kv_heads": heads, "head_dim": head_dim}
    numbers = found.to_dict()
    speed = numbers.pop("tokens_per_second")
    return {
        "kind": "eval",
        "schema": SCHEMA,
        **describe(),
        "model": setting.model,
        "weights": setting.weights,
        "reference_weights": setting.reference_weights,
        "parameters_bytes": weight_bytes(model),
        **shape,
        "context": config.max_position_embeddings,
        "policy": str(policy),
        "policy_digest": policy.digest,
        "spec": policy.spec,
        **{name: getattr(policy, name) for name in FIELDS},
        "n_tiers": len(policy.tiers),
        "n_overrides": len(policy.overrides),
        "document": part.document,
        "document_digest": part.digest,
        "seed": part.seed,
        "start": part.start,
        "first": setting.first,
        "regime": setting.regime,
        **numbers,
        "mass_by_layer": numbers["mass"] and {"names": list(numbers["mass"]), "shares": numbers["mass_by_layer"]},
        "prefill_tokens_per_second": speed,
        "kv_bytes_per_old_token": old,
        "kv_bytes_per_recent_token": recent,
        "bits_per_value": 8 * old / (2 * n_layers * heads * head_dim),
        "histogram": histogram(found.each.kld),
        "worst": _worst(model, part, setting.first, found),
        "prompt_tail": _decoded(model, part.ids[-4 * TAIL :])[-TAIL:],
        "command": command(setting, part, policy),
    }


def _decoded(model: Model, ids: NDArray[np.int64]) -> str:
    return "" if model.tokenizer is None else model.tokenizer.decode(ids.tolist())


def _worst(model: Model, part: Piece, first: int, found: Evaluation) -> list[dict[str, Any]]:
    """The predictions that are furthest apart, with the text around them."""
    ids, each, rows = part.ids, found.each, []
    for i in worst(each.kld, WORST):
        at = first + i + 1  # of the token that was predicted
        rows.append(
            {
                "position": at,
                "token_id": int(ids[at]),
                "token": _decoded(model, ids[at : at + 1]),
                "before": _decoded(model, ids[max(0, at - AROUND) : at])[-AROUND:],
                "after": _decoded(model, ids[at + 1 : at + 1 + AROUND])[:AROUND],
                "kld": float(each.kld[i]),
                "p_reference": float(np.exp(-each.nll_reference[i])),
                "p": float(np.exp(-each.nll[i])),
                "top_reference": _decoded(model, each.top1_reference[i : i + 1]),
                "top": _decoded(model, each.top1[i : i + 1]),
            }
        )
    return rows


def command(setting: Setting, part: Piece, policy: CachePolicy) -> str:
    """The line for a shell that measures a cell again."""
    is_like_an_option = part.document.startswith("-") and part.document != "-"
    options = ["mixkv", "eval"]
    options += [] if part.document == DEFAULT or is_like_an_option else [part.document]
    options += ["-m", setting.model, "-n", str(len(part.ids))]
    options += ["--weights", setting.weights] if setting.weights != "f32" else []
    if setting.reference_weights != setting.weights:
        options += ["--reference-weights", setting.reference_weights]
    options += ["--first", str(setting.first)] if setting.first else []
    options += ["--regime", setting.regime] if setting.regime != "chunked" else []
    options += ["--seed", str(part.seed)] if part.seed else []
    options += ["--shadow"] if setting.shadow else []
    options += ["--continue", str(setting.continuation)] if setting.continuation else []
    options += ["--policy", str(policy)]
    return shlex.join([*options, "--", part.document] if is_like_an_option else options)


def per_token(model: Model, part: Piece, window: int, found: Evaluation) -> Iterator[dict[str, Any]]:
    """A row for each predicted token, in their order. ``behind``: how many tokens have left the window by then, or less."""
    each, n = found.each, len(found.each.kld)
    first = len(part.ids) - n
    for i in range(n):
        at = first + i
        yield {
            "position": at,
            "behind": at - window,
            "token_id": int(part.ids[at]),
            "token": _decoded(model, part.ids[at : at + 1]),
            "nll_reference": float(each.nll_reference[i]),
            "nll": float(each.nll[i]),
            "kld": float(each.kld[i]),
            "top_reference_id": int(each.top1_reference[i]),
            "top_id": int(each.top1[i]),
        }
