"""CachePolicy: what it refuses and how it says so, and the boundary rule against a statement of it in words."""

import copy
import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixkv
from mixkv.engine.policy import DENSE, MAX_ROLLBACK, MAX_SINKS, MAX_WINDOW, CachePolicy, Override, Tier
from mixkv.engine.policy_fields import DENSE_NAMES, SCALARS
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


@pytest.mark.fault("policy-range")
@pytest.mark.parametrize(("name", "most"), [("window", MAX_WINDOW), ("sinks", MAX_SINKS), ("rollback", MAX_ROLLBACK)])
def test_counts_of_tokens_out_of_range_are_refused_with_name_found_and_allowed(name: str, most: int) -> None:
    for value in (-1, most + 1, -(10**30), 10**30, *NOT_WHOLE):
        near = f"; the nearest is {0 if value < 0 else most}" if type(value) is int else ""
        assert refusal(**{name: value}) == f"{name} must be a whole number from 0 to {most}, found {value!r}{near}"
    for value in (0, 1, most):
        assert getattr(CachePolicy(**{name: value}), name) == value


@pytest.mark.fault("policy-range")
@pytest.mark.parametrize("name", ["k_bits", "v_bits"])
@pytest.mark.parametrize(
    ("value", "nearest"),
    [(0, 2), (-8, 2), (1, 2), (5, 4), (6, 4), (7, 8), (9, 8), (15, 16), (17, 16), (31, 32), (10**30, 32)],
)
def test_bits_out_of_range_are_refused_with_the_nearest_legal_value(name: str, value: int, nearest: int) -> None:
    message = refusal(**{name: value})
    assert message == f"{name} must be one of 2, 3, 4, 8, 16, 32, found {value}; the nearest is {nearest}"


@pytest.mark.fault("policy-range")
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


