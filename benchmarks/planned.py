"""How much better a planned policy is than uniform ones of the same bytes, on text that it was not made for.

    python benchmarks/planned.py topics.txt [--model smollm2] [--bits 4] [--tokens 1024] [--pieces 3]

The plan is made on the first tokens, as ``mixkv plan`` makes it; every policy is then measured on the pieces behind them,
each read by itself. Float32 weights; mean KL divergence in nats from a float32 cache, from the first codes on.
"""

import argparse
import sys
from pathlib import Path

import mixkv
from mixkv import CachePolicy
from mixkv.experiments.plan import Reference, find

UNIFORM = {
    4: ["k4v3", "tile=32 old=k4c/v2t32", "tile=32 old=k3c/v3t32"],
}
UNROTATED = "rot=none scales=range"


def main() -> None:
    """Print a table: a policy a row, a piece of text a column."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=int, choices=sorted(UNIFORM), default=4, help="of a value, scales included")
    parser.add_argument("--tokens", type=int, default=1024, help="of a piece")
    parser.add_argument("--pieces", type=int, default=3)
    options = parser.parse_args()
    model = mixkv.load(options.model, "f32")
    ids, base = model.encode(options.text.read_text(encoding="utf-8")), CachePolicy()
    config, n = model.config, options.tokens
    budget = options.bits / 8 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    planned = find(
        model, ids, base, budget, n_tokens=n,
        progress=lambda done, total: print(f"\rmeasuring {done}/{total}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    policies = {"planned": planned.policy}
    for text in UNIFORM[options.bits]:
        policies[text] = CachePolicy.parse(text)
        line = str(policies[text]).replace("rot=kv scales=fit", UNROTATED)
        policies[f"{text} {UNROTATED}"] = CachePolicy.parse(line)
    starts = [n * (i + 1) for i in range(options.pieces)]
    print(f"planned on 0 - {n}: {planned.nbytes:g} bytes an old token, KL {planned.predicted:.5f} predicted, "
          f"{planned.measured:.5f} measured\n{planned.policy}\n")  # fmt: skip
    print(f"| {options.bits} bits a value | " + " | ".join(f"{start} - {start + n}" for start in starts) + " |")
    print("|---" * (len(starts) + 1) + "|")
    rows: dict[str, list[float]] = {name: [] for name in policies}
    for start in starts:
        reference = Reference(model, ids[start : start + n], base.window + base.tile)
        for name, policy in policies.items():
            rows[name].append(reference.divergence(policy))
    for name, klds in rows.items():
        print(f"| {name} | " + " | ".join(f"{kld:.5f}" for kld in klds) + " |")


if __name__ == "__main__":
    main()
