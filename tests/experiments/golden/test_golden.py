"""Recording and checking: against decoding written out here, and against changes of every kind."""

import math
from collections.abc import Callable
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixkv
from mixkv import CachePolicy, Override, Session, Tier
from mixkv.experiments.golden import record as golden
from mixkv.experiments.golden.about import NOTHING, describe, reasons
from mixkv.experiments.golden.compare import Check, PromptCheck, Step, Tolerances, compare, recorded_steps
from mixkv.experiments.golden.file import Recorded
from mixkv.experiments.golden.prompts import LONG, SHORT, default_prompts, parse_prompts, topics_text
from mixkv.experiments.golden.text import render, summary
from mixkv.models.errors import PromptError, UsageError
from mixkv.models.linear import FloatLinear
from mixkv.models.load import Model
from mixkv.models.rope import Rope
from mixkv.models.tiny import tiny_model
from mixkv.models.transformer import Transformer, Weights

POLICY = CachePolicy(window=16, sinks=2, tile=32)
PROMPTS = ["Once upon a time", "x" * 150]  # the second is beyond the window, so it is attended to as codes


@pytest.fixture(scope="module", params=["f32", "q8"])
def model(request: pytest.FixtureRequest) -> Model:
    return mixkv.load("toy", request.param)


def sessions(model: Model, policy: CachePolicy = POLICY) -> Callable[[], Session]:
    return lambda: Session(model, policy)


def decoded(model: Model, policy: CachePolicy, prompt: list[int], forced: list[int] | None, n: int) -> list[np.ndarray]:
    """Log-probabilities of all tokens at each step, float64, written out; with the tokens ``forced``, or the likeliest."""
    session, rows = Session(model, policy), []
    logits = session.forward(prompt, "last")
    for i in range(n):
        wide = np.asarray(logits).astype(np.longdouble)
        rows.append((wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()).astype(np.float64))
        token = int(np.argmax(logits)) if forced is None else forced[i]
        logits = session.forward([token], "last")
    return rows


def test_a_record_is_what_generate_says_and_how_likely_each_token_was(model: Model) -> None:
    found = golden.record(sessions(model), PROMPTS, max_tokens=9)
    for prompt, recorded in zip(PROMPTS, found, strict=True):
        ids = list(prompt.encode())
        tokens = list(mixkv.generate(Session(model, POLICY), ids, max_tokens=9))
        assert (recorded.text, recorded.prompt_ids) == (prompt, ids)
        assert recorded.token_ids == [token.id for token in tokens]
        assert recorded.generated == "".join(token.text for token in tokens)
        for row, token, logprob, alternatives in zip(
            decoded(model, POLICY, ids, None, 9),
            recorded.token_ids,
            recorded.logprobs,
            recorded.alternatives,
            strict=True,
        ):
            assert alternatives[0] == (token, logprob) and len(alternatives) == 5
            assert logprob == pytest.approx(row[token], abs=1e-12)
            assert [p for _, p in alternatives] == pytest.approx(sorted(row)[:-6:-1], abs=1e-12)
            assert [row[i] for i, _ in alternatives] == pytest.approx([p for _, p in alternatives], abs=1e-12)


def test_the_end_of_a_text_ends_a_record_and_belongs_to_it() -> None:
    toy = mixkv.load("toy")
    ids = golden.record(sessions(toy), PROMPTS[:1], max_tokens=9)[0].token_ids
    config = replace(toy.config, eos_token_ids=(ids[3],))
    ending = replace(toy, config=config, transformer=Transformer(config, toy.transformer.weights))
    assert golden.record(sessions(ending), PROMPTS[:1], max_tokens=9)[0].token_ids == ids[: ids.index(ids[3]) + 1]


def test_of_tokens_equally_likely_the_lowest_ids_come_first() -> None:
    toy = mixkv.load("toy")
    flat = alike(toy, 3, 3, 0.0)
    flat.transformer.weights.head.weight[:] = 0  # type: ignore[attr-defined]
    found = golden.record(sessions(flat), PROMPTS[:1], max_tokens=2)[0]
    assert found.token_ids == [0, 0] and [token for token, _ in found.alternatives[1]] == [0, 1, 2, 3, 4]
    assert found.logprobs == pytest.approx([-math.log(258)] * 2, abs=1e-12)
    small = tiny_model(vocab_size=3)
    assert len(golden.record(sessions(small), [[1]], max_tokens=1)[0].alternatives[0]) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_recorded_is_found_again_to_the_last_bit(model: Model, threads: int) -> None:
    if threads > numba.get_num_threads():
        pytest.skip("a machine of one core")
    recorded = golden.record(sessions(model), max_tokens=5)
    assert len(recorded) == 5 and len(recorded[-1].prompt_ids) > 500
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(threads)
        for tolerances in (Tolerances(exact=True), Tolerances()):
            found = golden.check(recorded, sessions(model), tolerances)
            assert [x.status for x in found.prompts] == ["ok"] * 5 and not found.failed
            assert all(x.largest == 0 for x in found.prompts)
    finally:
        numba.set_num_threads(before)


