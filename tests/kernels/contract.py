"""What attention over codes promises, and a check of one call against it."""

from typing import Any

import numpy as np

from mixkv.kernels import Segment, empty_state, flash_attention

from .oracle import alibi_slopes, expected, make_store, normal, read_store

# What is promised of o: the largest error, relative to the largest |o| of the call, and what is added to it for every
# unit of the largest |scale * q . k| of any key that a query sees. S (relative to itself) is held to the same. M (absolute)
# is a single logit, whose rounding nothing averages out, and which may be small where q and k are not: its unit is
# |scale| |q| |k|, the largest logit that vectors of their lengths can have. For standard-normal data test_flash.py holds M
# to 5e-4.
BOUNDS = {
    "default": {"o": (5e-4, 2.0**-14), "S": (5e-4, 2.0**-14), "M": (5e-4, 2.0**-14)},
    "f32": {"o": (1e-5, 2.0**-22), "S": (1e-5, 2.0**-22), "M": (1e-5, 2.0**-22)},
}
# In either precision, logits are float32 once bias and mask have been added, and so as coarse as they are large.
ROUNDING = 2.0**-22


def coded_segment(
    rng: np.random.Generator, n: int, heads: int, d: int, kinds: tuple[str, str], tile: int, first: int = 0
) -> tuple[Segment, np.ndarray, np.ndarray]:
    """Random keys and values in tiles: the positions first .. n as a segment, and what is stored (float64) from 0 on."""
    full = -(-max(n, 1) // tile) * tile
    k, v = normal(rng, full, heads, d), normal(rng, full, heads, d)
    store = make_store(k, v, kinds, tile)
    k, v = read_store(store, kinds)
    store.forget_before(first // tile)
    return store.segment(first, n), k[:n], v[:n]


def ranges(t: int, n: int, options: dict[str, Any], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 of the keys that every query sees, by the words of the documentation."""
    where = np.broadcast_to(options.get("positions", np.arange(n - t, n)), (t,)) - options.get("k_position", 0)
    low = np.maximum(np.broadcast_to(options.get("start", first), (t,)), first)
    high = np.minimum(np.broadcast_to(options.get("stop", n), (t,)), n)
    if options.get("causal"):
        high = np.minimum(high, where + 1)
    if options.get("sliding_window"):
        low = np.maximum(low, where - options["sliding_window"] + 1)
    return low, np.maximum(high, low)


def sizes_of_logits(
    q: np.ndarray, k: np.ndarray, low: np.ndarray, high: np.ndarray, options: dict
) -> tuple[float, float, float]:
    """The largest |scale * q . k| of a key that is seen, finite |logit| with bias and mask, and |scale| |q| |k|."""
    t, h, d = q.shape
    n = len(k)
    keys = np.repeat(k, h // k.shape[1], axis=1)
    product = np.einsum("thd,nhd->htn", q.astype(np.float64), keys) * options.get("scale", d**-0.5)
    seen = np.broadcast_to((np.arange(n) >= low[:, None]) & (np.arange(n) < high[:, None]), (h, t, n))
    logits = product
    if options.get("softcap"):
        logits = options["softcap"] * np.tanh(logits / options["softcap"])
    if options.get("max_bias"):
        where = np.broadcast_to(options.get("positions", np.arange(n - t, n)), (t,)) - options.get("k_position", 0)
        logits = logits + np.array(alibi_slopes(h))[:, None, None] * (np.arange(n) - where[:, None])
    logits = logits + options.get("mask", 0)
    lengths = np.linalg.norm(q.astype(np.float64), axis=2).T[..., None] * np.linalg.norm(keys, axis=2).T[:, None]
    lengths = lengths * abs(options.get("scale", d**-0.5))
    finite = np.abs(logits[seen & np.isfinite(logits)])
    return np.abs(product[seen]).max(initial=0), finite.max(initial=0), lengths[seen].max(initial=0)


def allowed(
    precision: str, product: float, logit: float, lengths: float, *, many_keys: bool = False
) -> dict[str, float]:
    """The largest errors, given the ``sizes_of_logits``.

    Among many keys some are nearly parallel to the query, and the largest logit tells how large q and k are. A few keys may
    all be nearly at right angles to it: then a quarter of the largest logit that their lengths allow takes its place.
    """
    largest = product if many_keys else max(product, lengths / 4)
    of_unit = {"o": largest, "S": largest, "M": lengths}
    units = BOUNDS[precision]
    return {name: constant + a_unit * of_unit[name] + ROUNDING * logit for name, (constant, a_unit) in units.items()}


def assert_within(
    found: tuple[np.ndarray, np.ndarray],
    want: tuple[np.ndarray, ...],
    bound: dict[str, float],
    what: str,
    values: float = 0.0,
) -> None:
    """(out, state) against (o, M, S): outputs relative to the largest of the call, M as it is, S relative to itself.

    Where all outputs happen to be tiny sums of larger values, they are held against 1/64 of the largest of ``values``: that
    allows 2^-23 and 2^-17 of a value, about what float32 and weights of 16 bits round by.
    """
    (out, state), (o, M, S) = found, want
    assert out.dtype == state.dtype == np.float32
    top = max(np.abs(o).max(initial=0), values / 64)
    np.testing.assert_array_equal(np.isneginf(state[..., 0]), np.isneginf(M), err_msg=what)
    np.testing.assert_array_equal(state[..., 1] == 0, S == 0, err_msg=what)
    any_keys = S > 0
    errors = {
        "o": np.abs(out - o).max(initial=0) / (top or 1.0),
        "M": np.abs(state[..., 0] - M, where=any_keys, out=np.zeros(M.shape)).max(initial=0),
        "S": (np.abs(state[..., 1] - S)[any_keys] / S[any_keys]).max(initial=0),
    }
    for name, error in errors.items():
        assert error <= bound[name], f"{what}: {name} is {error:.3g} away, {bound[name]:.3g} is allowed"


def check(
    q: np.ndarray, segment: Segment, stored: tuple[np.ndarray, np.ndarray], options: dict[str, Any], name: str = "",
    *, many_keys: bool = False,
) -> None:  # fmt: skip
    """Both precisions, at once and continued from the state of a part of the keys."""
    t, h, _ = q.shape
    n, first = segment.stop, segment.start
    low, high = ranges(t, n, options, first)
    plain = {x: y for x, y in options.items() if x not in ("start", "stop", "causal", "sliding_window")}
    where = options.get("positions", np.arange(n - t, n))
    want = expected(q, *stored, start=low, stop=high, **{**plain, "positions": where})
    sizes = sizes_of_logits(q, stored[0], low, high, options)
    values = 0.0 if many_keys else float(np.abs(stored[1]).max(initial=0))
    middle = (low + high) // 2
    for precision in BOUNDS:
        bound = allowed(precision, *sizes, many_keys=many_keys)
        out, state = np.full_like(q, np.nan), empty_state(h, t)
        flash_attention(q, segment, state=state, out=out, precision=precision, **options)
        assert_within((out, state), want, bound, f"{precision} {name}", values)
        out, state = np.full_like(q, np.nan), empty_state(h, t)
        flash_attention(
            q, segment, state=state, out=out, precision=precision, **{**plain, "start": low, "stop": middle}
        )  # fmt: skip
        again = {x: y for x, y in plain.items() if x != "sink_logits"}
        flash_attention(
            q, segment, state=state, out=out, precision=precision, **{**again, "start": middle, "stop": high}
        )  # fmt: skip
        assert_within((out, state), want, bound, f"{precision} continued {name}", values)
