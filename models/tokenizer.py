"""Text to token ids and back. What the engine needs of a tokenizer, the toy one, and the doors to the real ones."""

from collections.abc import Sequence
from typing import Protocol

from .bpe import BPETokenizer, TextStream, prompt_bytes
from .bpe_gguf import tokenizer_from_gguf
from .bpe_json import tokenizer_from_json

__all__ = ["BPETokenizer", "ByteTokenizer", "TextStream", "Tokenizer", "tokenizer_from_gguf", "tokenizer_from_json"]


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    chat_template: str | None  # jinja2 source
    bos_token: str  # the text of the tokens that a template may name; "" for none
    eos_token: str
    eos_ids: tuple[int, ...]  # tokens that end a text, as far as the tokenizer knows

    @property
    def vocab_size(self) -> int:
        """Ids are from 0 up to but not including this."""

    def encode(self, text: str) -> list[int]:
        """The ids of a raw prompt, with BOS if the model wants it; PromptError for text that cannot be encoded."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids without control tokens; invalid UTF-8 becomes U+FFFD. Never raises for any id."""

    def stream(self) -> TextStream:
        """An incremental decoder that gives the same text piece by piece, whole characters only."""


class ByteTokenizer:
    """The toy model's: ids 0 to 255 are the bytes of UTF-8, 256 is BOS, 257 is EOS, the rest are never used."""

    __slots__ = ("_add_bos", "_pieces", "vocab_size")

    bos_id = 256
    eos_id = 257
    eos_ids: tuple[int, ...] = (257,)
    chat_template: str | None = None
    bos_token = eos_token = ""

    def __init__(self, vocab_size: int = 258, *, add_bos: bool = False) -> None:
        if vocab_size < 258:
            raise ValueError(f"vocab_size is {vocab_size}, must be at least 258: the bytes, BOS and EOS")
        self.vocab_size = vocab_size
        self._add_bos = add_bos
        self._pieces = [bytes([byte]) for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """The bytes of the text; PromptError when it is too long or has a lone surrogate."""
        return [self.bos_id] * self._add_bos + list(prompt_bytes(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; other ids have none."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self._pieces)
