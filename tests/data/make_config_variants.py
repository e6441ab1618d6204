"""Make config_variants.json: configs that are almost those of tiny_models/, and what transformers makes of each.

How to run, in an environment that has torch, transformers and numpy (nothing but numpy is needed to *use* the data)::

    python make_config_variants.py tiny_models config_variants.json

A variant is a config.json with some keys removed or changed, beside the weights of the model. Recorded are

* ``logits``: lists of float32 numbers, the logits of position ``POSITION``, computed in float32 with eager attention;
* ``variants``: model, removed or changed keys ({"key": null} is null, an absent key stands in ``"removed"``), and which of
  ``logits`` it gives, or -1 where transformers refuses it;
* ``defaults``: for each model_type the keys of a config with nothing but ``SIZES``, as transformers fills them in.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

POSITION = 77
SIZES = {
    "vocab_size": 61, "hidden_size": 512, "intermediate_size": 48, "num_hidden_layers": 30, "num_attention_heads": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
}  # fmt: skip
REMARKS = {  # keys that say nothing about the computation
    "transformers_version", "dtype", "architectures", "model_type", "use_cache", "initializer_range", "attention_dropout",
    "pad_token_id", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "embd_pdrop", "resid_pdrop",
    "pretraining_tp", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip
SOME = ["full_attention", "sliding_attention", "full_attention"]
OLD = {"rope_parameters": "", "rope_theta": 5000.0}  # "" removes a key
PARTS = {kind: {"rope_type": "default"} for kind in ("full_attention", "sliding_attention")}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.1] * 5, "long_factor": [2.2] * 5}
CHANGES: list[dict[str, Any]] = [
    {"sliding_window": 20}, {"sliding_window": 20, "use_sliding_window": True},
    {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 20, "use_sliding_window": False, "layer_types": SOME},
    {"sliding_window": 20, "use_sliding_window": True, "layer_types": SOME},
    {"sliding_window": 20, "layer_types": ["sliding_attention"] * 3},
    {"hidden_act": "gelu"}, {"hidden_activation": "gelu"}, {"hidden_activation": "silu", "hidden_act": "relu"},
    {"hidden_act": "swish"}, {"partial_rotary_factor": 0.5}, {"rope_theta": 777.0}, {"norm_topk_prob": True},
    {"mlp_only_layers": [0, 2]}, {"swiglu_limit": 3.0}, {"query_pre_attn_scalar": 100}, {"attn_logit_softcapping": 3.0},
    {"final_logit_softcapping": 3.0}, {"logits_scaling": 2.0}, {"residual_multiplier": 0.5},
    {"no_rope_layers": [0, 0, 0]}, {"no_rope_layer_interval": 2, "no_rope_layers": ""},
    {"sliding_window_pattern": 2, "layer_types": ""}, {"_sliding_window_pattern": 2, "layer_types": ""},
    {"rope_local_base_freq": 500.0}, {"rope_local_base_freq": 500.0, "rope_parameters": PARTS},
    {"original_max_position_embeddings": 64}, {"tie_word_embeddings": True}, {"num_key_value_heads": ""},
    {"rope_parameters": PARTS, "rope_theta": 777.0}, {"rope_parameters": {"rope_theta": 777.0, **PARTS}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, {"rope_parameters": ""},
    {**OLD, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {**OLD, "rope_scaling": YARN},
    {**OLD, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    {**OLD, "rope_scaling": {**YARN, "mscale": 0.7}},
    {**OLD, "rope_scaling": {key: YARN[key] for key in ("rope_type", "factor")}},
    {**OLD, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}},
    {**OLD, "rope_scaling": LONG, "original_max_position_embeddings": 32},
    {**OLD, "rope_scaling": {**LONG, "original_max_position_embeddings": 32}, "original_max_position_embeddings": ""},
    {**OLD, "rope_scaling": {**LONG, "factor": 3.0}, "original_max_position_embeddings": 32},
    {**OLD, "rope_scaling": {**LONG, "attention_factor": 1.5}, "original_max_position_embeddings": 32},
]  # fmt: skip


def changes_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All variants of one config: each key removed, null, or the other way round, and ``CHANGES``."""
    for key in sorted(config.keys() - REMARKS):
        yield {key: ""}
        if config[key] is not None:
            yield {key: None}
        if isinstance(config[key], bool):
            yield {key: not config[key]}
    ropes = config["rope_parameters"]
    for key, value in ropes.items():
        yield {"rope_parameters": {name: x for name, x in ropes.items() if name != key}}
        for inner in value if isinstance(value, dict) else ():
            fewer = {name: x for name, x in value.items() if name != inner}
            yield {"rope_parameters": {**ropes, key: fewer}}
    yield from CHANGES


def logits_of(config: dict[str, Any], model: Path, folder: Path, ids: torch.Tensor) -> np.ndarray | None:
    """What transformers computes, or None where it does not."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to((model / "model.safetensors").resolve())
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if any(info.values()):  # weights that are missing, or left over
            return None
        with torch.inference_mode():
            return loaded.eval()(ids[None]).logits[0, POSITION].numpy()
    except Exception:
        return None


def defaults_of(model_type: str) -> dict[str, Any]:
    keys = transformers.AutoConfig.for_model(model_type, **SIZES).to_dict()
    return {key: value for key, value in sorted(keys.items()) if key not in REMARKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logits: list[list[float]] = []
    variants, types = [], set()
    for model in sorted(arguments.models.iterdir()):
        config = json.loads((model / "config.json").read_text())
        types.add(config["model_type"])
        ids = torch.from_numpy(np.load(model / "reference.npz")["ids"])
        seen: list[dict[str, Any]] = [config]
        for change in changes_of(config):
            removed = [key for key, value in change.items() if value == ""]
            changed = {key: value for key, value in change.items() if value != ""}
            variant = {key: value for key, value in copy.deepcopy(config | changed).items() if key not in removed}
            if variant in seen:
                continue
            seen.append(variant)
            with tempfile.TemporaryDirectory() as folder:
                found = logits_of(variant, model, Path(folder), ids)
            row = [] if found is None else [round(float(x), 5) for x in found]
            if row and row not in logits:
                logits.append(row)
            variants.append([model.name, removed, changed, logits.index(row) if row else -1])
    with arguments.output.open("w") as file:
        lists = {"logits": logits, "variants": variants}
        parts = [
            f'"{name}": [\n' + ",\n".join(json.dumps(x, separators=(",", ":")) for x in rows) + "\n]"
            for name, rows in lists.items()
        ]
        defaults = {model_type: defaults_of(model_type) for model_type in sorted(types)}
        file.write("{" + ",\n".join([*parts, f'"defaults": {json.dumps({"sizes": SIZES, **defaults})}']) + "}\n")
    print(f"{len(variants)} variants, {sum(x[3] < 0 for x in variants)} refused, {len(logits)} results")


if __name__ == "__main__":
    main()
