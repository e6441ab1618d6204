"""Sessions: what forward returns, that chunks do not matter, what is refused, and how it survives faults."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv
import mixkv.engine.cache
from mixkv import CachePolicy, Session, Tier
from mixkv.engine.cache import Cache
from mixkv.engine.memory import plan
from mixkv.kernels.tables import FIRST_QUERY
from mixkv.models.errors import PromptError, UsageError
from mixkv.models.load import Model
from mixkv.models.transformer import Step

TINY_LLAMA = Path(__file__).parents[1] / "data" / "tiny_llama"
MIXED = CachePolicy(window=20, sinks=2, tile=32)
# Float32 products with one row and with many round differently: 2e-6 of logits that reach 10, through a few layers.
TOLERANCE = 2e-4


@pytest.fixture(scope="session")
def tiny_llama() -> Model:
    return mixkv.load(str(TINY_LLAMA))


@pytest.fixture(params=["toy", "tiny_llama"])
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


def ids_for(model: Model, n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)


# --- what forward returns -----------------------------------------------------------------------------------------


def test_all_last_and_none_agree(model: Model) -> None:
    ids = ids_for(model, 50)
    vocab = model.config.vocab_size
    sessions = [Session(model, MIXED, chunk=16) for _ in range(3)]
    every, last, none = (s.forward(ids, rows) for s, rows in zip(sessions, ("all", "last", None), strict=True))
    assert none is None and every is not None and last is not None
    assert every.shape == (50, vocab) and every.dtype == np.float32
    assert last.shape == (vocab,) and last.dtype == np.float32
    np.testing.assert_allclose(last, every[-1], rtol=0, atol=TOLERANCE)
    assert [s.position for s in sessions] == [50, 50, 50]
    following = [s.forward([7], "last") for s in sessions]
    for other in following[1:]:
        np.testing.assert_allclose(other, following[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("logits", ["last", None])
def test_rows_whose_logits_are_not_wanted_are_spared_the_end_of_the_last_layer(logits: Any) -> None:
    """The kernels are asked for one query there; what is kept, and what is made of it, is the same to the bit."""
    model = mixkv.load("toy", weights="q8")
    ids = ids_for(model, 150)
    sessions = [Session(model, MIXED, chunk=64) for _ in range(2)]
    every, few = (s.forward(ids, rows) for s, rows in zip(sessions, ("all", logits), strict=True))
    assert [int(s.cache.layers[-1]._call[FIRST_QUERY]) for s in sessions] == [0, 150 - 128 - 1]
    assert few is None or few.tobytes() == every[-1].tobytes()
    for of_all, of_few in zip(*(s.cache.layers for s in sessions), strict=True):
        for x, y in zip(of_all.values(0, 150), of_few.values(0, 150), strict=True):
            assert x.tobytes() == y.tobytes()
    assert sessions[0].forward([7]).tobytes() == sessions[1].forward([7]).tobytes()


@pytest.mark.parametrize(("weights", "shadow"), [("q8", False), ("q8", True), ("f32", False)])
def test_a_ledger_and_local_errors_count_all_rows_of_the_last_layer(weights: str, shadow: bool) -> None:
    model = mixkv.load("toy", weights=weights)
    ids, found = ids_for(model, 150), []
    for logits in ("all", "last"):
        session = Session(model, MIXED, chunk=64, shadow=shadow)
        ledger = session.keep_ledger()
        session.forward(ids, logits)
        found.append((ledger.shares(), session.local_errors()["both"] if shadow else 0))
    for every, few in zip(*found, strict=True):
        np.testing.assert_array_equal(few, every)


@pytest.mark.parametrize("count", [130, 150, 192])
def test_memory_kept_from_chunk_to_chunk_is_counted_and_gone_in_the_end(count: int) -> None:
    """Also where the last chunk is so short that nothing enters or leaves a tier."""
    model = mixkv.load("toy", weights="q8")
    ids, counted = ids_for(model, count), []
    whole, short, single = (Session(model, MIXED, chunk=chunk) for chunk in (64, 64, 1))
    whole.forward(ids, "last", progress=lambda _: counted.append(whole.nbytes()["recent"]))
    short.forward(ids[:128], None)
    single.forward(ids, "last")
    assert whole.nbytes() == single.nbytes()
    assert counted[1] > short.nbytes()["recent"]


def test_a_step_that_seals_a_tile_keeps_its_memory_for_the_next_token() -> None:
    """Where the next one begins a tile. It is counted, and goes with whatever else comes instead of that token."""
    model = mixkv.load("toy", weights="q8")
    policy = replace(MIXED, window=MIXED.tile)
    tile, ids = policy.tile, ids_for(model, 200)
    session = Session(model, policy)
    session.forward(ids[: 3 * tile - 1], None)
    one, layers = session.cache.layers[0].recent.layout.nbytes, len(session.cache.layers)

    def more() -> int:
        return session.nbytes()["total"] - plan(model.config, policy, session.position).total

    extra = []
    for token in ids[3 * tile - 1 : 4 * tile + 1]:
        session.forward([token], None)
        extra.append(more())
    # In all layers but the first the tile goes one token earlier: it has entered the tier before it must
    assert extra == [one, *[0] * (tile - 2), (layers - 1) * one, layers * one, 0]
    session.truncate(4 * tile)
    assert more() == 0


def test_memory_kept_for_tokens_that_do_not_come_goes_with_the_next_ones() -> None:
    """A prompt is interrupted between two chunks, or the context is full."""
    model = mixkv.load("toy", weights="q8")
    policy, ids = replace(MIXED, window=MIXED.tile), ids_for(model, 200)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    for rest in (ids[128:130], ids[128:135], ids[128:200]):
        session = Session(model, policy, chunk=128)
        with pytest.raises(KeyboardInterrupt):
            session.forward(ids, None, progress=interrupt)
        assert session.position == 128
        session.forward(rest, None)
        assert session.nbytes() == plan(model.config, policy, session.position).nbytes()
    session = Session(model, policy, context=3 * policy.tile)
    for token in ids[: session.context]:
        session.forward([token], None)
    assert session.nbytes() == plan(model.config, policy, session.position, context=session.context).nbytes()


def test_retier_takes_what_is_still_dense_from_there_and_not_from_codes_made_early() -> None:
    model = mixkv.load("toy", weights="q8")
    policy = CachePolicy(window=64, sinks=0, tile=32, k_bits=2, v_bits=2, scales="range")
    ids = ids_for(model, 90)
    session, fresh = Session(model, policy), Session(model, replace(policy, scales="fit"))
    session.forward(ids, None)
    fresh.forward(ids, None)
    assert [layer.recent.first for layer in session.cache.layers] == [0] * 3, "something is dense no longer"
    session.retier(fresh.policy)
    assert [layer.old.stop for layer in session.cache.layers] == [layer.old.stop for layer in fresh.cache.layers]
    for token in ids_for(model, 60):
        assert session.forward([token]).tobytes() == fresh.forward([token]).tobytes()


def test_retier_takes_what_a_dense_tier_holds_from_there_and_not_from_codes_made_early() -> None:
    model = mixkv.load("toy", weights="q8")
    wanted = CachePolicy(window=64, sinks=0, tile=32, k_bits=2, v_bits=2, scales="fit")
    tiered = replace(wanted, window=0, k_bits=16, v_bits=16, older=(Tier(64, 2, 2),), scales="range")
    ids = ids_for(model, 90)
    session, fresh = Session(model, tiered), Session(model, wanted)
    session.forward(ids, None)
    fresh.forward(ids, None)
    both = [dense.first == 0 < codes.stop for dense, codes in (layer.tiers for layer in session.cache.layers)]
    assert any(both), "no tile is in both tiers"
    assert not any(layer.recent.first == 0 for layer in session.cache.layers)
    session.retier(wanted)
    assert [layer.old.stop for layer in session.cache.layers] == [layer.old.stop for layer in fresh.cache.layers]
    for token in ids_for(model, 60):
        assert session.forward([token]).tobytes() == fresh.forward([token]).tobytes()


@pytest.mark.parametrize(
    "policy", [MIXED, replace(MIXED, window=96, older=(Tier(130, 2, 2),)), replace(MIXED, window=0)]
)
def test_layers_seal_at_different_steps_which_changes_no_bit(
    policy: CachePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step has a tile to quantize in more than one layer, unless the window leaves no time before it must."""
    model = mixkv.load("toy", weights="q8")
    ids = ids_for(model, 200)
    session, most = Session(model, policy), 0
    found = [session.forward(ids[:50])]
    for token in ids[50:]:
        before = [[tier.stop for tier in layer.tiers] for layer in session.cache.layers]
        found.append(session.forward([token]))
        after = [[tier.stop for tier in layer.tiers] for layer in session.cache.layers]
        most = max(most, sum(x != y for x, y in zip(before, after, strict=True)))
    layers = session.cache.layers
    assert [layer.lead for layer in layers] == [0, policy.tile // 4, policy.tile * 5 // 8]
    assert most == (1 if policy.window else len(layers))
    monkeypatch.setattr(mixkv.engine.cache, "lead_of", lambda *_: 0)
    at_once = Session(model, policy)
    assert (
        np.concatenate(found).tobytes()
        == np.concatenate([at_once.forward(ids[:50]), *map(at_once.forward, ids[50:, None])]).tobytes()
    )
    counts = [[layer.tiles_quantized for layer in x.cache.layers] for x in (at_once, session)]
    assert all(late <= early for late, early in zip(*counts, strict=True)) and min(counts[0]) > 0


def test_all_is_the_default_and_any_integers_are_taken(toy: Model) -> None:
    expected = Session(toy).forward(np.array([1, 2, 3]))
    assert expected is not None and expected.shape == (3, 258)
    for ids in ([1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3], np.uint8)):
        assert np.array_equal(Session(toy).forward(ids), expected)


