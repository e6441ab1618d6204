"""The fingerprint of a model: the same for the same weights, another for any other model or format."""

from dataclasses import replace

import numpy as np

import mixkv
from mixkv.models.fingerprint import WINDOW_NBYTES, WINDOWS, fingerprint
from mixkv.models.linear import FloatLinear
from mixkv.models.rope import Rope
from mixkv.models.transformer import Weights


def of(weights: str) -> str:
    model = mixkv.load("toy", weights)
    return fingerprint(model.config, model.transformer.weights)


def test_a_model_loaded_twice_is_the_same_and_in_another_format_another() -> None:
    found = {weights: of(weights) for weights in ("f32", "bf16", "q8", "q4")}
    assert len(set(found.values())) == 4
    assert all(len(x) == 32 and int(x, 16) >= 0 for x in found.values())
    assert of("q8") == found["q8"] and of("auto") == found["f32"]


def test_another_config_is_another_model() -> None:
    model = mixkv.load("toy")
    other = replace(model.config, rope=Rope(model.config.rope.theta * 2))
    assert fingerprint(other, model.transformer.weights) != fingerprint(model.config, model.transformer.weights)


def test_weights_that_differ_anywhere_in_a_small_array_and_throughout_in_a_large_one() -> None:
    config = mixkv.load("toy").config
    large = np.random.default_rng(0).standard_normal((WINDOWS * WINDOW_NBYTES, 8)).astype(np.float32)
    small = large[:16].copy()

    def digest(small: np.ndarray, large: np.ndarray) -> str:
        return fingerprint(config, Weights(FloatLinear(small), [], FloatLinear(large)))

    first = digest(small, large)
    for index in ((0, 0), (7, 3), (15, 7)):
        changed = small.copy()
        changed[index] += 1
        assert digest(changed, large) != first
    assert digest(small, large * np.float32(1.001)) != first
    for row in (0, -1):  # both ends are looked at
        changed = large.copy()
        changed[row] += 1
        assert digest(small, changed) != first
    assert digest(small.reshape(8, 16), large) != first
