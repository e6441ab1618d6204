"""SentencePiece's BPE from GGUF metadata: SentencePiece's own ids, special tokens, merges as the converters order them."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.models.bpe_merges import merges_of
from mixkv.models.errors import ModelError
from mixkv.models.tokenizer import tokenizer_from_gguf

from .tokenizer_data import FOLDER, naive_merges

RECORDED = json.loads((FOLDER / "sentencepiece.json").read_text("utf-8"))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\u2581", "h", "i", "a", "hi", "\u2581hi"]
SCORES = [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0]
ADDED = ["<|end|>", "<|user|>", "  ", "   "]


def from_keys(keys):
    return tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in keys.items()}, "tiny.gguf")


def small(architecture="llama", **changes):
    """A vocabulary by hand: 0 to 2 special, 3 to 258 bytes, then pieces, then what was added."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, *ADDED]
    keys = {
        "model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, *[1] * 6, 3, 4, 4, 4],
        "scores": [0.0] * 259 + SCORES + [-1000.0] * 4, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    keys = {name: value for name, value in (keys | changes).items() if value is not None}
    keys = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return tokenizer_from_gguf(keys | {"general.architecture": architecture}, "tiny.gguf")


def spelled(tokenizer, text):
    names = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, *ADDED]
    return [names[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize("name", RECORDED)
def test_ids_and_text_are_sentencepiece_s(name):
    tokenizer = from_keys(RECORDED[name]["metadata"])
    assert len(RECORDED[name]["rows"]) > 60
    for row in RECORDED[name]["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]


def test_a_text_begins_with_bos_and_a_space_and_so_does_what_follows_a_special_token():
    assert spelled(small(), "hi") == ["<s>", "\u2581hi"]
    assert spelled(small(), "<s>hi") == ["<s>", "\u2581hi"]  # not twice
    assert spelled(small(), "hi hi</s>hi") == ["<s>", "\u2581hi", "\u2581hi", "</s>", "\u2581hi"]
    assert spelled(small(add_bos_token=False, add_space_prefix=False), "hi hi</s>hi") == [
        "hi",
        "\u2581hi",
        "</s>",
        "hi",
    ]
    assert spelled(small(add_bos_token=False), "") == []
    assert small().decode(small().encode("hi  hi\u00e9</s>")) == "hi  hi\u00e9"
    bare = small(add_space_prefix=False)
    assert bare.decode(bare.encode(" hi")) == " hi"


def test_added_tokens_bytes_and_unknown_characters():
    tokenizer = small(add_bos_token=False)
    assert spelled(tokenizer, "<|user|>a<unk>") == ["<|user|>", "\u2581", "a", "<unk>"]
    assert spelled(tokenizer, "\n\u00e9") == ["\u2581", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert spelled(tokenizer, "<0x0A>") == ["\u2581", *(f"<0x{byte:02X}>" for byte in b"<0x0A>")]  # text, not the byte
    assert tokenizer.decode(tokenizer.encode("<|user|>a<|end|>")) == "<|user|> a"  # the former was added as text
    tokens = ["<unk>", "<s>", "</s>", *PIECES]
    keys = {"tokens": tokens, "token_type": [2, 3, 3] + [1] * 6, "scores": [0.0] * 3 + SCORES, "add_bos_token": False}
    assert small(**keys).encode("hi\u00e9\u00e9hi") == [8, 0, 7]


def test_runs_of_spaces_that_were_added_come_out_of_merges():
    tokenizer = small(add_bos_token=False, add_space_prefix=False)
    assert spelled(tokenizer, "a   hi") == ["a", "   ", "hi"]
    assert spelled(tokenizer, "a\u2581\u2581\u2581hi") == ["a", "   ", "hi"]
    assert spelled(tokenizer, "a  hi") == ["a", "  ", "hi"]
    assert tokenizer.decode(tokenizer.encode("a   hi")) == "a   hi"


def test_merges_that_a_file_has_count_more_than_scores():
    keys = {"add_bos_token": False, "scores": [-1000.0] * 269}
    assert spelled(small(**keys, merges=["h i", "\u2581 hi"]), "hi") == ["\u2581hi"]
    assert spelled(small(**(keys | {"scores": None}), merges=["\u2581 \u2581"]), " hi") == ["  ", "h", "i"]


def test_phi3_s_tokens_swallow_the_whitespace_behind_them():
    keys = {"add_bos_token": False, "add_space_prefix": False}
    assert spelled(small("phi3", **keys), "<|user|> \nhi<|end|>\n hi<s> hi") == [
        "<|user|>", "hi", "<|end|>", "hi", "<s>", "\u2581hi",
    ]  # fmt: skip
    assert spelled(small("llama", **keys), "<|user|> hi") == ["<|user|>", "\u2581hi"]


def test_what_ends_an_answer_is_found_by_name():
    assert small().eos_ids == (2, 265)
    assert small(eot_token_id=5).eos_ids == (2, 5, 265)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>"]
    assert small(tokens=tokens).eos_ids == (2, 266, 267, 268)  # gpt-oss: <|end|> is amid an answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores: missing"),
        (
            {"scores": [-1000.0] * 269},
            "tokenizer.ggml.scores: all are -1000.0, which says nothing, and there are no merges",
        ),
        ({"merges": ["h q"]}, "tokenizer.ggml.merges: item 0 is 'h q', must be two tokens"),
        ({"scores": [1.0]}, "tokenizer.ggml.scores: 1 items for 269 tokens"),
        ({"scores": [float("nan")] * 269}, "tokenizer.ggml.scores: item 0 is nan, must be finite"),
        ({"scores": ["a"] * 269}, "tokenizer.ggml.scores. is an array of strings, expected an array of numbers"),
        ({"precompiled_charsmap": [1, 2]}, "tokenizer.ggml.precompiled_charsmap: is not supported together with"),
        ({"add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix"),
        ({"remove_extra_whitespaces": "yes"}, "tokenizer.ggml.remove_extra_whitespaces"),
        ({"unknown_token_id": 900}, "tokenizer.ggml.unknown_token_id: 900 is outside"),
        ({"add_bos_token": True, "bos_token_id": None}, "tokenizer.ggml.add_bos_token: is true, but there is no bos"),
    ],
)
def test_damaged_metadata_is_refused_by_key(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        small(**changes)
    assert str(caught.value).startswith("tiny.gguf: ")


def test_a_vocabulary_that_cannot_spell_every_text_is_refused():
    keys = {"tokens": PIECES, "token_type": [1] * 6, "scores": SCORES, "bos_token_id": 0, "eos_token_id": 0}
    with pytest.raises(ModelError, match="unknown_token_id: missing, and so is the token <0x00>"):
        small(**keys, unknown_token_id=None)
    keys["tokens"] = [*PIECES, "  ", "\u2581\u2581"]
    keys |= {"token_type": [1] * 6 + [4, 1], "scores": [*SCORES, -3.0, -4.0]}
    with pytest.raises(ModelError, match="the same run of spaces twice"):
        small(**keys)


PARTS = st.text(alphabet="ab\u2581\u4f60\U0001f600", min_size=1, max_size=5)


@given(st.lists(PARTS, unique=True, min_size=1, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_merges_are_all_pairs_best_score_first(tokens, data):
    scores = data.draw(st.lists(st.sampled_from([0.0, -1.0, -2.0, -2.5]), min_size=len(tokens), max_size=len(tokens)))
    merged = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    asked = {t: s for t, s, wanted in zip(tokens, scores, merged, strict=True) if wanted}
    found = merges_of(tokens, np.array(scores, np.float32), np.array(merged))
    assert [list(pair) for pair in found] == naive_merges(tokens, asked)


def test_a_vocabulary_of_262_144_tokens_is_read_in_seconds():
    rng = np.random.default_rng(5)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz\u2581\u00e9\u4f60\u0431"))
    words = dict.fromkeys(letters.tolist())
    while len(words) < 261_000:
        words |= dict.fromkeys("".join(row) for row in letters[rng.integers(0, 30, (80_000, int(rng.integers(2, 9))))])
    pieces = list(words)[:261_000]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    keys = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces)}
    keys |= {"scores": [-float(i) for i in range(len(tokens))], "bos_token_id": 1}
    start = time.process_time()
    tokenizer = from_keys(keys)
    assert time.process_time() - start < 6  # measured: 1.7 s
    assert tokenizer.decode(tokenizer.encode("abc \u4f60 \u0431")) == "abc \u4f60 \u0431"
