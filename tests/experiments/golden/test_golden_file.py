"""Golden files: what is written is read back, and whatever else is in one is refused in one line."""

import copy
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixkv import CachePolicy
from mixkv.experiments.golden import file as golden_file
from mixkv.experiments.golden.file import About, Golden, Recorded
from mixkv.models.errors import GoldenFileError, MixkvError, UsageError
from mixkv.models.limits import MAX_VOCAB_SIZE

GOLDEN = Golden(
    About(
        "a/b c", "auto", CachePolicy(window=7), True, {"rope": {"factor": 2.5, "kinds": ["a", None]}, "tied": True, "n": 3},
        {"model.norm.weight": "f32 0123456789abcdef", "head.weight": "q4 with minima+q8 fedcba9876543210"},
        {"mixkv": "0.1.0"}, {"vectors": "512 bits"}, {"engine": "0" * 16},
    ),
    [
        Recorded("Grüße\n\"東京\" \x00\u2028", [1, 2, 3], "né\ufffd", [7, 0],
                 [-0.1 - 0.2, -1e-300], [[(7, -0.1 - 0.2), (3, -5.0)], [(0, -1e-300)]]),
        Recorded(None, [0], None, [MAX_VOCAB_SIZE - 1], [-0.0], [[(MAX_VOCAB_SIZE - 1, -0.0)]]),
    ],
)  # fmt: skip
DATA = json.loads(golden_file.text_of(GOLDEN))


def parsed(value: Any) -> Golden:
    return golden_file.parse(json.dumps(value).encode(), "x.json")


def changed(path: str, value: Any) -> Any:
    """The file's data with another value at a path such as prompts.0.token_ids; a deleted one for ``...``."""
    data = copy.deepcopy(DATA)
    *way, last = path.split(".")
    place = data
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return data


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    golden_file.write(path, GOLDEN)
    assert golden_file.read(path) == GOLDEN
    text = path.read_text(encoding="utf-8")
    assert math.copysign(1, golden_file.read(path).prompts[1].logprobs[0]) == -1
    assert (
        '\n      "prompt_ids": [1, 2, 3],\n' in text and "Grüße" in text
    )  # people read it, and compare versions of it
    assert "\n        [[7, -0.30000000000000004], [3, -5.0]],\n" in text
    assert json.loads(text)["about"]["policy"] == str(CachePolicy(window=7))


