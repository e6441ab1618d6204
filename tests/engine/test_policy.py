"""CachePolicy: what it refuses and how it says so, and the boundary rule against a statement of it in words."""

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixkv
from mixkv.engine.policy import MAX_ROLLBACK, MAX_SINKS, MAX_WINDOW, CachePolicy
from mixkv.kernels.layout import BF16, F16, F32, Q2, Q3, Q4, Q8
from mixkv.models.errors import UsageError

NOT_WHOLE = [1.0, 4.5, float("nan"), float("inf"), "4", None, True, False, [4], np.float32(4)]


def refusal(**fields: object) -> str:
    """The one line with which a policy of these fields is refused."""
    with pytest.raises(UsageError) as caught:
        CachePolicy(**fields)  # type: ignore[arg-type]
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2
    assert "\n" not in message
    return message


# --- fault row 22: out of range, refused when planning ------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("window", MAX_WINDOW), ("sinks", MAX_SINKS), ("rollback", MAX_ROLLBACK)])
def test_counts_of_tokens_out_of_range_are_refused_with_name_found_and_allowed(name: str, most: int) -> None:
    for value in (-1, most + 1, -(10**30), 10**30, *NOT_WHOLE):
        near = f"; the nearest is {0 if value < 0 else most}" if type(value) is int else ""
        assert refusal(**{name: value}) == f"{name} must be a whole number from 0 to {most}, found {value!r}{near}"
    for value in (0, 1, most):
        assert getattr(CachePolicy(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["k_bits", "v_bits"])
@pytest.mark.parametrize(
    ("value", "nearest"),
    [(0, 2), (-8, 2), (1, 2), (5, 4), (6, 4), (7, 8), (9, 8), (15, 16), (17, 16), (31, 32), (10**30, 32)],
)
def test_bits_out_of_range_are_refused_with_the_nearest_legal_value(name: str, value: int, nearest: int) -> None:
    message = refusal(**{name: value})
    assert message == f"{name} must be one of 2, 3, 4, 8, 16, 32, found {value}; the nearest is {nearest}"


@pytest.mark.parametrize(
    ("value", "nearest"), [(0, 32), (-64, 32), (31, 32), (63, 64), (100, 128), (256, 128), (1, 32)]
)
def test_a_tile_out_of_range_is_refused_with_the_nearest_legal_value(value: int, nearest: int) -> None:
    assert refusal(tile=value) == f"tile must be one of 32, 64, 128, found {value}; the nearest is {nearest}"


@pytest.mark.parametrize("name", ["k_bits", "v_bits", "tile"])
@pytest.mark.parametrize("value", NOT_WHOLE)
def test_bits_and_tiles_that_are_no_whole_numbers_are_refused_without_a_nearest(name: str, value: object) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"{name} must be one of ") and message.endswith(f"found {value!r}")


@pytest.mark.parametrize("value", ["f8", "F16", "float16", "", 16, None, ("f16",)])
def test_a_dense_type_that_is_none_is_refused_with_the_list(value: object) -> None:
    assert refusal(dense=value) == f"dense must be one of f16, bf16, f32, found {value!r}"


def test_a_dense_type_that_cannot_be_hashed_is_refused_like_any_other() -> None:
    assert refusal(dense=["f16"]) == "dense must be one of f16, bf16, f32, found ['f16']"


def test_unknown_fields_are_an_error() -> None:
    with pytest.raises(TypeError, match="windows"):
        CachePolicy(windows=1)  # type: ignore[call-arg]


# --- what a policy is ---------------------------------------------------------------------------------------------


def test_defaults_and_full() -> None:
    assert CachePolicy() == CachePolicy(window=128, sinks=4, k_bits=4, v_bits=4, tile=64, dense="f16")
    full = CachePolicy.full()
    assert (full.k_bits, full.v_bits, full.dense) == (32, 32, "f32")
    old, dense = full.old_layout(2, 16), full.dense_layout(2, 16)
    assert dataclasses.replace(old, page_tiles=1) == dense and old.k_kind == old.v_kind == F32
    assert mixkv.CachePolicy is CachePolicy


