"""``flash_attention``: the public door of the kernel. It validates everything before the first write, then calls it."""

import functools
import math
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import simd
from .attention import KERNELS, attend_segments
from .crew import ALL_WORKERS
from .forks import check_usable
from .jit import kernel
from .layout import LIMBS, PARTS
from .segment import Int64, Segment, segment_of_arrays
from .sight import parts_of, splits_in
from .simd import LANES
from .state import Float32, check_out, check_state, merge_partials, pad_last_axis
from .tables import (
    CALL_NUMBERS,
    DISTANCES,
    EXACT,
    FRESH,
    K_SIDE,
    MASK_HEAD,
    MASK_QUERY,
    MASKS,
    MAX_N_REP,
    MOST_PARTS,
    N_HEADS,
    N_KV_HEADS,
    N_PARTS,
    N_QUERIES,
    N_SEGMENTS,
    OPTIONS,
    Q_STRIDE,
    RANGES,
    ROW_WIDTH,
    SCALE,
    SEGMENTS,
    SLOPES,
    SOFTCAP,
    V_SIDE,
)
from .threads import most_threads

PRECISIONS = ("default", "f32")
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_FARTHEST = 2**62  # positions beyond would wrap when one is subtracted from another


def flash_attention(
    q: Float32,
    k: NDArray[np.generic] | Segment,
    v: NDArray[np.generic] | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    sliding_window: int | None = None,
    start: ArrayLike | None = None,
    stop: ArrayLike | None = None,
    mask: Float32 | None = None,
    softcap: float = 0.0,
    max_bias: float = 0.0,
    sink_logits: Float32 | None = None,
    precision: str = "default",
    state: Float32 | None = None,
    out: Float32 | None = None,
    positions: ArrayLike | None = None,
    k_position: int = 0,
) -> Float32:
    """Attention of q over one segment of keys; with a state, continued from what that state has already seen.

    The logit of a key is, in this order: scale * q.k; soft-cap ``softcap * tanh(l / softcap)``; ALiBi bias
    ``slope_h * (key position - query position)``; plus ``mask``.

    Args:
        q: float32 (T, H, D).
        k: float32, float16 or bfloat16 (N, Hkv, D) with Hkv dividing H, or one quantized segment (then ``v`` is None).
        v: like k.
        scale: softmax scale; 1 / sqrt(D) unless given.
        causal: a query sees no key after its own position.
        sliding_window: a query sees no key that is so many positions, or more, before its own; at least 1.
        start, stop: (T,) or scalars: each query sees the keys start <= index < stop, indices into k (for a segment of
            a cache: absolute positions). A range outside of the keys is an empty one.
        mask: float32 (T, N) or (H, T, N), added to the logit, unscaled; -inf hides a key. For a segment of tiles, N is its
            last position + 1. A key that is not a number is hidden by a range, not by a mask: NaN + -inf is NaN.
        softcap: 0 for none.
        max_bias: ALiBi's largest slope exponent (8 in the paper, https://arxiv.org/abs/2108.12409); 0 for none.
        sink_logits: float32 (H,): a logit a head that takes part in the sum but has no value. Counted in this call.
        precision: "f32" keeps everything float32. "default" multiplies codes as integers, with q and p rounded
            to 16 bits; dense keys are float32 in both (see kernels/routes.py).
        state: float32 (H, T, 2) with [..., 0] = M, [..., 1] = S, natural logarithm; read, and updated in place.
        out: float32 (T, H, D), the normalised output that belongs to the state; updated in place and returned.
            Required where any S > 0; rows with S = 0 are not read.
        positions: (T,) absolute positions of the queries; unless given, they are the last T positions of the keys.
        k_position: absolute position of key 0, for ``causal``, ``sliding_window`` and ``max_bias`` when
            keys are cut into segments.

    Returns:
        float32 (T, H, D). A query that sees no key (and no sink logit) gets 0.

    Raises:
        ValueError: anything that does not fit, said in full; nothing has been written then.
        RuntimeError: a process that was forked from one that had used the kernels (forks.py).

    """
    check_usable()
    if not isinstance(q, np.ndarray) or q.ndim != 3 or q.dtype != np.float32 or q.shape[2] == 0:
        found = f"{q.dtype} {q.shape}" if isinstance(q, np.ndarray) else type(q).__name__
        raise ValueError(f"q must be a float32 array (T, H, D), D at least 1, found {found}")
    if isinstance(k, Segment):
        if v is not None:
            raise ValueError("v must be None when k is a segment: the segment holds both")
        segment = k
    else:
        segment = segment_of_arrays(k, v)
    t, h, d = q.shape
    if d != segment.head_dim:
        raise ValueError(f"q and k must have the same head_dim, found {d} and {segment.head_dim}")
    if h == 0 or segment.n_kv_heads == 0 or h % segment.n_kv_heads:
        raise ValueError(f"the {h} query heads must be a multiple of the {segment.n_kv_heads} KV heads")
    _check_n_rep(h, segment.n_kv_heads)
    scale = d**-0.5 if scale is None else _number("scale", scale)
    softcap, max_bias = _number("softcap", softcap, low=0), _number("max_bias", max_bias, low=0)
    if 0 < softcap < _SMALLEST:
        raise ValueError(f"softcap must be 0 or a normal float32 number, {_SMALLEST:g} or more, found {softcap}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, found {precision!r}")
    if out is not None:
        check_out("out", out, (t, h, d), writable=True)
    if state is not None:
        check_state("state", state, h, t, writable=True)
        if out is None and (state[..., 1] > 0).any():
            raise ValueError("the state has rows with S > 0: pass the out that belongs to it")
    k_position = _position("k_position", k_position)
    where = _positions(positions, t, k_position, segment)
    starts, stops = _ranges(start, stop, t, segment)
    if causal:
        stops = np.minimum(stops, where - k_position + 1)
    if sliding_window is not None:
        starts = np.maximum(starts, where - k_position + 1 - _window(sliding_window))
    tall_mask = _mask(mask, h, t, segment)
    sinks = _sink_logits(sink_logits, h)

    padded_q = pad_last_axis(q)
    if not (padded_q.flags.writeable and padded_q.flags.aligned):
        padded_q = padded_q.copy()  # cheaper than compiling for such a type, too
    overlap = out is not None and any(isinstance(x, np.ndarray) and np.may_share_memory(out, x) for x in (q, k, v))
    in_place = out is not None and padded_q.shape[2] == d and not overlap
    if state is None:
        running = np.empty((h, t, 2), np.float32)
        result = out if out is not None and in_place else np.empty(padded_q.shape, np.float32)
    else:
        running, result = state, out if out is not None and in_place else _prior(out, state, padded_q.shape)
        _clear_empty_rows(result, running)
    attend(
        padded_q, segment, starts, stops, result, running, scale=scale, softcap=softcap, slopes=_slopes(max_bias, h),
        distances=k_position - where if max_bias else None, mask=tall_mask, exact=precision == "f32", fresh=state is None,
    )  # fmt: skip
    if sinks is not None:
        _add_sink_logits(result, running, sinks)
    if out is None:
        return result if result.shape[2] == d else np.ascontiguousarray(result[..., :d])
    if not in_place:
        out[...] = result[..., :d]
    return out


