"""Partial attention: the triple (O, M, S) and its merge. The algebra is in docs/design.md.

O is the normalised output, M the largest logit and S the sum of exp(logit - M), for each query and head, natural
logarithms throughout. The empty partial is O = 0, M = -inf, S = 0; it is the identity of the merge.
"""

import numpy as np
from numba import types
from numpy.typing import NDArray

from . import simd
from .jit import do_share, inner, standalone
from .scratch import begin_of, let_go, own_memory
from .simd import LANES
from .tiles import VECTOR

Float32 = NDArray[np.float32]


def empty_state(n_heads: int, q_len: int) -> Float32:
    """The state of attention over no keys: float32 (n_heads, q_len, 2), [..., 0] = M = -inf and [..., 1] = S = 0."""
    state = np.zeros((n_heads, q_len, 2), dtype=np.float32)
    state[..., 0] = -np.inf
    return state


def check_state(name: str, state: object, n_heads: int, q_len: int, *, writable: bool = False) -> None:
    """Refuse with ValueError what is not a C-ordered float32 array (n_heads, q_len, 2) of valid pairs (M, S)."""
    if not isinstance(state, np.ndarray):
        raise ValueError(f"{name} must be a NumPy array, found {type(state).__name__}")
    if state.dtype != np.float32:
        raise ValueError(f"{name} must be float32, found {state.dtype}")
    if state.shape != (n_heads, q_len, 2):
        raise ValueError(f"{name} must have shape (n_heads, q_len, 2) = {(n_heads, q_len, 2)}, found {state.shape}")
    if not state.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, found strides {state.strides}")
    if writable and not state.flags.writeable:
        raise ValueError(f"{name} must be writable, since it is updated in place; found a read-only array")
    sums = state[..., 1]
    if not (sums >= 0).all():
        raise ValueError(f"{name}[..., 1] holds sums of exponentials, S >= 0; found {sums[~(sums >= 0)].flat[0]}")
    if not np.isfinite(state[sums > 0]).all():
        bad = state[(sums > 0) & ~np.isfinite(state).all(axis=-1)][0]
        raise ValueError(f"{name} must hold finite M and S where S > 0; found M = {bad[0]}, S = {bad[1]}")


def check_out(name: str, out: object, shape: tuple[int, ...], *, writable: bool = False) -> None:
    """Refuse with ValueError what is not a C-ordered float32 array of this shape."""
    if not isinstance(out, np.ndarray):
        raise ValueError(f"{name} must be a NumPy array, found {type(out).__name__}")
    if out.dtype != np.float32 or out.shape != shape:
        raise ValueError(f"{name} must be float32 of shape {shape}, found {out.dtype} of shape {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, found strides {out.strides}")
    if writable and not out.flags.writeable:
        raise ValueError(f"{name} must be writable, since it receives the output; found a read-only array")


@inner
def clear(row, width):  # type: ignore[no-untyped-def]
    """``width`` zeros at an address, a multiple of 16."""
    for c in range(0, 4 * width, 4 * LANES):
        simd.store_f32(row + c, simd.splat(np.float32(0)))


@inner
def merge_rows(outs, M, S, others, other_M, other_S, rows, size, scratch):  # type: ignore[no-untyped-def]
    """Merge partial attentions into others, row by row. All arguments are numbers, or addresses of arrays.

    outs, others: int64, the address of every row's ``size`` float32, a multiple of 16. M, S, other_M, other_S: float32, as
    many as rows, rounded up to 16. What a row without keys (S = 0) has in ``outs`` or ``others`` is never read. scratch:
    room for two vectors.
    """
    for first in range(0, rows, LANES):
        at = 4 * first
        m, s, other_m, other_s = (
            simd.load_f32(M + at), simd.load_f32(S + at), simd.load_f32(other_M + at), simd.load_f32(other_S + at),
        )  # fmt: skip
        top = simd.maximum(m, other_m)
        # Where S = 0, M is -inf and M - top may be -inf - -inf; it does not matter then.
        weight = simd.zero_where_zero(simd.mul(s, simd.exp(simd.sub(m, top))), s)
        other_weight = simd.zero_where_zero(simd.mul(other_s, simd.exp(simd.sub(other_m, top))), other_s)
        total = simd.add(weight, other_weight)
        simd.store_f32(scratch, simd.div(weight, total))
        simd.store_f32(scratch + 4 * LANES, simd.div(other_weight, total))
        simd.store_f32(M + at, top)
        simd.store_f32(S + at, total)
        for i in range(min(LANES, rows - first)):
            if simd.scalar_at(other_S + at + 4 * i) != 0:
                share, other_share = simd.splat_at(scratch + 4 * i), simd.splat_at(scratch + 4 * LANES + 4 * i)
                target, source = simd.integer_at(outs + 2 * at + 8 * i), simd.integer_at(others + 2 * at + 8 * i)
                if simd.scalar_at(scratch + 4 * i) == 0:  # whatever is in a target that does not count
                    for c in range(0, 4 * size, 4 * LANES):
                        simd.store_f32(target + c, simd.mul(simd.load_f32(source + c), other_share))
                    continue
                for c in range(0, 4 * size, 4 * LANES):
                    more = simd.mul(simd.load_f32(source + c), other_share)
                    simd.store_f32(target + c, simd.fma(simd.load_f32(target + c), share, more))


