"""The microkernel of weights: dot products of bytes, 16 weight rows a vector, for a few rows of activations at once.

    y[r] = sum over groups g of x_scale[r][g] * w_scale[g] * (codes[g] . x[r][g])  +  x_offset[r][g] * w_minimum[g]

where a group is 32 columns, codes are bytes without a sign, x bytes with one, and everything that belongs to weights is a
vector of 16 lanes, one a weight row. Dot products are exact, in int32; groups are added in float32, in their order. So a
row's bits do not depend on how many others are multiplied with it. Codes whose middle is not 0 begin each group's sum at
``-middle * sum(x)`` instead of having minima. How both lie in memory: weights.py and activations.py.
"""

from typing import Any

from llvmlite import ir
from numba import types

from .microkernel import _ask_ahead, _ask_to_write, _at, _choose, _largest_of, _load_dense, _Loop, _number
from .simd import (
    _F32,
    _I32,
    _IS_X86,
    _V_F32,
    _V_I32,
    LANES,
    _broadcast,
    _call,
    _const,
    _dot_pairs,
    _fma,
    _join,
    _load,
    _operation,
    _pointer,
    cpu_has,
    follows_runs,
    is_zen5,
)

GROUP = 32  # columns that share a scale, of weights and of activations
TILE_ROWS = 8  # rows of activations that lie together
VECTOR = 4 * LANES
AHEAD, AHEAD_ZEN5 = ((12288, 2), (4096, 3)), ((6144, 3),)  # (bytes, locality) of prefetches
CHAINS = {1: 4, 2: 2}  # sums of a row while there are few rows: a dot product takes four cycles


def byte_rows(context: Any) -> tuple[int, ...]:
    """The numbers of rows that there is a loop for, in rising order."""
    if cpu_has(context, "avx512f"):
        return 1, 2, 4, 8
    return (1, 2) if cpu_has(context, "avx2") else (1,)


def _lines_to_ask_for(context: Any, rows: int, nbytes: int) -> range:
    """The lines of a group, and that before it, which has scales, that are prefetched; none where that does not help.

    Many rows read a block many times. And Zen 4 reads so long a run ahead by itself, and less well beside prefetches;
    Intel's processors take 1.75 times as long without, Zen 5 1.15 times.
    """
    return range(0) if rows > 2 or follows_runs(context) else range(-VECTOR, nbytes, VECTOR)


def _bytes_as_pairs(builder: Any, words: Any, signed: bool) -> tuple[Any, Any]:
    """The even and the odd bytes of every word, as pairs of int16."""
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    words = builder.bitcast(words, halves)
    eight = _const(halves, 8)
    shift = builder.ashr if signed else builder.lshr
    even, odd = shift(builder.shl(words, eight), eight), shift(words, eight)
    return builder.bitcast(even, _V_I32), builder.bitcast(odd, _V_I32)


def _dot_bytes(context: Any, builder: Any, sums: Any, address: Any, offset: int, codes: Any, bits: int) -> Any:
    """Add to 16 int32 the dot products of four int8 in memory with four uint8 of every lane."""
    if _IS_X86 and cpu_has(context, "avx512vnni"):
        signature = ir.FunctionType(_V_I32, [_V_I32, _V_I32, address.type])
        return builder.asm(
            signature, f"vpdpbusd {offset}($3){{1to16}}, $2, $0", "=v,0,v,r", [sums, codes, address], False
        )
    number = _load(builder, builder.add(address, _number(address, offset)), _I32)
    number = _broadcast(builder, number, _V_I32)
    if _IS_X86 and bits == 4 and cpu_has(context, "avx2"):
        # Two products of at most 15 * 127 fit the 16 bits that this instruction saturates to; those of 8-bit codes may not.
        bytes_, ones = ir.VectorType(ir.IntType(8), 32), _const(ir.VectorType(ir.IntType(16), 16), 1)
        parts = []
        for half in range(2):
            order = ir.Constant(ir.VectorType(_I32, 8), [8 * half + i for i in range(8)])
            none = ir.Constant(_V_I32, ir.Undefined)
            a, b = (builder.bitcast(builder.shuffle_vector(x, none, order), bytes_) for x in (codes, number))
            products = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(ir.IntType(16), 16), [a, b])
            parts.append(_call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(_I32, 8), [products, ones]))
        return builder.add(sums, _join(builder, parts))
    for a, b in zip(_bytes_as_pairs(builder, codes, False), _bytes_as_pairs(builder, number, True), strict=True):
        sums = _dot_pairs(context, builder, sums, a, b)
    return sums


def _codes_of_group(builder: Any, at: Any, bits: int) -> list[tuple[int, Any]]:
    """(offset of the four columns that it meets, codes) of a group, in the order of memory."""
    if bits == 8:
        return [(4 * i, _load(builder, builder.add(at, _number(at, VECTOR * i)), _V_I32)) for i in range(8)]
    found, mask = [], _const(_V_I32, 0x0F0F0F0F)
    for i in range(4):
        words = _load(builder, builder.add(at, _number(at, VECTOR * i)), _V_I32)
        found.append((4 * i, builder.and_(words, mask)))
        found.append((16 + 4 * i, builder.and_(builder.lshr(words, _const(_V_I32, 4)), mask)))
    return found


