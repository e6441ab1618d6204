"""The texts of a policy: what each form says, that every policy survives all of them, and what they refuse."""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.engine.policy import MAX_ROLLBACK, MAX_SINKS, MAX_WINDOW, PRESETS, CachePolicy, Override, Tier
from mixkv.models.errors import UsageError

PLAIN = "sinks=4 recent=128:f16 tile=64 old=k4c/v4t"
DEFAULT = f"{PLAIN} rot=kv scales=fit"
UNTURNED = {"rotate_k": False, "rotate_v": False}  # what names of a dense type imply
N_LAYERS = 7  # of the model that drawn overrides are for


# --- policies of every kind ---------------------------------------------------------------------------------------


@st.composite
def sides(draw: st.DrawFn, names: str = "kv") -> dict[str, Any]:
    """Format fields of K, of V or of both, legal together whatever the tile is."""
    fields: dict[str, Any] = {}
    for side in names:
        bits = draw(st.sampled_from([2, 3, 4, 8, 16, 32]))
        axis, group = "channel" if side == "k" else "token", 0
        if bits < 16:
            axis = draw(st.sampled_from(["channel", "token"]))
            group = draw(st.sampled_from([0, 16, 80, 256])) if axis == "token" else 0
        fields |= {f"{side}_bits": bits, f"{side}_axis": axis, f"{side}_group": group}
    return fields


@st.composite
def tiers(draw: st.DrawFn, above: int) -> tuple[Tier, ...]:
    """Up to three tiers, all behind ``above``."""
    ages = draw(st.sets(st.integers(above + 1, above + 5000), max_size=3))
    return tuple(Tier(after=age, **draw(sides())) for age in sorted(ages))


@st.composite
def layers(draw: st.DrawFn) -> str:
    """Items for a model of N_LAYERS, in every way of writing a number."""
    items = []
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted(draw(st.tuples(*[st.integers(0, N_LAYERS - 1)] * 2)))
        start = draw(st.sampled_from([first, first - N_LAYERS]))
        stop = last - N_LAYERS if start < 0 else draw(st.sampled_from([last, last - N_LAYERS]))
        items.append(f"{start}" if first == last and draw(st.booleans()) else f"{start}..{stop}")
    return "+".join(items)


WINDOWS = st.sampled_from([0, 1, 64, 128, 5000])
SINKS = st.sampled_from([0, 4, 5, MAX_SINKS])
TILES = st.sampled_from([32, 64, 128])
DENSE = st.sampled_from(["f16", "bf16", "f32"])
SCALES = st.sampled_from(["fit", "range"])


@st.composite
def overrides(draw: st.DrawFn) -> Override:
    """Some fields for some layers; any of them are legal together, behind any window of ``WINDOWS``."""
    pieces = [
        {"window": draw(WINDOWS)}, {"dense": draw(DENSE)}, {"sinks": draw(SINKS)}, {"tile": draw(TILES)},
        {"rotate_k": draw(st.booleans())}, {"rotate_v": draw(st.booleans())}, {"scales": draw(SCALES)}, draw(sides("k")),
        draw(sides("v")), {"older": draw(tiers(5000))},
    ]  # fmt: skip
    fields: dict[str, Any] = {}
    for piece in draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=len(pieces))):
        fields |= piece
    return Override(draw(layers()), **fields)


@st.composite
def policies(draw: st.DrawFn) -> CachePolicy:
    return CachePolicy(
        window=draw(WINDOWS),
        sinks=draw(SINKS),
        tile=draw(TILES),
        dense=draw(DENSE),
        rotate_k=draw(st.booleans()),
        rotate_v=draw(st.booleans()),
        scales=draw(SCALES),
        rollback=draw(st.sampled_from([0, 1, MAX_ROLLBACK])),
        older=draw(tiers(5000)),
        overrides=tuple(draw(st.lists(overrides(), max_size=4))),
        **draw(sides()),
    )


