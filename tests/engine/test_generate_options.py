"""Options of generate out of range: refused when it is called, before the first token is read (fault row 21)."""

from typing import Any

import pytest

from mixkv import SamplingParams, Session, generate
from mixkv.engine.generate import MAX_STOPS, MAX_TOKENS
from mixkv.models.errors import PromptError, UsageError
from mixkv.models.load import Model


def refusal(toy: Model, error: type[Exception], **options: Any) -> str:
    session = Session(toy)
    with pytest.raises(error) as caught:
        generate(session, [72, 105], **options)
    assert session.position == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize("value", [0, -1, MAX_TOKENS + 1, 10**9, 1.0, float("nan"), "5", None, True], ids=repr)
def test_max_tokens_out_of_range_is_refused_with_name_found_and_allowed(toy: Model, value: Any) -> None:
    message = refusal(toy, UsageError, max_tokens=value)
    assert message == f"max_tokens must be a whole number from 1 to {MAX_TOKENS}, found {value!r}"


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize("stop", ["END", [""], ["a", ""], [1], [None], ["x"] * (MAX_STOPS + 1)], ids=repr)
def test_stop_strings_that_are_empty_no_strings_or_too_many_are_refused(toy: Model, stop: Any) -> None:
    assert (
        refusal(toy, UsageError, stop=stop) == f"stop must be at most {MAX_STOPS} strings, none empty, found {stop!r}"
    )


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize(
    "params",
    [{"temperature": float("nan")}, {"temperature": -1}, {"top_p": 0}, {"top_p": 2}, {"min_p": -1}, {"top_k": -1}],
    ids=repr,
)
def test_sampling_out_of_range_cannot_even_be_written_down(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(params))} must be "):
        SamplingParams(**params)


@pytest.mark.fault("context-overflow")
def test_an_empty_prompt_or_one_beyond_the_context_is_refused_with_the_numbers(toy: Model) -> None:
    session = Session(toy, context=8)
    with pytest.raises(PromptError, match="the prompt is empty"):
        list(generate(session, []))
    with pytest.raises(PromptError, match="9 tokens do not fit into the context of 8"):
        list(generate(session, [1] * 9))
    with pytest.raises(PromptError, match="token id 258 is outside of the vocabulary, 0 to 257"):
        list(generate(session, [258]))
    assert session.position == 0
