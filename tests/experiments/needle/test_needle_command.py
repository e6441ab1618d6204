"""``mixkv needle`` as a person meets it, on the toy model, whose tokens are bytes and which finds nothing."""

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from typer.testing import CliRunner, Result

import mixkv.models.load
from mixkv import cli
from mixkv.commands import shell
from mixkv.engine import memory
from mixkv.experiments.needle import run as running
from mixkv.experiments.needle.report import UNSEEN
from mixkv.models.errors import UsageError
from mixkv.models.load import Model

from ...refusals import refused

SMALL = ("--lengths", "400", "--depths", "0.5")


def mixkv_needle(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["needle", "-m", "toy", "--threads", "1", *arguments], input=text)


def rows(*arguments: str, text: str | bytes | None = None) -> list[dict[str, Any]]:
    result = mixkv_needle(*arguments, "-o", "jsonl", text=text)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return [json.loads(line) for line in result.stdout.splitlines()]


PARSERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "csv": lambda text: list(csv.DictReader(io.StringIO(text))),
}


@pytest.mark.parametrize("output", ["json", "jsonl", "csv"])
def test_every_format_has_a_row_for_each_length_depth_trial_and_policy(output: str) -> None:
    options = ["--lengths", "400,450", "--depths", "0:1:0.5", "--trials", "2", "--kv", "k2v2,f32", "-o", output]
    result = mixkv_needle(*options)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    found = PARSERS[output](result.stdout)
    assert [(int(row["length"]), float(row["depth"]), int(row["trial"]), row["spec"]) for row in found] == [
        (length, depth, trial, spec)
        for length in (400, 450) for depth in (0, 0.5, 1) for trial in (0, 1) for spec in ("k2v2", "f32")
    ]  # fmt: skip
    for row in found:
        assert (row["kind"], row["model"], row["weights"], row["reference_weights"]) == ("needle", "toy", "f32", "f32")
        assert float(row["nll"]) > 1 and str(row["correct"]) == "False" and row["numba"] == numba.__version__
        assert float(row["kld"]) == 0 if row["spec"] == "f32" else float(row["kld"]) > 1e-3


def test_markdown_is_what_comes_without_a_format() -> None:
    result = mixkv_needle("--lengths", "400,450", "--depths", "0,1", "--kv", "k2v2", "--kv", "f32")
    assert (result.exit_code, result.stderr) == (0, "")
    heading, *_ = result.stdout.split("\n\n")
    assert "Numba" in heading and "toy, weights f32; reference: a cache of float32" in heading
    assert "task passkey, plain text, text topics, seed 0" in heading
    titles = [line for line in result.stdout.splitlines() if line.startswith("Found")]
    assert titles == ["Found by the reference:", "Found with k2v2:", "Found with f32:"]
    assert result.stdout.count("|            400 | 0 % | 0 % |") == 3
    summary = [line.split("|") for line in result.stdout.splitlines() if line.startswith(("| reference", "| k", "| f"))]
    assert [line[1].strip() for line in summary] == ["reference", "k2v2", "f32"]
    assert [line[2].strip() for line in summary] == ["0/4 = 0.0 %"] * 3
    assert float(summary[0][-3]) == float(summary[2][-3]) == 0 < float(summary[1][-3]) <= float(summary[1][-2])
    assert result.stdout.endswith(f"\n\n{UNSEEN}\n")


def test_what_is_measured_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    class Watched(running.Needle):
        def __init__(self, models: Any, text: str, plan: Any, **options: Any) -> None:
            plans.append(plan)
            raise UsageError("seen")

    monkeypatch.setattr(running, "Needle", Watched)
    refused(mixkv_needle(), 2, "seen")
    (plan,) = plans
    assert [policy.spec for policy in plan.policies] == ["f16", "k4v4", "k2v2"]
    assert (plan.lengths, plan.depths, plan.trials) == ([512, 1024, 2048], [0, 0.25, 0.5, 0.75, 1], 1)
    assert (plan.task.name, plan.task.keys, plan.task.seed, plan.task.chat) == ("passkey", 1, 0, False)
    assert (plan.weights, plan.reference_weights, plan.document) == ("f32", "f32", "topics")
    refused(mixkv_needle("--task", "multikey", "--weights", "q8"), 2, "seen")
    assert plans[1].task.keys == 4 and plans[1].reference_weights == "q8"


