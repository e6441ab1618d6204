"""``mixkv eval`` as a person meets it, on the toy model, whose tokens are bytes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
from typer.testing import CliRunner, Result

import mixkv.engine.memory
import mixkv.models.linear
import mixkv.models.load
from mixkv import CachePolicy, Session, cli
from mixkv.commands import shell
from mixkv.experiments.evaluate import evaluate
from mixkv.models.load import Model

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
FULL = ["--window", "0", "--sinks", "0", "--k-bits", "32", "--v-bits", "32", "--dense", "f32"]
RESULTS = {
    "tokens", "predicted_tokens", "ppl", "ppl_reference", "ln_ppl_ratio", "ln_ppl_ratio_se", "kld", "top1",
    "kv_bytes_per_token", "kv_bytes_per_token_reference",
}  # fmt: skip


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """``--threads`` is for the process, and so for the tests that follow."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def mixkv_eval(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["eval", "-m", "toy", "--threads", "1", *arguments], input=text)


def answer(*arguments: str, text: str | bytes | None = None) -> dict[str, Any]:
    result = mixkv_eval(*arguments, "--json", text=text)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return json.loads(result.stdout)


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr that holds all the words, nothing on stdout, and the documented exit code."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("mixkv: "), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_json_is_one_object_with_everything_in_it(file: str, toy: Model) -> None:
    options = ["--window", "32", "--sinks", "2", "--k-bits", "3", "--v-bits", "2", "--tile", "32", "--dense", "bf16"]
    found = answer(file, *options)
    about = {
        "model",
        "policy",
        "weights",
        "reference_weights",
        "threads",
        "seconds",
        "document",
        "seed",
        "start",
        "command",
    }
    assert set(found) >= RESULTS | about
    assert set(found["kld"]) == {"mean", "se", "median", "p90", "p95", "p99", "p999", "max"}
    assert found["policy"] == "sinks=2 recent=32:bf16 tile=32 old=k3c/v2t rot=kv scales=fit"
    assert (found["model"], found["weights"], found["reference_weights"]) == ("toy", "f32", "f32")
    assert 0 < found["seconds"] < 60 and found["threads"] == 1
    policy = CachePolicy(32, 2, 3, 2, 32, "bf16")
    expected = evaluate(Session(toy, CachePolicy.full()), Session(toy, policy), list(TEXT.encode()))
    assert found["kld"] == pytest.approx(expected.to_dict()["kld"], rel=1e-3)
    for name in RESULTS - {"kld"}:
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-3), name


def test_the_reference_is_a_full_cache(file: str) -> None:
    found = answer(file, *FULL)
    assert found["kld"]["max"] == 0 and found["top1"] == 1 and found["ppl"] == found["ppl_reference"]
    assert found["kv_bytes_per_token"] == found["kv_bytes_per_token_reference"]


def test_people_get_a_table_and_no_progress_where_stderr_is_no_terminal(file: str) -> None:
    result = mixkv_eval(file)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    start = lines.index("kld")
    rows = dict(line.split(maxsplit=1) for line in lines[: start + 9] if line != "kld")
    assert lines[start + 9] == "dp" and "by_distance" in lines
    rows |= dict(line.split(maxsplit=1) for line in lines[start + 10 :] if not line.startswith(" ") and " " in line)
    assert rows["tokens"] == str(len(TEXT)) and rows["weights"] == "f32"
    assert float(rows["ppl"]) > 1 and 0 <= float(rows["top1"]) <= 1 and float(rows["p999"]) >= float(rows["p99"])
    assert (RESULTS - {"kld"}) | {"mean", "median", "p99", "p999", "max", "policy", "seconds"} <= set(rows)


def test_a_number_that_is_not_there_is_none_in_the_table_and_null_in_json() -> None:
    assert answer("-", text="ab")["ln_ppl_ratio_se"] is None
    assert "ln_ppl_ratio_se              none\n" in mixkv_eval("-", text="ab").stdout


def test_stdin_is_read_for_a_dash(file: str) -> None:
    from_stdin, from_file = answer("-", text=TEXT), answer(file)
    assert {name: from_stdin[name] for name in RESULTS} == {name: from_file[name] for name in RESULTS}


def test_tokens_takes_the_first_and_may_be_more_than_there_are(file: str) -> None:
    some, cut = answer(file, "--tokens", "100"), answer("-", text=TEXT[:100])
    assert some["tokens"] == 100
    assert {name: some[name] for name in RESULTS} == {name: cut[name] for name in RESULTS}
    assert answer(file, "-n", "100000")["tokens"] == len(TEXT)


def test_a_text_longer_than_the_context_is_refused_unless_tokens_says_how_many_to_take() -> None:
    long = "x" * 16_385
    refused(mixkv_eval("-", text=long), 5, "16385", "16384", "--tokens")
    refused(mixkv_eval("-", "--tokens", "16385", text=long), 5, "16385", "16384")
    assert answer("-", "--tokens", "64", text=long)["tokens"] == 64


