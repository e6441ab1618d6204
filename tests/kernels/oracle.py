"""What the kernels are compared with, and how close they must come. Written from the documents, not from the kernels."""

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mixkv.kernels import Segment, empty_state, flash_attention, quantize
from mixkv.kernels.layout import BF16, F16, F32, Q4, Q8, TileLayout
from mixkv.kernels.quantize import quantize_tile, store_rows
from mixkv.kernels.reference import reference_attention
from mixkv.kernels.segment import TileStore

# Largest difference from float64 for standard-normal q and k and scale 1/sqrt(D), by operation and type of the keys. The
# reference gets the very numbers that are stored, so what storing costs is no part of it. Outputs are relative to the
# largest |v| of the call, S to itself; M is absolute.
TOLERANCE = {
    ("out", "f32"): 1e-6,
    ("out", "f16"): 1e-6,
    ("out", "bf16"): 1e-6,
    ("out", "q8"): 1e-6,
    ("out", "q4"): 1e-6,
    ("M", "any"): 5e-6,
    ("S", "any"): 5e-6,
}
MERGE = 1e-6  # absolute, for |v| <= 1: attention in pieces against attention in one
# Any logit is rounded to float32, so where |M| is large this much of it is added; and this much of a soft-cap, whose tanh
# is computed as 1 minus something.
ROUNDING = 2.0**-23

KINDS = {"f32": F32, "f16": F16, "bf16": BF16, "q8": Q8, "q4": Q4}
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def alibi_slopes(n_heads: int, max_bias: float = 8.0) -> list[float]:
    """The slopes as the paper's authors compute them, by recursion on the number of heads."""
    power = 2 ** math.floor(math.log2(n_heads))
    first = 2.0 ** (-max_bias / power)
    slopes = [first ** (i + 1) for i in range(power)]
    if power == n_heads:
        return slopes
    return slopes + alibi_slopes(2 * power, max_bias)[0::2][: n_heads - power]


