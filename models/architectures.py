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
LAYER_TYPES = _FULL, _SLIDING = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Family:
    """What models of one ``model_type`` have in common.

    Attributes:
        fields: from the keys of config.json to the fields that are its own.
        tied: whether the output head is the embedding, unless said.
        activations: those of the gate, by Hugging Face's name; the first is the one unless said.
        activation_key: what the key of that is called.
        rope_types: those that transformers knows for it.
        partial_rope: whether only a part of the channels may turn; local_rope: see ``ModelConfig``.
        theta: the rotary base unless said; local_theta: that of layers with a window, where it is another.
        rope: rope_parameters, where neither they nor rope_scaling are there.
        defaults: what other keys are unless said. Whatever is not there is what the config classes of transformers take
            it for; sizes that a model has in any case must be there, and ids of tokens are the tokenizer's.

    """

    fields: Callable[[Fields], Fields]
    tied: bool = False
    activations: dict[str, str] = field(default_factory=lambda: _SILU)
    activation_key: str = "hidden_act"
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial_rope: bool = False
    local_rope: bool = False
    theta: float = 10_000.0
    local_theta: float = 10_000.0
    rope: Fields = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)


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
    if sliding and window is None:
        raise ModelError(f"layer_types names {_SLIDING}, but no sliding_window is in use")
    return {"sliding_window": window if sliding else None, "sliding_layers": sliding}


def _every(keys: Fields) -> Fields:
    return _layers({**keys, "layer_types": None}, lambda _: True)


def _mistral(keys: Fields) -> Fields:
    return _layers(keys, lambda _: True)


def _optional_windows(keys: Fields) -> Fields:
    """Qwen's: only with use_sliding_window, and from max_window_layers on."""
    if not _flag(keys, "use_sliding_window"):
        keys = {**keys, "sliding_window": None}
    first = whole("max_window_layers", keys.get("max_window_layers", 28), 0, MAX_CONTEXT)
    return _layers(keys, lambda i: i >= first)


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
    scalar = keys.get("query_pre_attn_scalar", 256)
    return {
        **_biases(keys),
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_multiplier": keys["hidden_size"] ** 0.5,
        "attention_multiplier": positive_float("query_pre_attn_scalar", scalar) ** -0.5,
        "final_logit_softcapping": _or_zero(keys, "final_logit_softcapping"),
    }


def _gemma2(keys: Fields) -> Fields:
    soft = {"attn_logit_softcapping": _or_zero(keys, "attn_logit_softcapping")}
    return {**_gemma(keys), **soft, **_layers(keys, lambda i: i % 2 == 0)}


def _gemma3(keys: Fields) -> Fields:
    if keys.get("attn_logit_softcapping") is not None:
        raise ModelError(f"attn_logit_softcapping is {shown(keys['attn_logit_softcapping'])}; supported: null")
    pattern = whole("sliding_window_pattern", keys.get("sliding_window_pattern", 6), 1, MAX_CONTEXT)
    same = keys.get("_sliding_window_pattern")  # a copy, which transformers writes and never reads
    if keys.get("layer_types") is None and same not in (None, pattern):
        raise ModelError(f"_sliding_window_pattern is {shown(same)}, sliding_window_pattern {pattern}; they must agree")
    return {**_gemma(keys), "qk_norm": "head", **_layers(keys, lambda i: (i + 1) % pattern != 0)}


def _phi3(keys: Fields) -> Fields:
    return {"fused_projections": True, **_every(keys)}


def _smollm3(keys: Fields) -> Fields:
    layers = keys["num_hidden_layers"]
    interval = whole("no_rope_layer_interval", keys.get("no_rope_layer_interval", 4), 1, MAX_CONTEXT)
    turns = keys.get("no_rope_layers")  # 1 for the layers that do have it
    if turns is None:
        turns = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(turns, list) or len(turns) != layers or not all(x in (0, 1) for x in turns):
        raise ModelError(f"no_rope_layers is {shown(turns)}; it must be 0 or 1 for each of the {layers} layers")
    optional = _flag(keys, "use_sliding_window")  # layer_types counts without it
    return {
        **_biases(keys), "no_rope_layers": tuple(i for i, x in enumerate(turns) if not x),
        **_layers(keys, lambda i: optional and not turns[i]),
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


_KV_4, _KV_8, _KV_32 = ({"num_key_value_heads": count} for count in (4, 8, 32))
_WINDOW = {"sliding_window": 4096}
_GEMMA = {**_KV_4, **_WINDOW, "head_dim": 256}
FAMILIES = {
    "llama": Family(_biases),
    "mistral": Family(_mistral, defaults={**_KV_8, **_WINDOW}),
    "mixtral": Family(_mixtral, theta=1e6, defaults=_KV_8),
    "qwen2": Family(_qwen2, defaults={**_KV_32, **_WINDOW}),
    "qwen3": Family(_qwen3, defaults={**_KV_32, **_WINDOW, "head_dim": 128}),
    "qwen3_moe": Family(_qwen3_moe, defaults={**_KV_4, **_WINDOW}),
    "gemma2": Family(
        _gemma2, tied=True, activations=_GELU, activation_key="hidden_activation",
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        _gemma3, tied=True, activations=_GELU, activation_key="hidden_activation", local_rope=True, theta=1e6,
        defaults=_GEMMA,
    ),
    "phi3": Family(
        _phi3, rope_types=("default", "longrope"), partial_rope=True, defaults={"original_max_position_embeddings": 4096}
    ),
    "smollm3": Family(_smollm3, tied=True, theta=2e6, defaults=_KV_4),
    "olmo2": Family(_olmo2),
    "granite": Family(_granite),
    "gpt_oss": Family(
        _gpt_oss, activations={"silu": "clamped"}, theta=150_000.0,
        rope={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        defaults={**_KV_8, "sliding_window": 128, "head_dim": 64},
    ),
}  # fmt: skip