def attend(
    q: Float32,
    segment: Segment,
    starts: Int64,
    stops: Int64,
    out: Float32,
    state: Float32,
    *,
    scale: float,
    softcap: float = 0.0,
    slopes: Float32 | None = None,
    distances: Int64 | None = None,
    mask: Float32 | None = None,
    exact: bool = False,
    fresh: bool = False,
) -> None:
    """Continue ``out`` and ``state`` over a segment. The checked inside of ``flash_attention``.

    All arrays in C order, unless said otherwise, and writable, as that is part of a type that Numba compiles for.

    Args:
        q: float32 (T, H, width), width a multiple of 16.
        starts, stops: int64 (T,), absolute positions within the segment.
        out: float32 (T, H, width); rows with S = 0 hold finite numbers.
        state: float32 (H, T, 2).
        slopes: float32 (H,); distances: int64 (T,), key position 0 minus query position (both for ALiBi).
        mask: float32 (H, T, N rounded up to 16), any strides but the last.
        fresh: out and state are begun, whatever they hold.

    """
    _check_n_rep(q.shape[1], segment.n_kv_heads)
    call = _describe(
        _kernels(), segment.table, segment.geometry, segment.n_kv_heads, starts, stops, q, scale, softcap, exact, fresh,
        most_threads(),
    )  # fmt: skip
    if slopes is not None:
        assert distances is not None
        call[SLOPES], call[DISTANCES] = slopes.ctypes.data, distances.ctypes.data
    if mask is not None:
        call[MASKS], call[MASK_HEAD], call[MASK_QUERY] = mask.ctypes.data, *mask.strides[:2]
    attend_segments(call, q, out, state, ALL_WORKERS)
    del starts, stops, slopes, distances, mask, segment  # whose addresses were in use until here


