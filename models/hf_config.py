"""config.json of a Hugging Face folder, in its old and its new form, as a ``ModelConfig``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from . import limits
from .architectures import FAMILIES, LAYER_TYPES, Family
from .check import read_json_object, shown, whole
from .config import ARCHITECTURES, LARGEST, ModelConfig
from .errors import ModelError
from .hf_rope import ropes_from_keys

_SIZES = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size")
_SAME = (*_SIZES, "intermediate_size", "rms_norm_eps")  # fields by the same name; they must be there


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
    if missing := sorted(set(_SAME) - keys.keys()):
        raise ModelError(f"missing {', '.join(missing)}")
    keys = {**family.defaults, **keys}
    heads = keys["num_attention_heads"]
    kv_heads, head_dim = keys.get("num_key_value_heads"), keys.get("head_dim")
    head_dim = _derived_head_dim(keys["hidden_size"], heads) if head_dim is None else head_dim
    # Values go in as found: ModelConfig refuses those of a wrong type or range by name.
    fields: dict[str, Any] = {key: keys[key] for key in _SAME}
    fields |= {
        "architecture": keys["model_type"],
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": keys.get("tie_word_embeddings", family.tied),
        "activation": _activation(keys, family),
        "bos_token_id": keys.get("bos_token_id"),
        "eos_token_ids": _token_ids(keys.get("eos_token_id")),
    }
    for field in (*_SIZES, "head_dim"):
        whole(field, fields[field], 1, LARGEST[field])  # as ModelConfig does; but they are counted with before
    config = ModelConfig(**(fields | ropes_from_keys(keys, fields, family) | family.fields(keys)))
    types = [LAYER_TYPES[window is not None] for window in config.sliding_windows]
    if keys.get("layer_types") not in (None, types):  # some families read it, and for some it can only be in the way
        raise ModelError(f"layer_types is {shown(keys['layer_types'])}; the other keys say {shown(types)}")
    return config


def _refuse_unsupported(keys: dict[str, Any]) -> None:
    supported = ", ".join(f"{model_type} ({name})" for model_type, name in ARCHITECTURES.items())
    model_type = keys.get("model_type")
    known = ARCHITECTURES.get(model_type, "") if isinstance(model_type, str) else ""
    if foreign := _foreign_code(keys.get("auto_map"), known):
        raise ModelError(
            f"auto_map asks to run Python code that came with the model, {shown(foreign[0])}; mixkv never does: use "
            f"{supported}"
        )
    if not known:
        raise ModelError(f"model_type is {shown(model_type)}; supported: {supported}")
    classes = keys.get("architectures")
    if classes is not None and classes != [known]:
        raise ModelError(f"architectures is {shown(classes)}; supported: {supported}")
    quantized = ["quantization_config", "compression_config", "quantization"]  # the last is what MLX writes
    known_way = keys.get(quantized[0])
    if model_type == "gpt_oss" and isinstance(known_way, dict) and known_way.get("quant_method") == "mxfp4":
        quantized.remove("quantization_config")  # the tensors say it, too
    for key in quantized:
        if keys.get(key) is not None:
            raise ModelError(
                f"{key} is {shown(keys[key])}; only weights that are not quantized, and mxfp4 of gpt_oss, are supported"
            )


def _foreign_code(auto_map: Any, known: str) -> list[Any]:
    """What of ``auto_map`` stands for no class of the ``known`` architecture, the name of its model or "".

    Older folders (Phi-3's) have a copy of the code that transformers has had since, under the names of its classes: what
    the model computes is known without it. Tokenizers are read from tokenizer.json, whatever is said of their code.
    """
    if not isinstance(auto_map, dict):
        return [auto_map] if auto_map else []
    stem = known.removesuffix("ForCausalLM")
    classes = {known, f"{stem}Model", f"{stem}Config"} if known else set()
    models = [value for key, value in auto_map.items() if not key.startswith(("AutoTokenizer", "AutoProcessor"))]
    return [value for value in models if not isinstance(value, str) or value.rpartition(".")[2] not in classes]


def _activation(keys: dict[str, Any], family: Family) -> str:
    """The activation under our name."""
    key, known = family.activation_key, family.activations
    found = keys.get(key, next(iter(known)))
    if not isinstance(found, str) or found not in known:
        raise ModelError(f"{key} is {shown(found)}; supported: {', '.join(known)}")
    return known[found]


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
