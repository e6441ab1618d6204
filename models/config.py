"""What a model is: its dimensions and the choices of its architecture, from config.json or GGUF metadata."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import limits
from .check import read_json_object, shown
from .errors import ModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # model_type -> the class of config.json's "architectures"

_LARGEST = {
    "vocab_size": limits.MAX_VOCAB_SIZE,
    "hidden_size": limits.MAX_HIDDEN_SIZE,
    "intermediate_size": limits.MAX_INTERMEDIATE_SIZE,
    "num_hidden_layers": limits.MAX_LAYERS,
    "num_attention_heads": limits.MAX_HEADS,
    "num_key_value_heads": limits.MAX_HEADS,
    "head_dim": limits.MAX_HEAD_DIM,
    "max_position_embeddings": limits.MAX_CONTEXT,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The dimensions and choices of one model; field names are Hugging Face's.

    Every field is checked when the object is made; ModelError names the field, the value and what is allowed.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise ModelError(f"architecture is {shown(self.architecture)}; supported: {', '.join(ARCHITECTURES)}")
        for field, largest in _LARGEST.items():
            _check_whole(field, getattr(self, field), 1, largest)
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}; it must be even, from 2 to {limits.MAX_HEAD_DIM}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )
        most = limits.MAX_HEADS_PER_KV_HEAD * self.num_key_value_heads
        if self.num_attention_heads > most:
            raise ModelError(
                f"num_attention_heads is {self.num_attention_heads}; it must be at most {most} for "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        for field in ("rms_norm_eps", "rope_theta"):
            object.__setattr__(self, field, _positive_float(field, getattr(self, field)))
        for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ModelError(f"{field} is {shown(getattr(self, field))}; it must be true or false")
        if self.bos_token_id is not None:
            _check_whole("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        if not isinstance(self.eos_token_ids, tuple):
            raise ModelError(f"eos_token_ids is {shown(self.eos_token_ids)}; it must be a tuple of token ids")
        for token in self.eos_token_ids:
            _check_whole("eos_token_id", token, 0, self.vocab_size - 1)


def config_from_hf(path: Path) -> ModelConfig:
    """Read config.json (``path`` is the file or its folder) of a Hugging Face Llama model.

    Keys that mixkv does not know are ignored; those that would change the computation are refused. A
    generation_config.json beside it may add end-of-text ids; one that is not valid JSON adds none. No code of the
    folder is ever imported. Keys: https://huggingface.co/docs/transformers/model_doc/llama (LlamaConfig).

    Raises:
        ModelError: names the file, the key, what was found and what is allowed.

    """
    file = path / "config.json" if path.is_dir() else path
    keys = read_json_object(file)
    try:
        config = _from_keys(keys)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    return _with_generation_config(config, file.with_name("generation_config.json"))


def _from_keys(keys: dict[str, Any]) -> ModelConfig:
    _refuse_unsupported(keys)
    required = {*_LARGEST, "rms_norm_eps"} - {"num_key_value_heads", "head_dim"}
    if missing := sorted(required - keys.keys()):
        raise ModelError(f"missing {', '.join(missing)}")
    heads = keys["num_attention_heads"]
    kv_heads = keys.get("num_key_value_heads")
    head_dim = keys.get("head_dim")
    # Values go in as found: ModelConfig refuses those of a wrong type or range by name.
    return ModelConfig(
        architecture=keys["model_type"],
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=_derived_head_dim(keys["hidden_size"], heads) if head_dim is None else head_dim,
        rope_theta=_rope_theta(keys),
        tie_word_embeddings=keys.get("tie_word_embeddings", False),
        attention_bias=keys.get("attention_bias", False),
        mlp_bias=keys.get("mlp_bias", False),
        bos_token_id=keys.get("bos_token_id"),
        eos_token_ids=_token_ids(keys.get("eos_token_id")),
        **{key: keys[key] for key in required},
    )


def _refuse_unsupported(keys: dict[str, Any]) -> None:
    supported = ", ".join(f"{model_type} ({name})" for model_type, name in ARCHITECTURES.items())
    if keys.get("auto_map"):
        raise ModelError(
            f"auto_map asks to run Python code that came with the model; mixkv never does: use {supported}"
        )
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(f"model_type is {shown(model_type)}; supported: {supported}")
    classes = keys.get("architectures")
    if classes is not None and classes != [ARCHITECTURES[model_type]]:
        raise ModelError(f"architectures is {shown(classes)}; supported: {supported}")
    activation = keys.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act is {shown(activation)}; supported: silu")
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is what MLX writes
        if keys.get(key) is not None:
            raise ModelError(f"{key} is {shown(keys[key])}; only weights that are not quantized are supported")


def _rope_theta(keys: dict[str, Any]) -> Any:
    """The rotary base, unchecked: top level (old form) or inside rope_parameters; only plain rotation passes."""
    found = {}
    places = {"": keys}
    for key in ("rope_scaling", "rope_parameters"):
        rope = keys.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ModelError(f"{key} is {shown(rope)}; it must be null or an object")
        _check_rope_type(key, rope)
        places[f"{key}."] = rope
    for prefix, place in places.items():
        if "rope_theta" in place:
            found[f"{prefix}rope_theta"] = place["rope_theta"]
        factor = place.get("partial_rotary_factor")
        if factor is not None and (isinstance(factor, bool) or factor != 1):
            raise ModelError(f"{prefix}partial_rotary_factor is {shown(factor)}; supported: 1")
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ModelError("; ".join(f"{key} is {shown(value)}" for key, value in found.items()) + "; they must agree")
    return values[0] if values else 10_000.0


def _check_rope_type(key: str, rope: dict[str, Any]) -> None:
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    # Without a type, anything beyond the base (a factor, a table per kind of layer) has a meaning we would miss.
    if not kinds and not rope.keys() <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        raise ModelError(f"{key} is {shown(rope)}, without a rope_type; supported: default")
    for kind in kinds:
        if kind != "default":
            raise ModelError(f"{key} has the rope type {shown(kind)}; supported: default")


def _with_generation_config(config: ModelConfig, file: Path) -> ModelConfig:
    try:
        extra = read_json_object(file).get("eos_token_id")
    except ModelError:  # optional: absent or unreadable, it only means that it adds nothing
        return config
    try:
        # The check comes before the union, which needs hashable ids.
        replace(config, eos_token_ids=_token_ids(extra))
        return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *_token_ids(extra)))))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def _token_ids(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _derived_head_dim(hidden_size: Any, heads: Any) -> int:
    _check_whole("hidden_size", hidden_size, 1, limits.MAX_HIDDEN_SIZE)
    _check_whole("num_attention_heads", heads, 1, limits.MAX_HEADS)
    if hidden_size % heads:
        raise ModelError(f"hidden_size is {hidden_size}; without head_dim it must be a multiple of {heads} heads")
    return int(hidden_size // heads)


def _check_whole(field: str, value: object, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:  # bool is a subclass of int, hence type()
        raise ModelError(f"{field} is {shown(value)}; it must be a whole number from {smallest} to {largest}")


def _positive_float(field: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ModelError(f"{field} is {shown(value)}; it must be a finite number above 0")
    return number