@given(policies())
def test_every_policy_survives_every_form(policy: CachePolicy) -> None:
    line = str(policy)
    for again in (CachePolicy.parse(line), CachePolicy.parse(policy.spec), CachePolicy.from_toml(policy.to_toml())):
        assert again == policy and hash(again) == hash(policy)
        assert (str(again), again.digest) == (line, policy.digest)
    assert line.isascii() and line.isprintable() and "," not in line


@given(policies(), st.randoms())
def test_words_may_come_in_any_order_and_layers_and_tiers_in_theirs(policy: CachePolicy, random: Any) -> None:
    plain = dataclasses.replace(policy, overrides=())
    words = str(plain).split(" ")
    old = [word for word in words if word.startswith("old=")]
    random.shuffle(words)
    place = iter(old)
    shuffled = "  ".join(next(place) if word.startswith("old=") else word for word in words)
    assert CachePolicy.parse(shuffled) == plain


@given(policies())
def test_a_layers_policy_is_what_the_overrides_make_of_it_one_after_the_other(policy: CachePolicy) -> None:
    for layer in range(N_LAYERS):
        fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
        for override in policy.overrides:
            for item in override.layers.split("+"):
                ends = [int(end) for end in item.split("..")]
                first, last = (end + N_LAYERS if end < 0 else end for end in (ends[0], ends[-1]))
                if first <= layer <= last:
                    fields |= dict(override.fields)
        assert policy.for_layer(layer, N_LAYERS) == CachePolicy(**{**fields, "overrides": ()})


@given(policies(), policies())
def test_two_policies_have_one_digest_only_if_they_are_one(one: CachePolicy, other: CachePolicy) -> None:
    assert (one == other) == (str(one) == str(other)) == (one.digest == other.digest)


# --- one line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        (DEFAULT, CachePolicy()),
        ("sinks=4 recent=128:f16 tile=64 old=k4c/v4t64 rot=k scales=fit", CachePolicy(v_group=64, rotate_v=False)),
        ("sinks=0 recent=0:f32 tile=64 old=k32/v32 rot=none scales=fit", CachePolicy.full()),
        (f"{DEFAULT} rollback=64", CachePolicy(rollback=64)),
        (f"{PLAIN} rot=v scales=fit", CachePolicy(rotate_k=False)),
        (f"{PLAIN} rot=none scales=range", CachePolicy(rotate_k=False, rotate_v=False, scales="range")),
        (
            "sinks=0 recent=7:bf16 tile=32 old=512:k8c/v8t old=1024:k16/v2c old=k4t16/v4t64 rot=kv scales=fit",
            CachePolicy(
                7, 0, 8, 8, 32, "bf16",
                older=(
                    Tier(512, k_bits=16, v_bits=2, v_axis="channel"), Tier(1024, k_axis="token", k_group=16, v_group=64),
                ),
            ),
        ),
        (
            f"{DEFAULT} layers=0..1+-2..-1[k_bits=8 v_bits=8] layers=3[recent=256:f16 old=k8c/v8t rot=none]",
            CachePolicy(
                overrides=(
                    Override("0..1+-2..-1", k_bits=8, v_bits=8),
                    Override(
                        "3", window=256, dense="f16", k_bits=8, v_bits=8, k_axis="channel", v_axis="token", k_group=0,
                        v_group=0, older=(), rotate_k=False, rotate_v=False,
                    ),
                )
            ),
        ),
        (
            f"{DEFAULT} layers=0[old=*] layers=1[old=512:* old=k2c/v2t window=9 rotate_v=true] "
            "layers=2[sinks=0 tile=32 scales=range]",
            CachePolicy(
                overrides=(
                    Override("0", older=()),
                    Override("1", window=9, rotate_v=True, older=(Tier(512, 2, 2),)),
                    Override("2", sinks=0, tile=32, scales="range"),
                )
            ),
        ),
    ],
)  # fmt: skip
def test_the_canonical_form_of_a_policy(text: str, policy: CachePolicy) -> None:
    assert str(policy) == text and CachePolicy.parse(text) == policy
    assert policy.digest == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_digest_of_the_default_stays() -> None:
    """A stored digest must mean the same policy for ever."""
    assert CachePolicy().digest == "60d30c8c5366f909"


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("tile=32", CachePolicy(tile=32)),
        ("rot=kv scales=fit rollback=0", CachePolicy()),
        ("rot=none", CachePolicy(rotate_k=False, rotate_v=False)),
        ("scales=range", CachePolicy(scales="range")),
        ("old=*", CachePolicy()),
        ("old=256:* old=k2c/v2t k_bits=8", CachePolicy(k_bits=8, older=(Tier(256, 2, 2),))),
        ("k_bits=8 v_axis=channel rotate_k=false\n dense=f32\tv_group=64 ", CachePolicy(k_bits=8, v_axis="channel",
                                                                                        rotate_k=False, dense="f32")),
        ("old=k4c64/v4t", CachePolicy()),
        ("layers=0[old=k8c/v8t rot=kv]", CachePolicy(overrides=(
            Override("0", k_bits=8, v_bits=8, k_axis="channel", v_axis="token", k_group=0, v_group=0, older=(),
                     rotate_k=True, rotate_v=True),))),
        ("window=9 sinks=1 k_bits=8 v_bits=8 tile=32 dense=bf16", CachePolicy(9, 1, 8, 8, 32, "bf16")),
    ],
)  # fmt: skip
def test_what_a_line_does_not_name_is_as_by_default(text: str, policy: CachePolicy) -> None:
    assert CachePolicy.parse(text) == policy


