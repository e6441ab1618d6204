"""The planner: the bytes of a session that has read so many tokens, what memory there is, and what is proposed."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixkv.engine.layer
from mixkv import CachePolicy, Override, Session, Tier
from mixkv.engine import memory
from mixkv.engine.cache import Cache
from mixkv.engine.memory import available_nbytes, check_fits, plan
from mixkv.models.errors import UsageError
from mixkv.models.load import Model
from mixkv.models.toy import CONFIG
from mixkv.models.transformer import Softmax

SMALL = replace(CONFIG, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=24)

TIERS = CachePolicy(older=(Tier(1024, k_bits=3, v_bits=2, v_group=16), Tier(4096, k_bits=2, v_bits=2)))


@st.composite
def policies(draw: st.DrawFn) -> CachePolicy:
    bits, tile = st.sampled_from([2, 3, 4, 8, 16, 32]), draw(st.sampled_from([32, 64, 128]))
    window = draw(st.integers(0, 300))
    ages = sorted(draw(st.sets(st.integers(1, 600), max_size=3)))
    overrides = []
    if draw(st.booleans()):
        fields = {"k_bits": draw(bits), "sinks": draw(st.integers(0, 200)), "window": draw(st.integers(0, window))}
        overrides.append(Override(draw(st.sampled_from(["0", "1..2", "-1"])), **fields))
    try:
        return CachePolicy(
            window=window, sinks=draw(st.integers(0, 300)), k_bits=draw(bits), v_bits=draw(bits), tile=tile,
            dense=draw(st.sampled_from(["f16", "bf16", "f32"])), rollback=draw(st.sampled_from([0, 1, 40, 200])),
            older=tuple(Tier(window + age + 128 * i, k_bits=2, v_bits=3) for i, age in enumerate(ages)),
            overrides=tuple(overrides),
        )  # fmt: skip
    except UsageError:
        return CachePolicy(window=window, tile=tile)


def filled(policy: CachePolicy, cuts: list[int], context: int, windows: list[int | None] | None) -> dict[str, int]:
    """What a real cache says that read so many tokens in these pieces."""
    cache = Cache(policy, 3, 2, 24, context, windows)
    draw = np.random.default_rng(0)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        for layer in range(3):
            cache.attend(layer, draw.standard_normal((stop - start, 6, 24), np.float32), start, Softmax(0.2))
        cache.commit(stop)
    return cache.nbytes()


@pytest.fixture(scope="module", autouse=True)
def without_the_kernel() -> Any:
    """Memory is planned and held whatever the kernel computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixkv.engine.layer, "attend_segments", lambda *_, **__: None)
        yield


@settings(deadline=None, max_examples=150)
@given(policies(), st.integers(0, 1500), st.sampled_from([1, 7, 100, 512]), st.sampled_from([1500, 60]), st.data())
def test_a_plan_is_what_a_cache_says_behind_so_many_tokens(
    policy: CachePolicy, tokens: int, chunk: int, context: int, data: st.DataObject
) -> None:
    window, sliding = data.draw(st.integers(1, 900)), data.draw(st.sets(st.integers(0, 2)))
    config = replace(SMALL, sliding_window=window, sliding_layers=tuple(sorted(sliding)))
    if chunk == 1:
        tokens = min(tokens, 400)
    cuts = [*range(0, tokens, chunk), tokens]
    found = plan(config, policy, tokens, context=context, chunk=chunk)
    assert found.nbytes() == filled(policy, cuts, context, list(config.sliding_windows))
    assert found.total == found.sink + sum(found.tiers) + found.recent and found.old == sum(found.tiers)