def _bytes(bits: int, has_minima: bool) -> Any:
    group_nbytes, params_nbytes = GROUP * LANES * bits // 8, 2 * LANES * 2  # of a unit (weights.py): a group, or two
    double = 0 if has_minima else 1

    def body(context: Any, builder: Any, *args: Any) -> None:
        x, x_scales, x_others, block, groups, rows, target, row_stride, fresh = args
        for n_rows in _choose(builder, rows, iter(byte_rows(context))):
            chains = CHAINS.get(n_rows, 1) if cpu_has(context, "avx512f") else 1
            for r in range(n_rows) if n_rows > 2 else ():
                _ask_to_write(builder, _at(builder, target, (r, row_stride)))
            loop = _Loop(builder, groups, 1, "group")
            totals = [loop.carry(_const(_V_F32, 0.0)) for _ in range(n_rows)]
            own_x = builder.add(x, builder.mul(loop.i, _number(x, TILE_ROWS * GROUP)))
            place = builder.mul(loop.i, _number(x, 4 * TILE_ROWS))
            own_scales, own_others = builder.add(x_scales, place), builder.add(x_others, place)
            nth, within = builder.lshr(loop.i, _number(x, double)), builder.and_(loop.i, _number(x, double))
            unit = builder.add(block, builder.mul(nth, _number(x, params_nbytes + (group_nbytes << double))))
            own = builder.add(unit, builder.mul(within, _number(x, group_nbytes)))
            at = builder.add(own, _number(x, params_nbytes))
            for line in _lines_to_ask_for(context, n_rows, group_nbytes):
                distances = AHEAD_ZEN5 if is_zen5(context) else AHEAD
                _ask_ahead(builder, builder.add(at, _number(at, line)), distances)
            sums = []
            for r in range(n_rows):
                first = _const(_V_I32, 0)
                if not has_minima:
                    own = builder.add(own_others, _number(x, 4 * r))
                    first = _broadcast(builder, _load(builder, own, _I32), _V_I32)
                sums.append([first, *[_const(_V_I32, 0)] * (chains - 1)])
            for u, (column, words) in enumerate(_codes_of_group(builder, at, bits)):
                for r in range(n_rows):
                    i = u % chains
                    sums[r][i] = _dot_bytes(context, builder, sums[r][i], own_x, GROUP * r + column, words, bits)
            own = builder.add(unit, builder.mul(within, _number(x, 2 * LANES)))
            scale = _load_dense(context, builder, own, "f16")
            behind = builder.add(unit, _number(x, 2 * LANES))
            minimum = _load_dense(context, builder, behind, "f16") if has_minima else None
            for r in range(n_rows):
                total = sums[r][0]
                for more in sums[r][1:]:
                    total = builder.add(total, more)
                four = _number(x, 4 * r)
                own = _broadcast(builder, _load(builder, builder.add(own_scales, four), _F32), _V_F32)
                value = builder.fmul(builder.sitofp(total, _V_F32), own)
                if minimum is not None:
                    offset = _broadcast(builder, _load(builder, builder.add(own_others, four), _F32), _V_F32)
                    totals[r] = _fma(context, builder, minimum, offset, totals[r])
                totals[r] = _fma(context, builder, value, scale, totals[r])
            loop.turn(totals)
            keep = builder.sub(fresh, _number(fresh, 1))  # 0 where fresh, else all ones
            keep = _broadcast(builder, builder.trunc(keep, _I32), _V_I32)
            for r, total in enumerate(totals):
                to = _at(builder, target, (r, row_stride))
                before = builder.bitcast(builder.and_(_load(builder, to, _V_I32), keep), _V_F32)
                builder.store(builder.fadd(before, total), _pointer(builder, to, _V_F32)).align = 4

    body.__name__ = f"multiply_bytes{bits}{'m' if has_minima else ''}"
    body.__doc__ = f"""target[r] (+)= one block of 16 weight rows of {bits} bits times a few rows of activations.

    Arguments, addresses and bytes: codes of the activations, their scales, their offsets (where weights have minima, else
    what a group's sum begins with), all of the first row in its tile; the block; groups, rows, target of row 0, from one
    row's target to the next, whether targets are fresh (1: they count as 0).
    """
    return _operation(types.void, *[types.intp] * 9)(body)


multiply_bytes8, multiply_bytes4, multiply_bytes4m = _bytes(8, False), _bytes(4, False), _bytes(4, True)


@_operation(types.int64, types.int64)
def next_byte_rows(context: Any, builder: Any, rows: Any) -> Any:
    """How many of so many rows, 1 or more, the next call takes."""
    return _largest_of(builder, byte_rows(context), rows)
