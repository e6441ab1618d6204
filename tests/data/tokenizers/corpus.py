"""10,000 texts that try a tokenizer: many scripts, code, emoji, whitespace, invalid UTF-8, special tokens.

Made anew wherever it is needed, always the same: the Mersenne Twister, `random()` alone of it, Unicode 3.2 (which Python
keeps beside the current version) and the words and ranges of corpus_parts.json. DIGEST holds it to that.

    python tests/data/tokenizers/corpus.py     # prints the digest and how many texts of each kind there are
"""

import hashlib
import json
import random
import unicodedata
from pathlib import Path

UNICODE = unicodedata.ucd_3_2_0
DIGEST = "972b90c3fe9c800f580b9b2ff482a14098cc6f3256ab96925107f0848cd62e05"

PARTS = json.loads(Path(__file__).with_name("corpus_parts.json").read_text("utf-8"))
SCRIPTS, WORDS, CODE, SPECIAL = PARTS["scripts"], PARTS["words"], PARTS["code"], PARTS["special"]
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2002\u2003\u2007\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_HIDDEN = (*range(0, 9), *range(14, 32), *range(127, 160), 0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x2060, 0x202A, 0x202E)
HIDDEN = list(map(chr, (*_HIDDEN, 0x2066, 0xFE0F, 0xFEFF, 0xFFF9, 0xFFFC, 0xFFFD, 0xE000, 0xF8FF, 0xE0061, 0x10FFFD)))
_FACES = (*range(0x1F600, 0x1F640), *range(0x1F300, 0x1F5F0), *range(0x1F900, 0x1F9C0), 0x2764, 0x231A, 0x26BD)
FACES = list(map(chr, _FACES))
PEOPLE = [chr(c) for c in (0x1F468, 0x1F469, 0x1F466, 0x1F467, 0x1F9D1, 0x1F476)]
JOBS = [chr(c) for c in (0x1F33E, 0x1F373, 0x1F680, 0x1F4BB, 0x2695, 0x2764)]


