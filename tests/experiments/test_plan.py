"""``mixkv plan``: the knapsack against every choice there is, sensitivities against whole runs, and the command."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mixkv
from mixkv.cli import app
from mixkv.engine.policy import CachePolicy, Override
from mixkv.engine.session import Session
from mixkv.experiments.divergence import compare
from mixkv.experiments.plan import BITS, Option, Reference, exact, find, measure, parse_budget, policy_of, solve
from mixkv.models.errors import PromptError, UsageError

POLICY = CachePolicy(window=20, sinks=2, tile=32)


@pytest.fixture(scope="module")
def model() -> Any:
    return mixkv.load("toy")


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n)


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6KB/token", 6000), ("6 kb / token", 6000), ("5760", 5760), ("5760B", 5760), ("1.5KiB/token", 1536),
        ("2MB", 2e6), ("4bits", 96), ("4.5 bits", 108), ("0.25MiB/token", 1 << 18),
    ],
)  # fmt: skip
def test_a_budget_is_bytes_or_bits_of_each_value(text: str, nbytes: float) -> None:
    assert parse_budget(text, 192) == nbytes


@pytest.mark.parametrize("text", ["", "KB", "-1KB", "6KB/s", "6 apples", "1e9", "nan", "6KB/token/layer", "9" * 13])
def test_what_is_no_budget_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="--budget must be like") as caught:
        parse_budget(text, 192)
    assert "\n" not in str(caught.value)


# --- the knapsack -----------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1, width=32)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 60),
)
def test_the_choice_is_the_best_of_all_within_the_budget(groups: list[list[tuple[int, float]]], budget: int) -> None:
    options = [
        Option(layer, "k", bits, kld, nbytes / 2)
        for layer, own in enumerate(groups)
        for bits, (nbytes, kld) in enumerate(own)
    ]
    every = [
        (sum(kld for _, kld in choice), sum(nbytes for nbytes, _ in choice) / 2)
        for choice in itertools.product(*groups)
    ]
    within = [kld for kld, nbytes in every if nbytes <= budget]
    if not within:
        with pytest.raises(UsageError, match="--budget must be at least"):
            solve(options, budget)
        return
    chosen = solve(options, budget)
    assert [option.layer for option in chosen] == list(range(len(groups)))
    assert all(option in options for option in chosen)
    assert sum(option.nbytes for option in chosen) <= budget
    assert sum(option.kld for option in chosen) == pytest.approx(min(within), abs=1e-12)


def test_a_choice_becomes_a_policy_that_says_the_same_of_every_layer() -> None:
    rng = np.random.default_rng(1)
    bits = {(layer, side): int(rng.choice(BITS)) for layer in range(9) for side in "kv"}
    chosen = [Option(layer, side, b, 0.5, 10 * b) for (layer, side), b in bits.items()]
    planned = policy_of(chosen, CachePolicy(window=7, rotate_v=False))
    assert planned.nbytes == 10 * sum(bits.values()) and planned.predicted == 9
    assert planned.policy.window == 7 and not planned.policy.rotate_v
    for layer in range(9):
        own = planned.policy.for_layer(layer, 9)
        assert (own.k_bits, own.v_bits) == (bits[layer, "k"], bits[layer, "v"])
    assert CachePolicy.from_toml(planned.policy.to_toml()) == planned.policy


def test_a_deep_model_with_two_formats_in_turn_is_said_in_ranges_and_several_overrides() -> None:
    for pattern in ([i % 2 for i in range(200)], [i // 3 % 2 for i in range(200)], [int(i < 150) for i in range(200)]):
        chosen = [Option(i, side, (2, 8)[bit], 0.0, 1) for i, bit in enumerate(pattern) for side in "kv"]
        policy = policy_of(chosen, CachePolicy()).policy
        assert [policy.for_layer(i, 200).k_bits for i in range(200)] == [(2, 8)[bit] for bit in pattern]
        policy.check_model(200, 64)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_divergence_is_that_of_whole_sessions(model: Any) -> None:
    ids, first = tokens(200), 60
    reference = Reference(model, ids, first)
    full = Session(model, CachePolicy.full()).forward(ids, "all")
    for policy, layer in ((POLICY, 0), (CachePolicy.full(), 0), (exact(POLICY), 2)):
        found = Session(model, policy).forward(ids, "all")
        assert full is not None and found is not None
        want = compare(full[first:], found[first:], np.zeros(len(ids) - first, np.int64)).kld.mean()
        assert reference.divergence(policy, layer) == pytest.approx(want, rel=1e-3, abs=1e-7)
    assert reference.divergence(POLICY) > 1e-4


def test_a_layer_is_measured_from_where_it_begins(model: Any) -> None:
    """Codes in one layer only: the same from its own beginning as from the first layer's."""
    reference = Reference(model, tokens(200), 60)
    for layer in range(3):
        policy = CachePolicy(
            window=20, sinks=2, tile=32, k_bits=32, v_bits=32, dense="f32", overrides=(Override(str(layer), v_bits=2),)
        )
        found = [reference.divergence(policy, begin) for begin in range(layer + 1)]
        assert found[0] > 1e-5 and found == pytest.approx([found[0]] * len(found), rel=1e-3)
        if layer < 2:  # and not, from behind it: then nothing is coded
            assert reference.divergence(policy, layer + 1) < found[0] / 100


