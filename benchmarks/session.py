"""Whole decode steps of a model, by cache policy: `python benchmarks/session.py`. See README.md next to this file."""

import argparse
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

import mixkv
from mixkv import CachePolicy, Session

POLICIES = {
    "4 bits": CachePolicy(),
    "8 bits": CachePolicy(k_bits=8, v_bits=8),
    "float16": CachePolicy(k_bits=16, v_bits=16),
}


@dataclass
class Steps:
    """What was measured of one policy, in seconds."""

    session: Session
    plain: list[float] = field(default_factory=list)  # steps that sealed no tile
    sealing: list[float] = field(default_factory=list)  # steps that did

    def step(self, token_id: int) -> None:
        """Decode one token."""
        tiles = self._tiles()
        begun = time.perf_counter()
        self.session.forward([token_id], logits="last")
        seconds = time.perf_counter() - begun
        (self.plain if self._tiles() == tiles else self.sealing).append(seconds)

    def _tiles(self) -> int:
        """How many tiles are codes, in all layers together."""
        return sum(layer.old.stop for layer in self.session.cache.layers)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time decode steps of a model with several caches, in turns.")
    parser.add_argument("--model", default="smollm2", help="what mixkv.load takes (%(default)s)")
    parser.add_argument("--depth", type=int, default=7_900, help="tokens before the first step (%(default)s)")
    parser.add_argument("--steps", type=int, default=256, help="decode steps of each cache (%(default)s)")
    options = parser.parse_args()
    if options.depth < 1 or options.steps < 1:
        parser.error("--depth and --steps must be at least 1")
    return options


def main() -> None:
    """Run what the options say."""
    options = arguments()
    model = mixkv.load(options.model)
    vocab = model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, options.depth + options.steps)
    found = {}
    for name, policy in POLICIES.items():
        found[name] = Steps(Session(model, policy))
        begun = time.perf_counter()
        found[name].session.forward(ids[: options.depth], logits=None)
        rate = options.depth / (time.perf_counter() - begun)
        print(f"{name:8}  {options.depth} tokens read, {rate:.0f} tokens/s", flush=True)
    for token_id in ids[options.depth :]:
        for steps in found.values():
            steps.step(int(token_id))
    print("\ncache     tokens/s  median ms  best ms  sealing / median  worst   KV MB")
    for name, steps in found.items():
        median, sealing = statistics.median(steps.plain), steps.sealing or [float("nan")]
        print(
            f"{name:8}  {1 / median:8.1f}  {median * 1e3:9.2f}  {min(steps.plain) * 1e3:7.2f}  "
            f"{statistics.median(sealing) / median:16.2f}  {max(sealing) / median:5.2f}  "
            f"{steps.session.nbytes()['total'] / 1e6:6.1f}"
        )


if __name__ == "__main__":
    main()