def test_a_check_reads_the_recorded_tokens_whatever_it_would_choose(model: Model) -> None:
    ids = list(PROMPTS[1].encode())
    forced = [3, 250, 65, 66, 3, 90]
    rows = decoded(model, POLICY, ids, forced, len(forced))
    logprobs = [float(row[token]) for row, token in zip(rows, forced, strict=True)]
    alternatives = [[(token, p)] for token, p in zip(forced, logprobs, strict=True)]
    recorded = Recorded(PROMPTS[1], ids, None, forced, logprobs, alternatives)
    found = golden.check([recorded], sessions(model), Tolerances(logprob=1e-9)).prompts[0]
    likeliest = [int(row.argmax()) for row in rows]
    assert (found.steps, found.beyond, found.status) == (6, 0, "differs")
    assert found.divergences == sum(a != b for a, b in zip(likeliest, forced, strict=True)) == 6
    assert found.first is not None and found.first.step == 0 and found.first.found.id == likeliest[0]
    assert found.first.gap == pytest.approx(rows[0].max() - rows[0][3], abs=1e-5)
    assert found.first.before == "x" * 60 and not found.first.tied


# --- what differs, and why ------------------------------------------------------------------------------------------


def checked(then: Model, now: Model, policy: CachePolicy = POLICY, **options: Any) -> tuple[Check, str]:
    """A record of one model held against another one; what differs, as text."""
    recorded = golden.record(sessions(then), PROMPTS, max_tokens=8)
    found = golden.check(recorded, sessions(now, policy), Tolerances(**options))
    return found, render(found, reasons(describe(then, POLICY), describe(now, policy)))


def test_a_changed_tensor_is_named() -> None:
    then, now = tiny_model(), tiny_model()
    assert checked(then, now)[0].failed == 0
    part = now.transformer.weights.layers[1].mlp.down.parts[0]  # type: ignore[attr-defined]
    part.data[-16:] ^= 0x40  # codes of the last columns of the last rows
    found, text = checked(then, now)
    assert found.failed > 0
    assert (
        "1 of 30 changed: model.layers.1.mlp.down_proj.weight" in text and "config:" not in text and NOTHING not in text
    )


def test_many_changed_tensors_are_counted_and_five_named() -> None:
    found, text = checked(tiny_model(seed=1), tiny_model(seed=2))
    assert found.failed == 2
    line = next(line for line in text.splitlines() if "tensors:" in line)
    assert "30 of 30 changed: " in line and line.count("weight") == 5 and line.endswith(", ...")


def test_a_changed_config_is_named() -> None:
    then, now = tiny_model(rope=Rope(100_000.0)), tiny_model(rope=Rope(50_000.0))
    found, text = checked(then, now)
    assert found.failed == 2 and "config:   rope.theta 100000.0 -> 50000.0" in text and "tensors:" not in text


def test_a_changed_policy_is_named_and_changes_only_what_is_kept_as_codes() -> None:
    toy = mixkv.load("toy", "q8")
    found, text = checked(toy, toy, replace(POLICY, k_bits=3))
    assert [x.status for x in found.prompts] == ["ok", "differs"] and "policy:   k_bits 4 -> 3" in text
    changed = replace(POLICY, older=(Tier(64, k_bits=2),), overrides=(Override("0", v_bits=8),))
    assert "overrides () -> (Override('0', v_bits=8),)" in checked(toy, toy, changed)[1]


