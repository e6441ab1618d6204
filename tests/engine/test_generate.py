"""Generation: which tokens, which text, where it ends and why, and what is refused before anything is read.

Most tests run on a model that is told what to say: a session in front of the toy model whose forward gives the next
token of a script the highest logit. Its tokenizer is the toy model's, a byte a token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixkv
from mixkv import CachePolicy, SamplingParams, Session, Token, generate
from mixkv.models.errors import UsageError
from mixkv.models.load import Model

EOS = 257
PROMPT = [72, 105]  # "Hi"


class Scripted(Session):
    """A session whose model says the bytes of ``script``, then nothing but newlines."""

    def __init__(self, model: Model, script: str | Sequence[int], **options: Any) -> None:
        super().__init__(model, **options)
        self.script = [*(script.encode() if isinstance(script, str) else script)]
        self.fed: list[int] = []

    def forward(self, token_ids: Any, logits: Any = "all", *, progress: Any = None) -> Any:
        ids = self.check_fits(token_ids)
        self.fed += ids.tolist()
        self.position += len(ids)
        row = np.zeros(self.model.config.vocab_size, np.float32)
        row[self.script.pop(0) if self.script else 10] = 10
        return row


def said(session: Session, prompt: Sequence[int] = PROMPT, **options: Any) -> tuple[str, str | None, list[int]]:
    """The whole text, the reason of the end and the ids; only the last token may carry a reason."""
    tokens = list(generate(session, prompt, **options))
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    return "".join(token.text for token in tokens), tokens[-1].finish_reason, [token.id for token in tokens]


# --- tokens -------------------------------------------------------------------------------------------------------


def by_hand(model: Model, policy: CachePolicy, prompt: list[int], count: int) -> list[int]:
    session, tokens = Session(model, policy), list[int]()
    fed = prompt
    for _ in range(count):
        fed = [int(session.forward(fed, "last").argmax())]
        tokens += fed
    return tokens


@pytest.mark.parametrize("policy", [CachePolicy.full(), CachePolicy(window=8, sinks=1, tile=32)], ids=str)
def test_greedy_is_the_argmax_of_every_step(toy: Model, policy: CachePolicy) -> None:
    prompt = toy.encode("The quick brown fox jumps over the lazy dog")
    expected = by_hand(toy, policy, prompt, 50)
    assert len(set(expected)) > 5
    session = Session(toy, policy)
    tokens = list(generate(session, prompt, max_tokens=50))
    assert [token.id for token in tokens] == expected
    assert "".join(token.text for token in tokens) == toy.tokenizer.decode(expected)
    assert session.position == len(prompt) + 49  # the last token has not been fed


def test_generation_goes_on_where_the_session_stands(toy: Model) -> None:
    expected = by_hand(toy, CachePolicy(), toy.encode("Once"), 20)
    session = Session(toy)
    first = [token.id for token in generate(session, toy.encode("Once"), max_tokens=12)]
    second = [token.id for token in generate(session, first[-1:], max_tokens=8)]
    assert first + second == expected


def test_a_seed_gives_the_same_text_again_and_another_seed_another(toy: Model) -> None:
    def text(seed: int | None) -> str:
        return said(Session(toy), sampling=SamplingParams(temperature=1.0, seed=seed), max_tokens=40)[0]

    assert text(1) == text(1)
    assert len({text(1), text(2), text(3)}) == 3
    assert text(None) != text(None)


def test_the_repeat_penalty_counts_the_prompt_and_what_was_generated(toy: Model) -> None:
    """A model of equal logits: a penalty makes each token come once, those of the prompt last."""
    head = replace(toy.transformer.weights, head=_constant_head(toy))
    flat = replace(toy, transformer=type(toy.transformer)(toy.config, head))
    ids = said(Session(flat), prompt=[0, 2, 4], sampling=SamplingParams(repeat_penalty=2.0), max_tokens=6)[2]
    assert ids == [1, 3, 5, 6, 7, 8]
    assert said(Session(flat), prompt=[0, 2, 4], max_tokens=3)[2] == [0, 0, 0]


def _constant_head(model: Model) -> Any:
    head = model.transformer.weights.head
    return type(head)(np.zeros_like(head.weight), np.ones(len(head.weight), np.float32))


def test_tokens_come_one_by_one_and_breaking_off_leaves_the_session_usable(toy: Model) -> None:
    session = Scripted(toy, "abcdef")
    tokens = generate(session, PROMPT)
    assert session.fed == []  # nothing is read before the first token is asked for
    assert next(tokens) == Token(97, "a")
    assert session.fed == PROMPT
    assert next(tokens) == Token(98, "b")
    assert session.fed == [*PROMPT, 97]
    tokens.close()
    assert session.position == 3


def test_progress_counts_the_prompt(toy: Model) -> None:
    done: list[int] = []
    list(generate(Session(toy, chunk=4), list(b"0123456789"), max_tokens=3, progress=done.append))
    assert done == [4, 8, 10]


def test_the_prompt_may_be_an_array(toy: Model) -> None:
    assert said(Session(toy), prompt=np.array(PROMPT), max_tokens=5) == said(Session(toy), max_tokens=5)


# --- the end ------------------------------------------------------------------------------------------------------


def test_length_ends_after_max_tokens(toy: Model) -> None:
    session = Scripted(toy, "abcdef")
    assert said(session, max_tokens=3) == ("abc", "length", [97, 98, 99])
    assert session.fed == [*PROMPT, 97, 98]
    assert said(Scripted(toy, "abc"), max_tokens=1) == ("a", "length", [97])


def test_context_ends_when_the_session_is_full(toy: Model) -> None:
    session = Scripted(toy, "abcdef", context=5)
    assert said(session) == ("abcd", "context", [97, 98, 99, 100])
    assert session.position == 5
    assert said(Scripted(toy, "abc", context=2)) == ("a", "context", [97])  # the prompt fills it
    assert said(Scripted(toy, "abcdef", context=5), max_tokens=4)[1] == "length"


def test_context_ends_a_real_session_too(toy: Model) -> None:
    text, reason, ids = said(Session(toy, context=40), prompt=toy.encode("0123456789"))
    assert (reason, len(ids)) == ("context", 31)
    assert text == toy.tokenizer.decode(ids)


def test_end_of_text_stops_and_shows_nothing(toy: Model) -> None:
    session = Scripted(toy, [97, 98, EOS, 99])
    assert said(session) == ("ab", "stop", [97, 98, EOS])
    assert session.fed == [*PROMPT, 97, 98]


def test_end_of_text_as_the_last_token_allowed_is_a_stop(toy: Model) -> None:
    assert said(Scripted(toy, [97, EOS]), max_tokens=2) == ("a", "stop", [97, EOS])


def test_end_of_text_can_be_ignored(toy: Model) -> None:
    assert said(Scripted(toy, [97, EOS, 98]), max_tokens=3, ignore_eos=True) == ("ab", "length", [97, EOS, 98])


def test_every_end_of_text_of_the_model_counts(toy: Model) -> None:
    config = replace(toy.config, eos_token_ids=(100, 200))
    for end in (100, 200):
        assert said(Scripted(replace(toy, config=config), [97, end, 98])) == ("a", "stop", [97, end])


# --- stop strings -------------------------------------------------------------------------------------------------


def texts(session: Session, **options: Any) -> list[str]:
    return [token.text for token in generate(session, PROMPT, **options)]


def test_a_stop_string_across_tokens_is_held_back_and_never_shown(toy: Model) -> None:
    session = Scripted(toy, "one END two")
    assert said(session, stop=["END"]) == ("one ", "stop", [*b"one END"])
    assert texts(Scripted(toy, "ab END"), stop=["END"]) == ["a", "b", " ", "", "", ""]


def test_text_that_only_began_like_a_stop_string_is_shown_as_soon_as_that_is_clear(toy: Model) -> None:
    assert texts(Scripted(toy, "aENbENDc"), stop=["END"])[:4] == ["a", "", "", "ENb"]
    # The start of a second attempt is found inside the first.
    assert texts(Scripted(toy, "EENEND"), stop=["END"]) == ["", "E", "", "EN", "", ""]
    assert said(Scripted(toy, "aabaabaaab."), stop=["aabaaa"])[0] == "aab"


def test_held_back_text_is_shown_at_the_end(toy: Model) -> None:
    assert said(Scripted(toy, "abEN"), stop=["END"], max_tokens=4) == ("abEN", "length", [*b"abEN"])
    assert said(Scripted(toy, [*b"abEN", EOS]), stop=["END"]) == ("abEN", "stop", [*b"abEN", EOS])
    assert said(Scripted(toy, "abEN", context=5), stop=["END"]) == ("abEN", "context", [*b"abEN"])


def test_the_first_of_several_stop_strings_counts(toy: Model) -> None:
    assert said(Scripted(toy, "one, two. three"), stop=[".", ","])[0] == "one"
    assert said(Scripted(toy, "abcdX"), stop=["bcd", "abcdX"])[0] == "a"
    assert said(Scripted(toy, "abcd"), stop=["cd", "bcd"])[0] == "a"  # complete at once: the earlier begins earlier
    assert said(Scripted(toy, "xyz"), stop=["q", "xyz", "yz!"])[0] == ""


def test_a_stop_string_of_one_character_ends_at_once(toy: Model) -> None:
    assert texts(Scripted(toy, "ab\nc"), stop=["\n"]) == ["a", "b", ""]


def test_a_stop_string_beyond_ascii_is_found_across_its_bytes(toy: Model) -> None:
    session = Scripted(toy, "né 😀é終わりx")
    text, reason, ids = said(session, stop=["終わ"])
    assert (text, reason) == ("né 😀é", "stop")
    assert toy.tokenizer.decode(ids) == "né 😀é終わ"


def test_the_prompt_is_not_searched_for_stop_strings(toy: Model) -> None:
    assert said(Scripted(toy, "Dx"), prompt=[*b"EN"], stop=["END"], max_tokens=2) == ("Dx", "length", [*b"Dx"])


@given(
    st.text("abé😀", max_size=25), st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=3), st.integers(1, 30)
)
@settings(max_examples=150, deadline=None)
def test_the_text_is_that_of_the_tokens_up_to_the_first_complete_stop_string(
    toy: Model, script: str, stops: list[str], max_tokens: int
) -> None:
    text, reason, ids = said(Scripted(toy, script), stop=stops, max_tokens=max_tokens)
    whole = toy.tokenizer.decode(ids)
    found = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    assert text == (whole[: min(found)] if found else whole)
    # A stop string must be complete in whole characters; then no further token is drawn.
    assert reason == ("stop" if found else "length")
    assert not any(stop in toy.tokenizer.decode(ids[:-1]) for stop in stops)
    assert found or len(ids) == max_tokens


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("invalid-utf8")
def test_a_character_split_over_tokens_comes_whole(toy: Model) -> None:
    assert texts(Scripted(toy, "é😀!"), max_tokens=7) == ["", "é", "", "", "", "😀", "!"]


@pytest.mark.fault("invalid-utf8")
def test_a_character_that_is_never_completed_becomes_one_replacement_at_the_end(toy: Model) -> None:
    text, reason, ids = said(Scripted(toy, "a😀"), max_tokens=3)
    assert (text, reason) == ("a\ufffd", "length") and text == toy.tokenizer.decode(ids)


@given(st.lists(st.integers(0, 255), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_texts_of_any_tokens_together_are_what_decode_gives(toy: Model, script: list[int]) -> None:
    text, _, ids = said(Scripted(toy, script), max_tokens=len(script) + 1)
    assert text == toy.tokenizer.decode(ids)


def test_a_model_without_a_tokenizer_gives_ids_and_no_text(toy: Model) -> None:
    silent = replace(toy, tokenizer=None)
    tokens = list(generate(Session(silent), PROMPT, max_tokens=4))
    assert [token.text for token in tokens] == [""] * 4
    assert [token.id for token in tokens] == by_hand(toy, CachePolicy(), PROMPT, 4)
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        generate(Session(silent), PROMPT, stop=["x"])


# --- fault row 27 ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("interrupt")
def test_an_interrupt_while_generating_keeps_what_was_said(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault row 27: the tokens so far stand, and a new generation from the last of them goes on as if nothing was."""
    expected = by_hand(toy, CachePolicy(), PROMPT, 12)
    session, tokens = Session(toy), []
    running = generate(session, PROMPT, max_tokens=12)
    original, calls = mixkv.engine.cache.Cache.attend, 0

    def interrupting(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 * 5 + 2:  # the middle layer of the sixth pass
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mixkv.engine.cache.Cache, "attend", interrupting)
        for token in running:
            tokens.append(token.id)
    assert tokens == expected[:5] and session.position == len(PROMPT) + 4
    tokens += [token.id for token in generate(session, tokens[-1:], max_tokens=7)]
    assert tokens == expected
