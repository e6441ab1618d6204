"""``mixkv info``: what is in a model, what its cache takes under a policy, what is in a session file."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import UsageError
from .options import AsJson, CacheOptions, takes_cache_options
from .shell import Bars, print_table, reported

if TYPE_CHECKING:
    from ..engine.policy import CachePolicy
    from ..models.load import Opened


@reported
@takes_cache_options
def info(
    model: Annotated[
        str | None,
        typer.Argument(help="As for generate --model; smollm2, or none for --routes."),
    ] = None,
    *,
    cache: CacheOptions,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights in memory: f32, bf16, q8, q4, or auto: as stored, else q8.", show_default="auto"),
    ] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="How the kernels compute each format on this CPU, and what options cost.")
    ] = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print only the policy, as a file for --policy; of no model.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Also say what the cache of a session with so many tokens takes.")
    ] = None,
    session_file: Annotated[
        Path | None, typer.Option("--session", help="Instead, say what is in a session file; of no model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model, and what its cache takes under a policy; or a session file."""
    if session_file is not None:
        from ..engine.conversation import summary

        given = any(option is not None for option in (model, weights, context))
        if given or routes or as_toml or cache != CacheOptions():
            raise UsageError("with --session, info describes the file alone: only --json can be given besides")
        found = summary(session_file)
        if as_json:
            print(json.dumps(found))
        else:
            print_table(found)
        return
    policy = cache.policy()
    if as_toml:
        options = ("MODEL", model), ("--weights", weights), ("--context", context)
        idle = [name for name, given in options if given is not None]
        idle += [name for name, given in (("--routes", routes), ("--json", as_json)) if given]
        if idle:
            raise UsageError(f"{', '.join(idle)} has no effect with --toml, which prints only the policy")
        print(policy.to_toml(), end="")
        return
    described: dict[str, Any] = {}
    if weights is not None:
        from ..models.pack import check_weights_option

        check_weights_option(weights)
        if model is None and routes and context is None:
            raise UsageError("--weights has no effect with --routes of no model")
    if model is not None or not routes or context is not None:
        from ..models.load import open_model

        with Bars(quiet=as_json) as bars:
            opened = open_model("smollm2" if model is None else model, progress=bars.bar("downloading"))
        described |= _described(opened, policy, weights or "auto")
        if context is not None:
            described |= _planned(opened, policy, context)
    described |= {"policy": str(policy), "policy_digest": policy.digest}
    if as_json:
        described["policy_toml"] = policy.to_toml()
    if routes:
        from ..kernels.routes import routes as all_routes

        described["routes"] = {"segments": policy.routes(), **all_routes()}
    if as_json:
        print(json.dumps(described))
        return
    print_table(described)


def _described(opened: "Opened", policy: "CachePolicy", weights: str) -> dict[str, Any]:
    from ..models.load import kept

    config = opened.config
    kept_as, nbytes = kept(opened, weights)
    layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    policy.check_model(layers, head_dim)
    parameters = sum(functools.reduce(int.__mul__, shape, 1) for shape in opened.source.shapes.values())
    return {
        "model": opened.name,
        "path": None if opened.path is None else str(opened.path),
        "architecture": config.architecture,
        "parameters": parameters,
        "stored_bytes": opened.source.nbytes,
        "stored_types": " ".join(sorted(set(opened.source.stored_types.values()))),
        "f32_bytes": 4 * parameters,
        "weights": weights,
        "matrices_kept_as": kept_as,
        "matrices_bytes": nbytes,
        "layers": layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        **_bytes_per_token(policy, layers, heads, head_dim),
        "kv_bytes_per_token_float16": layers * heads * head_dim * 4,
    }


def _planned(opened: "Opened", policy: "CachePolicy", tokens: int) -> dict[str, Any]:
    """What a cache of so many tokens takes, and what memory there is."""
    from ..engine.memory import available_nbytes, plan

    limit = opened.config.max_position_embeddings
    if not 1 <= tokens <= limit:
        raise UsageError(f"--context must be from 1 to {limit} tokens (the model's limit), found {tokens}")
    found = plan(opened.config, policy, tokens)
    tiers = {f"old{i + 1 if i else ''}": nbytes for i, nbytes in enumerate(found.tiers)}
    planned = {"tokens": tokens, "sink": found.sink, **tiers, "recent": found.recent, "total": found.total}
    return {"kv_bytes": planned, "available_bytes": available_nbytes()}


def _bytes_per_token(policy: "CachePolicy", n_layers: int, n_kv_heads: int, head_dim: int) -> dict[str, float]:
    """Bytes of a token in all layers, by tier and dense; the last tier of a layer stands for those that it has not."""
    each = [policy.for_layer(i, n_layers).nbytes_per_token(n_kv_heads, head_dim) for i in range(n_layers)]
    n_tiers = max(len(tiers) for tiers, _ in each)
    old = [sum(tiers[min(t, len(tiers) - 1)] for tiers, _ in each) for t in range(n_tiers)]
    by_tier = {f"kv_bytes_per_old{t + 1 if t else ''}_token": nbytes for t, nbytes in enumerate(old)}
    return {**by_tier, "kv_bytes_per_recent_token": sum(dense for _, dense in each)}
