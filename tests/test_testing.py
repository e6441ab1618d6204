"""The pytest plugin as others use it: in a project of their own, and assertion by assertion."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixkv
from mixkv import CachePolicy, Session, testing
from mixkv.engine import session as sessions
from mixkv.experiments.evaluate import evaluate
from mixkv.experiments.golden import file as golden_file
from mixkv.experiments.golden import record as golden
from mixkv.experiments.golden.about import describe
from mixkv.models.errors import MixkvError, UsageError
from mixkv.models.load import Model

DOCS = (Path(mixkv.__file__).parent / "docs" / "testing.md").read_text(encoding="utf-8")
MINE = CachePolicy(window=16, sinks=2, tile=32, k_bits=2, v_bits=2)
PROMPTS: list[str | list[int]] = ["Once upon", [1, 2, 3] * 40]


@pytest.fixture(scope="module")
def model() -> Model:
    return testing.tiny_model(num_hidden_layers=2)


def in_project(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a folder that knows nothing of this repository's configuration."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | environment
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def test_the_example_of_the_docs_passes_in_a_project_of_its_own(tmp_path: Path) -> None:
    (program,) = blocks("python")
    commands = [line for line in blocks("sh")[1].splitlines() if line]
    assert commands[1:] == ["pytest test_decode.py"] and "`test_decode.py`" in DOCS
    (tmp_path / "test_decode.py").write_text(program)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-config --strict-markers\n")
    recorded = in_project(tmp_path, *commands[0].split())
    assert recorded.returncode == 0, recorded.stderr
    done = in_project(tmp_path, *commands[1].split(), "-q", "-p", "no:cacheprovider", "-W", "error")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    # and it can fail: with the message of the check, and a traceback that ends in the test itself
    broken = program.replace('(mixkv_toy, "k4v4")', '(mixkv_toy, "k2v4")').replace("MINE, 0.1)", "MINE, 1e-9)")
    (tmp_path / "test_decode.py").write_text(broken)
    done = in_project(tmp_path, *commands[1].split(), "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1 and "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "policy:   k_bits 4 -> 2" in done.stdout and "KL mean is" in done.stdout
    assert "testing.py" not in done.stdout and "assertions.py" not in done.stdout


def test_fixtures_are_offered_with_what_they_are(tmp_path: Path) -> None:
    done = in_project(tmp_path, "pytest", "--fixtures", "-p", "no:cacheprovider")
    for name in ("mixkv_toy", "mixkv_tiny_model", "mixkv_default_model"):
        assert re.search(rf"^{name} \[session scope\] -- .*\n    \S", done.stdout, re.MULTILINE), done.stdout
        assert f"| `{name}` |" in DOCS
    assert "mixkv_fetch (bool):" in in_project(tmp_path, "pytest", "--help").stdout


DEFAULT = "def test_it(mixkv_default_model):\n    assert False, mixkv_default_model.name\n"


@pytest.mark.parametrize(("fetch", "words"), [("false", "mixkv pull smollm2"), ("true", "cannot be fetched")])
def test_the_default_model_skips_where_it_is_not_there(tmp_path: Path, fetch: str, words: str) -> None:
    (tmp_path / "test_it.py").write_text(DEFAULT)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmixkv_fetch = {fetch}\n")
    done = in_project(
        tmp_path, "pytest", "-rs", "-q", "-p", "no:cacheprovider", COLUMNS="400", MIXKV_CACHE=str(tmp_path / "cache"),
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_NO_INDEX="0", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
    )  # fmt: skip
    assert done.returncode == 0 and "1 skipped" in done.stdout and words in done.stdout, done.stdout + done.stderr


@pytest.mark.model
def test_the_default_model_is_there_where_it_can_be_had(mixkv_default_model: Model) -> None:
    assert mixkv_default_model.name == "smollm2" and mixkv_default_model.has_chat_template
    testing.assert_kl_below(mixkv_default_model, "k8v8:window=32", 0.01, tokens=96)


def test_without_pytest_it_says_what_is_missing() -> None:
    program = "import sys; sys.modules['pytest'] = None; import mixkv.testing"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: mixkv.testing is a plugin of pytest, which is not installed: pip install pytest"


def test_the_plugin_is_declared_and_loaded(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.get_plugin("mixkv") is testing


def test_the_tiny_model_of_the_fixture_is_made_once_for_the_same_arguments(
    mixkv_tiny_model: Any, mixkv_toy: Model
) -> None:
    one = mixkv_tiny_model(num_hidden_layers=1, seed=2)
    assert one is mixkv_tiny_model("llama", 2, num_hidden_layers=1)
    assert one is not mixkv_tiny_model("llama", 3, num_hidden_layers=1) and one.config.num_hidden_layers == 1
    assert mixkv_toy.name == "toy"


# --- the same decode ------------------------------------------------------------------------------------------------


def fails(*arguments: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        testing.assert_same_decode(*arguments, **{"prompts": PROMPTS, "max_tokens": 6, **options})
    assert type(caught.value) is AssertionError
    return str(caught.value)


def test_models_pairs_and_functions_that_make_sessions_are_sides(model: Model) -> None:
    usual = CachePolicy()
    for a in (model, (model, usual), (model, str(usual)), lambda: Session(model, usual, chunk=7)):
        for b in (model, (testing.tiny_model(num_hidden_layers=2), usual)):
            testing.assert_same_decode(a, b, prompts=PROMPTS, max_tokens=6)
    text = fails((model, usual), (model, MINE), tolerance=1e-4)  # segments are summed one by one: other last bits
    assert text.startswith("1 of 2 prompts differs") and "prompt 0: ok" in text and "policy:   window 128 -> 16" in text
    assert "prompt 1: differs 120 ids" in text
    text = fails(model, testing.tiny_model(num_hidden_layers=2, seed=1), tolerance=0.01)
    assert text.startswith("2 of 2 prompts differ from") and "21 of 21 changed" in text
    testing.assert_same_decode((model, usual), (model, MINE), prompts=PROMPTS, max_tokens=6, tolerance=9, tie=9)


def test_a_golden_file_is_a_side_and_brings_prompts_and_policy(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    recorded = golden.record(lambda: Session(model, MINE), PROMPTS, max_tokens=6)
    golden_file.write(file, golden_file.Golden(describe(model, MINE), recorded))
    testing.assert_same_decode(file, model)
    testing.assert_same_decode(model, str(file))
    testing.assert_same_decode(file, file)
    own: dict[str, Any] = {"prompts": None, "max_tokens": None, "tolerance": 1e-4}
    text = fails(file, (model, "k4v4"), **own)
    assert "k_bits 2 -> 4" in text and "prompt 0: ok" in text and "prompt 1: differs" in text
    assert text == fails((model, "k4v4"), file, **own)
    for options in ({"prompts": PROMPTS}, {"max_tokens": 3}):
        with pytest.raises(UsageError, match="no effect with a golden file"):
            testing.assert_same_decode(file, model, **options)
    other = tmp_path / "other.json"
    found = golden.record(lambda: Session(model, CachePolicy()), PROMPTS, max_tokens=6)
    golden_file.write(other, golden_file.Golden(describe(model, CachePolicy()), found))
    assert "window 16 -> 128" in fails(file, other, **own)
    golden_file.write(other, golden_file.Golden(describe(model, MINE), found[:1]))
    with pytest.raises(UsageError, match="same prompts, found 2 and 1"):
        testing.assert_same_decode(file, other)


def test_a_side_that_is_none_is_refused(model: Model) -> None:
    for side in (None, 7, (model,), (7, MINE), Session(model, MINE)):
        with pytest.raises(UsageError, match="a side must be a model"):
            testing.assert_same_decode(model, side)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="policy must be a CachePolicy or a text, found 4"):
        testing.assert_same_decode(model, (model, 4))  # type: ignore[arg-type]
    with pytest.raises(MixkvError, match="cannot be read"):
        testing.assert_same_decode(model, "none.json")
    with pytest.raises(UsageError, match="tolerance must be"):
        testing.assert_same_decode(model, model, tolerance=-1)


# --- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "p99", "p999", "max"])
def test_kl_is_what_evaluate_finds(model: Model, statistic: Any) -> None:
    ids = list(np.random.default_rng(0).integers(0, 256, 150))
    expected = evaluate(Session(model, CachePolicy.full()), Session(model, MINE), ids).kld
    value = getattr(expected, statistic)
    testing.assert_kl_below(model, MINE, value * 1.001, ids, statistic=statistic)
    with pytest.raises(AssertionError, match=f"^KL {statistic} is {value:.6g} nats, not below") as caught:
        testing.assert_kl_below(model, MINE, value, ids, statistic=statistic)
    assert f"of 150 tokens: mean {expected.mean:.6g}, p99 " in str(caught.value) and str(MINE) in str(caught.value)


def test_kl_takes_texts_first_tokens_and_references(model: Model) -> None:
    testing.assert_kl_below(model, "f32", 1e-12, "some text")
    testing.assert_kl_below(model, MINE, 1e-12, "some text of more than a window " * 9, reference=(model, MINE))
    with pytest.raises(AssertionError, match="of 40 tokens"):
        testing.assert_kl_below(model, MINE, 1e-12, "x" * 90, reference=testing.tiny_model(seed=9), tokens=40)
    with pytest.raises(AssertionError, match="of (50[0-9]|51[0-2]) tokens"):
        testing.assert_kl_below(model, MINE, 1e-12)
    for options, words in (({"statistic": "median"}, "statistic must be one of mean, p99, p999, max"),
                           ({"tokens": 1}, "tokens must be"), ({"limit": 0}, "limit must be a finite number"),
                           ({"limit": float("nan")}, "limit must be")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            testing.assert_kl_below(**{"model": model, "policy": MINE, "limit": 1, **options})


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_prompts_may_be_cut_anywhere(model: Model) -> None:
    ids = list(np.random.default_rng(1).integers(0, 256, 120))
    for policy in (MINE, CachePolicy(), "f16", "k3v3:window=0:tile=32"):
        testing.assert_chunk_invariant(model, policy, ids, [1, 31, 64, 65, 100])
    testing.assert_chunk_invariant(model, MINE, "a text " * 9, [5])


def test_logits_that_depend_on_the_cut_are_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with a fault: what is read in more than one piece is a little off from position 40 on."""
    real = sessions.Session._step

    def step(self: Session, *args: Any) -> Any:
        start, logits = self.position, real(self, *args)
        if start >= 40 and logits is not None:
            logits[0, 3] = np.nextafter(logits[0, 3], np.float32(9e9))
        return logits

    monkeypatch.setattr(sessions.Session, "_step", step)
    with pytest.raises(AssertionError) as caught:
        testing.assert_chunk_invariant(model, MINE, list(range(60)), [20, 50])
    assert "read in pieces, a prompt of 60 tokens" in str(caught.value) and "from position 50 on, at 1 of" in str(
        caught.value
    )
    with pytest.raises(AssertionError, match="read token by token, .* from position 40 on, at 20 of them"):
        testing.assert_chunk_invariant(model, MINE, list(range(60)), [20])
    testing.assert_chunk_invariant(model, MINE, list(range(60)), [20, 50], tolerance=1e-3)


