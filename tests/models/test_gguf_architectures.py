"""The tiny models written as GGUF, by ggml's own package, say the same as from their folders."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mixkv import CachePolicy, Session
from mixkv.experiments.convert import convert
from mixkv.models.errors import ModelError
from mixkv.models.gguf import open_gguf
from mixkv.models.gguf_config import config_from_gguf
from mixkv.models.load import load
from mixkv.models.rope import Rope

from .tiny_models import FOLDER, NAMES, reference, tensors

Float32 = NDArray[np.float32]
ARCHS = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3", "olmo2": "olmo2",
    "granite": "granite", "gpt_oss": "gpt-oss",
}  # fmt: skip
# What the format, or llama.cpp, has no word for: windows of Qwen 2, layers of SmolLM3 that turn otherwise than
# all but every fourth, and contexts that stretch while they grow; three of these have models besides that it has words for
WITHOUT = {"llama_dynamic", "qwen2", "smollm3"}
PERMUTED = {"llama", "mistral", "mixtral", "smollm3", "granite"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def permuted(x: Float32, heads: int) -> Float32:
    """Rows of a rotary projection as llama.cpp wants them: row j and row j + half of a head become neighbours."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def renamed(kind: str, name: str) -> str:
    """A tensor's name in the file, "" for what is part of a stack."""
    if not name.startswith("model.layers."):
        stems = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem, _, ending = name.rpartition(".")
        return f"{stems[stem]}.{ending}"
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    if "experts" in rest:
        return ""
    stem, _, ending = rest.rpartition(".")
    after = "post_attention_norm" if kind in ("gemma2", "gemma3_text", "olmo2", "gpt_oss") else "ffn_norm"
    return f"blk.{layer}.{(PARTS | {'post_attention_layernorm': after})[stem]}.{ending}"


def stacks(kind: str, held: dict[str, Float32], layer: int, count: int) -> dict[str, Float32]:
    """The experts of a layer, as the three matrices that hold all of them."""
    prefix = f"model.layers.{layer}."
    if kind == "gpt_oss":
        both, down = held[f"{prefix}mlp.experts.gate_up_proj"], held[f"{prefix}mlp.experts.down_proj"]
        biases = held[f"{prefix}mlp.experts.gate_up_proj_bias"]
        return {
            "ffn_gate_exps.weight": both[..., ::2].swapaxes(1, 2), "ffn_up_exps.weight": both[..., 1::2].swapaxes(1, 2),
            "ffn_down_exps.weight": down.swapaxes(1, 2), "ffn_gate_exps.bias": biases[:, ::2],
            "ffn_up_exps.bias": biases[:, 1::2], "ffn_down_exps.bias": held[f"{prefix}mlp.experts.down_proj_bias"],
        }  # fmt: skip
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    place = prefix + ("block_sparse_moe" if kind == "mixtral" else "mlp")
    found = {}
    for own, name in zip(("gate", "up", "down"), names, strict=True):
        every = [f"{place}.experts.{i}.{name}.weight" for i in range(count)]
        if every[0] in held:
            found[f"ffn_{own}_exps.weight"] = np.stack([held[x] for x in every])
    return found