NO_SCALES = "which have no scales"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_axis": "head"}, "k_axis must be one of channel, token, found 'head'"),
        ({"v_axis": ["token"]}, "v_axis must be one of channel, token, found ['token']"),
        ({"rotate_k": 1}, "rotate_k must be true or false, found 1"),
        ({"scales": "best"}, "scales must be one of fit, range, found 'best'"),
        ({"scales": None}, "scales must be one of fit, range, found None"),
        ({"rotate_v": "true"}, "rotate_v must be true or false, found 'true'"),
        ({"v_group": 24}, "v_group must be 0 or a multiple of 16 up to 256, found 24; the nearest is 16"),
        ({"v_group": 25}, "v_group must be 0 or a multiple of 16 up to 256, found 25; the nearest is 32"),
        ({"v_group": -1}, "v_group must be 0 or a multiple of 16 up to 256, found -1; the nearest is 0"),
        ({"v_group": 272}, "v_group must be 0 or a multiple of 16 up to 256, found 272; the nearest is 256"),
        ({"v_group": True}, "v_group must be 0 or a multiple of 16 up to 256, found True"),
        ({"k_group": 32}, "k_group by channel must be 0 or the tile, 64, found 32; the nearest is 0"),
        ({"k_group": 128}, "k_group by channel must be 0 or the tile, 64, found 128; the nearest is 64"),
        ({"k_bits": 16, "k_axis": "token"}, f"k_axis must be channel at k_bits 16, {NO_SCALES}, found token"),
        ({"v_bits": 32, "v_axis": "channel"}, f"v_axis must be token at v_bits 32, {NO_SCALES}, found channel"),
        ({"v_bits": 16, "v_group": 32}, f"v_group must be 0 at v_bits 16, {NO_SCALES}, found 32"),
        ({"k_bits": 32, "k_group": 64}, f"k_group must be 0 at k_bits 32, {NO_SCALES}, found 64"),
        ({"older": {}}, "older must be a tuple of Tier, found {}"),
        ({"older": (300,)}, "older must be a tuple of Tier, found (300,)"),
        ({"older": tuple(Tier(n) for n in range(200, 204))}, "older must be at most 3 tiers, found 4"),
        ({"older": (Tier(128),)}, "older[0].after must be above window, 128, found 128; the nearest is 129"),
        (
            {"older": (Tier(300), Tier(301), Tier(301))},
            "older[2].after must be above older[1].after, 301, found 301; the nearest is 302",
        ),
        (
            {"window": MAX_WINDOW, "older": (Tier(MAX_WINDOW),)},
            f"older[0].after must be above window, {MAX_WINDOW}, found {MAX_WINDOW}",
        ),
        (
            {"older": (Tier(300), Tier(400, k_group=32))},
            "older[1]: k_group by channel must be 0 or the tile, 64, found 32; the nearest is 0",
        ),
        ({"overrides": (0,)}, "overrides must be a tuple of Override, found (0,)"),
        ({"overrides": "0"}, "overrides must be a tuple of Override, found '0'"),
        ({"overrides": (Override("0", sinks=0),) * 33}, "overrides must be at most 32, found 33"),
        (
            {
                "overrides": (Override("+".join(["10"] * 32), dense="f32", window=0, sinks=0, rotate_k=False, tile=64),)
                * 32
            },
            f"the text must be at most 4096 characters, found {60 + 32 * 148}",
        ),
        (
            {"overrides": (Override("1", window=200), Override("0..3+-1", older=(Tier(150),)))},
            "with the overrides for layers 1, 0..3+-1: older[0].after must be above window, 200, found 150; "
            "the nearest is 201",
        ),
        (
            {"v_group": 32, "overrides": (Override("-1", v_bits=16),)},
            f"with the overrides for layers -1: v_group must be 0 at v_bits 16, {NO_SCALES}, found 32",
        ),
        (
            {"overrides": (Override("5..-4096", sinks=1),)},
            "layers 5..-4096: 5..-4096 is empty in a model of 4096 layers",
        ),
    ],
)
def test_axes_groups_tiers_and_overrides_that_do_not_fit_are_refused(fields: dict[str, object], message: str) -> None:
    assert refusal(**fields) == message


