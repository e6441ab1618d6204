"""``mixkv window-curve``: what every size of the recent window costs in local error, from one pass."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.errors import UsageError
from .options import CacheOptions, ModelOption, takes_cache_options
from .shell import Bars, load_each, print_rows, read_text, reported, set_threads

if TYPE_CHECKING:
    from ..experiments.tables import Row


@reported
@takes_cache_options
def window_curve(
    file: Annotated[
        str | None, typer.Argument(help='The text, in UTF-8; "-" reads stdin.', show_default="Python's help topics")
    ] = None,
    model: ModelOption = "smollm2",
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="Most tokens to measure on, from the beginning.")
    ] = 2048,
    windows: Annotated[
        list[str] | None,
        typer.Option(
            help="Windows in tokens: 0,64,128 or 0:1024:64; each once.", show_default="up to 64 multiples of the tile"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Weight format; others than f32 blur what is measured.")] = "f32",
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
    compare_time: Annotated[
        bool, typer.Option("--compare-time", help="Also time a pass that measures nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores unless given.")] = None,
    *,
    cache: CacheOptions,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Find the local error of attention for many sizes of the recent window, from one pass over a text.

    The policy says everything but the window. md and csv have a line for each window, json and jsonl one object.
    """
    if cache.window is not None:
        raise UsageError("--window has no effect: --windows says which are measured")
    if tokens < 1:
        raise UsageError(f"--tokens must be 1 or more, found {tokens}")
    policy = cache.policy()
    from ..engine.policy import MAX_WINDOW
    from ..experiments.ranges import parse_numbers
    from ..experiments.tables import make_writer
    from ..experiments.texts import default_text
    from ..experiments.window import curve as curves
    from ..experiments.window import table
    from ..models.fingerprint import fingerprint

    found: list[Row] = []
    writer = make_writer(output, table.COLUMNS, lambda _: table.heading(found[0]))
    curves.check_policy(policy)
    wanted = None if windows is None else parse_numbers("--windows", windows, 0, MAX_WINDOW)
    if file == "-" and sys.stdin is None:
        raise UsageError("stdin is closed: there is no text to read")
    text = default_text() if file is None else read_text(None if file == "-" else Path(file))
    used_threads = set_threads(threads)
    from ..kernels.warmup import warm_up

    bars = Bars(quiet)
    with bars:
        loaded = load_each(model, {weights}, bars)[weights]
        ids = loaded.encode(text)[:tokens]
        warm_up(bars.bar("preparing kernels (compiled once)"))
        curve = curves.measure(
            loaded, ids, policy, wanted, compare_time=compare_time, progress=bars.bar("measuring the layers")
        )
    line = table.command_line(file, model, len(ids), weights, policy, curve.windows)
    document = "topics" if file is None else "stdin" if file == "-" else Path(file).name
    found.append(
        table.row_of(
            curve, model=model, model_digest=fingerprint(loaded.config, loaded.transformer.weights), weights=weights,
            policy=policy, document=document, token_ids=ids, threads=used_threads, command=line,
        )
    )  # fmt: skip
    print_rows(iter(found if output in ("json", "jsonl") else table.lines_of(found[0])), writer, bars)
