"""Lists and ranges of numbers, as options give them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.experiments.ranges import MAX_VALUES, parse_fractions, parse_numbers, parse_pairs, split_words
from mixkv.models.errors import UsageError


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["512"], [512]),
        (["512,1024"], [512, 1024]),
        (["512", "0,7"], [512, 0, 7]),
        (["3-5"], [3, 4, 5]),
        (["0-4096+1024"], [0, 1024, 2048, 3072, 4096]),
        (["0-4095+1024"], [0, 1024, 2048, 3072]),
        (["1-64*2"], [1, 2, 4, 8, 16, 32, 64]),
        (["3-100*10,5"], [3, 30, 5]),
        (["7-7"], [7]),
        (["0-0*1"], [0]),
        (["0:1024:512", "5:6:7"], [0, 512, 1024, 5]),
        (["0:100:64"], [0, 64]),
        (["1:4"], [1, 2, 3, 4]),
        ([" 7:7 ", "3-5,8:9:1"], [7, 3, 4, 5, 8, 9]),
        (["5-9+100"], [5]),
        ([" 1 , 2-3 "], [1, 2, 3]),
        (["9,9"], [9, 9]),
    ],
)
def test_numbers_and_ranges(texts: list[str], numbers: list[int]) -> None:
    assert parse_numbers("-p", texts, 0, 10_000) == numbers


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60))
def test_a_range_with_a_step_is_pythons(first: int, length: int, step: int) -> None:
    for text in (f"{first}-{first + length}+{step}", f"{first}:{first + length}:{step}"):
        assert parse_numbers("-d", [text], 0, 10_000) == list(range(first, first + length + 1, step))


@given(st.integers(1, 50), st.integers(0, 5000), st.integers(2, 9))
def test_a_range_with_a_factor_is_a_geometric_row(first: int, length: int, factor: int) -> None:
    found = parse_numbers("-d", [f"{first}-{first + length}*{factor}"], 0, 10_000)
    assert found == [first * factor**i for i in range(20) if first * factor**i <= first + length]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.integers(0, 9))
def test_it_does_not_matter_how_often_an_option_is_given(numbers: list[int], cut: int) -> None:
    words = [str(number) for number in numbers]
    texts = [",".join(part) for part in (words[:cut], words[cut:]) if part]
    assert parse_numbers("-p", texts, 0, 99) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["-p", "none empty", "''"]),
        ("1,,2", ["none empty", "'1,,2'"]),
        ("1,", ["none empty"]),
        ("x", ["numbers like 512,1024", "'x'"]),
        ("-5", ["found '-5'"]),
        ("1.5", ["found '1.5'"]),
        ("1e3", ["found '1e3'"]),
        ("1-", ["found '1-'"]),
        ("1-4+", ["found '1-4+'"]),
        ("1-4+1+1", ["found '1-4+1+1'"]),
        ("1-4/2", ["found '1-4/2'"]),
        ("１", ["found"]),
        ("9" * 5000, ["found '999"]),
        ("1-4+0", ["1-4+0", "does not grow"]),
        ("0-4*2", ["0-4*2", "does not grow"]),
        ("1-4*1", ["does not grow"]),
        ("1-4*0", ["does not grow"]),
        ("4-1", ["4-1", "ends before it begins"]),
        ("4:1:1", ["4:1:1", "ends before it begins"]),
        ("1:4:0", ["1:4:0", "does not grow"]),
        ("1:4:", ["found '1:4:'"]),
        ("1:4*2", ["found '1:4*2'"]),
        ("1-4:2", ["found '1-4:2'"]),
        ("0-1:2", ["found '0-1:2'"]),
        ("1:2-5", ["found '1:2-5'"]),
        ("1:2:3:4", ["found '1:2:3:4'"]),
        (":4", ["found ':4'"]),
        ("0:1234567890", ["found '0:1234567890'"]),
        ("0:8:1234567890", ["found '0:8:1234567890'"]),
        ("1:１", ["found"]),
        ("0:999999999", ["at most 1000 numbers"]),
        ("5000-10001+1000,10001", ["from 0 to 10000", "found 10001"]),
        ("0-10000", ["at most 1000 numbers"]),
        ("0-999999999", ["at most 1000 numbers"]),
    ],
)
def test_what_is_no_number_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_numbers("-p", [text], 0, 10_000)
    message = str(caught.value)
    assert message.startswith("-p") and "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message


def test_as_many_as_allowed_are_taken() -> None:
    assert len(parse_numbers("-p", [f"1-{MAX_VALUES}"], 0, 10_000)) == MAX_VALUES


def test_pairs() -> None:
    assert parse_pairs("-pg", ["512,128", " 3 , 0 "], 0, 512) == [(512, 128), (3, 0)]
    assert parse_pairs("-pg", [], 0, 512) == []


@pytest.mark.parametrize("text", ["", "5", "5,", "1,2,3", "1-2,3", "x,1", "-1,2", "513,1", "1,513"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-pg must be "):
        parse_pairs("-pg", [text], 0, 512)


def test_words_are_split_at_commas() -> None:
    assert split_words("--kv", ["a,b", " c:d=1 "]) == ["a", "b", "c:d=1"]
    with pytest.raises(UsageError, match="--kv must be words"):
        split_words("--kv", ["a,"])


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["0,0.25,0.5,0.75,1"], [0, 0.25, 0.5, 0.75, 1]),
        (["0:1:0.25"], [0, 0.25, 0.5, 0.75, 1]),
        (["0:1:0.1"], [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (["0.1:0.9:.3", "1.0"], [0.1, 0.4, 0.7, 1]),
        ([".5:.5:0.2"], [0.5]),
        (["0:1:1", " 0.123456789 "], [0, 1, 0.123456789]),
    ],
)
def test_fractions(texts: list[str], numbers: list[float]) -> None:
    assert parse_fractions("--depths", texts) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "none empty"), ("half", "'half'"), ("-0.5", "'-0.5'"), ("1e-1", "'1e-1'"), ("nan", "'nan'"), ("0:1", "'0:1'"),
        ("0:1:0.5:1", "'0:1:0.5:1'"), ("0.", "'0.'"), ("\uff11", "found"), ("10", "'10'"), ("0.1234567890", "found"),
        ("1.5", "from 0 to 1, found 1.5"), ("0:2:0.5", "from 0 to 1, found 0:2:0.5"), ("1:0:0.5", "ends before it begins"),
        ("0:1:0", "does not grow"), ("0:1:0.0001", "at most 1000 numbers"), ("1:1:0", "does not grow"),
    ],
)  # fmt: skip
def test_what_is_no_fraction_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^--depths") as caught:
        parse_fractions("--depths", [text])
    assert words in str(caught.value) and "\n" not in str(caught.value)
