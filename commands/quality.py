"""``mixkv eval`` and ``plan``: what a cache costs in quality, and which one costs least."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.errors import PromptError, UsageError
from .options import AsJson, CacheOptions, ModelOption, takes_cache_options
from .shell import Bars, load_each, print_table, read_text, reported, rounded, say, set_threads

if TYPE_CHECKING:
    from ..models.load import Model


@reported
@takes_cache_options
def evaluate(
    file: Annotated[Path, typer.Argument(help='The text, in UTF-8; "-" reads stdin.')],
    model: ModelOption = "smollm2",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", "-n", help="Most tokens to evaluate, from the beginning; all unless given."),
    ] = None,
    first: Annotated[int, typer.Option(help="Compare predictions only from this position on.")] = 0,
    weights: Annotated[str, typer.Option(help="Weight format of the candidate.")] = "auto",
    reference_weights: Annotated[str, typer.Option(help="Weight format of the reference.")] = "f32",
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure on a text what a cache policy and a weight format cost, beside a cache of float32."""
    policy = cache.policy()
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens must be 2 or more, found {tokens}")
    if str(file) == "-" and sys.stdin is None:
        raise UsageError("stdin is closed: there is no text to read")
    text = read_text(None if str(file) == "-" else file)
    used_threads = set_threads(threads)
    from ..engine.memory import check_fits
    from ..engine.policy import CachePolicy
    from ..engine.session import Session
    from ..experiments.evaluate import evaluate as run
    from ..kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = load_each(model, {weights, reference_weights}, bars)
        ids = _first_tokens(loaded[weights], text, tokens)
        check_fits(loaded[weights].config, policy, len(ids), beside=[CachePolicy.full()])
        reference = Session(loaded[reference_weights], CachePolicy.full())
        candidate = Session(loaded[weights], policy)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        begun = time.perf_counter()
        found = run(reference, candidate, ids, first=first, progress=bars.bar("evaluating"))
    seconds = time.perf_counter() - begun
    about = {"model": model, "policy": str(policy), "weights": weights, "reference_weights": reference_weights}
    result = {**found.to_dict(), **about, "threads": used_threads, "seconds": seconds}
    if as_json:
        print(json.dumps(result))
    else:
        print_table(rounded(result))


def _first_tokens(model: "Model", text: str, most: int | None) -> list[int]:
    """The ids of a text, ``most`` of them at most; PromptError where they do not fit and nobody said how many to take."""
    ids, context = model.encode(text), model.config.max_position_embeddings
    if most is None and len(ids) > context:
        raise PromptError(f"the text has {len(ids)} tokens, the context {context}: --tokens takes the first of them")
    return ids[:most]


@reported
@takes_cache_options
def plan(
    model: Annotated[str, typer.Argument(help="Registry name, a model folder, or a .gguf file.")],
    budget: Annotated[str, typer.Option(help="Of an old token in all layers: 6KB/token, 5760B/token, 4bits.")],
    text: Annotated[Path, typer.Option(help='What to measure on, in UTF-8; "-" reads stdin.')],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to measure on, from the beginning.")] = 1024,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the policy's TOML to a file.")] = None,
    weights: Annotated[str, typer.Option(help="Weight format; others than f32 blur what is measured.")] = "f32",
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Find how many bits each layer needs: the policy of the least divergence whose old tokens take no more than a budget.

    Every layer's keys, and its values, are tried in 2 and 3 bits on the text. Its tokens behind those measured on, as
    many again, tell what the policy is worth on text it was not made for. The policy's TOML is printed, or written.
    """
    idle = [name for name, given in (("--k-bits", cache.k_bits), ("--v-bits", cache.v_bits)) if given is not None]
    if idle:
        raise UsageError(f"{', '.join(idle)} has no effect: bits are what is searched for")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    policy = cache.policy()
    source = read_text(None if str(text) == "-" else text)
    set_threads(threads)
    from ..experiments import plan as solver
    from ..kernels.warmup import warm_up

    with Bars(quiet) as bars:
        loaded = load_each(model, {weights}, bars)[weights]
        config = loaded.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        allowed = solver.parse_budget(budget, values)
        ids = loaded.encode(source)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        found = solver.find(
            loaded, ids, policy, allowed, n_tokens=tokens, progress=bars.bar("measuring the layers")
        )  # fmt: skip
    toml = found.policy.to_toml()
    try:
        if output is not None:
            output.write_text(toml, encoding="utf-8")
    except OSError as error:
        print(toml, end="")  # minutes of measuring are in it
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}; the policy is on stdout") from None
    if as_json:
        print(json.dumps({**found.to_dict(), "policy_toml": toml, "budget_bytes": allowed}))
        return
    if output is None:
        print(toml, end="")
    say(
        f"{found.nbytes:g} bytes an old token ({8 * found.nbytes / values:.2f} bits a value), of {allowed:g} allowed | "
        f"KL {found.predicted:.5f} predicted, {found.measured:.5f} measured there, "
        + ("no text left to check on" if found.unseen is None else f"{found.unseen:.5f} on the text behind it")
    )