def test_another_weight_format_and_other_surroundings_are_named() -> None:
    f32, q8 = mixkv.load("toy", "f32"), mixkv.load("toy", "q8")
    then, now = describe(f32, POLICY, weights="f32"), describe(q8, POLICY, weights="q8")
    now = replace(now, model="other", versions={**now.versions, "numba": "1.0"}, cpu={**now.cpu, "vectors": "128 bits"},
                  code={**now.code, "engine": "0" * 16})  # fmt: skip
    found = reasons(then, now)
    assert found["model"] == ["name toy -> other"] and found["weights"] == ["format f32 -> q8"]
    assert found["tensors"][0].startswith("23 of 30 changed, kept as q8 instead of f32: model.embed_tokens.weight")
    assert found["versions"] == [f"numba {then.versions['numba']} -> 1.0"]
    assert found["cpu"] == [f"vectors {then.cpu['vectors']} -> 128 bits"] and found["code"] == ["of engine"]
    assert reasons(then, then) == {}


def test_fields_that_come_and_go_are_named_with_their_paths() -> None:
    toy = mixkv.load("toy")
    then = replace(describe(toy, POLICY), config={"rope": {"factor": 2.0, "kind": "yarn"}, "old": 1})
    now = replace(
        then, config={"rope": {"factor": 4.0, "kind": "yarn"}, "new": [1]}, tensors={"other": "f32 " + "0" * 16}
    )
    found = reasons(then, now)
    assert found["config"] == ["rope.factor 2.0 -> 4.0", "old 1 -> none", "new none -> [1]"]
    assert [line.split(":")[0] for line in found["tensors"]] == ["30 of 30 no longer there", "1 of 30 new"]


def test_numbers_that_differ_for_no_reason_that_was_recorded_are_said_to() -> None:
    toy = mixkv.load("toy", "q8")
    recorded = golden.record(sessions(toy), PROMPTS, max_tokens=4)
    shifted = [replace(x, logprobs=[p - 0.5 for p in x.logprobs]) for x in recorded]
    found = golden.check(shifted, sessions(toy), Tolerances())
    text = render(found, reasons(describe(toy, POLICY), describe(toy, POLICY)))
    assert found.failed == 2 and f"why: {NOTHING}" in text
    assert "log-probabilities differ by up to 0.5 nats" in text and "by more than 0.001 at 4 of 4 steps" in text


def alike(model: Model, token: int, other: int, factor: float) -> Model:
    """A model whose head says of ``other`` what it says of ``token``, times a factor."""
    head = model.transformer.weights.head
    assert isinstance(head, FloatLinear)
    weight = head.weight.copy()
    weight[other] = weight[token] * np.float32(factor)
    own = Weights(model.transformer.weights.embedding, model.transformer.weights.layers,
                  FloatLinear(weight, None, head.before))  # fmt: skip
    return replace(model, transformer=Transformer(model.config, own))


def test_tokens_that_are_nearly_as_likely_are_a_tie() -> None:
    toy = mixkv.load("toy")
    first = golden.record(sessions(toy), PROMPTS[:1], max_tokens=1)[0].token_ids[0]
    then, now = alike(toy, first, 126, 1 - 1e-5), alike(toy, first, 126, 1 + 1e-5)
    recorded = golden.record(sessions(then), PROMPTS[:1], max_tokens=6)
    assert recorded[0].token_ids[0] == first
    found = golden.check(recorded, sessions(now), Tolerances())
    assert (found.failed, found.prompts[0].status) == (0, "tie")
    parted = found.prompts[0].first
    assert parted is not None and (parted.step, parted.recorded.id, parted.found.id) == (0, first, 126)
    assert parted.gap is not None and 0 < parted.gap < 1e-3 and parted.tied
    text = render(found, {})
    assert "prompt 0: tie " in text and "within the tie tolerance of 0.001" in text and NOTHING not in text
    assert summary(found).endswith("as recorded, with ties in 1")
    strict = golden.check(recorded, sessions(now), Tolerances(tie=parted.gap / 2)).prompts[0]
    assert strict.status == "differs" and strict.first == replace(parted, tied=False)
    assert "not within the tie tolerance" in render(Check([strict], Tolerances(tie=parted.gap / 2)), {})
    assert golden.check(recorded, sessions(now), Tolerances(exact=True)).prompts[0].status == "differs"


def test_a_text_that_is_tokenized_otherwise_differs() -> None:
    toy = mixkv.load("toy", "q8")
    recorded = golden.record(sessions(toy), PROMPTS, max_tokens=3)
    other = [replace(recorded[0], text="Once upon A time"), replace(recorded[1], text=None)]
    found = golden.check(other, sessions(toy), Tolerances())
    assert [x.status for x in found.prompts] == ["differs", "ok"]
    assert found.prompts[0].notes == ["the prompt's text is now other tokens than recorded from number 10 on"]
    assert "  the prompt's text is now other tokens" in render(found, {}) and "prompt 1: ok      150 ids" in render(
        found, {}
    )
    mute = replace(toy, tokenizer=None)
    found = golden.check(recorded, sessions(mute), Tolerances())
    assert found.failed == 2 and "cannot encode it" in found.prompts[0].notes[0]
    said = golden.check([replace(recorded[0], generated="abc")], sessions(toy), Tolerances()).prompts[0]
    assert said.status == "differs" and "are now the text" in said.notes[0]