def test_a_policy_is_frozen_slotted_hashable_and_comparable() -> None:
    policy = CachePolicy(window=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.window = 8  # type: ignore[misc]
    assert policy.window == 7
    assert not hasattr(policy, "__dict__")
    assert hash(policy) == hash(CachePolicy(window=7)) and policy != CachePolicy(window=8)
    assert copy.deepcopy(policy) == policy


def test_replace_checks_again() -> None:
    with pytest.raises(UsageError, match="k_bits"):
        dataclasses.replace(CachePolicy(), k_bits=5)


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_old_tiles_lie_in_pages_of_512_positions_and_recent_ones_alone(tile: int) -> None:
    policy = CachePolicy(tile=tile)
    assert policy.old_layout(2, 16).page_tiles * tile == 512 and policy.dense_layout(2, 16).page_tiles == 1


def test_kinds_of_the_old_segment() -> None:
    for bits, dense, kind in (
        (4, "f16", Q4),
        (8, "f32", Q8),
        (3, "bf16", Q3),
        (2, "f16", Q2),
        (16, "f16", F16),
        (16, "f32", F16),
        (16, "bf16", BF16),
        (32, "f16", F32),
    ):
        assert CachePolicy(k_bits=bits, dense=dense).old_layout(1, 16).k_kind == kind
        assert CachePolicy(v_bits=bits, dense=dense).old_layout(1, 16).v_kind == kind


@pytest.mark.parametrize(
    ("bits", "old"),
    # Per token, 3 heads of 64 channels: codes, K's scale and minimum a channel and tile of 64, V's a token and 64 channels
    [(b, 3 * (8 * b + 4 + 8 * b + 4)) for b in (2, 3, 4, 8)] + [(16, 3 * 256), (32, 3 * 512)],
)
def test_bytes_of_a_token(bits: int, old: float) -> None:
    policy = CachePolicy(k_bits=bits, v_bits=bits)
    assert policy.nbytes_per_token(3, 64) == ([old], 3 * 256)


# --- short names --------------------------------------------------------------------------------------------------

POLICIES = st.builds(
    CachePolicy,
    window=st.sampled_from([0, 1, 64, 128, MAX_WINDOW]),
    sinks=st.sampled_from([0, 4, 5, MAX_SINKS]),
    k_bits=st.sampled_from([2, 3, 4, 8, 16, 32]),
    v_bits=st.sampled_from([2, 3, 4, 8, 16, 32]),
    tile=st.sampled_from([32, 64, 128]),
    dense=st.sampled_from(["f16", "bf16", "f32"]),
)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("k4v4", CachePolicy()),
        ("k4v2", CachePolicy(v_bits=2)),
        ("k16v32", CachePolicy(k_bits=16, v_bits=32)),
        ("f32", CachePolicy.full()),
        ("f16", CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16)),
        ("bf16:tile=32", CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16, tile=32, dense="bf16")),
        ("f16:window=1", CachePolicy(window=1, sinks=0, k_bits=16, v_bits=16)),
        (
            "k8v3:dense=f32:sinks=0:window=16777216:tile=128",
            CachePolicy(window=MAX_WINDOW, sinks=0, k_bits=8, v_bits=3, tile=128, dense="f32"),
        ),
    ],
)
def test_a_short_name_is_a_policy(text: str, policy: CachePolicy) -> None:
    assert CachePolicy.parse(text) == policy


@given(POLICIES)
def test_every_policy_has_a_short_name_that_is_read_back(policy: CachePolicy) -> None:
    assert CachePolicy.parse(policy.spec) == policy