@kernel
def _describe(kernels, table, geometry, n_kv_heads, starts, stops, q, scale, softcap, exact, fresh, workers):  # type: ignore[no-untyped-def]
    """The call of ``attend_segments`` for one segment, its options behind it; in Python it took a tenth of a decode."""
    call = np.empty(CALL_NUMBERS + 2, np.int64)
    for i in range(CALL_NUMBERS):
        call[i] = kernels[i]
    options = np.int64(call.ctypes.data) + 8 * CALL_NUMBERS
    simd.store_scalar(options + 4 * SCALE, np.float32(scale))
    simd.store_scalar(options + 4 * SOFTCAP, np.float32(softcap))
    simd.store_scalar(options + 4 * EXACT, np.float32(exact))
    n_queries, n_heads, width = q.shape
    low, high = (starts[0], stops[0]) if n_queries else (0, 0)
    for i in range(1, n_queries):
        low, high = min(low, starts[i]), max(high, stops[i])
    most = max(geometry[K_SIDE + PARTS] * geometry[K_SIDE + LIMBS], geometry[V_SIDE + PARTS] * geometry[V_SIDE + LIMBS])
    call[N_HEADS], call[N_KV_HEADS], call[ROW_WIDTH], call[MOST_PARTS] = n_heads, n_kv_heads, width, most
    call[N_QUERIES], call[Q_STRIDE], call[OPTIONS], call[FRESH] = (
        n_queries,
        4 * n_heads * width,
        options,
        fresh,
    )
    call[N_SEGMENTS], call[SEGMENTS], call[SEGMENTS + 1] = 1, table.ctypes.data, geometry.ctypes.data
    call[RANGES], call[RANGES + 1] = starts.ctypes.data, stops.ctypes.data
    call[RANGES + 2], call[RANGES + 3] = low, high
    call[N_PARTS] = parts_of(n_queries, n_heads, n_kv_heads, splits_in(low, high), workers)
    return call


def empty_call(n_heads: int, n_kv_heads: int, width: int, most_parts: int) -> Int64:
    """What describes a call of ``attend_segments``, int64 (CALL_NUMBERS,): what does not change from call to call."""
    call = _kernels().copy()
    call[N_HEADS : MOST_PARTS + 1] = n_heads, n_kv_heads, width, most_parts
    return call


@functools.cache
def _kernels() -> Int64:
    """A call of nothing, with the addresses of the kernels."""
    call = np.zeros(CALL_NUMBERS, np.int64)
    for field, standalone in KERNELS.items():
        call[field] = standalone.address()
    return call


def _check_n_rep(n_heads: int, n_kv_heads: int) -> None:
    if n_heads // n_kv_heads > MAX_N_REP:
        raise ValueError(f"at most {MAX_N_REP} query heads may share a KV head, found {n_heads // n_kv_heads}")


def _number(name: str, value: object, low: float = -math.inf) -> float:
    """``value`` as a float that float32 can hold, ``low`` or more."""
    if not isinstance(value, Real) or not low <= float(value) <= _LARGEST or float(value) < -_LARGEST:
        at_least = "" if math.isinf(low) else f", {low:g} or more"
        raise ValueError(f"{name} must be a finite number (float32){at_least}, found {value}")
    return float(value)


def _window(size: object) -> int:
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or not 1 <= size <= _FARTHEST:
        raise ValueError(f"sliding_window must be a whole number from 1 to 2^62, or None, found {size!r}")
    return int(size)


def _position(name: str, value: ArrayLike) -> int:
    return value if type(value) is int and abs(value) <= _FARTHEST else int(_integers(name, value, 1)[0])


