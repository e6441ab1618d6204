"""Attention in float64 NumPy, the plain way: all logits at once, one softmax. The yardstick of every kernel.

It shares no idea with the kernels on purpose - no tiles, no running maximum, no merge - and it is slow.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def reference_attention(
    q: NDArray[np.generic],
    k: NDArray[np.generic],
    v: NDArray[np.generic],
    *,
    scale: float | None = None,
    start: NDArray[np.int64] | None = None,
    stop: NDArray[np.int64] | None = None,
    mask: NDArray[np.generic] | None = None,
    softcap: float = 0.0,
    slopes: NDArray[np.generic] | None = None,
    positions: NDArray[np.int64] | None = None,
    sink_logits: NDArray[np.generic] | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Attention of q (T, H, D) over k, v (N, Hkv, D): (o (T, H, D), M (H, T), S (H, T)), all float64.

    The arguments mean what they mean in ``flash_attention``; ``slopes`` are ALiBi's, one a head, ``positions`` the
    queries' (keys stand at 0 .. N). A row that sees nothing has o = 0, M = -inf, S = 0.
    """
    t, h, d = q.shape
    n, kv_heads, _ = k.shape
    keys, values = (np.repeat(np.asarray(x, np.float64), h // kv_heads, axis=1) for x in (k, v))
    logits = np.einsum("thd,nhd->htn", np.asarray(q, np.float64), keys) * (d**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    if slopes is not None and positions is not None:
        logits = logits + np.asarray(slopes, np.float64)[:, None, None] * (np.arange(n) - positions[:, None])
    if mask is not None:
        logits = logits + mask
    index = np.arange(n)
    seen = (index >= (0 if start is None else start[:, None])) & (index < (n if stop is None else stop[:, None]))
    logits = np.where(seen, logits, -np.inf)
    if sink_logits is not None:
        column = np.broadcast_to(np.asarray(sink_logits, np.float64)[:, None, None], (h, t, 1))
        logits = np.concatenate([logits, column], axis=2)
        values = np.concatenate([values, np.zeros((1, h, d))])
    M = logits.max(axis=2, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isneginf(M), 0, M)[..., None])
    S = weights.sum(axis=2)
    finite = np.isfinite(values).all(axis=(1, 2))
    total = np.einsum("htn,nhd->thd", weights[..., finite], values[finite])
    for i in np.flatnonzero(~finite):  # what has no weight does not take part, not even as 0 * infinity
        weight = weights[..., i].T[..., None]
        total = total + np.where(weight == 0, 0, weight * np.where(weight == 0, 0, values[i]))
    return total / np.where(S == 0, 1, S).T[..., None], M, S
