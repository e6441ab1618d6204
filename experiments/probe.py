"""Whether a cache ruins a model: a short text read with it, beside a cache of float32, once for each model and policy.

Keys with few bits do that to some models: where they have biases, as those of Qwen 2, a few channels are so large that few
bits have no steps left for the others.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..engine.policy import CachePolicy
from ..engine.session import Session
from ..models.config import ModelConfig
from ..models.errors import UsageError
from ..models.fingerprint import fingerprint
from ..models.hub.files import cache_folder, locked, write_whole
from ..models.limits import MAX_JSON_BYTES
from ..models.load import Model
from .evaluate import evaluate_each
from .texts import default_text

RUINOUS = 0.2  # nats of mean KL from a float32 cache, behind the window: perplexity grows by about a fifth
COMPARED = 256  # tokens behind the window that are compared
LONGEST_WINDOW = 2048  # with a longer one nothing is measured: it would take longer than it is worth
_VERSION = 1  # of the file; another one is begun anew


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found: the policy's mean KL in nats, and a policy that is not ruinous, with its own, if there is."""

    kld: float
    better: str | None
    better_kld: float | None

    @property
    def ruinous(self) -> bool:
        """Whether the cache costs so much that the model is hardly itself."""
        return not self.kld < RUINOUS

    def sentence(self, policy: CachePolicy) -> str:
        """It in words, for a ruinous one."""
        found = f"{self.kld:.2g} nats (mean KL, {COMPARED} tokens) from one of float32"
        found = f"this cache, '{policy}', ruins this model: {found}"
        if self.better is None:
            return f"{found}; no cache of codes does better than {RUINOUS}: use --policy f16"
        return f"{found}; with --policy '{self.better}' it is {self.better_kld:.2g}"


def doubtful(config: ModelConfig, policy: CachePolicy) -> bool:
    """Whether a policy is worth a probe: keys of under 4 bits, or of under 8 where keys have biases and no norm behind."""
    biased = config.attention_bias and config.qk_norm == "none"
    layers = [policy.for_layer(i, config.num_hidden_layers) for i in range(config.num_hidden_layers)]
    fewest = min(tier.k_bits for layer in layers for tier in layer.tiers)
    return fewest < (8 if biased else 4) and policy.window <= LONGEST_WINDOW


def probe(model: Model, policy: CachePolicy, progress: Callable[[int, int], None] | None = None) -> Verdict | None:
    """Read the default text with a cache, and with others of more bits if it is ruinous.

    What was found is kept in the cache folder and looked up the next time.

    Args:
        model: with a tokenizer; without one there is no text, and no verdict.
        policy: of the cache.
        progress: called with (tokens read, tokens in all).

    Returns None where nothing can be measured: a context too short, or no tokenizer.
    """
    if model.tokenizer is None:
        return None
    tokens = policy.window + policy.sinks + policy.tile + COMPARED
    bos = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = [*bos, *(i for i in model.encode(default_text()[: 16 * tokens]) if i not in bos)][:tokens]
    if not COMPARED + policy.window < len(ids) <= model.config.max_position_embeddings:
        return None
    key = f"{fingerprint(model.config, model.transformer.weights)} {policy.digest}"
    known = _known()
    if key not in known:
        verdict = _measured(model, policy, ids, progress)
        _keep(key, verdict)
        return verdict
    return Verdict(**known[key])


def _measured(
    model: Model, policy: CachePolicy, ids: Sequence[int], progress: Callable[[int, int], None] | None
) -> Verdict:
    first = len(ids) - COMPARED - 1
    kld = _divergences(model, [policy], ids, first, progress)[0]
    if kld < RUINOUS:
        return Verdict(kld, None, None)
    others = _with_more_bits(model.config, policy)
    found = zip(others, _divergences(model, others, ids, first, progress), strict=True) if others else ()
    better = next(((str(other), other_kld) for other, other_kld in found if other_kld < RUINOUS), (None, None))
    return Verdict(kld, *better)


def _divergences(
    model: Model, policies: Sequence[CachePolicy], ids: Sequence[int], first: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:  # fmt: skip
    sessions = [Session(model, policy) for policy in policies]
    found = evaluate_each(Session(model, CachePolicy.full()), sessions, ids, first=first, progress=progress)
    return [each.kld.mean for each in found]


def _with_more_bits(config: ModelConfig, policy: CachePolicy) -> list[CachePolicy]:
    """Policies of one tier with more bits for keys, then for values too, from the cheapest on."""
    found: list[CachePolicy] = []
    for k_bits, v_bits in ((4, policy.v_bits), (8, policy.v_bits), (8, 4), (8, 8)):
        if k_bits < policy.k_bits or v_bits < policy.v_bits:
            continue
        try:
            other = replace(policy, k_bits=k_bits, v_bits=v_bits, older=(), overrides=())
            other.check_model(config.num_hidden_layers, config.head_dim)
        except UsageError:
            continue
        if other != policy and other not in found:
            found.append(other)
    return found


# --- what is known already -------------------------------------------------------------------------------------------


def _known() -> dict[str, dict[str, Any]]:
    """What earlier probes found; nothing where the file is missing, or not one of ours."""
    path = cache_folder().parent / "probes.json"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return {}
        found = json.loads(path.read_text("utf-8"))
        names = {"kld", "better", "better_kld"}
        kept = found["verdicts"] if found["version"] == _VERSION else {}
        return {key: value for key, value in kept.items() if value.keys() == names and _is_verdict(**value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_verdict(kld: object, better: object, better_kld: object) -> bool:
    proposes = isinstance(better, str) and isinstance(better_kld, float)
    return isinstance(kld, float) and (proposes or better is better_kld is None)


def _keep(key: str, verdict: Verdict) -> None:
    """Add one to the file; where that cannot be written, the next run measures again."""
    folder = cache_folder().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "probes", "probes"):
            everything = {"version": _VERSION, "verdicts": {**_known(), key: asdict(verdict)}}
            write_whole(folder / "probes.json", json.dumps(everything).encode())
    except (OSError, UsageError):
        pass