def test_a_row_names_the_command_that_measures_it_again(tmp_path: Path) -> None:
    file = tmp_path / "a text.txt"
    file.write_text("Something or other is said here. And here.\n" * 100)
    options = ["--task", "multikey", "--keys", "3", "--trials", "2", "--seed", "9", "--text", str(file)]
    options += [
        "--kv",
        "old=k3c/v2t layers=0[k_bits=8]",
        "--kv",
        "f16",
        "--weights",
        "q8",
        "--reference-weights",
        "f32",
    ]
    first = rows("--lengths", "700", "--depths", "0.25,.75", *options)
    assert len(first) == 8
    for row in first[2:5]:
        words = shlex.split(row["command"])
        assert words[:2] == ["mixkv", "needle"]
        result = CliRunner().invoke(cli.app, [*words[1:], "--threads", "1"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == row


def test_a_seed_makes_other_keys_and_the_same_one_the_same_rows() -> None:
    assert rows(*SMALL, "--kv", "k2v2") == rows(*SMALL, "--kv", "k2v2")
    (one,), (other,) = rows(*SMALL, "--kv", "k2v2"), rows(*SMALL, "--kv", "k2v2", "--seed", "1")
    assert one["expected"] != other["expected"] and one["key"] != other["key"]


def test_a_text_comes_from_a_file_or_stdin(tmp_path: Path) -> None:
    text = "".join(f"Line {i} says nothing.\n" for i in range(100))
    (tmp_path / "text").write_text(text)
    (from_file,) = rows(*SMALL, "--kv", "k2v2", "--text", str(tmp_path / "text"))
    (from_stdin,) = rows(*SMALL, "--kv", "k2v2", "--text", "-", text=text)
    assert from_file["document"] == str(tmp_path / "text") and from_stdin["document"] == "-"
    assert from_file["key"] == from_stdin["key"] and from_file["nll"] == from_stdin["nll"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lengths", "50"], 2, ["length must be from", "found 50"]),
        (["--lengths", "16380"], 2, ["length must be from", "to 16374", "found 16380"]),
        (["--lengths", "0"], 2, ["--lengths", "found 0"]),
        (["--lengths", "400,400"], 2, ["lengths", "400 twice"]),
        (["--lengths", "long"], 2, ["--lengths", "'long'"]),
        (["--depths", "1.5"], 2, ["--depths", "from 0 to 1", "found 1.5"]),
        (["--depths", "half"], 2, ["--depths", "'half'"]),
        (["--depths", "0:1"], 2, ["--depths", "0:1:0.25", "'0:1'"]),
        (["--trials", "0"], 2, ["trials", "found 0"]),
        (["--seed", "-1"], 2, ["seed", "found -1"]),
        (["--task", "find"], 2, ["task", "passkey, multikey", "'find'"]),
        (["--keys", "3"], 2, ["--keys has no effect with --task passkey"]),
        (["--task", "multikey", "--keys", "21"], 2, ["keys", "from 2 to 20", "found 21"]),
        (["--kv", "k5v4"], 2, ["k_bits", "nearest is 4"]),
        (["--kv", "k4v4,balanced"], 2, ["policies", "twice"]),
        (["--weights", "f7"], 2, ["f7", "auto, f32, bf16, q8, q4"]),
        (["--reference-weights", "f7"], 2, ["f7", "auto, f32, bf16, q8, q4"]),
        (["--threads", "0"], 2, ["--threads", "found 0"]),
        (["-o", "xml"], 2, ["xml", "md, csv, json, jsonl"]),
        (["--chat"], 2, ["'toy' has no chat template"]),
        (["--text", "no/such/file"], 5, ["no/such/file", "cannot be read"]),
        (["--text", "-"], 5, ["found 0: give a longer text"]),
        (["-m", "no-such-model"], 2, ["no-such-model", "smollm2"]),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], code: int, words: list[str]) -> None:
    refused(mixkv_needle(*SMALL, *options), code, *words)


def test_a_cache_that_there_is_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_nbytes", lambda: 1000)
    refused(mixkv_needle(*SMALL), 2, "a cache of 410 tokens", "1000 bytes of memory are available")


@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        ([], ["f32"]),
        (["--weights", "q8"], ["q8"]),
        (["--weights", "q8", "--reference-weights", "f32"], ["f32", "q8"]),
    ],
)
def test_each_weight_format_is_loaded_once(
    options: list[str], loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = mixkv.models.load.load

    def load(name: str, weights: str, **options: Any) -> Model:
        asked.append(weights)
        return real(name, weights, **options)

    monkeypatch.setattr(mixkv.models.load, "load", load)
    (row,) = rows(*SMALL, "--kv", "f32", *options)
    assert sorted(asked) == loaded
    assert (row["kld"] == 0) == (len(loaded) == 1)


def test_progress_is_drawn_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[int, int, str]]] = {}

    def bar(self: shell.Bars, label: str) -> Any:
        return lambda done, total, detail="": drawn.setdefault(label, []).append((done, total, detail))

    monkeypatch.setattr(shell.Bars, "bar", bar)
    rows("--lengths", "400,450", "--depths", "0,1", "--kv", "f16,f32")
    told = drawn["looking for keys"]
    total = 3 * 2 * (400 + 450)
    assert told[0][:2] == (0, total) and told[-1][:2] == (total, total) and len(told) > 12
    assert "450 tokens, depth 1, trial 0, f32" in {detail for _, _, detail in told} and "loading f32" in drawn


def test_rows_are_printed_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is by then is kept when a run ends early."""
    real, asked = running.ask, []

    def ask(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(running, "ask", ask)
    options = ["--lengths", "400", "--depths", "0,1", "--kv", "f16"]
    result = mixkv_needle(*options, "-o", "jsonl")
    assert result.exit_code == 130 and len(result.stdout.splitlines()) == 1
    asked.clear()
    result = mixkv_needle(*options)
    assert result.exit_code == 130 and "0/1 = 0.0 %" in result.stdout
