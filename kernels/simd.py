"""The vector layer: LLVM vectors of 16 lanes as a Numba type, and the few operations that the kernels need on them.

Numba has no vector types. One type whose data model is an LLVM vector is enough: its values live in registers, and
generic vector IR is legal on every CPU (LLVM splits 16 lanes where registers are narrower). What is not legal everywhere
is decided when a kernel compiles, from the features of the CPU that Numba compiles for:

* half-precision loads: LLVM's conversion needs F16C on x86 (without it the call crashes); there, integer operations do it;
* fused multiply-add: without FMA on x86 it would be a library call for every lane; there, a multiply and an add;
* the dot product of pairs of 16-bit integers: one instruction with AVX-512 VNNI, two with any x86 (SSE2's pmaddwd and its
  wider forms, which sum two products exactly), plain vector arithmetic elsewhere.

Memory is addressed by plain integers (bytes), so that a tile in any format, in any allocation, is one kind of argument.
The caller keeps the memory alive and in range: these are the only unchecked operations of the package.
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

binding.initialize_native_asmparser()  # for the few instructions that are written as assembly

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_V_F32, _V_I32, _V_I16, _V_F16 = (ir.VectorType(t, LANES) for t in (_F32, _I32, _I16, ir.HalfType()))


class _Vector(types.Type):  # type: ignore[misc]
    """A Numba type whose values are LLVM vectors."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: _Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x16, i32x16 = _Vector("f32x16", _V_F32), _Vector("i32x16", _V_I32)


_IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def is_x86() -> bool:
    """Whether this is an x86 CPU, whatever its features."""
    return _IS_X86


def cpu_has(context: Any, feature: str) -> bool:
    """Whether the CPU being compiled for has an x86 feature; other architectures count as having it."""
    if not _IS_X86:
        return True
    return f"+{feature}" in context.codegen()._tm_features.split(",")


def is_amd(context: Any) -> bool:
    """Whether the CPU being compiled for is AMD's: SSE4a tells them from Intel's, which never had it."""
    return _IS_X86 and cpu_has(context, "sse4a")


def is_zen5(context: Any) -> bool:
    """Whether it is AMD's of Zen 5 or later: AVX-VNNI, beside AVX-512, tells them from those before."""
    return is_amd(context) and cpu_has(context, "avxvnni")


def follows_runs(context: Any) -> bool:
    """Whether it reads runs of memory ahead by itself, and less well beside requests: AMD's before Zen 5."""
    return is_amd(context) and not is_zen5(context)


