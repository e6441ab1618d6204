"""A model in Hugging Face's form: the keys of its config.json, and how its tensors are called and stored there."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .check import listed
from .config import ARCHITECTURES, ModelConfig
from .errors import ModelError
from .hf_experts import MIXTRAL
from .load import Opened, Source, with_ends
from .rope import Rope
from .safetensors_write import DTYPES

Float32 = NDArray[np.float32]
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


# --- config.json -----------------------------------------------------------------------------------------------------


def hf_config(config: ModelConfig, dtype: str = "F32") -> dict[str, Any]:
    """The keys of config.json that describe ``config``, whose weights are of ``dtype`` (a key of safetensors_write.DTYPES).

    ``config_from_hf`` of these keys is ``config``. Raises ModelError for an architecture that is not written, and for what
    its keys have no word for.
    """
    if config.architecture not in _WRITERS:
        raise ModelError(f"architecture is {config.architecture}; a config.json is written for {listed(_WRITERS)}")
    return {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "dtype": DTYPES[dtype].name,
        "torch_dtype": DTYPES[dtype].name,  # as transformers 4 calls it
        **{name: getattr(config, name) for name in _SAME},
        "hidden_act": _ACTIVATIONS[config.activation],
        "bos_token_id": config.bos_token_id,  # also where there is none: transformers has defaults of its own
        "eos_token_id": _eos(config),
        "pad_token_id": None,
        **_ropes(config),
        **_WRITERS[config.architecture](config),
    }


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of generation_config.json: where a text begins and ends."""
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": _eos(config)}
    return {name: value for name, value in ids.items() if value is not None}


def _eos(config: ModelConfig) -> int | list[int] | None:
    if not config.eos_token_ids:
        return None
    return config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids)


def _ropes(config: ModelConfig) -> dict[str, Any]:
    whole = _rope(config.rope)
    if config.rotary_dim:
        whole["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_local is not None:
        return {"rope_parameters": {"full_attention": whole, "sliding_attention": _rope(config.rope_local)}}
    keys: dict[str, Any] = {"rope_parameters": whole, "rope_theta": config.rope.theta}
    if config.rope.rope_type == "dynamic":
        keys["max_position_embeddings"] = config.rope.original_context
    if config.architecture == "phi3" and config.rope.original_context:
        keys["original_max_position_embeddings"] = config.rope.original_context
    return keys


def _rope(rope: Rope) -> dict[str, Any]:
    """One rotary embedding as rope_parameters has it."""
    names = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
        "longrope": ("short_factor", "long_factor", "attention_factor"),
    }.get(rope.rope_type, ())
    keys: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.theta}
    for name in names:
        value = getattr(rope, name)
        keys[name] = list(value) if isinstance(value, tuple) else value
    if rope.rope_type in ("llama3", "yarn", "longrope"):
        keys["original_max_position_embeddings"] = rope.original_context
    return keys


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"sliding_window": None}
    windows = config.sliding_windows
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"sliding_window": config.sliding_window, "layer_types": types}


def _every_window(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is not None and len(config.sliding_layers) != config.num_hidden_layers:
        raise ModelError(f"only some layers have a sliding window, for which {config.architecture} has no key")
    return {"sliding_window": config.sliding_window}


def _mistral(config: ModelConfig) -> dict[str, Any]:
    if config.attention_bias or config.attention_out_bias or config.mlp_bias:
        raise ModelError("some matrices have biases, for which mistral has no key")
    return _every_window(config)


def _biases(config: ModelConfig) -> dict[str, Any]:
    if config.attention_bias != config.attention_out_bias:
        raise ModelError(f"some of attention's layers have biases, for which {config.architecture} has no key")
    return {"attention_bias": config.attention_bias}


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {**_biases(config), "mlp_bias": config.mlp_bias}


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    if config.dense_layers or config.moe_intermediate_size != config.intermediate_size:
        raise ModelError(
            "layers without experts, or experts of another size than intermediate_size, have no key in mixtral"
        )
    return {
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok, **_every_window(config)
    }  # fmt: skip


def _qwen(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0, **_layer_types(config)}


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_biases(config), **_qwen(config)}


def _qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    windows = _every_window(config)
    return {
        **_biases(config), **windows, "use_sliding_window": windows["sliding_window"] is not None,
        "num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers),
    }  # fmt: skip


def _gemma(config: ModelConfig) -> dict[str, Any]:
    return {
        **_biases(config), **_layer_types(config), "hidden_activation": _ACTIVATIONS[config.activation],
        "query_pre_attn_scalar": round(config.softmax_scale**-2),  # transformers takes no other than whole numbers
        "attn_logit_softcapping": config.attn_logit_softcapping or None,
        "final_logit_softcapping": config.final_logit_softcapping or None,
    }  # fmt: skip


def _smollm3(config: ModelConfig) -> dict[str, Any]:
    turns = [int(i not in config.no_rope_layers) for i in range(config.num_hidden_layers)]
    windows = {**_layer_types(config), "use_sliding_window": config.sliding_window is not None}
    return {**_llama(config), **windows, "no_rope_layers": turns}


def _granite(config: ModelConfig) -> dict[str, Any]:
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    scales = {name: getattr(config, name) for name in names}
    return {**_llama(config), **scales, "attention_multiplier": config.softmax_scale}


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _llama, "mistral": _mistral, "mixtral": _mixtral, "qwen2": _qwen, "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe, "gemma2": _gemma, "gemma3_text": _gemma, "phi3": _every_window, "smollm3": _smollm3,
    "olmo2": _biases, "granite": _granite,
}  # fmt: skip


# --- tensors ---------------------------------------------------------------------------------------------------------

_EXPERT = re.compile(r"mlp\.(gate\.|experts\.\d+\.(\w+_proj)\.)")
_MIXTRAL = {own: theirs for theirs, own in MIXTRAL.items()}


def hf_name(config: ModelConfig, name: str) -> str:
    """What a tensor is called in a folder of this architecture."""
    if config.architecture != "mixtral":
        return name

    def renamed(match: re.Match[str]) -> str:
        own = match[1] if match[2] is None else match[1].replace(match[2], _MIXTRAL[match[2]])
        return f"block_sparse_moe.{own}"

    return _EXPERT.sub(renamed, name)


def in_hf_form(opened: Opened) -> Opened:
    """The same model as Hugging Face has it: its config names all ends, and Gemma's norms are stored without their 1."""
    tokenizer = opened.read_tokenizer()
    opened = replace(opened, config=with_ends(opened.config, tokenizer), read_tokenizer=lambda: tokenizer)
    if not opened.config.architecture.startswith("gemma") or opened.config.norm_offset:
        return opened
    return replace(opened, config=replace(opened.config, norm_offset=1.0), source=_LessOne(opened.source))


class _LessOne:
    """A source whose norms are smaller by 1, which is exact where they were made of bfloat16 by adding it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shapes: Mapping[str, tuple[int, ...]] = source.shapes
        self.stored_types: Mapping[str, str] = MappingProxyType(dict(source.stored_types))
        self.nbytes, self.stored, self.forget = source.nbytes, source.stored, source.forget

    def read(self, name: str) -> Float32:
        """One tensor as float32, C order."""
        values = self._source.read(name)
        return values - np.float32(1) if name.endswith("norm.weight") else values
