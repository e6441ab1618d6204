"""What a session survives: NaN, infinity, keys beyond float16, Ctrl-C. It stays where the last complete step ended."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mixkv
from mixkv import CachePolicy, Session
from mixkv.engine.cache import Cache
from mixkv.models.errors import NumericalError
from mixkv.models.linear import FloatLinear
from mixkv.models.load import Model
from mixkv.models.transformer import Transformer

MIXED = CachePolicy(window=20, sinks=2, tile=32)


def ids_for(model: Model, n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)


def with_weights(model: Model, change: Callable[[Any], Any]) -> Model:
    """The same model with other weights; ``change`` gets the weights and returns new ones."""
    return replace(model, transformer=Transformer(model.config, change(model.transformer.weights)))


def with_layer(model: Model, number: int, change: Callable[[Any], Any]) -> Model:
    """The same model with one layer changed."""
    return with_weights(
        model,
        lambda weights: replace(
            weights, layers=[change(layer) if i == number else layer for i, layer in enumerate(weights.layers)]
        ),
    )


# --- fault row 23: NaN and infinity -------------------------------------------------------------------------------


def poisoned(linear: FloatLinear, row: int, value: float) -> FloatLinear:
    weight = linear.weight.copy()
    weight[row, 3] = value
    return FloatLinear(weight, linear.bias, linear.before)


@pytest.mark.fault("nan-logits")
@pytest.mark.filterwarnings("error")  # one line says it all: no RuntimeWarning of NumPy beside it
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("rows", ["all", "last", None])
def test_nan_in_the_weights_of_a_layer_names_positions_and_layer(toy: Model, number: int, rows: Any) -> None:
    broken = with_layer(
        toy, number, lambda layer: replace(layer, mlp=replace(layer.mlp, down=poisoned(layer.mlp.down, 5, np.nan)))
    )
    session = Session(broken, chunk=32)
    with pytest.raises(NumericalError) as caught:
        session.forward(ids_for(toy, 20), rows)
    assert str(caught.value) == f"positions 0 to 19: layer {number} gives NaN or infinity; are the weights damaged?"
    assert session.position == 0


@pytest.mark.fault("nan-logits")
@pytest.mark.filterwarnings("error")
def test_infinite_activations_in_the_middle_of_a_text_name_their_step(toy: Model) -> None:
    """One token's embedding is infinite: texts without it are read, and the session goes on behind a refused one."""
    embedding = toy.transformer.weights.embedding.weight.copy()
    embedding[200, 0] = np.inf
    broken = with_weights(toy, lambda weights: replace(weights, embedding=FloatLinear(embedding)))
    session, healthy = Session(broken), Session(toy)
    ids = ids_for(toy, 90) % 200
    for each in (session, healthy):
        each.forward(ids, None)
    for rows in ("all", "last", None):  # also where no logits are looked at: the cache must not keep it
        with pytest.raises(NumericalError, match=r"^positions 90 to 91: layer 0 gives NaN or infinity"):
            session.forward([3, 200], rows)
    assert session.position == 90
    assert np.array_equal(session.forward([3, 5]), healthy.forward([3, 5]))


@pytest.mark.fault("nan-logits")
@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_logits_that_are_all_infinite_or_nan_name_the_output_head(toy: Model, value: float) -> None:
    head = FloatLinear(toy.transformer.weights.head.weight, np.full(258, value, np.float32))
    session = Session(with_weights(toy, lambda weights: replace(weights, head=head)))
    with pytest.raises(NumericalError) as caught:
        session.forward([1, 2, 3], "last")
    assert str(caught.value) == "positions 0 to 2: the logits of the output head are NaN, infinite or all -inf"
    assert session.position == 0


def test_single_logits_of_minus_infinity_are_no_fault(toy: Model) -> None:
    """A head may rule tokens out."""
    bias = np.where(np.arange(258) == 65, -np.inf, 0).astype(np.float32)
    head = FloatLinear(toy.transformer.weights.head.weight, bias)
    logits = Session(with_weights(toy, lambda weights: replace(weights, head=head))).forward([1, 2], "last")
    assert logits[65] == -np.inf and np.isfinite(np.delete(logits, 65)).all()