def expected(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    start: Any = None,
    stop: Any = None,
    max_bias: float = 0.0,
    positions: Any = None,
    k_position: int = 0,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(o, M, S) in float64 for the arguments of ``flash_attention``."""
    t, h, _ = q.shape
    n = len(k)
    where = np.arange(t) + k_position + n - t if positions is None else np.broadcast_to(positions, (t,))
    low = np.broadcast_to(0 if start is None else start, (t,))
    high = np.broadcast_to(n if stop is None else stop, (t,))
    if causal:
        high = np.minimum(high, where - k_position + 1)
    slopes = np.array(alibi_slopes(h, max_bias)) if max_bias else None
    return reference_attention(q, k, v, start=low, stop=high, slopes=slopes, positions=where - k_position, **options)


def rounding_of_logits(M: np.ndarray, softcap: float = 0.0) -> float:
    """What float32 costs where logits are larger than standard-normal data makes them."""
    top = np.abs(M[np.isfinite(M)]).max(initial=0.0)
    return ROUNDING * ((2 * top if top > 16 else 0.0) + softcap)


def assert_attention(
    out: np.ndarray, state: np.ndarray, want: tuple[np.ndarray, ...], v: np.ndarray, kind: str, softcap: float = 0.0
) -> None:
    """Compare what the kernel found with (o, M, S) of the reference."""
    o, M, S = want
    more = rounding_of_logits(M, softcap)
    largest = np.abs(v).max(initial=0)
    assert out.dtype == state.dtype == np.float32
    np.testing.assert_allclose(out, o, rtol=0, atol=float(largest) * (TOLERANCE["out", kind] + more))
    np.testing.assert_allclose(state[..., 0], M, rtol=0, atol=TOLERANCE["M", "any"] + more)
    np.testing.assert_allclose(state[..., 1], S, rtol=TOLERANCE["S", "any"] + 2 * more, atol=0)


# --- The layout of a tile, read back from the description in kernels/layout.py -----------------------------------------


def padded_width(head_dim: int) -> int:
    width = 16
    while width < head_dim:
        width += 16
    return width


def v_group(width: int) -> int:
    """Channels that share a scale in V: 64 at most, a multiple of 16 that divides; under 32, the whole width."""
    for group in (64, 48, 32):
        if width % group == 0:
            return group
    return width


def part_bytes(kind: str, side: str, tile: int, width: int) -> int:
    """Bytes of K or V of one head in one tile."""
    values = tile * width
    if kind in DTYPES:
        return values * DTYPES[kind].itemsize
    pairs = width if side == "k" else tile * width // v_group(width)
    return (values if kind == "q8" else values // 2) + 2 * 2 * pairs


def read_k(raw: np.ndarray, kind: str, tile: int, width: int) -> np.ndarray:
    """K of one head, float64 (tile, width)."""
    if kind in DTYPES:
        values = np.zeros((tile, width))
        blocks = raw.view(DTYPES[kind]).reshape(tile // 16, width, 16)
        for block in range(tile // 16):
            for channel in range(width):
                values[16 * block : 16 * block + 16, channel] = blocks[block, channel]
        return values
    codes, scales, minima = k_codes(raw, kind, tile, width)
    return codes * scales + minima


def k_codes(raw: np.ndarray, kind: str, tile: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of K of one head (tile, width), and its scales and minima (width,); all float64."""
    values = np.zeros((tile, width))
    per_word = 4 if kind == "q8" else 8
    codes = raw[: len(raw) - 4 * width].reshape(tile // 16, width // per_word, 16, 4)
    for block in range(tile // 16):
        tokens = slice(16 * block, 16 * block + 16)
        for i in range(width // per_word):
            for b in range(4):
                if kind == "q8":
                    values[tokens, 4 * i + b] = codes[block, i, :, b]
                else:
                    values[tokens, 8 * i + b] = codes[block, i, :, b] % 16
                    values[tokens, 8 * i + 4 + b] = codes[block, i, :, b] // 16
    scales, minima = raw[len(raw) - 4 * width :].view(np.float16).astype(np.float64).reshape(2, width)
    return values, scales, minima


def read_v(raw: np.ndarray, kind: str, tile: int, width: int) -> np.ndarray:
    """V of one head, float64 (tile, width)."""
    if kind in DTYPES:
        return raw.view(DTYPES[kind]).reshape(tile, width).astype(np.float64)
    codes, scales, minima = v_codes(raw, kind, tile, width)
    return codes * scales + minima


def v_codes(raw: np.ndarray, kind: str, tile: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of V of one head, and the scale and minimum of each code; all float64 (tile, width)."""
    values = np.zeros((tile, width))
    group = v_group(width)
    pairs = 2 * 2 * tile * (width // group)
    per_word = 4 if kind == "q8" else 8
    codes = raw[: len(raw) - pairs].reshape(tile // per_word, width // 16, 16, 4)
    for i in range(tile // per_word):
        for c in range(width // 16):
            channels = slice(16 * c, 16 * c + 16)
            for b in range(4):
                if kind == "q8":
                    values[4 * i + b, channels] = codes[i, c, :, b]
                else:
                    values[8 * i + b, channels] = codes[i, c, :, b] % 16
                    values[8 * i + 4 + b, channels] = codes[i, c, :, b] // 16
    scales, minima = raw[len(raw) - pairs :].view(np.float16).astype(np.float64).reshape(2, width // group, tile)
    return values, *(np.repeat(pairs.T, group, axis=1) for pairs in (scales, minima))


def head_parts(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, head_dim: int) -> tuple[list, list]:
    """The bytes of K, and those of V, of every head in one tile."""
    width = padded_width(head_dim)
    k_size, v_size = part_bytes(kinds[0], "k", tile, width), part_bytes(kinds[1], "v", tile, width)
    v_offset = math.ceil(k_size * heads / 64) * 64
    assert len(raw) == v_offset + v_size * heads and raw.ctypes.data % 64 == 0
    assert not raw[k_size * heads : v_offset].any()
    k = [raw[h * k_size : (h + 1) * k_size] for h in range(heads)]
    return k, [raw[v_offset + h * v_size : v_offset + (h + 1) * v_size] for h in range(heads)]


def read_tile(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, head_dim: int) -> tuple[Any, Any]:
    """K and V of one tile, float64 (tile, Hkv, D): first K of every head, then V, from a 64-byte boundary on."""
    width = padded_width(head_dim)
    k_parts, v_parts = head_parts(raw, kinds, tile, heads, head_dim)
    k = [read_k(part, kinds[0], tile, width) for part in k_parts]
    v = [read_v(part, kinds[1], tile, width) for part in v_parts]
    for values in (*k, *(v if kinds[1] in DTYPES else ())):
        np.testing.assert_array_equal(values[:, head_dim:], 0)
    return np.stack(k, axis=1)[..., :head_dim], np.stack(v, axis=1)[..., :head_dim]


def read_tiles(
    tiles: Sequence[np.ndarray], kinds: tuple[str, str], tile: int, heads: int, head_dim: int
) -> tuple[Any, Any]:
    """K and V of consecutive tiles, float64 (N, Hkv, D)."""
    if not tiles:
        return np.zeros((0, heads, head_dim)), np.zeros((0, heads, head_dim))
    pairs = [read_tile(raw, kinds, tile, heads, head_dim) for raw in tiles]
    return np.concatenate([k for k, _ in pairs]), np.concatenate([v for _, v in pairs])


def make_store(k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], tile: int = 64, dead: int = 0) -> TileStore:
    """k, v (N, Hkv, D), N a multiple of the tile, stored in the formats ``kinds``."""
    n, heads, head_dim = k.shape
    dense = TileLayout(heads, head_dim, tile, F32, F32)
    target = TileLayout(heads, head_dim, tile, KINDS[kinds[0]], KINDS[kinds[1]])
    store = TileStore(target)
    for first in range(0, n, tile):
        source = dense.empty_tile()
        store_rows(dense, source, 0, k[first : first + tile], v[first : first + tile])
        store.append(quantize_tile(source, dense, target, dead if first == 0 else 0))
    return store


def read_segment(segment: Segment, bits: tuple[int, int], tile: int) -> tuple[Any, Any]:
    """K and V of a segment made by ``quantize``, float64 (N, Hkv, D)."""
    kinds = (f"q{bits[0]}", f"q{bits[1]}")
    k, v = read_tiles(segment.owner, kinds, tile, segment.n_kv_heads, segment.head_dim)
    return k[: segment.stop], v[: segment.stop]


# --- A call and what it must give ----------------------------------------------------------------------------------------


def check(q: np.ndarray, keys: tuple, stored: tuple, kind: str, **options: object) -> None:
    """``flash_attention`` over ``keys`` against the reference over the numbers that are ``stored``."""
    state, out = empty_state(q.shape[1], q.shape[0]), np.full_like(q, np.nan)
    flash_attention(q, *keys, state=state, out=out, **options)
    softcap = float(options.get("softcap", 0.0))
    assert_attention(out, state, expected(q, *stored, **options), stored[1], kind, softcap)


def dense(rng: np.random.Generator, n: int, heads: int, d: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return normal(rng, n, heads, d).astype(DTYPES[kind]), normal(rng, n, heads, d).astype(DTYPES[kind])


def make_keys(rng: np.random.Generator, n: int, heads: int, d: int, kind: str, tile: int = 64) -> tuple[tuple, tuple]:
    """(what the kernel gets, what it must make of it)."""
    if kind in DTYPES:
        pair = dense(rng, n, heads, d, kind)
        return pair, tuple(x.astype(np.float64) for x in pair)
    bits = int(kind[1:])
    segment = quantize(normal(rng, n, heads, d), normal(rng, n, heads, d), k_bits=bits, v_bits=bits, tile=tile)
    return (segment,), read_segment(segment, (bits, bits), tile)
