"""What a sweep goes through: policies multiplied out, and grids in TOML."""

import datetime
import itertools
import json
import re
import string
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv import CachePolicy, Override, cli
from mixkv.experiments.pieces import Setting
from mixkv.experiments.sweep.grid import AXES, MAX_SWEEP_SEED, NUMBERS, Grid, load, make, multiply, parse_axis
from mixkv.models.errors import UsageError
from mixkv.models.limits import MAX_CELLS, MAX_POLICY_BYTES

BASE = CachePolicy()


def refusal(function: Any, *arguments: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message


# --- multiplying --------------------------------------------------------------------------------------------------


def test_policies_are_multiplied_in_the_order_of_their_lists() -> None:
    bases = [BASE, CachePolicy.parse("k8v8")]
    found, merged = multiply(bases, {"window": [64, 0], "k_bits": [2, 4, 3]})
    assert merged == 0
    expected = []
    for base in bases:
        for window in (64, 0):
            for k_bits in (2, 4, 3):
                expected.append(CachePolicy(window=window, k_bits=k_bits, v_bits=base.v_bits))
    # The second base's differ from the first's in the bits of V alone, so all are there
    assert list(found) == expected


def test_without_lists_there_are_the_bases() -> None:
    assert multiply([BASE, BASE.parse("f16")], {}) == ((BASE, CachePolicy.parse("f16")), 0)


def test_combinations_that_are_one_policy_are_merged() -> None:
    assert multiply([BASE], {"window": [64, 128, 64]}) == ((CachePolicy(window=64), BASE), 1)
    # By channel a group of the tile's length is the default
    assert multiply([BASE], {"k_group": [0, 64]}) == ((BASE,), 1)
    found, merged = multiply([BASE, CachePolicy(k_bits=8)], {"k_bits": [4, 8], "rotate": ["kv", "none"]})
    assert (len(found), merged) == (4, 4)


def test_rotations_are_one_word() -> None:
    found, _ = multiply([BASE], {"rotate": ["none", "k", "v", "kv"]})
    assert [(p.rotate_k, p.rotate_v) for p in found] == [(False, False), (True, False), (False, True), (True, True)]
    assert "rotate must be one of none, k, v, kv, found 'vk'" in refusal(multiply, [BASE], {"rotate": ["vk"]})


def test_what_else_a_base_says_stays() -> None:
    base = CachePolicy(overrides=(Override("0", k_bits=8),), sinks=2)
    found, _ = multiply([base], {"window": [32]})
    assert found == (CachePolicy(window=32, sinks=2, overrides=(Override("0", k_bits=8),)),)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (
            {"window": [64], "k_bits": [4, 5]},
            ["the combination window=64 k_bits=5:", "k_bits must be one of", "found 5"],
        ),
        ({"k_bits": [4, 16], "k_axis": ["token"]}, ["the combination k_bits=16 k_axis=token:", "k_axis"]),
        ({"tile": [33]}, ["tile=33", "tile must be"]),
        ({"dense": ["f8"]}, ["dense=f8", "dense must be one of f16, bf16, f32, found 'f8'"]),
        ({"window": [(1 << 24) + 1]}, ["window must be a whole number from 0 to 16777216"]),
    ],
)
def test_a_combination_that_is_no_policy_is_named(axes: dict[str, list[Any]], words: list[str]) -> None:
    message = refusal(multiply, [BASE], axes)
    assert all(word in message for word in words), message


def test_too_many_are_refused_before_they_are_made() -> None:
    numbers = list(range(1000))
    axes = {name: numbers for name in ("window", "sinks", "rollback")}
    assert f"at most {MAX_CELLS} cells, found 1000000000 policies" in refusal(multiply, [BASE], axes)
    many = {"documents": tuple(f"{i}" for i in range(400)), "seeds": tuple(range(300))}
    assert "found 120000" in refusal(lambda: Grid(Setting(), (BASE,), **many))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "window": st.lists(st.sampled_from([0, 32, 64]), min_size=1, max_size=3),
            "k_bits": st.lists(st.sampled_from([2, 4, 16]), min_size=1, max_size=3),
            "dense": st.lists(st.sampled_from(["f16", "f32"]), min_size=1, max_size=2),
        },
    )
)
def test_products_are_all_the_policies_each_once(axes: dict[str, list[Any]]) -> None:
    found, merged = multiply([BASE], axes)
    names = list(axes)
    every = [CachePolicy(**dict(zip(names, values, strict=True))) for values in itertools.product(*axes.values())]
    assert list(found) == list(dict.fromkeys(every)) and len(found) + merged == len(every)


