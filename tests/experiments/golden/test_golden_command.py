"""``mixkv golden`` as a person meets it: what is said, on which stream, and the exit codes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from mixkv import cli
from mixkv.commands import shell
from mixkv.experiments.golden import file as golden_file

from ...refusals import refused

TINY_LLAMA = Path(__file__).parents[2] / "data" / "tiny_llama"
IDS = [[1, 5, 90, 33], list(range(2, 97)) * 2]  # the second is longer than a window of 32, so codes are attended to
SMALL = ["--window", "32", "--tile", "32"]


def mixkv(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["golden", *map(str, arguments)])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A golden file of toy for each weight format."""
    folder = tmp_path_factory.mktemp("golden")
    for weights in ("f32", "q8"):
        options = ["-m", "toy", "--weights", weights, "-n", "6", "--threads", "1", *SMALL]
        result = mixkv("record", folder / f"{weights}.json", *options)
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
        assert result.stderr == f"5 prompts, 30 tokens | saved to {folder / weights}.json\n"
    return {weights: folder / f"{weights}.json" for weights in ("f32", "q8")}


@pytest.mark.parametrize("weights", ["f32", "q8"])
@pytest.mark.parametrize(
    "options", [["--threads", "1"], ["--threads", "2"], ["--exact"], ["--tolerance", "0", "--tie", "0"]]
)
def test_what_was_recorded_is_found_again(recorded: dict[str, Path], weights: str, options: list[str]) -> None:
    if "2" in options and numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("a machine of one core")
    result = mixkv("check", recorded[weights], *options)
    assert result.exit_code == 0, result.stdout
    assert result.stderr == "5 prompts, 30 tokens: as recorded\n"
    lines = result.stdout.splitlines()
    assert lines[0] == "prompt 0: ok      'The capital of France is'" and len(lines) == 5


