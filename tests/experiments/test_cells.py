"""Cells: which piece, how one is told from another, what is measured in it; on the toy model, whose tokens are bytes."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mixkv
from mixkv import CachePolicy, Override, Session, Tier, cli
from mixkv.engine.memory import plan
from mixkv.experiments import cells, rows
from mixkv.experiments.cells import Pair, key, measure
from mixkv.experiments.evaluate import REGIMES, evaluate_each
from mixkv.experiments.pieces import Piece, Setting, piece
from mixkv.models.errors import NumericalError, PromptError, UsageError
from mixkv.models.fingerprint import fingerprint
from mixkv.models.load import Model
from mixkv.models.tokenizer import ByteTokenizer, TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = (Path(mixkv.__file__).parent / "LICENSE").read_text(encoding="ascii")[:300]
IDS = list(TEXT.encode())
MIXED = CachePolicy(window=20, sinks=2, k_bits=3, v_bits=3, tile=32)
TIERS = CachePolicy(window=32, sinks=1, tile=32, older=(Tier(64, k_bits=2, v_bits=2),))
LAYERS = CachePolicy(window=0, tile=32, overrides=(Override("1", k_bits=8, v_bits=8),))
TIMES = {"prefill_tokens_per_second", "decode_tokens_per_second"}


@pytest.fixture(scope="module")
def packed() -> Model:
    """The toy model in 8 bits: the two regimes give the same bits."""
    return mixkv.load("toy", "q8")


def part_of(setting: Setting, seed: int = 0) -> Piece:
    return piece("LICENSE", IDS, setting, seed, 16_384, None)


def measured(model: Model, policy: CachePolicy = MIXED, **options: Any) -> dict[str, Any]:
    """The row of one cell; options are those of its setting."""
    setting = Setting("toy", **options)
    return measure(Pair(model, model), setting, part_of(setting), [policy])[0][0]


def same_numbers(row: dict[str, Any], *besides: str) -> dict[str, Any]:
    return {name: x for name, x in row.items() if name not in TIMES | set(besides)}


# --- pieces -------------------------------------------------------------------------------------------------------


def test_seed_0_is_the_beginning_and_may_be_shorter_than_asked_for() -> None:
    assert part_of(Setting(tokens=50)).ids.tolist() == IDS[:50]
    for tokens in (None, 300, 301, 10**9):
        found = part_of(Setting(tokens=tokens))
        assert (found.start, found.seed, found.document, found.ids.tolist()) == (0, 0, "LICENSE", IDS)


def test_another_seed_is_another_piece_anywhere_and_always_the_same() -> None:
    setting, starts = Setting(tokens=290), set()
    for seed in range(1, 200):
        found = part_of(setting, seed)
        assert found.ids.tolist() == IDS[found.start : found.start + 290] and found.ids.dtype == np.int64
        assert found.start == part_of(setting, seed).start and found.seed == seed
        starts.add(found.start)
    assert starts == set(range(11)), "the first and the last place among them"


def test_a_piece_begins_as_the_text_does() -> None:
    """With the token for the beginning of a text in the place of its first token, where the whole text has one."""
    setting, ids = Setting(tokens=20), [256, *IDS]
    for seed in range(5):
        found = piece("a", ids, setting, seed, 100, 256)
        assert found.ids.tolist() == [256, *ids[found.start + 1 : found.start + 20]]
        assert piece("a", IDS, setting, seed, 100, 256).ids[0] != 256
        plain = piece("a", ids, setting, seed, 100, None)
        assert plain.ids.tolist() == ids[plain.start : plain.start + 20]
    assert ids[0] == 256 and len(ids) == 301, "the text itself is as it was"


def test_the_digest_is_of_the_ids_alone() -> None:
    found = part_of(Setting(tokens=50))
    assert found.digest == piece("b", IDS, Setting(tokens=50), 0, 99, 256).digest
    assert len({found.digest, part_of(Setting(tokens=51)).digest, part_of(Setting(tokens=50), 1).digest}) == 3
    assert len(found.digest) == 16 and int(found.digest, 16) >= 0


@pytest.mark.parametrize(
    ("n", "options", "seed", "words"),
    [
        (120, {}, 0, "a.txt: the text has 120 tokens, the context 100: --tokens takes the first of them"),
        (
            100,
            {"continuation": 5},
            0,
            "a.txt: the text has 100 tokens, the context 100, 5 of them to be generated: --tokens takes the first of them",
        ),
        (120, {"tokens": 101}, 0, "101 tokens do not fit into the context of 100"),
        (120, {"tokens": 101}, 1, "101 tokens do not fit into the context of 100"),
        (
            120,
            {"tokens": 96, "continuation": 5},
            0,
            "96 tokens do not fit into the context of 100 with 5 to be generated",
        ),
        (40, {"tokens": 41}, 1, "a.txt: the text has 40 tokens, fewer than the 41 asked for"),
        (1, {}, 0, "at least 2 tokens are needed, of which the second is predicted, found 1"),
        (0, {"tokens": 9}, 0, "at least 2 tokens are needed, of which the second is predicted, found 0"),
    ],
)
def test_pieces_that_cannot_be_had_are_refused(n: int, options: dict[str, int], seed: int, words: str) -> None:
    with pytest.raises(PromptError) as error:
        piece("a.txt", [*range(n)], Setting(**options), seed, 100, None)
    assert str(error.value) == words


def test_the_context_holds_what_is_read_and_what_is_generated() -> None:
    for setting in (Setting(continuation=5), Setting(tokens=95, continuation=5), Setting(tokens=100)):
        n = 100 - setting.continuation
        assert len(piece("a", range(n), setting, 0, 100, None).ids) == n


def test_a_seed_for_a_whole_text_is_refused() -> None:
    with pytest.raises(UsageError, match="^--seed 3 has no effect on a whole text: --tokens says how long a piece is$"):
        part_of(Setting(), 3)
    assert part_of(Setting(tokens=300), 3).start == 0, "the only place for it"


def test_a_first_position_must_leave_a_token_to_predict() -> None:
    assert len(part_of(Setting(tokens=50, first=48)).ids) == 50
    with pytest.raises(UsageError, match="^first must be from 0 to 48, so that a token is predicted, found 49$"):
        part_of(Setting(tokens=50, first=49))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 1}, "--tokens must be 2 or more, found 1"),
        ({"first": -1}, "--first must be 0 or more, found -1"),
        ({"regime": "all"}, "--regime must be one of chunked, decode, both, found all"),
        ({"continuation": -1}, "--continue must be from 0 to 65536, found -1"),
        ({"continuation": 65_537}, "--continue must be from 0 to 65536, found 65537"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        Setting(**options)
    assert str(error.value) == words


# --- keys ---------------------------------------------------------------------------------------------------------

SETTING = Setting("toy", tokens=50)
PART = part_of(SETTING)


def a_key(
    setting: Setting = SETTING, fingerprints: tuple[str, str] = ("a", "b"), part: Piece = PART, **policy: Any
) -> str:
    return key(setting, fingerprints, part, replace(MIXED, **policy))


OTHERWISE = {
    "weights": "q8", "reference_weights": "q8", "first": 1, "regime": "decode", "shadow": True, "continuation": 1,
    "model": "other", "tokens": 49,
}  # fmt: skip


def test_a_key_is_sixteen_digits_and_always_the_same() -> None:
    assert a_key() == a_key() == key(Setting("toy", tokens=50), ("a", "b"), replace(PART), replace(MIXED))
    assert len(a_key()) == 16 and int(a_key(), 16) >= 0


@pytest.mark.parametrize("name", [f.name for f in fields(Setting)])
def test_a_key_tells_settings_apart_but_not_by_the_models_name_or_what_was_asked_for(name: str) -> None:
    """The fingerprint says which model it is, and the ids how many tokens there were."""
    changed = replace(SETTING, **{name: OTHERWISE[name]})
    assert changed != SETTING
    assert (a_key(changed) == a_key()) == (name in ("model", "tokens"))


def test_a_key_tells_everything_else_apart_that_numbers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = PART.ids.copy()
    ids[-1] += 1
    found = [
        a_key(),
        a_key(window=21),
        a_key(scales="range"),
        a_key(older=(Tier(64),)),
        a_key(overrides=(Override("0", k_bits=8),)),
        a_key(part=replace(PART, document="other")),
        a_key(part=replace(PART, seed=1)),
        a_key(part=replace(PART, ids=ids)),
        a_key(part=replace(PART, ids=PART.ids[:-1])),
        a_key(fingerprints=("a", "c")),
        a_key(fingerprints=("c", "b")),
        a_key(fingerprints=("b", "a")),
    ]
    monkeypatch.setattr(cells, "__version__", "other")
    found.append(a_key())
    monkeypatch.setattr(cells, "SCHEMA", 0)
    found.append(a_key())
    assert len(set(found)) == len(found) == 14


def test_a_key_knows_a_policy_however_it_was_written() -> None:
    assert a_key() == a_key(rollback=0, k_group=32), "by channel the group is the tile"


def test_fingerprints_are_those_of_both_models(toy: Model, packed: Model) -> None:
    one, other = (fingerprint(model.config, model.transformer.weights) for model in (toy, packed))
    assert Pair(toy, packed).fingerprints == (one, other) and one != other
    assert Pair(toy, toy).fingerprints == (one, one)


# --- measuring ----------------------------------------------------------------------------------------------------


def test_policies_measured_together_are_measured_as_if_alone(packed: Model) -> None:
    setting, policies = (
        Setting("toy", "q8", "q8", 120, regime="both", shadow=True, continuation=5),
        [MIXED, TIERS, LAYERS],
    )
    pair, part = Pair(packed, packed), part_of(setting)
    together = measure(pair, setting, part, policies)
    for policy, (row, found) in zip(policies, together, strict=True):
        ((alone, found_alone),) = measure(pair, setting, part, [policy])
        assert same_numbers(row) == same_numbers(alone)
        assert found == found_alone
    assert len({row["kld"]["mean"] for row, _ in together}) == 3


def test_sessions_are_made_on_the_models_given(toy: Model, packed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object for both sides where the formats agree: nothing is loaded, or copied, a second time."""
    used: list[list[Model]] = []

    def watched(reference: Session, candidates: Sequence[Session], *args: Any, **options: Any) -> Any:
        used.append([session.model for session in (reference, *candidates)])
        return evaluate_each(reference, candidates, *args, **options)

    monkeypatch.setattr(cells, "evaluate_each", watched)
    setting = Setting("toy", tokens=30, regime="both")
    for candidate, reference in ((packed, packed), (packed, toy)):
        measure(Pair(candidate, reference), setting, part_of(setting), [MIXED, TIERS])
    assert [[id(model) for model in models] for models in used] == [
        [id(reference), *[id(packed)] * 2] for reference in (packed, packed, toy, toy)
    ]


