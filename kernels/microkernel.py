"""The two microkernels: sums of products whose accumulators stay in registers from the first step to the last.

    sum[r][v] = sum over i < count of a[r][i] * b[v][i]

for a few rows r of numbers (queries, or weights) and vectors v of 16 lanes (keys, or channels). ``multiply_f32``, ``f16``
and ``bf16`` take dense numbers and sum in float32. ``multiply_codes8``, ``4``, ``3`` and ``2`` take codes as they are
stored and pairs of int16, and sum exactly in int32. They are written as LLVM IR and not as Python loops over tuples, so
that nothing depends on what an optimizer makes of them. The rows of a call (and the vectors of a dense one) are constants
in its loop, so there is a loop for each number.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .layout import KIND_BITS
from .simd import (
    _F32,
    _I16,
    _I32,
    _IS_X86,
    _V_F16,
    _V_F32,
    _V_I16,
    _V_I32,
    LANES,
    _broadcast,
    _const,
    _dot_pairs,
    _fma,
    _half_bits_to_float,
    _larger,
    _load,
    _operation,
    _pointer,
    cpu_has,
    follows_runs,
    is_amd,
    is_zen5,
)

VECTOR = 4 * LANES  # bytes of a vector of words
CHAINS = {1: 4, 2: 2, 3: 2, 4: 2, 8: 1}  # sums of a row, by rows: together at least the cycles that a dot product takes
TWO_VECTORS = (8,)  # rows that meet two vectors of codes at once, where a dot product is one instruction
NEAR = 2048  # bytes ahead that codes and numbers are asked for once more, into the first-level cache
AHEAD_ONCE = 6144  # bytes ahead that they are asked for where that is done once (``_asks_once``)
PAIRS_FROM = 24  # rows; measured with AVX-512, where 8 rows share the work
_V_I16_PAIRS = ir.VectorType(_I16, 2 * LANES)


def dense_block(context: Any) -> tuple[int, int]:
    """Rows and vectors whose sums, with the operands of a step, fit the registers of the CPU compiled for."""
    if cpu_has(context, "avx512f"):
        return 4, 4
    return (2, 2) if cpu_has(context, "avx2") else (1, 2)


def _dense_vectors(context: Any) -> tuple[int, ...]:
    most = dense_block(context)[1]
    return tuple(count for count in (1, 2, 4) if count <= most)


def code_rows(context: Any) -> tuple[int, ...]:
    """The numbers of rows that ``multiply_codes`` has a loop for."""
    if cpu_has(context, "avx512f"):
        return 1, 2, 3, 4, 8
    return (1, 2) if cpu_has(context, "avx2") else (1,)


@_operation(types.int64)
def most_dense_rows(context: Any, builder: Any) -> Any:
    """Rows that a call of ``multiply_f32`` and its like may have on the CPU compiled for."""
    return ir.Constant(ir.IntType(64), dense_block(context)[0])


def _largest_of(builder: Any, counts: tuple[int, ...], most: Any) -> Any:
    """The largest of some numbers, in rising order, that is at most ``most``, and at least the first."""
    taken = _number(most, counts[0])
    for count in counts[1:]:
        number = _number(most, count)
        taken = builder.select(builder.icmp_signed(">=", most, number), number, taken)
    return taken


@_operation(types.int64, types.int64)
def next_vectors(context: Any, builder: Any, vectors: Any) -> Any:
    """How many of so many vectors, 1 or more, the next call of ``multiply_f32`` and its like takes."""
    return _largest_of(builder, _dense_vectors(context), vectors)


@_operation(types.int64, types.int64)
def next_rows(context: Any, builder: Any, rows: Any) -> Any:
    """How many of so many rows, 1 or more, the next call of ``multiply_codes8`` and its like takes."""
    return _largest_of(builder, code_rows(context), rows)


def _number(like: Any, value: int) -> ir.Constant:
    return ir.Constant(like.type, value)


def _at(builder: Any, base: Any, *offsets: tuple[int, Any]) -> Any:
    """The address base + count * stride + ..., for constant counts."""
    for count, stride in offsets:
        if count:
            base = builder.add(base, stride if count == 1 else builder.mul(_number(base, count), stride))
    return base


class _Loop:
    """A loop that counts up to ``stop`` by ``step``, at least once; what is built from here to ``turn`` is its body."""

    def __init__(self, builder: Any, stop: Any, step: int, name: str) -> None:
        self.builder, self.stop, self.step = builder, stop, step
        self._before = builder.block
        self._body = builder.append_basic_block(name)
        self.after = builder.append_basic_block(name + ".after")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.i = builder.phi(stop.type)
        self.i.add_incoming(_number(stop, 0), self._before)
        self._carried: list[Any] = []

    def carry(self, initial: Any) -> Any:
        """A value that goes from one turn to the next; ``turn`` says what it is then."""
        phi = self.builder.phi(initial.type)
        phi.add_incoming(initial, self._before)
        self._carried.append(phi)
        return phi

    def turn(self, values: list[Any]) -> None:
        """End of the body, with the new values of what is carried, in the order of ``carry``."""
        following = self.builder.add(self.i, _number(self.i, self.step))
        end = self.builder.block
        self.i.add_incoming(following, end)
        for phi, value in zip(self._carried, values, strict=True):
            phi.add_incoming(value, end)
        self.builder.cbranch(self.builder.icmp_signed("<", following, self.stop), self._body, self.after)
        self.builder.position_at_end(self.after)


def _choose(builder: Any, value: Any, cases: Iterator[int]) -> Iterator[int]:
    """For each case, position ``builder`` where the code for ``value`` == case goes; afterwards, behind all of them."""
    start, done = builder.block, builder.append_basic_block("done")
    blocks = []
    for case in cases:
        block = builder.append_basic_block(f"case{case}")
        blocks.append((case, block))
        builder.position_at_end(block)
        yield case
        builder.branch(done)
    builder.position_at_end(start)
    switch = builder.switch(value, done)
    for case, block in blocks:
        switch.add_case(_number(value, case), block)
    builder.position_at_end(done)


def _prefetch(builder: Any, address: Any, to_write: bool, locality: int) -> None:
    """Ask for the cache line of an address; any will do, even one that is not ours."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    builder.call(function, [builder.inttoptr(address, byte), _I32(int(to_write)), _I32(locality), _I32(1)])