def test_progress_counts_the_tokens_done(toy: Model) -> None:
    done: list[int] = []
    Session(toy, chunk=16).forward(ids_for(toy, 50), None, progress=done.append)
    assert done == [16, 32, 48, 50]


@pytest.mark.parametrize("size", [1, 7, 64, 512])
def test_chunks_change_logits_by_rounding_only(model: Model, size: int) -> None:
    ids = ids_for(model, 300)
    expected = Session(model, CachePolicy.full(), chunk=300).forward(ids)
    found = Session(model, CachePolicy.full(), chunk=size).forward(ids)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(expected).max() > 5 and expected.std() > 0.5, "logits so small prove nothing"


def test_calls_change_logits_by_rounding_only(model: Model) -> None:
    """Not the session cuts here, but its user."""
    ids = ids_for(model, 120)
    expected = Session(model, CachePolicy.full()).forward(ids)
    session = Session(model, CachePolicy.full())
    parts = [session.forward(part) for part in np.split(ids, [1, 2, 40, 119])]
    assert np.abs(np.concatenate(parts) - expected).max() <= TOLERANCE


def test_the_policy_reaches_the_cache(model: Model) -> None:
    ids = ids_for(model, 200)
    exact = Session(model, CachePolicy.full()).forward(ids)
    errors = {}
    for bits in (4, 8):
        session = Session(model, CachePolicy(window=20, sinks=2, k_bits=bits, v_bits=bits, dense="f32"))
        errors[bits] = np.abs(session.forward(ids) - exact)[64 + 20 :].mean()
        assert session.policy.k_bits == bits and session.nbytes() == session.cache.nbytes()
    assert 1e-5 < errors[8] < errors[4] / 4
    assert Session(model).policy == CachePolicy()


