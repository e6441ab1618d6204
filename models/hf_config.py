"""A ``ModelConfig`` as the config.json and generation_config.json of a Hugging Face folder, as config_from_hf reads it."""

from typing import Any

from .check import listed
from .config import ARCHITECTURES, ModelConfig
from .errors import ModelError

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of safetensors by their names in config.json."""


def hf_config(config: ModelConfig, dtype: str = "F32") -> dict[str, Any]:
    """The keys of config.json that describe ``config``, whose weights are of ``dtype`` (a key of DTYPES).

    ``config_from_hf`` of these keys is ``config``. Raises ModelError for an architecture that is not written yet.
    """
    if config.architecture not in _WRITERS:
        raise ModelError(f"architecture is {config.architecture}; a config.json is written for {listed(_WRITERS)}")
    keys: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],  # as transformers 4 calls it
        **_WRITERS[config.architecture](config),
    }
    if config.bos_token_id is not None:
        keys["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        keys["eos_token_id"] = _eos(config)
    return keys


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of generation_config.json: where a text begins and ends."""
    keys: dict[str, Any] = {} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}
    return keys | ({"eos_token_id": _eos(config)} if config.eos_token_ids else {})


def _eos(config: ModelConfig) -> int | list[int]:
    return config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids)


def _llama(config: ModelConfig) -> dict[str, Any]:
    """Keys of LlamaConfig: https://huggingface.co/docs/transformers/model_doc/llama."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
        "attention_bias", "mlp_bias",
    )  # fmt: skip
    keys = {name: getattr(config, name) for name in same}
    return keys | {"hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


_WRITERS = {"llama": _llama}