@given(
    st.lists(
        st.tuples(st.integers(0, MAX_VOCAB_SIZE - 1), st.floats(-1e9, 0), st.text(st.characters(codec="utf-8"))),
        min_size=1, max_size=5,
    )
)  # fmt: skip
@settings(deadline=None)
def test_any_tokens_texts_and_numbers_are_read_back(drawn: list[tuple[int, float, str]]) -> None:
    ids, numbers = [x[0] for x in drawn], [x[1] for x in drawn]
    prompts = [
        Recorded(x[2], ids, x[2], ids, numbers, [[pair] for pair in zip(ids, numbers, strict=True)]) for x in drawn
    ]
    golden = Golden(GOLDEN.about, prompts)
    assert golden_file.parse(golden_file.text_of(golden).encode(), "x") == golden


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", "mixkv golden 2", "format must be 'mixkv golden 1', found 'mixkv golden 2'"),
        ("format", ..., "format must be"),
        ("more", 1, "format, about and prompts, found"),
        ("about", [], "about must be an object"),
        ("about.model", ..., "about lacks model"),
        ("about.more", 1, "about must have .* only, found 'more'"),
        ("about.model", 7, "about.model must be a text of at most 4096 bytes, found 7"),
        ("about.model", "x" * 5000, "about.model must be a text"),
        ("about.weights", "q5", "about.weights must be null or one of auto, .*found 'q5'"),
        ("about.weights", [], "about.weights must be"),
        ("about.chat", 1, "about.chat must be true or false, found 1"),
        ("about.policy", "k5v5", "cache policy 'k5v5': k_bits"),
        ("about.policy", "k4v4", "policy must be in its canonical form, 'sinks=4 .*found 'k4v4'"),
        ("about.policy", None, "about.policy must be a text"),
        ("about.config", [], "about.config must be an object"),
        ("about.config.rope", {"x y": 1}, "a name in about.config.rope must be letters"),
        ("about.config.n", [math.nan], r"about.config.n\[0\] must be a finite number"),
        ("about.config.n", [0] * 1024, "at most 1024 values, 8 deep"),
        ("about.config.n", [[[[[[[[[[]]]]]]]]]], "at most 1024 values, 8 deep"),
        ("about.config.n", "x" * 5000, "about.config.n must be a text"),
        ("about.tensors", {}, "about.tensors must be an object of 1 to"),
        ("about.tensors", {"a\nb": "f32 0123456789abcdef"}, "a name in about.tensors"),
        ("about.tensors.a", "f32 0123", "about.tensors.a must be a format and 16 hexadecimal digits, found 'f32 0123'"),
        ("about.tensors.a", None, "about.tensors.a must be"),
        ("about.versions", [], "about.versions must be an object"),
        ("about.cpu", {"a": 1}, "about.cpu must be a text"),
        ("about.code", {"x" * 5000: ""}, "about.code must be a text"),
        ("prompts", [], "prompts must be a list of 1 to 1024 items, found 0 of them"),
        ("prompts", DATA["prompts"] * 513, "found 1026 of them"),
        ("prompts", {}, "prompts must be a list"),
        ("prompts.0", 1, r"prompts\[0\] must be an object"),
        ("prompts.1.logprobs", ..., r"prompts\[1\] lacks logprobs"),
        ("prompts.0.text", 1, r"prompts\[0\].text must be a text"),
        ("prompts.0.text", "\ud800", r"prompts\[0\].text must be text without lone surrogates"),
        ("prompts.0.generated", [], r"prompts\[0\].generated must be a text"),
        ("prompts.0.prompt_ids", [], r"prompts\[0\].prompt_ids must be a list of 1 to"),
        ("prompts.0.prompt_ids.1", -1, r"prompts\[0\].prompt_ids\[1\] must be a token id from 0"),
        ("prompts.0.prompt_ids.1", True, "must be a token id"),
        ("prompts.0.token_ids.1", 1.0, "must be a token id"),
        ("prompts.0.token_ids.1", MAX_VOCAB_SIZE, "must be a token id"),
        ("prompts.0.token_ids", [7], r"prompts\[0\].logprobs must be a list of 1 items, found 2 of them"),
        ("prompts.0.alternatives", [[[7, -0.30000000000000004]]], r"prompts\[0\].alternatives must be a list of 2 items"),
        ("prompts.0.logprobs.0", 0.1, r"prompts\[0\].logprobs\[0\] must be a logarithm of a probability"),
        ("prompts.0.logprobs.0", math.nan, "must be a logarithm"),
        ("prompts.0.logprobs.0", -math.inf, "must be a logarithm"),
        ("prompts.0.logprobs.0", None, "must be a logarithm"),
        ("prompts.0.logprobs.0", False, "must be a logarithm"),
        ("prompts.0.logprobs.0", -(10**400), "within the range of a float64"),
        ("prompts.0.logprobs.0", -1.0, r"prompts\[0\].alternatives\[0\]\[0\] must be the token taken, \(7, -1.0\)"),
        ("prompts.0.alternatives.0", [], r"alternatives\[0\] must be a list of 1 to 64 items"),
        ("prompts.0.alternatives.0.1", [3], r"alternatives\[0\]\[1\] must be a list of 2 items"),
        ("prompts.0.alternatives.0.1", [7, -5.0], "tokens that are not the same"),
        ("prompts.0.alternatives.0.1", [3, -0.1], "in the order of their log-probabilities"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(path: str, value: Any, words: str) -> None:
    with pytest.raises(GoldenFileError, match=f"^x.json: .*{words}") as caught:
        parsed(changed(path, value))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, x in items for place in places(x, (*path, key)))]


