"""How the byte-level families cut a text into words before the merges, by the name that GGUF files give it.

The names are llama.cpp's (src/llama-vocab.cpp, convert_hf_to_gguf_update.py), the regular expressions those of the
models' own tokenizer.json. llama.cpp adapts some to its own regex engine, and then differs: docs/tokenizers.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LAST_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = "digit"  # each one a word of its own


@dataclass(frozen=True, slots=True)
class Pre:
    """One family's way.

    ``splits``: regular expressions, applied one after the other to what those before have left; what they match is a word.
    ``gpt2``: whether GPT-2's own expression comes after them. ``nfc``: whether text is normalized first.
    ``whole_words``: a word that is a token skips the merges. ``add_bos``: whether a text begins with BOS where the file
    does not say.
    """

    splits: tuple[str, ...] = ()
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def made(self, add_prefix_space: bool) -> PreTokenizer:
        """The pre-tokenizer, bytes written in GPT-2's alphabet at its end."""
        steps = [Digits(True) if each == _DIGIT else Split(Regex(each), "isolated") for each in self.splits]
        return pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=add_prefix_space, use_regex=self.gpt2)])


def _words(numbers: str, marks: str = "") -> str:
    """The expression that GPT-4 brought up: families differ in how they cut numbers, and in where marks belong."""
    letters = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*"
        + _LAST_SPACES
    )


def _cased_words(numbers: str, endings: str = "") -> str:
    """The expression that GPT-4o brought up, which also cuts between lower and upper case."""
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+{endings}|[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*{endings}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _LAST_SPACES
    )


_GPT2 = Pre(gpt2=True)
_NEOX = replace(_GPT2, nfc=True)
_STARCODER = Pre((_DIGIT,), gpt2=True)
_GPT4 = Pre((_words(r"\p{N}{1,3}"),))
_LLAMA3 = replace(_GPT4, whole_words=True)
_QWEN2 = Pre((_words(r"\p{N}"),), nfc=True)
_GPT4O = Pre((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),), whole_words=True)
_ASCII_SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"

# tokenizer.ggml.pre -> what it means
PRE_TOKENIZERS: Mapping[str, Pre] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _NEOX,
    "mpt": _NEOX,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "command-r": replace(_STARCODER, nfc=True),
    "llama-bpe": replace(_LLAMA3, add_bos=True),
    "llama3": replace(_LLAMA3, add_bos=True),
    "llama-v3": replace(_LLAMA3, add_bos=True),
    "smaug-bpe": _LLAMA3,
    "dbrx": _GPT4,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": Pre((_words(r"\p{N}", r"\p{M}"),), nfc=True),
    "tekken": Pre((_cased_words(r"\p{N}"),), whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, _DIGIT)),
    "deepseek-v3": Pre(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
            + _LAST_SPACES,
        )
    ),
}
