"""Architectures by their keys in config.json: what each says in words of its own, as fields of ``ModelConfig``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .check import positive_float, shown, whole
from .errors import ModelError
from .limits import MAX_CONTEXT
from .rope import ROPE_TYPES

Fields = dict[str, Any]
_SILU, _GELU = {"silu": "silu", "swish": "silu"}, {"gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """What models of one ``model_type`` have in common.

    Attributes:
        fields: from the keys of config.json to the fields that are its own.
        tied: whether the output head is the embedding, unless said.
        activations: those of the gate, by Hugging Face's name; the first is the one unless said.
        rope_types: those that transformers knows for it.
        partial_rope: whether only a part of the channels may turn; local_rope: see ``ModelConfig``.

    """

    fields: Callable[[Fields], Fields]
    tied: bool = False
    activations: dict[str, str] = field(default_factory=lambda: _SILU)
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial_rope: bool = False
    local_rope: bool = False


def _layers(keys: Fields, slides: Callable[[int], bool]) -> Fields:
    """Which layers slide: as layer_types says, else by a rule; none without a sliding_window."""
    window, count = keys.get("sliding_window"), keys["num_hidden_layers"]
    types = keys.get("layer_types")
    if types is None:
        sliding = tuple(i for i in range(count) if slides(i)) if window is not None else ()
    elif isinstance(types, list) and len(types) == count and all(kind in (_FULL, _SLIDING) for kind in types):
        sliding = tuple(i for i, kind in enumerate(types) if kind == _SLIDING)
    else:
        raise ModelError(
            f"layer_types is {shown(types)}; it must name {_FULL} or {_SLIDING} for each of the {count} layers"
        )
    return {"sliding_window": window if sliding else None, "sliding_layers": sliding}


def _every(keys: Fields) -> Fields:
    return _layers({**keys, "layer_types": None}, lambda _: True)


def _optional_windows(keys: Fields) -> Fields:
    """Qwen's: only with use_sliding_window, and from max_window_layers on."""
    if not _flag(keys, "use_sliding_window"):
        keys = {**keys, "sliding_window": None, "layer_types": None}
    first = keys.get("max_window_layers", 28)
    return _layers(keys, lambda i: i >= whole("max_window_layers", first, 0, MAX_CONTEXT))


def _flag(keys: Fields, key: str, default: bool = False) -> bool:
    value = keys.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {shown(value)}; it must be true or false")
    return value


def _or_zero(keys: Fields, key: str) -> Any:
    return 0.0 if keys.get(key) is None else keys[key]