KEYS = "a key must be one of sinks, recent, tile, old, rot, scales, rollback, layers, or a field's name"
WORDS = "words must be like sinks=4 or layers=0..1[tile=32]"
FORMAT = "old must be a format like k4c/v4t64 or k16/v16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sinks=4 sinks=4", "sinks must be given once, found it twice"),
        ("recent=1:f16 window=2", "window must be given once, found it twice"),
        ("old=k4c/v4t k_bits=4", "k_bits must be given once, found it twice"),
        ("rot=k rotate_k=true", "rotate_k must be given once, found it twice"),
        ("windows=4", f"{KEYS}, found 'windows'"),
        ("older=4", f"{KEYS}, found 'older'"),
        ("sinks=4 k4v4", f"{WORDS}, found 'k4v4'"),
        ("sinks=4[tile=32]", f"{WORDS}, found 'sinks=4[tile=32]'"),
        ("layers=0", f"{WORDS}, found 'layers=0'"),
        ("layers=0[sinks=0", f"{WORDS}, found 'layers=0[sinks=0'"),
        ("layers=0[sinks=0]tile=32", f"{WORDS}, found 'layers=0[sinks=0]tile=32'"),
        ("layers=0[layers=1[sinks=0]]", f"{WORDS}, found 'layers=0[layers=1[sinks=0]]'"),
        ("layers=0[]", "layers='0': layers '0': an override must name a field, found none"),
        ("layers=0[k_bits=5]", "layers='0': k_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"),
        ("layers=0[rollback=5]", "layers='0': an override's fields must be of window, sinks, k_bits, v_bits, tile, dense, "
         "k_axis, v_axis, k_group, v_group, rotate_k, rotate_v, scales, older, found 'rollback'"),
        ("sinks=", "sinks must be a whole number from 0 to 65536, found ''"),
        ("sinks=-1", "sinks must be a whole number from 0 to 65536, found '-1'"),
        ("rollback=16777217", f"rollback must be a whole number from 0 to {MAX_ROLLBACK}, found 16777217; the nearest is "
         "16777216"),
        ("recent=128", "recent must be like 128:f16, found '128'"),
        ("recent=128:f8", "dense must be one of f16, bf16, f32, found 'f8'"),
        ("recent=x:f16", f"window must be a whole number from 0 to {MAX_WINDOW}, found 'x'"),
        ("rot=vk", "rot must be one of none, k, v, kv, found 'vk'"),
        ("rotate_k=1", "rotate_k must be true or false, found 1"),
        ("scales=best", "scales must be one of fit, range, found 'best'"),
        ("scales=1", "scales must be one of fit, range, found 1"),
        ("scales=fit scales=fit", "scales must be given once, found it twice"),
        ("old=k4/v4t", "old must name after k4 the axis of their scales, c or t, found 'k4/v4t'"),
        ("old=k4c/v16t", "old must name after v16 no axis, they have no scales, found 'k4c/v16t'"),
        ("old=k5/v4t", "k_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"),
        ("old=k4c/v4t24", "v_group must be 0 or a multiple of 16 up to 256, found 24; the nearest is 16"),
        ("old=k4c32/v4t", "k_group by channel must be 0 or the tile, 64, found 32; the nearest is 0"),
        ("old=k4x/v4t", f"{FORMAT}, found 'k4x/v4t'"),
        ("old=k4c", f"{FORMAT}, found 'k4c'"),
        ("old=", f"{FORMAT}, found ''"),
        ("old=512:k4c/v4t old=*", f"{FORMAT}, found '*'"),
        ("old=512:k4c/v4t", "old must be like 512:k4c/v4t, the last one without an age, found '512:k4c/v4t'"),
        ("old=k4c/v4t old=k4c/v4t", "old must be like 512:k4c/v4t, the last one without an age, found 'k4c/v4t'"),
        ("old=x:k4c/v4t old=k4c/v4t", f"after must be a whole number from 0 to {MAX_WINDOW}, found 'x'"),
        ("old=9:k4c/v4t old=k4c/v4t", "older[0].after must be above window, 128, found 9; the nearest is 129"),
        ("old=200:* old=k2c/v5t", "v_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CachePolicy.parse(text)
    assert str(caught.value) == f"cache policy {text!r}: {message}"


@pytest.mark.parametrize(
    "text",
    ["sinks=" + "9" * 4000, "recent=" + "9" * 4000 + ":f16", "old=k" + "9" * 2000 + "c/v4t", "old=k4c/v4t" + "9" * 4000,
     "old=" + "9" * 4000 + ":k4c/v4t old=k2c/v2t", "layers=0[sinks=" + "9" * 4000 + "]"],
)  # fmt: skip
def test_an_absurd_number_in_a_line_is_refused_with_the_nearest(text: str) -> None:
    with pytest.raises(UsageError, match=r" must be .*, found 9+\.\.\.9+; the nearest is [0-9]+$"):
        CachePolicy.parse(text)


def test_a_line_may_have_4096_characters() -> None:
    assert CachePolicy.parse("sinks=0" + " " * 4089) == CachePolicy(sinks=0)
    with pytest.raises(UsageError, match="the text must be at most 4096 characters, found 4097$"):
        CachePolicy.parse("sinks=0" + " " * 4090)


# --- presets ------------------------------------------------------------------------------------------------------


def test_presets_are_policies_by_name() -> None:
    assert list(PRESETS) == ["full", "f16", "balanced", "small", "tiny"]
    for name, policy in PRESETS.items():
        assert CachePolicy.parse(name) is policy
    assert PRESETS["full"] == CachePolicy.full() and PRESETS["balanced"] == CachePolicy()
    assert PRESETS["f16"] == CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16, **UNTURNED)
    assert str(PRESETS["small"]) == "sinks=4 recent=128:f16 tile=64 old=k3c/v3t rot=kv scales=fit"
    assert len(PRESETS["tiny"].tiers) == 3
    for policy in PRESETS.values():
        policy.check_model(30, 64)
        policy.check_model(4, 128)
    tokens = [sum(PRESETS[name].nbytes_per_token(3, 64)[0]) for name in ("full", "f16", "balanced", "small")]
    assert tokens == sorted(tokens, reverse=True) and PRESETS["tiny"].nbytes_per_token(3, 64)[0][-1] < tokens[-1]


