"""What options multiply out to, and what is refused before anything is measured."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkv.engine.policy import CachePolicy
from mixkv.experiments.bench_plan import MAX_REPETITIONS, Case, Plan, parse_cases, parse_policies
from mixkv.models.errors import UsageError


def make_plan(**fields: object) -> Plan:
    standard = {"weights": ["auto"], "threads": [1], "policies": [CachePolicy()], "cases": [Case(8, 0, 0)]}
    return Plan(**{**standard, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(512, 0, 0), "pp512"),
        (Case(0, 128, 0), "tg128"),
        (Case(512, 128, 0), "pp512+tg128"),
        (Case(512, 0, 4096), "pp512 @ d4096"),
        (Case(0, 1, 7), "tg1 @ d7"),
    ],
)
def test_cases_are_named_as_llama_bench_does(case: Case, name: str) -> None:
    assert case.name == name and case.n_timed == case.n_prompt + case.n_gen


def test_every_depth_has_all_prompts_then_generations_then_pairs() -> None:
    cases = parse_cases(["512,1024"], ["32-128*4"], ["0-4096+2048"], ["3,5", "0,7"])
    assert [case.name for case in cases[:6]] == ["pp512", "pp1024", "tg32", "tg128", "pp3+tg5", "tg7"]
    assert [case.name for case in cases[6:12]] == [f"{case.name} @ d2048" for case in cases[:6]]
    assert len(cases) == 18 and {case.n_depth for case in cases[12:]} == {4096}


@given(*[st.lists(st.integers(0, 9), min_size=1, max_size=3)] * 3)
def test_cases_multiply_out(prompts: list[int], generated: list[int], depths: list[int]) -> None:
    found = parse_cases(*[[",".join(map(str, numbers))] for numbers in (prompts, generated, depths)], [])
    wanted = [(p, 0, d) for p, d in itertools.product(prompts, depths) if p]
    wanted += [(0, n, d) for n, d in itertools.product(generated, depths) if n]
    assert sorted((case.n_prompt, case.n_gen, case.n_depth) for case in found) == sorted(wanted)


def test_zero_is_no_case() -> None:
    assert parse_cases(["0"], ["0"], ["0,5"], ["0,0"]) == []
    assert [case.name for case in parse_cases(["0"], ["4"], ["0"], [])] == ["tg4"]


@pytest.mark.parametrize(("at", "option"), list(enumerate(["-p", "-n", "-d", "-pg"])))
def test_a_list_that_is_none_is_refused_with_its_option(at: int, option: str) -> None:
    lists = [["1"], ["1"], ["1"], ["1,1"]]
    lists[at] = ["x"]
    with pytest.raises(UsageError, match=rf"^{option} .*'x'"):
        parse_cases(*lists)
    lists[at] = ["16777217,1"]
    with pytest.raises(UsageError, match=rf"^{option} .*from 0 to 16777216"):
        parse_cases(*lists)


def test_policies_are_lists_of_short_names() -> None:
    found = parse_policies(["f32,k4v2:window=64", "k8v8:sinks=0:tile=32"])
    assert found == [CachePolicy.full(), CachePolicy(v_bits=2, window=64), CachePolicy(128, 0, 8, 8, 32)]
    with pytest.raises(UsageError, match="cache policy 'q4'"):
        parse_policies(["k4v4,q4"])
    with pytest.raises(UsageError, match="--kv"):
        parse_policies([""])


@pytest.mark.parametrize("repetitions", [0, -1, MAX_REPETITIONS + 1])
def test_repetitions_out_of_range_are_refused(repetitions: int) -> None:
    with pytest.raises(UsageError, match=f"-r must be from 1 to {MAX_REPETITIONS}, found {repetitions}"):
        make_plan(repetitions=repetitions)


def test_weights_that_are_none_and_nothing_to_do_are_refused() -> None:
    with pytest.raises(UsageError, match="q9"):
        make_plan(weights=["auto", "q9"])
    with pytest.raises(UsageError, match="nothing to measure"):
        make_plan(cases=[])


def test_a_case_beyond_the_context_is_refused_with_both_numbers(toy: object) -> None:
    limit = 16_384
    make_plan(cases=[Case(limit, 0, 0), Case(300, 84, limit - 384)]).check_fits(toy)  # type: ignore[arg-type]
    for case in (Case(0, limit + 1, 0), Case(8, 8, limit - 15)):
        with pytest.raises(UsageError, match=rf"{case.name[:3]}.* needs a context of 16385 tokens, .*'toy' has 16384"):
            make_plan(cases=[Case(1, 0, 0), case]).check_fits(toy)  # type: ignore[arg-type]
