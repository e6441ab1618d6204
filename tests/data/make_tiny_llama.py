"""Make tiny_llama/: a random model of the Llama architecture and its logits as transformers computes them.

How to run, in an environment that has torch, transformers and numpy (none but numpy is needed to *use* the data)::

    python make_tiny_llama.py tiny_llama

The model is small but has what is easily taken for granted: heads * head_dim differs from the hidden size, several
query heads share a KV head, the attention's projections have biases, the output is not tied to the embedding, norms
are not all ones. Its weights are large enough that logits vary by several units, so that a mistake anywhere shows.

tiny_llama/ then holds config.json and model.safetensors (float32) and reference.npz, with for each i of 0, 1, 2

* ``ids_i``: int64, (T,), T = 1, 17, 120
* ``positions_i``: int64, (P,), every 10th position from 0 and the last
* ``logits_i``: float32, (P, 97), computed in float32 over the whole sequence at once.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = (1, 17, 120)
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    folder = parser.parse_args().output
    torch.manual_seed(20_26)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(CONFIG).float().eval()
    scatter_weights(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Read back: the logits are those of the file.
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    np.savez(folder / "reference.npz", **reference(loaded))


def scatter_weights(model: LlamaForCausalLM) -> None:
    """Draw every parameter: matrices and biases about 0, norms about 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.3)


def reference(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The ids, positions and logits of each sequence; float64 tells how much of the logits float32 leaves in doubt."""
    arrays = {}
    exact = LlamaForCausalLM(CONFIG).double().eval()
    exact.load_state_dict(model.state_dict())
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(0, CONFIG.vocab_size, (length,))
        positions = sorted({*range(0, length, 10), length - 1})
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, positions]
            error = float((exact(ids[None]).logits[0, positions] - logits).abs().max())
        print(f"{length} ids: logits' deviation {float(logits.std()):.2f}, error of float32 {error:.1e}")
        arrays |= {f"ids_{index}": ids.numpy(), f"positions_{index}": np.array(positions, np.int64)}
        arrays[f"logits_{index}"] = logits.numpy()
    return arrays


if __name__ == "__main__":
    main()
