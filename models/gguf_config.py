"""The configuration of a model from the metadata of its GGUF file.

Keys: docs/gguf.md of the ggml project, and constants.py of its ``gguf`` package. What llama.cpp knows of an architecture
without a key is in ``_FAMILIES``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import limits
from .check import shown, whole
from .config import LARGEST, ModelConfig
from .errors import ModelError
from .gguf import GGUFFile
from .rope import Rope, yarn_attention_factor

_EMBEDDING = "token_embd.weight"
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SHORT, _LONG, _FREQS = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
_KEY = re.compile(r"[\w.-]{1,100}")  # a name that can stand in a sentence as it is

# A key of the architecture that no reader of its family asks for is refused unless it changes nothing: it is 0, false or
# empty, which switches off what it is about, or one of these values, or it says nothing about the computation at all.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.output_scale": (1.0,),
    "attention.temperature_scale": (1.0,),
    "embedding_scale": (1.0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "expert_weights_scale": (1.0,),
    "interleave_moe_layer_step": (1,),
    "logit_scale": (1.0,),
    "moe_every_n_layers": (1,),
    "residual_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.alpha": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),  # what it is without yarn
}
_IDLE = {
    "attention.layer_norm_epsilon",  # of another kind of norm
    "attention.sliding_window_pattern",  # without a window, which is another key
    "attention.temperature_length",  # without a temperature
    "expert_weights_norm",  # without experts
    "pooling_type",  # of embeddings of texts
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",  # without yarn
    "tensor_data_layout",
    "vocab_size",
}  # fmt: skip


class _Keys:
    """The keys of one architecture."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self._prefix = file, prefix
        self._asked: set[str] = set()

    def name(self, key: str) -> str:
        return f"{self._prefix}.{key}"

    def number(self, key: str) -> int:
        return int(self.expect(key, int))

    def expect(self, key: str, kind: type[Any]) -> Any:
        self._asked.add(key)
        return self.file.expect(self.name(key), kind)

    def maybe(self, key: str, kind: type[Any]) -> Any:
        self._asked.add(key)
        return self.file.optional(self.name(key), kind)

    def raw(self, key: str, default: object) -> Any:
        """A value of whatever type."""
        self._asked.add(key)
        return self.file.metadata.get(self.name(key), default)

    def given(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Numbers by field, of the keys that there are."""
        found = {field: self.maybe(key, float) for field, key in names.items()}
        return {field: value for field, value in found.items() if value is not None}

    def refuse_unread(self, more: Mapping[str, tuple[object, ...]]) -> None:
        """ModelError for a key that nobody has asked for and that changes the computation; ``more``: see _NEUTRAL."""
        for name, value in self.file.metadata.items():
            key = name.removeprefix(f"{self._prefix}.")
            if key == name or key in self._asked or key in _IDLE:
                continue
            neutral = _NEUTRAL.get(key, ()) + more.get(key, ())
            if value not in neutral and any(value if isinstance(value, list) else [value]):
                allowed = " or ".join(map(repr, neutral or (0,)))
                raise ModelError(
                    f"{name if _KEY.fullmatch(name) else shown(name)} is {shown(value)}, supported: {allowed}"
                )


@dataclass(frozen=True, slots=True)
class _Family:
    """What models of one general.architecture are.

    fields: what the keys say beyond the common ones, from the keys and the fields read so far. permuted: the rows of rotary
    projections are in llama.cpp's order (gguf_names.py).
    """

    architecture: str
    fields: Callable[[_Keys, dict[str, Any]], dict[str, Any]]
    permuted: bool = False


def _windows(keys: _Keys, fields: dict[str, Any], period: int, window: int | None) -> dict[str, Any]:
    """Layers slide but for every ``period``-th, unless the file says otherwise; all for a period of 0."""
    layers = fields["num_hidden_layers"]
    if not window:
        return {}
    key = "attention.sliding_window_pattern"
    pattern = keys.raw(key, period)
    if type(pattern) is int and 0 <= pattern <= limits.MAX_LAYERS:
        sliding = tuple(i for i in range(layers) if pattern == 0 or (i + 1) % pattern)
    elif isinstance(pattern, list) and len(pattern) >= layers and all(type(x) is bool for x in pattern):
        sliding = tuple(i for i in range(layers) if pattern[i])
    else:
        raise ModelError(
            f"{keys.file.path}: {keys.name(key)} is {shown(pattern)}, expected a number of layers, or a flag for each"
        )
    return {"sliding_window": window, "sliding_layers": sliding} if sliding else {}


def _plain(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return {}


def _llama(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """Llama, or with experts Mixtral, or with a window Mistral, where every layer has it."""
    windows = _windows(keys, fields, 0, keys.maybe("attention.sliding_window", int))
    if keys.maybe("expert_count", int):
        return {"architecture": "mixtral", **windows, **_experts(keys, fields)}
    return {"architecture": "mistral", **windows} if windows else {}


def _experts(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    inner = keys.maybe("expert_feed_forward_length", int)
    return {
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": fields["intermediate_size"] if inner is None else inner,
        "norm_topk_prob": keys.maybe("expert_weights_norm", bool) is not False,
        "dense_layers": tuple(
            i for i in range(fields["num_hidden_layers"]) if f"blk.{i}.ffn_gate_inp.weight" not in keys.file.tensors
        ),
    }


def _qwen3(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "head"}


def _qwen3_moe(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "head", **_experts(keys, fields)}


def _gemma(keys: _Keys, fields: dict[str, Any], largest: int) -> dict[str, Any]:
    """``largest``: the layers of the 27B model, whose softmax has another scale; norms have their 1 added already."""
    heads = fields["num_attention_heads"]
    scalar = fields["hidden_size"] / heads if fields["num_hidden_layers"] == largest else fields["head_dim"]
    return {
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_multiplier": fields["hidden_size"] ** 0.5,
        "attention_multiplier": scalar**-0.5,
        **keys.given({"final_logit_softcapping": "final_logit_softcapping"}),
    }


def _gemma2(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    window = keys.maybe("attention.sliding_window", int)
    return {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **_gemma(keys, fields, 46),
        **keys.given({"attn_logit_softcapping": "attn_logit_softcapping"}),
        **_windows(keys, fields, 2, 4096 if window is None else window),
    }  # fmt: skip


def _gemma3(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    local = keys.maybe("rope.freq_base_swa", float)
    return {
        **_gemma(keys, fields, 62), **_windows(keys, fields, 6, keys.maybe("attention.sliding_window", int)),
        "qk_norm": "head",
        "rope_local": Rope(10_000.0 if local is None else local),
    }  # fmt: skip


def _phi3(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    windows = _windows(keys, fields, 0, keys.maybe("attention.sliding_window", int))
    return {"fused_projections": True, **windows}


def _smollm3(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": tuple(range(3, fields["num_hidden_layers"], 4))}


def _olmo2(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    window = keys.maybe("attention.sliding_window", int)
    if window:
        raise ModelError(f"{keys.name('attention.sliding_window')} is {window}: this is OLMo 3, supported: OLMo 2")
    return {"qk_norm": "all", "pre_norms": False, "post_norms": True}


def _granite(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    names = {
        "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
    }  # fmt: skip
    if keys.maybe("rope.scaling.finetuned", bool) is False:  # which for Granite means that nothing turns
        raise ModelError(f"{keys.name('rope.scaling.finetuned')} is False, supported: True")
    return {**keys.given(names), "logits_scaling": keys.expect("logit_scale", float)}


def _gpt_oss(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": "clamped", "sink_logits": True, "router_bias": True, **_experts(keys, fields),
        **_windows(keys, fields, 2, keys.number("attention.sliding_window")),
    }  # fmt: skip


_FAMILIES = {
    "llama": _Family("llama", _llama, permuted=True),
    "qwen2": _Family("qwen2", _plain),
    "qwen3": _Family("qwen3", _qwen3),
    "qwen3moe": _Family("qwen3_moe", _qwen3_moe),
    "gemma2": _Family("gemma2", _gemma2),
    "gemma3": _Family("gemma3_text", _gemma3),
    "phi3": _Family("phi3", _phi3),
    "smollm3": _Family("smollm3", _smollm3, permuted=True),
    "olmo2": _Family("olmo2", _olmo2),
    "granite": _Family("granite", _granite, permuted=True),
    "gpt-oss": _Family("gpt_oss", _gpt_oss),
}


def rows_are_permuted(file: GGUFFile) -> bool:
    """Whether the rows of rotary projections are in llama.cpp's order, in a file that ``config_from_gguf`` has read."""
    return _FAMILIES[file.expect("general.architecture", str)].permuted


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The dimensions and choices of the model in ``file``.

    Raises ModelError, naming the file, the key, what was found and what is allowed.
    """
    prefix = file.expect("general.architecture", str)
    if prefix not in _FAMILIES:
        raise ModelError(f"{file.path}: general.architecture is {shown(prefix)}, supported: {', '.join(_FAMILIES)}")
    keys = _Keys(file, prefix)
    parts = file.optional("split.count", int)
    if parts is not None and parts > 1:
        raise ModelError(f"{file.path}: split.count is {parts}, supported: 1; join the parts with llama-gguf-split")
    if keys.maybe("attention.causal", bool) is False:
        raise ModelError(f"{file.path}: {keys.name('attention.causal')} is False, supported: True")
    family = _FAMILIES[prefix]
    heads = keys.number("attention.head_count")
    kv_heads = keys.maybe("attention.head_count_kv", int)
    end_ids = [file.optional(f"tokenizer.ggml.{key}", int) for key in _END_IDS]
    fields: dict[str, Any] = {
        "architecture": family.architecture,
        "vocab_size": _vocab_size(keys),
        "hidden_size": keys.number("embedding_length"),
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": _head_dim(keys, heads),
        "max_position_embeddings": keys.number("context_length"),
        "rms_norm_eps": keys.expect("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "bos_token_id": file.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_ids": tuple(dict.fromkeys(token for token in end_ids if token is not None)),
    }
    try:
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "max_position_embeddings"):
            whole(field, fields[field], 1, LARGEST[field])  # as ModelConfig does; but they are counted with before
        fields["rotary_dim"] = _rotary_dim(keys, fields["head_dim"])
        fields["rope"] = _rope(keys, fields)
        config = ModelConfig(**(fields | family.fields(keys, fields)))
        keys.refuse_unread({
            "attention.key_length_swa": (config.head_dim,), "attention.value_length_swa": (config.head_dim,),
            "rope.dimension_count_swa": (config.rotary_channels,), "rope.freq_base_swa": (config.rope.theta,),
        })  # fmt: skip
        return config
    except ModelError as error:
        raise ModelError(f"{file.path}: {str(error).removeprefix(f'{file.path}: ')}") from None


def _rope(keys: _Keys, fields: dict[str, Any]) -> Rope:
    """The rotary embedding; factors that the file has as tensors are longrope's, whatever they were made for."""
    theta = keys.given({"theta": "rope.freq_base"})
    context, file = fields["max_position_embeddings"], keys.file
    original = keys.maybe("rope.scaling.original_context_length", int) or context
    kind = _rope_type(keys)
    if _SHORT in file.tensors or _LONG in file.tensors:
        factors: dict[str, Any] = {
            "short_factor": _factors(keys, _SHORT, fields),
            "long_factor": _factors(keys, _LONG, fields),
        }
        given = keys.given({"attention_factor": "rope.scaling.attn_factor"})
        return Rope(rope_type="longrope", original_context=original, **theta, **given, **factors)
    if _FREQS in file.tensors:
        same = _factors(keys, _FREQS, fields)
        return Rope(rope_type="longrope", original_context=context, short_factor=same, long_factor=same, **theta)
    if kind == "none":
        return Rope(**theta)
    factor = keys.expect("rope.scaling.factor", float)
    if kind == "linear":
        return Rope(rope_type="linear", factor=factor, **theta)
    extrapolated = keys.maybe("rope.scaling.yarn_ext_factor", float)
    if extrapolated not in (None, -1.0, 1.0):
        raise ModelError(f"{keys.name('rope.scaling.yarn_ext_factor')} is {extrapolated:g}, supported: 1 or -1")
    betas = keys.given({"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"})
    more = keys.given({"attention_factor": "rope.scaling.attn_factor"}).get("attention_factor", 1.0)
    return Rope(
        rope_type="yarn", factor=factor, original_context=original, attention_factor=more * yarn_attention_factor(factor),
        truncate=fields["architecture"] != "gpt_oss", **theta, **betas,
    )  # fmt: skip


def _rope_type(keys: _Keys) -> str:
    """How the context was stretched: none, linear, yarn, or longrope where there are its tensors."""
    allowed: tuple[str, ...] = ("none", "linear", "yarn")
    beside = ""
    if _SHORT in keys.file.tensors or _LONG in keys.file.tensors:
        allowed, beside = ("none", "longrope"), f" beside {_SHORT} and {_LONG}"
    elif _FREQS in keys.file.tensors:
        allowed, beside = ("none",), f" beside {_FREQS}"
    kind = keys.maybe("rope.scaling.type", str)
    if kind is None:  # then a factor is linear, as llama.cpp has it
        stretched = "linear" in allowed and keys.maybe("rope.scaling.factor", float) not in (None, 0.0, 1.0)
        kind = "linear" if stretched else "none"
    if kind not in allowed:
        key = keys.name("rope.scaling.type")
        raise ModelError(f"{key} is {shown(kind)}, supported{beside}: {', '.join(allowed)}")
    return str(kind)


def _factors(keys: _Keys, name: str, fields: dict[str, Any]) -> tuple[float, ...]:
    tensor, pairs = keys.file.tensors.get(name), (fields["rotary_dim"] or fields["head_dim"]) // 2
    if tensor is None or tensor.shape != (pairs,):
        found = "there is none" if tensor is None else f"its shape is {tensor.shape}"
        raise ModelError(f"{name} must have a number for each of {pairs} pairs of channels, but {found}")
    return tuple(keys.file.read(name).tolist())


def _vocab_size(keys: _Keys) -> int:
    file = keys.file
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        found = "there is none" if embedding is None else f"its shape is {embedding.shape}"
        raise ModelError(f"{file.path}: {_EMBEDDING} must be a matrix with a row for each token, but {found}")
    rows = embedding.shape[0]
    tokens = file.optional("tokenizer.ggml.tokens", list[str])
    if tokens is not None:
        size, where = len(tokens), "tokenizer.ggml.tokens has"
    else:
        declared = keys.maybe("vocab_size", int)
        size, where = rows if declared is None else declared, f"{keys.name('vocab_size')} says"
    if size != rows:
        raise ModelError(f"{file.path}: {where} {size} tokens, but {_EMBEDDING} has {rows} rows; they must agree")
    return size


def _head_dim(keys: _Keys, heads: int) -> int:
    """The size of a head: stated, or the hidden size by the heads; queries and values must share it."""
    file, hidden = keys.file, keys.number("embedding_length")
    head_dim = keys.maybe("attention.key_length", int)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ModelError(
                f"{file.path}: {keys.name('embedding_length')} is {hidden} and {keys.name('attention.head_count')} is "
                f"{heads}; without {keys.name('attention.key_length')} the first must be a multiple of the second"
            )
        head_dim = hidden // heads
    other = keys.maybe("attention.value_length", int)
    if other is not None and other != head_dim:
        raise ModelError(
            f"{file.path}: {keys.name('attention.value_length')} is {other}, supported: the size of a head, {head_dim}"
        )
    return int(head_dim)


def _rotary_dim(keys: _Keys, head_dim: int) -> int:
    """How many channels of a head turn, the first ones, 0 for all; they must be all where rows are permuted."""
    found = keys.maybe("rope.dimension_count", int)
    if found is not None and found != head_dim and rows_are_permuted(keys.file):
        raise ModelError(f"{keys.name('rope.dimension_count')} is {found}, supported: the size of a head, {head_dim}")
    return 0 if found in (None, head_dim) else int(found)