def test_progress_counts_the_tokens_of_all_passes(packed: Model) -> None:
    setting, done = Setting("toy", tokens=40, regime="both", shadow=True), list[tuple[int, int]]()
    measure(Pair(packed, packed), setting, part_of(setting), [MIXED, TIERS], lambda *x: done.append(x))
    assert {total for _, total in done} == {40 * (3 + 3 + 2)}
    counts = [count for count, _ in done]
    assert counts == sorted(counts) and {120, 240, 280, 320} <= set(counts) and counts[-1] == 320


def test_mass_is_what_a_ledger_says_of_a_session_read_in_one_go(packed: Model) -> None:
    for first in (0, 150):
        row = measured(packed, TIERS, first=first)
        session = Session(packed, TIERS)
        ledger = session.keep_ledger()
        assert ledger is not None
        session.forward(IDS[:-1], None)
        shares = ledger.shares()[first:]  # (T, layers, H, segments)
        assert list(row["mass"]) == ledger.names == ["sink", "old2", "old", "recent"]
        assert list(row["mass"].values()) == pytest.approx(shares.mean(axis=(0, 1, 2)).tolist(), rel=1e-9)
        assert sum(row["mass"].values()) == pytest.approx(1, rel=1e-9)
        assert min(row["mass"].values()) > 0.001, "this proves little"
        assert list(row["mass_by_layer"]) == ["names", "shares"] and row["mass_by_layer"]["names"] == ledger.names
        np.testing.assert_allclose(row["mass_by_layer"]["shares"], shares.mean(axis=(0, 2)), rtol=1e-9)


