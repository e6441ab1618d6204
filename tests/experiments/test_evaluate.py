"""``evaluate``: against the whole T x V logits in float64, and on sessions that are told what to predict."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import mixkv
from mixkv import CachePolicy, Session
from mixkv.experiments.divergence import compare
from mixkv.experiments.evaluate import CHUNK, Evaluation, evaluate
from mixkv.models.errors import NumericalError, PromptError, UsageError
from mixkv.models.linear import Norm
from mixkv.models.load import Model

from .told import Told

Float32 = NDArray[np.float32]
MIXED = CachePolicy(window=20, sinks=2, k_bits=3, v_bits=3, tile=32)


def ids_for(model: Model, n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)


def told(model: Model, reference: Float32, candidate: Float32, ids: Any, **options: Any) -> Evaluation:
    return evaluate(*(Told(model, x, x.shape[1]) for x in (reference, candidate)), ids, **options)


def oracle(reference: Float32, candidate: Float32, ids: NDArray[np.int64]) -> dict[str, Any]:
    """From the logits of the whole text, (T - 1, V): every formula in its plainest form."""
    p, q = (np.exp(x.astype(np.float64)) for x in (reference, candidate))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    kld = (p * np.log(p / q)).sum(axis=1)
    at = np.arange(len(p)), ids[1:]
    nll_reference, nll = -np.log(p[at]), -np.log(q[at])
    ratio, change = nll - nll_reference, np.exp(-nll) - np.exp(-nll_reference)
    same = p.argmax(axis=1) == q.argmax(axis=1)

    def se(x: NDArray[np.float64]) -> float:
        return np.sqrt(((x - x.mean()) ** 2).sum() / (len(x) - 1) / len(x))

    def quantiles(x: NDArray[np.float64], **named: float) -> dict[str, float]:
        return {name: np.quantile(x, q) for name, q in named.items()}

    return {
        "tokens": len(ids),
        "predicted_tokens": len(ids) - 1,
        "ppl": np.exp(nll.mean()),
        "ppl_se": np.exp(nll.mean()) * se(nll),
        "ppl_reference": np.exp(nll_reference.mean()),
        "ppl_reference_se": np.exp(nll_reference.mean()) * se(nll_reference),
        "ppl_ratio": np.exp(nll.mean()) / np.exp(nll_reference.mean()),
        "ppl_ratio_se": np.exp(ratio.mean()) * se(ratio),
        "ln_ppl_ratio": ratio.mean(),
        "ln_ppl_ratio_se": se(ratio),
        "nll_correlation": np.corrcoef(nll, nll_reference)[0, 1],
        "kld": {
            "mean": kld.mean(),
            "se": se(kld),
            **quantiles(kld, median=0.5, p90=0.9, p95=0.95, p99=0.99, p999=0.999, max=1),
        },
        "dp": {
            "mean": change.mean(),
            "se": se(change),
            "rms": np.sqrt((change**2).mean()),
            "rms_se": se(change**2) / 2 / np.sqrt((change**2).mean()),
            **quantiles(change, min=0, p001=0.001, p01=0.01, p05=0.05, p10=0.1, p25=0.25, median=0.5),
            **quantiles(change, p75=0.75, p90=0.9, p95=0.95, p99=0.99, p999=0.999, max=1),
        },
        "top1": same.mean(),
        "top1_se": np.sqrt(same.mean() * (1 - same.mean()) / (len(p) - 1)),
    }


def without_bytes(found: Evaluation) -> dict[str, Any]:
    others = (
        "kv_bytes_per_token",
        "kv_bytes_per_token_reference",
        "tokens_per_second",
        "by_distance",
        "mass",
        "mass_by_layer",
    )
    return {name: x for name, x in found.to_dict().items() if name not in others}


def approximately(expected: dict[str, Any], **tolerance: float) -> dict[str, Any]:
    return {
        name: approximately(x, **tolerance) if isinstance(x, dict) else pytest.approx(x, **tolerance)
        for name, x in expected.items()
    }


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_numbers_are_those_of_the_whole_logits(toy: Model, chunk: int) -> None:
    ids = ids_for(toy, 400)
    reference, candidate = Session(toy, CachePolicy.full()), Session(toy, MIXED)
    found = evaluate(reference, candidate, ids, chunk=chunk)
    whole = [Session(toy, policy, chunk=chunk).forward(ids[:-1]) for policy in (CachePolicy.full(), MIXED)]
    expected = oracle(*whole, ids)
    assert without_bytes(found) == approximately(expected, rel=1e-9, abs=1e-12)
    assert expected["kld"]["mean"] > 1e-4 and 0 < expected["top1"] < 1 and expected["ppl"] > 10, "this proves little"
    assert reference.position == candidate.position == 400


def test_bytes_are_those_of_the_caches_that_hold_the_whole_text(toy: Model) -> None:
    ids = ids_for(toy, 300)
    found = evaluate(Session(toy, CachePolicy.full()), Session(toy, MIXED), ids)
    for policy, nbytes in ((MIXED, found.kv_bytes_per_token), (CachePolicy.full(), found.kv_bytes_per_token_reference)):
        session = Session(toy, policy)
        session.forward(ids, None)
        assert nbytes == session.nbytes()["total"] / 300
    assert found.kv_bytes_per_token < found.kv_bytes_per_token_reference / 3


def test_two_sessions_of_one_policy_do_not_diverge(toy: Model) -> None:
    found = evaluate(Session(toy, MIXED), Session(toy, MIXED), ids_for(toy, 300))
    assert set(found.to_dict()["kld"].values()) == set(found.to_dict()["dp"].values()) - {None} == {0}
    assert (found.top1, found.ln_ppl_ratio, found.ln_ppl_ratio_se) == (1, 0, 0)
    assert found.ppl == found.ppl_reference
    assert found.kv_bytes_per_token == found.kv_bytes_per_token_reference


def test_the_candidate_may_be_the_more_precise_one(toy: Model) -> None:
    """Exchanged, perplexities and bytes change places, and the sign of their ratio; KL is another number."""
    ids = ids_for(toy, 200)
    one = evaluate(Session(toy, CachePolicy.full()), Session(toy, MIXED), ids)
    other = evaluate(Session(toy, MIXED), Session(toy, CachePolicy.full()), ids)
    assert (one.ppl, one.ppl_reference) == (other.ppl_reference, other.ppl)
    assert one.ln_ppl_ratio == -other.ln_ppl_ratio and one.top1 == other.top1
    assert one.kld.mean != other.kld.mean
    assert one.kv_bytes_per_token == other.kv_bytes_per_token_reference


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_chunk_changes_the_numbers_by_rounding_only(toy: Model, chunk: int) -> None:
    """With a dense cache, in which rounding stays as small as it is: 2e-4 of a logit at most."""
    ids, dense = ids_for(toy, 300), CachePolicy(window=0, sinks=0, k_bits=16, v_bits=16, tile=32)
    expected = evaluate(Session(toy, CachePolicy.full()), Session(toy, dense), ids)
    found = evaluate(Session(toy, CachePolicy.full()), Session(toy, dense), ids, chunk=chunk)
    assert found.ppl == pytest.approx(expected.ppl, rel=1e-5)
    assert found.kld.mean == pytest.approx(expected.kld.mean, rel=0.05)
    assert 0 < expected.kld.mean < 1e-5


@given(st.integers(2, 60), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_how_logits_are_cut_does_not_change_a_bit(toy: Model, tokens: int, one: int, other: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    reference = generator.standard_normal((tokens, 9), np.float32) * 4
    candidate = reference + generator.standard_normal((tokens, 9), np.float32)
    ids = generator.integers(0, 9, tokens)
    found = told(toy, reference, candidate, ids, chunk=one)
    assert found == told(toy, reference, candidate, ids, chunk=other)
    if tokens > 2:
        expected = oracle(reference[:-1], candidate[:-1], ids)
        assert without_bytes(found) == approximately(expected, rel=1e-9, abs=1e-12)


def test_of_two_tokens_one_is_predicted_and_there_is_no_standard_error(toy: Model) -> None:
    logits = np.log(np.array([[1, 3], [1, 1]], np.float32)), np.log(np.array([[1, 1], [9, 1]], np.float32))
    found = told(toy, *logits, [0, 1])
    assert (found.tokens, found.predicted_tokens, found.ln_ppl_ratio_se) == (2, 1, None)
    assert (found.ppl_reference, found.ppl) == pytest.approx((4 / 3, 2), rel=1e-6)
    assert set(found.to_dict()["kld"].values()) == {found.kld.mean, None} and found.kld.se is None


# --- beyond the finite --------------------------------------------------------------------------------------------


def test_what_the_candidate_holds_for_impossible_is_infinite_and_none_in_the_dictionary(toy: Model) -> None:
    reference = np.zeros((200, 4), np.float32)
    candidate = reference.copy()
    candidate[150, 2] = -np.inf  # not the token that comes
    found = told(toy, reference, candidate, np.zeros(200, np.int64))
    assert found.kld.median == 0 and found.kld.p99 == 0
    assert found.kld.mean == found.kld.p999 == found.kld.max == math.inf
    expected = {"mean": None, "se": None, "median": 0, "p90": 0, "p95": 0, "p99": 0, "p999": None, "max": None}
    assert found.to_dict()["kld"] == expected
    assert found.ppl == pytest.approx(4, rel=0.01) and found.ln_ppl_ratio_se is not None
    candidate[150, 0] = -np.inf
    found = told(toy, reference, candidate, np.zeros(200, np.int64))
    assert (found.ppl, found.ln_ppl_ratio, found.ln_ppl_ratio_se) == (math.inf, math.inf, None)
    assert found.to_dict()["ppl"] is None


def test_a_perplexity_beyond_a_float_is_infinite_and_its_logarithm_is_not(toy: Model) -> None:
    reference = np.zeros((3, 2), np.float32)
    candidate = np.array([[0, 10_000]] * 3, np.float32)
    found = told(toy, reference, candidate, [0, 0, 0])
    assert found.ppl == math.inf
    assert found.ln_ppl_ratio == pytest.approx(10_000 - math.log(2))
    assert found.kld.mean == pytest.approx(5_000 - math.log(2))


def test_a_token_that_the_reference_holds_for_impossible_is_an_error(toy: Model) -> None:
    reference, candidate = np.zeros((9, 4), np.float32), np.zeros((9, 4), np.float32)
    reference[6, 3] = -np.inf
    with pytest.raises(NumericalError, match="^position 7: the reference gives token 3 of the text probability 0$"):
        told(toy, reference, candidate, [0, 1, 2, 0, 0, 0, 0, 3, 3])
    assert told(toy, reference, candidate, [0, 1, 2, 0, 0, 0, 0, 1, 3]).kld.max == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_an_error(toy: Model, which: int) -> None:
    both = [np.zeros((100, 4), np.float32) for _ in range(2)]
    both[which][90, 1] = np.nan
    with pytest.raises(NumericalError, match=("reference", "candidate")[which]):
        told(toy, *both, np.zeros(100, np.int64))


def test_weights_that_are_nan_are_an_error(toy: Model) -> None:
    weights = toy.transformer.weights
    broken = replace(weights, head=weights.head.behind(Norm(np.full(64, np.nan, np.float32), 1e-5)))
    damaged = replace(toy, transformer=type(toy.transformer)(toy.config, broken))
    with pytest.raises(NumericalError):
        evaluate(Session(toy, CachePolicy.full()), Session(damaged), ids_for(toy, 9))


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_text_times_the_vocabulary(toy: Model) -> None:
    """40 chunks take what 3 take, and less than 200 bytes for each token more; a row of logits has 80,000."""
    vocab = 20_000

    def rows(positions: NDArray[np.int64]) -> Float32:
        return np.outer(1 + positions % 7, np.linspace(0, 1, vocab)).astype(np.float32)

    def peak(tokens: int) -> int:
        sessions = [Told(toy, rows, vocab) for _ in range(2)]
        tracemalloc.start()
        try:
            evaluate(*sessions, np.zeros(tokens, np.int64))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        for session in sessions:
            assert max(session.rows_asked_for) <= CHUNK == 256
            assert sum(session.rows_asked_for) == tokens - 1
        return most

    short, long = 3 * CHUNK, 40 * CHUNK
    grown = peak(long) - peak(short)
    assert grown < 200 * (long - short)


# --- what it is given ---------------------------------------------------------------------------------------------


def test_progress_counts_the_tokens_read(toy: Model) -> None:
    done: list[tuple[int, int]] = []
    evaluate(Session(toy), Session(toy), ids_for(toy, 50), chunk=20, progress=lambda *x: done.append(x))
    assert done == [(40, 100), (80, 100), (98, 100), (100, 100)]


def refused_before_anything_is_read(error: type[Exception], words: str, *args: Any, **options: Any) -> None:
    before = [session.position for session in args[:2]]
    with pytest.raises(error, match=words):
        evaluate(*args, **options)
    assert [session.position for session in args[:2]] == before


@pytest.mark.parametrize("ids", [[], [5], np.array([5])], ids=repr)
def test_fewer_than_two_tokens_are_refused(toy: Model, ids: Any) -> None:
    words = f"^at least 2 tokens are needed, of which the second is predicted, found {len(ids)}$"
    refused_before_anything_is_read(PromptError, words, Session(toy), Session(toy), ids)


def test_a_text_that_does_not_fit_into_one_of_them_is_refused(toy: Model) -> None:
    small, words = {"context": 20}, "^21 tokens do not fit into the context of 20$"
    refused_before_anything_is_read(PromptError, words, Session(toy), Session(toy, **small), range(21))
    refused_before_anything_is_read(PromptError, words, Session(toy, **small), Session(toy), range(21))
    assert evaluate(Session(toy, **small), Session(toy, **small), range(20)).tokens == 20


def test_ids_outside_of_the_vocabulary_are_refused(toy: Model) -> None:
    refused_before_anything_is_read(PromptError, "token id 258", Session(toy), Session(toy), [1, 258])


def test_sessions_that_cannot_be_compared_are_refused(toy: Model) -> None:
    begun = Session(toy)
    begun.forward([1, 2, 3], None)
    refused_before_anything_is_read(UsageError, "found 0 and 3 tokens in them", Session(toy), begun, [1, 2])
    refused_before_anything_is_read(UsageError, "found 3 and 0 tokens in them", begun, Session(toy), [1, 2])
    same = Session(toy)
    refused_before_anything_is_read(UsageError, "one and the same", same, same, [1, 2])
    small = Told(toy, np.zeros((2, 9), np.float32), 9)
    refused_before_anything_is_read(UsageError, "found 258 and 9", Session(toy), small, [1, 2])


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True, None], ids=repr)
def test_a_chunk_out_of_range_is_refused(toy: Model, chunk: Any) -> None:
    words = f"^chunk must be a whole number, 1 or more, found {chunk}$"
    refused_before_anything_is_read(UsageError, words, Session(toy), Session(toy), [1, 2], chunk=chunk)


@pytest.mark.model
def test_fewer_bits_cost_the_default_model_more(default_model: Model) -> None:
    """On 300 tokens of the license."""
    ids = default_model.encode((Path(mixkv.__file__).parent / "LICENSE").read_text(encoding="utf-8"))[:300]
    found = {
        bits: evaluate(
            Session(default_model, CachePolicy.full()),
            Session(default_model, CachePolicy(window=32, k_bits=bits, v_bits=bits)),
            ids,
        )
        for bits in (2, 4, 16)
    }
    assert 0 < 100 * found[16].kld.mean < 3 * found[4].kld.mean < found[2].kld.mean
    assert found[4].top1 > 0.9 and found[16].top1 > 0.99
    assert 10 < found[16].ppl_reference < 30


@pytest.mark.parametrize("first", [0, 1, 37, 64, 100, 148])
def test_what_is_predicted_before_a_position_is_read_but_not_compared(first: int) -> None:
    """The numbers are those of the tokens behind it alone, and both sessions hold the whole text."""
    model, ids = mixkv.load("toy", weights="q8"), np.random.default_rng(5).integers(0, 256, 150)
    policy = CachePolicy(window=20, tile=32, k_bits=2, v_bits=2)
    sessions = Session(model, CachePolicy.full()), Session(model, policy)
    found = evaluate(*sessions, ids, first=first, chunk=50)
    expected, coded = (Session(model, p).forward(ids, "all") for p in (CachePolicy.full(), policy))
    assert expected is not None and coded is not None
    want = compare(expected[first:-1], coded[first:-1], ids[first + 1 :])
    assert (found.tokens, found.predicted_tokens) == (150, 149 - first)
    assert found.kld.mean == pytest.approx(want.kld.mean(), rel=1e-3, abs=1e-9)
    assert found.ppl == pytest.approx(np.exp(want.nll.mean()), rel=1e-5)
    assert [session.position for session in sessions] == [150, 150]


@pytest.mark.parametrize("first", [-1, 149, 10**9, 1.0, True])
def test_a_first_position_out_of_range_is_refused_before_anything_is_read(first: object) -> None:
    model = mixkv.load("toy")
    sessions = Session(model), Session(model)
    with pytest.raises(UsageError, match="first must be from 0 to 148"):
        evaluate(*sessions, np.zeros(150, np.int64), first=first)  # type: ignore[arg-type]
    assert [session.position for session in sessions] == [0, 0]
