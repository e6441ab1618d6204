"""Rows of activations, made ready for a product with weights: normed or gated, then rounded to bytes.

A row is cut into groups of 32. A group has one scale, its largest magnitude / 127, and its numbers are rounded to whole
multiples of it. Rows lie in tiles of eight, in the order in which the microkernel (dots.py) reads them:

    codes      [groups][8 rows][32] int8
    scales     [groups][8 rows] float32
    offsets    [groups][8 rows] float32, scale * sum of the codes: what meets a weight's minimum
    less_8     [groups][8 rows] int32, -8 * sum of the codes: where a group's sum begins if the codes' middle is 8
    less_128   the same for 128

A row is computed from itself alone, in a fixed order.
"""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from . import simd
from .dots import GROUP, TILE_ROWS
from .jit import inner
from .microkernel import _number
from .simd import (
    _F32,
    _I8,
    _I32,
    _ROUND,
    _V_F32,
    _V_I32,
    LANES,
    _const,
    _fma,
    _inverse_above,
    _larger,
    _larger_magnitude,
    _load,
    _operation,
    _pointer,
    _reduce_four,
)

VECTOR = 4 * LANES
TOGETHER = 4  # groups that are rounded together, whose sums and maxima over lanes are found at once
GROUP_NBYTES = TILE_ROWS * (GROUP + 4 * 4)  # of a tile: codes, and four arrays of 32 bits
CODES, SCALES, OFFSETS, LESS_8, LESS_128 = range(5)
PLAIN, NORM, SILU, GELU, CLAMPED = range(5)  # what is done with a row before it is rounded; the last three are gates
_GELU = 2 * (2 / np.pi) ** 0.5  # GELU's tanh as a sigmoid of twice its argument
CLAMP, CLAMPED_SLOPE = 7.0, 1.702


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(address.type, offset))


@_operation(types.void, *[types.intp] * 5)
def quantize_groups(context: Any, builder: Any, x: Any, codes: Any, numbers: Any, stride: Any, count: Any) -> None:
    """Round up to ``TOGETHER`` groups of 32 float32 at ``x`` to int8, each at its place in a tile from ``codes`` on.

    What belongs to a group is written to ``numbers``, the four arrays ``stride`` bytes apart. Where there are fewer groups
    than TOGETHER, the last is done again. A group with a NaN or an infinity gets the scale NaN.
    """
    last = builder.sub(count, _number(count, 1))
    own = [
        builder.select(builder.icmp_signed("<", n, last), n, last) for n in map(partial(_number, x), range(TOGETHER))
    ]
    starts = [builder.add(x, builder.mul(n, _number(x, 4 * GROUP))) for n in own]
    groups = [[_load(builder, _at(builder, start, i), _V_F32) for i in (0, VECTOR)] for start in starts]
    tops = [_larger_magnitude(context, builder, a, b) for a, b in groups]
    largest = _reduce_four(builder, tops, lambda a, b: _larger(builder, a, b))
    inverse = _inverse_above(builder, largest, _F32(127.0), _F32(float(np.float32(1e-35))))  # it must be a float32
    shifted = []
    for i, group in enumerate(groups):
        alone = builder.shuffle_vector(inverse, ir.Constant(_V_F32, ir.Undefined), _const(_V_I32, 4 * i))
        shifted.append([_fma(context, builder, v, alone, _const(_V_F32, _ROUND)) for v in group])
    whole = [builder.fadd(*(builder.fsub(v, _const(_V_F32, _ROUND)) for v in group)) for group in shifted]
    total = _reduce_four(builder, whole, builder.fadd)
    scale = builder.fmul(largest, _const(_V_F32, float(np.float32(1 / 127))))
    scale = builder.fadd(scale, builder.fsub(total, total))  # NaN where the sum is
    sums = builder.fptosi(builder.select(builder.fcmp_ordered("==", total, total), total, _const(_V_F32, 0.0)), _V_I32)
    arrays = (
        scale,
        builder.fmul(scale, total),
        builder.mul(sums, _const(_V_I32, -8)),
        builder.mul(sums, _const(_V_I32, -128)),
    )
    bytes_ = ir.VectorType(_I8, LANES)
    for i, n in enumerate(own):
        target = builder.add(codes, builder.mul(n, _number(x, TILE_ROWS * GROUP)))
        for half, v in enumerate(shifted[i]):
            packed = builder.trunc(builder.bitcast(v, _V_I32), bytes_)
            builder.store(packed, _pointer(builder, _at(builder, target, LANES * half), bytes_)).align = 16
        at = builder.add(numbers, builder.mul(n, _number(x, 4 * TILE_ROWS)))
        for array in arrays:
            value = builder.extract_element(array, _I32(4 * i))
            builder.store(value, _pointer(builder, at, value.type)).align = 4
            at = builder.add(at, stride)


@inner
def tile_nbytes(groups):  # type: ignore[no-untyped-def]
    """Bytes of a tile of activations."""
    return groups * GROUP_NBYTES


