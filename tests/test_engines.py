"""Whole engines in turns: the order, the ratios, what is compared, and what is said of those that are missing."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("turns", "summary", "surroundings", "engines", "quality")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts by name, imported as they import each other; none stays importable."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path[:0] = paths = [str(FOLDER), str(FOLDER / "workers")]
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def contenders(turns: ModuleType) -> list[Any]:
    return [turns.Engine("a", "", "", ("f16", "k4v4")), turns.Engine("b", "", "", ("q4_0", "f16"))]


def row(engine: str, kv: str, bits: float, round: int, rate: float, **more: Any) -> dict[str, Any]:
    found = {"test": "decode at 16", "engine": engine, "kv": kv, "bits": bits, "round": round}
    return {**found, "tokens_per_second": rate, "peak_bytes": 5e6, "load_seconds": 1.5, "ids": [1, 2, 3], **more}


def cells(table: str) -> list[list[str]]:
    """The rows of a table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_bits_by_name(scripts: dict[str, ModuleType]) -> None:
    bits = scripts["turns"].bits
    names = ("f32", "bf16", "f16", "q8_0", "u8", "k8v4", "q8_0/q4_0", "q5_1", "iq4_nl", "k2v2")
    assert [bits(name) for name in names] == [32, 16, 16, 8, 8, 6, 6, 5, 4, 2]
    with pytest.raises(ValueError, match="full"):
        bits("full")


def test_rivals_stand_side_by_side_and_everything_comes_again(scripts: dict[str, ModuleType]) -> None:
    turns = scripts["turns"]
    tests = [turns.Test("decode", 7_900), turns.Test("prefill", 64)]
    planned = turns.plan(contenders(turns), tests, 2)
    once = [("a", "f16"), ("b", "f16"), ("a", "k4v4"), ("b", "q4_0")]
    assert [turn.key for turn in planned[:8]] == [(*key, str(test)) for test in tests for key in once]
    assert [turn.key for turn in planned[8:]] == [turn.key for turn in planned[:8]]
    assert [turn.round for turn in planned] == [1] * 8 + [2] * 8
    assert [str(test) for test in tests] == ["decode at 7,900", "prefill of 64"]


def test_who_fails_is_reported_and_not_tried_again(scripts: dict[str, ModuleType]) -> None:
    turns = scripts["turns"]
    tried, said = [], []

    def runner(turn: Any) -> dict[str, Any]:
        tried.append(turn.key)
        if turn.kv == "q4_0":
            raise turns.WorkerError("no such cache")
        return {"tokens": 8, "seconds": 2.0}

    rows = turns.run_turns(turns.plan(contenders(turns), [turns.Test("decode", 16)], 2), runner, said.append)
    assert len(tried) == len(rows) == len(said) == 7
    assert [row["error"] for row in rows if row["kv"] == "q4_0"] == ["no such cache"]
    assert {row["tokens_per_second"] for row in rows if row["kv"] != "q4_0"} == {4.0}
    assert sum("no such cache" in line for line in said) == 1


def test_ratios_are_the_medians_of_the_rounds_ratios(scripts: dict[str, ModuleType]) -> None:
    """The medians' ratio would be 20 / 20 for b; b's second round is missing, c is the best at 4 bits, b at any."""
    rows = [row("a", "k4v4", 4, i, rate) for i, rate in ((1, 10.0), (2, 20.0), (3, 90.0))]
    rows += [row("b", "u4", 4, i, rate) for i, rate in ((1, 20.0), (3, 30.0))]
    rows += [row("c", "q4_0", 4, i, rate) for i, rate in ((1, 40.0), (2, 40.0), (3, 30.0))]
    rows += [row("b", "f16", 16, i, 100.0) for i in (1, 2, 3)]
    rows += [row("a", "f16", 16, 1, 1.0, error="x")]
    table = scripts["summary"].ratio_table(rows, ["a", "b", "c", "d"], {"d": "not installed"})
    dense, coded = cells(table)
    assert dense[:6] == ["decode at 16", "f16, f16, -, -", "-", "100.0", "-", "not installed"]
    assert set(dense[6:]) == {"-"}
    assert coded[:6] == ["decode at 16", "k4v4, u4, q4_0, -", "20.0", "25.0", "40.0", "not installed"]
    assert coded[6:] == ["1.75", "0.50", "-", "0.50", "0.20"]  # b: of 0.5 and 3; c: of 0.25, 0.5 and 3
    spread = cells(scripts["summary"].spread_table(rows))
    assert ["c", "q4_0", "decode at 16", "40.0", "30.0", "40.0", "3", "5", "1.5"] in spread
    assert ["a", "f16", "decode at 16", "failed", *["-"] * 5] in spread


