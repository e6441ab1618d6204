"""What a row of results is known by: digests of token ids, and of everything that its numbers depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 16


def key(matters: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a dictionary in canonical JSON."""
    text = json.dumps(matters, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def ids_digest(token_ids: Sequence[int] | NDArray[np.integer]) -> str:
    """The same of token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(token_ids, "<i8").tobytes()).hexdigest()[:DIGITS]
