"""A byte-level BPE tokenizer from the metadata of a GGUF file.

The keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from .bpe import BPETokenizer, byte_level_piece
from .check import shown
from .errors import ModelError
from .gguf_metadata import Kind, kind_name, of_kind
from .limits import MAX_VOCAB_SIZE

Item = TypeVar("Item", bool, int, str)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_SILENT = frozenset({UNKNOWN, CONTROL, UNUSED})  # never part of decoded text
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _words(numbers: str) -> Callable[[bool], PreTokenizer]:
    """The splitting that Llama 3 and Qwen 2 published; they differ in how they cut numbers."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda space: pre_tokenizers.Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=space, use_regex=False)]
    )


def _gpt2(space: bool) -> PreTokenizer:
    return ByteLevel(add_prefix_space=space, use_regex=True)


def _smollm(space: bool) -> PreTokenizer:
    return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=space, use_regex=True)])


_LLAMA3 = _words(r"\p{N}{1,3}")
# tokenizer.ggml.pre -> how text is cut into words before the merges
PRE_TOKENIZERS: Mapping[str, Callable[[bool], PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _words(r"\p{N}"),
    "smollm": _smollm,
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3"})  # a word that is a token skips the merges; BOS by default
_NFC = frozenset({"qwen2"})


class _Keys:
    """Typed, checked reading of the tokenizer's keys; every error names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self._where}: {key}: {problem}")

    def get(self, key: str, kind: type[Kind]) -> Kind | None:
        """The value of this type, or None when the key is missing."""
        found = self._metadata.get(key)
        if found is None:
            return None
        try:
            return of_kind(key, found, kind)
        except ModelError as error:
            raise ModelError(f"{self._where}: {error}") from None

    def items(self, key: str, kind: type[Item]) -> list[Item] | None:
        """The array whose items are all of this type, or None when the key is missing."""
        found = self.get(key, list[kind])  # type: ignore[valid-type]
        if found is None:
            return None
        if len(found) > MAX_VOCAB_SIZE:
            raise self.error(key, f"{len(found)} items, at most {MAX_VOCAB_SIZE} are allowed")
        for index, item in enumerate(found):
            if type(item) is not kind:
                raise self.error(key, f"item {index} is {shown(item)}, expected {kind_name(kind)}")
        return found

    def token_id(self, key: str, size: int) -> int | None:
        """A token id inside the vocabulary, or None when the key is missing."""
        found = self.get(key, int)
        if found is not None and not 0 <= found < size:
            raise self.error(key, f"{found} is outside the vocabulary of {size} tokens")
        return found


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> BPETokenizer:
    """The tokenizer that a GGUF file carries, from its metadata (key -> str, bool, int, or a list of one of them).

    ``where`` names the file in errors. Only byte-level BPE ("gpt2") with a pre-tokenizer of PRE_TOKENIZERS is
    supported. Raises ModelError naming the key that is missing, of a wrong type, out of range, or not supported.
    """
    keys = _Keys(metadata, where)
    model = keys.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise keys.error("tokenizer.ggml.model", f"{shown(model)} is not supported, only byte-level BPE ('gpt2') is")
    pre = keys.get("tokenizer.ggml.pre", str) or "default"
    if pre not in PRE_TOKENIZERS:
        raise keys.error(
            "tokenizer.ggml.pre", f"{shown(pre)} is not supported, only {', '.join(sorted(PRE_TOKENIZERS))} are"
        )
    tokens, types = _vocabulary(keys)
    bos_id = keys.token_id("tokenizer.ggml.bos_token_id", len(tokens))
    eos_id = keys.token_id("tokenizer.ggml.eos_token_id", len(tokens))
    eot_id = keys.token_id("tokenizer.ggml.eot_token_id", len(tokens))
    keys.token_id("tokenizer.ggml.unknown_token_id", len(tokens))
    add_bos = keys.get("tokenizer.ggml.add_bos_token", bool)
    if add_bos and bos_id is None:
        raise keys.error("tokenizer.ggml.add_bos_token", "is true, but there is no bos_token_id")
    if add_bos is None:
        add_bos = pre in _WHOLE_WORDS_FIRST
    return BPETokenizer(
        _backend(keys, pre, tokens, types),
        [_piece(token, kind) for token, kind in zip(tokens, types, strict=True)],
        prefix=[bos_id] if add_bos and bos_id is not None else [],
        bos=None if bos_id is None else (bos_id, tokens[bos_id]),
        eos=None if eos_id is None else (eos_id, tokens[eos_id]),
        more_eos_ids=[] if eot_id is None else [eot_id],
        chat_template=keys.get("tokenizer.chat_template", str),
    )


def _vocabulary(keys: _Keys) -> tuple[list[str], list[int]]:
    tokens = keys.items("tokenizer.ggml.tokens", str)
    if not tokens:
        raise keys.error("tokenizer.ggml.tokens", "missing or empty")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise keys.error("tokenizer.ggml.tokens", f"{shown(twice)} is there twice")
    types = keys.items("tokenizer.ggml.token_type", int)
    if types is None:
        types = [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise keys.error("tokenizer.ggml.token_type", f"{len(types)} items for {len(tokens)} tokens")
    for index, kind in enumerate(types):
        if not NORMAL <= kind <= BYTE:
            raise keys.error("tokenizer.ggml.token_type", f"item {index} is {kind}, must be from {NORMAL} to {BYTE}")
    return tokens, types


def _merges(keys: _Keys, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = keys.items("tokenizer.ggml.merges", str)
    if lines is None:
        raise keys.error("tokenizer.ggml.merges", "missing")
    merges = []
    for index, line in enumerate(lines):
        left, space, right = line.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise keys.error(
                "tokenizer.ggml.merges", f"item {index} is {shown(line)}, must be two tokens that join to a third"
            )
        merges.append((left, right))
    return merges


def _backend(keys: _Keys, pre: str, tokens: list[str], types: list[int]) -> Backend:
    vocab = {token: index for index, token in enumerate(tokens)}
    prefix_space = keys.get("tokenizer.ggml.add_space_prefix", bool) or False
    if prefix_space and PRE_TOKENIZERS[pre] is not _gpt2:
        raise keys.error(
            "tokenizer.ggml.add_space_prefix", f"true is not supported together with tokenizer.ggml.pre {shown(pre)}"
        )
    backend = Backend(models.BPE(vocab=vocab, merges=_merges(keys, vocab), ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre](prefix_space)
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    if "" in whole:
        raise keys.error("tokenizer.ggml.tokens", f"token {vocab['']}, which is not a normal one, is empty")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in whole])
    return backend


def _piece(token: str, kind: int) -> bytes:
    if kind == NORMAL:
        return byte_level_piece(token)
    if kind in _SILENT:
        return b""
    if kind == BYTE and (written := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(written[1], 16)])
    return token.encode("utf-8", "replace") if kind == USER_DEFINED else byte_level_piece(token)