def test_no_more_sinks_are_held_than_the_context_has_tokens(toy: Model) -> None:
    """And what a query sees is the same: everything, densely."""
    ids = ids_for(toy, 50)
    session = Session(toy, CachePolicy(window=0, sinks=60_000, tile=32), context=50)
    assert session.nbytes()["sink"] == 3 * 50 * 2 * 2 * 16 * 2
    expected = Session(toy, CachePolicy(window=10_000, sinks=0)).forward(ids)
    np.testing.assert_allclose(session.forward(ids), expected, rtol=0, atol=TOLERANCE)


# --- several sequences in one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["all", "last"])
def test_two_sequences_in_one_step_give_the_same_as_each_alone(model: Model, logits: Any) -> None:
    """One has 70 tokens behind it and brings 3, the other none and brings 40: nothing of one reaches the other."""
    config, policy = model.config, MIXED

    def new_cache() -> Cache:
        return Cache(policy, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def run(*parts: tuple[Cache, NDArray[np.int64], int]) -> NDArray[np.float32]:
        ends = np.cumsum([len(ids) for _, ids, _ in parts]).tolist()
        spans: Any = [(cache, end - len(ids), end) for (cache, ids, _), end in zip(parts, ends, strict=True)]
        positions = np.concatenate([np.arange(at, at + len(ids)) for _, ids, at in parts])
        out = model.transformer.forward(Step(np.concatenate([ids for _, ids, _ in parts]), positions, spans), logits)
        assert out is not None
        return out

    def after(past: NDArray[np.int64]) -> Cache:
        cache = new_cache()
        run((cache, past, 0))
        cache.commit(70)
        return cache

    first, second, past = ids_for(model, 3, 1), ids_for(model, 40, 2), ids_for(model, 70, 3)
    rows = 3 if logits == "all" else 1
    together = run((after(past), first, 70), (new_cache(), second, 0))
    assert together.shape == ((43 if logits == "all" else 2), config.vocab_size)
    # Beside another sequence as long, not a bit changes.
    other = run((after(past), first, 70), (new_cache(), ids_for(model, 40, 4), 0))
    np.testing.assert_array_equal(other[:rows], together[:rows])
    assert (other[rows:] != together[rows:]).any()
    other = run((after(ids_for(model, 70, 5)), ids_for(model, 3, 6), 70), (new_cache(), second, 0))
    np.testing.assert_array_equal(other[rows:], together[rows:])
    assert (other[:rows] != together[:rows]).any()
    # Alone, the products of the weights round differently, and whatever rounds after them would turn that into a whole
    # step here and there: so nothing does.
    policy = replace(MIXED, window=128, dense="f32")
    together = run((after(past), first, 70), (new_cache(), second, 0))
    alone = np.concatenate([run((after(past), first, 70)), run((new_cache(), second, 0))])
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)
    # With weights of 8 bits nothing rounds differently, whatever the cache.
    model, policy = mixkv.load("toy" if model.name == "toy" else str(TINY_LLAMA), weights="q8"), MIXED
    together = run((after(past), first, 70), (new_cache(), second, 0))
    alone = np.concatenate([run((after(past), first, 70)), run((new_cache(), second, 0))])
    np.testing.assert_array_equal(together, alone)


