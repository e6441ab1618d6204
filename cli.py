"""The command line: the commands by name. They stand in commands/; heavy imports stand inside of them.

Exit codes: 0 done; 1 another error; 2 wrong usage; 3 a model file refused; 4 a download failed; 5 a prompt refused;
6 numbers that cannot be continued with; 7 a session or golden file refused, or not written; 8 a check failed;
130 interrupted; 141 the reader of stdout went away.
"""

import gc
from typing import Annotated

import typer

from . import __version__
from .commands.bench import bench
from .commands.convert import convert
from .commands.doctor import doctor
from .commands.generate import generate
from .commands.golden import golden
from .commands.info import info
from .commands.models import models, pull, rm
from .commands.needle import needle
from .commands.quality import evaluate, plan
from .commands.report import report
from .commands.sweep import sweep
from .commands.window_curve import window_curve

app = typer.Typer(
    name="mixkv",
    help="Generate text with a mixed-precision KV cache, on the CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "generate": generate,
    "info": info,
    "models": models,
    "pull": pull,
    "rm": rm,
    "convert": convert,
    "doctor": doctor,
    "bench": bench,
    "eval": evaluate,
    "sweep": sweep,
    "window-curve": window_curve,
    "plan": plan,
    "needle": needle,
    "report": report,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(golden, name="golden")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixkv {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate text with a mixed-precision KV cache, on the CPU."""


def collect_seldom() -> None:
    """Let Python look for cycles of garbage less often: of half a million objects made at the start, none is garbage."""
    gc.set_threshold(10_000)


def main() -> None:
    """Run the command line."""
    collect_seldom()
    try:
        app()
    finally:
        gc.freeze()  # else Python looks at every object once more before it ends, for longer than an answer takes


if __name__ == "__main__":
    main()
