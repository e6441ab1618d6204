"""A tokenizer from the metadata of a GGUF file.

The keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer).
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Backend

from .bpe import BPETokenizer, byte_level_piece, byte_of_token
from .bpe_keys import BYTE, SILENT, SPECIAL, USER_DEFINED, TokenizerKeys, Vocabulary
from .bpe_pre import PRE_TOKENIZERS, Pre
from .bpe_sentencepiece import sentencepiece_from_gguf
from .check import shown

# What ends an answer or a text besides EOS; few files say so, and their names tell, as they tell llama.cpp
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>", "<|endoftext|>",
    "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
)  # fmt: skip


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> BPETokenizer:
    """The tokenizer that a GGUF file carries, from its metadata (key -> str, bool, int, float, or a list of one of them).

    ``where`` names the file in errors. Supported are byte-level BPE ("gpt2") with a pre-tokenizer of PRE_TOKENIZERS, and
    SentencePiece's BPE ("llama"). Raises ModelError naming the key that is missing, of a wrong type, out of range, or
    not supported.
    """
    keys = TokenizerKeys(metadata, where)
    model = keys.get("tokenizer.ggml.model", str)
    if model not in _MODELS:
        raise keys.error(
            "tokenizer.ggml.model",
            f"{shown(model)} is not supported, only byte-level BPE ('gpt2') and SentencePiece's BPE ('llama') are",
        )
    return _MODELS[model](keys)


def _byte_level(keys: TokenizerKeys) -> BPETokenizer:
    name = keys.get("tokenizer.ggml.pre", str) or "default"
    if name not in PRE_TOKENIZERS:
        raise keys.error(
            "tokenizer.ggml.pre", f"{shown(name)} is not supported, only {', '.join(sorted(PRE_TOKENIZERS))} are"
        )
    pre = PRE_TOKENIZERS[name]
    vocabulary = keys.vocabulary()
    special = _special_tokens(keys, vocabulary, add_bos=pre.add_bos)
    prefix_space = keys.get("tokenizer.ggml.add_space_prefix", bool) or False
    if prefix_space and (pre.splits or not pre.gpt2):
        raise keys.error(
            "tokenizer.ggml.add_space_prefix", f"true is not supported together with tokenizer.ggml.pre {shown(name)}"
        )
    pieces = [_piece(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)]
    return BPETokenizer(_backend(keys, pre, vocabulary, prefix_space), pieces, **special)


def _sentencepiece(keys: TokenizerKeys) -> BPETokenizer:
    vocabulary = keys.vocabulary()
    special = _special_tokens(keys, vocabulary, add_bos=True)
    backend, pieces, space_first = sentencepiece_from_gguf(keys, vocabulary)
    return BPETokenizer(backend, pieces, strip_left=space_first, byte_level=False, **special)


_MODELS: Mapping[str | None, Callable[[TokenizerKeys], BPETokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _special_tokens(keys: TokenizerKeys, vocabulary: Vocabulary, *, add_bos: bool) -> dict[str, Any]:
    """What BPETokenizer is to know of them. ``add_bos``: whether a text begins with BOS where the file does not say."""
    tokens = vocabulary.tokens
    ids = {
        name: keys.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens))
        for name in ("bos", "eos", "eot", "eom", "unknown")
    }
    bos, eos = ids["bos"], ids["eos"]
    asked = keys.get("tokenizer.ggml.add_bos_token", bool)
    if asked and bos is None:
        raise keys.error("tokenizer.ggml.add_bos_token", "is true, but there is no bos_token_id")
    ends = [each for each in (ids["eot"], ids["eom"]) if each is not None]
    by_name = {token: index for index, token in enumerate(tokens) if token in _ENDS}
    ends += [by_name[token] for token in _ENDS if token in by_name and vocabulary.types[by_name[token]] in SPECIAL]
    if "<|return|>" in by_name and "<|end|>" in by_name:  # gpt-oss: an answer has several parts that end with <|end|>
        ends = [each for each in ends if each != by_name["<|end|>"]]
    return {
        "prefix": [bos] if bos is not None and (add_bos if asked is None else asked) else [],
        "bos": None if bos is None else (bos, tokens[bos]),
        "eos": None if eos is None else (eos, tokens[eos]),
        "more_eos_ids": ends,
        "chat_template": keys.get("tokenizer.chat_template", str),
    }


def _backend(keys: TokenizerKeys, pre: Pre, vocabulary: Vocabulary, prefix_space: bool) -> Backend:
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = keys.merges(vocab)
    if merges is None:
        raise keys.error("tokenizer.ggml.merges", "missing")
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.made(prefix_space)
    whole = [AddedToken(token, normalized=False, special=True) for token in vocabulary.of_types(SPECIAL)]
    backend.add_special_tokens(whole)
    return backend


def _piece(token: str, kind: int) -> bytes:
    if kind in SILENT:
        return b""
    if kind == USER_DEFINED:
        return token.encode("utf-8", "replace")
    return (byte_of_token(token) if kind == BYTE else None) or byte_level_piece(token)