def test_local_errors_are_those_of_a_session_in_shadow_mode(packed: Model) -> None:
    found = measured(packed, LAYERS, shadow=True)["local_errors"]
    session = Session(packed, LAYERS, shadow=True)
    session.forward(IDS, None)
    assert found == {name: errors.tolist() for name, errors in session.local_errors().items()}
    assert np.shape(found["k"]) == np.shape(found["v"]) == np.shape(found["both"]) == (3, 6)
    assert np.min(found["both"][0]) > 0.01 > np.max(found["both"][1]) > 0, "the layer of 8 bits is told from the others"
    assert measured(packed, LAYERS)["local_errors"] is None


def test_bytes_and_bits_of_an_old_token_are_those_of_all_layers(packed: Model) -> None:
    """Keys: 32 bits of scale and minimum for 32 tokens, values: as many for 16 channels; 3 layers, 2 heads of 16."""
    row = measured(packed, LAYERS, tokens=40)
    expected = (4 + 1 + 4 + 2) / 2, (8 + 1 + 8 + 2) / 2
    assert row["bits_per_value"] == pytest.approx((2 * expected[0] + expected[1]) / 3)
    assert row["kv_bytes_per_old_token"] == pytest.approx(row["bits_per_value"] / 8 * 3 * 2 * 16 * 2)
    assert row["kv_bytes_per_recent_token"] == 3 * 2 * 16 * 2 * 2
    assert measured(packed, CachePolicy.parse("f16"), tokens=40)["bits_per_value"] == 16
    older = measured(packed, TIERS, tokens=40)["bits_per_value"]
    assert older == (2 + 1 + 2 + 2) / 2, "that of the oldest tier"