@pytest.mark.parametrize("name", [*SCALARS, "older", "overrides"])
def test_an_absurd_number_is_refused_like_any_other(name: str) -> None:
    message = refusal(**{name: 10**5000})
    assert message.startswith(f"{name} must be ") and "found an enormous number" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tier(-1), f"after must be a whole number from 0 to {MAX_WINDOW}, found -1; the nearest is 0"),
        (lambda: Tier(True), f"after must be a whole number from 0 to {MAX_WINDOW}, found True"),
        (lambda: Tier(300, k_bits=5), "k_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"),
        (lambda: Tier(300, v_bits=16, v_group=16), f"v_group must be 0 at v_bits 16, {NO_SCALES}, found 16"),
        (lambda: Override("0"), "layers '0': an override must name a field, found none"),
        (
            lambda: Override("0", rollback=1),
            "an override's fields must be of window, sinks, k_bits, v_bits, tile, dense, k_axis, v_axis, k_group, v_group, "
            "rotate_k, rotate_v, scales, older, found 'rollback'",
        ),
        (lambda: Override("0", tile=65), "tile must be one of 32, 64, 128, found 65; the nearest is 64"),
        (lambda: Override("0", older=[1]), "older must be a tuple of Tier, found [1]"),
        (
            lambda: Override("0", k_bits=16, k_axis="token", k_group=0),
            f"k_axis must be channel at k_bits 16, {NO_SCALES}, found token",
        ),
        (lambda: Override(0, sinks=1), "layers must be text like 0..1+-2..-1, found 0"),  # type: ignore[arg-type]
        *(
            (
                lambda text=text: Override(text, sinks=1),
                f"layers must be numbers and ranges a..b, of one to nine digits, joined by +, found {text!r}",
            )
            for text in ("", "0+", "1..", "a", "0..1..2", "1-2", " 1", "1,2", "9" * 10, "٣", "--1")
        ),
        (lambda: Override("3..2", sinks=1), "layers must be ranges from the lower to the higher number, found '3..2'"),
        (
            lambda: Override("-1..-2", sinks=1),
            "layers must be ranges from the lower to the higher number, found '-1..-2'",
        ),
        (lambda: Override("4096", sinks=1), "layers must be from -4096 to 4095, found 4096; the nearest is 4095"),
        (lambda: Override("0..-4097", sinks=1), "layers must be from -4096 to 4095, found -4097; the nearest is -4096"),
        (
            lambda: Override("+".join(["0"] * 33), sinks=1),
            f"layers must be at most 32 items joined by +, found {'+'.join(['0'] * 33)!r}",
        ),
    ],
)
def test_tiers_and_overrides_refuse_what_could_never_fit(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


# --- what a policy is ---------------------------------------------------------------------------------------------


def test_defaults_and_full() -> None:
    assert CachePolicy() == CachePolicy(
        window=128, sinks=4, k_bits=4, v_bits=4, tile=64, dense="f16", rotate_k=True, rotate_v=True, scales="fit"
    )
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


def test_tiers_and_overrides_are_values_too() -> None:
    policy = CachePolicy(older=[Tier(200)], overrides=[Override("00..0+-1", v_bits=2, k_bits=8)])  # type: ignore[arg-type]
    same = CachePolicy(older=(Tier(200),), overrides=(Override("0+-1", k_bits=8, v_bits=2),))
    assert policy == same and hash(policy) == hash(same)
    assert policy.older == (Tier(200),) and policy.overrides[0].fields == (("k_bits", 8), ("v_bits", 2))
    assert copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy)) == policy
    assert eval(repr(policy)) == policy and repr(policy.overrides[0]) == "Override('0+-1', k_bits=8, v_bits=2)"
    assert Override("0", older=[Tier(200)]) == Override("0", older=(Tier(200),))
    for value, name in ((policy.older[0], "after"), (policy.overrides[0], "layers")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, "1")
        assert not hasattr(value, "__dict__")
    assert mixkv.Tier is Tier and mixkv.Override is Override


def test_only_sides_that_some_tier_keeps_in_codes_are_rotated() -> None:
    assert CachePolicy().rotates == (True, True)
    assert CachePolicy(rotate_k=False).rotates == (False, True) and CachePolicy(rotate_v=False).rotates == (True, False)
    assert CachePolicy(k_bits=16).rotates == (False, True) and CachePolicy(v_bits=32).rotates == (True, False)
    assert CachePolicy(k_bits=16, v_bits=16, older=(Tier(200, v_bits=16),)).rotates == (True, False)
    assert CachePolicy.full().rotates == (False, False)
    assert CachePolicy(k_bits=32, v_bits=16).rotates == (False, False)
    assert CachePolicy(k_bits=16, v_bits=16, overrides=(Override("1", k_bits=8),)).for_layer(1, 2).rotates == (
        True,
        False,
    )


def test_the_tables_of_fields_name_every_field_once() -> None:
    names = [field.name for field in dataclasses.fields(CachePolicy)]
    assert names == [*SCALARS, "older", "overrides"] and tuple(DENSE) == DENSE_NAMES


def test_a_group_by_channel_that_is_the_tile_is_kept_as_0() -> None:
    tier = Tier(300, v_axis="channel", v_group=32)
    policy = CachePolicy(tile=32, k_group=32, v_axis="channel", older=(tier,))
    assert policy.k_group == policy.older[0].v_group == 0 and tier.v_group == 32
    assert CachePolicy(k_axis="token", k_group=64).k_group == 64


