"""A pytest plugin for suites that test models and caches end to end; pytest finds it where mixkv is installed.

    mixkv_toy, mixkv_tiny_model, mixkv_default_model      fixtures: models
    assert_same_decode, assert_kl_below, assert_chunk_invariant      what a test can ask of them
    tiny_model      as the fixture of that name, for code that is no test

docs/testing.md has examples. Importing this imports pytest, and nothing of mixkv that is heavy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

try:
    import pytest
except ImportError as error:
    raise ImportError("mixkv.testing is a plugin of pytest, which is not installed: pip install pytest") from error

if TYPE_CHECKING:
    from .engine.policy import CachePolicy
    from .engine.session import Session
    from .models.load import Model

    Policy = CachePolicy | str
    Side = Model | tuple[Model, Policy] | Callable[[], Session] | str | Path

__all__ = [
    "assert_chunk_invariant", "assert_kl_below", "assert_same_decode", "mixkv_default_model", "mixkv_tiny_model",
    "mixkv_toy", "tiny_model",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest of our option."""
    parser.addini("mixkv_fetch", "fetch mixkv's default model where it is not there yet (93 MB)", "bool", default=True)


def tiny_model(architecture: str = "llama", seed: int = 0, *, weights: str = "q8", **config: Any) -> "Model":
    """A tiny random model of an architecture; see models/tiny.py for the arguments and errors."""
    from .models.tiny import tiny_model

    return tiny_model(architecture, seed, weights=weights, **config)


# --- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mixkv_toy() -> "Model":
    """The built-in model ``toy``, its weights in 8 bits, so that bits depend neither on threads nor on chunks."""
    from .models.load import load

    return load("toy", "q8")


@pytest.fixture(scope="session")
def mixkv_tiny_model() -> "Callable[..., Model]":
    """``tiny_model``, which makes each model once a test run."""
    made: dict[str, Model] = {}

    def model(architecture: str = "llama", seed: int = 0, *, weights: str = "q8", **config: Any) -> "Model":
        key = repr((architecture, seed, weights, sorted(config.items())))
        if key not in made:
            made[key] = tiny_model(architecture, seed, weights=weights, **config)
        return made[key]

    return model


@pytest.fixture(scope="session")
def mixkv_default_model(pytestconfig: pytest.Config) -> "Model":
    """The default model, smollm2, loaded once a test run; tests are skipped where it is not there and cannot be had."""
    from .models.errors import DownloadError
    from .models.hub import cached_file
    from .models.load import load

    if cached_file("smollm2") is None and not pytestconfig.getini("mixkv_fetch"):
        pytest.skip("mixkv's default model is not there: run `mixkv pull smollm2` (mixkv_fetch is false)")
    try:
        return load("smollm2")
    except DownloadError as error:
        pytest.skip(f"mixkv's default model cannot be fetched: {error}")


# --- assertions -----------------------------------------------------------------------------------------------------


def assert_same_decode(
    a: "Side",
    b: "Side",
    *,
    prompts: "Sequence[str | Sequence[int]] | None" = None,
    max_tokens: int | None = None,
    tolerance: float = 0.0,
    tie: float = 0.0,
) -> None:
    """Assert that two sides decode the same, greedily: ``a`` decodes, and ``b`` reads what it said, token by token.

    Args:
        a, b: a model; a model and its policy; a function that makes sessions; or the path of a golden file. Of such a file
            come the prompts, and the policy of a model alone, whose policy is the default one otherwise.
        prompts: texts, or lists of ids; five of our own unless given.
        max_tokens: behind each prompt; 32 unless given.
        tolerance: nats by which log-probabilities of the tokens of ``a`` may differ; at 0 they are the same float64.
        tie: nats by which another token may be likelier for ``b``.

    Raises:
        AssertionError: they do not; the message is what ``mixkv golden check`` prints.
        UsageError: sides, prompts or numbers that are none.

    """
    __tracebackhide__ = True
    from .experiments.golden.assertions import same_decode
    from .experiments.golden.compare import Tolerances

    difference = same_decode(a, b, prompts, max_tokens, Tolerances(tolerance, tie))
    if difference is not None:
        raise AssertionError(difference)


def assert_kl_below(
    model: "Model",
    policy: "Policy",
    limit: float,
    text: "str | Sequence[int] | None" = None,
    *,
    reference: "Model | tuple[Model, Policy] | None" = None,
    statistic: Literal["mean", "p99", "p999", "max"] = "mean",
    tokens: int = 512,
) -> None:
    """Assert that KL(reference || model with this policy) on a text is below a limit.

    Args:
        model, policy: what is measured; the policy may be a text.
        limit: nats.
        text: a text, or ids, of which the first ``tokens`` are read; that of pydoc_data.topics unless given.
        reference: a model with a cache of float32, or with a policy of its own; ``model`` itself unless given.
        statistic: of the divergences of all predicted tokens: "mean", a quantile, or "max".
        tokens: most tokens that are read.

    Raises:
        AssertionError: it is not.
        UsageError, PromptError, NumericalError: as ``mixkv.experiments.evaluate.evaluate``.

    """
    __tracebackhide__ = True
    from .experiments.golden.assertions import measured_kl

    found, about = measured_kl(model, policy, text, reference, statistic, tokens, limit)
    if not found < limit:
        raise AssertionError(f"KL {statistic} is {found:.6g} nats, not below {limit:g}\n{about}")


def assert_chunk_invariant(
    model: "Model",
    policy: "Policy",
    ids: "str | Sequence[int]",
    cuts: "Sequence[int]",
    *,
    tolerance: float = 0.0,
) -> None:
    """Assert that the logits of a prompt do not depend on how it was cut: at once, at ``cuts``, token by token.

    Args:
        model, policy: whose; the policy may be a text. Weights in float32 need a tolerance.
        ids: the prompt, ids or a text.
        cuts: positions at which pieces begin, ascending, from 1 on.
        tolerance: largest difference of a logit; at 0 the bits are the same.

    Raises:
        AssertionError: they do; it says from which position on, and by how much.
        UsageError, PromptError: arguments that are none.

    """
    __tracebackhide__ = True
    from .experiments.golden.assertions import as_policy
    from .experiments.golden.invariance import cut_difference

    read = model.encode(ids) if isinstance(ids, str) else ids
    difference = cut_difference(model, as_policy(policy), read, cuts, tolerance=tolerance)
    if difference is not None:
        raise AssertionError(f"{difference} (policy {as_policy(policy)})")
