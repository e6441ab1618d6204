"""A tokenizer.json that makes texts longer: never by more than is foreseen, and refused where that is too much."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mixkv.models.errors import ModelError
from mixkv.models.limits import MAX_TOKENIZER_GROWTH, MAX_TOKENIZER_STEPS
from mixkv.models.tokenizer import tokenizer_from_json
from mixkv.models.tokenizer_growth import _grows, check_growth

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LLAMA2 = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def content(normalizer: Any) -> dict[str, Any]:
    return {"normalizer": normalizer, "pre_tokenizer": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}


def normalized(step: dict[str, Any], text: str) -> str:
    """What the library makes of a text."""
    return Tokenizer.from_str(json.dumps(content(step))).normalizer.normalize_str(text)


@pytest.mark.fault("long-prompt")
def test_a_tokenizer_that_makes_a_gigabyte_of_a_letter_is_refused_at_once(tmp_path: Path) -> None:
    steps = {"type": "Sequence", "normalizers": [DOUBLE] * 30}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content({"type": "Sequence", "normalizers": [steps]})))
    started = time.process_time()
    with pytest.raises(
        ModelError, match=f"a text 512 times as long, at most {MAX_TOKENIZER_GROWTH} is allowed"
    ) as caught:
        tokenizer_from_json(tmp_path)
    assert time.process_time() - started < 1 and "\n" not in str(caught.value)


def test_many_steps_that_each_do_little_are_refused() -> None:
    steps = [{"type": "Strip", "strip_left": True, "strip_right": True}] * (MAX_TOKENIZER_STEPS + 1)
    with pytest.raises(ModelError, match=f"x: more than {MAX_TOKENIZER_STEPS} steps"):
        check_growth(content({"type": "Sequence", "normalizers": steps}), "x")
    check_growth(content({"type": "Sequence", "normalizers": steps[1:]}), "x")


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, LLAMA2, {"type": "NFKC"}, "what?", {"type": 7}])
def test_what_published_tokenizers_do_is_allowed(normalizer: Any) -> None:
    check_growth(content(normalizer), "x")


texts = st.text(st.sampled_from("ab \u00e9\ufdfa\u0390\u2581\u0130\U0001d15e"), max_size=12)
replacing = st.builds(
    lambda pattern, new: {"type": "Replace", "pattern": pattern, "content": new},
    st.one_of(
        st.builds(lambda old: {"String": old}, st.text("ab", min_size=1, max_size=2)),
        st.sampled_from([{"Regex": "a*"}, {"Regex": "."}, {"Regex": "a|"}]),
    ),
    st.text("ab\u00e9", max_size=5),
)
plain = st.sampled_from([{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel")])


@settings(max_examples=300, deadline=None)
@given(st.one_of(replacing, plain), texts)
def test_no_step_makes_more_of_a_text_than_is_foreseen(step: dict[str, Any], text: str) -> None:
    """The library itself is the judge; behind the last character there is room for one more match of nothing."""
    before, after = len(text.encode()), len(normalized(step, text).encode())
    assert after <= _grows(step) * (before + 1)