@pytest.mark.fault("extreme-keys")
@pytest.mark.filterwarnings("error")
def test_keys_beyond_float16_are_kept_wider(toy: Model, tmp_path: Path) -> None:
    def louder(layer: Any) -> Any:
        weight = layer.qkv.weight.copy()
        weight[6 * 16 : 8 * 16] *= 3e4  # K: the rows behind the 6 query heads
        return replace(layer, qkv=FloatLinear(weight, layer.qkv.bias, layer.qkv.before))

    broken = with_layer(toy, 1, louder)
    for policy in (CachePolicy(), CachePolicy(dense="bf16"), CachePolicy(dense="f32")):
        assert np.isfinite(Session(broken, policy).forward(ids_for(toy, 200))).all()
    session = Session(broken, CachePolicy(window=0, sinks=0, k_bits=16))
    with pytest.raises(
        NumericalError, match=r"^layer 1, position 0: tile 0 cannot be quantized: .*; use a policy with"
    ):
        session.forward(ids_for(toy, 100), "last")
    assert session.position == 0


# --- fault row 27: Ctrl-C -----------------------------------------------------------------------------------------


class Interrupting:
    """Lets ``calls`` calls of a method pass and raises KeyboardInterrupt in the next one, before or after its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int, late: bool) -> None:
        original, self.raised = Cache.attend, False

        def attend(cache: Cache, *args: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls == -1 and not late:
                self.raised = True
                raise KeyboardInterrupt
            out = original(cache, *args)
            if calls == -1:
                self.raised = True
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(Cache, "attend", attend)


@pytest.mark.fault("interrupt")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("calls", range(10))
def test_an_interrupt_in_prefill_leaves_the_session_at_the_end_of_a_chunk(
    toy: Model, calls: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four chunks of three layers. What comes afterwards is, bit for bit, what it is without the interrupt."""
    ids = ids_for(toy, 150)
    expected = Session(toy, MIXED, chunk=40).forward(ids)
    session = Session(toy, MIXED, chunk=40)
    with monkeypatch.context() as patch:
        interrupting = Interrupting(patch, calls, late)
        with pytest.raises(KeyboardInterrupt):
            session.forward(ids)
        assert interrupting.raised
    assert session.position == calls // 3 * 40
    assert np.array_equal(session.forward(ids[session.position :]), expected[calls // 3 * 40 :])
    assert session.position == 150


def decode(session: Session, tokens: list[int], count: int) -> None:
    """Greedy, from a fixed prompt of 60 tokens on, until there are ``count`` tokens."""
    while len(tokens) < count:
        logits = session.forward([tokens[-1]] if tokens else ids_for(session.model, 60), "last")
        tokens.append(int(logits.argmax()))


@pytest.fixture(scope="module")
def uninterrupted(toy: Model) -> list[int]:
    tokens: list[int] = []
    decode(Session(toy, MIXED), tokens, 40)
    assert len(set(tokens)) > 5
    return tokens


@pytest.mark.fault("interrupt")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 2, 30, 31, 95])
def test_an_interrupt_in_decode_leaves_the_session_in_step(
    toy: Model, uninterrupted: list[int], calls: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy decoding goes on with the tokens that an uninterrupted run gives; tiles are sealed on the way."""
    session, tokens = Session(toy, MIXED), []
    decode(session, tokens, 1)
    with monkeypatch.context() as patch:
        interrupting = Interrupting(patch, calls, late)
        with pytest.raises(KeyboardInterrupt):
            decode(session, tokens, 40)
        assert interrupting.raised
    assert len(tokens) == 1 + calls // 3
    assert session.position == 60 + calls // 3
    decode(session, tokens, 40)
    assert tokens == uninterrupted


def test_a_refused_step_can_be_followed_by_other_tokens(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, others = ids_for(toy, 100, 1), ids_for(toy, 100, 2)
    expected = Session(toy, MIXED).forward(others)
    session = Session(toy, MIXED)
    with monkeypatch.context() as patch:
        Interrupting(patch, 2, True)
        with pytest.raises(KeyboardInterrupt):
            session.forward(ids)
    assert np.array_equal(session.forward(others), expected)


@pytest.mark.fault("nan-logits")
def test_nan_in_an_early_chunk_is_found_there_and_not_kept() -> None:
    """Only the last chunk has logits to look at; the others' hidden states are looked at too."""
    model = mixkv.load("toy")
    model.transformer.weights.embedding.weight[7] = np.nan
    session = mixkv.Session(model, mixkv.CachePolicy.full(), chunk=8)
    with pytest.raises(NumericalError, match="positions 0 to 7: layer 0"):
        session.forward([1, 2, 3, 7] + [1] * 20, "last")
    assert session.position == 0
    clean = mixkv.Session(model, mixkv.CachePolicy.full(), chunk=8)
    assert np.array_equal(session.forward([1, 2, 3]), clean.forward([1, 2, 3]))
