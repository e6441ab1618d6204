"""Caches that ruin a model are found by measuring, and one that does not is proposed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixkv import CachePolicy, Session
from mixkv.cli import app
from mixkv.experiments import probe as module
from mixkv.experiments.evaluate import evaluate
from mixkv.experiments.probe import COMPARED, RUINOUS, Verdict, doubtful, probe
from mixkv.experiments.texts import default_text
from mixkv.models.load import Model
from mixkv.models.tiny import tiny_model

SHORT = {"window": 32, "sinks": 0, "tile": 32}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "models")
    return tmp_path


@pytest.fixture(scope="module")
def qwen_like() -> Model:
    return tiny_model("qwen2", 1, key_bias=100, attention_bias=True, head_dim=32)


def measured(model: Model, policy: CachePolicy) -> float:
    """The mean KL over the probe's tokens, by ``evaluate``."""
    tokens = policy.window + policy.sinks + policy.tile + COMPARED
    ids = [256, *default_text().encode()][:tokens]
    found = evaluate(Session(model, CachePolicy.full()), Session(model, policy), ids, first=len(ids) - COMPARED - 1)
    return found.kld.mean


def test_keys_with_huge_channels_are_ruined_by_four_bits_and_saved_by_eight(qwen_like: Model) -> None:
    policy = CachePolicy(**SHORT, k_bits=2, v_bits=4)
    assert doubtful(qwen_like.config, policy)
    verdict = probe(qwen_like, policy)
    assert verdict is not None and verdict.ruinous and verdict.kld == measured(qwen_like, policy)
    assert verdict.better is not None and verdict.better_kld is not None and verdict.better_kld < RUINOUS
    better = CachePolicy.parse(verdict.better)
    assert better.k_bits > 2 and verdict.better_kld == measured(qwen_like, better)
    sentence = verdict.sentence(policy)
    assert f"{verdict.kld:.2g} nats" in sentence and f"'{policy}'" in sentence and f"--policy '{better}'" in sentence


def test_the_same_model_without_them_is_better_off(qwen_like: Model) -> None:
    policy = CachePolicy(**SHORT, k_bits=2, v_bits=8)
    plain = tiny_model("qwen2", 1, attention_bias=True, head_dim=32)
    assert measured(qwen_like, policy) > 3 * measured(plain, policy)


def test_what_was_measured_is_kept_and_a_damaged_file_is_begun_anew(
    qwen_like: Model, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = CachePolicy(**SHORT, k_bits=3, v_bits=8)
    file = cache_folder / "probes.json"
    first = probe(qwen_like, policy)

    def first_as(better: str, better_kld: str) -> str:
        """The file, with another proposal: numbers that no probe has found."""
        key = next(iter(json.loads(whole)["verdicts"]))
        verdict = f'{{"kld": 9.0, "better": {better}, "better_kld": {better_kld}}}'
        return f'{{"version": {json.loads(whole)["version"]}, "verdicts": {{{json.dumps(key)}: {verdict}}}}}'

    whole = file.read_text()
    assert first is not None and len(json.loads(file.read_text())["verdicts"]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_each", None)  # nobody measures again
        assert probe(qwen_like, policy) == first
    for damage in (
        "{",
        '{"version": 1}',
        '{"version": 1, "verdicts": {"x": 3}}',
        "[1]",
        '{"version": 0, "verdicts": {}}',
        "[" * 100_000,
        first_as('"k8v8"', "null"),
        first_as("null", "0.1"),
        first_as("1", "0.1"),
    ):
        file.write_text(damage)
        assert probe(qwen_like, policy) == first
    assert len(json.loads(file.read_text())["verdicts"]) == 1


def test_what_is_doubtful() -> None:
    llama, qwen2, qwen3 = (tiny_model(x, attention_bias=x == "qwen2").config for x in ("llama", "qwen2", "qwen3"))
    assert not doubtful(llama, CachePolicy()) and doubtful(llama, CachePolicy(k_bits=3))
    assert doubtful(qwen2, CachePolicy()) and not doubtful(qwen2, CachePolicy(k_bits=8, v_bits=2))
    assert not doubtful(qwen3, CachePolicy()) and not doubtful(qwen2, CachePolicy(window=4096))
    assert doubtful(llama, CachePolicy.parse("layers=1[k_bits=2]")) and not doubtful(llama, CachePolicy.parse("f16"))


def test_nothing_is_measured_without_a_text_or_room() -> None:
    policy = CachePolicy(**SHORT, k_bits=2)
    assert probe(tiny_model(vocab_size=97), policy) is None
    assert probe(tiny_model(max_position_embeddings=200), policy) is None


def test_where_no_codes_do_there_is_float16() -> None:
    assert "use --policy f16" in Verdict(3.0, None, None).sentence(CachePolicy(k_bits=2))


@pytest.mark.parametrize("options", [(), ("-q",), ("-q", "--json")])
def test_generate_warns_also_when_it_is_to_be_quiet(
    qwen_like: Model, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr("mixkv.models.load.load", lambda *_, **__: qwen_like)
    policy = CachePolicy(**SHORT, k_bits=2, v_bits=4)
    done = CliRunner().invoke(app, ["generate", "Some words", "-n", "1", "--policy", str(policy), *options])
    assert done.exit_code == 0, done.output
    (warning,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert f"this cache, '{policy}', ruins this model" in warning and "; with --policy '" in warning
    if "--json" in options:
        assert warning == "mixkv: warning: " + json.loads(done.stdout)["stats"]["warning"]
