"""``mixkv window-curve`` as a person meets it, on the toy model, whose tokens are bytes."""

import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mixkv import CachePolicy, cli
from mixkv.experiments.keys import ids_digest
from mixkv.experiments.texts import default_text
from mixkv.experiments.window.curve import measure
from mixkv.experiments.window.table import ranges_of
from mixkv.models.load import Model

from ...refusals import refused

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
KEYS = {
    "kind", "key", "schema", "mixkv", "cpu_info", "os", "python", "numpy", "numba", "model", "weights", "policy",
    "document", "document_digest", "tokens", "windows", "errors", "by_layer", "kv_bytes_per_token", "seconds",
    "pass_seconds", "command", "threads",
}  # fmt: skip


def window_curve(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["window-curve", "-m", "toy", "--threads", "1", *arguments], input=text)


def answer(*arguments: str, text: str | None = None) -> str:
    result = window_curve(*arguments, text=text)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def row(*arguments: str, text: str | None = None) -> dict[str, Any]:
    return json.loads(answer(*arguments, "-o", "jsonl", text=text))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_row_is_what_measure_finds(file: str, toy: Model) -> None:
    found = row(file, "-n", "250", "--windows", "0:128:32,200", "--k-bits", "3", "--tile", "32", "--compare-time")
    ids = list(TEXT.encode())[:250]
    policy = CachePolicy(k_bits=3, tile=32)
    curve = measure(toy, ids, policy, [0, 32, 64, 96, 128, 200])
    assert set(found) == KEYS
    assert (found["kind"], found["schema"], found["tokens"], found["threads"]) == ("window-curve", 1, 250, 1)
    assert (found["model"], found["weights"], found["policy"]) == ("toy", "f32", str(policy))
    assert (found["document"], found["document_digest"]) == ("a text.txt", ids_digest(ids))
    assert found["windows"] == [0, 32, 64, 96, 128, 200]
    assert found["kv_bytes_per_token"] == list(curve.kv_bytes_per_token)
    np.testing.assert_allclose(found["errors"], curve.errors, rtol=1e-4)
    np.testing.assert_allclose(found["by_layer"], curve.by_layer, rtol=1e-4)
    assert found["seconds"] > 0 and found["pass_seconds"] > 0
    assert re.fullmatch("[0-9a-f]{16}", found["key"])


def test_the_command_of_a_row_finds_it_again(file: str) -> None:
    found = row(file, "-n", "100", "--windows", "5,20,7", "--policy", "k2v4")
    words = shlex.split(found["command"])
    assert words[:2] == ["mixkv", "window-curve"]
    again = row(*words[2:])
    for name in ("key", "windows", "errors", "by_layer", "policy", "command", "document_digest"):
        assert again[name] == found[name], name
    assert found["pass_seconds"] is None


def test_a_key_depends_on_what_the_numbers_depend_on(file: str) -> None:
    options = ["-n", "70", "--windows", "0,64"]
    keys = [
        row(*arguments)["key"]
        for arguments in (
            [file, *options], [file, *options, "--compare-time"], [file, *options, "--k-bits", "8"],
            [file, "-n", "71", "--windows", "0,64"], [file, "-n", "70", "--windows", "0,32"],
            [file, *options, "--weights", "q8"],
        )
    ]  # fmt: skip
    assert keys[0] == keys[1] and len(set(keys)) == 5


def test_the_text_is_that_of_pythons_topics_or_of_stdin() -> None:
    found = row("-n", "130")
    assert (found["document"], found["document_digest"]) == ("topics", ids_digest(list(default_text().encode())[:130]))
    assert found["windows"] == [0, 64, 128] and "window-curve -m toy" in found["command"]
    short = row("-", text=TEXT)
    assert (short["document"], short["tokens"]) == ("stdin", len(TEXT))


def test_tables_have_a_line_for_each_window(file: str) -> None:
    found = row(file, "--windows", "0,100,1000")
    lines = list(csv.DictReader(io.StringIO(answer(file, "--windows", "0,100,1000", "-o", "csv"))))
    assert [int(line["window"]) for line in lines] == [0, 100, 1000]
    for i, line in enumerate(lines):
        assert float(line["error"]) == pytest.approx(found["errors"][i], rel=1e-4)
        assert float(line["kv_bytes_per_token"]) == found["kv_bytes_per_token"][i]
        assert [float(line[f"layer_{n}"]) for n in range(3)] == pytest.approx(found["by_layer"][i], rel=1e-4)
    text = answer(file, "--windows", "0,100,1000", "--compare-time")
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["window", "error", "largest (layer)", "KV bytes/token"]
    assert [row_[0] for row_ in cells[2:]] == ["0", "100", "1000"] and cells[4][1:3] == ["0.00000", ""]
    worst = max(range(3), key=lambda n: found["by_layer"][0][n])
    assert cells[2][1:3] == [f"{found['errors'][0]:.5f}", f"{found['by_layer'][0][worst]:.5f} ({worst})"]
    assert f"{len(TEXT)} tokens of a text.txt" in text and " passes" in text and "but for its window" in text
    assert json.loads(answer(file, "--windows", "0", "-o", "json"))[0]["windows"] == [0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "64"], ["--window has no effect", "--windows"]),
        (["--tokens", "0"], ["--tokens must be 1 or more", "0"]),
        (["--windows", "64-1"], ["--windows", "ends before it begins"]),
        (["--windows", "99999999"], ["--windows must be from 0 to 16777216"]),
        (["--policy", "tiny"], ["one tier and no overrides", "3 tiers"]),
        (["--policy", "layers=0[k_bits=8]"], ["one tier and no overrides", "1 overrides"]),
        (["-o", "xml"], ["md, csv, json, jsonl", "xml"]),
        (["--k-bits", "5"], ["k_bits"]),
        (["--threads", "9999"], ["--threads"]),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    file: str, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixkv.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(window_curve(file, *arguments), 2, *words)


def test_texts_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    refused(window_curve(str(tmp_path / "none")), 5, "none", "cannot be read")
    refused(window_curve("-", text=""), 5, "empty")
    refused(window_curve("-n", "20000"), 5, "20000 tokens do not fit into the context of 16384")


def test_windows_are_written_as_ranges_where_they_are_some() -> None:
    assert ranges_of([0, 64, 128]) == "0:128:64" and ranges_of([0, 64]) == "0,64" and ranges_of([7]) == "7"
    assert ranges_of([0, 64, 100]) == "0,64,100"