# --- options ------------------------------------------------------------------------------------------------------


def test_lists_of_numbers_and_of_words() -> None:
    assert parse_axis("window", ["0:512:128"]) == [0, 128, 256, 384, 512]
    assert parse_axis("window", ["512,0", "64-66"]) == [512, 0, 64, 65, 66]
    assert parse_axis("dense", ["f16,bf16", "f32"]) == ["f16", "bf16", "f32"]
    assert parse_axis("rotate", ["none,kv"]) == ["none", "kv"]


def test_every_field_of_a_policy_has_its_axis_but_tiers_and_overrides() -> None:
    names = {f.name for f in fields(CachePolicy)} - {"older", "overrides", "rotate_k", "rotate_v"}
    assert set(AXES) == names | {"rotate"}
    assert set(NUMBERS) == {name for name in names if type(getattr(BASE, name)) is int}


@pytest.mark.parametrize(
    ("name", "texts", "words"),
    [
        ("window", ["64,x"], "--window must be numbers"),
        ("k_bits", ["2-"], "--k-bits must be numbers"),
        ("sinks", ["99999999"], "--sinks must be from 0 to 16777216, found 99999999"),
        ("dense", ["f16,"], "--dense must be words"),
        ("window", [""], "--window must be words separated by commas, none empty"),
    ],
)
def test_what_is_no_list_names_its_option(name: str, texts: list[str], words: str) -> None:
    assert words in refusal(parse_axis, name, texts)


def test_a_grid_has_something_of_each_kind_and_nothing_twice() -> None:
    assert "policies must be one or more" in refusal(Grid, Setting(), ())
    assert "policies must be one or more" in refusal(Grid, Setting(), (BASE, BASE))
    assert "documents must be one or more" in refusal(lambda: Grid(Setting(), (BASE,), documents=("a", "a")))
    assert "seeds must be one or more" in refusal(lambda: Grid(Setting(), (BASE,), seeds=(3, 3)))
    assert Grid(Setting(), (BASE, CachePolicy(64)), documents=("a", "b"), seeds=(0, 5, 9)).n_cells == 12


def test_what_was_not_said_is_as_by_default() -> None:
    grid = make({}, [], {}, [], [])
    assert grid == Grid(Setting(tokens=2048), (BASE,), 0, ("topics",), (0,))
    assert make({"tokens": 9}, ["f16"], {}, ["x"], [7]) == Grid(
        Setting(tokens=9), (CachePolicy.parse("f16"),), 0, ("x",), (7,)
    )


# --- TOML ---------------------------------------------------------------------------------------------------------

