"""Tiny random models: of every architecture, the same every time, and others for every argument that differs."""

import numpy as np
import pytest

import mixkv
from mixkv import CachePolicy, Session
from mixkv.models.config import ARCHITECTURES
from mixkv.models.digests import digests
from mixkv.models.errors import ModelError, UsageError
from mixkv.models.load import Model
from mixkv.models.rope import Rope
from mixkv.models.tiny import tiny_model


def tensors(model: Model) -> dict[str, str]:
    return digests(model.config, model.transformer.weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_of_every_architecture_speaks_and_is_the_same_every_time(architecture: str) -> None:
    one, two = tiny_model(architecture, 3), tiny_model(architecture, 3)
    assert one.config == two.config and one.config.architecture == architecture and tensors(one) == tensors(two)
    tokens = list(mixkv.generate(Session(one), one.encode("Hello"), max_tokens=8))
    assert "".join(token.text for token in tokens)


def test_seeds_and_fields_make_other_models() -> None:
    one, two = tensors(tiny_model(seed=0)), tensors(tiny_model(seed=1))
    assert one.keys() == two.keys() and all(one[name] != two[name] for name in one)
    deep = tiny_model(num_hidden_layers=5, hidden_size=96, tie_word_embeddings=True, rope=Rope(500.0))
    assert (deep.config.num_hidden_layers, deep.config.hidden_size, deep.config.rope.theta) == (5, 96, 500.0)
    assert "lm_head.weight" not in tensors(deep) and len(tensors(deep)) == 2 + 5 * 9


def test_codes_unless_another_format_is_asked_for() -> None:
    assert {x.split()[0] for x in tensors(tiny_model()).values()} == {"q8", "f32"}  # norms are float32
    assert {x.split()[0] for x in tensors(tiny_model(weights="f32")).values()} == {"f32"}


def test_a_smaller_vocabulary_has_no_text_and_a_larger_one_has() -> None:
    small, large = tiny_model(vocab_size=97), tiny_model(vocab_size=300)
    assert small.tokenizer is None and small.config.eos_token_ids == () and small.config.bos_token_id is None
    logits = Session(small, CachePolicy()).forward([1, 96], "last")
    assert logits is not None and logits.shape == (97,) and np.isfinite(logits).all()
    assert large.tokenizer is not None and large.encode("é") == [0xC3, 0xA9] and large.config.eos_token_ids == (257,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"architecture": "gpt"}, UsageError, "architecture must be one of .*llama.*found 'gpt'"),
        ({"seed": -1}, UsageError, "seed must be a whole number from 0 to 4294967295, found -1"),
        ({"seed": True}, UsageError, "found True"),
        ({"weights": "q5"}, UsageError, "weights must be one of auto"),
        ({"n_layers": 3}, UsageError, "num_hidden_layers.*found n_layers"),
        ({"head_dim": 13}, ModelError, "head_dim is 13; it must be even"),
        ({"vocab_size": "many"}, ModelError, "vocab_size is 'many'"),
    ],
)
def test_what_there_is_not_is_refused(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny_model(**arguments)
