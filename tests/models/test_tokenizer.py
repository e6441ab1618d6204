"""Tokenizers: ids as two independent oracles give them, damaged files refused, text streamed in whole characters."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.models.bpe import BYTE_OF_CHARACTER
from mixkv.models.bpe_pre import PRE_TOKENIZERS
from mixkv.models.errors import ModelError, PromptError
from mixkv.models.gguf import open_gguf
from mixkv.models.limits import MAX_PROMPT_BYTES
from mixkv.models.tokenizer import ByteTokenizer, tokenizer_from_gguf

RECORDED = Path(__file__).parent.parent / "data" / "smollm2_token_ids.json"
CONTROL = ["<|bos|>", "<|eos|>", "<|unk|>"]
BYTES = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
SPACE = "\u0120"  # how GPT-2's alphabet writes a space
MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    f"{SPACE} w",
    f"{SPACE}w o",
    "1 2",
    "12 3",
    "\u00f0 \u0141",
    f"{SPACE} {SPACE}",
]
USER_DEFINED, UNUSED = "<fim>", "[PAD]"
EMOJI = "\U0001f600"


def metadata(**changes):
    """The tokenizer keys of a small GGUF file; a change to None removes the key."""
    tokens = [*CONTROL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), USER_DEFINED, UNUSED]
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3, 2, *[1] * (len(tokens) - 5), 4, 5],
        "merges": list(MERGES),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unknown_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    keys = {"tokenizer.ggml." + name: value for name, value in (keys | changes).items() if value is not None}
    return keys | {"tokenizer.chat_template": "{{ messages }}"}


def small(**changes):
    return tokenizer_from_gguf(metadata(**changes), "tiny.gguf")


def spelled(tokenizer, text, **changes):
    """The tokens of a text as they are written in the vocabulary."""
    tokens = metadata(**changes)["tokenizer.ggml.tokens"]
    return [tokens[i] for i in tokenizer.encode(text)]


SMALL = small()


# Ids


@pytest.mark.model
def test_smollm2_ids_are_those_of_the_oracles(default_model_path):
    keys = open_gguf(default_model_path).metadata
    start = time.process_time()
    tokenizer = tokenizer_from_gguf(keys, str(default_model_path))
    assert time.process_time() - start < 0.7  # measured: 0.10 s
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2, 0))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert len(rows) > 60
    special = [
        t for t, kind in zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        visible = row["text"]
        for token in special:
            visible = visible.replace(token, "")
        assert tokenizer.decode(row["ids"]) == visible
    with pytest.raises(PromptError, match=r"character 1 is U\+0004.*byte 0x04"):
        tokenizer.encode("a\x04")  # the vocabulary was trained without this byte


@pytest.mark.fault("long-prompt")
@pytest.mark.model
def test_megabytes_of_one_character_take_bounded_time(default_model_path):
    tokenizer = tokenizer_from_gguf(open_gguf(default_model_path).metadata, "default")
    for character in ("a", " ", "\u00e9"):
        start = time.process_time()
        assert tokenizer.decode(tokenizer.encode(character * 250_000)) == character * 250_000
        assert time.process_time() - start < 3  # measured: 0.1 to 0.2 s; quadratic would be minutes


def test_merges_and_special_tokens():
    tokenizer = small()
    assert spelled(tokenizer, "hello wo") == ["hello", f"{SPACE}wo"]
    assert spelled(tokenizer, "hel<|eos|>lo<fim>hello") == ["he", "l", "<|eos|>", "l", "o", "<fim>", "hello"]
    assert spelled(tokenizer, "<|eos") == list("<|eos")
    assert tokenizer.encode("") == []
    assert tokenizer.chat_template == "{{ messages }}"


def test_every_pre_tokenizer_cuts_as_published():
    def cut(pre, text):
        words = PRE_TOKENIZERS[pre].made(False).pre_tokenize_str(text)
        return [bytes(BYTE_OF_CHARACTER[c] for c in word).decode() for word, _ in words]

    text = "I'LL it's  1234 x\r\n\n (y)!\n"
    gpt2 = ["I", "'", "LL", " it", "'s", " ", " 1234", " x", "\r\n\n", " (", "y", ")!", "\n"]
    smollm = ["I", "'", "LL", " it", "'s", "  ", "1", "2", "3", "4", " x", "\r\n\n", " (", "y", ")!", "\n"]
    llama3 = ["I", "'LL", " it", "'s", " ", " ", "123", "4", " x", "\r\n\n", " (", "y", ")!\n"]
    qwen2 = ["I", "'LL", " it", "'s", " ", " ", "1", "2", "3", "4", " x", "\r\n\n", " (", "y", ")!\n"]
    tekken = ["I", "'LL", " it", "'s", " ", " ", "1", "2", "3", "4", " x", "\r\n\n", " (", "y", ")!\n"]
    gpt4o = ["I'LL", " it's", " ", " ", "123", "4", " x", "\r\n\n", " (", "y", ")!\n"]
    expected = {"gpt-2": gpt2, "smollm": smollm, "llama3": llama3, "qwen2": qwen2, "tekken": tekken, "gpt-4o": gpt4o}
    assert {pre: cut(pre, text) for pre in expected} == expected


def test_what_depends_on_the_pre_tokenizer():
    assert spelled(small(pre="gpt-2"), "1234") == ["123", "4"]
    assert spelled(small(pre="smollm"), "1234") == ["1", "2", "3", "4"]
    assert spelled(small(pre="gpt-2", add_space_prefix=True), "wo") == [f"{SPACE}wo"]
    # Llama 3: a word that is a token stays whole even where no merge leads to it, and BOS comes without being asked
    tokens = metadata()["tokenizer.ggml.tokens"]
    changes = {"tokens": [*tokens, "wxyz"], "token_type": [*metadata()["tokenizer.ggml.token_type"], 1]}
    assert spelled(small(pre="gpt-2", **changes), "wxyz", **changes) == list("wxyz")
    llama3 = {"pre": "llama-bpe", "add_bos_token": None, **changes}
    assert spelled(small(**llama3), "wxyz", **changes) == ["<|bos|>", "wxyz"]
    # Qwen 2 composes first
    assert small(pre="qwen2").encode("e\u0301") == small(pre="qwen2").encode("\u00e9")
    assert small().encode("e\u0301") != small().encode("\u00e9")


def test_bos_is_added_once():
    tokenizer = small(add_bos_token=True)
    assert tokenizer.encode("h") == [0, *small().encode("h")]
    assert tokenizer.encode("<|bos|>h") == tokenizer.encode("h")
    assert tokenizer.encode("") == [0]


# Text


def test_decoding_leaves_out_control_tokens_and_cleans_nothing_up():
    tokenizer = small()
    tokens = metadata()["tokenizer.ggml.tokens"]
    assert tokenizer.decode(list(range(len(CONTROL)))) == ""
    assert tokenizer.decode([tokens.index(UNUSED)]) == ""
    assert tokenizer.decode([tokens.index(USER_DEFINED)]) == USER_DEFINED
    text = " ( a ) , b . do n't  x ! \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([-1, 10**9]) == ""
    assert tokenizer.decode([tokens.index("\u00ff"), tokens.index("a")]) == "\ufffda"


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_every_text_survives_the_round_trip(text):
    for tokenizer in (SMALL, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.fault("invalid-utf8")
@given(st.lists(st.integers(-3, 300)))
@settings(max_examples=300, deadline=None)
def test_random_ids_stream_to_what_they_decode_to(ids):
    for tokenizer in (SMALL, ByteTokenizer(300)):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.fault("invalid-utf8")
def test_an_emoji_split_over_tokens_is_streamed_whole():
    for tokenizer in (small(), ByteTokenizer()):
        ids = tokenizer.encode("a" + EMOJI + "b")
        parts = streamed(tokenizer, ids)
        assert len(ids) > 3
        assert [part for part in parts if part] == ["a", EMOJI, "b"]
        assert parts.index(EMOJI) == len(ids) - 2  # with its last byte, not a token later
        assert streamed(tokenizer, ids[:-2])[-1] == "\ufffd"  # the tail never came


@pytest.mark.fault("long-prompt")
def test_lone_surrogates_and_oversized_prompts_are_refused():
    for tokenizer in (small(), ByteTokenizer()):
        with pytest.raises(PromptError, match=r"character 2 is the lone surrogate U\+D83D"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(PromptError, match=f"{MAX_PROMPT_BYTES + 1} bytes of UTF-8, at most {MAX_PROMPT_BYTES}"):
            tokenizer.encode("\u00e9" + "a" * (MAX_PROMPT_BYTES - 1))


def test_the_toy_model_s_tokenizer_is_bytes():
    tokenizer = ByteTokenizer(512)
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("h\u00e9") == [0x68, 0xC3, 0xA9]
    assert ByteTokenizer(add_bos=True).encode("h") == [256, 0x68]
    assert tokenizer.decode([256, 0x68, 257, 400]) == "h"
    with pytest.raises(ValueError, match="vocab_size is 257, must be at least 258"):
        ByteTokenizer(257)


# Damaged metadata


@pytest.mark.fault("gguf-types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "t5"},
            "tokenizer.ggml.model: 't5' is not supported, only byte-level BPE .'gpt2'. and SentencePiece's BPE",
        ),
        ({"model": "gemma4"}, "tokenizer.ggml.model: 'gemma4' is not supported"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"model": 7}, "tokenizer.ggml.model"),
        ({"pre": "viking"}, "command-r, dbrx, .*, tekken are"),
        ({"tokens": None}, "tokenizer.ggml.tokens: missing or empty"),
        ({"tokens": []}, "tokenizer.ggml.tokens: missing or empty"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", 2]}, "tokenizer.ggml.tokens: item 1 is 2, expected a string"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "tokenizer.ggml.tokens: 'a' is there twice"),
        ({"tokens": ["a", "", "b"], "token_type": [1, 3, 1], "merges": []}, "tokens: token 1, .* is empty"),
        ({"token_type": [1, 3]}, "tokenizer.ggml.token_type: 2 items for 271 tokens"),
        ({"token_type": [7] * 271}, "tokenizer.ggml.token_type: item 0 is 7, must be from 1 to 6"),
        ({"token_type": ["1"] * 271}, "tokenizer.ggml.token_type"),
        ({"token_type": [1.0] * 271}, "tokenizer.ggml.token_type"),
        ({"merges": None}, "tokenizer.ggml.merges: missing"),
        ({"merges": ["h e", "q zz"]}, "tokenizer.ggml.merges: item 1 is 'q zz', must be two tokens"),
        ({"merges": ["h q"]}, "tokenizer.ggml.merges: item 0"),
        ({"merges": ["he"]}, "tokenizer.ggml.merges: item 0"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges"),
        ({"bos_token_id": 271}, "tokenizer.ggml.bos_token_id: 271 is outside the vocabulary of 271 tokens"),
        ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id: -1 is outside"),
        ({"unknown_token_id": "0"}, "tokenizer.ggml.unknown_token_id"),
        ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        ({"add_bos_token": True, "bos_token_id": None}, "tokenizer.ggml.add_bos_token: is true, but there is no bos"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix: true is not supported together with"),
    ],
)
def test_a_gguf_tokenizer_of_wrong_types_or_lengths_is_refused_by_key(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        small(**changes)
    assert str(caught.value).startswith("tiny.gguf: ")
    assert "\n" not in str(caught.value)


def test_a_gguf_tokenizer_without_the_optional_keys_works():
    optional = ("pre", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token")
    tokenizer = small(**dict.fromkeys(optional), add_space_prefix=None)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == ()
    assert tokenizer.decode(tokenizer.encode("hello 123")) == "hello 123"
