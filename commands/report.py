"""``mixkv report``: results as a page."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from ..models.errors import UsageError
from .shell import reported, say


@reported
def report(
    results: Annotated[list[Path], typer.Argument(help='Files of rows, JSON Lines; "-" reads stdin.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page; what stands there is overwritten.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None,
        typer.Option(help="A folder for the figures as SVG and PNG.", show_default="<page>_figures, beside the page"),
    ] = None,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="Write the page alone.")] = False,
    title: Annotated[str | None, typer.Option(help="Of the page.", show_default="the models' names")] = None,
    memory: Annotated[str, typer.Option(help="Memory to fill with a cache: 8GB, 512MB, 8GiB.")] = "8GB",
) -> None:
    """Write result files of `mixkv sweep` and `mixkv bench -o jsonl` as one page, and its figures as files.

    The page needs no network: it opens in a browser from where it lies, with all the rows in it.
    """
    from ..experiments.report import page as pages
    from ..experiments.report import render
    from ..experiments.report.figures_cost import parse_memory
    from ..experiments.report.results import read

    nbytes = parse_memory(memory)
    if no_figures and figures is not None:
        raise UsageError(f"--figures {figures} has no effect with --no-figures")
    if [str(file) for file in results].count("-") > 1:
        raise UsageError("stdin can be read once: - stands there more than once")
    folder = figures or output.with_name(f"{output.stem}_figures")
    for option, place in (("--output", output), *([] if no_figures else [("--figures", folder)])):
        if not place.parent.is_dir():
            raise UsageError(f"{option} {place}: there is no folder {place.parent}")
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder")
    if output.exists() and any(file.exists() and file.samefile(output) for file in results):
        raise UsageError(f"--output {output}: is one of the results, which would be lost")
    render.library()
    found = read(_opened(results))
    for note in found.notes:
        say(f"mixkv: {note}")
    made = pages.make(found, title=title, memory=nbytes)
    if not no_figures:
        render.write_files(made.figures, folder)
    html = pages.page(made, figures_folder=None if no_figures else _address(folder, output.parent))
    beside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(html, encoding="utf-8", errors="replace", newline="")
        beside.replace(output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}") from None
    print(output)


def _opened(results: list[Path]) -> Iterator[tuple[str, BinaryIO]]:
    """The files one after the other, each closed when the next is asked for; UsageError for one that cannot be read."""
    for file in results:
        if str(file) == "-":
            if sys.stdin is None:
                raise UsageError("stdin is closed: there are no rows to read")
            yield "stdin", sys.stdin.buffer
            continue
        try:
            with contextlib.closing(file.open("rb")) as stream:
                yield str(file), stream
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error.strerror}") from None


def _address(folder: Path, start: Path) -> str:
    """The folder's address in a page that lies in ``start``: relative, so that it says nothing of the machine."""
    from urllib.parse import quote

    return quote(Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix())