@given(st.sampled_from(places(DATA)[1:]), JSON, st.sampled_from(["replaced", "deleted", "doubled"]))
@settings(max_examples=400, deadline=None)
def test_a_file_with_any_value_changed_is_read_or_refused(place: tuple[Any, ...], value: Any, how: str) -> None:
    data = copy.deepcopy(DATA)
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    if how == "replaced":
        inside[place[-1]] = value
    elif how == "deleted":
        del inside[place[-1]]
    elif isinstance(inside, list):
        inside.insert(place[-1], inside[place[-1]])
    try:
        golden = parsed(data)
    except MixkvError as error:
        assert isinstance(error, GoldenFileError) and "\n" not in str(error)
        return
    again = golden_file.parse(golden_file.text_of(golden).encode(), "x")
    assert again == golden


@given(st.data())
@settings(max_examples=300, deadline=None)
@example(None)
def test_a_file_with_any_bytes_changed_is_read_or_refused(data: Any) -> None:
    whole = golden_file.text_of(GOLDEN).encode()
    damaged = bytearray(whole)
    if data is not None:
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, min(len(whole), start + 40)) | st.just(len(whole)))
        damaged[start:stop] = data.draw(st.binary(max_size=8) | st.sampled_from([b"NaN", b"1e999", b"[[", b"{}", b"-"]))
    try:
        golden_file.parse(bytes(damaged), "x")
    except MixkvError as error:
        assert isinstance(error, GoldenFileError)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "no such file"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(GoldenFileError, match=words):
            golden_file.read(path)
    path = tmp_path / "g.json"
    path.write_bytes(b'{"format": ')
    with pytest.raises(GoldenFileError, match="g.json: no golden file: not valid JSON") as caught:
        golden_file.read(path)
    assert caught.value.exit_code == 7
    path.write_bytes(b'{"format": 1, "format": 2}')
    with pytest.raises(GoldenFileError, match="'format' appears twice"):
        golden_file.read(path)
    monkeypatch.setattr(golden_file, "MAX_GOLDEN_BYTES", 20)
    with pytest.raises(GoldenFileError, match="more than the 20 bytes"):
        golden_file.read(path)


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    golden_file.check_place(path, force=False)
    path.write_text("x")
    golden_file.check_place(path, force=True)
    with pytest.raises(UsageError, match="is there already: --force replaces it"):
        golden_file.check_place(path, force=False)
    for place, words in ((tmp_path / "no" / "g.json", "there is no folder"), (tmp_path, "it is no file"),
                         (path / "g.json", ""), (Path("a\0b"), "")):  # fmt: skip
        with pytest.raises(GoldenFileError, match=f"cannot be written: {words}"):
            golden_file.check_place(place, force=True)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_writing_that_fails_leaves_what_was_there(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g.json"
    path.write_text("before")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(GoldenFileError, match="g.json: cannot be written: No space left on device"):
            golden_file.write(path, GOLDEN)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["g.json"]
    golden_file.write(path, GOLDEN)
    assert golden_file.read(path) == GOLDEN and os.listdir(tmp_path) == ["g.json"]


def test_a_link_stays_one_and_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "g.json"
    link.symlink_to(tmp_path / "real" / "g.json")
    golden_file.write(link, GOLDEN)
    assert link.is_symlink() and golden_file.read(tmp_path / "real" / "g.json") == GOLDEN
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert golden_file.check_place(tmp_path / "new", force=False) is None


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    bad = Golden(GOLDEN.about, [Recorded("x", [1], None, [2], [0.5], [[(2, 0.5)]])])
    with pytest.raises(GoldenFileError, match="must be a logarithm"):
        golden_file.write(tmp_path / "g.json", bad)
    assert os.listdir(tmp_path) == []
