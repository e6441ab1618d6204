"""Sweeps that are killed: rows are neither lost nor there twice, and no process stays behind."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixkv.commands import shell
from mixkv.experiments.sweep import grid as grids
from mixkv.experiments.sweep import run as sweep
from mixkv.experiments.sweep.journal import Journal
from mixkv.experiments.sweep.workers import Workers
from mixkv.kernels.warmup import warm_up
from mixkv.models.load import open_model

from .processes import Run, cpu_seconds, lines, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says which processes are alive")

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
AXES = {"window": [0, 64, 100], "k_bits": [2, 3, 4, 8], "v_bits": [2, 4]}
TIMES = ("seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "workers")
CELLS = 48


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    warm_up()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


def options(text: Path, output: Path) -> list[str]:
    return [
        "-m", "toy", "--weights", "q8", "--text", str(text), "-n", "400", "--seeds", "0,5", "-o", str(output),
        *(x for name, values in AXES.items() for x in (f"--{name.replace('_', '-')}", ",".join(map(str, values)))),
        "--threads", "2", "--workers", "2", "--together", "2",
    ]  # fmt: skip


def endless(text: Path, output: Path) -> list[str]:
    """A sweep of 800 cells that nobody waits for."""
    return ["-m", "toy", "--text", str(text), "-n", "1000", "--window", "1:400", "--k-bits", "2,4", "-o", str(output)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by their keys, without what is different each time, and by how many workers."""
    return {row["key"]: {name: x for name, x in row.items() if name not in TIMES} for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of the whole sweep, measured in one go by one worker, four policies together."""
    setting = {"model": "toy", "weights": "q8", "reference_weights": "q8", "tokens": 400}
    grid = grids.make(setting, [], AXES, [str(text)], [0, 5])
    parts = sweep.pieces(grid, open_model("toy"))
    path = tmp_path_factory.mktemp("whole") / "results.jsonl"
    with Workers(1, 1, grid.setting) as workers, Journal(path) as journal:
        for row in sweep.run(grid, parts, journal, workers, {"threads": 1, "workers": 1}, together=4):
            assert isinstance(row, dict), row
    found = without_times(rows_of(path))
    assert len(found) == CELLS
    return found


def no_process_stays(run: Run) -> None:
    assert wait_for(lambda: not run.alive())


def tear(path: Path, chance: random.Random) -> None:
    """Leave some bytes of the last row only, as a kill may that comes while it is written."""
    data = path.read_bytes()
    last = len(data) - (data[:-1].rfind(b"\n") + 1)
    if last > 1:
        os.truncate(path, len(data) - chance.randrange(1, last))


@pytest.mark.fault("sweep-killed")
@pytest.mark.parametrize("seed", [1])
def test_a_sweep_that_is_killed_again_and_again_measures_every_cell_once(
    text: Path, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]], seed: int
) -> None:
    chance, path, kills = random.Random(seed), tmp_path / "results.jsonl", 4
    for attempt in range(kills):
        with Run(*options(text, path)) as run:
            if attempt == 1:  # while it starts: there may be no worker yet, or one that loads
                time.sleep(chance.random())
            else:
                more = lines(path) + chance.randrange(1, CELLS // kills)
                wait_for(lambda more=more: lines(path) >= more, run)
                time.sleep(chance.random() / 50)
            run.kill()
            no_process_stays(run)
        if attempt % 2 and path.exists():
            tear(path, chance)
    before = rows_of_whole_lines(path)
    with Run(*options(text, path)) as run:
        code, stdout, stderr = run.finish()
        no_process_stays(run)
    assert (code, stderr.count("\n")) in ((0, 0), (0, 1)), stderr
    assert "a last row that broke off" in stderr or stderr == ""
    rows = rows_of(path)
    assert len(rows) == CELLS and len({row["key"] for row in rows}) == CELLS
    assert rows[: len(before)] == before, "what was there is there as it was"
    assert without_times(rows) == uninterrupted
    assert all(row["workers"] == 2 and row["threads"] == 1 for row in rows)
    assert stdout.count("\n| ") == CELLS + 2


def rows_of_whole_lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


@pytest.fixture
def going(text: Path, tmp_path: Path) -> Iterator[tuple[Run, Path]]:
    """A sweep that has written its first rows."""
    path = tmp_path / "results.jsonl"
    with Run(*endless(text, path), "--threads", "2", "--workers", "2") as run:
        assert wait_for(lambda: lines(path), run), run.finish()
        yield run, path


def test_a_worker_that_is_killed_ends_the_sweep_and_rows_are_kept(going: tuple[Run, Path]) -> None:
    run, path = going
    victims = run.workers()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    code, stdout, stderr = run.finish()
    assert (code, stdout) == (1, "")
    assert stderr == "mixkv: a worker process was ended by signal 9; was there too little memory?\n"
    no_process_stays(run)
    rows = rows_of(path)
    assert len(rows) >= 1 and len({row["key"] for row in rows}) == len(rows)


@pytest.mark.fault("sweep-killed")
def test_ctrl_c_keeps_the_rows(going: tuple[Run, Path]) -> None:
    run, path = going
    run.interrupt()
    assert run.finish() == (shell.INTERRUPTED, "", "mixkv: interrupted\n")
    no_process_stays(run)
    assert len(rows_of(path)) >= 1


def test_ctrl_c_while_workers_start_is_no_traceback(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Run(*endless(text, path), "--threads", "2", "--workers", "2") as run:
        assert wait_for(run.workers, run), run.finish()
        os.kill(run.process.pid, signal.SIGSTOP)  # else it would end its worker before that says anything
        time.sleep(0.5)
        run.interrupt()
        time.sleep(0.5)
        os.kill(run.process.pid, signal.SIGCONT)
        assert run.finish() == (shell.INTERRUPTED, "", "mixkv: interrupted\n")
        no_process_stays(run)


def test_workers_end_with_a_parent_that_they_do_not_talk_to(text: Path, tmp_path: Path) -> None:
    """While they generate, here 17 times 16,000 tokens."""
    path = tmp_path / "results.jsonl"
    more = ["-n", "100", "--continue", "16000", "--together", "16", "--workers", "1", "--threads", "1"]
    with Run(*endless(text, path), *more) as run:
        assert wait_for(lambda: sum(map(cpu_seconds, run.workers())) > 2.5, run), run.finish()  # it has loaded in 1
        run.kill()
        no_process_stays(run)
    assert lines(path) == 0
