"""How far an engine's predictions are from the reference's: logits in files, compared a few rows at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 128  # tokens at once: 25 MB of logits in float32 at a vocabulary of 49,152


def parts(ids: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(position of the first, ids) of every ROWS tokens."""
    for first in range(0, len(ids), ROWS):
        yield first, ids[first : first + ROWS]


def store(folder: str, ids: list[int], logits_of: Callable[[list[int]], Any]) -> None:
    """Write the logits (rows, V) float32 that ``logits_of`` gives for each part, the parts in order."""
    for first, part in parts(ids):
        np.save(Path(folder) / f"{first}.npy", np.asarray(logits_of(part), np.float32))


def log_softmax(logits: Any) -> Any:
    """Natural logarithms of the probabilities, (rows, V) float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(folder: str, ids: list[int], logits_of: Callable[[list[int]], Any]) -> dict[str, Any]:
    """KL divergence from the stored reference, sum of p_ref (log p_ref - log p), in nats; perplexities of ``ids``."""
    divergences, same = [], 0
    surprise, reference_surprise = 0.0, 0.0
    for first, part in parts(ids):
        reference = log_softmax(np.load(Path(folder) / f"{first}.npy"))
        found = log_softmax(logits_of(part))
        divergences.append((np.exp(reference) * (reference - found)).sum(axis=1))
        same += int((reference.argmax(axis=1) == found.argmax(axis=1)).sum())
        following = np.array(ids[first + 1 : first + 1 + len(part)], np.int64)  # the last token of all has none
        rows = np.arange(len(following))
        surprise -= float(found[rows, following].sum())
        reference_surprise -= float(reference[rows, following].sum())
    kl = np.concatenate(divergences)
    predicted = max(len(ids) - 1, 1)
    return {
        "mean": float(kl.mean()),
        "median": float(np.median(kl)),
        "p99": float(np.quantile(kl, 0.99)),
        "max": float(kl.max()),
        "same_top": same / len(ids),
        "perplexity": float(np.exp(surprise / predicted)),
        "reference_perplexity": float(np.exp(reference_surprise / predicted)),
    }
