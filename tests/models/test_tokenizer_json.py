"""Tokenizers from a Hugging Face folder: the ids of their GGUF twins, nothing cut in silence, damage refused."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mixkv.models.bpe import BYTE_OF_CHARACTER
from mixkv.models.errors import ModelError, PromptError
from mixkv.models.tokenizer import tokenizer_from_gguf, tokenizer_from_json

CONTROL = ["<|bos|>", "<|eos|>", "<|unk|>"]
BYTES = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "\u0120w o", "1 2", "12 3", "\u00f0 \u0141", "\u0120 \u0120"]
EMOJI = "\U0001f600"


def write_json(folder, *, config=None, **parts):
    """A tokenizer.json made by the library itself, with the vocabulary of the GGUF above."""
    vocab = {token: i for i, token in enumerate([*CONTROL, *BYTES, *(m.replace(" ", "") for m in MERGES)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_twin():
    """The same tokenizer as a GGUF file describes it."""
    tokens = [*CONTROL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3)}
    return {f"tokenizer.ggml.{name}": value for name, value in (keys | {"merges": MERGES}).items()}


def sentencepiece(folder):
    """A small tokenizer.json in the manner of Llama 2: spaces as U+2581, <0xNN> for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "hi", "\u2581hi"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("h", "i"), ("\u2581", "hi")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llama2_like(tmp_path_factory):
    return tokenizer_from_json(sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


@given(st.lists(st.integers(-3, 300)))
@settings(max_examples=200, deadline=None)
def test_random_ids_stream_to_what_they_decode_to(llama2_like, ids):
    stream = llama2_like.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == llama2_like.decode(ids)


def test_a_json_tokenizer_gives_the_ids_of_its_gguf_twin(tmp_path):
    tokenizer = tokenizer_from_json(write_json(tmp_path))
    twin = tokenizer_from_gguf(gguf_twin(), "twin")
    for text in ("hello wo", "<|eos|>hello  123", EMOJI * 40, ""):  # 40: truncation and padding are off
        assert tokenizer.encode(text) == twin.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == twin.decode(twin.encode(text))
    assert tokenizer_from_json(tmp_path / "tokenizer.json").vocab_size == tokenizer.vocab_size == 269
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, (), None)


def test_tokenizer_config_names_bos_eos_and_the_chat_template(tmp_path):
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "add_bos_token": True, "chat_template": "x"}
    tokenizer = tokenizer_from_json(write_json(tmp_path, config=config))
    assert (tokenizer.bos_id, tokenizer.bos_token) == (0, "<|bos|>")
    assert (tokenizer.eos_ids, tokenizer.eos_token) == ((1,), "<|eos|>")
    assert tokenizer.encode("h")[0] == 0
    assert tokenizer.chat_template == "x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert tokenizer_from_json(write_json(tmp_path, config={"chat_template": named})).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_bytes("\u00e9\r\n".encode())
    assert tokenizer_from_json(tmp_path).chat_template == "\u00e9\r\n"


def test_the_post_processor_s_bos_is_kept_and_its_eos_is_not(llama2_like):
    tokenizer = llama2_like
    assert tokenizer.encode("hi hi") == [1, 263, 263]
    assert tokenizer.decode([1, 263, 263, 2]) == "hi hi"
    ids = tokenizer.encode("hi " + EMOJI)
    assert ids[:3] == [1, 263, 259]
    assert tokenizer.decode(ids) == "hi " + EMOJI


def test_damaged_or_unsupported_json_tokenizers_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(ModelError, match=message) as caught:
            tokenizer_from_json(tmp_path)
        assert "\n" not in str(caught.value)

    refused("tokenizer.json: no such file")
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    refused("tokenizer.json: not valid JSON")
    file.write_text('{"model": {"type": "Unigram"}}')
    refused("model.type is 'Unigram', only 'BPE' is supported")
    file.write_text('{"model": 3}')
    refused("model.type is None")
    write_json(tmp_path, decoder=decoders.WordPiece())
    refused("decoder 'WordPiece' is not supported")
    write_json(tmp_path)
    broken = json.loads(file.read_text())
    broken["model"]["merges"].append(["h", "zzz"])
    file.write_text(json.dumps(broken))
    refused("tokenizer.json: ")
    broken = json.loads(write_json(tmp_path).joinpath("tokenizer.json").read_text())
    broken["model"]["vocab"]["a"] = 2**31
    file.write_text(json.dumps(broken))
    refused(f"the largest token id is {2**31}, must be from 0 to")
    for dropout in (0.1, 1.0, "x"):  # what is read would be another text each time
        broken = json.loads(write_json(tmp_path).joinpath("tokenizer.json").read_text())
        broken["model"]["dropout"] = dropout
        file.write_text(json.dumps(broken))
        refused(f"model.dropout is {dropout!r}, only null and 0 are supported")
    for config, message in (
        ({"bos_token": "<nope>"}, "tokenizer_config.json: bos_token '<nope>' is not in the vocabulary"),
        ({"eos_token": 3}, "eos_token is 3, must be a string"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes', must be true or false"),
        ({"chat_template": 3}, "chat_template is 3, must be a string"),
    ):
        write_json(tmp_path, config=config)
        refused(message)


def test_damage_anywhere_in_a_json_tokenizer_is_a_model_error(tmp_path):
    whole = write_json(tmp_path).joinpath("tokenizer.json").read_bytes()
    random.seed(7)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.randrange(len(damaged))] = random.choice(b'0"{}[],:null-')
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            tokenizer_from_json(tmp_path).encode("hello")
        except (ModelError, PromptError):
            continue


