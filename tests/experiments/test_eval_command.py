"""``mixkv eval`` as a person meets it, on the toy model, whose tokens are bytes."""

import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import mixkv.engine.memory
import mixkv.experiments.cells
import mixkv.models.linear
import mixkv.models.load
from mixkv import CachePolicy, Session, cli
from mixkv.commands import shell
from mixkv.experiments.evaluate import evaluate
from mixkv.models.load import Model

from ..refusals import refused

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
FULL = ["--window", "0", "--sinks", "0", "--k-bits", "32", "--v-bits", "32", "--dense", "f32"]
RESULTS = {
    "tokens", "predicted_tokens", "ppl", "ppl_reference", "ln_ppl_ratio", "ln_ppl_ratio_se", "kld", "top1",
    "kv_bytes_per_token", "kv_bytes_per_token_reference",
}  # fmt: skip


def mixkv_eval(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["eval", "-m", "toy", "--threads", "1", *arguments], input=text)


def answer(*arguments: str, text: str | bytes | None = None) -> dict[str, Any]:
    result = mixkv_eval(*arguments, "--json", text=text)
    assert (result.exit_code, result.stderr) == (0, ""), result
    return json.loads(result.stdout)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "--csv"], ["--json and --csv cannot be had at once"]),
        (["--seed", "-1", "-n", "20"], ["--seed must be 0 or more, found -1"]),
        (["--seed", "1"], ["--seed 1 has no effect on a whole text", "--tokens"]),
        (["--first", "-1"], ["--first must be 0 or more, found -1"]),
        (["--first", "295"], ["first must be from 0 to 294", "found 295"]),
        (["--regime", "all"], ["--regime must be one of chunked, decode, both, found all"]),
        (["--continue", "-1"], ["--continue must be from 0 to", "found -1"]),
        (["--per-token", "no/such/folder.csv"], ["--per-token no/such/folder.csv: there is no folder no/such"]),
        (["--per-token", "."], ["--per-token .: is a folder"]),
    ],
    ids=str,
)
def test_options_of_a_measurement_out_of_range_are_refused(
    file: str, options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(mixkv_eval(file, *options), 2, *words)


def test_a_piece_longer_than_the_text_is_refused_unless_it_is_the_first(file: str) -> None:
    refused(mixkv_eval(file, "-n", "300", "--seed", "2"), 5, "the text has 296 tokens, fewer than the 300 asked for")
    refused(mixkv_eval(file, "--continue", "16089"), 5, "the context 16384, 16089 of them to be generated")


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


# --- what is measured besides -------------------------------------------------------------------------------------


def test_the_default_text_is_the_beginning_of_pythons_help_topics() -> None:
    """2,048 tokens of it, the topics in the order of their names."""
    from pydoc_data.topics import topics

    found = answer()
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[:2048]
    assert (found["document"], found["seed"], found["start"], found["tokens"]) == ("topics", 0, 0, 2048)
    assert found["document_digest"] == hashlib.sha256(np.array([*text], np.int64).tobytes()).hexdigest()[:16]
    assert found["prompt_tail"] == text.decode("utf-8", "replace")[-200:]
    assert found["command"] == f"mixkv eval -m toy -n 2048 --policy '{CachePolicy()}'"
    some = answer("-n", "100")
    assert (some["document"], some["tokens"], some["prompt_tail"]) == ("topics", 100, text[:100].decode())
    refused(mixkv_eval("topics"), 5, "topics: the text has", "the context 16384", "--tokens")


def test_a_seed_is_another_piece(file: str) -> None:
    found = [answer(file, "-n", "100", "--seed", str(seed)) for seed in (0, 1, 1, 2)]
    assert found[0]["start"] == 0 and found[1]["start"] == found[2]["start"] != found[3]["start"]
    for x in found:
        assert TEXT[x["start"] : x["start"] + 100].endswith(x["prompt_tail"]) and x["tokens"] == 100
        piece = answer("-", text=TEXT[x["start"] : x["start"] + 100])
        assert {name: x[name] for name in RESULTS} == {name: piece[name] for name in RESULTS}


def test_first_leaves_predictions_out(file: str, toy: Model) -> None:
    found = answer(file, "--first", "200", "--window", "20")
    sessions = Session(toy, CachePolicy.full()), Session(toy, CachePolicy(window=20))
    expected = evaluate(*sessions, [*TEXT.encode()], first=200, mass=True).to_dict()
    assert (found["first"], found["tokens"], found["predicted_tokens"]) == (200, 296, 95)
    assert found["kld"] == pytest.approx(expected["kld"], rel=1e-3) and found["mass"] == pytest.approx(expected["mass"])
    assert [(x["from"], x["to"], x["tokens"]) for x in found["by_distance"]] == [(129, 256, 76), (257, 512, 19)]


def test_everything_at_once_is_in_json_and_in_the_table(file: str) -> None:
    options = file, "-n", "120", "--weights", "q8", "--window", "20", "--regime", "both", "--shadow", "--continue", "5"
    found = answer(*options)
    same = {"reference_same_bits": True, "candidate_same_bits": True, "largest_kld_difference": 0}
    assert (found["regime"], found["regimes"]) == ("both", same)
    assert [len(found["local_errors"][part]) for part in ("k", "v", "both")] == [3, 3, 3]
    assert len(found["continuation"]["token_ids"]) == len(found["reference_continuation"]["tokens"]) == 5
    table = mixkv_eval(*options).stdout
    for words in ("candidate_same_bits        True", "1 to 64", "mass", "decode_tokens_per_second", "bits_per_value"):
        assert words in table


def test_csv_is_a_line_of_names_and_one_of_numbers(file: str) -> None:
    options = file, "--seed", "3", "-n", "100", "--continue", "2", "--window", "20"
    result = mixkv_eval(*options, "--csv")
    assert (result.exit_code, result.stderr) == (0, "")
    names, numbers, *more = csv.reader(io.StringIO(result.stdout))
    assert more == [] and len(names) == len(set(names))
    row, expected = dict(zip(names, numbers, strict=True)), answer(*options)
    assert float(row["kld_p99"]) == expected["kld"]["p99"] and float(row["dp_rms"]) == expected["dp"]["rms"]
    assert float(row["mass_recent"]) == expected["mass"]["recent"] and row["seed"] == "3"
    assert (
        row["continuation_text"] == expected["continuation"]["text"] and row["prompt_tail"] == expected["prompt_tail"]
    )
    assert row["command"] == expected["command"] and row["local_errors"] == "", "what is not there is empty"
    assert not {"by_distance", "worst", "histogram_counts", "mass_by_layer_shares"} & set(names)


def test_per_token_is_a_line_for_each_prediction(file: str, toy: Model, tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    found = answer(file, "--first", "9", "--window", "20", "--tile", "32", "--per-token", str(path))
    assert found == answer(file, "--first", "9", "--window", "20", "--tile", "32") | {
        name: found[name] for name in ("seconds", "prefill_tokens_per_second")
    }
    sessions = Session(toy, CachePolicy.full()), Session(toy, CachePolicy(window=20, tile=32))
    each = evaluate(*sessions, [*TEXT.encode()], first=9).each
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [*csv.DictReader(stream)]
    assert len(rows) == found["predicted_tokens"] == 286
    for i, row in enumerate(rows):
        assert list(row) == [
            "position", "behind", "token_id", "token", "nll_reference", "nll", "kld", "top_reference_id", "top_id",
        ]  # fmt: skip
        assert (row["position"], row["behind"], row["token"]) == (str(10 + i), str(10 + i - 20), TEXT[10 + i])
        assert row["token_id"] == str(ord(TEXT[10 + i]))
        numbers = [float(row[name]) for name in ("nll_reference", "nll", "kld")]
        assert numbers == pytest.approx([each.nll_reference[i], each.nll[i], each.kld[i]], rel=1e-3, abs=1e-6)
    assert np.mean([float(row["kld"]) for row in rows]) == pytest.approx(found["kld"]["mean"])
    assert np.mean([row["top_id"] == row["top_reference_id"] for row in rows]) == pytest.approx(found["top1"])
    for distance in found["by_distance"]:
        low, high = distance["from"], distance["to"]
        own = [float(x["kld"]) for x in rows if (low is None or low <= int(x["behind"])) and int(x["behind"]) <= high]
        if low is not None:
            assert len(own) == distance["tokens"] and np.mean(own) == pytest.approx(distance["kld"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux, which takes nothing")
def test_what_was_measured_is_printed_whatever_becomes_of_the_file(file: str) -> None:
    result = mixkv_eval(file, "--per-token", "/dev/full", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["tokens"] == 296
    assert result.stderr == "mixkv: --per-token /dev/full: cannot be written: No space left on device\n"


def test_one_model_serves_both_sides(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[Any] = []
    real = mixkv.experiments.cells.measure
    monkeypatch.setattr(mixkv.experiments.cells, "measure", lambda *args: pairs.append(args[0]) or real(*args))
    answer(file, "-n", "20")
    answer(file, "-n", "20", "--weights", "q8", "--reference-weights", "q8")
    answer(file, "-n", "20", "--weights", "q8", "--reference-weights", "f32")
    assert [pair.candidate is pair.reference for pair in pairs] == [True, True, False]


def test_progress_is_drawn_on_stderr_where_it_is_a_terminal(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[int, int]]] = {}

    def bar(self: shell.Bars, label: str) -> Any:
        return lambda done, total, detail="": drawn.setdefault(label, []).append((done, total))

    monkeypatch.setattr(shell.Bars, "bar", bar)
    answer(file)
    assert drawn["evaluating"][-1] == (2 * len(TEXT), 2 * len(TEXT)) and len(drawn["evaluating"]) >= 3
    assert "loading f32" in drawn


def test_the_file_for_each_token_is_never_the_text_and_is_written_before_other_caches_are_tried(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(mixkv_eval(file, "--per-token", file), 2, "--per-token", "is also read")
    assert Path(file).read_text() == TEXT
    refused(mixkv_eval(file, "--per-token", str(tmp_path / ("x" * 300))), 2, "--per-token", "cannot be written")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mixkv.experiments.probe.RUINOUS", -1.0)
    monkeypatch.setattr("mixkv.experiments.probe.probe", interrupted)
    table = tmp_path / "tokens.csv"
    result = mixkv_eval(file, "--per-token", str(table), "-q")
    assert result.exit_code == shell.INTERRUPTED and len(table.read_text().splitlines()) > 100


def test_a_ruinous_cache_is_warned_of_in_a_quiet_run_too(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkv.experiments.probe import Verdict

    monkeypatch.setattr("mixkv.experiments.probe.RUINOUS", -1.0)
    monkeypatch.setattr("mixkv.experiments.probe.probe", lambda *_: Verdict(3.0, "k8v8", 0.1))
    result = mixkv_eval(file, "-q")
    assert result.exit_code == 0 and "warning: this cache" in result.stderr and "--policy 'k8v8'" in result.stderr
