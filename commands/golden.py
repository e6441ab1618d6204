"""``mixkv golden record`` and ``check``: what a model decodes, recorded once, and held against later."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import CheckError, UsageError
from .options import AsJson, CacheOptions, ModelOption, takes_cache_options
from .shell import Bars, load_each, read_text, reported, say, set_threads

if TYPE_CHECKING:
    from ..models.load import Model

golden = typer.Typer(no_args_is_help=True, help="Record what a model decodes, and check it later: end-to-end tests.")

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Threads = Annotated[int | None, typer.Option(help="Threads; all cores unless given.")]


@golden.command()
@reported
@takes_cache_options
def record(
    file: Annotated[Path, typer.Argument(help="The golden file to write.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, as raw text; five of our own unless any are given.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="Instead, a prompt on each line; in a .jsonl file each a JSON text or a list of token ids."),
    ] = None,
    model: ModelOption = "smollm2",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate for each.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are turns in the model's chat template.")] = False,
    weights: Annotated[
        str, typer.Option(help="Weights in memory: f32, bf16, q8, q4, or auto: as stored, else q8.")
    ] = "auto",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    *,
    cache: CacheOptions,
    quiet: Quiet = False,
) -> None:
    """Record what a model decodes greedily: the tokens, how likely they are, and what the model and the cache are."""
    policy = cache.policy()
    if prompts and prompts_file is not None:
        raise UsageError("give the prompts either as arguments or with --prompts-file, not both")
    from ..experiments.golden.file import check_place

    check_place(file, force=force)
    if model.encode("utf-8", "replace").decode() != model:
        raise UsageError(f"{model!r}: a golden file holds the model's name, and this one is not text")
    asked: Any = prompts or None
    if prompts_file is not None:
        from ..experiments.golden.prompts import parse_prompts

        asked = parse_prompts(read_text(prompts_file), str(prompts_file))
    set_threads(threads)
    from ..engine.session import Session
    from ..experiments.golden import record as runs
    from ..experiments.golden.about import describe
    from ..experiments.golden.file import Golden, write

    with Bars(quiet) as bars:
        loaded = _ready(model, weights, bars)
        found = runs.record(
            lambda: Session(loaded, policy), asked, max_tokens=max_tokens, chat=chat,
            progress=bars.bar("recording"),
        )  # fmt: skip
    write(file, Golden(describe(loaded, policy, weights=weights, chat=chat), found))
    if not quiet:
        tokens = sum(len(prompt.token_ids) for prompt in found)
        say(f"{len(found)} prompts, {tokens} tokens | saved to {file}")


@golden.command()
@reported
@takes_cache_options
def check(
    file: Annotated[Path, typer.Argument(help="The golden file.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Another model.", show_default="the recorded one")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Another weight format.", show_default="the recorded one")] = None,
    threads: Threads = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Nats by which a recorded token's log-probability may differ.", show_default="0.001"),
    ] = None,
    tie: Annotated[
        float | None,
        typer.Option(help="Nats by which another token may be likelier: a tie.", show_default="0.001"),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Not one bit of a log-probability may differ.")] = False,
    *,
    cache: CacheOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read what was recorded token by token, and compare. Exit code 8 if it differs.

    Options of a cache change the recorded policy.
    """
    given = [name for name, value in (("--tolerance", tolerance), ("--tie", tie)) if value is not None]
    if exact and given:
        raise UsageError(f"{', '.join(given)} has no effect with --exact: nothing may differ")
    from ..experiments.golden.compare import Tolerances
    from ..experiments.golden.file import read

    named = {"logprob": tolerance, "tie": tie}
    tolerances = Tolerances(**{name: x for name, x in named.items() if x is not None}, exact=exact)
    recorded = read(file)
    about = recorded.about
    policy = cache.policy(about.policy)
    used_threads = set_threads(threads)
    name = about.model if model is None else model
    kept_as = (about.weights or "auto") if weights is None else weights
    from ..engine.session import Session
    from ..experiments.golden import record as runs
    from ..experiments.golden.about import describe, reasons
    from ..experiments.golden.text import render, summary

    with Bars(quiet) as bars:
        loaded = _ready(name, kept_as, bars)
        found = runs.check(
            recorded.prompts, lambda: Session(loaded, policy), tolerances, chat=about.chat,
            progress=bars.bar("checking"),
        )  # fmt: skip
    why = reasons(about, describe(loaded, policy, weights=kept_as, chat=about.chat))
    if as_json:
        used = {"model": name, "weights": kept_as, "policy": str(policy), "threads": used_threads}
        print(json.dumps({"file": str(file), **used, **found.to_dict(), "changes": why}, ensure_ascii=False))
    else:
        print(render(found, why))
    if found.failed:
        raise CheckError(f"{file}: {summary(found)}")
    if not quiet:
        say(summary(found))


def _ready(model: str, weights: str, bars: Bars) -> "Model":
    """The model, and the kernels compiled."""
    from ..kernels.warmup import warm_up

    loaded = load_each(model, {weights}, bars)[weights]
    warm_up(bars.bar("preparing kernels (compiled once)"))
    return loaded
