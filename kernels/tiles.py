"""Reading a tile: from any format into a small float32 buffer that stays in the first-level cache.

K becomes [tile/16][width][16 tokens], V becomes [width/16][tile][16 channels]: in both, one vector a step of the product
that follows (see attention.py). It is done once for all query heads of a KV head and for all queries of a block.
"""

from . import simd
from .jit import inner
from .layout import BF16, F16, F32, Q4
from .simd import LANES

VECTOR = 4 * LANES  # bytes of a vector of float32


@inner
def _load(kind, address):  # type: ignore[no-untyped-def]
    """16 dense numbers of any kind, as float32."""
    if kind == F32:
        return simd.load_f32(address)
    if kind == F16:
        return simd.load_f16(address)
    return simd.load_bf16(address)


@inner
def _number_bytes(kind):  # type: ignore[no-untyped-def]
    return 4 if kind == F32 else 2


@inner
def _widen_halves(source, target, count):  # type: ignore[no-untyped-def]
    """Convert ``count`` float16 (a multiple of 16) to float32."""
    for i in range(0, count, LANES):
        simd.store_f32(target + 4 * i, simd.load_f16(source + 2 * i))


@inner
def unpack_k(base, kind, row_stride, params, width, first, stop, buffer, scratch):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of K at address ``base`` into ``buffer`` [tile/16][width][16 tokens], as float32.

    Lanes of a block of 16 that lie outside are undefined: nothing may read them. ``scratch`` has room for 2 * width floats.
    """
    if row_stride:
        _transpose_rows(base, kind, row_stride, width, first, stop, buffer, scratch)
    elif kind in (F32, F16, BF16):
        size = _number_bytes(kind)
        for i in range(first // LANES * width, (stop + LANES - 1) // LANES * width):
            simd.store_f32(buffer + i * VECTOR, _load(kind, base + i * LANES * size))
    else:
        _widen_halves(base + params, scratch, 2 * width)
        for block in range(first // LANES, (stop + LANES - 1) // LANES):
            _unpack_k_block(base, kind, width, block, buffer + block * width * VECTOR, scratch)


@inner
def _unpack_k_block(base, kind, width, block, buffer, scratch):  # type: ignore[no-untyped-def]
    """16 tokens of coded K: the codes of a channel are one byte or nibble of every word."""
    minima = scratch + 4 * width
    nibbles = 1 if kind == Q4 else 0
    per_word = 8 if kind == Q4 else 4
    for i in range(width // per_word):
        words = simd.load_words(base + (block * (width // per_word) + i) * VECTOR)
        for half in range(1 + nibbles):
            for b in range(4):
                c = i * per_word + half * 4 + b
                code = simd.bits_to_float(words, 8 * b + 4 * half, 15 if nibbles else 255)
                value = simd.fma(code, simd.splat_at(scratch + 4 * c), simd.splat_at(minima + 4 * c))
                simd.store_f32(buffer + c * VECTOR, value)


@inner
def _transpose_rows(base, kind, row_stride, width, first, stop, buffer, scratch):  # type: ignore[no-untyped-def]
    """K that lies token after token, turned so that tokens are side by side."""
    size = _number_bytes(kind)
    for token in range(first, stop):
        lane = buffer + (token // LANES * width * LANES + token % LANES) * 4
        for c in range(0, width, LANES):
            simd.store_f32(scratch, _load(kind, base + token * row_stride + c * size))
            for i in range(LANES):
                simd.store_scalar(lane + (c + i) * VECTOR, simd.scalar_at(scratch + 4 * i))


@inner
def unpack_v(base, kind, row_stride, params, group, width, tile, first, stop, buffer, scratch):  # type: ignore[no-untyped-def]
    """Tokens first .. stop of V at address ``base`` into ``buffer`` [width/16][tile][16 channels], as float32.

    Coded tokens are unpacked by whole words: up to 7 before ``first`` and after ``stop`` come along.
    ``scratch`` has room for 2 * tile * (width / group) floats.
    """
    if row_stride:
        size = _number_bytes(kind)
        for token in range(first, stop):
            for c in range(0, width, LANES):
                value = _load(kind, base + token * row_stride + c * size)
                simd.store_f32(buffer + (c // LANES * tile + token) * VECTOR, value)
    else:
        _widen_halves(base + params, scratch, 2 * tile * (width // group))
        per_word = 8 if kind == Q4 else 4
        for block in range(first // per_word, (stop + per_word - 1) // per_word):
            _unpack_v_block(base, kind, group, width, tile, block, per_word, buffer, scratch)


@inner
def _unpack_v_block(base, kind, group, width, tile, block, per_word, buffer, scratch):  # type: ignore[no-untyped-def]
    """4 or 8 tokens of coded V: the codes of a token are one byte or nibble of every word."""
    minima = 4 * tile * (width // group)
    for vector in range(width // LANES):
        words = simd.load_words(base + (block * (width // LANES) + vector) * VECTOR)
        scales = scratch + 4 * (vector * LANES // group * tile)
        for j in range(per_word):
            token = block * per_word + j
            shift = 8 * (j % 4) + 4 * (j // 4)
            code = simd.bits_to_float(words, shift, 15 if kind == Q4 else 255)
            value = simd.fma(code, simd.splat_at(scales + 4 * token), simd.splat_at(scales + minima + 4 * token))
            simd.store_f32(buffer + (vector * tile + token) * VECTOR, value)