def _const(llvm: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(llvm, [value] * llvm.count)


def _pointer(builder: Any, address: Any, llvm: Any) -> Any:
    return builder.inttoptr(address, llvm.as_pointer())


def _load(builder: Any, address: Any, llvm: Any) -> Any:
    value = builder.load(_pointer(builder, address, llvm))
    value.align = 1
    return value


def _broadcast(builder: Any, value: Any, llvm: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(llvm, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(llvm, ir.Undefined), _const(_V_I32, 0))


def _call(builder: Any, name: str, llvm: Any, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(llvm, [a.type for a in args]), name)
    return builder.call(function, args)


def _fma(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    if cpu_has(context, "fma"):
        return _call(builder, "llvm.fma.v16f32", _V_F32, [a, b, c])
    return builder.fadd(builder.fmul(a, b), c)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _maximum(_: Any, builder: Any, a: Any, b: Any) -> Any:
    greater = builder.select(builder.fcmp_ordered(">", a, b), a, b)  # b where either is NaN
    return builder.select(builder.fcmp_unordered("uno", a, a), a, greater)


def _half_bits_to_float(builder: Any, bits: Any) -> Any:
    """Half-precision bits (16 x i32) to float32 by integer operations: move the fields, then scale by 2^112.

    The scaling is a float32 multiplication, so subnormal halves come out right; an exponent of all ones stays one.
    """
    fields = builder.shl(builder.and_(bits, _const(_V_I32, 0x7FFF)), _const(_V_I32, 13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(fields, _V_F32), _const(_V_F32, 2.0**112)), _V_I32)
    special = builder.icmp_unsigned(">=", fields, _const(_V_I32, 0x0F800000))
    magnitude = builder.select(special, builder.or_(fields, _const(_V_I32, 0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, _const(_V_I32, 0x8000)), _const(_V_I32, 16))
    return builder.bitcast(builder.or_(magnitude, sign), _V_F32)


def _operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Turn ``body(context, builder, *values) -> value`` into a Numba intrinsic of fixed parameter types."""

    def wrap(body: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = body(context, builder, *args)
            return context.get_dummy_value() if value is None else value

        names = ", ".join(f"a{i}" for i in range(len(parameters)))
        scope: dict[str, Any] = {"signature": result(*parameters), "codegen": codegen}
        # Numba reads the number of arguments from the function's own signature, so it has to be spelled out.
        exec(f"def {body.__name__}(typingctx, {names}):\n    return signature, codegen", scope)  # noqa: S102
        made = scope[body.__name__]
        made.__doc__ = body.__doc__
        made.__module__ = __name__
        return intrinsic(made)

    return wrap


@_operation(types.void)
def never_inline(context: Any, builder: Any) -> None:
    """Compile the calling function once: the optimizer would copy it to every place that it is called from."""
    builder.function.attributes.add("noinline")


@_operation(f32x16, types.intp)
def load_f32(context: Any, builder: Any, address: Any) -> Any:
    """16 float32 at ``address``."""
    return _load(builder, address, _V_F32)


@_operation(f32x16, types.intp)
def load_f16(context: Any, builder: Any, address: Any) -> Any:
    """16 float16 at ``address``, as float32."""
    if cpu_has(context, "f16c"):
        return builder.fpext(_load(builder, address, _V_F16), _V_F32)
    return _half_bits_to_float(builder, builder.zext(_load(builder, address, _V_I16), _V_I32))


@_operation(f32x16, types.intp)
def load_bf16(context: Any, builder: Any, address: Any) -> Any:
    """16 bfloat16 at ``address``, as float32."""
    wide = builder.zext(_load(builder, address, _V_I16), _V_I32)
    return builder.bitcast(builder.shl(wide, _const(_V_I32, 16)), _V_F32)


@_operation(types.void, types.intp, f32x16)
def store_f32(context: Any, builder: Any, address: Any, value: Any) -> None:
    """Write 16 float32 at ``address``."""
    builder.store(value, _pointer(builder, address, _V_F32)).align = 4


@_operation(f32x16, types.float32)
def splat(context: Any, builder: Any, x: Any) -> Any:
    """One number in all lanes."""
    return _broadcast(builder, x, _V_F32)


@_operation(f32x16, types.intp)
def splat_at(context: Any, builder: Any, address: Any) -> Any:
    """The float32 at ``address`` in all lanes."""
    return _broadcast(builder, _load(builder, address, _F32), _V_F32)


@_operation(types.float32, types.intp)
def scalar_at(context: Any, builder: Any, address: Any) -> Any:
    """The float32 at ``address``."""
    return _load(builder, address, _F32)


@_operation(types.float32, types.intp)
def f16_at(context: Any, builder: Any, address: Any) -> Any:
    """The float16 at ``address``, as float32."""
    if cpu_has(context, "f16c"):
        return builder.fpext(_load(builder, address, ir.HalfType()), _F32)
    bits = _broadcast(builder, builder.zext(_load(builder, address, _I16), _I32), _V_I32)
    return builder.extract_element(_half_bits_to_float(builder, bits), _I32(0))


@_operation(types.float32, types.intp)
def bf16_at(context: Any, builder: Any, address: Any) -> Any:
    """The bfloat16 at ``address``, as float32."""
    bits = builder.zext(_load(builder, address, _I16), _I32)
    return builder.bitcast(builder.shl(bits, _I32(16)), _F32)


@_operation(types.int64, types.intp)
def byte_at(context: Any, builder: Any, address: Any) -> Any:
    """The byte at ``address``, without a sign."""
    return builder.zext(_load(builder, address, _I8), ir.IntType(64))


@_operation(types.int64, types.intp)
def integer_at(context: Any, builder: Any, address: Any) -> Any:
    """The int64 at ``address``."""
    return _load(builder, address, ir.IntType(64))


@_operation(types.void, types.intp, types.int64)
def store_integer(context: Any, builder: Any, address: Any, x: Any) -> None:
    """Write one int64 at ``address``."""
    builder.store(x, _pointer(builder, address, ir.IntType(64))).align = 8


@_operation(types.void, types.intp, types.float32)
def store_scalar(context: Any, builder: Any, address: Any, x: Any) -> None:
    """Write one float32 at ``address``."""
    builder.store(x, _pointer(builder, address, _F32)).align = 4


@_operation(f32x16, f32x16, f32x16)
def add(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane a + b."""
    return builder.fadd(a, b)


@_operation(f32x16, f32x16, f32x16)
def sub(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane a - b."""
    return builder.fsub(a, b)


@_operation(f32x16, f32x16, f32x16)
def mul(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane a * b."""
    return builder.fmul(a, b)


@_operation(f32x16, f32x16, f32x16)
def div(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane a / b."""
    return builder.fdiv(a, b)


@_operation(f32x16, f32x16, f32x16, f32x16)
def fma(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Lane by lane a * b + c."""
    return _fma(context, builder, a, b, c)


@_operation(f32x16, f32x16, f32x16)
def maximum(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane maximum; NaN in either operand gives NaN."""
    return _maximum(context, builder, a, b)


@_operation(f32x16, f32x16, f32x16)
def larger(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane the larger of two numbers, in one instruction; a NaN in ``a`` is dropped, one in ``b`` is kept."""
    return _larger(builder, a, b)


@_operation(f32x16, f32x16, f32x16)
def smaller(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane the smaller of two numbers, in one instruction; a NaN in ``a`` is dropped, one in ``b`` is kept."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger_magnitude(context: Any, builder: Any, a: Any, b: Any) -> Any:
    if _IS_X86 and cpu_has(context, "avx512dq"):
        mask, maximum_of_magnitudes = ir.IntType(16)(0xFFFF), _I32(0b1011)
        args = [a, b, maximum_of_magnitudes, a, mask, _I32(4)]
        return _call(builder, "llvm.x86.avx512.mask.range.ps.512", _V_F32, args)
    a, b = (
        builder.bitcast(builder.and_(builder.bitcast(x, _V_I32), _const(_V_I32, 0x7FFFFFFF)), _V_F32) for x in (a, b)
    )
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(f32x16, f32x16, f32x16)
def larger_magnitude(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane the larger of |a| and |b|; where one is NaN, either or NaN."""
    return _larger_magnitude(context, builder, a, b)


@_operation(f32x16, f32x16, f32x16, types.intp)
def replace_fourth(context: Any, builder: Any, a: Any, b: Any, place: Any) -> Any:
    """A, but b in every fourth lane from lane ``place`` on."""
    lanes = ir.Constant(_V_I32, [i % 4 for i in range(LANES)])
    chosen = builder.icmp_signed("==", lanes, _broadcast(builder, builder.trunc(place, _I32), _V_I32))
    return builder.select(chosen, b, a)


def _pair_factors(context: Any, builder: Any, low: Any, high: Any, factor: Any) -> Any:
    halves = [builder.bitcast(_fma(context, builder, x, factor, _const(_V_F32, _ROUND)), _V_I32) for x in (low, high)]
    if _IS_X86 and cpu_has(context, "avx512f"):
        # As assembly: LLVM makes a slower permutation of the whole of a shift that it can see.
        shift = ir.FunctionType(_V_I32, [_V_I32])
        upper = builder.asm(shift, "vpslld $$16, $1, $0", "=v,v", [halves[1]], False)
    else:
        upper = builder.shl(halves[1], _const(_V_I32, 16))
    return builder.or_(builder.and_(halves[0], _const(_V_I32, 0xFFFF)), upper)


@_operation(i32x16, f32x16, f32x16, f32x16)
def pair_factors(context: Any, builder: Any, low: Any, high: Any, factor: Any) -> Any:
    """16 pairs of int16, (low * factor, high * factor), products of at most 32767, rounded to the nearest.

    What is not a number becomes any.
    """
    return _pair_factors(context, builder, low, high, factor)


@_operation(f32x16, f32x16, f32x16)
def rest_of_rounding(context: Any, builder: Any, x: Any, factor: Any) -> Any:
    """What ``pair_factors`` cuts off: x * factor less the nearest integer."""
    whole = _fma(context, builder, x, factor, _const(_V_F32, _ROUND))
    return _fma(context, builder, x, factor, builder.fneg(builder.fsub(whole, _const(_V_F32, _ROUND))))


@_operation(f32x16, types.intp)
def load_low(context: Any, builder: Any, address: Any) -> Any:
    """The first of each of 16 pairs of uint16 at ``address``, as float32."""
    return builder.uitofp(builder.and_(_load(builder, address, _V_I32), _const(_V_I32, 0xFFFF)), _V_F32)


@_operation(f32x16, types.intp)
def load_high(context: Any, builder: Any, address: Any) -> Any:
    """The second of each of 16 pairs of uint16 at ``address``, as float32."""
    return builder.uitofp(builder.lshr(_load(builder, address, _V_I32), _const(_V_I32, 16)), _V_F32)


def _fields(builder: Any, words: Any, bits: int, count: int) -> list[Any]:
    """The ``count`` fields of ``bits`` bits of each half of every word, one vector of pairs a field."""
    mask = _const(_V_I32, ((1 << bits) - 1) * 0x10001)
    return [builder.and_(builder.lshr(words, _const(_V_I32, bits * i)), mask) for i in range(count)]


def _add_middle(builder: Any, pairs: list[Any], bits: int) -> list[Any]:
    """Codes less the middle one, of ``bits`` bits in two's complement, as the codes that they stand for."""
    return [builder.xor(pair, _const(_V_I32, (1 << bits >> 1) * 0x10001)) for pair in pairs]


def _store_pairs(builder: Any, target: Any, vectors: list[Any]) -> None:
    for i, vector in enumerate(vectors):
        address = builder.add(target, ir.Constant(target.type, 64 * i))
        builder.store(vector, _pointer(builder, address, _V_I32)).align = 4


@_operation(types.void, types.intp, types.intp)
def spread8(context: Any, builder: Any, source: Any, target: Any) -> None:
    """16 words of 8-bit codes into 2 vectors of 16 pairs of uint16: code i of the lower and of the upper half."""
    _store_pairs(builder, target, _add_middle(builder, _fields(builder, _load(builder, source, _V_I32), 8, 2), 8))


@_operation(types.void, types.intp, types.intp)
def spread4(context: Any, builder: Any, source: Any, target: Any) -> None:
    """16 words of 4-bit codes into 4 vectors of 16 pairs of uint16."""
    _store_pairs(builder, target, _add_middle(builder, _fields(builder, _load(builder, source, _V_I32), 4, 4), 4))


@_operation(types.void, types.intp, types.intp)
def spread2(context: Any, builder: Any, source: Any, target: Any) -> None:
    """16 words of 2-bit codes into 8 vectors of 16 pairs of uint16."""
    _store_pairs(builder, target, _add_middle(builder, _fields(builder, _load(builder, source, _V_I32), 2, 8), 2))


@_operation(types.void, types.intp, types.intp, types.intp)
def spread3(context: Any, builder: Any, source: Any, tops: Any, target: Any) -> None:
    """Twice 16 words of the lower two bits, and 16 words of the third, into 16 vectors of 16 pairs of uint16."""
    upper = _load(builder, tops, _V_I32)
    for half in range(2):
        words = _load(builder, builder.add(source, ir.Constant(source.type, 64 * half)), _V_I32)
        lows, highs = _fields(builder, words, 2, 8), _fields(builder, upper, 1, 16)[8 * half : 8 * half + 8]
        pairs = [builder.or_(x, builder.shl(y, _const(_V_I32, 2))) for x, y in zip(lows, highs, strict=True)]
        _store_pairs(
            builder, builder.add(target, ir.Constant(target.type, 64 * 8 * half)), _add_middle(builder, pairs, 3)
        )


@_operation(i32x16)
def zero_words(context: Any, builder: Any) -> Any:
    """16 words of zero."""
    return _const(_V_I32, 0)


@_operation(i32x16, f32x16, f32x16)
def pair_codes(context: Any, builder: Any, low: Any, high: Any) -> Any:
    """Two codes 0 <= x < 2^16 of every lane, rounded to the nearest (half to even), as a pair of uint16."""
    low, high = (builder.bitcast(builder.fadd(x, _const(_V_F32, _ROUND)), _V_I32) for x in (low, high))
    return builder.or_(builder.and_(low, _const(_V_I32, 0xFFFF)), builder.shl(high, _const(_V_I32, 16)))


@_operation(i32x16, i32x16, types.int32)
def flip_bits(context: Any, builder: Any, pairs: Any, bits: Any) -> Any:
    """Pairs of uint16, each with the bits that ``bits`` has inverted."""
    return builder.xor(pairs, _broadcast(builder, builder.mul(bits, _I32(0x10001)), _V_I32))


@_operation(i32x16, i32x16, i32x16, types.int32, types.int32, types.int32)
def insert_codes(context: Any, builder: Any, words: Any, pairs: Any, first: Any, bits: Any, place: Any) -> Any:
    """Put the ``bits`` bits of both codes of a pair that begin at bit ``first`` into both halves, at bit ``place``."""
    mask = builder.mul(builder.sub(builder.shl(_I32(1), bits), _I32(1)), _I32(0x10001))
    field = builder.and_(builder.lshr(pairs, _broadcast(builder, first, _V_I32)), _broadcast(builder, mask, _V_I32))
    return builder.or_(words, builder.shl(field, _broadcast(builder, place, _V_I32)))


@_operation(types.void, types.intp, i32x16)
def store_words(context: Any, builder: Any, address: Any, words: Any) -> None:
    """Write 16 words."""
    builder.store(words, _pointer(builder, address, _V_I32)).align = 4


def _float_to_half_bits(builder: Any, x: Any) -> Any:
    """Float32 to half-precision bits (16 x i32) by integer operations, rounded to the nearest, half to even."""
    bits = builder.bitcast(x, _V_I32)
    sign = builder.and_(builder.lshr(bits, _const(_V_I32, 16)), _const(_V_I32, 0x8000))
    magnitude = builder.and_(bits, _const(_V_I32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _const(_V_I32, 13)), _const(_V_I32, 1))
    rounded = builder.add(builder.add(magnitude, _const(_V_I32, 0xFFF - (112 << 23))), odd)
    normal = builder.lshr(rounded, _const(_V_I32, 13))
    # Below 2^-14 a half has fixed steps of 2^-24: adding 1/2, whose last place is that, leaves them in the low bits.
    tiny = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _V_F32), _const(_V_F32, 0.5)), _V_I32)
    subnormal = builder.sub(tiny, _const(_V_I32, 126 << 23))
    half = builder.select(builder.icmp_unsigned("<", magnitude, _const(_V_I32, 113 << 23)), subnormal, normal)
    half = builder.select(
        builder.icmp_unsigned(">=", magnitude, _const(_V_I32, 0x477FF000)), _const(_V_I32, 0x7C00), half
    )
    half = builder.select(
        builder.icmp_unsigned(">", magnitude, _const(_V_I32, 0x7F800000)), _const(_V_I32, 0x7E00), half
    )
    return builder.or_(sign, half)


@_operation(types.void, types.intp, f32x16)
def store_f16(context: Any, builder: Any, address: Any, value: Any) -> None:
    """Write 16 numbers as float16, rounded to the nearest; beyond its range they become infinite."""
    if cpu_has(context, "f16c"):
        bits = builder.bitcast(builder.fptrunc(value, _V_F16), _V_I16)
    else:
        bits = builder.trunc(_float_to_half_bits(builder, value), _V_I16)
    builder.store(bits, _pointer(builder, address, _V_I16)).align = 2


@_operation(types.void, types.intp, f32x16)
def store_bf16(context: Any, builder: Any, address: Any, value: Any) -> None:
    """Write 16 numbers as bfloat16, rounded to the nearest, half to even; NaN stays NaN."""
    bits = builder.bitcast(value, _V_I32)
    odd = builder.and_(builder.lshr(bits, _const(_V_I32, 16)), _const(_V_I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, _const(_V_I32, 0x7FFF)), odd), _const(_V_I32, 16))
    quiet = builder.or_(builder.lshr(bits, _const(_V_I32, 16)), _const(_V_I32, 0x40))
    halves = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    builder.store(builder.trunc(halves, _V_I16), _pointer(builder, address, _V_I16)).align = 2


@_operation(types.int32, types.intp)
def short_at(context: Any, builder: Any, address: Any) -> Any:
    """The 16 bits at ``address``."""
    return builder.zext(_load(builder, address, _I16), _I32)


@_operation(types.void, types.intp, types.int32)
def store_short(context: Any, builder: Any, address: Any, x: Any) -> None:
    """Write the lower 16 bits of x."""
    builder.store(builder.trunc(x, _I16), _pointer(builder, address, _I16)).align = 2


@_operation(types.void, types.intp, types.intp)
def transpose(context: Any, builder: Any, source: Any, target: Any) -> None:
    """Turn 16 x 16 float32 at ``source``, row after row, so that its columns become rows at ``target``."""
    rows = [_load(builder, builder.add(source, ir.Constant(source.type, 64 * i)), _V_F32) for i in range(LANES)]
    width = LANES // 2
    while width:  # exchange the blocks off the diagonal, ever smaller ones
        lower = [i + (LANES - width if i & width else 0) for i in range(LANES)]
        upper = [i + (LANES if i & width else width) for i in range(LANES)]
        orders = [ir.Constant(_V_I32, lower), ir.Constant(_V_I32, upper)]
        for i in range(LANES):
            if not i & width:
                a, b = rows[i], rows[i + width]
                rows[i], rows[i + width] = (builder.shuffle_vector(a, b, order) for order in orders)
        width //= 2
    for i, row in enumerate(rows):
        address = builder.add(target, ir.Constant(target.type, 64 * i))
        builder.store(row, _pointer(builder, address, _V_F32)).align = 4


@_operation(f32x16)
def lane_numbers(context: Any, builder: Any) -> Any:
    """0, 1, ... 15."""
    return ir.Constant(_V_F32, [float(i) for i in range(LANES)])


@_operation(f32x16, f32x16, types.int32, types.int32, types.float32)
def keep_lanes(context: Any, builder: Any, x: Any, first: Any, stop: Any, fill: Any) -> Any:
    """X in the lanes first <= lane < stop, ``fill`` in the others."""
    lanes = ir.Constant(_V_I32, list(range(LANES)))
    inside = builder.and_(
        builder.icmp_signed(">=", lanes, _broadcast(builder, first, _V_I32)),
        builder.icmp_signed("<", lanes, _broadcast(builder, stop, _V_I32)),
    )
    return builder.select(inside, x, _broadcast(builder, fill, _V_F32))


def _fold(context: Any, builder: Any, x: Any, combine: Callable[..., Any]) -> Any:
    """Reduce 16 lanes to one by halves: a fixed order, so the bits are the same everywhere."""
    width = LANES // 2
    while width:
        order = ir.Constant(_V_I32, [(i + width) % LANES for i in range(LANES)])
        x = combine(context, builder, x, builder.shuffle_vector(x, ir.Constant(_V_F32, ir.Undefined), order))
        width //= 2
    return builder.extract_element(x, _I32(0))


@_operation(types.float32, f32x16)
def sum_lanes(context: Any, builder: Any, x: Any) -> Any:
    """The sum of the 16 lanes."""
    return _fold(context, builder, x, lambda _, b, p, q: b.fadd(p, q))


@_operation(types.float32, f32x16)
def max_lanes(context: Any, builder: Any, x: Any) -> Any:
    """The maximum of the 16 lanes; NaN in any gives NaN."""
    return _fold(context, builder, x, _maximum)


_LOG2_E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
# 2^r on |r| <= 1/2, highest first: fitted to least relative error (9.2e-8), with 2^0 exactly 1
_EXP2_COEFFICIENTS = (1.326472727e-3, 9.671512860e-3, 5.550733745e-2, 2.402224208e-1, 6.931469776e-1, 1.0)


@_operation(f32x16, f32x16)
def exp(context: Any, builder: Any, x: Any) -> Any:
    """e^x of x <= 88, within 2 + |x|/4 units in the last place; below -87.3 it is 0, and NaN stays NaN.

    Above 0 it is a twentieth more, and on a CPU without fused multiply-add four times as much.

    x is a logit minus the largest one: the further below 0, the less it weighs, and its error with it. Written
    as selects and integer bit moves: a float-to-integer conversion would be undefined for NaN.
    """
    low = builder.fcmp_ordered("<", x, _const(_V_F32, -87.3))
    shifted = _fma(context, builder, x, _const(_V_F32, _LOG2_E), _const(_V_F32, _ROUND))
    whole = builder.fsub(shifted, _const(_V_F32, _ROUND))
    rest = _fma(context, builder, x, _const(_V_F32, _LOG2_E), builder.fneg(whole))
    value = _const(_V_F32, _EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        value = _fma(context, builder, value, rest, _const(_V_F32, coefficient))
    if cpu_has(context, "avx512f") and _IS_X86:
        kept = builder.bitcast(builder.not_(low), ir.IntType(16))
        zeros = _const(_V_F32, 0.0)
        return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", _V_F32, [value, whole, zeros, kept, _I32(4)])
    exponent = builder.shl(builder.bitcast(shifted, _V_I32), _const(_V_I32, 23))
    power = builder.bitcast(builder.add(exponent, _const(_V_I32, 127 << 23)), _V_F32)
    return builder.select(low, _const(_V_F32, 0.0), builder.fmul(value, power))


# tanh(y) / y - 1 over y^2 on |y| < 0.625: Cephes' coefficients for single precision, highest first
_TANH_COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


@_operation(f32x16, f32x16, f32x16)
def tanh_from_exp(context: Any, builder: Any, y: Any, e: Any) -> Any:
    """tanh(y), given e = exp(min(2 y, 40)): 1 - 2 / (e + 1); it cancels for small |y|, where a polynomial replaces it."""
    one, two = _const(_V_F32, 1.0), _const(_V_F32, 2.0)
    large = builder.fsub(one, builder.fdiv(two, builder.fadd(e, one)))
    square = builder.fmul(y, y)
    tail = _const(_V_F32, _TANH_COEFFICIENTS[0])
    for coefficient in _TANH_COEFFICIENTS[1:]:
        tail = _fma(context, builder, tail, square, _const(_V_F32, coefficient))
    small = _fma(context, builder, builder.fmul(square, y), tail, y)
    is_small = builder.fcmp_ordered("<", square, _const(_V_F32, 0.625**2))
    return builder.select(is_small, small, large)


def _pieces(builder: Any, x: Any, count: int) -> list[Any]:
    """A vector of 16 words cut into ``count`` vectors of int16."""
    lanes = LANES // count
    whole = builder.bitcast(x, ir.VectorType(_I16, 2 * LANES))
    order = [list(range(2 * lanes * i, 2 * lanes * (i + 1))) for i in range(count)]
    none = ir.Constant(whole.type, ir.Undefined)
    return [builder.shuffle_vector(whole, none, ir.Constant(ir.VectorType(_I32, 2 * lanes), o)) for o in order]


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        both = ir.VectorType(_I32, 2 * parts[0].type.count)
        order = ir.Constant(both, list(range(both.count)))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot_pairs(context: Any, builder: Any, acc: Any, a: Any, b: Any) -> Any:
    """Add to 16 int32 the dot products of 16 pairs of int16 (words ``a`` and ``b``): exact, as long as 32 bits hold it."""
    if _IS_X86:
        if cpu_has(context, "avx512vnni"):
            # As assembly: LLVM splits its own intrinsic into a multiplication and an addition in unrolled loops.
            signature = ir.FunctionType(_V_I32, [_V_I32] * 3)
            return builder.asm(signature, "vpdpwssd $3, $2, $0", "=v,0,v,v", [acc, a, b], False)
        wide, middle = cpu_has(context, "avx512bw"), cpu_has(context, "avx2")
        count, name = (1, "avx512.pmaddw.d.512") if wide else (2, "avx2.pmadd.wd") if middle else (4, "sse2.pmadd.wd")
        result = ir.VectorType(_I32, LANES // count)
        pieces = zip(_pieces(builder, a, count), _pieces(builder, b, count), strict=True)
        return builder.add(acc, _join(builder, [_call(builder, f"llvm.x86.{name}", result, list(p)) for p in pieces]))
    half = _const(_V_I32, 16)
    low = [builder.ashr(builder.shl(x, half), half) for x in (a, b)]
    high = [builder.ashr(x, half) for x in (a, b)]
    return builder.add(acc, builder.add(builder.mul(*low), builder.mul(*high)))


def _load_four(builder: Any, source: Any) -> list[Any]:
    return [_load(builder, builder.add(source, ir.Constant(source.type, 64 * i)), _V_F32) for i in range(4)]


def _reduce_four(builder: Any, vectors: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce each of four vectors as ``_fold`` does; lanes 4i .. 4i + 3 get the result of vector i."""

    def shuffle(a: Any, b: Any, order: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(_V_I32, order))

    a, b, c, d = vectors
    low, high = list(range(8)), list(range(8, 16))
    ab, cd = (
        combine(shuffle(x, y, low + [16 + i for i in low]), shuffle(x, y, high + [16 + i for i in high]))
        for x, y in ((a, b), (c, d))
    )
    even, odd = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    quarters = combine(*(shuffle(ab, cd, half + [16 + i for i in half]) for half in (even, odd)))
    for distance in (2, 1):
        quarters = combine(quarters, shuffle(quarters, quarters, [i ^ distance for i in range(LANES)]))
    return quarters


@_operation(f32x16, types.intp)
def sum_four(context: Any, builder: Any, source: Any) -> Any:
    """The sums over the lanes of four vectors at ``source``: lanes 4i .. 4i + 3 hold ``sum_lanes`` of vector i."""
    return _reduce_four(builder, _load_four(builder, source), builder.fadd)


@_operation(f32x16, types.intp)
def largest_four(context: Any, builder: Any, source: Any) -> Any:
    """The largest lanes of four vectors at ``source``: lanes 4i .. 4i + 3 hold vector i's; where one is NaN, any."""
    return _reduce_four(builder, _load_four(builder, source), lambda x, y: _larger(builder, x, y))


@_operation(f32x16, f32x16)
def turn_quads(context: Any, builder: Any, x: Any) -> Any:
    """Lane 4i + j of the result is lane 4j + i of x."""
    order = ir.Constant(_V_I32, [4 * (i % 4) + i // 4 for i in range(LANES)])
    return builder.shuffle_vector(x, ir.Constant(_V_F32, ir.Undefined), order)


@_operation(f32x16, f32x16)
def rounded(context: Any, builder: Any, x: Any) -> Any:
    """X rounded to the nearest integer, half to even, where its magnitude is below 2^22."""
    return builder.fsub(builder.fadd(x, _const(_V_F32, _ROUND)), _const(_V_F32, _ROUND))


@_operation(f32x16, f32x16, f32x16)
def finite_or(context: Any, builder: Any, x: Any, y: Any) -> Any:
    """X where it is finite, else y."""
    return builder.select(builder.fcmp_ordered("==", builder.fsub(x, x), _const(_V_F32, 0.0)), x, y)


@_operation(f32x16, f32x16, types.intp)
def hadamard_lanes(context: Any, builder: Any, x: Any, size: Any) -> Any:
    """Every ``size`` lanes, a power of two, times the Hadamard matrix of that size, which is of +1 and -1; at most 16."""
    for distance in (1, 2, 4, 8):
        order = ir.Constant(_V_I32, [i ^ distance for i in range(LANES)])
        other = builder.shuffle_vector(x, ir.Constant(_V_F32, ir.Undefined), order)
        upper = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [bool(i & distance) for i in range(LANES)])
        turned = builder.select(upper, builder.fsub(other, x), builder.fadd(x, other))
        x = builder.select(builder.icmp_signed(">", size, ir.Constant(size.type, distance)), turned, x)
    return x


@_operation(f32x16, f32x16, f32x16)
def zero_where_zero(context: Any, builder: Any, x: Any, y: Any) -> Any:
    """X, but 0 in the lanes where y is 0."""
    return builder.select(builder.fcmp_ordered("==", y, _const(_V_F32, 0.0)), _const(_V_F32, 0.0), x)


def _inverse_above(builder: Any, x: Any, numerator: Any, least: Any) -> Any:
    quotient = builder.fdiv(_broadcast(builder, numerator, _V_F32), x)
    large = builder.fcmp_ordered(">", x, _broadcast(builder, least, _V_F32))
    return builder.select(large, quotient, _const(_V_F32, 0.0))


@_operation(f32x16, f32x16, types.float32, types.float32)
def inverse_above(context: Any, builder: Any, x: Any, numerator: Any, least: Any) -> Any:
    """``numerator`` / x where x is larger than ``least``, else 0."""
    return _inverse_above(builder, x, numerator, least)
