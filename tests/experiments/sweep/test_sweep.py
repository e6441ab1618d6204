"""Sweeps: which cells are measured, what comes out of them, and what is refused before."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from mixkv import CachePolicy, cli
from mixkv.engine import memory
from mixkv.experiments.cells import Pair, key, measure
from mixkv.experiments.pieces import Piece, Setting
from mixkv.experiments.sweep import grid as grids
from mixkv.experiments.sweep import run as sweep
from mixkv.experiments.sweep import worker
from mixkv.experiments.sweep.journal import Journal
from mixkv.experiments.sweep.worker import Failed, Ready
from mixkv.experiments.sweep.workers import Workers
from mixkv.kernels.warmup import warm_up
from mixkv.models import toy as toys
from mixkv.models.bpe import BYTE_OF_CHARACTER
from mixkv.models.config import ModelConfig
from mixkv.models.errors import MixkvError, ModelError
from mixkv.models.load import Model, open_model
from mixkv.models.names import expected_tensors

from ...refusals import refused

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 10
TIMES = ("seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "workers")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def q8() -> Iterator[Workers]:
    """A worker that many tests share: it takes a while to start."""
    warm_up()
    with Workers(1, 1, Setting("toy", "q8", "q8", 200)) as workers:
        yield workers


def run(
    workers: Workers, text: str, path: Path, axes: dict[str, list[Any]], *, tokens: int = 200,
    seeds: tuple[int, ...] = (0,), together: int = 4, progress: Callable[..., None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a sweep measured now; all of it must be rows."""
    grid = grids.make(
        {"model": "toy", "weights": "q8", "reference_weights": "q8", "tokens": tokens}, [], axes, [text], seeds
    )
    with Journal(path) as journal:
        parts = sweep.pieces(grid, open_model("toy"))
        found = list(sweep.run(grid, parts, journal, workers, {"workers": 1}, together=together, progress=progress))
    assert all(isinstance(row, dict) for row in found), found
    return found  # type: ignore[return-value]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["key"]: {name: x for name, x in row.items() if name not in TIMES} for row in rows}


def mixkv(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["sweep", *arguments])


# --- what is measured ---------------------------------------------------------------------------------------------


