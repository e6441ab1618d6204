"""``evaluate`` beside numbers found elsewhere: from dumped logits, by arithmetic of its own; and by transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import mixkv
from mixkv import CachePolicy, Session
from mixkv.experiments.evaluate import CHUNK, REGIMES, evaluate, evaluate_each, is_packed
from mixkv.models.load import Model

DATA = Path(__file__).parents[1] / "data"
POLICIES = [
    CachePolicy.parse("f16"),
    CachePolicy(window=32, k_bits=4, v_bits=4, tile=32),
    CachePolicy(window=0, sinks=0, k_bits=2, v_bits=2, tile=32),
]


def dump(session: Session, ids: list[int], folder: Path) -> None:
    """Write the logits behind all ids but the last, read in the chunks in which they are compared."""
    folder.mkdir()
    for start in range(0, len(ids) - 1, CHUNK):
        np.save(folder / f"{start:06}.npy", session.forward(ids[start : min(start + CHUNK, len(ids) - 1)]))


def from_files(reference: Path, candidate: Path, ids: list[int]) -> dict[str, float]:
    """Mean KL, perplexities and top-1 from logits (rows, V) float32 in .npy files: Python's floats, summed exactly."""
    klds, surprises, same = [], {reference: [], candidate: []}, 0
    position = 0
    for name in sorted(path.name for path in reference.iterdir()):
        for rows in zip(np.load(reference / name).tolist(), np.load(candidate / name).tolist(), strict=True):
            position += 1
            logs = []
            for folder, row in zip((reference, candidate), rows, strict=True):
                total = math.log(math.fsum(math.exp(x) for x in row))
                logs.append([x - total for x in row])
                surprises[folder].append(total - row[ids[position]])
            klds.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(*logs, strict=True)))
            same += rows[0].index(max(rows[0])) == rows[1].index(max(rows[1]))
    assert position == len(ids) - 1
    means = {folder: math.fsum(each) / len(each) for folder, each in surprises.items()}
    return {
        "kld": math.fsum(klds) / len(klds),
        "kld_max": max(klds),
        "ppl": math.exp(means[candidate]),
        "ppl_reference": math.exp(means[reference]),
        "top1": same / len(klds),
    }


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_divergence_perplexity_and_top1_are_those_of_dumped_logits(policy: CachePolicy, tmp_path: Path) -> None:
    """To 1e-6 of their values (1e-14 where KL itself is hardly more), over 500 tokens of a small Llama."""
    model = mixkv.load(str(DATA / "tiny_llama"))
    ids = np.random.default_rng(0).integers(0, 97, 500).tolist()
    for name, each in (("reference", CachePolicy.full()), ("candidate", policy)):
        dump(Session(model, each), ids, tmp_path / name)
    expected = from_files(tmp_path / "reference", tmp_path / "candidate", ids)
    found = evaluate(Session(model, CachePolicy.full()), Session(model, policy), ids)
    numbers = {"kld": found.kld.mean, "kld_max": found.kld.max, "ppl": found.ppl, "ppl_reference": found.ppl_reference}
    assert numbers | {"top1": found.top1} == pytest.approx(expected, rel=1e-6, abs=1e-14)
    assert expected["kld"] > 1e-9 and expected["ppl"] != expected["ppl_reference"], "this proves little"


# --- the default model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict:
    """1,000 ids and their perplexity; tests/data/make_smollm2_reference.py made it."""
    return json.loads((DATA / "smollm2_reference.json").read_text(encoding="utf-8"))["perplexity"]


@pytest.mark.model
def test_the_references_perplexity_is_that_of_transformers_to_four_digits(default_model: Model, recorded: dict) -> None:
    """Weights in float32."""
    found = evaluate(Session(default_model, CachePolicy.full()), Session(default_model), recorded["ids"])
    assert f"{found.ppl_reference:.4g}" == f"{recorded['perplexity']:.4g}" == "12.73"
    assert math.log(found.ppl_reference) == pytest.approx(recorded["mean_nll"], abs=5e-5)
    assert found.ppl != found.ppl_reference and found.ppl == pytest.approx(found.ppl_reference, rel=0.01)
    assert found.predicted_tokens == 999


@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
def test_the_default_models_own_weights_give_the_same_bits_in_both_regimes(
    default_model_path: Path, recorded: dict
) -> None:
    model = mixkv.load(str(default_model_path), "auto")
    assert is_packed(model)
    digests = []
    for regime in REGIMES:
        sessions = Session(model, CachePolicy.full()), Session(model)
        (found,) = evaluate_each(sessions[0], sessions[1:], recorded["ids"][:300], regime=regime, digest=True)  # type: ignore[arg-type]
        digests.append(found.digests)
    assert digests[0] == digests[1] and len({*digests[0]}) == 2
