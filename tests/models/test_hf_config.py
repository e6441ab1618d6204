"""Configs and weights written in Hugging Face's form, and read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mixkv.models.config import ModelConfig
from mixkv.models.errors import ModelError
from mixkv.models.hf_config import config_from_hf
from mixkv.models.hf_write import generation_config, hf_config
from mixkv.models.rope import Rope
from mixkv.models.safetensors import open_safetensors
from mixkv.models.safetensors_write import DTYPES, INDEX, index_of, shards, write_safetensors

from .tiny_models import FOLDER, NAMES

floats = st.floats(1e-12, 1e12)
ids = st.integers(0, 99)


@st.composite
def configs(draw: Any) -> ModelConfig:
    kv_heads = draw(st.integers(1, 8))
    return ModelConfig(
        architecture="llama",
        vocab_size=100,
        hidden_size=draw(st.integers(1, 1 << 20)),
        intermediate_size=draw(st.integers(1, 1 << 22)),
        num_hidden_layers=draw(st.integers(1, 200)),
        num_attention_heads=kv_heads * draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        max_position_embeddings=draw(st.integers(1, 1 << 24)),
        rms_norm_eps=draw(floats),
        rope=Rope(draw(floats)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=(bias := draw(st.booleans())),
        attention_out_bias=bias,
        mlp_bias=draw(st.booleans()),
        bos_token_id=draw(st.none() | ids),
        eos_token_ids=tuple(draw(st.lists(ids, unique=True, max_size=4))),
    )


@given(config=configs(), dtype=st.sampled_from(sorted(DTYPES)))
def test_what_is_written_is_read_back_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype)))
    assert config_from_hf(folder) == config
    (folder / "generation_config.json").write_text(json.dumps(generation_config(config)))
    assert config_from_hf(folder) == config


DERIVED = {"torch_dtype", "dtype", "rope_parameters", "use_cache", "max_window_layers", "layer_types"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt_oss"])  # which is not written
def test_values_and_their_types_are_those_that_transformers_writes(name: str) -> None:
    """transformers refuses 256.0 where it wants 256; a window that no layer has may be left out."""
    published, config = json.loads((FOLDER / name / "config.json").read_text()), config_from_hf(FOLDER / name)
    written = hf_config(config)
    shared = written.keys() & published.keys() - DERIVED
    assert {"vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps", "architectures", "model_type"} <= shared
    for key in shared:
        assert written[key] == published[key], key
        assert type(written[key]) is type(published[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    config = config_from_hf(FOLDER / name)
    if config.architecture == "gpt_oss":  # its experts lie in stacks, which nothing writes
        with pytest.raises(ModelError, match="architecture is gpt_oss; a config.json is written for llama, mistral"):
            hf_config(config)
        return
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    assert config_from_hf(tmp_path) == config


@pytest.mark.parametrize("bias", ["attention_bias", "attention_out_bias", "mlp_bias"])
def test_biases_of_a_llama_with_a_window_have_no_key(bias: str) -> None:
    config = replace(config_from_hf(FOLDER / "mistral"), **{bias: True})
    with pytest.raises(ModelError, match="some matrices have biases, for which mistral has no key"):
        hf_config(config)


SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": (1, 100), "e": ()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("limit", [1, 64, 250, 10_000])
def test_shards_are_read_by_the_library_with_the_same_bits(tmp_path: Path, dtype: str, limit: int) -> None:
    kind = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    generator = np.random.default_rng(0)
    tensors = {name: np.asarray(generator.standard_normal(shape)).astype(kind) for name, shape in SHAPES.items()}
    written: list[int] = []
    files = shards(SHAPES, dtype, limit)
    for shard in files:
        own = {name: SHAPES[name] for name in shard.names}
        write_safetensors(tmp_path / shard.file, own, dtype, tensors.__getitem__, written.append)
        assert (tmp_path / shard.file).stat().st_size % kind.itemsize == 0
        assert sum(tensors[name].nbytes for name in shard.names) <= limit or len(shard.names) == 1
    assert written == [tensors[name].nbytes for name in SHAPES]
    if len(files) > 1:
        (tmp_path / INDEX).write_text(json.dumps(index_of(files, SHAPES, dtype)))
    else:
        assert files[0].file == "model.safetensors"
    found = {name: x for shard in files for name, x in load_file(tmp_path / shard.file).items()}
    assert list(found) and all(np.array_equal(found[name], tensors[name]) for name in SHAPES)
    assert all(found[name].dtype == kind for name in SHAPES)
    assert dict(open_safetensors(tmp_path).shapes) == SHAPES