def _biases(keys: Fields) -> Fields:
    bias = keys.get("attention_bias", False)
    return {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": keys.get("mlp_bias", False)}


def _qwen2(keys: Fields) -> Fields:
    return {"attention_bias": True, **_optional_windows(keys)}


def _qwen3(keys: Fields) -> Fields:
    return {**_biases(keys), "qk_norm": "head", **_optional_windows(keys)}


def _experts(keys: Fields) -> Fields:
    count = keys.get("num_local_experts", keys.get("num_experts"))
    return {"num_experts": count, "num_experts_per_tok": keys.get("num_experts_per_tok")}


def _qwen3_moe(keys: Fields) -> Fields:
    step, layers = keys.get("decoder_sparse_step", 1), keys["num_hidden_layers"]
    whole("decoder_sparse_step", step, 1, MAX_CONTEXT)
    only = keys.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise ModelError(f"mlp_only_layers is {shown(only)}; it must be a list of layers")
    windows = _every(keys) if _flag(keys, "use_sliding_window") else {}
    return {
        **_biases(keys), **_experts(keys), "qk_norm": "head", **windows,
        "moe_intermediate_size": keys.get("moe_intermediate_size"),
        "norm_topk_prob": keys.get("norm_topk_prob", False),
        "dense_layers": tuple(i for i in range(layers) if i in only or (i + 1) % step),
    }  # fmt: skip


def _mixtral(keys: Fields) -> Fields:
    return {
        **_experts(keys), "moe_intermediate_size": keys["intermediate_size"], **_every(keys),
    }  # fmt: skip


def _gemma(keys: Fields) -> Fields:
    if _flag({"use_bidirectional_attention": keys.get("use_bidirectional_attention") or False},
             "use_bidirectional_attention"):  # fmt: skip
        raise ModelError("use_bidirectional_attention is true; supported: false")
    scalar = keys.get("query_pre_attn_scalar")
    return {
        **_biases(keys),
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_multiplier": keys["hidden_size"] ** 0.5,
        "attention_multiplier": positive_float("query_pre_attn_scalar", 256 if scalar is None else scalar) ** -0.5,
        "attn_logit_softcapping": _or_zero(keys, "attn_logit_softcapping"),
        "final_logit_softcapping": _or_zero(keys, "final_logit_softcapping"),
    }


def _gemma2(keys: Fields) -> Fields:
    return {**_gemma(keys), **_layers(keys, lambda i: i % 2 == 0)}


def _gemma3(keys: Fields) -> Fields:
    pattern = keys.get("sliding_window_pattern") or keys.get("_sliding_window_pattern") or 6
    whole("sliding_window_pattern", pattern, 1, MAX_CONTEXT)
    return {**_gemma(keys), "qk_norm": "head", **_layers(keys, lambda i: (i + 1) % pattern != 0)}


def _phi3(keys: Fields) -> Fields:
    return {"fused_projections": True, **_every(keys)}


def _smollm3(keys: Fields) -> Fields:
    layers = keys["num_hidden_layers"]
    interval = keys.get("no_rope_layer_interval") or 4
    whole("no_rope_layer_interval", interval, 1, MAX_CONTEXT)
    turns = keys.get("no_rope_layers")  # 1 for the layers that do have it
    if turns is None:
        turns = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(turns, list) or len(turns) != layers or not all(x in (0, 1) for x in turns):
        raise ModelError(f"no_rope_layers is {shown(turns)}; it must be 0 or 1 for each of the {layers} layers")
    if not _flag(keys, "use_sliding_window"):
        keys = {**keys, "sliding_window": None, "layer_types": None}
    return {
        **_biases(keys), "no_rope_layers": tuple(i for i, x in enumerate(turns) if not x),
        **_layers(keys, lambda i: not turns[i]),
    }  # fmt: skip


def _olmo2(keys: Fields) -> Fields:
    return {**_biases(keys), "qk_norm": "all", "pre_norms": False, "post_norms": True}


def _granite(keys: Fields) -> Fields:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return {**_biases(keys), **{name: positive_float(name, keys.get(name, 1.0)) for name in names}}


def _gpt_oss(keys: Fields) -> Fields:
    for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if keys.get(key, only) != only:
            raise ModelError(f"{key} is {shown(keys[key])}; supported: {only}")
    return {
        **_biases({"attention_bias": True, **keys}), **_experts(keys), "sink_logits": True,
        "moe_intermediate_size": keys["intermediate_size"], "router_bias": True,
        **_layers(keys, lambda i: i % 2 == 0),
    }  # fmt: skip


FAMILIES = {
    "llama": Family(_biases),
    "mistral": Family(_every),
    "mixtral": Family(_mixtral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "qwen3_moe": Family(_qwen3_moe),
    "gemma2": Family(_gemma2, tied=True, activations=_GELU),
    "gemma3_text": Family(_gemma3, tied=True, activations=_GELU, local_rope=True),
    "phi3": Family(_phi3, rope_types=("default", "longrope"), partial_rope=True),
    "smollm3": Family(_smollm3, tied=True),
    "olmo2": Family(_olmo2),
    "granite": Family(_granite),
    "gpt_oss": Family(_gpt_oss, activations={"silu": "clamped"}),
}
