"""The vector layer: LLVM vectors of 16 lanes as a Numba type, and the few operations that the kernels need on them.

Numba has no vector types. One type whose data model is an LLVM vector is enough: its values live in registers, and
generic vector IR is legal on every CPU (LLVM splits 16 lanes where registers are narrower). What is not legal everywhere
is decided when a kernel compiles, from the features of the CPU that Numba compiles for:

* half-precision loads: LLVM's conversion needs F16C on x86 (without it the call crashes); there, integer operations do it;
* fused multiply-add: without FMA on x86 it would be a library call for every lane; there, a multiply and an add.

Memory is addressed by plain integers (bytes), so that a tile in any format, in any allocation, is one kind of argument.
The caller keeps the memory alive and in range: these are the only unchecked operations of the package.
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_V_F32, _V_I32, _V_I16, _V_I8, _V_F16 = (ir.VectorType(t, LANES) for t in (_F32, _I32, _I16, _I8, ir.HalfType()))


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


def cpu_has(context: Any, feature: str) -> bool:
    """Whether the CPU being compiled for has an x86 feature; other architectures count as having it."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    return f"+{feature}" in context.codegen()._tm_features.split(",")


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


@_operation(i32x16, types.intp)
def load_words(context: Any, builder: Any, address: Any) -> Any:
    """16 words of four bytes at ``address``."""
    return _load(builder, address, _V_I32)


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


@_operation(f32x16, i32x16, types.int32, types.int32)
def bits_to_float(context: Any, builder: Any, words: Any, shift: Any, mask: Any) -> Any:
    """``(words >> shift) & mask`` of every lane, as float32: one code out of each packed word."""
    moved = builder.lshr(words, _broadcast(builder, shift, _V_I32))
    return builder.uitofp(builder.and_(moved, _broadcast(builder, mask, _V_I32)), _V_F32)


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
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts (Cody and Waite), the first exact in 10 bits
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
# exp(r) - 1 - r over r^2 on |r| <= ln(2)/2: Cephes' minimax coefficients for single precision, highest first
_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


@_operation(f32x16, f32x16)
def exp(context: Any, builder: Any, x: Any) -> Any:
    """e^x within 2 units in the last place; below -87.3 it is 0, above 88.7 infinity, and NaN stays NaN.

    Written as compare-and-select and integer bit moves: a float-to-integer conversion would be undefined for NaN.
    """
    low = builder.fcmp_ordered("<", x, _const(_V_F32, -87.3))
    high = builder.fcmp_ordered(">", x, _const(_V_F32, 88.7))
    inside = builder.select(builder.or_(low, high), _const(_V_F32, 0.0), x)
    shifted = _fma(context, builder, inside, _const(_V_F32, _LOG2_E), _const(_V_F32, _ROUND))
    whole = builder.fsub(shifted, _const(_V_F32, _ROUND))
    rest = _fma(context, builder, whole, _const(_V_F32, -_LN2_HIGH), inside)
    rest = _fma(context, builder, whole, _const(_V_F32, -_LN2_LOW), rest)
    tail = _const(_V_F32, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        tail = _fma(context, builder, tail, rest, _const(_V_F32, coefficient))
    value = _fma(context, builder, builder.fmul(rest, rest), tail, builder.fadd(rest, _const(_V_F32, 1.0)))
    exponent = builder.shl(builder.bitcast(shifted, _V_I32), _const(_V_I32, 23))
    scaled = builder.bitcast(builder.add(builder.bitcast(value, _V_I32), exponent), _V_F32)
    scaled = builder.select(builder.fcmp_unordered("uno", x, x), x, scaled)
    scaled = builder.select(low, _const(_V_F32, 0.0), scaled)
    return builder.select(high, _const(_V_F32, float("inf")), scaled)


# tanh(y) / y - 1 over y^2 on |y| < 0.625: Cephes' coefficients for single precision, highest first
_TANH_COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


@_operation(f32x16, f32x16, f32x16)
def tanh_from_exp(context: Any, builder: Any, y: Any, e: Any) -> Any:
    """tanh(y), given e = exp(2 y): 1 - 2 / (e + 1), which cancels for small |y|, where a polynomial takes its place."""
    one, two = _const(_V_F32, 1.0), _const(_V_F32, 2.0)
    large = builder.fsub(one, builder.fdiv(two, builder.fadd(e, one)))
    square = builder.fmul(y, y)
    tail = _const(_V_F32, _TANH_COEFFICIENTS[0])
    for coefficient in _TANH_COEFFICIENTS[1:]:
        tail = _fma(context, builder, tail, square, _const(_V_F32, coefficient))
    small = _fma(context, builder, builder.fmul(square, y), tail, y)
    is_small = builder.fcmp_ordered("<", square, _const(_V_F32, 0.625**2))
    return builder.select(is_small, small, large)
