"""``needle``: rows against float64 computations from a session's logits, on answers that are told, and the intervals."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixkv
from mixkv import CachePolicy, Session
from mixkv.engine import memory
from mixkv.engine.generate import Token
from mixkv.engine.session import CHUNK
from mixkv.experiments.needle import run as needle
from mixkv.experiments.needle.plan import Plan
from mixkv.experiments.needle.report import UNSEEN, Tables, wilson, writer
from mixkv.experiments.needle.run import Needle, ask
from mixkv.experiments.needle.task import BEYOND, Prompt, Prompts, Task
from mixkv.experiments.texts import default_text
from mixkv.models.errors import NumericalError, PromptError, UsageError
from mixkv.models.load import Model

TEXT = default_text()[:30_000]
COARSE = CachePolicy(window=32, sinks=4, k_bits=2, v_bits=2, tile=32)
FULL = CachePolicy.full()
KEYS = {
    "kind", "key", "schema", "mixkv", "cpu_info", "os", "python", "numpy", "numba", "model", "weights", "policy", "spec",
    "policy_digest", "task", "length", "depth", "trial", "seed", "prompt_tokens", "expected", "answer", "correct", "nll",
    "nll_reference", "kld", "reference_correct", "command", "reference_weights", "keys", "chat", "document", "position",
    "reference_answer",
}  # fmt: skip


def plan(policies: list[CachePolicy], **options: Any) -> Plan:
    given: dict[str, Any] = {"lengths": [400], "depths": [0.5], "task": Task(), **options}
    return Plan(policies=policies, **given)


def rows(model: Model, asked: Plan, text: str = TEXT, **options: Any) -> list[dict[str, Any]]:
    models = {asked.weights: model, asked.reference_weights: model}
    return list(Needle(models, text, asked, **options).rows())


def log_probabilities(model: Model, policy: CachePolicy, prompt: Prompt) -> np.ndarray:
    """Of what follows the prompt, along the right answer: float64 (tokens, V), in the plainest form."""
    session = Session(model, policy)
    session.forward(prompt.token_ids[:-1], None)
    logits = session.forward([int(prompt.token_ids[-1]), *prompt.answer_ids[:-1]])
    assert logits is not None
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_likelihoods_and_divergence_are_those_of_the_logits(toy: Model) -> None:
    asked = plan([COARSE, CachePolicy(window=16)], lengths=[400, 601], depths=[0.1, 0.9], trials=2)
    prompts = Prompts(toy, TEXT, asked.task)
    found = rows(toy, asked)
    assert len(found) == 2 * 2 * 2 * 2
    for row in found:
        prompt = prompts.make(row["length"], row["depth"], row["trial"])
        p, q = (log_probabilities(toy, policy, prompt) for policy in (FULL, CachePolicy.parse(row["policy"])))
        at = np.arange(len(prompt.answer_ids)), np.array(prompt.answer_ids)
        assert row["nll"] == pytest.approx(-q[at].mean(), rel=1e-9)
        assert row["nll_reference"] == pytest.approx(-p[at].mean(), rel=1e-9)
        assert row["kld"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-7) and row["kld"] > 1e-4
        assert (row["expected"], row["position"], row["prompt_tokens"]) == (
            prompt.expected, prompt.position, len(prompt.token_ids),
        )  # fmt: skip


def test_what_is_answered_is_what_is_generated(toy: Model) -> None:
    for row in rows(toy, plan([COARSE, FULL])):
        prompt = Prompts(toy, TEXT, Task()).make(400, 0.5, 0)
        session = Session(toy, CachePolicy.parse(row["policy"]))
        tokens = list(mixkv.generate(session, prompt.token_ids.tolist(), max_tokens=len(prompt.answer_ids) + BEYOND))
        assert row["answer"] == "".join(token.text for token in tokens)
        assert len(tokens) == 6 + BEYOND and not row["correct"]  # toy knows nothing


def test_a_policy_that_is_the_reference_is_not_apart(toy: Model) -> None:
    for row in rows(toy, plan([FULL], depths=[0.0, 1.0], trials=2)):
        assert row["kld"] == 0 and row["nll"] == row["nll_reference"]
        assert row["answer"] == row["reference_answer"] and row["correct"] == row["reference_correct"]


def test_rows_have_their_keys_and_come_in_order(toy: Model) -> None:
    asked = plan([COARSE, FULL], lengths=[500, 400], depths=[1.0, 0.0], trials=2, task=Task("multikey", 3, 5))
    found = rows(toy, asked)
    order = [(row["length"], row["depth"], row["trial"], row["spec"]) for row in found]
    assert order == [
        (length, depth, trial, policy.spec)
        for length in (500, 400) for depth in (1.0, 0.0) for trial in (0, 1) for policy in (COARSE, FULL)
    ]  # fmt: skip
    for row in found:
        assert set(row) == KEYS and json.loads(json.dumps(row, allow_nan=False)) == row
        assert (row["kind"], row["schema"], row["model"], row["task"]) == ("needle", 1, "toy", "multikey")
        assert (row["keys"], row["seed"], row["chat"], row["document"]) == (3, 5, False, "topics")
        assert CachePolicy.parse(row["policy"]).digest == row["policy_digest"]
        assert len(row["key"]) == 16 and int(row["key"], 16) >= 0
    assert len({row["key"] for row in found}) == len(found)


def test_a_key_changes_with_everything_that_matters_and_with_nothing_else(toy: Model) -> None:
    def key(model: Model = toy, text: str = TEXT, policy: CachePolicy = COARSE, **options: Any) -> str:
        return rows(model, plan([policy], **options), text)[-1]["key"]

    other = mixkv.load("toy")
    other.transformer.weights.head.weight[65] += 1
    different = [
        key(), key(policy=FULL), key(lengths=[401]), key(depths=[0.75]), key(trials=2), key(task=Task(seed=1)),
        key(task=Task("multikey", 2)), key(task=Task("multikey", 3)), key(text=TEXT[1000:]), key(model=other),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    same = [
        key(model=mixkv.load("toy")), key(model=replace(toy, name="another name")),
        rows(toy, plan([FULL, COARSE], lengths=[380, 400], depths=[0.0, 0.5], trials=3))[-5]["key"],
    ]  # fmt: skip
    assert set(same) == {different[0]}


def test_other_weights_of_the_reference_are_used(toy: Model) -> None:
    models = {"q8": mixkv.load("toy", "q8"), "f32": toy}
    (row,) = Needle(models, TEXT, plan([FULL], weights="q8", reference_weights="f32")).rows()
    assert 1e-7 < row["kld"] < 0.1 and row["nll"] != row["nll_reference"]
    assert (row["weights"], row["reference_weights"]) == ("q8", "f32")
    (alone,) = rows(toy, plan([FULL]))
    assert row["nll_reference"] == alone["nll_reference"] and row["key"] != alone["key"]


def test_the_reference_reads_each_prompt_once(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[CachePolicy, int]] = []
    real = needle.ask

    def watched(session: Session, prompt: Prompt, *rest: Any) -> Any:
        read.append((session.policy, len(prompt.token_ids)))
        return real(session, prompt, *rest)

    monkeypatch.setattr(needle, "ask", watched)
    rows(toy, plan([COARSE, CachePolicy()], lengths=[400, 500]))
    assert read == [(policy, length) for length in (400, 500) for policy in (FULL, COARSE, CachePolicy())]


def test_progress_is_that_of_all_tokens(toy: Model) -> None:
    told: list[tuple[int, int, str]] = []
    rows(toy, plan([COARSE], lengths=[400, 1200]), progress=lambda *each: told.append(each))
    done = [each[0] for each in told]
    assert {each[1] for each in told} == {2 * (400 + 1200)} and done == sorted(done)
    assert (done[0], done[-1]) == (0, 3200) and 800 + CHUNK in done  # the second prompt in chunks
    assert told[-1][2] == "1200 tokens, depth 0.5, trial 0, k2v2:window=32:tile=32"


class Scripted(Session):
    """A session that says a text, whatever it reads: each token's logits name the next one of the script."""

    def __init__(self, model: Model, prompt: Prompt, text: str) -> None:
        super().__init__(model)
        self.prompt, self.says = prompt, text.encode()

    def forward(self, token_ids: Any, logits: Any = "all", *, progress: Any = None) -> Any:
        first, self.position = self.position, self.position + len(token_ids)
        if logits is None:
            return None
        out = np.zeros((len(token_ids), 258), np.float32)
        for i, at in enumerate(range(first, self.position)):
            out[i, self.says[at + 1 - len(self.prompt.token_ids)]] = 9
        return out[-1] if logits == "last" else out

    def fork(self) -> "Scripted":
        other = Scripted(self.model, self.prompt, self.says.decode())
        other.position = self.position
        return other


