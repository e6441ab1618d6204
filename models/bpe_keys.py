"""Typed, checked reading of the metadata that describes a tokenizer in a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .check import shown
from .errors import ModelError
from .gguf_metadata import Kind, kind_name, of_kind
from .limits import MAX_VOCAB_SIZE

Item = TypeVar("Item", bool, int, float, str)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SILENT = frozenset({UNKNOWN, CONTROL, UNUSED})  # never part of decoded text
SPECIAL = frozenset({UNKNOWN, CONTROL, USER_DEFINED})  # recognised in a prompt before anything else


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file, each once, and the type of each."""

    tokens: list[str]
    types: list[int]

    def of_types(self, types: frozenset[int]) -> list[str]:
        """The tokens of these types, in the order of their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


class TokenizerKeys:
    """Typed, checked reading of the tokenizer's keys; every error names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def error(self, key: str, problem: str) -> ModelError:
        """The error for a key, to be raised."""
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

    def vocabulary(self) -> Vocabulary:
        """The tokens and their types; only a normal token may be empty."""
        tokens = self.items("tokenizer.ggml.tokens", str)
        if not tokens:
            raise self.error("tokenizer.ggml.tokens", "missing or empty")
        if len(set(tokens)) != len(tokens):
            seen: set[str] = set()
            twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise self.error("tokenizer.ggml.tokens", f"{shown(twice)} is there twice")
        types = self.items("tokenizer.ggml.token_type", int)
        if types is None:
            types = [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise self.error("tokenizer.ggml.token_type", f"{len(types)} items for {len(tokens)} tokens")
        for index, kind in enumerate(types):
            if not NORMAL <= kind <= BYTE:
                raise self.error(
                    "tokenizer.ggml.token_type", f"item {index} is {kind}, must be from {NORMAL} to {BYTE}"
                )
            if kind != NORMAL and not tokens[index]:
                raise self.error("tokenizer.ggml.tokens", f"token {index}, which is not a normal one, is empty")
        return Vocabulary(tokens, types)

    def merges(self, vocab: Mapping[str, int]) -> list[tuple[str, str]] | None:
        """Which tokens are merged, the first ones first, or None when the key is missing."""
        lines = self.items("tokenizer.ggml.merges", str)
        if lines is None:
            return None
        merges = []
        for index, line in enumerate(lines):
            left, space, right = line.partition(" ")
            if not space or left not in vocab or right not in vocab or left + right not in vocab:
                raise self.error(
                    "tokenizer.ggml.merges", f"item {index} is {shown(line)}, must be two tokens that join to a third"
                )
            merges.append((left, right))
        return merges