def test_what_was_recorded_is_found_again_by_four_threads(recorded: dict[str, Path]) -> None:
    """More than the machine may have, which the command line does not offer."""
    program = (
        "import sys, numba; from pathlib import Path; from mixkv import Session, load\n"
        "from mixkv.experiments.golden import record as golden; from mixkv.experiments.golden.about import describe\n"
        "from mixkv.experiments.golden.file import read; from mixkv.experiments.golden.compare import Tolerances\n"
        "numba.set_num_threads(4)\n"
        "for file in sys.argv[1:]:\n"
        "    found = read(Path(file)); model = load('toy', found.about.weights)\n"
        "    session = lambda: Session(model, found.about.policy)\n"
        "    assert golden.check(found.prompts, session, Tolerances(exact=True)).failed == 0, file\n"
        "    assert describe(model, found.about.policy, weights=found.about.weights) == found.about, file\n"
    )
    env = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", program, *recorded.values()], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_check_prints_one_object_where_json_is_asked_for(recorded: dict[str, Path]) -> None:
    result = mixkv("check", recorded["q8"], "--json", "--threads", "1", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert set(found) == {
        "file", "model", "weights", "policy", "threads", "ok", "prompts", "tolerance", "tie", "exact", "changes",
    }  # fmt: skip
    assert (found["ok"], found["changes"], found["weights"], found["threads"]) == (True, {}, "q8", 1)
    assert (found["tolerance"], found["tie"], found["exact"]) == (1e-3, 1e-3, False)
    assert found["policy"] == "sinks=4 recent=32:f16 tile=32 old=k4c/v4t rot=kv scales=fit"
    assert {x["status"] for x in found["prompts"]} == {"ok"} and {x["largest"] for x in found["prompts"]} == {0}
    failed = json.loads(mixkv("check", recorded["q8"], "--json", "--v-bits", "2").stdout)
    assert not failed["ok"] and failed["changes"] == {"policy": ["v_bits 4 -> 2"]}


def failed(result: Result, *words: str) -> str:
    """Exit code 8, one line on stderr, and the explanation on stdout."""
    assert result.exit_code == 8, (result.exit_code, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and "differ" in lines[0] and "from what was recorded" in lines[0], result.stderr
    for word in words:
        assert word in result.stdout, (word, result.stdout)
    return result.stdout


def test_a_changed_bit_width_fails_where_codes_are_attended_to(recorded: dict[str, Path]) -> None:
    text = failed(mixkv("check", recorded["q8"], "--k-bits", "3"), "policy:   k_bits 4 -> 3", "prompt 4: differs", "step ",
                  "log-probability", "gap of their logits now", "not within the tie tolerance of 0.001")  # fmt: skip
    assert "prompt 0: ok" in text and "tensors:" not in text and "config:" not in text


def test_another_weight_format_fails_and_is_named(recorded: dict[str, Path]) -> None:
    failed(
        mixkv("check", recorded["f32"], "--weights", "q8"), "weights:  format f32 -> q8", "23 of 30 changed, kept as q8"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Callable[[dict[str, Any], dict[str, Any]], None]], Path]:
    """A copy of tiny_llama whose tensors and config.json have been changed."""

    def make(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(TINY_LLAMA, copy)
        tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, copy / "model.safetensors")
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden file of tiny_llama, which has no tokenizer: its prompts are ids."""
    folder = tmp_path_factory.mktemp("tiny")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, IDS)))
    options = ["-m", TINY_LLAMA, "--weights", "q8", "-n", "8", "--prompts-file", prompts, *SMALL]
    result = mixkv("record", folder / "tiny.json", *options)
    assert result.exit_code == 0, result.stderr
    return folder / "tiny.json"


def test_a_record_of_ids_is_found_again(tiny: Path) -> None:
    found = golden_file.read(tiny)
    assert [x.prompt_ids for x in found.prompts] == IDS and found.prompts[0].text is found.prompts[0].generated is None
    result = mixkv("check", tiny, "--exact")
    assert result.exit_code == 0 and result.stdout.splitlines() == [
        "prompt 0: ok      4 ids",
        "prompt 1: ok      190 ids",
    ]


def test_one_changed_weight_fails_and_its_tensor_is_named(tiny: Path, folder: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 9

    other = folder(change)
    text = failed(
        mixkv("check", tiny, "-m", other), "1 of 42 changed: model.layers.1.mlp.down_proj.weight", f"-> {other}"
    )
    assert "config:" not in text


def test_a_changed_rope_theta_fails_and_is_named(tiny: Path, folder: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 50_000.0

    text = failed(mixkv("check", tiny, "-m", folder(change)), "config:   rope.theta 5000.0 -> 50000.0")
    assert "tensors:" not in text and "policy:" not in text


def test_prompts_come_from_arguments_and_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Grüße\n\nzwei\n", encoding="utf-8")
    options = ["-m", "toy", "-n", "3", "-q"]
    assert mixkv("record", tmp_path / "a.json", "Grüße", "zwei", *options).stderr == ""
    assert mixkv("record", tmp_path / "b.json", "--prompts-file", file, *options).stderr == ""
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert [x.text for x in golden_file.read(tmp_path / "a.json").prompts] == ["Grüße", "zwei"]
    both = mixkv("record", tmp_path / "c.json", "x", "--prompts-file", file, *options)
    refused(both, 2, "either as arguments or with --prompts-file")
    refused(mixkv("record", tmp_path / "c.json", "--prompts-file", tmp_path / "none", *options), 5, "cannot be read")
    refused(mixkv("record", tmp_path / "c.json", "", *options), 5, "prompt 0", "empty")
    refused(mixkv("record", tmp_path / "c.json", "x", "--chat", *options), 2, "no chat template")
    refused(mixkv("record", tmp_path / "c.json", "x", "-m", "toy", "-n", "0"), 2, "max_tokens")
    refused(mixkv("record", tmp_path / "c.json", "x", *options, "--k-bits", "5"), 2, "k_bits")
    assert not (tmp_path / "c.json").exists()


def test_a_file_that_is_there_is_replaced_only_with_force(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("mine")
    refused(mixkv("record", file, "x", "-m", "no-such-model"), 2, "a.json is there already: --force replaces it")
    assert file.read_text() == "mine"
    assert mixkv("record", file, "x", "-m", "toy", "-n", "1", "--force").exit_code == 0
    assert golden_file.read(file).prompts[0].text == "x"
    refused(mixkv("record", tmp_path / "no" / "a.json", "x", "-m", "toy"), 7, "there is no folder")


def test_files_and_options_that_are_none_are_refused(recorded: dict[str, Path], tmp_path: Path) -> None:
    file = recorded["q8"]
    refused(mixkv("check", tmp_path / "none.json"), 7, "none.json: cannot be read")
    (tmp_path / "cut.json").write_bytes(file.read_bytes()[:-20])
    refused(mixkv("check", tmp_path / "cut.json"), 7, "cut.json: no golden file: not valid JSON")
    (tmp_path / "other.json").write_text("{}")
    refused(mixkv("check", tmp_path / "other.json"), 7, "format must be 'mixkv golden 1'")
    refused(
        mixkv("check", file, "--tolerance", "nan"), 2, "tolerance must be a finite number of nats, 0 or more, found nan"
    )
    refused(mixkv("check", file, "--tie", "-1"), 2, "tie must be")
    refused(mixkv("check", file, "--exact", "--tie", "1"), 2, "--tie has no effect with --exact")
    refused(mixkv("check", file, "--weights", "q5"), 2, "weights must be one of")
    refused(mixkv("check", file, "--weights", ""), 2, "weights must be one of")
    refused(mixkv("check", file, "--threads", "0"), 2, "--threads")
    refused(mixkv("check", file, "-m", TINY_LLAMA), 2, "cannot read what was recorded", "vocabulary, 0 to 96")


def test_progress_is_drawn_for_every_token(
    recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[tuple[int, int]]] = {}

    def bar(self: shell.Bars, label: str) -> Any:
        return lambda done, total, detail="": drawn.setdefault(label, []).append((done, total))

    monkeypatch.setattr(shell.Bars, "bar", bar)
    assert mixkv("check", recorded["q8"]).exit_code == 0
    assert drawn["checking"] == [(i, 30) for i in range(1, 31)]
    assert mixkv("record", tmp_path / "g.json", "x", "y", "-m", "toy", "-n", "2").exit_code == 0
    assert drawn["recording"] == [(i, 4) for i in range(1, 5)]


@pytest.mark.model
def test_the_default_model_is_recorded_in_its_chat_template_and_found_again(
    default_model_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    prompts = ["What is the capital of France?", "word " * 150]
    assert mixkv("record", file, *prompts, "-m", default_model_path, "--chat", "-n", "6").exit_code == 0
    found = golden_file.read(file)
    assert found.about.chat and found.prompts[0].generated and len(found.about.tensors) == 272
    assert len(found.prompts[0].prompt_ids) > 20 > len(prompts[0].split())  # the template's words are among them
    assert mixkv("check", file, "--exact", "--threads", "1").exit_code == 0
    failed(mixkv("check", file, "--policy", "k2v2:window=32"), "k_bits 4 -> 2", "window 128 -> 32", "prompt 1: differs")