def test_tiers_are_the_policys_own_and_the_older_ones() -> None:
    older = (Tier(300, k_bits=2), Tier(301, v_bits=16))
    policy = CachePolicy(7, 0, 8, 3, 32, "bf16", "token", "channel", 16, 0, older=older)
    assert policy.tiers == (Tier(7, 8, 3, "token", "channel", 16, 0), *older)
    layouts = policy.tier_layouts(2, 32)
    assert [(x.k_kind, x.v_kind, x.k_axis, x.v_axis, x.k_group, x.v_group) for x in layouts] == [
        (Q8, Q3, "token", "channel", 16, 0), (Q2, Q4, "channel", "token", 0, 0), (Q4, BF16, "channel", "token", 0, 0)
    ]  # fmt: skip
    assert all((x.n_kv_heads, x.head_dim, x.tile) == (2, 32, 32) for x in layouts)
    assert [x.page_tiles for x in layouts] == [4, 4, 16], "tokens leave the younger tiers again: smaller pages"
    assert policy.old_layout(2, 32) == layouts[0]


def test_bytes_and_routes_of_every_tier() -> None:
    policy = CachePolicy(k_bits=16, older=(Tier(200), Tier(300, v_group=16)))
    # Per token, 3 heads of 64 channels: 32 bytes of codes a side, 4 of scale and minimum, by token for each group
    tiers = [3 * (128 + 32 + 4), 3 * (32 + 4 + 32 + 4), 3 * (32 + 4 + 32 + 16)]
    assert policy.nbytes_per_token(3, 64) == (tiers, 3 * 256)
    wide, codes = "float32", "int16 x codes"
    assert policy.routes() == {
        "sink": {"k": wide, "v": wide}, "old": {"k": wide, "v": codes}, "old2": {"k": codes, "v": codes},
        "old3": {"k": codes, "v": codes}, "recent": {"k": wide, "v": wide},
    }  # fmt: skip
    assert list(policy.routes()) == ["sink", "old", "old2", "old3", "recent"]
    assert list(CachePolicy().routes()) == ["sink", "old", "recent"]


# --- layers -------------------------------------------------------------------------------------------------------


def test_later_overrides_win_over_earlier_ones_field_by_field() -> None:
    policy = CachePolicy(
        rollback=9,
        overrides=(
            Override("0..1+-1", k_bits=8, window=7),
            Override("1..-2", k_bits=2, v_bits=2),
            Override("-3", older=(Tier(200),), rotate_v=False, scales="range", sinks=0, tile=32, dense="f32"),
        ),
    )
    first, middle = CachePolicy(window=7, k_bits=8, rollback=9), CachePolicy(k_bits=2, v_bits=2, rollback=9)
    third = CachePolicy(128, 0, 2, 2, 32, "f32", rotate_v=False, scales="range", rollback=9, older=(Tier(200),))
    second = CachePolicy(window=7, k_bits=2, v_bits=2, rollback=9)
    assert [policy.for_layer(i, 6) for i in range(6)] == [first, second, middle, third, middle, first]
    assert CachePolicy().for_layer(0, 1) == CachePolicy()


def test_a_layer_that_the_model_has_not_is_refused_with_the_legal_range() -> None:
    policy = CachePolicy(overrides=(Override("0..3+-2", sinks=0),))
    policy.check_model(4, 64)
    ends = "or from -{0} to -1 counted from the end, in a model of {0} layers; the nearest is"
    for n, near in ((3, 2), (1, 0)):
        with pytest.raises(UsageError) as caught:
            policy.check_model(n, 64)
        assert str(caught.value) == f"layers 0..3+-2: 3 must be from 0 to {n - 1}, {ends.format(n)} {near}"
    with pytest.raises(UsageError) as caught:
        CachePolicy(overrides=(Override("-3", sinks=0),)).for_layer(0, 2)
    assert str(caught.value) == f"layers -3: -3 must be from 0 to 1, {ends.format(2)} -2"
    for layer in (-1, 2):
        with pytest.raises(UsageError, match=f"^layer must be from 0 to 1, found {layer}$"):
            CachePolicy().for_layer(layer, 2)
    crossed = CachePolicy(overrides=(Override("2..-2", sinks=0),))
    with pytest.raises(UsageError, match=r"^layers 2\.\.-2: 2\.\.-2 is empty in a model of 3 layers$"):
        crossed.check_model(3, 64)
    crossed.check_model(4, 64)