WHOLE = """
model = "toy"
weights = "q8"
reference_weights = "f32"
tokens = 300
first = 10
regime = "both"
shadow = true
continuation = 5
documents = ["topics", "a.txt"]
seeds = [0, 3]
policies = ["k4v2", "old=k8c/v8t rot=none"]

[grid]
window = "0:256:128"
k_bits = [2, 4]
v_bits = "2,8"
tile = 32
dense = ["f16", "f32"]
rotate = "none,kv"
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "grid.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    setting, policies, axes, lists = load(written(tmp_path, WHOLE))
    assert Setting(**setting) == Setting("toy", "q8", "f32", 300, 10, "both", True, 5)
    assert set(setting) == {f.name for f in fields(Setting)}
    assert policies == ["k4v2", "old=k8c/v8t rot=none"]
    assert lists == {"documents": ["topics", "a.txt"], "seeds": [0, 3]}
    assert axes == {
        "window": [0, 128, 256], "k_bits": [2, 4], "v_bits": [2, 8], "tile": [32], "dense": ["f16", "f32"],
        "rotate": ["none", "kv"],
    }  # fmt: skip
    assert list(axes) == ["window", "k_bits", "v_bits", "tile", "dense", "rotate"]
    grid = make(setting, policies, axes, lists["documents"], lists["seeds"])
    # K's bits, V's, windows, dense and rotations; the two bases differ in nothing that is not in a list
    assert (len(grid.policies), grid.merged, grid.n_cells) == (2 * 2 * 3 * 2 * 2, 48, 192)


def test_the_documented_file_has_every_key(tmp_path: Path) -> None:
    page = (Path(cli.__file__).parent / "docs" / "sweep.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    setting, policies, axes, lists = load(written(tmp_path, example))
    assert set(setting) == {f.name for f in fields(Setting)} and set(lists) == {"documents", "seeds"}
    assert make(setting, policies, axes, lists["documents"], lists["seeds"]).n_cells == 4 * 2 * 5 * 2 * 4


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == ({}, [], {}, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('modle = "toy"', ["unknown keys 'modle'; known are documents, seeds, policies, grid, model, weights"]),
        ("window = [64]", ["unknown keys 'window'"]),
        ("[grid]\nbits = [2]", ["grid has unknown fields 'bits'; known are window, sinks, k_bits"]),
        ("[grid]\nrotate_k = [true]", ["unknown fields 'rotate_k'", "rotate"]),
        ("[grid]\nolder = []", ["unknown fields 'older'"]),
        ("[[grid]]\nwindow = 1", ["grid must be a table, found [{'window': 1}]"]),
        ("model = 7", ["model must be a text, found 7"]),
        ("weights = ['q8']", ["weights must be a text"]),
        ("tokens = true", ["tokens must be a whole number, found True"]),
        ("tokens = 2.0", ["tokens must be a whole number, found 2.0"]),
        ("tokens = '5'", ["tokens must be a whole number, found '5'"]),
        ("first = 1979-05-27", ["first must be a whole number, found datetime.date"]),
        ("shadow = 1", ["shadow must be true or false, found 1"]),
        ("regime = true", ["regime must be a text, found True"]),
        ("continuation = inf", ["continuation must be a whole number, found inf"]),
        ("documents = 'topics'", ["documents must be a list of texts, found 'topics'"]),
        ("documents = []", ["documents must be a list of texts, found []"]),
        ("documents = [1]", ["documents must be a list of texts, found [1]"]),
        ("seeds = 3", ["seeds must be a list of whole numbers, found 3"]),
        ("seeds = '0-3'", ["seeds must be a list of whole numbers, found '0-3'"]),
        ("seeds = [false]", ["seeds must be a list of whole numbers, found [False]"]),
        ("policies = [{}]", ["policies must be a list of texts, found [{}]"]),
        ("[grid]\nwindow = []", ["grid: window must be a list of whole numbers, or a text like '2,4'", "found []"]),
        ("[grid]\nwindow = [64, 'x']", ["grid: window must be a list of whole numbers"]),
        ("[grid]\nwindow = true", ["grid: window must be a list of whole numbers", "found True"]),
        ("[grid]\nwindow = 1.5", ["grid: window must be a list of whole numbers", "found 1.5"]),
        ("[grid]\ndense = 16", ["grid: dense must be a list of texts, found 16"]),
        ("[grid]\nwindow = '64;128'", ["grid: window must be numbers like", "found '64;128'"]),
        ("[grid]\nk_bits = '99999999'", ["grid: k_bits must be from 0 to 16777216"]),
        ("[grid]\nrotate = 'kv,'", ["grid: rotate must be words separated by commas"]),
        ("tokens 5", ["not valid TOML:"]),
        ("tokens = 5\ntokens = 6", ["not valid TOML:"]),
        ("a = " + "[" * 100_000, ["nested too deeply"]),
        ("tokens = " + "9" * 5000, ["tokens must be a number of few digits"]),
        ("a" + ".a" * 10_000 + " = 1", ["line 1 must have at most 100 dots, found 10000"]),
        (b"model = '\xff'", ["not UTF-8 at byte 9"]),
        ("#" * (MAX_POLICY_BYTES + 1), [f"a grid must be at most {MAX_POLICY_BYTES} bytes, found more"]),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_file_that_is_no_grid_is_refused_by_name(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = written(tmp_path, text)
    message = refusal(load, path)
    assert message.startswith(f"{path}: ") and "--" not in message
    assert all(word in message for word in words), message


def test_only_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml", Path("/dev/zero"), Path("a\0b"), tmp_path / ("x" * 300)):
        assert refusal(load, path).startswith(f"{path}: ")


@pytest.mark.parametrize("seeds", [[-1], [0, MAX_SWEEP_SEED + 1]])
def test_seeds_have_a_range(seeds: list[int]) -> None:
    assert f"seeds must be from 0 to {MAX_SWEEP_SEED}" in refusal(make, {}, [], {}, [], seeds)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"tokens": 1}, "--tokens must be 2 or more, found 1"),
        ({"first": -1}, "--first must be 0 or more, found -1"),
        ({"regime": "fast"}, "--regime must be one of chunked, decode, both, found fast"),
        ({"continuation": -1}, "--continue must be from 0 to 65536, found -1"),
        ({"continuation": 65537}, "--continue must be from 0 to 65536"),
    ],
)
def test_a_setting_has_its_ranges(setting: dict[str, Any], words: str) -> None:
    assert words in refusal(make, setting, [], {}, [], [])


# Text that TOML's basic strings can hold with JSON's escapes: no surrogates
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
known_texts = st.sampled_from(
    ["toy", "q8", "both", "k4v2", "f16", "0:64:32", "2,4", "kv", "none,k", "x.toml", "", "a,"]
)
atoms = st.one_of(
    st.integers(-3, 200), st.integers(), st.booleans(), st.floats(), texts, known_texts,
    st.dates(min_value=datetime.date(1000, 1, 1)), st.sampled_from([2, 4, 8, 16, 32, 64]),
)  # fmt: skip
values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=5
)
right = {
    "documents": st.just(["topics"]), "seeds": st.just([0, 2]), "policies": st.just(["k8v4"]), "tokens": st.just(50),
    "regime": st.just("decode"), "shadow": st.booleans(), "model": st.just("toy"), "grid": st.just({"window": "0:64:32"}),
}  # fmt: skip
axis_values = st.dictionaries(st.sampled_from(AXES) | texts, values, max_size=3)
tables = st.one_of(
    st.fixed_dictionaries({}, optional=right),
    st.fixed_dictionaries({}, optional={**right, "grid": axis_values}),
    st.dictionaries(st.sampled_from([*right, "first", "continuation", "weights"]) | texts, values, max_size=4),
)


def toml(value: Any) -> str:
    """A value as TOML, all on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(x)}" for name, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(x if x in string.ascii_letters + ":,./ " else f"\\U{ord(x):08X}" for x in value) + '"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    return str(value)


