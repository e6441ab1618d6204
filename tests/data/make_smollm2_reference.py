"""Make smollm2_reference.json: what transformers computes with the default model, for our tests to agree with.

How to run, in an environment that has torch, transformers, gguf and accelerate (none of them is needed to *use* the
data; a CPU is enough, about a minute)::

    python make_smollm2_reference.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2_reference.json

The weights are dequantized to float32 by transformers and everything is computed in float32. The file holds

* ``continuations``: for each prompt its text, its token ids, the ids of 24 greedy steps (plain argmax, which does not
  stop at the end-of-text token) and for each step the gap between the best and the second-best logit. A prompt whose
  gaps are not all above ``smallest_gap`` is refused, since rounding alone could then decide a token.
* ``perplexity``: 1,000 token ids and the mean negative log-likelihood (natural log) of ids[1:], each given all the ids
  before it. The text is the Python manual's from pydoc_data, which changes with the version of Python: so the ids are
  kept here and are not to be made again.
"""

import argparse
import hashlib
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24
SMALLEST_GAP = 0.01
PERPLEXITY_TOKENS = 1_000
PROMPTS = {
    "facts": "The capital of France is",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "numbers": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,",
    "story": "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "question": "Question: Why is the sky blue during the day and red at sunset?\nAnswer:",
    "not English": "Il était une fois une petite fille qui vivait dans une forêt – 森の中に住んでいました。",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = load_tokenizer(arguments.gguf)
    with torch.inference_mode():
        reference = {
            "model": {"file": arguments.gguf.name, "sha256": sha256(arguments.gguf), "dtype": "float32"},
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf", "numpy")}
            | {"python": platform.python_version()},
            "smallest_gap": SMALLEST_GAP,
            "continuations": [continuation(model, tokenizer, name, text) for name, text in PROMPTS.items()],
            "perplexity": perplexity(model, tokenizer.encode("\n".join(topics[k] for k in sorted(topics)))),
        }
    arguments.output.write_text(lines_of(reference), encoding="utf-8")


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer of the GGUF file with the split that its ``pre`` key, "smollm", asks for.

    transformers does not read that key: it leaves out that every digit is a piece of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def continuation(model: Any, tokenizer: Any, name: str, text: str) -> dict[str, Any]:
    """Greedy decoding over a cache, confirmed by one pass without a cache, from which the gaps are taken."""
    prompt: list[int] = tokenizer.encode(text)
    chosen: list[int] = []
    cache = None
    fed = prompt
    for _ in range(NEW_TOKENS):
        output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        fed = [int(output.logits[0, -1].argmax())]
        chosen += fed
    logits = model(torch.tensor([prompt + chosen[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    if logits.argmax(-1).tolist() != chosen:
        raise SystemExit(f"{name}: decoding with and without a cache disagree")
    best = logits.double().topk(2).values
    gaps = [round(float(gap), 4) for gap in best[:, 0] - best[:, 1]]
    print(f"{name}: {len(prompt)} tokens, smallest gap {min(gaps)}: {tokenizer.decode(chosen)!r}")
    if min(gaps) <= SMALLEST_GAP:
        raise SystemExit(f"{name}: a near-tie, {min(gaps)}: choose another prompt")
    return {"name": name, "prompt": text, "prompt_ids": prompt, "continuation_ids": chosen, "gaps": gaps}


def perplexity(model: Any, ids: list[int]) -> dict[str, Any]:
    """Of the first 1,000 ids, in one pass; log-softmax in float64 of the float32 logits."""
    ids = ids[:PERPLEXITY_TOKENS]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    log_probabilities = torch.log_softmax(logits.double(), -1)
    mean = -float(log_probabilities.gather(1, torch.tensor(ids[1:])[:, None]).mean())
    print(f"mean negative log-likelihood {mean:.8f}, perplexity {math.exp(mean):.6f}")
    return {"ids": ids, "mean_nll": round(mean, 8), "perplexity": round(math.exp(mean), 8)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_of(reference: dict[str, Any]) -> str:
    """JSON with a line for each prompt, so that a change of the data shows in a diff."""
    prompts = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in reference["continuations"])
    rest = [
        f" {json.dumps(key)}: " + (f"[\n{prompts}\n ]" if key == "continuations" else json.dumps(value))
        for key, value in reference.items()
    ]
    return "{\n" + ",\n".join(rest) + "\n}\n"


if __name__ == "__main__":
    main()
