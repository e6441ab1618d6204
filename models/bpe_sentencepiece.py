"""SentencePiece's BPE, as GGUF files describe it: tokens with scores instead of merges, and spaces written as U+2581."""

import re

import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers
from tokenizers import Tokenizer as Backend

from .bpe import SPACE, guarded, sentencepiece_piece
from .bpe_keys import BYTE, NORMAL, SILENT, SPECIAL, UNKNOWN, USER_DEFINED, TokenizerKeys, Vocabulary
from .bpe_merges import merges_of

_SPACES = re.compile(f"[ {SPACE}]+")
# Phi-3 has tokens that swallow the whitespace behind them, which GGUF has no key for
_NOT_SWALLOWING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def sentencepiece_from_gguf(keys: TokenizerKeys, vocabulary: Vocabulary) -> tuple[Backend, list[bytes], bool]:
    """What encodes, the bytes of every token, and whether every text begins with a space.

    Raises ModelError naming the key that is missing, of a wrong type, out of range, or not supported.
    """
    if keys.get("tokenizer.ggml.precompiled_charsmap", list[int]):
        raise keys.error("tokenizer.ggml.precompiled_charsmap", "is not supported together with the model 'llama'")
    tokens = [  # a run of spaces that was added: recognised where it is written with U+2581, else it comes out of merges
        token.replace(" ", SPACE) if kind == USER_DEFINED and _SPACES.fullmatch(token) else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    if len(vocab := {token: index for index, token in enumerate(tokens)}) != len(tokens):
        raise keys.error("tokenizer.ggml.tokens", f"has the same run of spaces twice, with spaces and with {SPACE!r}")
    merges = keys.merges(vocab)  # few files have them; they are those of tokenizer.json
    if merges is None:
        merges = _from_scores(keys, vocabulary, tokens)
    unknown = _unknown(keys, vocabulary)

    def made() -> Backend:
        return Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))

    backend = guarded("the model's tokenizer", made)
    space_first = keys.get("tokenizer.ggml.add_space_prefix", bool)
    space_first = True if space_first is None else space_first
    backend.normalizer = _normalizer(
        space_first, remove_extra=keys.get("tokenizer.ggml.remove_extra_whitespaces", bool) or False
    )
    swallowing = keys.get("general.architecture", str) == "phi3"
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=swallowing and token not in _NOT_SWALLOWING)
            for token, kind in zip(tokens, vocabulary.types, strict=True)
            if kind in SPECIAL
        ]
    )
    pieces = [
        b"" if kind in SILENT else sentencepiece_piece(token, is_byte=kind == BYTE)
        for token, kind in zip(tokens, vocabulary.types, strict=True)
    ]
    return backend, pieces, space_first


def _from_scores(keys: TokenizerKeys, vocabulary: Vocabulary, tokens: list[str]) -> list[tuple[str, str]]:
    given = keys.items("tokenizer.ggml.scores", float)
    if given is None:
        raise keys.error("tokenizer.ggml.scores", "missing")
    if len(given) != len(tokens):
        raise keys.error("tokenizer.ggml.scores", f"{len(given)} items for {len(tokens)} tokens")
    scores, types = np.array(given, np.float32), np.array(vocabulary.types)
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise keys.error("tokenizer.ggml.scores", f"item {index} is {scores[index]}, must be finite")
    normal, added = types == NORMAL, types == USER_DEFINED
    if normal.sum() > 1 and len(np.unique(scores[normal])) == 1:
        raise keys.error(
            "tokenizer.ggml.scores", f"all are {scores[normal][0]}, which says nothing, and there are no merges"
        )
    scores[added] = np.inf  # files have no score of theirs; they come before all others
    return merges_of(tokens, scores, added | normal)


def _unknown(keys: TokenizerKeys, vocabulary: Vocabulary) -> str | None:
    """What stands for a character without a token; a vocabulary that has all bytes needs none."""
    index = keys.token_id("tokenizer.ggml.unknown_token_id", len(vocabulary.tokens))
    if index is None and UNKNOWN in vocabulary.types:
        index = vocabulary.types.index(UNKNOWN)
    if index is not None:
        return vocabulary.tokens[index]
    known = set(vocabulary.tokens)
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in known]
    if missing:
        raise keys.error("tokenizer.ggml.unknown_token_id", f"missing, and so is the token {missing[0]}")
    return None


def _normalizer(space_first: bool, *, remove_extra: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if remove_extra:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if space_first:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
