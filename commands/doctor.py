"""``mixkv doctor``: whether it can work here, and what is in its way."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..models.errors import CheckError
from .options import AsJson
from .shell import reported, say


@reported
def doctor(
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on stderr, and no checks that are ok.")
    ] = False,
) -> None:
    """Check CPU, threads, memory, cache folders, disk, models and software, and say what is wrong and what to do.

    ok: all is well. note: it works, and could do better. problem: it does not work as it should; the exit code is then 8.
    """
    from ..experiments.doctor import OK, PROBLEM, diagnose

    def progress(part: str) -> None:
        if part == "self-test" and not quiet:
            say("mixkv: making the kernels ready (half a minute where they are not compiled yet)")

    checks = diagnose(progress=progress)
    problems = [check.name for check in checks if check.state == PROBLEM]
    if as_json:
        print(json.dumps({"ok": not problems, "checks": [asdict(check) for check in checks]}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            if not (quiet and check.state == OK):
                print(f"{check.state:8} {check.name:{width}}  {check.text}")
    if problems:
        raise CheckError(f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(problems)}")
