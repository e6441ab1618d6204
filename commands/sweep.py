"""``mixkv sweep``: many caches on many texts; rows in a file, with which a run that was ended goes on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import UsageError
from .options import takes_axes
from .shell import Bars, reported, say, set_threads

if TYPE_CHECKING:
    from ..experiments.sweep.grid import Grid


@reported
@takes_axes
def sweep(
    file: Annotated[
        Path | None, typer.Argument(metavar="GRID.toml", help="What to measure; options change what it says.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, as JSON Lines; rows in it are kept.")] = Path(
        "results.jsonl"
    ),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for generate --model.", show_default="smollm2"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="What the lists below change; may be given several times.", show_default="balanced"
        ),
    ] = None,
    *,
    axes: dict[str, list[str]],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A file, or topics: Python's; may be given several times.", show_default="topics"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", help="Tokens of each piece.", show_default="2048")
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option("--seeds", help="Pieces of each text: 0 is its beginning, others lie anywhere.", show_default="0"),
    ] = None,
    first: Annotated[int | None, typer.Option(help="Compare predictions only from this position on.")] = None,
    regime: Annotated[str | None, typer.Option(help="chunked, decode or both, as in `mixkv eval`.")] = None,
    shadow: Annotated[
        bool | None, typer.Option("--shadow/--no-shadow", help="Also find the error of each layer and head.")
    ] = None,
    continuation: Annotated[
        int | None, typer.Option("--continue", help="Generate so many tokens behind each piece, with both caches.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weight format.", show_default="f32")] = None,
    reference_weights: Annotated[
        str | None, typer.Option(help="Weight format of the reference.", show_default="that of --weights")
    ] = None,
    together: Annotated[int, typer.Option(help="Policies beside one pass of the reference, in one process.")] = 4,
    workers: Annotated[int, typer.Option(help="Processes; they divide the threads between them.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of all processes; all cores unless given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be measured.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure every policy of a grid on every text, as `mixkv eval` does, into a results file.

    Lists (2,3,4) and ranges (0:512:128, the end included) multiply out. Each policy, text and seed is a row, written when
    it is done. Rows that the file has already are not measured again.
    """
    from ..experiments.ranges import parse_numbers
    from ..experiments.sweep import grid as grids
    from ..models.limits import MAX_SWEEP_SEED

    setting, policies, lists, pieces = grids.load(file) if file is not None else ({}, [], {}, {})
    given = {
        "model": model, "tokens": tokens, "first": first, "regime": regime, "shadow": shadow, "weights": weights,
        "continuation": continuation, "reference_weights": reference_weights,
    }  # fmt: skip
    setting |= {name: x for name, x in given.items() if x is not None}
    setting.setdefault("reference_weights", setting.get("weights", "f32"))
    lists |= {name: grids.parse_axis(name, texts) for name, texts in axes.items()}
    chosen = pieces.get("seeds", [0]) if seeds is None else parse_numbers("--seeds", seeds, 0, MAX_SWEEP_SEED)
    grid = grids.make(setting, policy or policies, lists, text or pieces.get("documents", []), chosen)
    if grid.merged:
        say(f"mixkv: {grid.merged} of the combinations are the same policy as another, and are measured once")
    for name, value in (("--together", together), ("--workers", workers)):
        if not 1 <= value <= 64:
            raise UsageError(f"{name} must be from 1 to 64, found {value}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    _measure(grid, output, together, workers, set_threads(threads), dry_run, quiet)


def _measure(
    grid: "Grid", output: Path, together: int, n_workers: int, threads: int, dry_run: bool, quiet: bool
) -> None:
    """Run a sweep, and print a table of all its rows."""
    from ..experiments.sweep import run as sweeps
    from ..experiments.sweep.journal import Journal
    from ..experiments.sweep.workers import Workers
    from ..experiments.tables import make_writer
    from ..kernels.warmup import warm_up
    from ..models.load import open_model
    from ..models.pack import check_weights_option

    if n_workers > threads:
        raise UsageError(f"--workers must be at most the {threads} threads that they divide, found {n_workers}")
    for weights in (grid.setting.weights, grid.setting.reference_weights):
        check_weights_option(weights)
    bars = Bars(quiet)
    with bars:
        opened = open_model(grid.setting.model, progress=bars.bar("downloading"))
        parts = sweeps.pieces(grid, opened)
    sweeps.check_memory(grid, opened, parts, n_workers, together)
    if dry_run:
        for part in parts:
            for policy in grid.policies:
                print(f"{part.document}\t{part.seed}\t{len(part.ids)}\t{policy}")
        return
    failures: list[Any] = []
    own = threads // n_workers
    with Journal(output) as journal:
        if journal.torn:
            say(f"mixkv: {output}: a last row that broke off, {journal.torn} bytes, is cut off and measured again")
        with bars:  # here, and not in each worker
            warm_up(bars.bar("preparing kernels (compiled once)"))
        with Workers(n_workers, own, grid.setting) as workers, bars:
            about = {"threads": own, "workers": n_workers}
            keys = {cell.key for cell in sweeps.cells_of(grid, parts, workers.fingerprints())}
            rows = sweeps.run(
                grid, parts, journal, workers, about, together=together, progress=bars.bar("measuring")
            )  # fmt: skip
            failures += [row for row in rows if isinstance(row, sweeps.Failure)]
        writer = make_writer("md", sweeps.COLUMNS, sweeps.heading)
        order = "document", "seed", "kv_bytes_per_old_token", "window", "policy"
        for row in sorted(journal.rows(keys), key=lambda row: [row[name] for name in order]):
            writer.row(row)
    print(writer.end(), end="")
    if failures:
        for failure in failures:
            say(f"mixkv: not measured: {failure.cell}: {failure.error}")
        raise failures[0].error