# --- TOML ---------------------------------------------------------------------------------------------------------


def test_every_field_stands_in_the_toml() -> None:
    policy = CachePolicy(
        rotate_v=False,
        scales="range",
        older=(Tier(300, k_bits=2),),
        overrides=(Override("0", older=()), Override("1", older=(Tier(7000),))),
    )
    tier = 'v_bits = 4\nk_axis = "channel"\nv_axis = "token"\nk_group = 0\nv_group = 0\n'
    assert policy.to_toml() == (
        "window = 128\nsinks = 4\nk_bits = 4\nv_bits = 4\ntile = 64\n"
        'dense = "f16"\nk_axis = "channel"\nv_axis = "token"\nk_group = 0\nv_group = 0\n'
        'rotate_k = true\nrotate_v = false\nscales = "range"\nrollback = 0\n'
        f"\n[[older]]\nafter = 300\nk_bits = 2\n{tier}"
        '\n[[overrides]]\nlayers = "0"\nolder = []\n'
        f'\n[[overrides]]\nlayers = "1"\n\n[[overrides.older]]\nafter = 7000\nk_bits = 4\n{tier}'
    )
    assert CachePolicy.from_toml(policy.to_toml()) == policy


def test_a_toml_may_leave_out_what_is_as_by_default() -> None:
    assert CachePolicy.from_toml("") == CachePolicy()
    text = '# "...........' + "." * 99 + '\n[[older]]\nafter = 300\n[[overrides]]\nlayers = "-1"\nsinks = 0\n'
    assert CachePolicy.from_toml(text) == CachePolicy(older=(Tier(300),), overrides=(Override("-1", sinks=0),))