def test_exact_compares_the_alternatives_too() -> None:
    toy = mixkv.load("toy", "q8")
    recorded = golden.record(sessions(toy), PROMPTS[:1], max_tokens=3)[0]
    token, logprob = recorded.alternatives[2][4]
    changed = [*recorded.alternatives[2][:4], (token, math.nextafter(logprob, -9))]
    other = replace(recorded, alternatives=[*recorded.alternatives[:2], changed])
    assert golden.check([other], sessions(toy), Tolerances()).failed == 0
    found = golden.check([other], sessions(toy), Tolerances(exact=True)).prompts[0]
    assert found.status == "differs" and "at 1 steps from 2 on" in found.notes[0]


# --- comparing ------------------------------------------------------------------------------------------------------

STEPS = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.floats(-9, 0), st.floats(-9, 0) | st.just(-math.inf), st.floats(0, 2)
)


@given(st.lists(STEPS, min_size=1, max_size=6), st.floats(0, 3), st.floats(0, 2))
@settings(deadline=None)
def test_the_verdict_follows_from_every_step(drawn: list[Any], tolerance: float, tie: float) -> None:
    recorded = Recorded(None, [1], None, [x[0] for x in drawn], [x[2] for x in drawn], [[(x[0], x[2])] for x in drawn])
    steps = [
        Step(found, taken, now, 0.0 if found == taken else gap, [(found, now)]) for taken, found, _, now, gap in drawn
    ]
    result = compare(recorded, steps, None, Tolerances(tolerance, tie), None)
    parted = [i for i, x in enumerate(drawn) if x[0] != x[1]]
    worse = [i for i in parted if drawn[i][4] > tie]
    apart = [abs(then - now) for _, _, then, now, _ in drawn]
    beyond = sum(x > tolerance for x in apart)
    assert (result.divergences, result.beyond, result.largest) == (len(parted), beyond, max(apart))
    assert apart[result.largest_step] == result.largest
    assert result.status == ("differs" if beyond or worse else "tie" if parted else "ok")
    expected = worse[0] if worse else parted[0] if parted else None
    assert (None if result.first is None else result.first.step) == expected
    assert result.first is None or result.first.tied == (not worse)
    assert render(Check([result], Tolerances(tolerance, tie)), {})


def test_a_check_becomes_json_without_infinities() -> None:
    recorded = Recorded("a", [1], None, [2], [-1.0], [[(2, -1.0)]])
    result = compare(recorded, [Step(3, 2, -math.inf, math.inf, [(3, 0.0)])], None, Tolerances(), None)
    described = Check([result], Tolerances()).to_dict()
    assert described["ok"] is False and described["prompts"][0]["largest"] is None
    assert described["prompts"][0]["first"]["recorded"] == {
        "id": 2, "text": None, "recorded_logprob": -1.0, "logprob": None
    }  # fmt: skip
    assert isinstance(result, PromptCheck) and "differ by up to inf nats" in render(Check([result], Tolerances()), {})


def test_two_records_are_compared_up_to_where_they_part() -> None:
    one = Recorded("a", [1], None, [2, 3, 4], [-1.0, -1.0, -1.0], [[(2, -1.0)], [(3, -1.0), (5, -2.0)], [(4, -1.0)]])
    two = Recorded("a", [1], None, [2, 5, 6], [-1.1, -1.2, -1.0], [[(2, -1.1)], [(5, -1.2), (3, -1.5)], [(6, -1.0)]])
    assert recorded_steps(one, two) == [
        Step(2, 2, -1.1, 0.0, [(2, -1.1)]), Step(5, 3, -1.5, pytest.approx(0.3), [(5, -1.2), (3, -1.5)]),
    ]  # fmt: skip
    far = replace(two, alternatives=[[(2, -1.1)], [(5, -1.2)], [(6, -1.0)]])
    assert recorded_steps(one, far)[1] == Step(5, 3, None, None, [(5, -1.2)])
    found = compare(one, recorded_steps(one, far), None, Tolerances(1.0, 1.0), None)
    assert found.status == "differs" and "gap of their logits now: unknown" in render(Check([found], Tolerances()), {})
    with pytest.raises(UsageError, match="same prompts"):
        recorded_steps(one, replace(two, prompt_ids=[7]))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("name", ["logprob", "tie"])
