"""Foreign files as the command line meets them: one line on stderr, a documented exit code, soon, and nothing written.

What each refusal says in full is tested beside its reader. faults.py lists the tests of every fault; here it is compared
with the table in docs/security.md, and the limits there with models/limits.py.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import mixkv
from mixkv import cli
from mixkv.kernels.tables import MAX_N_REP
from mixkv.models import limits, toy
from mixkv.models.errors import ModelError
from mixkv.models.hf_experts import with_experts
from mixkv.models.safetensors import open_safetensors
from mixkv.models.tiny import tiny_model

from .faults import ROOT, faults
from .models.small_gguf import write_model
from .refusals import refused

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"
Change = Callable[[Path], object]


def config(**changed: Any) -> Change:
    """A change of config.json; a key is left out for ``...``."""

    def change(folder: Path) -> None:
        keys = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps({name: x for name, x in keys.items() if x is not ...}))

    return change


def weights(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of the tensors."""

    def on(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return on


def file(contents: Callable[[bytes], bytes], name: str = "model.safetensors") -> Change:
    """A change of the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(contents((folder / name).read_bytes()))


def index(folder: Path, shard: str) -> None:
    """An index of weights in the place of the one file."""
    (folder / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": shard, "lm_head.weight": "absent.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def twice(data: bytes) -> bytes:
    """The header says one name twice, as long as before."""
    return data.replace(b'"model.layers.0.mlp.up_proj.weight"', b'"model.layers.1.mlp.up_proj.weight"', 1)


def case(fault: str, change: Change, *words: str) -> object:
    return pytest.param(change, words, marks=pytest.mark.fault(fault), id=f"{fault}: {words[0]}")


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4cac19622fc3ada9c0fdeadb33f88f367b541f38b89102a3f1261ac8\n"
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        case("config-values", config(hidden_size="64"), "config.json", "hidden_size is '64'", "whole number from 1 to"),
        case("config-values", config(hidden_size=None), "hidden_size is None"),
        case("config-values", config(rms_norm_eps=float("nan")), "rms_norm_eps is nan", "finite"),
        case("config-values", config(vocab_size=...), "missing vocab_size"),
        case("config-dimensions", config(num_hidden_layers=0), "num_hidden_layers is 0"),
        case("config-dimensions", config(intermediate_size=-5), "intermediate_size is -5"),
        case("config-dimensions", config(vocab_size=10**15), f"vocab_size is {10**15}", f"to {limits.MAX_VOCAB_SIZE}"),
        case("config-dimensions", config(num_key_value_heads=5), "num_key_value_heads", "multiple"),
        case("unsupported-architecture", config(model_type="mamba9"), "'mamba9'", "supported: llama"),
        case("unsupported-architecture", config(rope_scaling={"rope_type": "spiral"}), "'spiral'", "supported: "),
        case("unsupported-architecture", config(hidden_act="step"), "'step'", "supported: silu"),
        case("model-folder-code", config(auto_map={"AutoModel": "evil.Model"}), "auto_map", "never"),
        case("weight-map-paths", lambda folder: index(folder, "../x.safetensors"), "'../x.safetensors'", "of this folder"),
        case("weight-map-paths", lambda folder: index(folder, "/etc/x.safetensors"), "'/etc/x.safetensors'"),
        case("weight-map-paths", outside, "a link to", "outside"),
        case("missing-tensors", lambda folder: index(folder, "x.safetensors"), "2 files", "x.safetensors", "absent.safe"),
        case("missing-tensors", weights(lambda t: [t.pop("model.norm.weight"), t.pop("model.layers.0.mlp.up_proj.weight")]),
             "2 of", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"),
        case("tensor-shapes", weights(lambda t: t.update({"model.norm.weight": np.ones(7, "f4")})), "[7]", "should be"),
        case("safetensors-damage", file(lambda data: data[:-1]), "truncated"),
        case("safetensors-damage", file(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]), f"{1 << 62} bytes"),
        case("safetensors-damage", file(lambda data: data.replace(b'_offsets":[0,', b'_offsets":[4,')), "damaged"),
        case("duplicate-tensor", file(twice), "appears twice"),
        case("not-weights", file(lambda data: LFS), "Git-LFS pointer", "git lfs pull"),
        case("not-weights", file(lambda data: b"<!DOCTYPE html><title>Sign in</title>"), "HTML"),
        case("pickles", pickled, "pytorch_model.bin", "opening a pickle can run any code"),
        case("nan-weights", weights(lambda t: t["model.norm.weight"].__setitem__(3, np.nan)), "model.norm.weight", "1 NaN"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_refused(change: Change, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    change(folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    started = time.process_time()
    options = ["--raw", "-q", "-n", "1", "--check-weights"]
    result = CliRunner().invoke(cli.app, ["generate", "x", "-m", str(folder), *options])
    assert time.process_time() - started < 5
    refused(result, 3, *words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def patched(data: bytes, key: bytes, value: bytes) -> bytes:
    """A GGUF file in which what follows the name and type of a key begins otherwise."""
    at = data.index(key) + len(key) + 4
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        case("gguf-lengths", lambda data: patched(data, b"tokenizer.ggml.tokens", b"\x08\0\0\0" + b"\xff" * 8), "tokens"),
        case("gguf-lengths", lambda data: data[:16] + (1 << 63).to_bytes(8, "little") + data[24:], f"{1 << 63} metadata"),
        case("gguf-tensors", lambda data: data[:-9], "should end at byte"),
        case("gguf-types", lambda data: data[:4] + b"\0\0\0\3" + data[8:], "big-endian"),
        case("gguf-types", lambda data: data[:4] + b"\1\0\0\0" + data[8:], "version 1", "2 or 3"),
        case("not-weights", lambda data: LFS, "Git-LFS pointer"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_is_no_model_is_refused(
    change: Callable[[bytes], bytes], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", "Q8_0")
    path.write_bytes(change(path.read_bytes()))
    started = time.process_time()
    refused(CliRunner().invoke(cli.app, ["generate", "x", "-m", str(path), "-q"]), 3, "m.gguf", *words)
    assert time.process_time() - started < 5


@pytest.mark.fault("config-dimensions")
def test_more_query_heads_than_the_kernels_have_room_for_are_refused() -> None:
    """They wrote beyond their tables: a segmentation fault. As many as there is room for are computed."""
    assert limits.MAX_HEADS_PER_KV_HEAD == MAX_N_REP
    shape = {"num_key_value_heads": 1, "head_dim": 2}
    with pytest.raises(ModelError, match="num_attention_heads is 129; it must be at most 128"):
        tiny_model(num_attention_heads=129, **shape)
    model = tiny_model(num_attention_heads=128, **shape)
    logits = mixkv.Session(model).forward([1, 2, 3], "last")
    assert logits is not None and np.isfinite(logits).all()
    with pytest.raises(ValueError, match="at most 128 query heads may share a KV head, found 129 and 1"):
        layer = mixkv.Session(model).cache.layers[0]
        layer.attend(np.zeros((1, 131, 2), np.float32), 0, 1.0)


@pytest.mark.fault("config-dimensions")
def test_a_config_whose_tensors_nobody_could_name_is_refused(tmp_path: Path) -> None:
    """4,096 layers of 4,096 experts are 50 million names: they are not even counted up."""
    most = limits.MAX_EXPERTS_IN_ALL // limits.MAX_LAYERS
    shape = {"num_hidden_layers": limits.MAX_LAYERS, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
    with pytest.raises(ModelError, match=f"num_experts is {limits.MAX_EXPERTS}; .* from 1 to {most}$"):
        dataclasses.replace(toy.CONFIG, architecture="qwen3_moe", num_experts=limits.MAX_EXPERTS, **shape)
    dataclasses.replace(toy.CONFIG, architecture="qwen3_moe", num_experts=most, **shape)


@pytest.mark.fault("safetensors-damage")
def test_empty_stacks_of_experts_in_layers_that_there_are_not_stay_what_they_are(tmp_path: Path) -> None:
    """A stack without numbers takes no room in a file, and would be thousands of tensors for each name."""
    tensors = {f"model.layers.{i}.mlp.experts.down_proj": np.zeros((4, 0, 2), np.float32) for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    shape = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
    config = dataclasses.replace(toy.CONFIG, architecture="gpt_oss", **shape)
    found = with_experts(config, open_safetensors(tmp_path)).shapes
    assert len(found) == 2 * 4 + 1 and "model.layers.2.mlp.experts.down_proj" in found


# --- docs/security.md ---------------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table below a heading."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_every_fault_of_the_table_has_its_tests_and_every_test_its_fault() -> None:
    found = faults()
    documented = {name.strip("`"): tests for name, _, _, tests in table("Faults")}
    assert list(documented) == list(dict.fromkeys(documented)), "a name stands there twice"
    assert found.keys() == documented.keys()
    for name, tests in found.items():
        files = sorted({test.partition("::")[0].removeprefix("tests/").removesuffix(".py") for test in tests})
        assert documented[name] == ", ".join(files), name


def test_the_script_lists_the_tests_of_every_fault() -> None:
    done = subprocess.run([sys.executable, ROOT / "tests" / "faults.py"], capture_output=True, text=True, check=True)
    for name, tests in faults().items():
        assert f"\n{name}\n" in f"\n{done.stdout}" and all(f"    {test}\n" in done.stdout for test in tests)


def test_tests_that_are_listed_are_collected(request: pytest.FixtureRequest) -> None:
    """By this run of pytest, as far as it goes: a mark on what is not run would prove nothing."""
    found, collected = faults(), dict[str, set[str]]()
    for item in request.session.items:
        names = {name for mark in item.iter_markers("fault") for name in mark.args}
        collected.setdefault(item.nodeid.partition("[")[0], set()).update(names)
    listed = {test: {name for name, tests in found.items() if test in tests} for test in collected}
    assert all(names <= listed[test] for test, names in collected.items())
    if not (request.config.option.keyword or request.config.option.markexpr or "::" in "".join(request.config.args)):
        files = {test.partition("::")[0] for test in collected}
        assert {
            test for tests in found.values() for test in tests if test.partition("::")[0] in files
        } <= collected.keys()
        assert listed == collected


def test_the_limits_in_the_documentation_are_those_of_the_code() -> None:
    documented = {name.strip("`"): int(value.replace(",", "")) for name, value, _ in table("Limits")}
    assert documented == {
        name: x for name, x in vars(limits).items() if isinstance(x, int) and not name.startswith("_")
    }


@pytest.mark.parametrize("room", ["models", "engine", "experiments", "commands"])
def test_limits_stand_in_one_place(room: str) -> None:
    """No other file makes a MAX_ of its own."""
    for path in (ROOT / room).rglob("*.py"):
        if path.name != "limits.py":
            assert not re.findall(r"^_?MAX_\w+\s*(?::.*)?= ", path.read_text(encoding="utf-8"), re.MULTILINE), path
