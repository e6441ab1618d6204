"""``mixkv bench``: how fast prompts are read and tokens generated."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..models.errors import UsageError
from .options import ModelOption
from .shell import Bars, print_rows, reported, set_threads

if TYPE_CHECKING:
    from ..models.load import Model


@reported
def bench(
    model: ModelOption = "smollm2",
    prompts: Annotated[
        list[str] | None, typer.Option("--n-prompt", "-p", help="Tokens of a prompt; 0 for none.", show_default="512")
    ] = None,
    generated: Annotated[
        list[str] | None, typer.Option("--n-gen", "-n", help="Tokens to generate; 0 for none.", show_default="128")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("-pg", help="A prompt and tokens to generate behind it: 512,128.")
    ] = None,
    depths: Annotated[
        list[str] | None,
        typer.Option("--n-depth", "-d", help="Tokens in the cache before, not timed.", show_default="0"),
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="How often each test is timed.")] = 5,
    warmup: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Run each test once before, untimed.")] = True,
    weights: Annotated[list[str] | None, typer.Option(help="Weight formats in memory.", show_default="auto")] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Cache policies: f32, f16, k4v2, k8v8:window=64:sinks=0:tile=32, small, 'old=k4c/v2t32 rot=k'.",
            show_default="k4v4",
        ),
    ] = None,
    threads: Annotated[
        list[str] | None, typer.Option("--threads", "-t", help="Threads; all cores unless given.")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
    startup: Annotated[bool, typer.Option("--startup", help="Instead, time a warm start and its parts.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Time reading prompts and generating, as llama-bench does.

    Numbers are lists (512,1024) and ranges: 0-4096+1024 adds 1024, 1-64*2 doubles. Each combination of options is a row.
    Every repetition fills a cache of its own up to the depth.
    """
    from ..experiments import bench as speed
    from ..experiments import startup as start
    from ..experiments.bench_plan import Plan, parse_cases, parse_policies
    from ..experiments.ranges import parse_numbers, split_words
    from ..experiments.tables import make_writer
    from ..models.limits import MAX_THREADS

    idle = {"-p": prompts, "-n": generated, "-pg": pairs, "-d": depths, "--kv": kv}
    if startup and any(idle.values()):
        raise UsageError(f"{', '.join(name for name, given in idle.items() if given)} has no effect with --startup")
    writer = make_writer(output, *((start.COLUMNS, start.heading) if startup else (speed.COLUMNS, speed.heading)))
    formats = split_words("--weights", weights or ["auto"])
    counts = [set_threads(n) for n in (parse_numbers("--threads", threads, 1, MAX_THREADS) if threads else [None])]
    bars = Bars(quiet, threaded=False)
    downloading = bars.bar("downloading")
    if startup:
        measuring = start.Startup(
            model, formats, counts, repetitions, warmup,
            progress=bars.bar("starting"), download_progress=downloading,
        )  # fmt: skip
        print_rows(measuring.rows(), writer, bars)
        return
    cases = parse_cases(prompts or ["512"], generated or ["128"], depths or ["0"], pairs or [])
    plan = Plan(formats, counts, parse_policies(kv or ["k4v4"]), cases, repetitions, warmup)

    def ready(weights: str) -> "Model":
        from ..kernels.warmup import warm_up
        from ..models.load import load

        loaded = load(model, weights, progress=bars.bar("loading"), download_progress=downloading)
        warm_up(bars.bar("preparing kernels (compiled once)"))
        return loaded

    print_rows(speed.Bench(plan, ready, set_threads, progress=bars.bar("measuring")).rows(), writer, bars)
