"""Small tokenizers made in every family's way: the same ids from tokenizer.json and as GGUF as from the library."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mixkv.models.bpe_pre import PRE_TOKENIZERS
from mixkv.models.tokenizer import tokenizer_from_gguf, tokenizer_from_json

from .tokenizer_data import FAMILIES, PIPELINES, script, small_json, texts

CONVERT = script("convert")


def made(name, folder):
    """The library's tokenizer, and mixkv's from the same tokenizer.json and from it as GGUF metadata."""
    content = small_json(name)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    metadata = CONVERT.gguf_metadata(content, None if name in ("llama", "gemma") else name)
    return Tokenizer.from_file(str(file)), tokenizer_from_json(file), tokenizer_from_gguf(metadata, "small")


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_text_are_those_of_the_library_on_the_corpus(name, tmp_path):
    backend, from_json, from_gguf = made(name, tmp_path)
    assert 1000 < from_gguf.vocab_size == from_json.vocab_size < 1600
    sample = texts()[::6]
    used = set()
    for text, encoding in zip(sample, backend.encode_batch(sample, add_special_tokens=False), strict=True):
        ids = encoding.ids
        used.update(ids)
        assert from_json.encode(text) == ids, text
        assert from_gguf.encode(text) == ids, text
        whole = backend.decode(ids, skip_special_tokens=True)
        for tokenizer in (from_json, from_gguf):
            stream = tokenizer.stream()
            assert tokenizer.decode(ids) == whole == "".join([*map(stream.push, ids), stream.finish()])
    assert len(used) > 0.8 * from_gguf.vocab_size or name in ("llama", "gemma")  # of bytes, few are needed there


def test_names_that_mean_the_same_have_the_same_steps():
    assert PIPELINES["smollm"] == PIPELINES["refact"] == PIPELINES["starcoder"]
    for names in (("smollm", "refact", "starcoder"), ("llama-bpe", "llama3", "llama-v3"), ("gpt-4o", "llama4")):
        assert len({PRE_TOKENIZERS[name] for name in names}) == 1
    assert PRE_TOKENIZERS["smaug-bpe"].splits == PRE_TOKENIZERS["llama3"].splits == PRE_TOKENIZERS["dbrx"].splits
    assert set(PIPELINES) - {"llama", "gemma"} <= set(PRE_TOKENIZERS)


LETTERS = st.text(alphabet="ab \u00e9\u4f60<|>\n\u2581\U0001f600", max_size=40)


@given(LETTERS)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2"])
def test_any_text_has_the_library_s_ids(name, tmp_path_factory, text):
    if name not in MADE:
        MADE[name] = made(name, tmp_path_factory.mktemp("family"))
    backend, from_json, from_gguf = MADE[name]
    ids = backend.encode(text, add_special_tokens=False).ids
    assert from_json.encode(text) == from_gguf.encode(text) == ids


MADE: dict[str, tuple] = {}