def test_a_tolerance_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{'tolerance' if name == 'logprob' else 'tie'} must be a finite number"):
        Tolerances(**{name: value})


def test_prompts_that_do_not_fit_are_refused_before_the_first_is_read() -> None:
    toy = mixkv.load("toy")
    read: list[int] = []
    short: Callable[[], Session] = lambda: Session(toy, POLICY, context=40)  # noqa: E731
    with pytest.raises(PromptError, match="prompt 1: 39 tokens and 3 behind them do not fit into the context of 40"):
        golden.record(short, ["x", "x" * 39], max_tokens=3, progress=lambda done, total: read.append(done))
    assert read == [] and len(golden.record(short, ["x", "x" * 39], max_tokens=2)[1].token_ids) == 2
    for prompts, words in (([[1], [258]], "prompt 1: token id 258"), ([[1], []], "prompt 1: the prompt is empty"),
                           ([], "1 to 1024 prompts")):  # fmt: skip
        with pytest.raises(PromptError, match=words):
            golden.record(sessions(toy), prompts)
    for n in (0, -1, True, 1 << 20):
        with pytest.raises(UsageError, match="max_tokens must be a whole number from 1 to 65536"):
            golden.record(sessions(toy), ["x"], max_tokens=n)
    with pytest.raises(UsageError, match="no chat template"):
        golden.record(sessions(toy), ["x"], chat=True)


def test_a_model_that_cannot_read_a_record_is_refused() -> None:
    recorded = golden.record(sessions(mixkv.load("toy")), ["hello"], max_tokens=4)
    small = tiny_model(vocab_size=90)
    with pytest.raises(
        UsageError, match="model 'tiny llama' cannot read what was recorded: .*outside of the vocabulary"
    ):
        golden.check(recorded, sessions(small), Tolerances())
    with pytest.raises(UsageError, match="cannot read what was recorded: .*do not fit"):
        golden.check(recorded, sessions(tiny_model(max_position_embeddings=7)), Tolerances())


def test_a_session_that_has_read_something_is_refused() -> None:
    session = Session(mixkv.load("toy"), POLICY)
    with pytest.raises(UsageError, match="each session must be a new one, found one that has read 5 tokens"):
        golden.record(lambda: session, ["hello", "x"], max_tokens=1)


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "context", "least", "most"),
    [(CachePolicy(), 16_384, 0.9 * LONG, LONG), (CachePolicy(window=800), 16_384, 0.9 * 928, 928),
     (CachePolicy(overrides=(Override("1", window=900),)), 16_384, 0.9 * 1028, 1028), (CachePolicy(), 200, 150, 168)],
)  # fmt: skip
def test_our_own_prompts_reach_beyond_the_window_as_far_as_they_fit(
    policy: CachePolicy, context: int, least: float, most: int
) -> None:
    model = tiny_model(max_position_embeddings=context)
    *short, long = default_prompts(model, policy, 32)
    assert tuple(short) == SHORT and isinstance(long, str)
    assert least <= len(model.encode(long)) <= most
    assert long.startswith(topics[min(topics)][:100])


def test_the_text_of_topics_has_so_many_tokens_and_not_many_fewer() -> None:
    model = tiny_model()
    for n in (1, 2, 10, 599, 5_000, 30_000):
        assert 0.97 * n - 1 <= len(model.encode(topics_text(model, n))) <= n


def test_a_file_of_prompts_is_a_line_each_or_json_on_each_line() -> None:
    assert parse_prompts("one\r\n\n  two \nthr\u2028ee", "p.txt") == ["one", "  two ", "thr\u2028ee"]
    assert parse_prompts('"a\\nb"\n[1, 2]\n\n', "p.jsonl") == ["a\nb", [1, 2]]
    for text, words in (("\n \n", "found 0"), ("x\n" * 1025, "found 1025")):
        with pytest.raises(PromptError, match=words):
            parse_prompts(text, "p.txt")
    for line in ("no json", "[]", "[1.5]", "[true]", "{}", "[[1]]", "1" * 5000, "[" * 100_000):
        with pytest.raises(PromptError, match="p.jsonl: line 2: a JSON text or a list of token ids"):
            parse_prompts(f'"a"\n{line}', "p.jsonl")
