"""``mixkv needle``: whether a cache still finds what a text said, and what that costs in probability."""

from typing import Annotated

import typer

from ..models.errors import UsageError
from .options import ModelOption
from .shell import Bars, load_each, print_rows, read_text, reported, set_threads


@reported
def needle(
    model: ModelOption = "smollm2",
    weights: Annotated[str, typer.Option(help="Weight format of the candidates.")] = "f32",
    reference_weights: Annotated[
        str | None, typer.Option(help="Weight format of the reference.", show_default="that of --weights")
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache policies: f32, f16, k4v2, k8v8:window=64:sinks=0:tile=32, small, 'old=k4c/v2t32 rot=k'.",
            show_default="f16,k4v4,k2v2",
        ),
    ] = None,
    lengths: Annotated[
        list[str] | None, typer.Option(help="Tokens of a prompt; 512-2048*2 doubles.", show_default="512,1024,2048")
    ] = None,
    depths: Annotated[
        list[str] | None,
        typer.Option(
            help="Where in the text the key stands: 0 at its beginning, 1 at its end; or 0:1:0.25.",
            show_default="0,0.25,0.5,0.75,1",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Prompts for each length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Of keys and texts.")] = 0,
    task: Annotated[str, typer.Option(help="passkey: one key; multikey: several, one is asked for.")] = "passkey",
    keys: Annotated[int | None, typer.Option(help="Keys of multikey, 2 to 20.", show_default="4")] = None,
    text: Annotated[
        str, typer.Option(help='What the keys are hidden in: a file, topics for Python\'s; "-" reads stdin.')
    ] = "topics",
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the model's chat template.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Hide pass keys in a text, and see which cache policies find them, beside a cache of float32.

    A right answer does not mean that nothing is lost: how likely it was, and the divergence along it, stand beside it.
    """
    from ..experiments.bench_plan import parse_policies
    from ..experiments.needle.plan import Plan
    from ..experiments.needle.report import writer
    from ..experiments.needle.run import Needle
    from ..experiments.needle.task import Task
    from ..experiments.ranges import parse_fractions, parse_numbers
    from ..experiments.texts import document
    from ..models.limits import MAX_TOKENS

    if keys is not None and task == "passkey":
        raise UsageError("--keys has no effect with --task passkey")
    table = writer(output)
    plan = Plan(
        Task(task, 1 if task == "passkey" else 4 if keys is None else keys, seed, chat),
        parse_policies(kv or ["f16,k4v4,k2v2"]),
        parse_numbers("--lengths", lengths or ["512,1024,2048"], 1, MAX_TOKENS),
        parse_fractions("--depths", depths or ["0:1:0.25"]),
        trials,
        weights,
        weights if reference_weights is None else reference_weights,
        text,
    )
    filler = read_text(None) if text == "-" else document(text).text
    set_threads(threads)
    from ..kernels.warmup import warm_up

    bars = Bars(quiet)
    with bars:
        loaded = load_each(model, {plan.weights, plan.reference_weights}, bars)
        measuring = Needle(loaded, filler, plan, progress=bars.bar("looking for keys"))
        warm_up(bars.bar("preparing kernels (compiled once)"))
    print_rows(measuring.rows(), table, bars)
