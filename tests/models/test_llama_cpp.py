"""Greedy tokens of real models beside llama.cpp's from the same GGUF files.

tests/data/llama_cpp_greedy.json has, by the names of the models, what ``benchmarks/agreement.py record llama.cpp-whole``
wrote: llama-cpp-python 0.3.36, compiled with OpenBLAS, which makes the files' codes float32 for products with many rows.
"""

import json
from pathlib import Path

import pytest

import mixkv
from mixkv import CachePolicy, Session

RECORD = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_greedy.json").read_text())
NEAR_TIE = 0.05  # of logits
TOKENS = 32  # that are to be the same, or the first that is not is a near-tie


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_greedy_tokens_are_those_of_llama_cpp_on_the_same_file(name: str) -> None:
    model = mixkv.load(name, "f32")
    assert len(RECORD[name]) == 5
    for other in RECORD[name]:
        assert model.encode(other["prompt"]) == other["ids"]
        logits = Session(model, CachePolicy.full()).forward([*other["ids"], *other["tokens"][:-1]], "all")
        assert logits is not None
        chosen = logits[len(other["ids"]) - 1 :].argmax(axis=-1).tolist()
        same = [a == b for a, b in zip(chosen, other["tokens"], strict=True)]
        first = same.index(False) if False in same else len(same)
        assert first >= TOKENS or other["gaps"][first] < NEAR_TIE, f"{other['prompt']!r}: apart at {first}"
