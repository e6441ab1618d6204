"""What all commands share: errors as one line and an exit code, bars, threads, texts coming in, tables going out."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..models.errors import MixkvError, PromptError, UsageError

if TYPE_CHECKING:
    from ..experiments.tables import Row, Writer
    from ..models.load import Model

INTERRUPTED, PIPE_CLOSED = 130, 141


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one line on stderr and the documented exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            if sys.stdout is None:
                raise UsageError("stdout is closed: there is nowhere to write to")
            if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal's encoding lacks is no error
                sys.stdout.reconfigure(errors="replace")
            command(*args, **options)
            sys.stdout.flush()
        except MixkvError as error:
            say(f"mixkv: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("mixkv: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            drop_unwritten()
            raise typer.Exit(PIPE_CLOSED) from None
        except (OSError, MemoryError) as error:
            what = getattr(error, "strerror", None) or error or type(error).__name__
            where = getattr(error, "filename", None)
            say(f"mixkv: {where}: {what}" if isinstance(where, str) else f"mixkv: {what}")
            drop_unwritten()
            raise typer.Exit(MixkvError.exit_code) from None

    return run


def check_output(option: str, path: Path, *inputs: Path | None) -> None:
    """UsageError for a file that could not be written in the end, before minutes of work, or that is one of the inputs."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
        same = [each for each in inputs if each is not None and path.exists() and each.exists() and path.samefile(each)]
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if is_folder:
        raise UsageError(f"{option} {path}: is a folder")
    if not has_folder:
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if same:
        raise UsageError(f"{option} {path}: is also read, as {same[0]}; name another file")


def write_output(option: str, path: Path, text: str) -> None:
    """Write a file as a whole, beside its place and renamed; UsageError where that cannot be."""
    from ..models.hub.files import write_whole

    place = Path(os.path.realpath(path))  # a link stays one
    try:
        if place.exists() and not place.is_file():  # a pipe, a terminal
            place.write_bytes(text.encode())
        else:
            write_whole(place, text.encode())
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}") from None


def drop_unwritten() -> None:
    """What is still buffered for a stdout that takes nothing would raise again at exit: let it go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(line: str) -> None:
    """One line on stderr, where there is a stderr that takes it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class Bars:
    """Progress bars on stderr, one below the other, gone when they are done; entered again, they begin anew.

    Without ``threaded`` they are drawn only when a callback is called: no thread takes time from what is measured.
    """

    def __init__(self, quiet: bool, *, threaded: bool = True) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._off, self._threaded = quiet or not self._console.is_terminal, threaded
        self._begin()

    def _begin(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=self._console, transient=True, auto_refresh=self._threaded,
            disable=self._off,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        self._begin()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def bar(self, label: str) -> Callable[..., None]:
        """A callback (done, in all[, what comes next]); its bar appears with the first call."""

        def update(done: int, total: int, detail: str = "") -> None:
            text = f"{label}: {detail}" if detail else label
            if not total:  # nobody knows: the bar moves to and fro
                text += f" {size(done)}"
            if label not in self._tasks:
                self._tasks[label] = self._progress.add_task(text, total=total or None)
            self._progress.update(
                self._tasks[label], completed=done, total=total or None, description=text, refresh=not self._threaded
            )

        return update


def set_threads(threads: int | None) -> int:
    """Limit the kernels and NumPy's BLAS to so many threads; returns the number in force."""
    import threadpoolctl

    from ..kernels.threads import most_threads, set_num_threads

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, most_threads())
    if threads is None:
        threads = most
    if not 1 <= threads <= most:
        why = "the cores of this machine" if most == cores else "NUMBA_NUM_THREADS in the environment"
        raise UsageError(f"--threads must be from 1 to {most}, {why}, found {threads}")
    set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)
    return threads


def read_text(file: Path | None) -> str:
    """The whole of a file, or of stdin for None; PromptError where it is no UTF-8, too long or cannot be read."""
    from ..experiments.texts import decoded, read
    from ..models.limits import MAX_PROMPT_BYTES

    if file is not None:
        return read(file)
    if sys.stdin is None:
        raise UsageError("stdin is closed: there is no text to read")
    try:
        return decoded(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "stdin")
    except OSError as error:
        raise PromptError(f"stdin: cannot be read: {error.strerror}") from None


def load_each(model: str, formats: set[str], bars: Bars) -> dict[str, "Model"]:
    """The model in each weight format."""
    from ..models.load import load

    return {
        weights: load(
            model, weights, progress=bars.bar(f"loading {weights}"), download_progress=bars.bar("downloading")
        )
        for weights in sorted(formats)
    }


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def print_table(described: dict[str, Any], indent: str = "") -> None:
    """Names and values in two columns; a dictionary below its name."""
    width = max(28 - len(indent), *(len(name) for name in described))
    for name, value in described.items():
        if isinstance(value, dict) and len(value) > 2:
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        elif isinstance(value, dict):
            print(f"{indent}{name:{width}} " + ", ".join(f"{key}: {x}" for key, x in value.items()))
        else:
            print(f"{indent}{name:{width}} {value}")


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers as people read them: six digits, and "none" for what is not a finite number."""
    return {
        name: rounded(x) if isinstance(x, dict) else "none" if x is None else f"{x:.6g}" if isinstance(x, float) else x
        for name, x in numbers.items()
    }


def print_rows(rows: "Iterator[Row]", writer: "Writer", bars: Bars) -> None:
    """Print rows as they are measured, as far as the format allows; whatever ends it, all that there are by then."""
    try:
        while True:
            with bars:  # not while something is printed
                row = next(rows, None)
            if row is None:
                break
            print(writer.row(row), end="", flush=True)
    finally:
        print(writer.end(), end="", flush=True)