def _ask_ahead(builder: Any, address: Any, distances: tuple[tuple[int, int], ...]) -> None:
    """Ask for the cache lines that lie some distances ahead of an address."""
    for distance, locality in distances:
        _prefetch(builder, builder.add(address, _number(address, distance)), False, locality)


def _asks_once(context: Any, bits: int) -> bool:
    """Whether a line of codes, or numbers, of so many bits is asked for by one request, past the second-level cache.

    On Zen 5 a second one costs up to an eighth of the time with 8 and 16 bits. Fewer bits take longer to multiply, and gain
    by both.
    """
    return bits in (8, 16) and is_zen5(context)


def _ask_for_next(context: Any, builder: Any, address: Any, ahead: Any, bits: int) -> None:
    """Ask for the line ``ahead`` bytes from an address, into the second-level cache, and for one near it into the first.

    Where ``_asks_once``, for one line only, AHEAD_ONCE bytes from the address.
    """
    if _asks_once(context, bits):
        _prefetch(builder, builder.add(address, _number(address, AHEAD_ONCE)), False, 0)
        return
    _prefetch(builder, builder.add(address, ahead), False, 2)
    _prefetch(builder, builder.add(address, _number(address, NEAR)), False, 3)


@_operation(types.boolean, types.int64)
def asks_before_run(context: Any, builder: Any, bits: Any) -> Any:
    """Whether the first lines of a run of codes, or numbers, of so many bits are asked for before it is read."""
    asks = ir.Constant(ir.IntType(1), 1)
    for width in sorted(set(KIND_BITS)):
        if _asks_once(context, width):
            asks = builder.and_(asks, builder.icmp_signed("!=", bits, _number(bits, width)))
    return asks