def test_answers_are_compared_with_ours_of_most_bits(scripts: dict[str, ModuleType]) -> None:
    rows = [row("a", "k4v4", 4, 1, 1.0, ids=[1, 9, 3]), row("a", "f16", 16, 1, 1.0), row("b", "u4", 4, 1, 1.0)]
    rows.append(row("b", "u4", 4, 2, 1.0, ids=[7, 7, 7]))
    found = cells(scripts["summary"].check_table(rows, "a"))
    assert [line[1:4] for line in found] == [["a", "k4v4", "1 of 3"], ["a", "f16", "3 of 3"], ["b", "u4", "3 of 3"]]
    assert found[0][4] == "1 9 3"


def test_divergence_against_a_sum_by_hand(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = scripts["quality"]
    monkeypatch.setattr(quality, "ROWS", 3)
    rng = np.random.default_rng(0)
    ids = [4, 1, 0, 3, 2, 2, 1]
    reference, other = (rng.standard_normal((7, 5)) * 2 for _ in range(2))

    def reader(logits: Any) -> Any:
        parts = iter(np.split(logits, [3, 6]))
        return lambda _: next(parts)

    quality.store(str(tmp_path), ids, reader(reference.astype(np.float32)))
    same = quality.compare(str(tmp_path), ids, reader(reference.astype(np.float32)))
    assert same["mean"] == same["max"] == 0 and same["same_top"] == 1
    assert same["perplexity"] == same["reference_perplexity"]
    found = quality.compare(str(tmp_path), ids, reader(other))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (reference, other))
    kl = [sum(a * np.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    assert found["mean"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert found["max"] == pytest.approx(max(kl), rel=1e-5)
    chances = [q[i, ids[i + 1]] for i in range(6)]
    assert found["perplexity"] == pytest.approx(np.prod(chances) ** (-1 / 6), rel=1e-5)
    assert found["same_top"] == np.mean(p.argmax(axis=1) == q.argmax(axis=1))


def test_what_becomes_of_a_worker(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = scripts["turns"]
    monkeypatch.setattr(turns, "WORKERS", tmp_path)
    sources = {
        "good.py": "print('noise'); print(json.dumps({'got': json.load(sys.stdin), 'argv': sys.argv[1:]}))",
        "missing.py": "print('no such module', file=sys.stderr); sys.exit(3)",
        "broken.py": "print(*range(100), sep='\\n', file=sys.stderr); sys.exit(1)",
        "slow.py": "time.sleep(60)",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text("import json, sys, time\n" + source)

    def call(script: str, job: Any, timeout: float = 60, python: str = sys.executable) -> Any:
        return turns.call(turns.Engine("x", python, script, ()), job, timeout)

    assert call("good.py", {"kv": "f16"}) == {"got": {"kv": "f16"}, "argv": []}
    assert call("good.py", None) == {"got": None, "argv": ["--version"]}
    with pytest.raises(turns.NotInstalledError, match="no such module"):
        call("missing.py", None)
    with pytest.raises(turns.NotInstalledError, match="nowhere"):
        call("good.py", None, python=str(tmp_path / "nowhere"))
    with pytest.raises(turns.WorkerError, match="exit code 1\n85\n(.|\n)*99$"):
        call("broken.py", {})
    with pytest.raises(turns.WorkerError, match="not done after"):
        call("slow.py", {}, timeout=0.5)


def test_the_whole_script_on_the_toy(
    scripts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    toy: Any,
) -> None:
    """Our worker gives the tokens that a session gives; who is not installed is named."""
    from mixkv import CachePolicy, Session

    text = "A prompt of more than twenty bytes."
    (tmp_path / "prompt.txt").write_text(text)
    arguments = ["--model", "toy", "--prompt", str(tmp_path / "prompt.txt"), "--depths", "20", "--prefills", ""]
    arguments += ["--mixkv-kv", "k4v4", "-n", "3", "--rounds", "1", "--no-machine", "-o", str(tmp_path / "out.json")]
    arguments += ["--engines", "mixkv,llama.cpp", "--llama-python", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", ["engines.py", *arguments])
    assert scripts["engines"].main() == 0
    printed = capsys.readouterr().out
    assert "llama.cpp: not installed" in printed and "| not installed |" in printed
    session, ids = Session(toy, CachePolicy()), toy.encode(text)[:20]
    answer = [int(session.forward(ids, logits="last").argmax())]
    for _ in range(4):
        answer.append(int(session.forward(answer[-1:], logits="last").argmax()))
    assert "| " + " ".join(map(str, answer)) + " |" in printed
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(found["step_seconds"]) == found["tokens"] == 3
    assert found["seconds"] == pytest.approx(sum(found["step_seconds"]))
    assert found["peak_bytes"] > 1e7 and found["load_seconds"] > 0