class Dice:
    """Chance from `random()` alone, whose numbers no version of Python may change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """A number from 0 up to but not including n."""
        return int(self._random() * n)

    def pick(self, items):
        """One of a sequence."""
        return items[int(self._random() * len(items))]

    def many(self, low: int, high: int, make) -> list:
        """From `low` to `high` things that `make` makes."""
        return [make() for _ in range(low + self.below(high - low + 1))]


def character(dice: Dice, low: int, high: int) -> str:
    """A character of a range that is a letter, a mark, a digit, punctuation or a symbol in Unicode 3.2."""
    for _ in range(40):
        found = chr(low + dice.below(high - low + 1))
        if UNICODE.category(found)[0] in "LMNPS":
            return found
    return chr(low)


def word(dice: Dice) -> str:
    """An English word, sometimes capitalised or with an ending."""
    found = dice.pick(WORDS)
    case = dice.below(12)
    found = found.upper() if case == 0 else found.capitalize() if case < 4 else found
    return found + (dice.pick(PARTS["endings"]) if dice.below(8) == 0 else "")


def script(dice: Dice) -> str:
    """Words of one script."""
    low, high = dice.pick(SCRIPTS)
    words = dice.many(1, 9, lambda: "".join(dice.many(1, 9, lambda: character(dice, low, high))))
    glue = dice.pick([" ", " ", " ", "", "  ", ", ", "\n"])
    return dice.pick(["", "", " "]) + glue.join(words) + dice.pick(["", ".", "\u3002", "!", " "])


def anything(dice: Dice) -> str:
    """Any characters that Unicode 3.2 has, of all planes, private use included."""

    def one() -> str:
        for _ in range(20):
            found = chr(dice.below(dice.pick([0x300, 0x3000, 0x10000, 0x30000, 0x110000])))
            if UNICODE.category(found) not in ("Cn", "Cs"):
                return found
        return "\ufffd"

    return "".join(dice.many(1, 40, one))


def sentence(dice: Dice) -> str:
    """English with contractions and punctuation."""
    return "".join(
        dice.many(
            3,
            25,
            lambda: (
                dice.pick([" ", " ", " ", ""]) + word(dice) + (dice.pick(PARTS["marks"]) if dice.below(5) == 0 else "")
            ),
        )
    )


def code(dice: Dice) -> str:
    """A few lines of some language."""

    def name() -> str:
        return (
            dice.pick(["_", ""])
            + dice.pick(["", "get", "set", "is_", "HTTP", "tmp"])
            + dice.pick(WORDS[:90]).capitalize()
        )

    def one() -> str:
        number = int("".join(map(str, dice.many(1, 12, lambda: 1 + dice.below(9)))))
        return dice.pick(CODE).format(a=name(), b=name().lower(), c=name(), n=number)

    return dice.pick(["", "", "    ", "\t"]) + "".join(dice.many(1, 4, one))


def number(dice: Dice) -> str:
    """Numbers of all lengths, of several scripts, with separators."""

    def digits() -> str:
        zero = dice.pick([0x30, 0x30, 0x30, 0x30, 0x660, 0x6F0, 0x966, 0xE50, 0xFF10, 0x1D7D8])
        return "".join(chr(zero + digit) for digit in dice.many(1, dice.pick([1, 3, 4, 9, 60]), lambda: dice.below(10)))

    odd = [
        "\u00bd",
        "\u00b2",
        "\u2167",
        "\u2460",
        "\u3007",
        "\u4e94",
        "\u096a",
        "e-",
        "0x",
        "%",
        "\u20ac",
        "$",
        "\u00b0",
        "a",
    ]
    parts = dice.many(
        1, 8, lambda: digits() + dice.pick(["", "", " ", ".", ",", "-", ":", "_", "/", "\n", dice.pick(odd)])
    )
    return "".join(parts)


def whitespace(dice: Dice) -> str:
    """Runs of all kinds of whitespace, between words and at both ends."""

    def run() -> str:
        kind = dice.below(4)
        if kind == 0:
            return dice.pick(SPACES) * (1 + dice.below(40))
        if kind == 1:
            return "".join(dice.many(1, 8, lambda: dice.pick(SPACES)))
        return dice.pick(PARTS["plain_spaces"]) if kind == 2 else " " * (1 + dice.below(dice.pick([4, 40, 90])))

    ends = [run if dice.below(2) else str for _ in range(2)]
    inner = [run() + dice.pick([word(dice), "1", "!", "{", "\u4f60", "\U0001f600", ")"]) for _ in range(dice.below(6))]
    return ends[0]() + "".join(inner) + ends[1]()


def emoji(dice: Dice) -> str:
    """Emoji with skin tones, joiners, flags and key caps."""

    def one() -> str:
        kind = dice.below(6)
        if kind == 0:
            return "\u200d".join(dice.many(2, 4, lambda: dice.pick(PEOPLE)))
        if kind == 1:
            return dice.pick(PEOPLE) + chr(0x1F3FB + dice.below(5)) + "\u200d" + dice.pick(JOBS) + "\ufe0f"
        if kind == 2:
            return "".join(chr(0x1F1E6 + dice.below(26)) for _ in range(2))
        if kind == 3:
            return dice.pick("0123456789#*") + "\ufe0f\u20e3"
        return dice.pick(FACES) + dice.pick(["", "", "\ufe0f", chr(0x1F3FB + dice.below(5))])

    return dice.pick(["", " ", "  "]).join(
        dice.many(1, 10, lambda: one() + (" " + word(dice) if dice.below(4) == 0 else ""))
    )


def hidden(dice: Dice) -> str:
    """Control and format characters, private use."""
    return "".join(
        dice.many(1, 12, lambda: dice.pick(HIDDEN) if dice.below(2) else dice.pick(["a", " ", word(dice), "1", "\n"]))
    )


def invalid(dice: Dice) -> str:
    """Bytes that are no UTF-8, or no longer, decoded with "replace"."""
    if dice.below(2):
        return bytes(dice.many(1, 30, lambda: dice.below(256))).decode("utf-8", "replace")
    whole = dice.pick([script, emoji, sentence])(dice).encode()
    damaged = [
        byte if dice.below(12) else dice.below(256) for byte in whole[dice.below(4) : len(whole) - dice.below(4)]
    ]
    return bytes(damaged).decode("utf-8", "replace")


def repeated(dice: Dice) -> str:
    """One thing again and again."""
    what = dice.pick(
        [
            "a",
            "A",
            "=",
            "-",
            "*",
            "0",
            "ab",
            "\u00e9",
            "\u4f60",
            "\U0001f600",
            "\u0301",
            "' ",
            "\n\n ",
            "_",
            "haha",
            "\ufffd",
            "\u2581",
            " ",
            "\n",
        ]
    )
    return dice.pick(["", "x", " "]) + what * (1 + dice.below(dice.pick([10, 100, 700]))) + dice.pick(["", "x", " "])


def special(dice: Dice) -> str:
    """Special tokens of all families, whole and cut, within text."""

    def one() -> str:
        return (
            dice.pick(["", " ", "\n", "  ", "\t"])
            + dice.pick(SPECIAL)
            + dice.pick(["", " ", "\n", "  ", word(dice), "\u00a0", " " + word(dice)])
        )

    return "".join(dice.many(1, 7, one))


KINDS = [
    (script, 2500), (anything, 900), (sentence, 1100), (code, 1300), (number, 700), (whitespace, 1000), (emoji, 600),
    (hidden, 400), (invalid, 500), (repeated, 200), (special, 500),
]  # fmt: skip
MIXED = 300


def texts() -> list[str]:
    """The 10,000 texts, in a fixed order."""
    made = []
    for seed, (kind, count) in enumerate(KINDS):
        dice = Dice(seed)
        made += [kind(dice) for _ in range(count)]
    dice = Dice(len(KINDS))
    made += ["".join(dice.many(2, 5, lambda: dice.pick(KINDS)[0](dice))) for _ in range(MIXED)]
    if digest(made) != DIGEST:
        raise RuntimeError(f"the corpus is another one: {digest(made)}, recorded is {DIGEST}")
    return made


def digest(made: list[str]) -> str:
    """SHA-256 of the texts, each ended by a byte that UTF-8 has not."""
    return hashlib.sha256(b"\xff".join(text.encode() for text in made)).hexdigest()


if __name__ == "__main__":
    print(DIGEST, len(texts()), *(f"{kind.__name__} {count}" for kind, count in KINDS), f"mixed {MIXED}")