@pytest.mark.parametrize("policy", [MIXED, TIERS, CachePolicy(window=64, dense="f32"), CachePolicy.full()], ids=str)
@pytest.mark.parametrize(("regime", "shadow"), [("decode", False), ("both", False), ("chunked", True), ("both", True)])
def test_the_caches_that_are_planned_are_those_that_are_made(
    packed: Model, regime: str, shadow: bool, policy: CachePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes; of a session in shadow mode it is known but for the window, which is counted twice."""
    sessions, real = list[Session](), Session.__init__

    def watched(self: Session, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        sessions.append(self)

    monkeypatch.setattr(Session, "__init__", watched)
    setting = Setting("toy", regime=regime, shadow=shadow)
    measure(Pair(packed, packed), setting, part_of(setting), [policy])
    made = sum(session.nbytes()["total"] for session in sessions)
    plans = [plan(packed.config, each, len(IDS)) for each in (policy, *cells.beside(setting, policy))]
    planned = sum(each.total for each in plans)
    assert made <= planned <= made + shadow * (plans[0].recent + plans[0].sink)


# --- regimes ------------------------------------------------------------------------------------------------------


def shaken(monkeypatch: pytest.MonkeyPatch, policy: CachePolicy) -> None:
    """Sessions of a policy say something else when they are asked token by token."""
    real = Session.forward

    def forward(self: Session, token_ids: Any, logits: Any = "all", **options: Any) -> Any:
        found = real(self, token_ids, logits, **options)
        if logits == "all" and len(token_ids) == 1 and self.policy == policy:
            found = found + np.float32(1e-3) * (np.arange(found.shape[1]) == 65)
        return found

    monkeypatch.setattr(Session, "forward", forward)


def test_packed_weights_give_the_same_bits_in_both_regimes(packed: Model) -> None:
    found = []
    for regime in REGIMES:
        sessions = [Session(packed, policy) for policy in (CachePolicy.full(), MIXED, TIERS)]
        found.append(evaluate_each(sessions[0], sessions[1:], IDS, regime=regime, digest=True, mass=True))  # type: ignore[arg-type]
    for chunked, decode in zip(*found, strict=True):
        assert chunked.digests == decode.digests and None not in (chunked.digests or [None])
        assert decode.mass == pytest.approx(chunked.mass, rel=1e-6)
        assert replace(decode, mass=None, mass_by_layer=None) == replace(chunked, mass=None, mass_by_layer=None)
    assert len({digest for one in found[0] for digest in one.digests or ()}) == 3
    same = {"reference_same_bits": True, "candidate_same_bits": True, "largest_kld_difference": 0}
    assert measured(packed, regime="both")["regimes"] == same
    assert measured(packed, tokens=9)["regimes"] is None


@pytest.mark.parametrize(("whose", "policy"), [("reference", CachePolicy.full()), ("candidate", MIXED)])
def test_packed_weights_that_do_not_are_an_error(
    packed: Model, whose: str, policy: CachePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaken(monkeypatch, policy)
    with pytest.raises(NumericalError) as error:
        measured(packed, tokens=100, regime="both")
    assert str(error.value) == f"the {whose}'s logits are not the same bits read at once and token by token"
    assert measured(packed, tokens=100)["kld"] and measured(packed, tokens=100, regime="decode")["kld"], "nobody asked"


def test_float32_weights_that_do_not_are_reported(toy: Model, packed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shaken(monkeypatch, MIXED)
    found = measured(toy, tokens=100, regime="both")["regimes"]
    assert found["candidate_same_bits"] is False and 0 < found["largest_kld_difference"] < 1
    setting = Setting("toy", "f32", "q8", 100, regime="both")
    ((row, _),) = measure(Pair(toy, packed), setting, part_of(setting), [MIXED])
    assert (row["regimes"]["reference_same_bits"], row["regimes"]["candidate_same_bits"]) == (True, False)


# --- what is said behind the text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["chunked", "decode", "both"])
def test_a_continuation_is_what_generate_says_behind_the_same_text(packed: Model, regime: str) -> None:
    row = measured(packed, CachePolicy(window=0, sinks=0, tile=32, k_bits=2, v_bits=2), regime=regime, continuation=12)
    for name, policy in (
        ("reference_continuation", CachePolicy.full()),
        ("continuation", CachePolicy.parse(row["policy"])),
    ):
        tokens = [*mixkv.generate(Session(packed, policy), IDS, max_tokens=12, ignore_eos=True)]
        assert row[name]["token_ids"] == [token.id for token in tokens]
        assert row[name]["tokens"] == [token.text for token in tokens]
        assert row[name]["text"] == "".join(row[name]["tokens"]) == packed.tokenizer.decode(row[name]["token_ids"])  # type: ignore[union-attr]
    assert row["reference_continuation"] != row["continuation"], "this proves little"
    assert row["decode_depth"] == 300 and row["decode_tokens_per_second"] > 0
    assert row["prompt_tail"] == TEXT[-200:]


def test_a_continuation_of_one_token_has_no_speed_and_none_is_null(packed: Model) -> None:
    one, none = measured(packed, continuation=1), measured(packed)
    (token,) = mixkv.generate(Session(packed, MIXED), IDS, max_tokens=1)
    assert one["continuation"]["token_ids"] == [token.id] and one["decode_tokens_per_second"] is None
    names = "continuation", "reference_continuation", "decode_tokens_per_second", "decode_depth"
    assert {none[name] for name in names} == {None}


class Halves(ByteTokenizer):
    """Every token is a half of a character: of even ids the first byte of two, of odd ones the second."""

    def bytes_of(self, token: int) -> bytes:
        return b"\xc3\xa9"[token % 2 : token % 2 + 1]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return TextStream([*map(self.bytes_of, range(258))])


def test_characters_of_several_tokens_come_whole(packed: Model) -> None:
    """Also one whose first token is predicted by the text itself, and one that is never finished."""
    model, seen = replace(packed, tokenizer=Halves()), set()
    for tokens in range(30, 60):
        for n in (1, 2, 5):
            found = measured(model, tokens=tokens, continuation=n)["continuation"]
            assert found["text"] == "".join(found["tokens"]) == Halves().decode(found["token_ids"])
            assert len(found["tokens"]) == len(found["token_ids"]) == n
            seen.add(tuple(i % 2 for i in found["token_ids"]))
    assert {(0, 1), (0,), (1,)} <= seen and any(ids[-1] == 0 for ids in seen if len(ids) == 5), "this proves little"


# --- the worst, and numbers that are none -------------------------------------------------------------------------


def test_the_worst_tokens_stand_in_their_text(packed: Model) -> None:
    setting = Setting("toy", first=30)
    ((row, found),) = measure(Pair(packed, packed), setting, part_of(setting), [MIXED])
    worst, each = row["worst"], found.each
    assert len(worst) == 20 and [x["kld"] for x in worst] == sorted(each.kld, reverse=True)[:20]
    for x in worst:
        at, i = x["position"], x["position"] - 31
        assert x["kld"] == each.kld[i] and x["token_id"] == IDS[at] and x["token"] == TEXT[at]
        assert x["before"] == TEXT[max(0, at - 60) : at] and x["after"] == TEXT[at + 1 : at + 61]
        assert x["before"] + x["token"] + x["after"] in TEXT
        assert x["p"] == pytest.approx(np.exp(-each.nll[i])) and 0 < x["p"] < 1
        assert x["p_reference"] == pytest.approx(np.exp(-each.nll_reference[i])) and 0 < x["p_reference"] < 1
        assert (x["top_reference"], x["top"]) == (chr(each.top1_reference[i]), chr(each.top1[i]))
    assert len(measured(packed, tokens=12)["worst"]) == 11


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_infinite_are_null_in_json(packed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate holds one letter for impossible, from where it comes in the text."""
    real, at = Session.forward, 280

    def forward(self: Session, token_ids: Any, logits: Any = "all", **options: Any) -> Any:
        found = real(self, token_ids, logits, **options)
        if logits == "all" and self.policy == MIXED:
            found[max(0, at - 1 - self.position + len(found)) :, IDS[at]] = -np.inf
        return found

    monkeypatch.setattr(Session, "forward", forward)
    row = measured(packed, regime="both", shadow=True, continuation=3)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (
        row["ppl"] is row["ln_ppl_ratio"] is row["nll_correlation"] is row["kld"]["mean"] is row["kld"]["max"] is None
    )
    assert row["by_distance"][-1]["kld"] is None and row["worst"][0]["kld"] is None and row["kld"]["median"] < 1
    assert row["ppl_reference"] > 1 and row["histogram"]["counts"][-1] == len(IDS) - at
    assert [x["p"] for x in row["worst"] if x["position"] == at] == [0]
    assert row["regimes"]["largest_kld_difference"] == 0, "infinite in both is the same"


def names_of(row: dict[str, Any]) -> set[str]:
    """Keys, and those of what lies in them as "kld.mean", but for segments' names and the second continuation."""
    found = set(row)
    for name in set(row) - {"mass", "reference_continuation"}:
        inside = row[name][0] if isinstance(row[name], list) else row[name]
        found |= {f"{name}.{key}" for key in inside} if isinstance(inside, dict) else set()
    return found


def test_every_number_is_explained(packed: Model) -> None:
    """In docs/metrics.md, which names none that there is not."""
    text = (Path(mixkv.__file__).parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall("`([a-z0-9_.]+)`", text))
    names = names_of(measured(packed, tokens=40, regime="both", shadow=True, continuation=2))
    assert names - explained == set()
    assert {name for name in explained if name.partition(".")[0] in names and "." in name} <= names


# --- doing it again -----------------------------------------------------------------------------------------------


def run(command: str, *more: str) -> dict[str, Any]:
    """What a line for a shell prints as JSON."""
    program, *arguments = shlex.split(command)
    assert program == "mixkv"
    result = CliRunner().invoke(cli.app, [*arguments, "--json", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_command_of_a_row_measures_it_again(packed: Model, tmp_path: Path) -> None:
    path = str(tmp_path / "it's a text.txt")
    Path(path).write_text(TEXT)
    setting = Setting("toy", "q8", "bf16", tokens=120, first=30, regime="both", shadow=True, continuation=3)
    part = piece(path, IDS, setting, 7, 16_384, 256)
    ((row, _),) = measure(Pair(packed, mixkv.load("toy", "bf16")), setting, part, [TIERS])
    again = run(row["command"], "--threads", "1")
    assert same_numbers(again, "threads", "seconds") == same_numbers(json.loads(json.dumps(row)))
    assert part.start > 0 and row["kld"]["mean"] > 0


@pytest.mark.parametrize(
    ("setting", "seed", "policy"),
    [
        (Setting("toy"), 0, MIXED),
        (Setting("toy", tokens=50, first=48, regime="decode"), 3, TIERS),
        (Setting("toy", "q8", "q8", tokens=299, shadow=True), 1, LAYERS),
        (Setting("toy", "q8", "f32", continuation=9), 0, CachePolicy.full()),
        (Setting("toy", "f32", "bf16", regime="both"), 0, CachePolicy.parse("bf16")),
    ],
    ids=str,
)
@pytest.mark.parametrize("document", ["topics", "a text.txt", "-", "topics.txt", "-n", "--seed"])
def test_a_command_says_everything(
    document: str, setting: Setting, seed: int, policy: CachePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be measured comes back from the command line as it was."""
    asked: list[Any] = []
    monkeypatch.setattr(cells, "measure", lambda *args: asked.extend(args[1:4]) or [({"kld": {"mean": 0.0}}, None)])
    monkeypatch.chdir(tmp_path)
    ids = IDS
    if document == "topics":
        ids = list(mixkv.experiments.texts.default_text().encode())  # type: ignore[attr-defined]
        setting = replace(setting, tokens=setting.tokens or 100)
    elif document != "-":
        Path(document).write_text(TEXT)
    part = piece(document, ids, setting, seed, 16_384, 256)
    arguments = shlex.split(rows.command(setting, part, policy))[2:]
    result = CliRunner().invoke(cli.app, ["eval", "--json", *arguments], input=TEXT, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found, found_part, found_policies = asked
    assert found == replace(setting, tokens=len(part.ids)) and found_policies == [policy]
    assert found_part.ids.tolist() == part.ids.tolist()
    assert (found_part.document, found_part.seed, found_part.start) == (document, seed, part.start)