@pytest.mark.parametrize(
    ("answer", "right"), [(" {}. Rem", True), ("{}. Remem", True), (" {}9 ....", False), ("It is {}!", False)]
)
def test_a_session_that_says_the_digits_is_right(toy: Model, answer: str, right: bool) -> None:
    prompt = Prompts(toy, TEXT, Task()).make(400, 0.5, 0)
    text = answer.format(prompt.expected).ljust(20)
    found, logits = ask(Scripted(toy, prompt, text), prompt)
    assert found == text[: 6 + BEYOND] and prompt.is_right(found) is right
    assert logits.shape == (6, 258)  # a space and five digits, in bytes
    assert logits.argmax(axis=1).tolist() == list(text.encode()[:6])


def test_right_answers_are_counted(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is right in the first of two trials, the one policy in both, the other in none."""
    prompts = Prompts(toy, TEXT, Task())
    digits = [prompts.make(400, 0.5, trial).expected for trial in (0, 1)]
    trial = iter([0, 0, 0, 1, 1, 1])

    def says(session: Session, ids: Any, **options: Any) -> list[Token]:
        own = digits[next(trial)]
        wrong = session.policy == COARSE or (session.policy == FULL and own == digits[1])
        return [Token(0, " nothing" if wrong else f" {own[:2]}"), Token(1, "" if wrong else own[2:])]

    monkeypatch.setattr(needle, "generate", says)
    found = rows(toy, plan([CachePolicy(), COARSE], trials=2))
    assert [row["correct"] for row in found] == [True, False, True, False]
    assert [row["reference_correct"] for row in found] == [True, True, False, False]
    assert [row["answer"] for row in found] == [f" {digits[0]}", " nothing", f" {digits[1]}", " nothing"]
    table = Tables()
    assert "".join(table.row(row) for row in found) == ""
    lines = [line for line in table.end().splitlines() if line.startswith(("| reference", "| k"))]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:6]] for line in lines}
    assert cells["reference"] == ["1/2 = 50.0 %", "9.5 - 90.5 %", "1/1", "0/1"]
    assert cells["k4v4"] == ["2/2 = 100.0 %", "34.2 - 100.0 %", "1/1", "1/1"]
    assert cells["k2v2:window=32:tile=32"] == ["0/2 = 0.0 %", "0.0 - 65.8 %", "0/1", "0/1"]


def row_of(length: int, depth: float, trial: int, correct: bool, reference: bool, **other: Any) -> dict[str, Any]:
    about = {name: "?" for name in ("cpu_info", "os", "mixkv", "python", "numpy", "numba", "policy_digest")}
    return {
        **about, "model": "m", "weights": "f32", "reference_weights": "f32", "policy": "p", "spec": "p",
        "task": "passkey", "keys": 1, "chat": False, "document": "topics", "seed": 0,
        "length": length, "depth": depth, "trial": trial, "correct": correct, "reference_correct": reference,
        "nll": 1.0, "nll_reference": 0.5, "kld": 0.25, **other,
    }  # fmt: skip


def test_the_tables_are_fractions_by_length_and_depth() -> None:
    table = Tables()
    assert table.end() == ""
    for length in (512, 1024):
        for depth in (0.0, 0.5):
            for trial in range(4):
                right = trial < (length == 512) * 2 + (depth == 0.5)
                table.row(row_of(length, depth, trial, right, trial < 3, kld=trial / 8, nll=float(trial)))
    text = table.end()
    grids = [part for part in text.split("\n\n") if part.startswith("| length")]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in grids[1].splitlines()[2:]] == [
        ["512", "50 %", "75 %"], ["1024", "0 %", "25 %"],
    ]  # fmt: skip
    assert all(set(line.split("|")[2].split()) <= {"75", "%"} for line in grids[0].splitlines()[2:])
    assert "Found by the reference:\n\n| length" in text and "Found with p:\n\n| length" in text
    (own,) = [line for line in text.splitlines() if line.startswith("| p ")]
    assert [cell.strip() for cell in own.split("|")[2:-1]] == [
        "6/16 = 37.5 %", "18.5 - 61.4 %", "6/12", "0/4", "1.5", "0.5", "0.188", "0.375",
    ]  # fmt: skip
    assert text.endswith(f"\n\n{UNSEEN}\n") and "KL" in UNSEEN and "mixkv eval" in UNSEEN


def test_cells_that_were_not_measured_and_numbers_that_are_infinite_are_shown_as_such() -> None:
    """A run that is interrupted prints what it has."""
    table = Tables()
    table.row(row_of(512, 0.0, 0, True, True))
    table.row(row_of(512, 1.0, 0, True, True, kld=None))
    table.row(row_of(1024, 0.0, 0, True, True))
    text = table.end()
    lines = [line for line in text.splitlines() if line.startswith("|") and "1024" in line]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == 2 * [["1024", "100 %", "-"]]
    (own,) = [line for line in text.splitlines() if line.startswith("| p ")]
    assert [cell.strip() for cell in own.split("|")[-3:-1]] == ["inf", "inf"]


@pytest.mark.parametrize(
    ("found", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_as_published(found: int, trials: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    assert wilson(found, trials) == pytest.approx((low, high), abs=6e-5)
    assert wilson(trials - found, trials) == pytest.approx((1 - high, 1 - low), abs=6e-5)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 4))
def test_wilsons_interval_ends_where_the_score_does(pair: tuple[int, int], z: float) -> None:
    found, trials = pair
    for end in wilson(found, trials, z):
        assert 0 <= end <= 1
        distance = abs(found / trials - end)
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / trials), rel=1e-6, abs=1e-7)
    low, high = wilson(found, trials, z)
    assert low <= found / trials <= high and low < high


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials must be from 1 to 10000, found 0"),
        ({"trials": True}, "found True"),
        ({"depths": [0.5, 1.5]}, "depths must be from 0 to 1, found 1.5"),
        ({"depths": [math.nan]}, "found nan"),
        ({"depths": [0.5, 0.0, 0.5]}, "depths must be one or more, each once, found 0.5 twice"),
        ({"lengths": []}, "lengths must be one or more, each once, found none"),
        ({"lengths": [400, 400]}, "found 400 twice"),
        ({"policies": [CachePolicy(), CachePolicy.parse("balanced")]}, "policies must be"),
        ({"weights": "f7"}, "f7"),
        ({"reference_weights": "f7"}, "f7"),
    ],
)
def test_a_plan_out_of_range_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Plan(**{"task": Task(), "policies": [FULL], "lengths": [400], "depths": [0.5], **options})


def test_everything_is_refused_before_anything_is_read(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "ask", lambda *_: pytest.fail("read"))
    models = {"f32": toy}
    with pytest.raises(UsageError, match="found 99999"):
        Needle(models, TEXT, plan([FULL], lengths=[400, 99_999]))
    with pytest.raises(PromptError, match="give a longer text"):
        Needle(models, TEXT[:500], plan([FULL], lengths=[400, 900]))
    with pytest.raises(UsageError, match="layers 7"):
        Needle(models, TEXT, plan([FULL, CachePolicy.parse("old=k4c/v4t layers=7[k_bits=8]")]))
    monkeypatch.setattr(memory, "available_nbytes", lambda: 100_000)
    with pytest.raises(UsageError, match="a cache of 410 tokens needs .* 100000 bytes of memory"):
        Needle(models, TEXT, plan([COARSE]))


def test_caches_are_held_one_at_a_time(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory for the largest of them is enough."""
    needed = memory.plan(toy.config, FULL, 410).total
    monkeypatch.setattr(memory, "available_nbytes", lambda: needed)
    assert len(rows(toy, plan([COARSE, CachePolicy()]))) == 2
    monkeypatch.setattr(memory, "available_nbytes", lambda: needed - 1)
    with pytest.raises(UsageError, match="needs"):
        rows(toy, plan([COARSE]))


def test_a_number_that_is_infinite_is_null(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.zeros((6, 258), np.float32)
    logits[:, :128] = -np.inf
    answers = iter([("", np.zeros_like(logits)), ("", logits)])
    monkeypatch.setattr(needle, "ask", lambda *_: next(answers))
    (row,) = rows(toy, plan([COARSE]))
    assert (row["nll"], row["kld"]) == (None, None) and row["nll_reference"] == pytest.approx(math.log(258))


def test_logits_that_are_nan_are_an_error(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "ask", lambda *_: ("", np.full((6, 258), np.nan, np.float32)))
    with pytest.raises(NumericalError, match="reference"):
        rows(toy, plan([COARSE]))


def test_other_formats_have_every_row() -> None:
    row = row_of(512, 0.0, 0, True, True)
    assert json.loads(writer("jsonl").row(row)) == row
    assert writer("csv").row(row).splitlines()[0] == ",".join(row)
    with pytest.raises(UsageError, match="xml"):
        writer("xml")


@pytest.mark.model
def test_the_default_cache_of_the_default_model_finds_what_a_float32_one_does(default_model: Model) -> None:
    asked = plan([CachePolicy()], lengths=[512], depths=[0.25])
    (row,) = rows(default_model, asked, default_text())
    assert row["correct"] == row["reference_correct"]
    assert 0 < row["kld"] < 0.05 and abs(row["nll"] - row["nll_reference"]) < 0.2
    assert row["expected"].isdigit() and row["prompt_tokens"] == 512
