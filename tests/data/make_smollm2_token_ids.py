"""Writes smollm2_token_ids.json: texts and their token ids, from two oracles that must agree.

The first is transformers, which reads the vocabulary from the same GGUF file; it leaves out the step that SmolLM2's
published tokenizer.json starts with (every digit a word of its own), so that step is put back. The second is the
algorithm written out naively on top of the `regex` package. Neither shares code with mixkv.

    pip install transformers torch gguf regex
    python tests/data/make_smollm2_token_ids.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

import regex
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXTS = [
    "",
    "a",
    " ",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    " leading space",
    "trailing space ",
    "don't can't we'll they've I'm you'd it's",
    "DON'T SHOUT'S",
    "naive caf\u00e9 \u00fcber stra\u00dfe",
    "a\u0301 e\u0301 combining n\u0303",
    "\u00e9 \u1e69 precomposed",
    "1234567890",
    "in 1999, 3.14159 and 2,000,000",
    "a  1   2",
    "x 12  34\n56",
    "\u0661\u0662\u0663 \u2167 \u00bd \u00b2",
    "2024-01-31T23:59:59Z",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b[i];\n}\n",
    "<html><body class=\"x\">&nbsp;</body></html>",
    "SELECT * FROM t WHERE a != 'b' AND c >= 10;",
    "\\frac{1}{2} \\alpha_{i,j}^{2}",
    "{\"key\": [1, 2.5, null, true]}",
    "https://example.org/a/b?c=d&e=f#g",
    "  two spaces",
    "        eight spaces",
    "a    b     c",
    "tabs\t\tand\ttabs",
    "line\nline\n\nparagraph\n\n\n",
    "windows\r\nline\r\nends",
    "mixed \n \t \r\n whitespace",
    "no-break\u00a0space thin\u2009space ideographic\u3000space",
    "zero\u200bwidth \u200d joiner",
    "\ufeffbyte order mark",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30ab\u30bf\u30ab\u30ca",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f600 \U0001f680\U0001f680 \u2764\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea \U0001f1f0\U0001f1f7 flags \U0001f44d\U0001f3fd",
    "\U0001d54f\U0001d4ea math letters \u2211\u222b\u221a\u221e\u2260",
    "\u2018quotes\u2019 \u201cdouble\u201d \u2014 dash \u2026",
    "!!!??? ... --- === *** ###",
    "$100 \u20ac50 \u00a330 50% #tag @user",
    "CamelCaseIdentifier snake_case_identifier kebab-case",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "antidisestablishmentarianism",
    "\x00\x01 control \x7f bytes",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text",
    " <repo_name>  <file_sep> x",
    "<|im_start|><|im_start|><|im_end|>",
    "<|im_start> not <|im_sta special |im_end|>",
    "12<|im_end|>34",
    "\U0010fffd last plane \ue000 private",
    "It was a bright cold day in April, and the clocks were striking thirteen.\nWinston Smith slipped quickly through.",
]  # fmt: skip

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """GPT-2's table from bytes to characters."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        table.setdefault(byte, chr(256 + len(table) - len(kept)))
    return table


def merged(word, ranks):
    """The pieces of one word: again and again the best-ranked pair, leftmost first, becomes one."""
    pieces = list(word)
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(pieces, pieces[1:]))]  # noqa: B905
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def naive_ids(text, vocab, ranks, special):
    """The whole algorithm without any library but `regex`."""
    table, ids = byte_alphabet(), []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            ids.append(vocab[part])
            continue
        for run in regex.findall(r"\p{N}|\P{N}+", part):
            for word in WORDS.findall(run):
                ids += [vocab[p] for p in merged([table[b] for b in word.encode()], ranks)]
    return ids


def main():
    """Compare the oracles and write the file."""
    gguf = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}
    special = [token["content"] for token in state["added_tokens"]]
    rows = []
    for text in TEXTS:
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids != naive_ids(text, vocab, ranks, special):
            raise SystemExit(f"the oracles disagree on {text!r}")
        rows.append({"text": text, "ids": ids})
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("smollm2_token_ids.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