@standalone(types.void(*[types.int64] * 9))
def merge_parts(outs, states, n_parts, n_queries, n_heads, width, out, state, fresh):  # type: ignore[no-untyped-def]
    """Merge partial attentions ``outs`` (parts, T, H, width), with ``states`` (parts, H, T, 2), in their order.

    ``out`` (T, H, width) and ``state`` (H, T, 2) are continued in place, or begun where ``fresh``. Addresses of float32.
    """
    padded = (n_heads + LANES - 1) // LANES * LANES
    stride, addresses_nbytes = 4 * padded, 8 * n_heads
    memory = own_memory(4 * stride + 2 * VECTOR + 2 * addresses_nbytes)
    own_m = begin_of(memory)
    own_s, other_m, other_s, scratch = own_m + stride, own_m + 2 * stride, own_m + 3 * stride, own_m + 4 * stride
    targets = scratch + 2 * VECTOR
    sources = targets + addresses_nbytes
    clear(own_m, 4 * padded)
    for t in range(n_queries):
        for h in range(n_heads):
            own = state + 8 * (h * n_queries + t)
            simd.store_scalar(own_m + 4 * h, np.float32(-np.inf) if fresh else simd.scalar_at(own))
            simd.store_scalar(own_s + 4 * h, np.float32(0) if fresh else simd.scalar_at(own + 4))
            simd.store_integer(targets + 8 * h, out + (t * n_heads + h) * width * 4)
        for i in range(n_parts):
            for h in range(n_heads):
                other = states + 8 * ((i * n_heads + h) * n_queries + t)
                simd.store_scalar(other_m + 4 * h, simd.scalar_at(other))
                simd.store_scalar(other_s + 4 * h, simd.scalar_at(other + 4))
                simd.store_integer(sources + 8 * h, outs + ((i * n_queries + t) * n_heads + h) * width * 4)
            merge_rows(targets, own_m, own_s, sources, other_m, other_s, n_heads, width, scratch)
        for h in range(n_heads):
            own, total = state + 8 * (h * n_queries + t), simd.scalar_at(own_s + 4 * h)
            simd.store_scalar(own, simd.scalar_at(own_m + 4 * h))
            simd.store_scalar(own + 4, total)
            if fresh and total == 0:
                clear(simd.integer_at(targets + 8 * h), width)
    let_go(memory)


def merge_partials(outs: Float32, states: Float32, out: Float32, state: Float32) -> None:
    """``merge_parts`` of arrays, all of C order; ``out`` and ``state`` are continued."""
    parts, n_queries, n_heads, width = outs.shape
    addresses = (x.ctypes.data for x in (outs, states, out, state))
    outs_at, states_at, out_at, state_at = addresses
    do_share(merge_parts.address(), outs_at, states_at, parts, n_queries, n_heads, width, out_at, state_at, 0)


def pad_last_axis(x: Float32, multiple: int = simd.LANES) -> Float32:
    """A C-ordered float32 array whose last axis is filled with zeros up to a multiple; the same array if it is that."""
    missing = -x.shape[-1] % multiple
    if missing:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(x, dtype=np.float32)


def merge_states(
    out1: Float32, state1: Float32, out2: Float32, state2: Float32, out: Float32 | None = None
) -> tuple[Float32, Float32]:
    """Merge two partial attentions into that over the union of their keys.

    Args:
        out1, out2: float32 (T, H, D) normalised outputs. Rows whose S is 0 are not read: they may hold NaN.
        state1, state2: float32 (H, T, 2) with [..., 0] = M and [..., 1] = S, natural logarithm.
        out: float32 (T, H, D) that receives the output, or None for a new array. It may be ``out1`` itself.

    Returns:
        (out, state). A row with no keys on either side is 0, with state (-inf, 0).

    Raises:
        ValueError: a dtype, shape or layout that does not fit, said in full; nothing has been written then.

    """
    if not isinstance(out1, np.ndarray) or out1.ndim != 3:
        raise ValueError(f"out1 must be a float32 array (T, H, D), found {getattr(out1, 'shape', type(out1).__name__)}")
    t, h, d = out1.shape
    check_out("out2", out2, (t, h, d))
    check_out("out1", out1, (t, h, d))
    check_state("state1", state1, h, t)
    check_state("state2", state2, h, t)
    if out is not None:
        check_out("out", out, (t, h, d), writable=True)
    empty = (state1[..., 1] == 0).T
    merged = pad_last_axis(np.where(empty[..., None], np.float32(0), out1))
    # Where S is 0, M may be anything, and here becomes what the merge expects.
    state, other_state = (np.where(x[..., 1:] == 0, np.array([-np.inf, 0], np.float32), x) for x in (state1, state2))
    other = np.require(pad_last_axis(out2), requirements="A")
    merge_partials(other[None], other_state[None], merged, state)
    if out is None:
        return np.ascontiguousarray(merged[..., :d]), state
    out[...] = merged[..., :d]
    return out, state