@_operation(types.void, types.intp, types.int64)
def ask_for_lines(_: Any, builder: Any, address: Any, count: Any) -> None:
    """Ask for so many cache lines (1 or more) from an address on, into the second-level cache."""
    loop = _Loop(builder, count, 1, "line")
    _prefetch(builder, builder.add(address, builder.mul(loop.i, _number(address, VECTOR))), False, 2)
    loop.turn([])


def _asks_for_next(context: Any, rows: int, bits: int) -> bool:
    """Whether lines are asked for by who multiplies so many rows.

    Zen 4 reads runs of memory ahead by itself, at up to 32 GB/s a core, but fetches no more than 17 GB/s of what it is
    asked for. One row of 8 or 16 bits is faster than that. Numbers of 32 bits are mostly those of an unpacked tile, whose
    codes are read before and would be asked for by nobody.
    """
    return not (follows_runs(context) and rows == 1 and bits in (8, 16))


def _ask_to_write(builder: Any, address: Any) -> None:
    """Ask for the cache line of an address that will be written to."""
    _prefetch(builder, address, True, 3)


# --- Dense numbers --------------------------------------------------------------------------------------------------------


def _load_dense(context: Any, builder: Any, address: Any, kind: str) -> Any:
    """16 numbers of a dense format, as float32."""
    if kind == "f32":
        return _load(builder, address, _V_F32)
    if kind == "f16" and cpu_has(context, "f16c"):
        return builder.fpext(_load(builder, address, _V_F16), _V_F32)
    bits = builder.zext(_load(builder, address, _V_I16), _V_I32)
    if kind == "f16":
        return _half_bits_to_float(builder, bits)
    return builder.bitcast(builder.shl(bits, _const(_V_I32, 16)), _V_F32)


