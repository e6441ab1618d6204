"""10,000 texts that try a tokenizer: many scripts, code, emoji, whitespace, invalid UTF-8, special tokens.

Made anew wherever it is needed, always the same: the Mersenne Twister, `random()` alone of it, Unicode 3.2 (which Python
keeps beside the current version) and ranges written out here. DIGEST holds it to that.

    python tests/data/tokenizers/corpus.py     # prints the digest and how many texts of each kind there are
"""

import hashlib
import random
import unicodedata

UNICODE = unicodedata.ucd_3_2_0
DIGEST = "972b90c3fe9c800f580b9b2ff482a14098cc6f3256ab96925107f0848cd62e05"

SCRIPTS = [
    (0x0041, 0x024F), (0x0250, 0x02FF), (0x0370, 0x03FF), (0x0400, 0x052F), (0x0531, 0x058A), (0x0590, 0x05F4),
    (0x0600, 0x06FF), (0x0700, 0x074A), (0x0780, 0x07B1), (0x07C0, 0x07FA), (0x0900, 0x097F), (0x0980, 0x09FA),
    (0x0A01, 0x0A74), (0x0A81, 0x0AEF), (0x0B01, 0x0B70), (0x0B82, 0x0BF2), (0x0C01, 0x0C6F), (0x0C82, 0x0CEF),
    (0x0D02, 0x0D6F), (0x0D82, 0x0DF4), (0x0E01, 0x0E5B), (0x0E81, 0x0EDD), (0x0F00, 0x0FCF), (0x1000, 0x1059),
    (0x10A0, 0x10FB), (0x1100, 0x11F9), (0x1200, 0x137C), (0x13A0, 0x13F4), (0x1401, 0x1676), (0x1681, 0x169A),
    (0x16A0, 0x16F0), (0x1700, 0x1714), (0x1780, 0x17E9), (0x1800, 0x18A9), (0x1E00, 0x1EF9), (0x1F00, 0x1FFE),
    (0x2C80, 0x2CF3), (0x2D30, 0x2D65), (0x3041, 0x309F), (0x30A0, 0x30FF), (0x3105, 0x312C), (0x4E00, 0x9FA5),
    (0x3400, 0x4DB5), (0xA000, 0xA48C), (0xAC00, 0xD7A3), (0xFB00, 0xFB4F), (0xFB50, 0xFDFB), (0xFF01, 0xFFDC),
    (0x10300, 0x1031E), (0x10330, 0x1034A), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1E900, 0x1E943),
    (0x20000, 0x2A6D6),
]  # fmt: skip
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "I",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "one",
    "had",
    "by",
    "word",
    "but",
    "not",
    "what",
    "all",
    "were",
    "we",
    "when",
    "your",
    "can",
    "said",
    "there",
    "use",
    "an",
    "each",
    "which",
    "she",
    "do",
    "how",
    "their",
    "if",
    "will",
    "up",
    "other",
    "about",
    "out",
    "many",
    "then",
    "them",
    "these",
    "so",
    "some",
    "her",
    "would",
    "make",
    "like",
    "him",
    "into",
    "time",
    "has",
    "look",
    "two",
    "more",
    "write",
    "go",
    "see",
    "number",
    "no",
    "way",
    "could",
    "people",
    "my",
    "than",
    "first",
    "water",
    "been",
    "call",
    "who",
    "oil",
    "its",
    "now",
    "find",
    "long",
    "down",
    "day",
    "did",
    "get",
    "come",
    "made",
    "may",
    "part",
    "antidisestablishmentarianism",
    "naïve",
    "café",
    "Straße",
    "coöperate",
    "résumé",
]
ENDINGS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Ve", "\u2019s", "\u2019t", "'x", "''", "-", "."]
MARKS = [".", ",", "!", "?", "...", ";", ":", "--", "\u2014", "!?", "\u2026", "()", '"', "'", "\u201c\u201d", "/", "//"]
CODE = [
    "def {a}({b}, *{c}) -> None:\n    return {b} ** {n}\n", "for (int {a} = 0; {a} < {n}; ++{a}) {{\n\t\t{b}[{a}] += {c};\n}}\n",
    "<div class=\"{a}-{b}\">&nbsp;{c}</div>", "SELECT {a}, COUNT(*) FROM {b} WHERE {c} != '{n}' AND {a} >= {n};",
    "\\frac{{{n}}}{{{b}}} \\alpha_{{{a},{c}}}^{{{n}}}", "{{\"{a}\": [{n}, {n}.5, null, true], \"{b}\": {{}}}}",
    "https://{a}.example.org/{b}/{c}?{a}={n}&{b}=%20#{c}", "#!/bin/sh\nset -e\n{a}=$(({n} + 1)) && echo \"${a}\" | {b} > /{c}\n",
    "fn {a}<'a>(&mut self, {b}: &'a [u8; {n}]) -> Option<{c}> {{ self.{a}?; }}", "  \t@{a}\r\n  \tclass {b}({c}):\r\n\r\n\t\tpass\r\n",
    "if __name__ == '__main__':\n        {a}_{b}.{c}(x=0x{n:x}, y={n:_}, z={n}e-{n})", "let {a} = ({b}) => `${{{c}}} ${{{n}}}`; // TODO({a}): {b}!",
    "/* {a} */\n#include <{b}.h>\n#define {c} (1ULL << {n})\n\n\n", "{a}:\n  - {b}: '{c}'\n    {n}: |\n      {a}\n      {b}\n",
    "|{a}|{b}|\n|:---|---:|\n|**{c}**|`{n}`|\n", "mov  eax, [{a}+{n}*4]\t; {b}\njne  .{c}\n",
]  # fmt: skip
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2002\u2003\u2007\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
PLAIN_SPACES = [
    "  ",
    "   ",
    "    ",
    "\t\t",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n",
    "\n ",
    " \t ",
    "\u3000\u3000",
    " \u00a0",
]
HIDDEN = [
    chr(c) for c in (*range(0, 9), *range(14, 32), *range(127, 160), 0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x2060)
]
HIDDEN += [
    chr(c) for c in (0x202A, 0x202E, 0x2066, 0xFE0F, 0xFEFF, 0xFFF9, 0xFFFC, 0xFFFD, 0xE000, 0xF8FF, 0xE0061, 0x10FFFD)
]
FACES = [
    chr(c)
    for c in (*range(0x1F600, 0x1F640), *range(0x1F300, 0x1F5F0), *range(0x1F900, 0x1F9C0), 0x2764, 0x231A, 0x26BD)
]
PEOPLE = [chr(c) for c in (0x1F468, 0x1F469, 0x1F466, 0x1F467, 0x1F9D1, 0x1F476)]
JOBS = [chr(c) for c in (0x1F33E, 0x1F373, 0x1F680, 0x1F4BB, 0x2695, 0x2764)]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<bos>",
    "<eos>",
    "<mask>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_0|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<unused0>",
    "<unused98>",
    "[multimodal]",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder1|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|call|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<fim_prefix>",
    "<filename>",
    "<repo_name>",
    "<|vision_start|>",
    "<|endofprompt|>",
    "<0x0A>",
    "<0x41>",
    "<0xFF>",
    "▁",
    "▁▁",
    "▁the",
    "<table>",
    "</table>",
    "<|im_start",
    "<|eot_",
    "</s",
    "[INST",
    "<start_of_turn",
    "<|end",
]


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
    return found + (dice.pick(ENDINGS) if dice.below(8) == 0 else "")


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
            lambda: dice.pick([" ", " ", " ", ""]) + word(dice) + (dice.pick(MARKS) if dice.below(5) == 0 else ""),
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
        return dice.pick(PLAIN_SPACES) if kind == 2 else " " * (1 + dice.below(dice.pick([4, 40, 90])))

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