def write(name: str, path: Path, changes: dict[str, Any] | None = None) -> None:
    """One of the tiny models as a GGUF file in float32, the keys as convert_hf_to_gguf.py writes them, but for ``changes``.

    Where these say None, there is no such key.
    """
    config, held = json.loads((FOLDER / name / "config.json").read_text()), tensors(name)
    kind, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, ARCHS[kind])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    ropes = config["rope_parameters"]
    write_rope(writer, ropes.get("full_attention", ropes), head_dim, config)
    for key, add in written(writer).items():
        if config.get(key) is not None:
            add(config[key])
    for key in ("num_local_experts", "num_experts"):
        if config.get(key):
            writer.add_expert_count(config[key])
            writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "gemma3_text":  # in this order llama.cpp has its default, and so the file says it
        writer.add_array("gemma3.attention.sliding_window_pattern", [True, True, False])
        writer.add_float32("gemma3.rope.freq_base_swa", ropes["sliding_attention"]["rope_theta"])
    for i in range(config["num_hidden_layers"]):
        if any("experts" in x and f"layers.{i}." in x for x in held):
            count = config.get("num_local_experts") or config["num_experts"]
            for own, x in stacks(kind, held, i, count).items():
                writer.add_tensor(f"blk.{i}.{own}", np.ascontiguousarray(x))
    for own, x in held.items():
        if target := renamed(kind, own):
            writer.add_tensor(target, np.ascontiguousarray(converted(kind, own, x, heads, kv_heads, config)))
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (changes or {}).items():
        writer.kv_data[0].pop(f"{ARCHS[kind]}.{key}", None)
        if value is not None:
            adders.get(type(value), writer.add_array)(f"{ARCHS[kind]}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(writer: gguf.GGUFWriter) -> dict[str, Callable[[Any], None]]:
    """The keys that are the same in both, but for their names."""
    return {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "norm_topk_prob": writer.add_expert_weights_norm,
    }


def write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int, config: dict[str, Any]) -> None:
    turned = int(head_dim * rope.get("partial_rotary_factor", 1))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "llama3":  # as the converter does: the frequencies' factors are a tensor
        fields = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        own = Rope(rope["rope_theta"], "llama3", original_context=rope["original_max_position_embeddings"], **fields)
        factors = Rope(rope["rope_theta"]).inverse_frequencies(turned, 1) / own.inverse_frequencies(turned, 1)
        writer.add_tensor("rope_freqs.weight", factors)
    elif kind == "longrope":
        original, most = rope["original_max_position_embeddings"], config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(most / original) / np.log(original))))
        for which in ("short", "long"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))
    elif kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def converted(kind: str, name: str, x: Float32, heads: int, kv_heads: int, config: dict[str, Any]) -> Float32:
    """A tensor as the file holds it."""
    if kind in PERMUTED and (".q_proj." in name or ".k_proj." in name):
        return permuted(x, heads if ".q_proj." in name else kv_heads)
    if not kind.startswith("gemma"):
        return x
    if name.endswith("norm.weight"):
        x = x + 1
    # There is no key for the softmax's scale, which is 1 / sqrt(head_dim) then: queries make up for it
    if (".q_proj." if kind == "gemma2" else ".q_norm.") in name:
        x = x * np.float32((config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5)
    return x


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write(name, tmp_path / "tiny.gguf")
    model = load(str(tmp_path / "tiny.gguf"), "f32")
    ids, positions, expected = reference(name)
    for pieces in (len(ids), 1):
        session = Session(model, CachePolicy.full())
        found = np.concatenate([session.forward(ids[i : i + pieces]) for i in range(0, len(ids), pieces)])
        assert np.abs(found[positions] - expected).max() < 2e-4


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama_llama3", "mixtral", "phi3_longrope", "qwen3_moe"])
def test_a_folder_made_of_a_file_says_the_same(name: str, tmp_path: Path) -> None:
    write(name, tmp_path / "tiny.gguf")
    report = convert(str(tmp_path / "tiny.gguf"), tmp_path / "folder")
    assert report["same"], report["differences"]
    ids, positions, expected = reference(name)
    found = Session(load(str(tmp_path / "folder")), CachePolicy.full()).forward(ids)
    assert found is not None and np.abs(found[positions] - expected).max() < 2e-4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("olmo2", {"attention.sliding_window": 20}, "olmo2.attention.sliding_window is 20: this is OLMo 3"),
        ("qwen2_plain", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window is 8, supported: 0"),
        ("qwen3", {"attention.sliding_window": 8}, "qwen3.attention.sliding_window is 8"),
        ("qwen3_moe", {"attention.sliding_window": 8}, "qwen3moe.attention.sliding_window is 8"),
        ("smollm3_four", {"attention.sliding_window": 8}, "smollm3.attention.sliding_window is 8"),
        ("granite", {"attention.sliding_window": 8}, "granite.attention.sliding_window is 8"),
        ("granite", {"rope.scaling.finetuned": False}, "finetuned is False, supported: True"),
        ("llama_llama3", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "'linear', supported beside"),
        ("llama_llama3", {"rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0, supported: 1.0"),
        ("llama_llama3", {"rope.scaling.type": "banana"}, "'banana', supported beside rope_freqs.weight: none"),
        ("llama_llama3", {"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5, supported: 1.0"),
        ("phi3_longrope", {"rope.scaling.type": "yarn"}, "'yarn', supported beside rope_factors_short.weight and"),
        ("phi3_longrope", {"rope.scaling.factor": 4.0}, "phi3.rope.scaling.factor is 4.0, supported: 1.0"),
        ("phi3_partial", {"rope.dimension_count_swa": 4}, "dimension_count_swa is 4, supported: 12"),
        ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func is 2, supported: 1"),
        ("qwen3_moe", {"expert_group_count": 2}, "expert_group_count is 2, supported: 1"),
        ("mixtral", {"interleave_moe_layer_step": 2}, "interleave_moe_layer_step is 2, supported: 1"),
        ("llama_linear", {"attention.scale": 0.01}, "attention.scale is 0.00"),
        ("llama_linear", {"logit_scale": 0.5}, "logit_scale is 0.5, supported: 1.0"),
        ("llama_linear", {"embedding_scale": 9.0}, "embedding_scale is 9.0, supported: 1.0"),
        ("llama_linear", {"residual_scale": 9.0}, "residual_scale is 9.0, supported: 1.0"),
        ("llama_linear", {"final_logit_softcapping": 2.0}, "final_logit_softcapping is 2.0, supported: 0"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping is 2.0, supported: 0"),
        ("gemma3", {"attention.key_length_swa": 8}, "key_length_swa is 8, supported: 16"),
        ("llama_linear", {"attention.clamp_kqv": 0.5}, "attention.clamp_kqv is 0.5, supported: 0"),
        ("llama_linear", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("gpt_oss", {"swiglu_clamp_exp": [1.0, 1.0, 1.0]}, "swiglu_clamp_exp is [1.0, 1.0, 1.0], supported: 0"),
        ("granite", {"logit_scale": None}, "no granite.logit_scale, expected a number"),
        ("gpt_oss", {"attention.sliding_window": None}, "no gpt-oss.attention.sliding_window"),
        ("llama_yarn", {"rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor is 0, supported: 1 or -1"),
        ("llama_yarn", {"rope.scaling.yarn_attn_factor": 2.0}, "yarn_attn_factor is 2.0, supported: 1.0"),
        ("llama_yarn", {"rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier is 0.5, supported: 0"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_followed_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(name, tmp_path / "tiny.gguf", changes)
    with pytest.raises(ModelError, match=re.escape(message)):
        config_from_gguf(open_gguf(tmp_path / "tiny.gguf"))


def test_absent_keys_are_what_llama_cpp_takes_them_for(tmp_path: Path) -> None:
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    write("gemma2", tmp_path / "tiny.gguf", dict.fromkeys(keys))
    config = config_from_gguf(open_gguf(tmp_path / "tiny.gguf"))
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.sliding_windows == (4096, None, 4096)
    write("phi3_longrope", tmp_path / "phi3.gguf", {"rope.scaling.type": "longrope"})
    assert config_from_gguf(open_gguf(tmp_path / "phi3.gguf")).rope.rope_type == "longrope"