def _positions(positions: ArrayLike | None, t: int, k_position: int, segment: Segment) -> Int64:
    if positions is None:
        return np.arange(t, dtype=np.int64) + (k_position + segment.stop - t)
    return _integers("positions", positions, t)


def _integers(name: str, values: ArrayLike, t: int) -> Int64:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape not in ((), (t,)):
        raise ValueError(f"{name} must be integers of shape ({t},) or one integer, found {array.dtype} {array.shape}")
    if array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise ValueError(f"{name} must fit into int64, found {array.max()}")
    if "position" in name and ((array > _FARTHEST) | (array < -_FARTHEST)).any():
        raise ValueError(f"{name} must be from -2^62 to 2^62, found {array.flat[np.abs(array.astype(float)).argmax()]}")
    return np.ascontiguousarray(np.broadcast_to(array, (t,)), dtype=np.int64)


def _ranges(start: ArrayLike | None, stop: ArrayLike | None, t: int, segment: Segment) -> tuple[Int64, Int64]:
    low = np.full(t, segment.start) if start is None else np.maximum(_integers("start", start, t), segment.start)
    high = np.full(t, segment.stop) if stop is None else np.minimum(_integers("stop", stop, t), segment.stop)
    return low, high


def _mask(mask: object, h: int, t: int, segment: Segment) -> Float32 | None:
    if mask is None:
        return None
    n = segment.stop
    if not isinstance(mask, np.ndarray) or mask.dtype != np.float32 or mask.shape not in ((t, n), (h, t, n)):
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"mask must be float32 of shape (T, N) = {(t, n)} or (H, T, N) = {(h, t, n)}, found {found}")
    return np.broadcast_to(pad_last_axis(mask), (h, t, -(-n // LANES) * LANES))


def _slopes(max_bias: float, n_heads: int) -> Float32 | None:
    """ALiBi's slopes, float32 (H,), or None for no bias, as in https://arxiv.org/abs/2108.12409 and its reference code.

    A geometric series for the largest power of two of heads, then every second one of a finer series for the rest.
    """
    if max_bias == 0:
        return None
    power = 2 ** (n_heads.bit_length() - 1)
    head = np.arange(n_heads)
    exponent = np.where(head < power, (head + 1) / power, (2 * (head - power) + 1) / (2 * power))
    return (2.0 ** (-max_bias * exponent)).astype(np.float32)


def _sink_logits(sink_logits: object, h: int) -> Float32 | None:
    if sink_logits is None:
        return None
    if not isinstance(sink_logits, np.ndarray):
        raise ValueError(f"sink_logits must be float32 of shape (H,) = ({h},), found {type(sink_logits).__name__}")
    check_out("sink_logits", sink_logits, (h,))
    if (np.isnan(sink_logits) | np.isposinf(sink_logits)).any():
        raise ValueError("sink_logits must be numbers or -inf (no sink)")
    return sink_logits


def _prior(out: Float32 | None, state: Float32 | None, shape: tuple[int, ...]) -> Float32:
    """An output buffer of the padded shape: zeros, and the rows of ``out`` that the state says were computed."""
    result = np.zeros(shape, np.float32)
    if out is not None and state is not None:
        np.copyto(result[..., : out.shape[2]], out, where=(state[..., 1] > 0).T[..., None])
    return result


def _clear_empty_rows(out: Float32, state: Float32) -> None:
    """Rows without keys so far: their output is 0 and their M is -inf, whatever the buffers held."""
    np.copyto(out, 0, where=(state[..., 1] == 0).T[..., None])
    np.copyto(state[..., 0], -np.inf, where=state[..., 1] == 0)


def _add_sink_logits(out: Float32, state: Float32, sink_logits: Float32) -> None:
    """Merge the partial attention (O = 0, M = logit, S = 1) into every row."""
    t, h, width = out.shape
    sinks = np.empty((1, h, t, 2), np.float32)
    sinks[0, ..., 0] = sink_logits[:, None]
    sinks[0, ..., 1] = np.where(np.isneginf(sink_logits), 0, 1)[:, None]
    merge_partials(np.zeros((1, t, h, width), np.float32), sinks, out, state)
