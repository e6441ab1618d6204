"""The corpus of tests/data/tokenizers, its conversion to GGUF metadata, and small tokenizers made in a family's way."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers

FOLDER = Path(__file__).parent.parent / "data" / "tokenizers"
SPACE = "\u2581"
CONTROL, ADDED = ["<unk>", "<s>", "</s>", "<|im_start|>"], ["<tool_call>", "<|x", "\n\n", "\n\n\n", "  ", "    "]


def script(name: str) -> ModuleType:
    """A script of that folder as a module."""
    spec = importlib.util.spec_from_file_location(f"tokenizers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def texts() -> list[str]:
    """The 10,000 texts."""
    return script("corpus").texts()


PIPELINES: dict[str, Any] = json.loads((FOLDER / "pipelines.json").read_text("utf-8"))
FAMILIES = [name for name in PIPELINES if name not in ("refact", "starcoder")]  # those two are smollm's


def naive_merges(pieces: list[str], scores: dict[str, float]) -> list[list[str]]:
    """All pairs that join to a piece, as transformers' converters order them; written out without arrays."""
    vocab, found = {piece: i for i, piece in enumerate(pieces)}, []
    for merged, score in scores.items():
        pairs = [(merged[:i], merged[i:]) for i in range(1, len(merged))]
        pairs = sorted((p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda row: row[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _trained(pipeline: dict[str, Any], size: int) -> dict[str, Any]:
    """The model of a tokenizer.json trained on every seventh text."""
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **pipeline}
    empty |= {"post_processor": None, "model": pipeline["model"] | {"vocab": {}, "merges": [], "unk_token": None}}
    backend = Tokenizer.from_str(json.dumps(empty))
    byte_level = not pipeline["model"].get("byte_fallback")
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, limit_alphabet=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [],
    )  # fmt: skip
    sample = texts()[::7] if byte_level else [word for text in texts()[::7] for word in text.split(" ")]
    backend.train_from_iterator(sample, trainer)
    return json.loads(backend.to_str())["model"]


@cache
def small_json(name: str) -> dict[str, Any]:
    """A tokenizer.json with a family's own steps, and a vocabulary of some 1,200 tokens."""
    pipeline = PIPELINES[name]
    byte_level = not pipeline["model"].get("byte_fallback")
    model = _trained(pipeline, 1000)
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    added = [token for token in ADDED if name == "gemma" or not token.isspace()]
    added = added if byte_level else [token.replace(" ", SPACE) for token in added]
    head = CONTROL if byte_level else [*CONTROL, *added, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    tokens = list(dict.fromkeys([*head, *pieces, *([*added] if byte_level else [])]))
    special = [token for token in tokens if token in CONTROL or token in added]
    merges = [list(pair) for pair in model["merges"]]
    if not byte_level:
        scores = {"".join(pair): -float(i) for i, pair in reversed(list(enumerate(merges)))}
        first = {token: 1.0 for token in added}
        scores = {token: (first | scores | first)[token] for token in tokens if token in first or token in scores}
        merges = naive_merges(tokens, scores)
    return {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [
            {"id": tokens.index(token), "content": token, "special": token in CONTROL, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for token in special
        ],
        **{key: pipeline[key] for key in ("normalizer", "pre_tokenizer", "decoder")},
        "post_processor": None,
        "model": pipeline["model"] | {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
