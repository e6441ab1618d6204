"""A tiny gpt-oss whose experts are MXFP4, as the published ones are, and what transformers says of it.

    python tests/data/make_tiny_mxfp4.py tests/data/tiny_gpt_oss_mxfp4

needs transformers 5.24 and torch. transformers reads the folder itself and makes the blocks numbers, in float32. Recorded
are config.json and model.safetensors, all but the experts in bfloat16, and reference.npz: ids (T,), positions (P,), logits
(P, V), and gate_up and down, the experts' matrices of the first layer as transformers has them, float32 (experts, inputs,
outputs).
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from make_tiny_models import BASE, LENGTH, MODELS, scatter_weights
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
EXPERTS = ("gate_up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    config = transformers.GptOssConfig(**(BASE | MODELS["gpt_oss"][1] | SIZES))
    torch.manual_seed(4)
    model = transformers.GptOssForCausalLM(config).float().eval()
    scatter_weights(model)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    held = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(EXPERTS):
            held |= random_blocks(name, value.shape)
        else:
            held[name] = value.bfloat16()
    save_file(held, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    keys |= {"dtype": "bfloat16", "quantization_config": {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(keys, indent=1) + "\n")
    loaded = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).float().eval()  # fmt: skip
    experts = loaded.model.layers[0].mlp.experts
    ids = torch.randint(3, config.vocab_size, (LENGTH,))
    positions = sorted({*range(0, LENGTH, 7), LENGTH - 1})
    with torch.inference_mode():
        logits = loaded(ids[None]).logits[0, positions].float()
    print(f"logits' deviation {float(logits.std()):.2f}, experts are {experts.gate_up_proj.dtype}")
    np.savez_compressed(
        folder / "reference.npz", ids=ids.numpy(), positions=np.array(positions), logits=logits.numpy(),
        gate_up=experts.gate_up_proj.detach().float().numpy(), down=experts.down_proj.detach().float().numpy(),
    )  # fmt: skip


def random_blocks(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    """Any codes in the place of a stack of matrices (experts, inputs, outputs), with exponents of -6 to -3."""
    experts, inputs, outputs = shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(121, 125, blocks.shape[:3], dtype=torch.uint8)}


if __name__ == "__main__":
    main()