def _dense(kind: str) -> Any:
    bits = 32 if kind == "f32" else 16

    def body(context: Any, builder: Any, *args: Any) -> None:
        a, a_stride, b, step, stride, count, rows, vectors, target, row_stride, vector_stride, ahead = args
        cases = (r * 8 + v for r in range(1, dense_block(context)[0] + 1) for v in _dense_vectors(context))
        chosen = builder.add(builder.mul(rows, _number(rows, 8)), vectors)
        for case in _choose(builder, chosen, cases):
            n_rows, n_vectors = divmod(case, 8)
            a_rows = [_at(builder, a, (r, a_stride)) for r in range(n_rows)]
            b_vectors = [_at(builder, b, (v, stride)) for v in range(n_vectors)]
            targets = [
                _at(builder, target, (r, row_stride), (v, vector_stride))
                for r in range(n_rows)
                for v in range(n_vectors)
            ]
            initial = [_load(builder, at, _V_F32) for at in targets]
            loop = _Loop(builder, count, 1, "step")
            sums = [loop.carry(value) for value in initial]
            offset, place = builder.mul(loop.i, step), builder.mul(loop.i, _number(a, 4))
            columns = [_load_dense(context, builder, builder.add(at, offset), kind) for at in b_vectors]
            for at in b_vectors[:: 32 // bits] if _asks_for_next(context, n_rows, bits) else ():
                _ask_for_next(context, builder, builder.add(at, offset), ahead, bits)
            for r, row in enumerate(a_rows):
                number = _broadcast(builder, _load(builder, builder.add(row, place), _F32), _V_F32)
                for v, column in enumerate(columns, r * n_vectors):
                    sums[v] = _fma(context, builder, number, column, sums[v])
            loop.turn(sums)
            for at, total in zip(targets, sums, strict=True):
                builder.store(total, _pointer(builder, at, _V_F32)).align = 4

    body.__name__ = f"multiply_{kind}"
    body.__doc__ = f"""target[r][v] += sum of a[r][i] * b[v][i], a float32 and b {kind}.

    Arguments: a, its row stride, b, the strides of its steps and of its vectors, count, rows, vectors, target, its row and
    vector strides, how far ahead of b cache lines are asked for (``_ask_for_next``), all in bytes. Sums run in the order of
    steps, from what is in the target: bits do not depend on the block that a row is computed in, nor on where a sum is cut.
    """
    return _operation(types.void, *[types.intp] * 12)(body)


multiply_f32, multiply_f16, multiply_bf16 = (_dense(kind) for kind in ("f32", "f16", "bf16"))


# --- Codes ----------------------------------------------------------------------------------------------------------------


def _fields(builder: Any, words: Any, bits: int) -> list[Callable[[], Any]]:
    """What takes the codes out of both halves of every word, one vector of pairs of int16 a code, with their signs."""

    def field(i: int) -> Any:
        unused = 16 - bits * (i + 1)  # bits of the half above the code
        halves = builder.shl(words, _const(_V_I16_PAIRS, unused)) if unused else words
        return builder.bitcast(builder.ashr(halves, _const(_V_I16_PAIRS, 16 - bits)), _V_I32)

    words = builder.bitcast(words, _V_I16_PAIRS)
    return [partial(field, i) for i in range(16 // bits)]


def _fields3(builder: Any, words: Any, signs: Any, shift: Any) -> list[Callable[[], Any]]:
    """The same for 3 bits: lower two bits in ``words``, the third ones, signs, in ``signs`` from bit ``shift`` on."""
    signs = builder.bitcast(signs, _V_I16_PAIRS)
    both = builder.mul(builder.trunc(shift, _I32), _I32(0x10001))
    signs = builder.lshr(signs, builder.bitcast(_broadcast(builder, both, _V_I32), _V_I16_PAIRS))
    words = builder.bitcast(words, _V_I16_PAIRS)

    def pair(i: int) -> Any:
        low = builder.lshr(words, _const(_V_I16_PAIRS, 2 * i)) if i else words
        sign = builder.ashr(builder.shl(signs, _const(_V_I16_PAIRS, 15 - i)), _const(_V_I16_PAIRS, 15))
        low, sign = (builder.bitcast(x, _V_I32) for x in (low, sign))
        return builder.or_(builder.and_(low, _const(_V_I32, 0x30003)), builder.and_(sign, _const(_V_I32, 0xFFFCFFFC)))

    return [partial(pair, i) for i in range(8)]


def _dot_number(context: Any, builder: Any, sums: list[Any], address: Any, offset: int, codes: list[Any]) -> list[Any]:
    """Add to 16 int32 the dot products of one pair of int16 in memory with 16 pairs of codes, for one vector or two."""
    if _IS_X86 and cpu_has(context, "avx512vnni"):
        # As assembly, because LLVM broadcasts with an instruction for floats, whose result takes a cycle longer to reach
        # integer units: 1.4 cycles a product against 1.0. It is not told which memory is read: nothing here writes it.
        if len(codes) == 1:
            signature = ir.FunctionType(_V_I32, [_V_I32, _V_I32, address.type])
            text = f"vpdpwssd {offset}($3){{1to16}}, $2, $0"
            return [builder.asm(signature, text, "=v,0,v,r", [sums[0], codes[0], address], False)]
        # Two share what is loaded, as no processor begins more loads a cycle than products. They are kept in this order
        # (the last argument): LLVM's needs more registers than there are.
        signature = ir.FunctionType(_V_I32, [address.type])
        number = builder.asm(signature, f"vpbroadcastd {offset}($1), $0", "=v,r", [address], True)
        signature = ir.FunctionType(_V_I32, [_V_I32] * 3)
        return [
            builder.asm(signature, "vpdpwssd $3, $2, $0", "=v,0,v,v", [total, number, own], True)
            for total, own in zip(sums, codes, strict=True)
        ]
    number = _load(builder, builder.add(address, _number(address, offset)), ir.IntType(32))
    number = _broadcast(builder, number, _V_I32)
    return [_dot_pairs(context, builder, total, number, own) for total, own in zip(sums, codes, strict=True)]


def _scaled(
    context: Any, builder: Any, totals: list[Any], own: list[Any], per_lane: Any, place: Any, scales: Any, centres: Any
) -> list[Any]:
    """factors[r] * scale * total + offsets[r] * centre of every row; scale and centre are 1 unless ``per_lane``."""
    arms = []
    with builder.if_else(per_lane) as (has_scales, has_none):
        with has_scales:
            scale, centre = (_load(builder, builder.add(x, place), _V_F32) for x in (scales, centres))
            found = [
                _fma(context, builder, builder.fmul(total, scale), factor, builder.fmul(offset, centre))
                for total, (_, factor, offset) in zip(totals, own, strict=True)
            ]
            arms.append((found, builder.block))
        with has_none:
            found = [
                _fma(context, builder, total, factor, offset)
                for total, (_, factor, offset) in zip(totals, own, strict=True)
            ]
            arms.append((found, builder.block))
    (one, first), (other, second) = arms
    return _merge_arms(builder, first, one, second, other)


def _merge_arms(builder: Any, first: Any, one: list[Any], second: Any, other: list[Any]) -> list[Any]:
    """Values that are ``one`` where control came from the block ``first``, and ``other`` from ``second``."""
    merged = [builder.phi(value.type) for value in one]
    for phi, a, b in zip(merged, one, other, strict=True):
        phi.add_incoming(a, first)
        phi.add_incoming(b, second)
    return merged


def _chains(context: Any, n_rows: int) -> int:
    """Sums of a row. Intel's processors begin two dot products a cycle, and one takes five: 8 rows are too few for that."""
    if not cpu_has(context, "avx512f"):
        return 1
    return 2 if n_rows == 8 and not is_amd(context) else CHAINS[n_rows]


def _carry_through(
    builder: Any, count: Any, two: bool, values: list[Any], step: Callable[[int, Any, list[Any]], list[Any]]
) -> list[Any]:
    """Take values through ``step(how many, the first, values)`` for ``count`` vectors, 1 or more: two at once, or one."""
    if not two:
        loop = _Loop(builder, count, 1, "vector")
        values = step(1, loop.i, [loop.carry(value) for value in values])
        loop.turn(values)
        return values
    before = builder.block
    with builder.if_then(builder.icmp_signed(">", count, _number(count, 1))):
        loop = _Loop(builder, builder.and_(count, _number(count, -2)), 2, "vectors")
        found = step(2, loop.i, [loop.carry(value) for value in values])
        loop.turn(found)
        after = builder.block
    values, before = _merge_arms(builder, before, values, after, found), builder.block
    with builder.if_then(builder.trunc(count, ir.IntType(1))):
        found = step(1, builder.sub(count, _number(count, 1)), values)
        after = builder.block
    return _merge_arms(builder, before, values, after, found)


def _codes(bits: int) -> Any:
    per_word = 8 if bits == 3 else 16 // bits  # pairs
    words_a_turn = {16: 4, 8: 2, 4: 2}.get(bits, 1)

    def sums_of(
        context: Any,
        builder: Any,
        a_rows: list[Any],
        vectors: list[tuple[Any, Any]],
        count: Any,
        tops_plane: Any,
        ahead: Any,
    ) -> list[list[Any]]:
        """Sums of the products of rows and vectors, int32, a list for each vector; its address, and place in tops_plane."""
        chains = _chains(context, len(a_rows)) if len(vectors) == 1 else 1
        loop = _Loop(builder, count, per_word * words_a_turn, "word")
        sums = [[[loop.carry(_const(_V_I32, 0)) for _ in range(chains)] for _ in a_rows] for _ in vectors]
        numbers = [builder.add(row, builder.mul(loop.i, _number(row, 4))) for row in a_rows]
        fields: list[list[Callable[[], Any]]] = [[] for _ in vectors]
        for (at, first_pair), own in zip(vectors, fields, strict=True):
            source = builder.add(at, builder.mul(loop.i, _number(at, VECTOR // per_word)))
            for w in range(words_a_turn):
                place = builder.add(source, _number(at, VECTOR * w))
                if bits < 16 and _asks_for_next(context, len(a_rows), bits):  # pairs come from a cache
                    _ask_for_next(context, builder, place, ahead, bits)
                words = _load(builder, place, _V_I32)
                if bits == 3:
                    pair = builder.add(first_pair, loop.i)
                    top = builder.mul(builder.lshr(pair, _number(at, 4)), _number(at, VECTOR))
                    tops = _load(builder, builder.add(tops_plane, top), _V_I32)
                    own += _fields3(builder, words, tops, builder.and_(pair, _number(at, 15)))
                else:
                    own += _fields(builder, words, bits)
        for u, same_field in enumerate(zip(*fields, strict=True)):
            codes = [field() for field in same_field]
            for r, number in enumerate(numbers):
                before = [each[r][u % chains] for each in sums]
                after = _dot_number(context, builder, before, number, 4 * u, codes)
                for each, value in zip(sums, after, strict=True):
                    each[r][u % chains] = value
        loop.turn([value for each in sums for row in each for value in row])
        return [[reduce(builder.add, row) for row in each] for each in sums]

    def body(context: Any, builder: Any, *args: Any) -> None:
        a, a_stride, b, b_stride, tops_plane, first_pair, count, rows, vectors = args[:9]
        targets, column, fresh, factors, offsets, scales, centres, scale_step, largest, ahead = args[9:]
        has_tops, per_lane = (builder.icmp_unsigned("!=", x, _number(x, 0)) for x in (largest, scale_step))
        is_old = builder.icmp_unsigned("==", fresh, _number(fresh, 0))
        pairs = builder.lshr(b_stride, _number(a, 3))  # of a vector over all of the sum axis, 8 to a word
        for n_rows in _choose(builder, rows, iter(code_rows(context))):
            a_rows = [_at(builder, a, (r, a_stride)) for r in range(n_rows)]
            own = []
            for r in range(n_rows):
                four = _number(a, 4 * r)
                own.append(
                    (
                        builder.add(_load(builder, builder.add(targets, _number(a, 8 * r)), a.type), column),
                        _broadcast(builder, _load(builder, builder.add(factors, four), _F32), _V_F32),
                        _broadcast(builder, _load(builder, builder.add(offsets, four), _F32), _V_F32),
                    )
                )

            def step(n_vectors: int, first: Any, tops: list[Any], a_rows: Any = a_rows, own: Any = own) -> list[Any]:
                """Some vectors from the first on; ``tops``: the largest values so far, and then."""
                places = [_at(builder, first, (v, _number(a, 1))) for v in range(n_vectors)]
                sources = [
                    (builder.add(b, builder.mul(nth, b_stride)), builder.add(first_pair, builder.mul(nth, pairs)))
                    for nth in places
                ]
                found = sums_of(context, builder, a_rows, sources, count, tops_plane, ahead)
                for nth, sums in zip(places, found, strict=True):
                    totals, scale_at = [builder.sitofp(x, _V_F32) for x in sums], builder.mul(nth, scale_step)
                    values = _scaled(context, builder, totals, own, per_lane, scale_at, scales, centres)
                    offset = builder.mul(nth, _number(a, VECTOR))
                    to = [builder.add(target, offset) for target, _, _ in own]
                    alone = builder.block
                    with builder.if_then(is_old):
                        added = [builder.fadd(_load(builder, at, _V_F32), x) for at, x in zip(to, values, strict=True)]
                        add = builder.block
                    values = _merge_arms(builder, alone, values, add, added)
                    for value, at in zip(values, to, strict=True):
                        builder.store(value, _pointer(builder, at, _V_F32)).align = 4
                    tops = [_larger(builder, top, value) for top, value in zip(tops, values, strict=True)]
                return tops

            before = builder.block
            with builder.if_then(has_tops):
                tops_at = [_load(builder, builder.add(largest, _number(a, 8 * r)), a.type) for r in range(n_rows)]
                kept = [_load(builder, at, _V_F32) for at in tops_at]
                loaded = builder.block
            largest_before = _merge_arms(builder, before, [_const(_V_F32, 0.0)] * n_rows, loaded, kept)
            two = n_rows in TWO_VECTORS and _IS_X86 and cpu_has(context, "avx512vnni")
            tops = _carry_through(builder, vectors, two, largest_before, step)
            with builder.if_then(has_tops):
                for r, value in enumerate(tops):
                    at = _load(builder, builder.add(largest, _number(a, 8 * r)), a.type)
                    builder.store(value, _pointer(builder, at, _V_F32)).align = 4

    body.__name__ = f"multiply_codes{bits}" if bits < 16 else "multiply_pairs"
    body.__doc__ = f"""target[r][v] += factors[r] * scales[v] * (sum of a[r][i] . b[v][i]) + offsets[r] * centres[v].

    a are pairs of int16 and b codes of {bits} bits, less the middle one, in words of 16 lanes (layout.py); of 16 bits is
    what ``take_apart8`` and its like have made of such codes. Sums are exact, in int32; the rest is float32. Arguments: a,
    its row stride, b, its vector stride, the plane of third bits and the place of the first pair in it (3 bits only), count
    (pairs), rows, vectors, the addresses of the rows' targets (int64), an offset of all targets, whether they are fresh (1:
    they count as 0), factors, offsets (float32, one a row), scales, centres (vectors), the step from one to the next (0:
    all are 1), the addresses of vectors that keep the largest values (int64, one a row; 0 for none), how far ahead of b
    cache lines are asked for (see ``_ask_for_next``).
    """
    return _operation(types.void, *[types.intp] * 19)(body)


multiply_codes8, multiply_codes4, multiply_codes3, multiply_codes2 = (_codes(bits) for bits in (8, 4, 3, 2))
multiply_pairs = _codes(16)


def _take_apart(bits: int) -> Any:
    per_word = 8 if bits == 3 else 16 // bits  # pairs

    def body(_: Any, builder: Any, codes: Any, tops_plane: Any, words: Any, target: Any) -> None:
        loop = _Loop(builder, words, 1, "word")
        vector = _load(builder, builder.add(codes, builder.mul(loop.i, _number(codes, VECTOR))), _V_I32)
        if bits == 3:
            top = builder.mul(builder.lshr(loop.i, _number(codes, 1)), _number(codes, VECTOR))
            shift = builder.mul(builder.and_(loop.i, _number(codes, 1)), _number(codes, 8))
            fields = _fields3(builder, vector, _load(builder, builder.add(tops_plane, top), _V_I32), shift)
        else:
            fields = _fields(builder, vector, bits)
        to = builder.add(target, builder.mul(loop.i, _number(target, VECTOR * per_word)))
        for i, field in enumerate(fields):
            at = builder.add(to, _number(to, VECTOR * i))
            builder.store(field(), _pointer(builder, at, _V_I32)).align = 4
        loop.turn([])

    body.__name__ = f"take_apart{bits}"
    body.__doc__ = f"""Codes of {bits} bits as pairs of int16, less the middle one, for ``multiply_pairs``.

    Arguments: the codes, the plane of third bits (3 bits only), vectors of words (1 or more), the target.
    """
    return _operation(types.void, *[types.intp] * 4)(body)


take_apart8, take_apart4, take_apart3, take_apart2 = (_take_apart(bits) for bits in (8, 4, 3, 2))


@_operation(types.int64)
def pairs_from(context: Any, builder: Any) -> Any:
    """From how many rows on it costs less to take codes apart once for all rows than for every few again."""
    return ir.Constant(ir.IntType(64), PAIRS_FROM if cpu_has(context, "avx512f") else PAIRS_FROM // 4)