def test_every_layer_side_and_number_of_bits_has_a_cost_and_a_price(model: Any) -> None:
    ticks: list[tuple[int, int]] = []
    options = measure(Reference(model, tokens(200), 60), POLICY, lambda done, total: ticks.append((done, total)))
    assert [(o.layer, o.side, o.bits) for o in options] == [(i, s, b) for i in range(3) for s in "kv" for b in BITS]
    assert ticks[-1][0] == ticks[-1][1] and [done for done, _ in ticks] == sorted(done for done, _ in ticks)
    layout_of = {
        bits: CachePolicy(k_bits=bits, v_bits=bits, window=20, tile=32).tier_layouts(2, 16)[0] for bits in BITS
    }
    heads = model.config.num_key_value_heads
    for option in options:
        side = getattr(layout_of[option.bits], option.side)
        assert option.nbytes == heads * (side.codes_nbytes + side.params_nbytes) / 32
    for layer in range(3):
        for side in "kv":
            own = [o for o in options if (o.layer, o.side) == (layer, side)]
            klds = [o.kld for o in own]
            assert klds == sorted(klds, reverse=True) and klds[0] > 0
            assert klds[2] == pytest.approx(klds[1] * (7 / 15) ** 2) and klds[3] == pytest.approx(
                klds[1] * (7 / 255) ** 2
            )


def test_what_is_found_keeps_to_the_budget_and_beats_the_same_bits_everywhere(model: Any) -> None:
    ids = tokens(400)
    values = 2 * 3 * model.config.num_key_value_heads * model.config.head_dim
    uniform = sum(POLICY.nbytes_per_token(model.config.num_key_value_heads, 16)[0]) * 3
    planned = find(model, ids, POLICY, uniform, n_tokens=200)
    assert planned.nbytes <= uniform and planned.unseen is not None
    reference = Reference(model, ids[:200], 52)
    assert planned.measured == pytest.approx(reference.divergence(planned.policy))
    assert planned.measured <= reference.divergence(POLICY) * 1.02
    assert planned.to_dict()["policy"] == str(planned.policy)
    assert 8 * planned.nbytes / values > 3
    assert find(model, ids[:230], POLICY, uniform, n_tokens=200).unseen is None


def test_a_text_too_short_or_a_budget_too_small_is_refused_before_anything_is_measured(model: Any) -> None:
    with pytest.raises(PromptError, match="more than 52 tokens, found 50"):
        find(model, tokens(50), POLICY, 1e6)
    for n in (52, 0, -5, True, 60.0):
        with pytest.raises(UsageError, match="--tokens must be above 52"):
            find(model, tokens(200), POLICY, 1e6, n_tokens=n)
    for policy in (CachePolicy.parse("tiny"), CachePolicy(overrides=(Override("0", k_bits=8),))):
        with pytest.raises(UsageError, match="one tier and no overrides"):
            find(model, tokens(200), policy, 1e6)
    ticks: list[int] = []
    with pytest.raises(UsageError, match="--budget must be at least"):
        find(model, tokens(200), POLICY, 1, progress=lambda *_: ticks.append(1))
    assert not ticks


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_policy_that_others_take(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    run = CliRunner().invoke
    base = ["plan", "toy", "--text", str(text), "-n", "300", "--window", "20", "--tile", "32", "-q"]
    written = run(app, [*base, "--budget", "7bits", "-o", str(tmp_path / "mine.toml")])
    assert written.exit_code == 0, written.output
    policy = CachePolicy.load(tmp_path / "mine.toml")
    assert policy.window == 20 and written.stdout == "" and "KL" in written.stderr
    printed = run(app, [*base, "--budget", "7bits"])
    assert printed.exit_code == 0 and CachePolicy.from_toml(printed.stdout) == policy
    described = run(app, [*base, "--budget", "7bits", "--json"])
    found = json.loads(described.stdout)
    assert found["policy"] == str(policy) and found["nbytes"] <= found["budget_bytes"]
    assert found["policy_toml"] == policy.to_toml()
    assert run(app, ["eval", str(text), "-m", "toy", "--policy", str(tmp_path / "mine.toml")]).exit_code == 0
    refused = run(app, [*base, "--budget", "many"])
    assert refused.exit_code == 2 and "--budget must be like" in refused.stderr
    missing = run(app, [*base, "--budget", "7bits", "-o", str(tmp_path / "none" / "mine.toml")])
    assert missing.exit_code == 2 and "there is no folder" in missing.stderr
    folder = run(app, [*base, "--budget", "7bits", "-o", str(tmp_path)])
    assert folder.exit_code == 2 and "is a folder" in folder.stderr
    before = text.read_text()
    itself = run(app, [*base, "--budget", "7bits", "-o", str(text)])
    assert itself.exit_code == 2 and "is also read" in itself.stderr and text.read_text() == before


def test_what_was_measured_is_not_lost_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    monkeypatch.setattr("mixkv.models.hub.files.write_whole", full)
    base = [
        "plan",
        "toy",
        "--text",
        str(text),
        "-n",
        "300",
        "--window",
        "20",
        "--tile",
        "32",
        "-q",
        "--budget",
        "7bits",
    ]
    found = CliRunner().invoke(app, [*base, "-o", str(tmp_path / "mine.toml")])
    assert found.exit_code == 2 and "cannot be written: No space left on device; the policy is on" in found.stderr
    assert CachePolicy.from_toml(found.stdout).window == 20


def test_more_refusals_of_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    run = CliRunner().invoke
    base = ["plan", "toy", "--text", str(text), "-n", "300", "--window", "20", "--tile", "32", "-q"]
    bits = run(app, [*base, "--budget", "7bits", "--k-bits", "8"])
    assert bits.exit_code == 2 and "--k-bits has no effect" in bits.stderr
