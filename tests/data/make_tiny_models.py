"""Make tiny_models/: a random model of each architecture, and its logits as transformers computes them.

How to run, in an environment that has torch, transformers, safetensors and numpy (only numpy is needed to *use* the data)::

    python make_tiny_models.py tiny_models [NAME ...]

Each model is small but has what is easily taken for granted: heads * head_dim differs from the hidden size, query heads
share KV heads, norms are not all ones, biases not zero, logits vary by several units, texts go beyond every sliding window
and the context that a rotary embedding was stretched from. Parameters are drawn as bfloat16 numbers, so the weights of
the folder are bfloat16, and exact in float32; nothing else is rounded, rotary frequencies least of all.

For each model there is a folder with config.json and model.safetensors (bfloat16), and reference.npz with

* ``ids``: int64 (T,)
* ``positions``: int64 (P,), every 7th position and the last
* ``logits``: float32 (P, V), computed in float32 over the whole text at once, with eager attention.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

LENGTH = 90
BASE = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
HEAD = {"head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = np.linspace(1.0, 1.6, 5).round(3).tolist()
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": FACTORS, "long_factor": [2 * x for x in FACTORS],
        "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "llama_llama3": ("Llama", {**HEAD, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", {**HEAD, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}}),
    "llama_yarn": ("Llama", {**HEAD, "rope_parameters": YARN}),
    "llama_dynamic": ("Llama", {**HEAD, "max_position_embeddings": 32,
                                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", {**HEAD, "sliding_window": 20}),
    "mixtral": ("Mixtral", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 20,
                        "max_window_layers": 1}),
    "qwen3": ("Qwen3", HEAD),
    "qwen3_moe": ("Qwen3Moe", {**HEAD, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                               "norm_topk_prob": False, "mlp_only_layers": [1]}),
    "gemma2": ("Gemma2", {**HEAD, "sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 8.0}),
    "gemma3": ("Gemma3Text", {**HEAD, "sliding_window": 20, "query_pre_attn_scalar": 24, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0}}}),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "phi3_longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi3_partial": ("Phi3", {"hidden_size": 64, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}),
    # As GGUF can say them: without windows, and with every fourth layer not turning
    "mistral_plain": ("Mistral", {**HEAD, "sliding_window": None}),
    "qwen2_plain": ("Qwen2", {}),
    "smollm3_four": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.4,
                            "attention_multiplier": 0.2, "attention_bias": True}),
    "gpt_oss": ("GptOss", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 1.0}}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        make(name, arguments.output / name)


def make(name: str, folder: Path) -> None:
    """One model's folder."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(BASE | changes))
    cls = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(sum(map(ord, name)))
    model = cls(config).float().eval()
    scatter_weights(model)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = cls.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    exact = cls.from_pretrained(folder, dtype=torch.float64, **eager).eval()
    for own, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(own, other), "read back otherwise than written"
    ids = torch.randint(3, config.vocab_size, (LENGTH,))
    positions = sorted({*range(0, LENGTH, 7), LENGTH - 1})
    with torch.inference_mode():
        logits = loaded(ids[None]).logits[0, positions]
        error = float((exact(ids[None]).logits[0, positions] - logits).abs().max())
    print(f"{name}: logits' deviation {float(logits.std()):.2f}, error of float32 {error:.1e}")
    np.savez_compressed(
        folder / "reference.npz", ids=ids.numpy(), positions=np.array(positions), logits=logits.float().numpy()
    )
    file = folder / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"dtype": "bfloat16"}, indent=1) + "\n")


def scatter_weights(model: torch.nn.Module) -> None:
    """Draw every parameter as a bfloat16 number: matrices and biases about 0, norms about their own middle."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.4 * torch.rand_like(parameter) - 0.2
            elif name.endswith("sinks"):
                parameter.normal_(1.0, 1.0)
            else:
                parameter.normal_(0.0, 0.25)
            parameter.copy_(parameter.bfloat16().float())


if __name__ == "__main__":
    main()