# --- refusals -----------------------------------------------------------------------------------------------------


def check_untouched(session: Session, before: int) -> None:
    """After a refusal: the position has not moved, and the session works."""
    assert session.position == before
    assert session.forward([1], "last") is not None
    assert session.position == before + 1


@pytest.mark.parametrize("ids", [[], (), np.array([], np.int64)], ids=repr)
def test_an_empty_prompt_is_refused(toy: Model, ids: Any) -> None:
    session = Session(toy)
    with pytest.raises(PromptError, match=r"^the prompt is empty: at least one token is needed$"):
        session.forward(ids)
    check_untouched(session, 0)


@pytest.mark.parametrize("bad", [-1, 258, 10**12, -(2**63)])
def test_ids_outside_of_the_vocabulary_are_refused_by_value_and_range(toy: Model, bad: int) -> None:
    session = Session(toy)
    session.forward([1, 2])
    with pytest.raises(PromptError) as caught:
        session.forward([0, 257, bad, 3])
    assert str(caught.value) == f"token id {bad} is outside of the vocabulary, 0 to 257"
    check_untouched(session, 2)


@pytest.mark.parametrize("ids", [[1.0], [True], ["a"], [[1, 2]], 5, None, "text", [10**30]], ids=repr)
def test_what_is_no_flat_sequence_of_integers_is_refused(toy: Model, ids: Any) -> None:
    session = Session(toy)
    with pytest.raises(PromptError, match="flat sequence of integers"):
        session.forward(ids)
    check_untouched(session, 0)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(toy: Model) -> None:
    session = Session(toy, context=100)
    with pytest.raises(PromptError) as caught:
        session.forward(range(101))
    assert str(caught.value) == "101 tokens do not fit into the context of 100"
    session.forward(range(60), None)
    with pytest.raises(PromptError) as caught:
        session.forward(range(41))
    assert str(caught.value) == "41 tokens do not fit: 60 of the context's 100 are in use"
    session.forward(range(39), None)
    check_untouched(session, 99)
    with pytest.raises(PromptError, match="1 tokens do not fit: 100 of"):
        session.forward([1])
    assert session.position == 100


