"""``mixkv bench`` as a person meets it: stdout, stderr and exit codes, on the toy model."""

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
import pytest
from typer.testing import CliRunner, Result

from mixkv import cli
from mixkv.commands import shell
from mixkv.experiments import bench, machine, startup

from ..refusals import refused

RUNNER = CliRunner()
TINY = ("-m", "toy", "-p", "8", "-n", "4", "-d", "16", "-r", "2")


@pytest.fixture(autouse=True)
def threads_in_force() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB/s without measuring them."""
    monkeypatch.setattr(machine, "run_python", lambda *arguments: "2e9\n")


def mixkv(*arguments: str) -> Result:
    return RUNNER.invoke(cli.app, ["bench", *arguments])


PARSERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "csv": lambda text: list(csv.DictReader(io.StringIO(text))),
}


@pytest.mark.parametrize("output", ["json", "jsonl", "csv"])
@pytest.mark.usefixtures("known_bandwidth")
def test_every_format_has_a_row_for_each_test(output: str) -> None:
    result = mixkv(*TINY, "-o", output)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    rows = PARSERS[output](result.stdout)
    assert [row["test"] for row in rows] == ["pp8 @ d16", "tg4 @ d16"]
    for row in rows:
        assert (row["model"], row["weights"], row["kv"]) == ("toy", "auto", "k4v4")
        assert float(row["avg_ts"]) > 0 and float(row["stddev_ts"]) >= 0 and int(row["avg_ns"]) > 0
        assert int(row["peak_memory_bytes"]) > 0 and row["cpu_info"] and row["numba"] == numba.__version__
    if output != "csv":
        assert all(len(row["samples_ns"]) == len(row["samples_ts"]) == 2 for row in rows)
        assert rows[0]["roofline"] is None and rows[1]["roofline"] > 0
    else:
        assert rows[0]["roofline"] == "" and float(rows[1]["roofline"]) > 0


@pytest.mark.usefixtures("known_bandwidth")
def test_markdown_is_what_comes_without_a_format() -> None:
    result = mixkv(*TINY)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert machine.describe()["cpu_info"] in lines[0] and "2.0 GB/s" in lines[1] and "MB" in lines[2]
    assert [line for line in lines if line.startswith("|")] == lines[4:] and len(lines) == 8


@pytest.mark.usefixtures("known_bandwidth")
def test_options_multiply_out() -> None:
    options = [
        "-p",
        "1-4*2",
        "-n",
        "1",
        "-n",
        "0",
        "-pg",
        "3,2",
        "-pg",
        "2,2",
        "-d",
        "0,5",
        "--kv",
        "f32,k8v4:window=32",
    ]
    result = mixkv("-m", "toy", *options, "--kv", "bf16", "-t", "1,2", "-r", "1", "-o", "jsonl", "--no-warmup")
    assert result.exit_code == 0, result.stderr
    rows = PARSERS["jsonl"](result.stdout)
    tests = ["pp1", "pp2", "pp4", "tg1", "pp3+tg2", "pp2+tg2"]
    tests += [f"{test} @ d5" for test in tests]
    found = [(row["threads"], row["kv"], row["test"]) for row in rows]
    kvs = ("f32", "k8v4:window=32", "bf16")
    assert found == [(threads, kv, test) for threads in (1, 2) for kv in kvs for test in tests]


def test_the_bandwidth_is_measured_in_the_same_run() -> None:
    result = mixkv("-m", "toy", "-p", "0", "-n", "2", "-r", "1", "-o", "json")
    (row,) = json.loads(result.stdout)
    assert 1e8 < row["memory_bytes_per_second"] < 1e13
    assert row["roofline"] == pytest.approx(row["bytes_per_token"] * row["avg_ts"] / row["memory_bytes_per_second"])


def test_a_start_is_measured_by_its_parts() -> None:
    result = mixkv("-m", "toy", "--startup", "-r", "1", "-t", "1", "-o", "json")
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    (row,) = json.loads(result.stdout)
    parts = [row[f"{part}_ns"] for part in (*startup.PARTS, "rest")]
    assert sum(parts) == row["total_ns"] > 0 and row["compiled"] == 0 and row["threads"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "16385"], ["pp16385", "16385 tokens", "16384"]),
        (["-d", "16380", "-p", "0", "-n", "5"], ["tg5 @ d16380", "16385"]),
        (["-d", "16380", "-p", "0", "-n", "0", "-pg", "2,3"], ["pp2+tg3 @ d16380", "16385"]),
        (["-p", "8-x"], ["-p", "'8-x'"]),
        (["-n", "4-2"], ["-n", "4-2"]),
        (["-d", "-1"], ["-d", "'-1'"]),
        (["-pg", "512"], ["-pg", "512,128", "'512'"]),
        (["-p", "0", "-n", "0"], ["nothing to measure"]),
        (["-r", "0"], ["-r must be from 1", "found 0"]),
        (["-r", "-3"], ["found -3"]),
        (["--kv", "q4"], ["cache policy 'q4'", "f16, bf16, f32", "k4v4"]),
        (["--kv", "k4v4:window=x"], ["window", "'x'"]),
        (["--weights", "q5"], ["weights", "q5", "auto, f32, bf16, q8, q4"]),
        (["--weights", "auto,"], ["--weights", "empty"]),
        (["-t", "0"], ["--threads", "found 0"]),
        (["-t", "1,60000"], ["--threads", "60000", "cores"]),
        (["-o", "sql"], ["md, csv, json, jsonl", "'sql'"]),
        (["-m", "no-such-model"], ["no-such-model", "smollm2"]),
        (["--startup", "-p", "8", "--kv", "f32"], ["-p, --kv has no effect with --startup"]),
        (["--startup", "-r", "0"], ["-r must be", "found 0"]),
        (["--startup", "--weights", "q5"], ["weights", "q5"]),
        (["--startup", "-m", "no-such-model"], ["no-such-model"]),
    ],
)
@pytest.mark.parametrize("output", ["md", "json"])
def test_what_cannot_be_measured_is_refused(output: str, options: list[str], words: list[str]) -> None:
    refused(mixkv("-m", "toy", "-o", output, *options), 2, *words)


@pytest.mark.parametrize("output", ["md", "json", "csv", "jsonl"])
@pytest.mark.parametrize("rows", [0, 1])
def test_an_interrupt_prints_the_rows_so_far(output: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repeat, calls = bench.repeat, iter(range(100))

    def interrupted(*arguments: Any) -> tuple[int, int]:
        if next(calls) == 2 * rows + 1:
            raise KeyboardInterrupt
        return repeat(*arguments)

    monkeypatch.setattr(bench, "repeat", interrupted)
    result = mixkv("-m", "toy", "-p", "8,9", "-n", "0", "-r", "2", "--no-warmup", "-o", output)
    assert result.exit_code == shell.INTERRUPTED and result.stderr == "mixkv: interrupted\n"
    if rows == 0:
        assert result.stdout == ""
    elif output == "md":
        assert "| pp8 |" in result.stdout.replace(" " * 2, " ") and "pp9" not in result.stdout
    else:
        assert [row["test"] for row in PARSERS[output](result.stdout)] == ["pp8"]


def test_ctrl_c_keeps_what_was_measured() -> None:
    command = [sys.executable, "-m", "mixkv", "bench", "-m", "toy", "-p", "1", "-n", "16000", "-r", "1", "-o", "jsonl"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == shell.INTERRUPTED and stderr == b"mixkv: interrupted\n"
    assert json.loads(first)["test"] == "pp1" and rest == b""


@pytest.mark.parametrize(("redirection", "code"), [(">/dev/full", 1), (">&-", 2), ("| true", None)])
def test_a_full_or_closed_stream_is_no_traceback(redirection: str, code: int | None) -> None:
    program = f"{sys.executable} -m mixkv bench -m toy -p 1,2 -n 0 -r 1 -o jsonl {redirection}"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, done


def test_bars_begin_anew_and_leave_printed_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: between two bars a row is printed, and nothing of the second one goes above that."""
    terminal = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = shell.Bars(quiet=False, threaded=False)
    update = bars.bar("measuring")
    with bars:
        update(0, 2, "first")
        update(1, 2, "second")
    shown = terminal.getvalue()
    assert "measuring: first" in shown and "measuring: second" in shown
    with bars:
        update(1, 2, "third")
    again = terminal.getvalue()[len(shown) :]
    assert "measuring: third" in again and "second" not in again
    assert "\x1b[1A" not in again[: again.index("measuring")], "it went up before it drew anything"