def test_cuts_and_weights_that_cannot_be_compared_are_refused(model: Model) -> None:
    for cuts in ([], [0], [60], [30, 20], [20, 20], [1.5]):
        with pytest.raises(UsageError, match="cuts must be ascending positions from 1 to 59"):
            testing.assert_chunk_invariant(model, MINE, list(range(60)), cuts)
    for tolerance in (-1, float("nan"), True):
        with pytest.raises(UsageError, match="tolerance must be a finite number"):
            testing.assert_chunk_invariant(model, MINE, list(range(60)), [1], tolerance=tolerance)
    toy = mixkv.load("toy", "f32")
    with pytest.raises(UsageError, match="weights in float32 go through BLAS"):
        testing.assert_chunk_invariant(toy, "f32", "x" * 50, [7])
    testing.assert_chunk_invariant(toy, "f32", "x" * 50, [7], tolerance=1e-3)
    with pytest.raises(MixkvError, match="empty"):
        testing.assert_chunk_invariant(model, MINE, [], [1])


def test_models_without_a_tokenizer_take_ids(model: Model) -> None:
    mute = replace(model, tokenizer=None)
    testing.assert_same_decode(mute, model, prompts=[[1, 2]], max_tokens=3)
    with pytest.raises(UsageError, match="no tokenizer"):
        testing.assert_same_decode(mute, mute)
