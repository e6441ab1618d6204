"""config.json of a Hugging Face folder, in its old and its new form, as a ``ModelConfig``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from . import limits
from .architectures import FAMILIES
from .check import read_json_object, shown, whole
from .config import ARCHITECTURES, LARGEST, ModelConfig
from .errors import ModelError
from .hf_rope import ropes_from_keys

_SAME = {  # keys that are fields by the same name; the first five must be there
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "bos_token_id",
}  # fmt: skip
_REQUIRED = sorted(_SAME - {"bos_token_id"}) + ["intermediate_size", "rms_norm_eps"]


def config_from_hf(path: Path) -> ModelConfig:
    """Read config.json (``path`` is the file or its folder) of a model of one of ``ARCHITECTURES``.

    Keys that mixkv does not know are ignored; those that would change the computation are refused. A
    generation_config.json beside it may add end-of-text ids; one that is not valid JSON adds none. No code of the
    folder is ever imported. Keys: the ...Config classes of https://huggingface.co/docs/transformers.

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
    family = FAMILIES[keys["model_type"]]
    if missing := sorted(set(_REQUIRED) - keys.keys()):
        raise ModelError(f"missing {', '.join(missing)}")
    heads = keys["num_attention_heads"]
    kv_heads, head_dim = keys.get("num_key_value_heads"), keys.get("head_dim")
    head_dim = _derived_head_dim(keys["hidden_size"], heads) if head_dim is None else head_dim
    # Values go in as found: ModelConfig refuses those of a wrong type or range by name.
    fields: dict[str, Any] = {key: keys.get(key) for key in _SAME}
    fields |= {
        "architecture": keys["model_type"],
        "intermediate_size": keys["intermediate_size"],
        "rms_norm_eps": keys["rms_norm_eps"],
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": keys.get("tie_word_embeddings", family.tied),
        "activation": _activation(keys, family.activations),
        "eos_token_ids": _token_ids(keys.get("eos_token_id")),
    }
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "max_position_embeddings"):
        whole(field, fields[field], 1, LARGEST[field])  # as ModelConfig does; but they are counted with before
    ropes = ropes_from_keys(
        keys, fields, family.rope_types, partial=family.partial_rope, local=family.local_rope
    )  # fmt: skip
    return ModelConfig(**(fields | ropes | family.fields(keys)))


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
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is what MLX writes
        if keys.get(key) is not None:
            raise ModelError(f"{key} is {shown(keys[key])}; only weights that are not quantized are supported")


def _activation(keys: dict[str, Any], activations: dict[str, str]) -> str:
    """The activation under our name; ``activations`` has those of the family, the first is what it is unless said."""
    key = "hidden_act" if keys.get("hidden_activation") is None else "hidden_activation"
    found = keys.get(key, next(iter(activations)))
    if not isinstance(found, str) or found not in activations:
        raise ModelError(f"{key} is {shown(found)}; supported: {', '.join(activations)}")
    return activations[found]


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
    whole("hidden_size", hidden_size, 1, limits.MAX_HIDDEN_SIZE)
    whole("num_attention_heads", heads, 1, limits.MAX_HEADS)
    if hidden_size % heads:
        raise ModelError(f"hidden_size is {hidden_size}; without head_dim it must be a multiple of {heads} heads")
    return int(hidden_size // heads)