def key(name: str) -> str:
    return '"' + "".join(f"\\U{ord(x):08X}" for x in name) + '"'


@settings(deadline=None, max_examples=300)
@given(tables)
def test_any_table_is_a_grid_or_refused(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(f"{key(name)} = {toml(x)}" for name, x in table.items()), "utf-8")
    try:
        setting, policies, axes, lists = load(path)
        grid = make(setting, policies, axes, lists.get("documents", []), lists.get("seeds", []))
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    assert set(table) <= {*right, "first", "continuation", "weights"}
    assert len(set(grid.policies)) == len(grid.policies) >= 1
    for name, x in setting.items():
        assert getattr(grid.setting, name) == table[name] == x
    for name, allowed in axes.items():
        if name != "rotate" and name not in ("k_group", "v_group"):
            assert {getattr(policy, name) for policy in grid.policies} == set(allowed)


@given(st.text(max_size=60) | st.sampled_from([WHOLE]), st.integers(0, 400))
def test_any_text_is_a_grid_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass")[: cut or None])
    try:
        load(path)
    except UsageError as error:
        assert str(error).startswith(f"{path}: ")


def test_policies_may_be_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(CachePolicy(window=7).to_toml())
    grid = make({}, [str(path), "f16"], {"sinks": [2]}, [], [])
    names: Sequence[CachePolicy] = grid.policies
    assert list(names) == [CachePolicy(window=7, sinks=2), multiply([CachePolicy.parse("f16")], {"sinks": [2]})[0][0]]
    assert "none.toml: no such file" in refusal(make, {}, [str(tmp_path / "none.toml")], {}, [], [])
