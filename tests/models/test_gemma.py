"""gemma3-270m, a real model of 4-bit K types: what transformers generates from the same weights.

tests/data/gemma3_270m_greedy.json is what `python benchmarks/agreement.py record transformers` wrote of a folder that
`mixkv convert gemma3-270m` made: for each of its five prompts the ids, 40 greedy tokens, and by how much each led.
"""

import json
from pathlib import Path

import pytest

import mixkv
from mixkv import CachePolicy, Session

RECORD = json.loads((Path(__file__).parents[1] / "data" / "gemma3_270m_greedy.json").read_text())
NEAR_TIE = 0.01  # of logits: float32 sums in another order may turn it over


@pytest.mark.model
def test_greedy_tokens_are_those_of_transformers_on_the_same_weights() -> None:
    model = mixkv.load("gemma3-270m", "f32")
    assert model.encode("The capital of France is") == RECORD[0]["ids"]
    for prompt in RECORD:
        session = Session(model, CachePolicy.full())
        logits = session.forward([*prompt["ids"], *prompt["tokens"][:-1]], "all")
        assert logits is not None
        chosen = logits[len(prompt["ids"]) - 1 :].argmax(axis=-1).tolist()
        for mine, token, gap in zip(chosen, prompt["tokens"], prompt["gaps"], strict=True):
            assert mine == token or gap < NEAR_TIE


@pytest.mark.model
def test_text_comes_out_as_it_is_written_and_a_cache_of_codes_does_not_ruin_it() -> None:
    model = mixkv.load("gemma3-270m")
    session = Session(model, CachePolicy())
    text = "".join(
        token.text for token in mixkv.generate(session, model.encode("The capital of France is"), max_tokens=12)
    )
    assert "the capital" in text and "France" in text