@pytest.mark.parametrize("text", ["", "x"])
def test_fewer_than_two_tokens_are_refused(text: str) -> None:
    refused(mixkv_eval("-", text=text), 5, "at least 2 tokens", f"found {len(text)}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "1"], ["--tokens", "2 or more", "found 1"]),
        (["--tokens", "-5"], ["--tokens", "found -5"]),
        (["--k-bits", "5"], ["k_bits", "nearest is 4"]),
        (["--dense", "f8"], ["dense", "f16, bf16, f32"]),
        (["--weights", "f7"], ["weights", "f7", "auto, f32, bf16, q8, q4"]),
        (["--reference-weights", "f7"], ["weights", "f7", "auto, f32, bf16, q8, q4"]),
        (["--threads", "0"], ["--threads", "found 0"]),
        (["-m", "no-such-model"], ["no-such-model", "smollm2"]),
    ],
)
def test_an_option_out_of_range_is_refused(file: str, options: list[str], words: list[str]) -> None:
    refused(mixkv_eval(file, *options), 2, *words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(mixkv_eval(str(tmp_path / "none")), 5, "none", "cannot be read")
    (tmp_path / "latin1").write_bytes(b"caf\xe9 au lait")
    refused(mixkv_eval(str(tmp_path / "latin1")), 5, "latin1", "byte 3")
    refused(mixkv_eval("-", text=b"caf\xe9 au lait"), 5, "stdin", "byte 3")


def test_a_closed_stdin_is_one_line() -> None:
    program = f"{sys.executable} -m mixkv eval - -m toy <&-"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["mixkv: stdin is closed: there is no text to read"]


@pytest.mark.parametrize(
    ("options", "loaded", "used"),
    [
        ([], ["f32"], ("f32", "f32")),
        (["--weights", "q8", "--reference-weights", "q8"], ["q8"], ("q8", "q8")),
        (["--weights", "q8"], ["q8"], ("q8", "q8")),
        (["--weights", "q8", "--reference-weights", "f32"], ["f32", "q8"], ("q8", "f32")),
        (["--reference-weights", "q8"], ["f32", "q8"], ("f32", "q8")),
    ],
)
def test_each_weight_format_is_loaded_once(
    file: str, options: list[str], loaded: list[str], used: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of q8 a model is made here that says nothing but one token, so that it is told from the others."""
    asked: list[str] = []
    real = mixkv.models.load.load

    def load(name: str, weights: str, **options: Any) -> Model:
        asked.append(weights)
        model = real(name, "f32", **options)
        if weights == "q8":
            model.transformer.weights.head.weight[:] = 0
        return model

    monkeypatch.setattr(mixkv.models.load, "load", load)
    found = answer(file, *options)
    assert sorted(asked) == loaded
    assert (found["weights"], found["reference_weights"]) == used
    flat = {"f32": False, "q8": True}
    assert (found["ppl"] == pytest.approx(258)) == flat[used[0]]
    assert (found["ppl_reference"] == pytest.approx(258)) == flat[used[1]]


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ([], ["full"]),
        (["--regime", "both"], ["full", "full", "k4v4"]),
        (["--shadow", "--dense", "f32"], ["full", "k4v4:dense=f32", "full"]),
        (["--regime", "both", "--shadow"], ["full", "full", "k4v4", "k4v4", "f16"]),
    ],
    ids=str,
)
def test_memory_is_planned_for_all_caches_that_stand_beside_the_first(
    file: str, options: list[str], beside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mixkv.engine.memory, "check_fits", lambda *args, **more: asked.append((args, more)))
    answer(file, "-n", "20", "--continue", "3", *options)
    (((_, policy, tokens), more),) = asked
    assert tokens == 23 and policy.window == 128
    assert sorted(map(str, more["beside"])) == sorted(str(CachePolicy.parse(each)) for each in beside)


def test_a_cache_that_does_not_fit_is_refused(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixkv.engine.memory, "available_nbytes", lambda: 500_000)
    assert answer(file)["tokens"] == len(TEXT)
    refused(mixkv_eval(file, "--regime", "both"), 2, "a cache of 296 tokens and 3 beside it needs", "500000 bytes")


def test_progress_is_drawn_on_stderr_where_it_is_a_terminal(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[int, int]]] = {}

    def bar(self: shell.Bars, label: str) -> Any:
        return lambda done, total, detail="": drawn.setdefault(label, []).append((done, total))

    monkeypatch.setattr(shell.Bars, "bar", bar)
    answer(file)
    assert drawn["evaluating"][-1] == (2 * len(TEXT), 2 * len(TEXT)) and len(drawn["evaluating"]) >= 3
    assert "loading f32" in drawn
