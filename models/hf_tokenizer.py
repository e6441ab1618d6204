"""A tokenizer as the tokenizer.json and tokenizer_config.json of a folder, as tokenizer_from_json reads it."""

import json
from typing import Any

from .bpe import SPACE, BPETokenizer


def hf_tokenizer(tokenizer: BPETokenizer, max_length: int) -> dict[str, dict[str, Any]]:
    """File name -> content. ``max_length`` is the model's context in tokens."""
    return {"tokenizer.json": _tokenizer_json(tokenizer), "tokenizer_config.json": _config(tokenizer, max_length)}


def _tokenizer_json(tokenizer: BPETokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    for added in content["added_tokens"]:  # special is what has no text
        added["special"] = not tokenizer.pieces[added["id"]]
    if content["decoder"] is None:  # decoding is our own, so nothing but readers of the file needs one
        byte_level = '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
        content["decoder"] = _BYTE_LEVEL if byte_level else _sentencepiece(tokenizer.strip_left)
    if tokenizer.prefix and content["post_processor"] is None:
        content["post_processor"] = _prefixed(tokenizer)
    return content


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _sentencepiece(strip_left: bool) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_left:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _prefixed(tokenizer: BPETokenizer) -> dict[str, Any]:
    """The template that puts the tokens in front of a text which ``encode`` puts there."""
    names = {index: tokenizer.backend.id_to_token(index) for index in tokenizer.prefix}
    before = [{"SpecialToken": {"id": names[index], "type_id": 0}} for index in tokenizer.prefix]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in names.items()}
    return {"type": "TemplateProcessing", "single": [*before, text], "pair": [*before, text, other],
            "special_tokens": tokens}  # fmt: skip


def _config(tokenizer: BPETokenizer, max_length: int) -> dict[str, Any]:
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(tokenizer.prefix),
    }
    optional = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
    }
    return content | {name: text for name, text in optional.items() if text}
