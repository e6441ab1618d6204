"""Writes sentencepiece.json: three small models that SentencePiece trained, and the ids and text it gives for some texts.

    pip install sentencepiece
    python tests/data/tokenizers/make_sentencepiece.py

One is made like Llama's (a space in front, nothing removed), one with SentencePiece's own default of removing extra
spaces, one like Gemma's (no space in front, tokens that are always recognised).
"""

import io
import json
from pathlib import Path
from typing import Any

import corpus
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

WAYS = {
    "llama": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "gemma": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<go>", "<2mass>"],
    },
    "removing": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
}


def trained(texts: list[str], way: dict[str, Any]) -> SentencePieceProcessor:
    """A model of 700 tokens."""
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=700, byte_fallback=True,
        normalization_rule_name="identity", character_coverage=0.98, num_threads=1, minloglevel=2,
        allow_whitespace_only_pieces=True, split_digits=True, **way,
    )  # fmt: skip
    return SentencePieceProcessor(model_proto=file.getvalue())


def main() -> None:
    """See above."""
    texts = corpus.texts()
    sample = [text for text in texts if "\n" not in text and "\0" not in text and len(text) < 200]
    learned = [text for text in sample if all(character < "\u0180" for character in text)]
    asked = [t for t in sample[::80] if not any(s in t for s in ("<s>", "</s>", "<unk>"))]
    asked += ["", " ", "  a  b ", "\u2581", " \u2581 x", "<go>now <2mass> <go", "tab\tnew\nline", "\U0001f9ff\u0e01"]
    recorded = {}
    for name, way in WAYS.items():
        model = trained(learned, way)
        kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
        size = model.vocab_size()
        types = [next((kind for test, kind in kinds if test(i)), 1) for i in range(size)]
        added = set(way.get("user_defined_symbols", []))
        tokens = [model.id_to_piece(i) for i in range(size)]
        types = [4 if token in added else kind for token, kind in zip(tokens, types, strict=True)]
        if way["remove_extra_whitespaces"]:  # SentencePiece takes U+2581 in a text for a space, and removes it too
            asked = [text for text in asked if "\u2581" not in text]
        ids = [model.encode(text) for text in asked]
        recorded[name] = {
            "metadata": {
                "model": "llama", "tokens": tokens, "scores": [model.get_score(i) for i in range(size)],
                "token_type": types, "unknown_token_id": model.unk_id(), "bos_token_id": model.bos_id(),
                "eos_token_id": model.eos_id(), "add_bos_token": False, "add_space_prefix": way["add_dummy_prefix"],
                "remove_extra_whitespaces": way["remove_extra_whitespaces"],
            },
            "rows": [{"text": t, "ids": i, "decoded": model.decode(i)} for t, i in zip(asked, ids, strict=True)],
        }  # fmt: skip
    lines = []
    for name, each in recorded.items():
        rows = ",\n".join(json.dumps(row) for row in each["rows"])
        lines.append(f'"{name}": {{"metadata": {json.dumps(each["metadata"])}, "rows": [\n{rows}]}}')
    text = "{" + ",\n".join(lines) + "}\n"
    Path(__file__).with_name("sentencepiece.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