def test_overrides_that_overlap_in_a_small_model_only_are_refused_there() -> None:
    policy = CachePolicy(overrides=(Override("0..4", window=200), Override("-4..-1", older=(Tier(150),))))
    policy.check_model(9, 64)
    with pytest.raises(UsageError, match=r"^with the overrides for layers 0\.\.4, -4\.\.-1: older\[0\]\.after must be"):
        policy.check_model(8, 64)


@pytest.mark.fault("policy-range")
@pytest.mark.parametrize(
    ("policy", "where", "found", "near"),
    [
        (CachePolicy(v_group=48), "old: v", 48, 32),
        (CachePolicy(v_group=256), "old: v", 256, 64),
        (CachePolicy(older=(Tier(200, k_axis="token", k_group=128),)), "old2: k", 128, 64),
        (CachePolicy(overrides=(Override("1", v_group=80),)), "layer 1: old: v", 80, 64),
    ],
)
def test_a_group_that_does_not_divide_the_head_is_refused_with_the_nearest(
    policy: CachePolicy, where: str, found: int, near: int
) -> None:
    policy.check_model(2, found - 15)  # padded to 16
    for check in (policy.check_model, lambda n, dim: policy.for_layer(n - 1, n).old_layout(1, dim)):
        with pytest.raises(UsageError) as caught:
            check(2, 60)
        message = (
            f"{where}_group by token must be one of 16, 32, 64 at head_dim 60, found {found}; the nearest is {near}"
        )
        assert str(caught.value) in (message, message.removeprefix("layer 1: "))


def test_codes_for_too_wide_a_head_are_refused() -> None:
    CachePolicy.full().check_model(2, 300)
    with pytest.raises(UsageError, match="^old: head_dim must be at most 256 for codes, found 300$"):
        CachePolicy().check_model(2, 300)


def test_replace_checks_again() -> None:
    with pytest.raises(UsageError, match="k_bits"):
        dataclasses.replace(CachePolicy(), k_bits=5)


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_old_tiles_lie_in_pages_of_512_positions_and_recent_ones_alone(tile: int) -> None:
    """Or of a few times as many, where that fills the system's memory pages better."""
    policy = CachePolicy(tile=tile)
    assert policy.dense_layout(2, 16).page_tiles == 1
    assert policy.old_layout(4, 128).page_tiles * tile == 512, "whole pages of 4 kB, to 1 %"
    for bits in (2, 3, 4, 8):
        for heads, head_dim in ((1, 16), (2, 16), (3, 64), (5, 80), (8, 128)):
            layout = CachePolicy(tile=tile, k_bits=bits, v_bits=bits).old_layout(heads, head_dim)
            positions = layout.page_tiles * tile
            assert positions in (512, 1024, 1536, 2048)
            unused = {
                n: -n * layout.nbytes // tile % 4096 / (n * layout.nbytes // tile) for n in (512, 1024, 1536, 2048)
            }
            assert unused[positions] <= max(min(unused.values()), 0.01)


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


@given(st.sets(st.integers(1, 900), max_size=3), st.sampled_from([32, 64, 128]), st.integers(0, 1200))
def test_the_boundary_of_every_tier_is_that_of_a_window_of_its_age(ages: set[int], tile: int, position: int) -> None:
    policy = CachePolicy(window=0, tile=tile, older=tuple(Tier(age) for age in sorted(ages)))
    for i, tier in enumerate(policy.tiers):
        assert policy.boundary(position, i) == first_dense_position(tier.after, tile, position)


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
