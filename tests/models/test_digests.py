"""Digests of tensors: each has Hugging Face's name, and a change anywhere in it changes that one alone."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mixkv
from mixkv.models.config import ModelConfig
from mixkv.models.digests import digests
from mixkv.models.linear import FloatLinear
from mixkv.models.load import read_weights
from mixkv.models.names import expected_tensors
from mixkv.models.tiny import tiny_model
from mixkv.models.toy import CONFIG, ToySource
from mixkv.models.transformer import Weights

# Rows of q, k and v that end in the midst of a block of 16, biases everywhere
SMALL = replace(CONFIG, num_hidden_layers=1)
BIASED = dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), True)
ODD = replace(
    SMALL,
    head_dim=12,
    num_attention_heads=3,
    num_key_value_heads=1,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)
TIED = replace(CONFIG, tie_word_embeddings=True, num_hidden_layers=2)


class Changed(ToySource):
    """A source of which one number of one tensor is another."""

    def __init__(self, config: ModelConfig, name: str | None = None, at: int = 0) -> None:
        super().__init__(expected_tensors(config), seed=1)
        self._name, self._at = name, at

    def read(self, name: str) -> Any:
        tensor = super().read(name)
        if name == self._name:
            tensor.flat[self._at] += 7
        return tensor


def of(config: ModelConfig, weights: str, name: str | None = None, at: int = 0) -> dict[str, str]:
    return digests(config, read_weights(config, Changed(config, name, at), weights))


@pytest.mark.parametrize("config", [SMALL, ODD, TIED], ids=["plain", "odd", "tied"])
@pytest.mark.parametrize("weights", ["f32", "bf16", "q8", "q4"])
def test_every_tensor_has_its_name_and_a_change_in_it_changes_that_one_alone(config: ModelConfig, weights: str) -> None:
    before, shapes = of(config, weights), expected_tensors(config)
    assert before.keys() == shapes.keys()
    for name, shape in shapes.items():
        for at in (0, int(np.prod(shape)) - 1):
            after = of(config, weights, name, at)
            assert {other for other in before if before[other] != after[other]} == {name}


def test_a_digest_begins_with_the_format_and_depends_on_it() -> None:
    kept = {weights: of(CONFIG, weights) for weights in ("f32", "bf16", "q8", "q4")}
    down = {weights: found["model.layers.0.mlp.down_proj.weight"].rsplit(" ", 1) for weights, found in kept.items()}
    assert {weights: x[0] for weights, x in down.items()} == {
        "f32": "f32", "bf16": "bf16", "q8": "q8", "q4": "q4 with minima"
    }  # fmt: skip
    assert len({x[1] for x in down.values()}) == 4 and all(len(x[1]) == 16 for x in down.values())
    assert len({found["model.norm.weight"] for found in kept.values()}) == 1


def test_a_digest_of_float32_is_that_of_shape_type_and_bytes() -> None:
    tensor = Changed(CONFIG).read("model.layers.2.mlp.up_proj.weight")
    expected = hashlib.sha256(b"(128, 64) float32" + tensor.tobytes()).hexdigest()[:16]
    assert of(CONFIG, "f32")["model.layers.2.mlp.up_proj.weight"] == f"f32 {expected}"


def test_layers_whose_rows_are_not_those_of_the_config_are_named_as_a_whole() -> None:
    model = tiny_model(weights="f32", num_hidden_layers=1)
    other = replace(model.config, num_key_value_heads=1)
    found = digests(other, model.transformer.weights)
    assert {"model.layers.0.qkv.weight", "model.layers.0.input_layernorm.weight"} <= found.keys()
    assert "model.layers.0.self_attn.q_proj.weight" not in found


def test_a_head_that_is_no_longer_the_embedding_is_named() -> None:
    weights = read_weights(TIED, Changed(TIED), "f32")
    assert isinstance(weights.embedding, FloatLinear)
    own = FloatLinear(weights.embedding.weight.copy(), before=weights.head.before)  # type: ignore[attr-defined]
    found = digests(TIED, Weights(weights.embedding, weights.layers, own))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_a_layer_that_is_not_known_is_refused() -> None:
    weights = mixkv.load("toy").transformer.weights
    with pytest.raises(TypeError, match="found object"):
        digests(CONFIG, Weights(weights.embedding, weights.layers, object()))  # type: ignore[arg-type]