def test_each_cell_is_a_row_and_is_measured_once(q8: Workers, text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    axes = {"window": [0, 64], "k_bits": [2, 4]}
    first = run(q8, text, path, axes, seeds=(0, 3))
    assert rows_of(path) == first and len({row["key"] for row in first}) == len(first) == 8
    assert list(first[0])[:2] == ["kind", "key"]
    # Piece after piece, policies in the order of the grid
    assert [(row["seed"], row["window"], row["k_bits"]) for row in first] == [
        (seed, window, k_bits) for seed in (0, 3) for window in (0, 64) for k_bits in (2, 4)
    ]
    assert {(row["start"] == 0, row["tokens"], row["document"]) for row in first} == {
        (True, 200, text),
        (False, 200, text),
    }
    before = path.read_bytes()
    assert run(q8, text, path, axes, seeds=(0, 3)) == [] and path.read_bytes() == before
    # What is new is measured and stands behind
    more = run(q8, text, path, {"window": [64, 32, 0], "k_bits": [4, 8]}, seeds=(3, 0))
    assert [(row["seed"], row["window"], row["k_bits"]) for row in more] == [
        (seed, window, k_bits) for seed in (3, 0) for window, k_bits in ((64, 8), (32, 4), (32, 8), (0, 8))
    ]
    assert rows_of(path) == first + more
    shorter = run(q8, text, path, {"window": [0]}, tokens=100)
    assert [row["tokens"] for row in shorter] == [100] and rows_of(path) == first + more + shorter


def test_bits_do_not_depend_on_what_is_measured_beside(q8: Workers, text: str, tmp_path: Path) -> None:
    axes = {"window": [0, 64], "k_bits": [2, 4, 8]}
    together, alone = (without_times(run(q8, text, tmp_path / f"{n}.jsonl", axes, together=n)) for n in (4, 1))
    assert len(together) == 6 and together == alone


def test_progress_counts_cells(q8: Workers, text: str, tmp_path: Path) -> None:
    calls: list[tuple[float, int, str]] = []
    path = tmp_path / "results.jsonl"
    run(q8, text, path, {"window": [0]})
    run(q8, text, path, {"window": [0, 32, 64, 96, 128, 160]}, progress=lambda *call: calls.append(call))
    assert {total for _, total, _ in calls} == {6}
    assert calls[0][0] == 1 and calls[-1][0] == 6
    done = [done for done, _, _ in calls]
    assert done == sorted(done) and any(x % 1 for x in done)
    details = {detail for _, _, detail in calls}
    assert details == {"", f"k4v4:window=32, ... on {text}", f"k4v4:window=160 on {text}"}


def test_a_key_changes_with_all_that_numbers_depend_on() -> None:
    setting, ids = Setting("toy", "q8", "f32", 50), np.arange(50)
    part, policy = Piece("a", 0, 0, ids), CachePolicy()
    base = key(setting, ("1", "2"), part, policy)
    others = {
        "weights": key(replace(setting, weights="q4"), ("1", "2"), part, policy),
        "reference": key(replace(setting, reference_weights="q4"), ("1", "2"), part, policy),
        "first": key(replace(setting, first=1), ("1", "2"), part, policy),
        "regime": key(replace(setting, regime="decode"), ("1", "2"), part, policy),
        "shadow": key(replace(setting, shadow=True), ("1", "2"), part, policy),
        "continuation": key(replace(setting, continuation=1), ("1", "2"), part, policy),
        "model": key(setting, ("3", "2"), part, policy),
        "reference model": key(setting, ("1", "3"), part, policy),
        "document": key(setting, ("1", "2"), replace(part, document="b"), policy),
        "seed": key(setting, ("1", "2"), replace(part, seed=1), policy),
        "ids": key(setting, ("1", "2"), replace(part, ids=ids + 1), policy),
        "length": key(setting, ("1", "2"), replace(part, ids=ids[:49]), policy),
        "policy": key(setting, ("1", "2"), part, CachePolicy(rollback=1)),
    }
    assert len({base, *others.values()}) == 1 + len(others)
    # The name of a model says nothing of it, and what is asked for is what comes
    assert base == key(replace(setting, model="./toy", tokens=None), ("1", "2"), part, policy)
    assert len(base) == 16 and int(base, 16) >= 0


def test_tasks_have_policies_of_one_piece() -> None:
    grid = grids.make({"tokens": 20}, [], {"window": list(range(5))}, ["topics"], [0, 1])
    parts = sweep.pieces(grid, open_model("toy"))
    cells = sweep.cells_of(grid, parts, ("1", "2"))
    tasks = sweep.tasks_of([cell for cell in cells if cell.policy.window != 1], 3)
    assert [[policy.window for policy in task.policies] for task in tasks] == [[0, 2, 3], [4]] * 2
    assert [task.piece.seed for task in tasks] == [0, 0, 1, 1]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_measures_and_prints_a_table(q8: Workers, toy: Model, text: str, tmp_path: Path) -> None:
    """By two workers; and q8's rows are the bits of the one above."""
    path = tmp_path / "results.jsonl"
    options = ["-m", "toy", "--text", text, "-n", "200", "--window", "0:64:32", "--k-bits", "2,4", "-o", str(path)]
    options += ["--threads", "2", "--workers", "2", "--together", "1"]
    result = mixkv(*options, "--weights", "q8")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = rows_of(path)
    alone = run(q8, text, tmp_path / "alone.jsonl", {"window": [0, 32, 64], "k_bits": [2, 4]})
    expected = {name: {**row, "threads": 1} for name, row in without_times(alone).items()}
    assert without_times(rows) == expected and {row["workers"] for row in rows} == {2}
    heading, empty, *table = result.stdout.splitlines()
    assert heading.startswith("toy, weights q8, beside a cache of float32 and weights q8; 200 tokens a piece; ")
    assert "1 threads, 2 processes" in heading and empty == "" and len(table) == 8
    assert [x.strip() for x in table[0].split("|")[1:-1]] == [
        "policy", "document", "bits", "kB/token", "mean KL", "99.9 %", "largest", "top-1", "perplexity", "tokens/s"
    ]  # fmt: skip
    policies = [line.split("|")[1].strip() for line in table[2:]]
    assert policies == [f"k{bits}v4:window={window}" for bits in (2, 4) for window in (0, 32, 64)]
    by_spec = {row["spec"]: row for row in rows}
    for line in table[2:]:
        cells = [x.strip() for x in line.split("|")[1:-1]]
        row = by_spec[cells[0]]
        assert cells[4] == f"{row['kld']['mean']:.5f}" and cells[7] == f"{100 * row['top1']:.1f} %"
    # Weights in another format are other cells; with f32 the numbers are nearly those of one process
    result = mixkv(*options)
    assert (result.exit_code, result.stderr) == (0, "") and rows_of(path)[:6] == rows
    f32 = {row["spec"]: row for row in rows_of(path)[6:]}
    assert f32.keys() == by_spec.keys() and "weights f32" in result.stdout and result.stdout.count("\n| ") == 8
    grid = grids.make({"model": "toy", "tokens": 200}, [], {"window": [0, 32, 64], "k_bits": [2, 4]}, [text], [0])
    (part,) = sweep.pieces(grid, open_model("toy"))
    for row, _ in measure(Pair(toy, toy), grid.setting, part, grid.policies):
        other = f32[row["spec"]]
        assert (row["policy_digest"], row["document_digest"]) == (other["policy_digest"], other["document_digest"])
        for name in ("ppl", "ppl_reference", "top1", "kv_bytes_per_token"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name
        assert row["kld"]["mean"] == pytest.approx(other["kld"]["mean"], rel=0.02)


def test_a_dry_run_lists_all_cells_and_writes_nothing(text: str, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'model = "none"\ntokens = 50\nseeds = [7]\npolicies = ["k8v8"]\ndocuments = ["{text}"]\n'
        '[grid]\nwindow = "0,32"\nv_bits = [2]\n'
    )
    output = tmp_path / "results.jsonl"
    # What options say counts: of the lists each by itself
    result = mixkv(
        str(grid), "-m", "toy", "--dry-run", "-o", str(output), "--v-bits", "3,4", "--seeds", "0-1", "-n", "60"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        [text, seed, "60", str(CachePolicy(window=window, k_bits=8, v_bits=v_bits))]
        for seed in "01" for window in (0, 32) for v_bits in (3, 4)
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [grid]


def test_options_change_what_a_grid_says(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'model = "toy"\nweights = "q8"\ntokens = 50\nfirst = 3\nregime = "both"\nshadow = true\ncontinuation = 7\n'
    )
    found: list[Setting] = []
    monkeypatch.setattr(sweep, "pieces", lambda grid, _: found.append(grid.setting) or [])
    monkeypatch.setattr(sweep, "check_memory", lambda *_: None)
    options: list[list[str]] = [
        [], ["--no-shadow", "--continue", "0"], ["--first", "0", "--regime", "decode", "-n", "60"],
        ["--weights", "f32"], ["--reference-weights", "f32"],
    ]  # fmt: skip
    for own in options:
        assert mixkv(str(grid), "--dry-run", "--text", text, *own).exit_code == 0
    base = Setting("toy", "q8", "q8", 50, 3, "both", True, 7)
    assert found == [
        base, replace(base, shadow=False, continuation=0), replace(base, first=0, regime="decode", tokens=60),
        replace(base, weights="f32", reference_weights="f32"), replace(base, reference_weights="f32"),
    ]  # fmt: skip


def test_merged_combinations_are_spoken_of(text: str) -> None:
    result = mixkv("-m", "toy", "--text", text, "-n", "50", "--dry-run", "--window", "64,64,0", "--k-group", "0,64")
    assert result.exit_code == 0 and result.stdout.count("\n") == 2
    assert result.stderr == "mixkv: 4 of the combinations are the same policy as another, and are measured once\n"


def test_policies_and_texts_may_be_given_several_times(text: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(CachePolicy(sinks=9).to_toml())
    result = mixkv(
        "-m",
        "toy",
        "-n",
        "50",
        "--dry-run",
        "--text",
        text,
        "--text",
        "topics",
        "--policy",
        "f16",
        "--policy",
        str(mine),
    )
    assert result.exit_code == 0
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [text, text, "topics", "topics"]
    assert [line.split("\t")[3] for line in result.stdout.splitlines()][:2] == [
        str(CachePolicy.parse("f16")), str(CachePolicy(sinks=9))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--together", "0"], 2, ["--together must be from 1 to 64, found 0"]),
        (["--together", "65"], 2, ["--together must be from 1 to 64"]),
        (["--workers", "0"], 2, ["--workers must be from 1 to 64"]),
        (["--workers", "2", "--threads", "1"], 2, ["--workers must be at most the 1 threads", "found 2"]),
        (["--threads", "0"], 2, ["--threads must be from 1 to"]),
        (["-n", "1"], 2, ["--tokens must be 2 or more"]),
        (["--first", "-1"], 2, ["--first must be 0 or more"]),
        (["--first", "49"], 2, ["first must be from 0 to 48"]),
        (["--regime", "fast"], 2, ["--regime must be one of"]),
        (["--continue", "-1"], 2, ["--continue must be from 0"]),
        (["--seeds", "-1"], 2, ["--seeds must be numbers"]),
        (["--seeds", "2147483648"], 2, ["--seeds must be"]),
        (["--seeds", "1,1"], 2, ["seeds must be one or more, none twice"]),
        (["--text", "topics", "--text", "topics"], 2, ["documents must be one or more, none twice"]),
        (["--window", "x"], 2, ["--window must be numbers"]),
        (["--k-bits", "5"], 2, ["the combination k_bits=5:", "k_bits must be one of 2, 3, 4, 8, 16, 32"]),
        (["--v-group", "32"], 2, ["policy '", "v_group"]),
        (["--policy", "k9v9"], 2, ["k9v9"]),
        (["--policy", "none.toml"], 2, ["none.toml: no such file"]),
        (["none.toml"], 2, ["none.toml: no such file"]),
        (["--weights", "q5"], 2, ["weights", "q5"]),
        (["--reference-weights", "q5"], 2, ["weights", "q5"]),
        (["-m", "none"], 2, ["model 'none': neither a registry name"]),
        (["--text", "none.txt"], 5, ["none.txt: cannot be read"]),
        (["-o", "none/results.jsonl"], 2, ["--output none/results.jsonl: there is no folder none"]),
        (["-n", "20000", "--seeds", "1"], 5, ["20000"]),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_is_done(
    options: list[str], code: int, words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-m", "toy", "-n", "50", *([] if "--text" in options else ["--text", text])]
    refused(mixkv(*given, *options), code, *words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_results_file_is_refused_before_a_worker_starts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary")
    refused(mixkv("-m", "toy", "--text", text, "-n", "50", "-o", str(path)), 2, "notes.txt:1: not a row: b'Dear diary'")
    assert path.read_text() == "Dear diary"


def test_caches_that_memory_cannot_hold_are_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all workers at once count, and each is there twice where both regimes are compared."""
    grid = grids.make({"tokens": 500}, [], {"k_bits": [2, 32], "v_bits": [2, 32]}, [text], [0])
    opened = open_model("toy")
    config = opened.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    def needed(workers: int, together: int, **setting: Any) -> int:
        own = replace(grid, setting=replace(grid.setting, **setting))
        parts = sweep.pieces(own, opened)
        found: list[int] = []

        def check(config: ModelConfig, policy: CachePolicy, tokens: int, *, beside: list[CachePolicy]) -> None:
            found.append(sum(memory.plan(config, each, tokens).total for each in (policy, *beside)))

        with monkeypatch.context() as patch:
            patch.setattr(sweep, "check_fits", check)
            sweep.check_memory(own, opened, parts, workers, together)
        return found[0]

    full = needed(1, 1)
    # The reference's, and one of 32 bits but for its window
    assert 1.8 * 4 * values * 500 <= full <= 2.2 * 4 * values * 500
    assert needed(2, 1) == 2 * full and needed(1, 1, regime="both") == 2 * full
    assert needed(1, 4) > needed(1, 2) > full and needed(1, 64) == needed(1, 4)
    assert needed(1, 1, shadow=True) > full and needed(1, 1, continuation=200) > 1.3 * full
    monkeypatch.setattr(memory, "available_nbytes", lambda: 10_000)
    result = mixkv("-m", "toy", "--text", text, "-n", "500", "--dry-run")
    refused(result, 2, "a cache of 500 tokens and 1 beside it needs", "10000 bytes of memory are available")


# --- what cannot be measured --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A model in a folder: toy, but that its keys are so many times as large; or with tensors missing."""

    def make(factor: float = 1, *, without: str = "nothing") -> Path:
        path = tmp_path / "model"
        path.mkdir()
        config = toys.CONFIG
        source = toys.ToySource(expected_tensors(config))
        tensors = {name: source.read(name) for name in source.shapes if without not in name}
        save_file(
            {name: x * np.float32(factor if "k_proj" in name else 1) for name, x in tensors.items()},
            path / "model.safetensors",
        )
        described = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
            "rope_theta": config.rope.theta,
            **{name: getattr(config, name) for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings", "attention_bias", "mlp_bias",
            )},
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(described))
        characters = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
        backend = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(characters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.save(str(path / "tokenizer.json"))
        return path

    return make


def test_a_cell_that_cannot_be_measured_is_reported_and_tried_again(
    folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """Keys beyond float16 are refused by an old tier of 16 bits alone; and the others beside it are measured."""
    path = tmp_path / "results.jsonl"
    options = [
        "-m",
        str(folder(1e6)),
        "--text",
        text,
        "-n",
        "100",
        "--window",
        "0",
        "--rotate",
        "none",
        "--k-bits",
        "8,16,4",
    ]
    options += ["--seeds", "0,1", "-o", str(path), "--threads", "1", "--weights", "q8"]
    result = mixkv(*options)
    assert result.exit_code == 6, result.stderr
    failed = CachePolicy(window=0, k_bits=16, rotate_k=False, rotate_v=False)
    first, second, last = result.stderr.splitlines()
    assert first.startswith(f"mixkv: not measured: {failed} on {text}: layer 0, ")
    assert second.startswith(f"mixkv: not measured: {failed} on {text} (1): layer 0, ")
    assert last.startswith("mixkv: layer 0, ") and "cannot be quantized" in last
    rows = rows_of(path)
    assert [(row["seed"], row["k_bits"]) for row in rows] == [(0, 8), (0, 4), (1, 8), (1, 4)]
    assert all(math.isfinite(row["kld"]["mean"]) for row in rows) and result.stdout.count("\n| ") == 4 + 2
    again = mixkv(*options)
    assert (again.exit_code, again.stdout) == (6, result.stdout) and rows_of(path) == rows
    assert again.stderr == result.stderr


def test_a_model_that_a_worker_cannot_load_is_its_error(folder: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Its description is read before; that a tensor is missing shows when it is loaded."""
    path = tmp_path / "results.jsonl"
    model = folder(without="layers.1.mlp.up_proj")
    refused(mixkv("-m", str(model), "--text", text, "-n", "100", "-o", str(path)), 3, "layers.1.mlp.up_proj")
    assert path.read_bytes() == b""
    (model / "model.safetensors").write_bytes(b"no weights")
    refused(mixkv("-m", str(model), "--text", text, "-n", "100"), 3, "model.safetensors")


def pretended(*messages: object) -> tuple[Workers, Connection]:
    """Workers of which there is one, that has said something; and its end of the pipe."""
    workers = Workers(0, 1, Setting("toy"))
    ours, theirs = Pipe()
    workers._pipes.append(ours)
    workers._tasks[ours] = None
    for message in messages:
        theirs.send(message)
    return workers, theirs


def test_a_worker_that_fails_while_it_gets_a_task_is_known_by_its_error(text: str) -> None:
    """The task cannot be sent any more then, but what the worker said before it ended is still there."""
    grid = grids.make({"model": "toy", "tokens": 20}, [], {"window": [0, 1]}, [text], [0])
    cells = sweep.cells_of(grid, sweep.pieces(grid, open_model("toy")), ("1", "2"))
    workers, theirs = pretended(Failed(ModelError("no such tensor")))
    theirs.close()
    with pytest.raises(ModelError, match="no such tensor"):
        list(workers.run(sweep.tasks_of(cells, 1)))


def test_workers_must_have_the_same_model() -> None:
    """Files may be replaced while they load."""
    workers, _ = pretended(Ready(("1", "2")), Ready(("1", "2")), Ready(("1", "3")))
    assert workers.fingerprints() == ("1", "2")
    workers._receive(workers._pipes[0])
    with pytest.raises(MixkvError, match="another model than the one before"):
        workers._receive(workers._pipes[0])


def test_a_worker_reports_whatever_it_fails_of(monkeypatch: pytest.MonkeyPatch) -> None:
    _, theirs = Pipe()

    def load(*_: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(worker, "_load", load)
    error = worker._served(theirs, Setting("toy"), 1).error
    assert type(error) is MixkvError and str(error) == "a worker failed: MemoryError: no room at all"
