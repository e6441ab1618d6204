"""The start and its parts, on the toy model in processes of their own."""

import statistics as oracle

import pytest

import mixkv
from mixkv.experiments import startup
from mixkv.experiments.startup import PARTS, Startup, find_prompt, first_character, summary
from mixkv.experiments.tables import make_writer
from mixkv.models.errors import MixkvError, UsageError

SAMPLES = [
    {"imports": 900, "load": 10, "kernels": 300, "first_token": 20, "compiled": 2, "total": 1500},
    {"imports": 700, "load": 40, "kernels": 100, "first_token": 60, "compiled": 0, "total": 1100},
    {"imports": 800, "load": 30, "kernels": 200, "first_token": 50, "compiled": 0, "total": 1000},
]


def test_parts_and_rest_add_up_to_the_total() -> None:
    found = summary(SAMPLES)
    for part in (*PARTS, "total"):
        assert found[f"{part}_ns"] == oracle.median([sample[part] for sample in SAMPLES])
        assert found["samples_ns"][part] == [sample[part] for sample in SAMPLES]
    assert sum(found[f"{part}_ns"] for part in PARTS) + found["rest_ns"] == found["total_ns"] == 1100
    assert found["compiled"] == 2


def test_a_start_of_toy() -> None:
    told: list[tuple[int, int, str]] = []
    measuring = Startup("toy", ["auto"], [1], 2, warmup=True, progress=lambda *what: told.append(what))
    (row,) = measuring.rows()
    assert (row["model"], row["weights"], row["threads"], row["n_prompt"]) == ("toy", "auto", 1, 16)
    assert all(row[f"{part}_ns"] > 0 for part in (*PARTS, "total")) and row["compiled"] == 0
    assert [len(values) for values in row["samples_ns"].values()] == [2] * 5
    assert row["mixkv"] == mixkv.__version__
    assert [now for now, _, _ in told] == [0, 0, 1] and {every for _, every, _ in told} == {2}
    writer = make_writer("md", startup.COLUMNS, startup.heading)
    writer.row(row)
    heading, table = writer.end().split("\n\n")
    assert "answer to 16 tokens" in heading and "no functions had to be compiled" in heading
    titles, _, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    assert titles[3:] == ["python and imports", "model", "kernels", "first token", "rest", "total"]
    assert [float(cell) for cell in cells[3:]] == [round(row[f"{part}_ns"] / 1e6) for part in (*PARTS, "rest", "total")]


def test_what_had_to_be_compiled_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two functions, by what stands in place of the warm-up."""
    program = """
import mixkv.kernels.warmup, numba
def compile_two():
    numba.njit(lambda x: x + 1)(1)
    numba.njit(lambda x: x + 2)(1)
mixkv.kernels.warmup.warm_up = compile_two
from mixkv.experiments.startup import stages
stages()
"""
    monkeypatch.setattr(startup, "_STAGES", program)
    (row,) = Startup("toy", ["auto"], [1], 1, warmup=False).rows()
    assert row["compiled"] >= 2
    assert f"{row['compiled']} functions had to be compiled" in startup.heading([row])


def test_every_combination_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def start(_: Startup, weights: str, threads: int, prompt: str) -> dict[str, int]:
        asked.append((weights, threads))
        return SAMPLES[1]

    monkeypatch.setattr(Startup, "_start", start)
    rows = list(Startup("toy", ["auto", "f32"], [1, 2], 3, warmup=False).rows())
    assert [(row["weights"], row["threads"]) for row in rows] == [("auto", 1), ("auto", 2), ("f32", 1), ("f32", 2)]
    assert len(asked) == 12
    list(Startup("toy", ["auto"], [1], 3, warmup=True).rows())
    assert len(asked) == 16


def test_the_prompt_has_16_tokens() -> None:
    text, count = find_prompt("toy")
    assert count == 16 == len(mixkv.load("toy").encode(text))


class Merging:
    """A tokenizer of which no text of the wanted kind has exactly 16 tokens, or enough."""

    def __init__(self, per_token: int, least: int) -> None:
        self._per_token, self._least = per_token, least

    def encode(self, text: str) -> list[int]:
        return [0] * (self._least + len(text) // self._per_token)


@pytest.mark.parametrize(("tokenizer", "wanted"), [(Merging(1, 30), 31), (Merging(10, 0), 16), (Merging(100, 1), 3)])
def test_the_nearest_prompt_is_taken(tokenizer: Merging, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        def read_tokenizer(self) -> Merging:
            return tokenizer

    monkeypatch.setattr(startup, "open_model", lambda name, progress: Opened())
    text, count = find_prompt("any")
    assert count == wanted == len(tokenizer.encode(text))


def test_a_model_without_a_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        def read_tokenizer(self) -> None:
            return None

    monkeypatch.setattr(startup, "open_model", lambda name, progress: Opened())
    with pytest.raises(UsageError, match="'any' has no tokenizer"):
        find_prompt("any")


def test_a_start_that_fails_is_one_line() -> None:
    with pytest.raises(MixkvError, match=r"exit code 2: mixkv: .*no-such-model") as caught:
        first_character(["generate", "x", "-m", "no-such-model"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "repetitions", "word"),
    [(["auto"], 0, "-r must be from 1"), (["q9"], 1, "q9"), (["auto", "x"], 1, "'x'")],
)
def test_options_out_of_range_are_refused(weights: list[str], repetitions: int, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Startup("toy", weights, [1], repetitions)