def test_short_names_leave_out_what_they_imply() -> None:
    assert [CachePolicy.parse(text).spec for text in ("k4v4:window=128:dense=f16", "f32", "bf16", "f16:tile=64")] == [
        "k4v4", "f32", "bf16", "f16",
    ]  # fmt: skip
    assert CachePolicy(k_bits=16, v_bits=16, sinks=0).spec == "k16v16:sinks=0"
    assert (
        CachePolicy.parse("k8v4:dense=f32:tile=32:sinks=1:window=2").spec == "k8v4:window=2:sinks=1:tile=32:dense=f32"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["name must be one of f16, bf16, f32, or like k4v4", "found ''"]),
        ("q4", ["found 'q4'"]),
        ("k4", ["found 'k4'"]),
        ("k4v4 ", ["found 'k4v4 '"]),
        ("K4V4", ["found 'K4V4'"]),
        ("k４v4", ["like k4v4"]),
        ("k5v4", ["k_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"]),
        ("k4v4:", ["window, sinks, tile, dense may follow once, found ''"]),
        ("k4v4:window", ["window must be a whole number from 0 to 16777216, found ''"]),
        ("k4v4:window=", ["window must be", "found ''"]),
        ("k4v4:window=-1", ["window must be", "found '-1'"]),
        ("k4v4:window=1.5", ["found '1.5'"]),
        ("k4v4:window=1=2", ["found '1=2'"]),
        ("k4v4:windows=1", ["found 'windows=1'"]),
        ("k4v4:k_bits=8", ["found 'k_bits=8'"]),
        ("k4v4:sinks=1:sinks=1", ["once, found 'sinks=1'"]),
        ("k4v4:sinks=999999999", ["sinks", "0 to 65536"]),
        ("k4v4:sinks=" + "9" * 4000, ["sinks must be a whole number from 0 to 65536", "; the nearest is 65536"]),
        ("k4v" + "9" * 4000, ["v_bits must be one of 2, 3, 4, 8, 16, 32, found 9999", "; the nearest is 32"]),
        ("k4v4:tile=100", ["tile must be one of 32, 64, 128, found 100; the nearest is 128"]),
        ("f16:dense=f8", ["dense must be one of f16, bf16, f32, found 'f8'"]),
        ("x" * 4096, ["name must be"]),
        ("x" * 4097, ["the text must be at most 4096 characters, found 4097"]),
    ],
)
def test_a_short_name_that_is_none_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^cache policy '") as caught:
        CachePolicy.parse(text)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)
    assert repr(text)[:20] in message or len(text) > 20


# --- the boundary -------------------------------------------------------------------------------------------------


def first_dense_position(window: int, tile: int, position: int) -> int:
    """The boundary in words: go through the tiles from the left as long as the whole tile may be seen as codes.

    It may when none of its tokens is one of the ``window`` last tokens that this query has a right to see densely,
    the last of which is the query's own.
    """
    guaranteed = set(range(position - window + 1, position + 1))
    boundary = 0
    while True:
        tokens = range(boundary, boundary + tile)
        if tokens[-1] > position or any(token in guaranteed for token in tokens):
            return boundary
        boundary += tile


@given(
    st.integers(0, 300),
    st.sampled_from([32, 64, 128]),
    st.lists(st.integers(0, 700), min_size=1, max_size=8),
)
def test_the_boundary_is_the_end_of_the_last_tile_that_lies_wholly_behind_the_window(
    window: int, tile: int, positions: list[int]
) -> None:
    policy = CachePolicy(window=window, tile=tile)
    expected = [first_dense_position(window, tile, p) for p in positions]
    assert [policy.boundary(p) for p in positions] == expected
    many = policy.boundaries(np.array(positions, np.int64))
    assert many.dtype == np.int64 and many.tolist() == expected


def test_the_boundary_never_goes_back_and_moves_by_whole_tiles() -> None:
    for window, tile in ((0, 32), (1, 32), (31, 32), (32, 32), (33, 32), (128, 64), (5, 128)):
        policy = CachePolicy(window=window, tile=tile)
        boundaries = [policy.boundary(p) for p in range(600)]
        assert set(np.diff(boundaries)) == {0, tile}
        # First moved by the query whose window just leaves the first tile.
        assert boundaries.index(tile) == window + tile - 1


def test_the_boundary_of_a_window_larger_than_any_text_stays_at_zero() -> None:
    policy = CachePolicy(window=MAX_WINDOW)
    assert policy.boundary(0) == policy.boundary(MAX_WINDOW - 1) == 0
