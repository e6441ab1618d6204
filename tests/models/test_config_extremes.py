"""Every key of every config.json at the end of its range and beyond: the project's errors and nothing else, no warning."""

import contextlib
import copy
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixkv import CachePolicy, Session
from mixkv.models.config import ModelConfig
from mixkv.models.errors import MixkvError, ModelError
from mixkv.models.gguf import open_gguf
from mixkv.models.gguf_config import config_from_gguf
from mixkv.models.hf_config import config_from_hf
from mixkv.models.load import load
from mixkv.models.rope import Rope

from .test_gguf_architectures import write
from .tiny_models import FOLDER

# As numbers get; and what is none
VALUES = [
    0, 1, 2, -1, 1 << 24, 10**400, 0.5, 1 + 2**-52, 1e-7, 1.2e-38, 1e6, 1e15, 3.4e38, math.nan, math.inf,
    True, None, "x", [], [1.0], [None], {}, {"a": 1},
]  # fmt: skip
ABSENT = (
    "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window_pattern",
    "rope_local_base_freq", "num_experts", "no_rope_layers", "decoder_sparse_step", "max_window_layers", "rope_theta",
    "query_pre_attn_scalar", "swiglu_limit", "layer_types", "head_dim", "hidden_activation",
)  # fmt: skip
ONE_OF_EACH = [
    "gemma2", "gemma3", "gpt_oss", "granite", "llama_linear", "mistral", "mixtral", "olmo2", "phi3_longrope", "qwen2",
    "qwen3_moe", "smollm3",
]  # fmt: skip
IDLE = {"architectures", "transformers_version", "dtype", "model_type"}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.0,
     "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "dynamic", "rope_theta": 1e15, "factor": 2.0},
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
     "attention_factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
]  # fmt: skip


def paths(keys: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in keys.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


def variants(keys: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in paths(dict.fromkeys(ABSENT) | keys):
        if path[0] in IDLE:
            continue
        for value in VALUES:
            changed = copy.deepcopy(keys)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield changed


def use(folder: Path, seen: set[ModelConfig]) -> None:
    """Read a config, and run its model if that is another one than those before."""
    config = config_from_hf(folder)
    if config in seen:
        return
    seen.add(config)
    for rope in config.ropes:
        for context in (1, config.max_position_embeddings):
            rope.inverse_frequencies(config.rotary_channels, context)
    session = Session(load(str(folder), "f32"), CachePolicy.full(), context=min(4, config.max_position_embeddings))
    session.forward([3])


@pytest.mark.fault("config-values")
@pytest.mark.parametrize("name", [*ONE_OF_EACH, *range(len(ROPES))])
def test_any_value_of_any_key_is_used_without_a_warning_or_refused(name: str | int, tmp_path: Path) -> None:
    model = name if isinstance(name, str) else "llama_linear"
    keys = json.loads((FOLDER / model / "config.json").read_text())
    changed = variants(keys)
    if isinstance(name, int):
        changed = (
            {**keys, "rope_parameters": found["rope"]} for found in variants({"rope": ROPES[name]}) if "rope" in found
        )
    shutil.copy(FOLDER / model / "model.safetensors", tmp_path)
    seen: set[ModelConfig] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for variant in changed:
            (tmp_path / "config.json").write_text(json.dumps(variant))
            with contextlib.suppress(MixkvError):
                use(tmp_path, seen)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "theta": 1.0, "original_context": 32}, "rope_theta is 1; for yarn it must be above 1"),
        ({"theta": 1e16}, "rope_theta is 1e+16; it must be"),
        ({"rope_type": "dynamic", "original_context": 32, "factor": 3.4e38}, "rope factor is 3.4e+38; it must be"),
    ],
)
def test_a_rotary_embedding_without_numbers_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Rope(**rope)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", ["rope.freq_base", "rope.scaling.factor", "rope.scaling.yarn_beta_fast"])
def test_extremes_in_a_gguf_file_are_used_or_refused(key: str, tmp_path: Path) -> None:
    for value in (0.0, 1.0, -1.0, 1e-30, 3e38, math.nan, math.inf):
        write("llama_yarn", tmp_path / "tiny.gguf", {key: value})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                config = config_from_gguf(open_gguf(tmp_path / "tiny.gguf"))
                config.rope.inverse_frequencies(config.rotary_channels, 128)
            except ModelError:
                assert value != 1.0 or key == "rope.freq_base"
