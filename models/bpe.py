"""Byte-pair encoding through the `tokenizers` library, with our own way back from ids to text.

Decoding is ours because it has to work a token at a time: every token is known as the bytes it stands for, so that
text comes out the same whether it is decoded whole or streamed, and nothing is "cleaned up" on the way.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from .errors import ModelError, PromptError
from .limits import MAX_PROMPT_BYTES

Result = TypeVar("Result")
SPACE = "\u2581"  # SentencePiece writes spaces as this
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Bytes that never occur in valid UTF-8, so no vocabulary needs a token for them
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own Latin-1 character, the others follow from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()
# str.translate followed by Latin-1 is eight times faster than a loop over characters; what is outside the alphabet
# becomes a character that Latin-1 cannot hold
_TO_LATIN1 = {code: "\ufffd" for code in range(256)} | {ord(c): chr(b) for c, b in BYTE_OF_CHARACTER.items()}


def byte_level_piece(token: str) -> bytes:
    """The bytes that a byte-level token stands for; its UTF-8 when it is not written in GPT-2's alphabet."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


def byte_of_token(token: str) -> bytes | None:
    """The byte that a token like ``<0x0A>`` stands for, None for any other token."""
    written = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(written[1], 16)]) if written else None


def sentencepiece_piece(token: str, *, is_byte: bool) -> bytes:
    """The bytes that a token of SentencePiece stands for."""
    written = byte_of_token(token) if is_byte else None
    return token.replace(SPACE, " ").encode("utf-8", "replace") if written is None else written


def prompt_bytes(text: str) -> bytes:
    """The UTF-8 of a prompt; PromptError when it is too long or has a lone surrogate."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which is not text; only valid Unicode can be tokenized"
        ) from None
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError(f"prompt: {len(data)} bytes of UTF-8, at most {MAX_PROMPT_BYTES} are allowed")
    return data


def guarded(where: str, call: Callable[[], Result]) -> Result:
    """The result of a call into the library; what it raises, and what its Rust panics with, becomes a ModelError."""
    try:
        return call()
    except BaseException as error:  # a panic is not an Exception, and its class cannot be imported
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{where}: {' '.join(str(error).split())}") from error
        raise


class TextStream:
    """Ids in, text out as soon as it is final: a character that is split over tokens comes whole or not yet.

    The pushes and ``finish`` together give exactly what ``decode`` gives for the same ids.
    """

    __slots__ = ("_decoder", "_pieces", "_strip")

    def __init__(self, pieces: Sequence[bytes], *, strip_left: bool = False) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_left

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often empty; an id outside the vocabulary has none."""
        piece = self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""
        return self._start(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest: U+FFFD for a character whose last bytes never came, otherwise nothing."""
        return self._start(self._decoder.decode(b"", final=True))

    def _start(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class BPETokenizer:
    """A tokenizer read from a model's files; make one with ``tokenizer_from_json`` or ``tokenizer_from_gguf``.

    ``backend`` is the library's tokenizer. ``pieces[i]`` holds the bytes of token i, empty for control tokens. ``prefix``
    is what a raw prompt begins with (BOS or nothing). ``strip_left`` drops one space from the start of decoded text
    (SentencePiece vocabularies). ``byte_level`` says that every byte must have a token of its own, so a prompt with a
    byte that has none is refused rather than shortened in silence.
    """

    __slots__ = (
        "_missing",
        "backend",
        "bos_id",
        "bos_token",
        "chat_template",
        "eos_ids",
        "eos_token",
        "pieces",
        "prefix",
        "strip_left",
        "vocab_size",
    )

    def __init__(
        self,
        backend: Backend,
        pieces: Sequence[bytes],
        *,
        prefix: Sequence[int] = (),
        strip_left: bool = False,
        byte_level: bool = True,
        bos: tuple[int, str] | None = None,
        eos: tuple[int, str] | None = None,
        more_eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.pieces = pieces
        self.prefix = list(prefix)
        self.strip_left = strip_left
        self._missing = _missing_bytes(backend) if byte_level else None
        self.vocab_size = len(pieces)
        self.bos_id = bos[0] if bos else None
        self.bos_token = bos[1] if bos else ""
        self.eos_token = eos[1] if eos else ""
        self.eos_ids = tuple(dict.fromkeys([*([eos[0]] if eos else []), *more_eos_ids]))
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """The ids of a raw prompt; special tokens written in it are recognised, BOS is added once if the model asks.

        Raises PromptError for more than MAX_PROMPT_BYTES of UTF-8, for a lone surrogate, and for a character that
        the vocabulary has no byte for. Measured on one slow core: a million equal characters take 0.5 to 2 s, the
        longest prompt allowed (16 MiB of "a") 16 s and 1.6 GB; the time is linear.
        """
        data = prompt_bytes(text)
        if self._missing is not None and (found := self._missing.search(data)):
            position = len(data[: found.start()].decode("utf-8", "ignore"))
            raise PromptError(
                f"prompt: character {position} is U+{ord(text[position]):04X}, and this model's tokenizer has no "
                f"token for its byte 0x{found[0][0]:02X}; remove it"
            )
        encoding = guarded("the model's tokenizer", lambda: self.backend.encode(text, add_special_tokens=False))
        ids = encoding.ids
        if ids[: len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control tokens and ids outside the vocabulary have none, bad UTF-8 becomes U+FFFD."""
        size = self.vocab_size
        text = b"".join([self.pieces[i] for i in ids if 0 <= i < size]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strip_left else text

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self.pieces, strip_left=self.strip_left)


def _missing_bytes(backend: Backend) -> re.Pattern[bytes] | None:
    """A pattern for the bytes of UTF-8 that the vocabulary cannot spell (rare ones may have been left out of it)."""
    missing = [b for c, b in BYTE_OF_CHARACTER.items() if b not in _NEVER_IN_UTF8 and backend.token_to_id(c) is None]
    return re.compile(b"[" + b"".join(b"\\x%02x" % b for b in missing) + b"]") if missing else None
