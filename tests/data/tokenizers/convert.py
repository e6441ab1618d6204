"""What llama.cpp's convert_hf_to_gguf.py writes into a GGUF file about a tokenizer, from a tokenizer.json.

Written from its rules (conversion/base.py: get_vocab_base, _create_vocab_sentencepiece), not with its code. Scores are
only in SentencePiece's own files: here a token's score is the place of its first merge, which is what they were made of.
"""

from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"


def looks_special(token: str) -> bool:
    """Tokens that are control tokens whatever tokenizer.json says."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>")))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _vocabulary(content: dict[str, Any], *, is_byte_level: bool) -> tuple[list[str], list[int]]:
    added = {each["id"]: each for each in content["added_tokens"]}
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    by_id |= {index: each["content"] for index, each in added.items()}
    tokens, types = [], []
    for index in range(max(by_id) + 1):
        token, kind = by_id.get(index, f"[PAD{index}]"), NORMAL if index in by_id else UNUSED
        if index in added:
            kind = CONTROL if added[index]["special"] or looks_special(token) else USER_DEFINED
            if kind == USER_DEFINED:
                token = token.replace(SPACE, " ")
        elif not is_byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def gguf_metadata(content: dict[str, Any], pre: str | None = None, **more: Any) -> dict[str, Any]:
    """The keys of a GGUF file for this tokenizer.json. ``pre``: of a byte-level one; None for SentencePiece's."""
    tokens, types = _vocabulary(content, is_byte_level=pre is not None)
    merges = [
        tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in content["model"]["merges"]
    ]
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if pre is not None:
        keys |= {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}
    else:
        place: dict[str, int] = {}
        for index, pair in enumerate(merges):
            place.setdefault("".join(pair), index)
        scores = [-float(place.get(token, len(merges))) for token in tokens]
        scores = [score if kind == NORMAL else -1000.0 for score, kind in zip(scores, types, strict=True)]
        unknown = content["model"].get("unk_token")
        keys |= {"model": "llama", "pre": "default", "scores": scores}
        if unknown is not None:
            keys["unknown_token_id"] = tokens.index(unknown)
        keys["add_space_prefix"] = "Prepend" in str(content["normalizer"])
    keys |= {"add_bos_token": False, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