FIELDS = (
    "window, sinks, k_bits, v_bits, tile, dense, k_axis, v_axis, k_group, v_group, rotate_k, rotate_v, scales, rollback"
)
NINES = "9" * 5001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windows = 1", f"a key must be one of {FIELDS}, older, overrides, found 'windows'"),
        ("window = true", "window must be a whole number from 0 to 16777216, found True"),
        ("window = 1.0", "window must be a whole number from 0 to 16777216, found 1.0"),
        ("window = -1", "window must be a whole number from 0 to 16777216, found -1; the nearest is 0"),
        ("rotate_k = 1", "rotate_k must be true or false, found 1"),
        ("scales = true", "scales must be one of fit, range, found True"),
        ("dense = 16", "dense must be one of f16, bf16, f32, found 16"),
        ("tile = [64]", "tile must be one of 32, 64, 128, found [64]"),
        ("older = 300", "older must be tables, [[older]], found 300"),
        ("older = [300]", "older must be tables, [[older]], found [300]"),
        ("[older]\nafter = 300", "older must be tables, [[older]], found {'after': 300}"),
        ("[[older]]\nk_bits = 2", "older[0]: after must be given, found none"),
        ("[[older]]\nafter = 300\n[[older]]\nage = 3", "older[1]: a key must be one of after, k_bits, v_bits, k_axis, "
         "v_axis, k_group, v_group, found 'age'"),
        ("[[older]]\nafter = 300\n[[older]]\nafter = 400\nk_bits = 5",
         "older[1]: k_bits must be one of 2, 3, 4, 8, 16, 32, found 5; the nearest is 4"),
        ("[[older]]\nafter = 30", "older[0].after must be above window, 128, found 30; the nearest is 129"),
        ("overrides = 1", "overrides must be tables, [[overrides]], found 1"),
        ("[[overrides]]\nsinks = 1", "overrides[0]: layers must be given, found none"),
        ("[[overrides]]\nlayers = 0\nsinks = 1", "overrides[0]: layers must be text like 0..1+-2..-1, found 0"),
        ("[[overrides]]\nlayers = '0'\nself = 1", f"overrides[0]: a key must be one of layers, {FIELDS}, older, "
         "found 'self'"),
        ("[[overrides]]\nlayers = '0'\nrollback = 1", f"overrides[0]: an override's fields must be of "
         f"{FIELDS.removesuffix(', rollback')}, older, found 'rollback'"),
        ("[[overrides]]\nlayers = '0'\nolder = 1", "overrides[0].older must be tables, [[overrides.older]], found 1"),
        ("[[overrides]]\nlayers = '0'\n[[overrides.older]]\nsinks = 1", "overrides[0].older[0]: a key must be one of "
         "after, k_bits, v_bits, k_axis, v_axis, k_group, v_group, found 'sinks'"),
        ("window 1", "not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 8)"),
        ("a = " + "[" * 100_000, "not valid TOML: nested too deeply"),
        ("window = " + NINES, "window must be a number of few digits, found one of thousands"),
        ("sinks = 1\n'k_bits' =\t-" + NINES, "k_bits must be a number of few digits, found one of thousands"),
        ("older = [{after = " + NINES + "}]", "after must be a number of few digits, found one of thousands"),
        ("tile = [1, " + NINES + "]", "a value must be a number of few digits, found one of thousands"),
        ("window = 0x" + "f" * 100_000, "window must be a whole number from 0 to 16777216, found an enormous number; "
         "the nearest is 16777216"),
        ("a" + ".a" * 100 + " = 1", f"a key must be one of {FIELDS}, older, overrides, found 'a'"),
        ("\na" + ".a" * 500_000 + " = 1", "line 2 must have at most 100 dots, found 500000"),
        ("#" * ((1 << 20) + 1), "a policy must be at most 1048576 characters, found 1048577"),
    ],
)  # fmt: skip
def test_a_toml_that_is_no_policy_is_refused_by_name_and_soon(text: str, message: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(UsageError) as caught:
        CachePolicy.from_toml(text)
    assert time.perf_counter() - started < 2
    assert str(caught.value) == message
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        CachePolicy.load(file)
    assert str(caught.value) == f"{file}: {message}".replace(
        "1048576 characters, found 1048577", "1048576 bytes, found more"
    )


def test_a_file_is_a_policy(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(PRESETS["tiny"].to_toml() + "#" * 1000, encoding="utf-8")
    assert CachePolicy.load(file) == CachePolicy.load(str(file)) == PRESETS["tiny"]
    text = "# größer\nsinks = 1\n#".encode()
    file.write_bytes(text + b"x" * ((1 << 20) - len(text)))
    assert CachePolicy.load(file) == CachePolicy(sinks=1)


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "latin1.toml"
    file.write_bytes(b"# gr\xf6\xdfer")
    for path, message in ((file, "not UTF-8 at byte 4"), (tmp_path, "no such file"), (tmp_path / "none", "no such file"),
                          (Path("/dev/zero"), "no such file"), (tmp_path / ("x" * 300), "no such file")):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            CachePolicy.load(path)
        assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith((message, "File name too long"))


# --- short names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("k4v4", CachePolicy()),
        ("k4v2", CachePolicy(v_bits=2)),
        ("k16v32", CachePolicy(k_bits=16, v_bits=32)),
        ("f32", CachePolicy.full()),
        ("f16", CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16, **UNTURNED)),
        ("bf16:tile=32", CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16, tile=32, dense="bf16", **UNTURNED)),
        ("f16:window=1", CachePolicy(window=1, sinks=0, k_bits=16, v_bits=16, **UNTURNED)),
        (
            "k8v3:dense=f32:sinks=0:window=16777216:tile=128",
            CachePolicy(window=MAX_WINDOW, sinks=0, k_bits=8, v_bits=3, tile=128, dense="f32"),
        ),
    ],
)
def test_a_short_name_is_a_policy(text: str, policy: CachePolicy) -> None:
    assert CachePolicy.parse(text) == policy


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
        (
            "",
            [
                "the name must be one of f16, bf16, f32, or like k4v4, or a preset (full, f16, balanced, small, tiny), "
                "or words like recent=128:f16, found ''"
            ],
        ),
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