def test_the_context_is_the_models_unless_given(tiny_llama: Model) -> None:
    session = Session(tiny_llama)
    assert session.context == 512
    with pytest.raises(PromptError, match="513 tokens do not fit into the context of 512"):
        session.forward(np.zeros(513, np.int64))
    session.forward(np.zeros(512, np.int64), None)
    assert session.position == 512


@pytest.mark.parametrize("logits", ["first", "ALL", "", 0, False, True, ["all"]], ids=repr)
def test_another_word_for_logits_is_refused(toy: Model, logits: Any) -> None:
    session = Session(toy)
    with pytest.raises(UsageError, match=r"logits must be 'all', 'last' or None, found "):
        session.forward([1], logits)
    check_untouched(session, 0)


@pytest.mark.parametrize("context", [0, -1, 16_385, 10**9])
def test_a_context_out_of_range_is_refused(toy: Model, context: int) -> None:
    with pytest.raises(UsageError, match=rf"^context must be from 1 to 16384 .*found {context}$"):
        Session(toy, context=context)


@pytest.mark.parametrize("chunk", [0, -5])
def test_a_chunk_out_of_range_is_refused(toy: Model, chunk: int) -> None:
    with pytest.raises(UsageError, match=rf"^chunk must be .*found {chunk}$"):
        Session(toy, chunk=chunk)


@pytest.mark.parametrize("value", [1.5, 10.0, float("nan"), "10", True], ids=repr)
@pytest.mark.parametrize("name", ["context", "chunk"])
def test_a_context_or_chunk_that_is_no_whole_number_is_refused(toy: Model, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be .*found {value!r}$"):
        Session(toy, **{name: value})  # type: ignore[arg-type]


def test_retier_to_fewer_sinks_does_not_take_the_codes_that_they_never_had(toy: Model) -> None:
    """Sinks widen no range in their tile: what stands there in their place is worth nothing."""
    ids = np.random.default_rng(4).integers(0, 256, 300)
    policy = CachePolicy(sinks=4, window=20)
    session = Session(toy, policy)
    session.forward(ids, None)
    exact = [layer.values(0, 4)[:2] for layer in session.cache.layers]
    found = session.retier(replace(policy, sinks=0))
    assert found["requantized"] == 60, "all of tile 0 but the sinks"
    for layer, (k, v) in zip(session.cache.layers, exact, strict=True):
        own_k, own_v, coded = layer.values(0, 4)
        assert coded.all()
        assert np.abs(own_k - k).max() < 0.2 * np.abs(k).max() and np.abs(own_v - v).max() < 0.2 * np.abs(v).max()
    again = session.fork().retier(replace(policy, sinks=0, older=(Tier(200, k_bits=2, v_bits=2),)))
    assert again["requantized"] == 64, "what stays in a tier of the same format is copied, whatever its pages"


def test_retier_copies_what_lies_in_a_tier_of_16_bits_behind_one_of_codes(toy: Model) -> None:
    """It is the most exact that is held of it, but nothing that codes are to be made of once more."""
    policy = CachePolicy(window=20, sinks=0, k_bits=2, v_bits=2, older=(Tier(100, k_bits=16, v_bits=16),))
    session = Session(toy, policy)
    session.forward(ids_for(toy, 300), None)
    twin = session.fork()
    session.retier(policy)
    for token in ids_for(toy, 40, seed=1):
        assert session.forward([token]).tobytes() == twin.forward([token]).tobytes()