def test_a_panic_inside_the_library_is_a_model_error(tmp_path):
    file = sentencepiece(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["special_tokens"] = {}
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no entry found for key"):
        tokenizer_from_json(tmp_path)


def test_a_split_by_regular_expression_from_a_file_works(tmp_path):
    split = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = tokenizer_from_json(write_json(tmp_path, pre_tokenizer=cut))
    assert len(tokenizer.encode("123")) == 3


# What the families' files ask for


def library_and_ours(folder, texts):
    """Compares ids, and text decoded and streamed, with the library's."""
    backend, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), tokenizer_from_json(folder)
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert [i for i in tokenizer.encode(text) if i != 1 or 1 in ids] == ids, text
        stream = tokenizer.stream()
        decoded = tokenizer.decode(ids)
        assert decoded == backend.decode(ids, skip_special_tokens=True), text
        assert decoded == "".join([*map(stream.push, ids), stream.finish()])


TEXTS = [
    "hi",
    " hi",
    "hi  hi ",
    "hi<x> hi",
    " <x>hi\n<x>  h",
    "<y>  i",
    "hi <y> hi",
    "h\u00e9i",
    "",
    " ",
    "<x><y>",
    "a<x>b",
]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_with_every_scheme(tmp_path, scheme):
    sentencepiece(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    tail = [{"type": "Strip", "content": " ", "start": int(scheme != "never"), "stop": 0}]
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    content |= {"normalizer": None, "pre_tokenizer": step}
    content["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *tail]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    library_and_ours(tmp_path, TEXTS)
    content["decoder"] = step
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    library_and_ours(tmp_path, ["hi", "hi hi", "h i"])


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_added_tokens_with_their_flags(tmp_path, flags):
    backend = Tokenizer.from_file(str(sentencepiece(tmp_path) / "tokenizer.json"))
    backend.add_tokens([AddedToken("<x>", **({"normalized": False} | flags))])
    backend.add_special_tokens([AddedToken("<y>", **({"normalized": False} | flags))])
    backend.save(str(tmp_path / "tokenizer.json"))
    library_and_ours(tmp_path, TEXTS)


def test_tokens_beyond_the_model_s_vocabulary_are_text(tmp_path):
    backend = Tokenizer.from_file(str(sentencepiece(tmp_path) / "tokenizer.json"))
    backend.add_special_tokens(["<image>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert (tokenizer_from_json(tmp_path).vocab_size, tokenizer_from_json(tmp_path, 264).vocab_size) == (265, 264)
    assert tokenizer_from_json(tmp_path, 265).encode("<image>")[-1] == 264
    tokenizer = tokenizer_from_json(tmp_path, 264)
    assert max(tokenizer.encode("<image>")) < 264
    assert tokenizer.decode(tokenizer.encode("<image>")) == "<image>"
    assert (
        tokenizer_from_json(tmp_path, 100).vocab_size == 264
    )  # those of the vocabulary itself stay: the model refuses


def test_the_older_special_tokens_map_is_read_where_the_config_is_silent(tmp_path):
    write_json(tmp_path, config={"eos_token": "<|unk|>"})
    special = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>", "pad_token": 3}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = tokenizer_from_json(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|unk|>")


def test_decoders_whose_effect_is_another_are_refused(tmp_path):
    for decoder, message in (
        (decoders.Replace("_", " "), "decoder 'Replace' has .*, only '\u2581' replaced by a space is supported"),
        (decoders.Strip(" ", 2, 0), "decoder 'Strip' has .*, only one space at the start is supported"),
        (decoders.Strip(" ", 0, 1), "decoder 'Strip' has"),
    ):
        write_json(tmp_path, decoder=decoder)
        with pytest.raises(ModelError, match=message):
            tokenizer_from_json(tmp_path)