@inner
def _copy(source, count, target, padded):  # type: ignore[no-untyped-def]
    """``count`` float32, then zeros up to ``padded``, a multiple of 16. Addresses."""
    whole = count // LANES * LANES
    for i in range(0, 4 * whole, VECTOR):
        simd.store_f32(target + i, simd.load_f32(source + i))
    for i in range(4 * whole, 4 * count, 4):
        simd.store_scalar(target + i, simd.scalar_at(source + i))
    for i in range(4 * count, 4 * padded, 4):
        simd.store_scalar(target + i, np.float32(0))


@inner
def _norm(source, row, count, padded, weight, eps):  # type: ignore[no-untyped-def]
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight (https://arxiv.org/abs/1910.07467). ``source`` may be ``row``."""
    even, odd = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for i in range(0, 4 * padded, 2 * VECTOR):
        a, b = simd.load_f32(source + i), simd.load_f32(source + i + VECTOR)
        even, odd = simd.fma(a, a, even), simd.fma(b, b, odd)
    mean = simd.sum_lanes(simd.add(even, odd)) / np.float32(count)
    factor = simd.splat(np.float32(1) / np.sqrt(mean + eps))
    for i in range(0, 4 * padded, VECTOR):
        simd.store_f32(row + i, simd.mul(simd.mul(simd.load_f32(source + i), factor), simd.load_f32(weight + i)))


@inner
def gate_run(source, up, row, padded, how):  # type: ignore[no-untyped-def]
    """Gate * sigmoid(f(gate)) * up, the gate being ``source`` (https://arxiv.org/abs/2002.05202).

    SILU: f(x) = x. GELU, by its tanh (https://arxiv.org/abs/1606.08415): f(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3). CLAMPED
    is gpt-oss's: f(x) = 1.702 x, gate at most 7, up from -7 to 7, and then 1 more (https://github.com/openai/gpt-oss).
    """
    one, most = simd.splat(np.float32(1)), simd.splat(np.float32(88))
    largest, smallest = simd.splat(np.float32(CLAMP)), simd.splat(np.float32(-CLAMP))
    slope = np.float32(-CLAMPED_SLOPE) if how == CLAMPED else np.float32(-_GELU) if how == GELU else np.float32(-1)
    bend = np.float32(-_GELU * 0.044715) if how == GELU else np.float32(0)
    for i in range(0, 4 * padded, VECTOR):
        gate, other = simd.load_f32(source + i), simd.load_f32(up + i)
        if how == CLAMPED:
            gate = simd.smaller(largest, gate)
            other = simd.add(one, simd.smaller(largest, simd.larger(smallest, other)))
        factor = simd.splat(slope)
        if how == GELU:
            factor = simd.fma(simd.mul(gate, gate), simd.splat(bend), factor)
        power = simd.exp(simd.smaller(most, simd.mul(gate, factor)))
        simd.store_f32(row + i, simd.mul(simd.div(gate, simd.add(one, power)), other))


@inner
def prepare_row(x, count, padded, how, weight, eps, room):  # type: ignore[no-untyped-def]
    """One row of ``count`` float32 at ``x`` (for a gate two, gate and up), normed or gated, zeros behind it.

    padded: ``count`` rounded up to 32. weight: the address of the norm's padded weight. room: for two padded rows. Returns
    the row's address, which is ``x`` where nothing is to be done.
    """
    simd.never_inline()
    source, up = x, x + 4 * count
    if count < padded:
        source, up = room, room + 4 * padded
        _copy(x, count, source, padded)
        if how >= SILU:
            _copy(x + 4 * count, count, up, padded)
    if how == NORM:
        _norm(source, room, count, padded, weight, eps)
    elif how >= SILU:
        gate_run(source, up, room, padded, how)
    else:
        return source
    return room


@inner
def normalize_segments(  # type: ignore[no-untyped-def]
    source, target, count, size, weight, eps, onto, scratch
):
    """RMSNorm of ``count`` runs of ``size`` float32 that follow one another at ``source``, into or onto ``target``.

    weight: the address of one padded weight for all. scratch: room for a padded run.
    """
    simd.never_inline()
    padded = (size + GROUP - 1) // GROUP * GROUP
    for run in range(count):
        at = 4 * size * run
        _copy(source + at, size, scratch, padded)
        _norm(scratch, scratch, size, padded, weight, eps)
        for i in range(0, 4 * size, 4):
            value = simd.scalar_at(scratch + i)
            if onto:
                value += simd.scalar_at(target + at + i)
            simd.store_scalar(target + at + i, value)


@inner
def quantize_row(row, first, count, groups, tile, place):  # type: ignore[no-untyped-def]
    """Round ``count`` groups of a prepared row to bytes, as those from ``first`` on of row ``place`` of a tile.

    row, tile: addresses, of the first of those groups and of the tile, which is for rows of ``groups``.
    """
    stride = groups * TILE_ROWS * 4
    codes, numbers = tile + place * GROUP, tile + groups * TILE_ROWS * GROUP + 4 * place
    for g in range(0, count, TOGETHER):
        at = first + g
        quantize_groups(
            row + 4 * GROUP * g, codes + at * TILE_ROWS * GROUP, numbers + 4 * TILE_ROWS * at, stride,
            min(TOGETHER, count - g),
        )  # fmt: skip