@settings(deadline=None, max_examples=60)
@given(policies(), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_without_sliding_windows_it_does_not_matter_how_tokens_were_read(
    policy: CachePolicy, pieces: list[int]
) -> None:
    cuts = [0, *np.cumsum(pieces).tolist()]
    assert plan(SMALL, policy, cuts[-1]).nbytes() == filled(policy, cuts, 16_384, None)


def test_a_plan_has_no_tiers_that_its_layers_have_not() -> None:
    policy = CachePolicy(tile=32, older=(Tier(200, k_bits=2, v_bits=2),), overrides=(Override("0", older=()),))
    found = plan(SMALL, policy, 1000)
    assert len(found.tiers) == 2 and all(found.tiers) and len(plan(SMALL, CachePolicy(), 0).tiers) == 1


def test_a_plan_is_made_at_once_however_long_the_text() -> None:
    large = replace(CONFIG, num_hidden_layers=100, max_position_embeddings=1 << 24)
    started = time.perf_counter()
    plan(large, TIERS, 1 << 24)
    with pytest.raises(UsageError, match="would fit|tokens do"):
        check_fits(large, CachePolicy(window=1 << 24), 1 << 24, available=1 << 36)
    assert time.perf_counter() - started < 2


def test_layers_and_groups_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(UsageError, match="layers"):
        plan(SMALL, CachePolicy(overrides=(Override("7", sinks=0),)), 5)


# --- what there is ------------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """A machine made of files."""
    monkeypatch.setattr(sys, "platform", "linux")

    def available(files: dict[str, str]) -> int | None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return available_nbytes(tmp_path)

    return available


MEMINFO = {"proc/meminfo": "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    5000 kB\nSwapFree: 7 kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/a\n0::/\n"}


def group(folder: str, limit: str, used: str, free: str | None = None) -> dict[str, str]:
    files = {f"sys/fs/cgroup/{folder}memory.max": limit, f"sys/fs/cgroup/{folder}memory.current": used}
    if free is not None:
        files[f"sys/fs/cgroup/{folder}memory.stat"] = f"anon 5\ninactive_file {free}\nactive_file 77\n"
    return files


def group1(folder: str, limit: str, used: str, free: str) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory/{folder}memory"
    stat = f"inactive_file 3\ntotal_inactive_file {free}\n"
    return {f"{place}.limit_in_bytes": limit, f"{place}.usage_in_bytes": used, f"{place}.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 5_120_000),
        ({"proc/meminfo": "MemTotal: 5 kB\n"}, None),
        ({"proc/meminfo": "MemAvailable: \n"}, None),
        (MEMINFO | V2, 5_120_000),
        (MEMINFO | V2 | group("a/b/", "max\n", "100\n"), 5_120_000),
        (MEMINFO | V2 | group("a/b/", "1000\n", "300\n"), 700),
        (MEMINFO | V2 | group("a/b/", "1000\n", "300\n", "250\n"), 950),
        (MEMINFO | V2 | group("a/b/", "1000\n", "300\n") | group("a/", "500\n", "400\n", "7"), 107),
        (MEMINFO | V2 | group("", "900\n", "400\n", "7"), 507),
        (MEMINFO | V2 | group("a/b/", "1000\n", "3000\n"), 0),
        (MEMINFO | V2 | group("a/b/", "100000000\n", "300\n"), 5_120_000),
        (MEMINFO | V2 | group("a/b/", "what\n", "300\n"), 5_120_000),
        (MEMINFO | V1 | group1("a/", "1000\n", "600\n", "50\n"), 450),
        (MEMINFO | V1 | group1("", "1000\n", "600\n", "0\n"), 400),
        (MEMINFO | V1 | group1("a/", "9223372036854771712\n", "600\n", "50\n"), 5_120_000),
        (MEMINFO | {"proc/self/cgroup": "nonsense\n\n::\n"}, 5_120_000),
    ],
)
def test_available_is_the_least_of_the_machine_and_its_groups(
    system: Callable[..., int | None], files: dict[str, str], expected: int | None
) -> None:
    assert system(files) == expected


def test_elsewhere_nobody_knows_and_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert available_nbytes() is None
    assert check_fits(CONFIG, CachePolicy(), 16_384) == plan(CONFIG, CachePolicy(), 16_384).total


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_this_machine_has_some_memory() -> None:
    found = available_nbytes()
    assert found is not None and 1 << 20 < found < 1 << 50


# --- whether it fits ----------------------------------------------------------------------------------------------


