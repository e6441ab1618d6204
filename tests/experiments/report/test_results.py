"""Files of results: what is read, what is noted, what is refused, and the numbers that rows of one policy become."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.experiments.report import results as reader
from mixkv.experiments.report.results import Results, read
from mixkv.experiments.report.summary import Summary, chosen, front, short, spread, summarize
from mixkv.models.errors import UsageError

from .make_results import Row, eval_row, make


def read_text(text: str | bytes, name: str = "r.jsonl") -> Results:
    return read([(name, io.BytesIO(text if isinstance(text, bytes) else text.encode()))])


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def row() -> Row:
    return eval_row(np.random.default_rng(1), "k4v2", "topics", 0)


def small(**fields: Any) -> Row:
    """An eval row with the fields that must be there."""
    return {
        "kind": "eval",
        "model": "m",
        "policy": "p",
        "spec": "k4v4",
        "document": "d",
        "kld": {"mean": 0.1},
        **fields,
    }


# --- reading -------------------------------------------------------------------------------------------------------


def test_rows_of_several_files_stand_in_their_order_by_kind() -> None:
    rows = make(2, rest=True)
    found = read([("a", io.BytesIO(lines(rows[:3]).encode())), ("b", io.BytesIO(lines(rows[3:]).encode()))])
    assert found.notes == []
    assert {kind: len(own) for kind, own in found.rows.items()} == {
        "eval": 4,
        "window-curve": 2,
        "needle": 3 * 2 * 3 * 5 * 4,
        "bench": 50,
    }
    assert found.rows["eval"] == [row for row in rows if row.get("kind") == "eval"]
    assert sorted(map(id, found.every)) == sorted({id(row) for row in found.every}) and len(found.every) == len(rows)


def test_blank_lines_and_a_last_line_without_its_newline_are_fine(row: Row) -> None:
    found = read_text("\n" + lines([row]) + "  \n" + json.dumps({**row, "key": "x"}))
    assert len(found.rows["eval"]) == 2 and found.notes == []


@pytest.mark.parametrize("cut", [1, 40, 3000])
def test_a_torn_last_line_is_noted_and_left_out(row: Row, cut: int) -> None:
    found = read_text(lines([row, {**row, "key": "x", "policy": "é"}])[:-cut])
    if cut == 1:  # the newline alone
        assert len(found.rows["eval"]) == 2 and found.notes == []
        return
    assert len(found.rows["eval"]) == 1
    assert found.notes == ["r.jsonl:2: the last line was not written to its end, and is left out"]


def test_a_last_line_torn_within_a_character_is_torn_as_well(row: Row) -> None:
    found = read_text(lines([row]).encode() + '{"kind": "é'.encode()[:-1])
    assert len(found.rows["eval"]) == 1 and "r.jsonl:2" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"kind": "eval"', ["must be a JSON object", "character"]),
        ("nonsense", ["'nonsense", "Expecting value"]),
        ("[1]", ["must be a JSON object, found [1]"]),
        ('{"kind": "eval", "kld": NaN}', ["NaN", "null"]),
        ('{"kind": "eval", "kld": -Infinity}', ["-Infinity"]),
        ("[" * 100_000, ["nested"]),
        ('{"a": ' + "1" * 5000 + "}", ["digits"]),
    ],
)
def test_a_broken_line_is_refused_with_its_place(row: Row, line: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read_text(lines([row]) + line + "\n" + lines([row]))
    message = str(caught.value)
    assert message.startswith("r.jsonl:2: ") and "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


def test_what_is_no_text_is_refused_with_its_place(row: Row) -> None:
    with pytest.raises(UsageError, match="r.jsonl:1: .* not UTF-8 at byte 0"):
        read_text(b"\xff\xfe\n" + lines([row]).encode())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": None}, ["policy must be there"]),
        ({"kld": 3}, ["kld must be an object, found 3"]),
        ({"kld": {"mean": "0.1"}}, ["kld.mean must be a number", "'0.1'"]),
        ({"kld": {"mean": True}}, ["kld.mean must be a number", "True"]),
        ({"kld": {"mean": 1e101}}, ["kld.mean", "1e100"]),
        ({"policy": ["x"]}, ["policy must be a text", "['x']"]),
        ({"tokens": -1}, ["tokens must be a whole number", "-1"]),
        ({"tokens": 1.5}, ["tokens must be a whole number", "1.5"]),
        ({"tokens": 1 << 70}, ["tokens must be a whole number"]),
        ({"rotate_k": 1}, ["rotate_k must be true or false"]),
        ({"worst": [{"token": "x"}, {"token": 5}]}, ["worst[1].token must be a text, found 5"]),
        ({"worst": [None]}, ["worst[0] must not be null"]),
        ({"mass_by_layer": {"names": ["a", "b"], "shares": [[1, 2], [1]]}}, ["shares[1] must have 2 items", "found 1"]),
        ({"local_errors": {"k": [[1, 2], [1, 2, 3]]}}, ["local_errors.k[1] must have 2 items"]),
        ({"histogram": {"low": -9, "high": 2, "per_decade": 5, "counts": [1]}}, ["histogram", "found 1 counts"]),
        ({"histogram": {"low": -9, "high": 2}}, ["histogram must have"]),
        ({"histogram": {"low": -1e9, "high": 2, "per_decade": 5, "counts": []}}, ["histogram"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(changes: Row, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read_text(lines([small(), small(**changes)]))
    assert str(caught.value).startswith("r.jsonl:2: ") and all(word in str(caught.value) for word in words), (
        caught.value
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"errors": [0.1]}, ["errors must have an item for each of the 2 windows, found 1"]),
        ({"by_layer": [[0.1], [0.1, 0.2]]}, ["by_layer[1] must have 1 items"]),
    ],
)
def test_lists_of_a_window_curve_go_with_its_windows(changes: Row, words: list[str]) -> None:
    curve = {"kind": "window-curve", "model": "m", "policy": "p", "document": "d", "windows": [0, 64], "errors": [2, 1]}
    assert len(read_text(lines([curve])).rows["window-curve"]) == 1
    with pytest.raises(UsageError) as caught:
        read_text(lines([{**curve, **changes}]))
    assert all(word in str(caught.value) for word in words)


def test_numbers_may_be_null_and_fields_absent() -> None:
    found = read_text(lines([small(kld={"mean": None, "se": None}, ppl=None, worst=None, local_errors=None)]))
    assert found.rows["eval"][0]["kld"]["mean"] is None


def test_other_kinds_are_left_out_and_counted() -> None:
    found = read_text(lines([small(), {"kind": "startup"}, {"kind": "startup"}, {"x": 1}, {"kind": ["a"]}]))
    assert len(found.every) == 1
    assert found.notes == ["rows of kinds that a report does not know are left out: 'startup' (2), None (1), ['a'] (1)"]


def test_a_row_that_stands_there_twice_counts_once() -> None:
    found = read_text(lines([small(key="a"), small(key="b"), small(key="a"), small(), small()]))
    assert len(found.every) == 4 and found.notes == [
        "1 rows stand there more than once (the same key): each is taken once"
    ]


def test_without_a_row_there_is_no_report() -> None:
    for text in ("", "\n", lines([{"kind": "other"}])):
        with pytest.raises(UsageError, match=r"r.jsonl: no row .*`mixkv sweep"):
            read_text(text)


def test_lines_and_rows_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_RESULT_LINE_BYTES", 300)
    assert len(read_text(lines([small()])).every) == 1
    with pytest.raises(UsageError, match="r.jsonl:2: a line must have at most 300 bytes"):
        read_text(lines([small(), small(command="x" * 300)]))
    monkeypatch.setattr(reader, "MAX_RESULT_ROWS", 3)
    with pytest.raises(UsageError, match="b:2: a report is made of at most 3 rows"):
        read([("a", io.BytesIO(lines([small()] * 2).encode())), ("b", io.BytesIO(lines([small()] * 2).encode()))])


# --- summaries -----------------------------------------------------------------------------------------------------


def piece(policy: str, document: str, mean: float, predicted: int, **fields: Any) -> Row:
    kld = {"mean": mean, "se": mean / 10, "median": mean / 2, "p99": mean * 5, "p999": mean * 9, "max": mean * 20}
    return small(policy=policy, spec=policy, document=document, kld=kld, predicted_tokens=predicted, **fields)


def test_pieces_of_a_policy_are_averaged_by_their_predictions() -> None:
    rows = [
        piece("a", "x", 0.1, 100, top1=0.9, kv_bytes_per_old_token=50.0, command="one"),
        piece("b", "x", 0.5, 100, kv_bytes_per_old_token=40.0),
        piece("a", "y", 0.4, 300, top1=0.7, kv_bytes_per_old_token=50.0, command="two"),
    ]
    b, a = summarize(rows)
    assert (a.label, b.label, a.index, b.index, a.bytes_old) == ("a", "b", 1, 0, 50)
    assert a.kl["mean"] == pytest.approx((0.1 * 100 + 0.4 * 300) / 400)
    assert a.kl["p999"] == pytest.approx((0.9 * 100 + 3.6 * 300) / 400)
    assert a.kl["max"] == pytest.approx(8) and a.mean("top1") == pytest.approx(0.75)
    assert a.commands == ("one", "two") and b.commands == () and b.mean("top1") is None
    # The same predictions as one piece: the error of a mean of 400 independent numbers of these two variances.
    spread_ = (0.01**2 * 100**2 + 0.04**2 * 300**2) ** 0.5 / 400
    assert a.kl["se"] == pytest.approx(spread_)


def test_other_weights_and_regimes_are_other_policies() -> None:
    rows = [
        small(weights="f32", regime="decode"),
        small(weights="q8", regime="decode"),
        small(weights="q8", regime="decode", document="another"),
    ]
    assert [(s.label, len(s.rows)) for s in summarize(rows)] == [("k4v4, f32", 1), ("k4v4, q8", 2)]


def test_a_piece_that_was_measured_twice_counts_once_and_what_one_row_lacks_the_other_has() -> None:
    once, again = small(key="a" * 16, local_errors=None), small(key="b" * 16, local_errors={"both": [[0.5]]})
    (summary,) = summarize([once, again])
    (alone,) = summarize([once])
    assert len(summary.rows) == 1 and summary.kl == alone.kl
    assert summary.rows[0]["local_errors"] == {"both": [[0.5]]} and summary.rows[0]["key"] == "a" * 16


def test_no_two_policies_have_one_label() -> None:
    rows = [small(policy=f"p{i}", policy_digest=digest) for i, digest in enumerate(["aa", "bb", "bb", None])]
    labels = [summary.label for summary in summarize([*rows, small(policy="q", spec="k2v2")])]
    assert len(set(labels)) == 5 and all("k4v4" in label or "k2v2" in label for label in labels)


def test_a_line_is_called_by_its_preset_or_by_what_is_unusual_in_it() -> None:
    from mixkv.engine.policy import PRESETS, CachePolicy

    assert short(str(PRESETS["tiny"])) == "tiny" and short("k4v2:window=64") == "k4v2:window=64"
    line = str(CachePolicy(k_axis="token", overrides=()))
    assert short(line) == "old=k4t/v4t" and CachePolicy.parse(short(line)) == CachePolicy.parse(line)


def of(index: int, nbytes: float | None, kl: float | None) -> Summary:
    return Summary(index, str(index), ({"policy": "p", "kv_bytes_per_token": nbytes},), {"mean": kl}, nbytes, ())


POINTS = st.lists(st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(0, 6)), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_other_beats(points: list[tuple[float | None, float | None]]) -> None:
    summaries = [of(i, *point) for i, point in enumerate(points)]
    known = [s for s in summaries if s.bytes_token is not None and s.kl["mean"] is not None]

    def beaten(a: Summary) -> bool:
        return any(
            b.bytes_token <= a.bytes_token and b.kl["mean"] <= a.kl["mean"]
            and ((b.bytes_token, b.kl["mean"]) != (a.bytes_token, a.kl["mean"]) or b.index < a.index)
            for b in known
        )  # fmt: skip

    expected = sorted((s for s in known if not beaten(s)), key=lambda s: s.bytes_token)
    assert front(summaries, lambda s: s.kl["mean"]) == expected


@given(st.integers(0, 40), st.integers(2, 9))
def test_a_spread_has_both_ends_and_no_more_than_asked_for(count: int, most: int) -> None:
    items = [of(i, i, i) for i in range(count)]
    found = spread(items, most)
    assert len(found) == min(count, most) == len({s.index for s in found})
    assert found == sorted(found, key=lambda s: s.index) and (
        not items or (found[0], found[-1]) == (items[0], items[-1])
    )


def test_policies_stand_in_where_there_is_no_front() -> None:
    assert chosen([of(0, 5, 0.1), of(1, 6, 0.2)]) == [of(0, 5, 0.1), of(1, 6, 0.2)]
    assert [s.index for s in chosen([of(0, 5, 0.1), of(1, 6, 0.2), of(2, 7, 0.01)])] == [0, 2]
