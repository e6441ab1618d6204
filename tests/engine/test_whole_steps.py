"""A few rows go through all layers in one call of the kernels: bit for bit as layer by layer, and whatever does not fit."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import mixkv.models.transformer
from mixkv import CachePolicy, Session
from mixkv.engine.cache import Cache
from mixkv.engine.layer import LayerCache
from mixkv.models.config import ModelConfig
from mixkv.models.errors import NumericalError
from mixkv.models.load import Model, read_weights
from mixkv.models.names import expected_tensors
from mixkv.models.toy import ToySource
from mixkv.models.transformer import Transformer

CONFIG = ModelConfig(
    architecture="llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=3, num_key_value_heads=1, head_dim=32, max_position_embeddings=1000,
)  # fmt: skip
IDS = np.random.default_rng(1).integers(0, 64, 400)
CUTS = [0, 5, 6, 7, 20, 36, 100, 116, 117, *range(118, 170), 186, 200, 330, *range(331, 400)]


class Scaled(ToySource):
    """The toy's weights, some of them times a factor."""

    factors: dict[str, float]

    def read(self, name: str, *args: Any) -> Any:
        found = super().read(name, *args)
        return found * np.float32(next((x for part, x in self.factors.items() if part in name), 1))


def model_of(config: ModelConfig = CONFIG, factors: dict[str, float] | None = None) -> Model:
    source = Scaled(expected_tensors(config))
    source.factors = factors or {}
    return Model("small", config, Transformer(config, read_weights(config, source, "q8")), None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many links each call of all layers did, call after call."""
    found, run_chain = [], mixkv.models.transformer.run_chain

    def counted(*args: Any) -> int:
        found.append(run_chain(*args))
        return found[-1]

    monkeypatch.setattr(mixkv.models.transformer, "run_chain", counted)
    yield found


def none(*_: object) -> None:
    """What ``Cache.attentions`` says where the kernels cannot do all layers: then they go one by one."""


def fed(model: Model, policy: CachePolicy, cuts: list[int] = CUTS) -> tuple[np.ndarray, dict[str, int], list[int]]:
    """Logits of all tokens, fed from cut to cut, what the cache takes, and how often tiles were quantized."""
    session = Session(model, policy)
    logits = [session.forward(IDS[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return np.concatenate(logits), session.nbytes(), [layer.tiles_quantized for layer in session.cache.layers]


@pytest.mark.parametrize(
    "text",
    [
        "k4v4:window=40:tile=32",
        "k2v3:window=0:sinks=0:tile=32",
        "sinks=4 recent=70:f16 tile=64 old=130:k8c/v4t old=k4c/v2t32 rot=kv",
        "f16",
        "f32",
    ],
)
@pytest.mark.parametrize("window", [None, 50])
def test_all_layers_at_once_give_what_one_by_one_give(
    text: str, window: int | None, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (
        CONFIG if window is None else ModelConfig(**{**_fields(), "sliding_window": window, "sliding_layers": (0, 2)})
    )
    model, policy = model_of(config), CachePolicy.parse(text)
    found = fed(model, policy)
    assert len(runs) == len(CUTS) - 1 and len(set(runs)) == 1
    monkeypatch.setattr(mixkv.models.transformer, "CALL_ROWS", 1)  # a layer, and some links more
    assert fed(model, policy)[0].tobytes() == found[0].tobytes()
    assert len(runs) == 4 * (len(CUTS) - 1)
    monkeypatch.setattr(Cache, "attentions", none)
    expected = fed(model, policy)
    assert len(runs) == 4 * (len(CUTS) - 1)
    assert found[0].tobytes() == expected[0].tobytes()
    assert found[1:] == expected[1:]


def _fields() -> dict[str, Any]:
    return {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}


@pytest.mark.parametrize("factors", [{"k_proj": 3e6}, {"v_proj": 3e6}, {"layers.1.self_attn.v_proj": 2e5}])
@pytest.mark.parametrize("text", ["k4v4:window=40:tile=32", "sinks=0 recent=0:f16 tile=32 old=k8c/v8t rot=k"])
def test_keys_or_values_beyond_float16_are_given_room_on_the_way(
    factors: dict[str, float], text: str, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense parts and scales become float32, layer by layer, where the kernels stop; what came before is not repeated."""
    model, policy = model_of(factors=factors), CachePolicy.parse(text)
    found = fed(model, policy)
    assert len(set(runs)) > 1, "nothing was repeated"
    monkeypatch.setattr(Cache, "attentions", none)
    expected = fed(model, policy)
    assert np.isfinite(expected[0]).all()
    assert found[0].tobytes() == expected[0].tobytes()
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("done", [0, 40])
def test_what_cannot_be_kept_names_layer_and_position_and_leaves_the_session(done: int, runs: list[int]) -> None:
    """Keys of layer 1 are beyond float16, and the policy asks for just that."""
    model = model_of(factors={"layers.1.self_attn.k_proj": 3e6})
    session = Session(model, CachePolicy(window=done, sinks=0, tile=32, k_bits=16))
    last = max(done - session.cache.layers[1].lead, 0) + 31
    for token in IDS[:last]:
        session.forward([token], None)
    for _ in range(2):
        with pytest.raises(NumericalError, match=rf"^layer 1, position {last}: tile \d cannot be quantized: "):
            session.forward(IDS[last : last + 2])
        assert session.position == last
    assert len(runs) >= last + 2


@pytest.mark.parametrize("where", ["_describe", "_store_addresses", "count_tiles", "forget"])
def test_an_interrupt_at_any_place_leaves_a_session_that_goes_on_as_if_there_was_none(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that let a tile enter are interrupted in one layer after the other, before and after a method's work."""
    model, policy = model_of(), CachePolicy.parse("k4v4:window=0:sinks=0:tile=32")
    expected = fed(model, policy, [0, *range(20, 73)])
    original = getattr(LayerCache, where)
    for layer, late in itertools.product(range(3), (False, True)):
        session, left = Session(model, policy), -1

        def interrupting(self: LayerCache, *args: Any, late: bool = late) -> Any:
            nonlocal left
            left -= 1
            found = original(self, *args) if late or left else None
            if left == 0:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(LayerCache, where, interrupting)
        logits = [session.forward(IDS[:20])]
        while session.position < 69:
            position = session.position
            if position in (
                30,
                31,
                62,
                63,
            ):  # a tile enters with one of the next four rows, but maybe not with the next
                left = layer + 1
                with contextlib.suppress(KeyboardInterrupt):
                    session.forward(IDS[position : position + 4])
                assert left <= 0, "nothing was interrupted"
                left = -1
            if session.position > position:  # all was done but forgetting
                logits.append(expected[0][position : session.position])
            else:
                logits.append(session.forward(IDS[position : position + 1]))
        assert np.concatenate(logits).tobytes() == expected[0][: session.position].tobytes(), (layer, late)
        monkeypatch.setattr(LayerCache, where, original)


def test_a_step_that_only_moves_on_is_not_described_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 64 tokens a tile begins, one enters the old segment, and dense forms are forgotten: layers are told of that."""
    found, describe = [], LayerCache.describe

    def counted(self: LayerCache, *args: Any) -> Any:
        found.append(1)
        return describe(self, *args)

    session = Session(model_of(), CachePolicy.parse("k4v4:window=40:tile=64"))
    session.forward(IDS[:200])
    monkeypatch.setattr(LayerCache, "describe", counted)
    for token in IDS[200:328]:
        session.forward([token])
    assert 2 * 2 * 3 <= len(found) <= 2 * 4 * 3


OTHERS = ["truncate", "fork", "ledger", "no ledger", "retier", "save", "fail"]


@settings(deadline=None, max_examples=40)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["read"] * 20 + OTHERS), st.sampled_from([1, 2, 7, 20])), min_size=20, max_size=60
    ),
    text=st.sampled_from(
        [
            "sinks=4 recent=20:f16 tile=32 old=k4c/v4t rollback=12",
            "sinks=3 recent=40:f16 tile=32 old=60:k8c/v8t old=k4c/v4t",
        ]
    ),
)
def test_whatever_comes_between_two_steps_they_give_what_layer_by_layer_gives(
    operations: list[tuple[str, int]], text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, folder = model_of(), tmp_path_factory.mktemp("saved")
    found = [_run(model, CachePolicy.parse(text), operations, folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "attentions", none)
        found.append(_run(model, CachePolicy.parse(text), operations, folder))
    assert found[0] == found[1]


def _run(model: Model, policy: CachePolicy, operations: list[tuple[str, int]], folder: Path) -> list[bytes]:
    """The logits of everything read, and what the cache takes after each operation."""
    session, found, ledger = Session(model, policy), [], None
    for what, count in [("read", 90), *operations, ("read", 1), ("read", 1), ("read", 40), ("read", 1)]:
        position = session.position
        if what == "read":
            logits = session.forward(IDS[position % 300 :][:count], "last" if count == 7 else "all")
            found.append(logits.tobytes())
        elif what == "truncate":
            session.truncate(max(position - count, session.cache.lowest))
        elif what == "fork":
            pair = session, session.fork()
            found += [x.forward(IDS[:count], "all").tobytes() for x in pair]  # both write to what they shared
            session, ledger = pair[count % 2], None if count % 2 else ledger
        elif what in ("ledger", "no ledger"):
            ledger = session.keep_ledger(what == "ledger")
        elif what == "retier" and session.cache.ledger is None:
            session.retier(policy)
        elif what == "save":
            session.save(folder / "session")
            session, ledger = Session.load(model, folder / "session"), None
        elif what == "fail":
            with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
                inner.setattr(session.cache, "commit", _interrupt)
                session.forward(IDS[:3])
        found.append(str(session.nbytes()).encode())
    if ledger is not None:
        found.append(ledger.shares().tobytes())
    return found


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