def refusal(policy: CachePolicy, tokens: int, available: int, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_fits(CONFIG, policy, tokens, available=available, **options)
    return str(caught.value)


def test_what_fits_to_the_byte_is_taken_and_one_byte_less_refused() -> None:
    for policy in (CachePolicy(), CachePolicy.full(), TIERS):
        needed = plan(CONFIG, policy, 5000).total
        assert check_fits(CONFIG, policy, 5000, available=needed) == needed
        text = refusal(policy, 5000, needed - 1)
        assert f"of 5000 tokens needs {needed} bytes" in text and f"{needed - 1} bytes of memory are available" in text
        assert check_fits(CONFIG, policy, 5000, available=needed - 1, held=1) == needed - 1


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1])
@pytest.mark.parametrize("policy", [CachePolicy(window=4000), CachePolicy.full(), CachePolicy(k_bits=16, v_bits=8),
                                    CachePolicy(window=10_000_000, dense="f32", older=())], ids=str)  # fmt: skip
def test_the_proposal_fits_and_a_larger_one_does_not(policy: CachePolicy, share: float) -> None:
    """Against a search through all of them."""
    tokens = 5000
    room = int(plan(CONFIG, policy, tokens).total * share)

    def total(window: int, bits: int) -> int:
        own = replace(policy, window=window, k_bits=min(bits, policy.k_bits), v_bits=min(bits, policy.v_bits))
        return plan(CONFIG, own, tokens).total

    text = refusal(policy, tokens, room)
    largest = min(policy.window, tokens)
    least = min(128, largest)
    fitting = [(w >= least, bits, w) for bits in (8, 4, 3, 2) for w in {*range(0, largest + 1, 16), largest, least}
               if total(w, bits) <= room]  # fmt: skip
    if not fitting:
        most = max((n for n in range(0, tokens, 64) if plan(CONFIG, policy, n).total <= room), default=0)
        assert text.endswith(
            f"no window and bits make it fit, but {most} tokens do" if most else "not even 64 tokens fit"
        )
        return
    wide, bits, window = max(fitting)
    found = dict(word.split("=") for word in text.split(": ", 1)[1].removesuffix(" would fit").split())
    assert found["k_bits"] == str(min(bits, policy.k_bits)) and found["v_bits"] == str(min(bits, policy.v_bits))
    assert total(int(found["window"]), bits) <= room and (int(found["window"]) >= least) == wide
    assert window - policy.tile <= int(found["window"]) <= window + policy.tile


def test_no_memory_at_all_is_said() -> None:
    assert refusal(CachePolicy(), 5000, 0).endswith("not even 64 tokens fit")
    assert refusal(CachePolicy(older=(Tier(200, k_bits=2, v_bits=2),)), 5000, 100_000).endswith("tokens do")


def test_caches_side_by_side_are_added_up() -> None:
    policies = CachePolicy(), CachePolicy.full()
    needed = sum(plan(CONFIG, each, 3000).total for each in policies)
    assert check_fits(CONFIG, policies[0], 3000, beside=policies[1:], available=needed) == needed
    text = refusal(policies[0], 3000, needed - 1, beside=policies[1:])
    assert f"and 1 beside it needs {needed} bytes" in text and "would fit" in text
    text = refusal(policies[0], 3000, needed // 2, beside=policies[1:])
    most = int(text.split("but ")[1].split()[0])
    assert sum(plan(CONFIG, each, most).total for each in policies) <= needed // 2
    assert sum(plan(CONFIG, each, most + 64).total for each in policies) > needed // 2


def test_a_plan_is_what_a_session_of_the_model_says(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real kernel."""
    from mixkv.kernels.attention import attend_segments

    monkeypatch.setattr(mixkv.engine.layer, "attend_segments", attend_segments)
    policies = CachePolicy(), TIERS, CachePolicy(tile=32, overrides=(Override("1", k_bits=8),))
    for policy in policies:
        session = Session(toy, policy, context=1500)
        for tokens in (1, 700, 701, 1499, 1500):
            session.forward(np.arange(session.position, tokens) % 250, None)
            assert session.nbytes() == plan(CONFIG, policy, tokens, context=1500).nbytes()
    assert memory.PROPOSED_BITS == (8, 4, 3, 2)
