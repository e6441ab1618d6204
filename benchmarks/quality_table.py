"""What caches cost a model in quality and in bytes, as the table of docs/quality.md.

    python benchmarks/quality_table.py gemma3-270m              # a name or path as `mixkv` takes it
    python benchmarks/quality_table.py qwen-like                # a tiny random model with huge channels in its keys

All policies read the same tokens of the default text side by side, with float32 weights, beside a cache of float32.
"""

import argparse

import mixkv
from mixkv import CachePolicy, Session
from mixkv.experiments.evaluate import evaluate_each
from mixkv.experiments.texts import default_text
from mixkv.models.load import Model
from mixkv.models.tiny import tiny_model

POLICIES = ("f16", "k8v8", "k8v4", "balanced", "small", "k3v2", "tiny", "k2v2")
CHUNK = 64  # tokens whose logits exist at once


def model_of(name: str) -> Model:
    """The model, its weights in float32."""
    if name == "qwen-like":
        return tiny_model("qwen2", 1, weights="f32", key_bias=100, attention_bias=True, head_dim=32)
    return mixkv.load(name, "f32")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", "--tokens", type=int, default=2048)
    parser.add_argument("--policies", default=",".join(POLICIES))
    arguments = parser.parse_args()
    model = model_of(arguments.model)
    names = arguments.policies.split(",")
    policies = [CachePolicy.parse(name) for name in names]
    ids = model.encode(default_text()[: 16 * arguments.tokens])[: arguments.tokens]
    sessions = [Session(model, policy) for policy in policies]
    found = evaluate_each(Session(model, CachePolicy.full()), sessions, ids, chunk=CHUNK)
    config, layers = model.config, model.config.num_hidden_layers
    half = 4 * layers * config.num_key_value_heads * config.head_dim  # bytes of a token in float16
    print("| policy | bits | mean KL | median | 99 % | 99.9 % | largest | same top-1 | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, policy, one, session in zip(names, policies, found, sessions, strict=True):
        each = [policy.for_layer(i, layers) for i in range(layers)]
        tiers = each[0].nbytes_per_token(config.num_key_value_heads, config.head_dim)[0]
        values = 2 * config.num_key_value_heads * config.head_dim
        bits = ", ".join(f"{8 * nbytes / values:.3g}" for nbytes in tiers)
        kld, memory = one.kld, session.nbytes()["total"] / (half * len(ids))
        numbers = (f"{x:.5f}" for x in (kld.mean, kld.median))
        tails = (f"{x:.4f}" for x in (kld.p99, kld.p999, kld.max))
        print(
            f"| `{name}` | {bits} | {' | '.join((*numbers, *tails))} | {one.top1:.1%} | {memory:.1%} |".replace(
                "%", " %"
            )
        )


if __name__ == "__main__":
    main()
