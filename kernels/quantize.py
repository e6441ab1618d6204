"""Storing tokens densely in a tile, and quantizing a dense tile. Called once a token and once a tile.

Asymmetric rounding: code = round((x - minimum) / scale), with the scale and minimum *as stored* in float16, so that what
rounding them costs is not paid twice.
"""

import numpy as np
from numpy.typing import NDArray

from .layout import DENSE_DTYPES, Q4, Q8, Bytes, TileLayout
from .simd import LANES

Float32 = NDArray[np.float32]
LARGEST_CODE = {Q8: 255, Q4: 15}


def store_rows(layout: TileLayout, tile: Bytes, first: int, k: Float32, v: Float32) -> None:
    """Write k, v (T, n_kv_heads, head_dim) as the tokens first .. first + T of a dense tile.

    Raises:
        OverflowError: a finite value that the tile's dtype cannot hold.

    """
    rows = np.arange(first, first + len(k))
    # The two index arrays stand around a slice, so NumPy puts their axis first: (T, n_kv_heads, head_dim), as k is.
    narrow_k, narrow_v = narrow(k, layout.k_kind), narrow(v, layout.v_kind)  # both, before either is written
    layout.dense_k(tile)[:, rows // LANES, : layout.head_dim, rows % LANES] = narrow_k
    layout.dense_v(tile)[:, rows, : layout.head_dim] = narrow_v.swapaxes(0, 1)


def narrow(x: Float32, kind: int) -> NDArray[np.generic]:
    """X in the dtype of a dense kind; OverflowError where a finite value would become infinite."""
    dtype = DENSE_DTYPES[kind]
    if dtype == np.float32:
        return x
    with np.errstate(over="ignore"):
        narrowed = x.astype(dtype)
    lost = np.isfinite(x) & ~np.isfinite(narrowed)
    if lost.any():
        raise OverflowError(f"{np.abs(x[lost]).max():.6g} is beyond the largest {dtype.name}")
    return narrowed


def quantize_tile(source: Bytes, dense: TileLayout, target: TileLayout, dead: int = 0) -> Bytes:
    """A new tile in the layout ``target`` from one in the layout ``dense``.

    Args:
        source: the dense tile, all of its tokens present.
        dense, target: layouts of the same heads, head_dim and tile.
        dead: how many of the first tokens no query will ever see (they are sinks); they do not widen K's range.

    Raises:
        OverflowError: a scale or minimum beyond float16.

    """
    tile = target.empty_tile()
    if target.k_kind in LARGEST_CODE:
        k = dense.dense_k(source).astype(np.float32)  # (Hkv, tile/16, width, 16)
        _write_k(target, target.k_heads(tile), k, dead)
    else:
        target.dense_k(tile)[...] = narrow(dense.dense_k(source).astype(np.float32), target.k_kind)
    if target.v_kind in LARGEST_CODE:
        v = dense.dense_v(source).astype(np.float32)
        v[..., target.head_dim :] = v[..., target.head_dim - 1 : target.head_dim]  # padding must not widen the range
        _write_v(target, target.v_heads(tile), v)
    else:
        target.dense_v(tile)[...] = narrow(dense.dense_v(source).astype(np.float32), target.v_kind)
    return tile


def _codes(x: Float32, low: Float32, high: Float32, kind: int) -> tuple[NDArray[np.uint8], Bytes, Bytes]:
    """Codes of x, and the scales and minima as float16 bytes; low and high broadcast against x."""
    with np.errstate(over="ignore"):
        scale = ((high - low) / LARGEST_CODE[kind]).astype(np.float16)
        minimum = low.astype(np.float16)
    if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
        raise OverflowError("a scale or minimum is beyond the largest float16, or not a number")
    step = scale.astype(np.float32)
    steps = np.divide(x - minimum.astype(np.float32), step, out=np.zeros_like(x), where=step > 0)
    codes = np.clip(np.rint(steps), 0, LARGEST_CODE[kind]).astype(np.uint8)
    return codes, np.ascontiguousarray(scale).view(np.uint8), np.ascontiguousarray(minimum).view(np.uint8)


def _write_k(layout: TileLayout, heads: Bytes, k: Float32, dead: int) -> None:
    """Codes of k (Hkv, tile/16, width, 16), one scale a channel."""
    live = (np.arange(layout.tile) >= dead).reshape(-1, 1, LANES)
    if dead >= layout.tile:
        low = high = np.zeros_like(k[:, :1, :, :1])
    else:
        low = np.where(live, k, np.inf).min(axis=(1, 3), keepdims=True).astype(np.float32)
        high = np.where(live, k, -np.inf).max(axis=(1, 3), keepdims=True).astype(np.float32)
    codes, scale, minimum = _codes(k, low, high, layout.k_kind)
    h, blocks = len(k), layout.tile // LANES
    if layout.k_kind == Q4:
        nibbles = codes.reshape(h, blocks, layout.width // 8, 2, 4, LANES)
        codes = nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << np.uint8(4)
    packed = codes.reshape(h, blocks, -1, 4, LANES).swapaxes(3, 4)
    _fill(heads, layout.k.params, packed, scale, minimum)


def _write_v(layout: TileLayout, heads: Bytes, v: Float32) -> None:
    """Codes of v (Hkv, tile, width), one scale a token and group of channels."""
    h, groups = len(v), layout.width // layout.v.group
    grouped = v.reshape(h, layout.tile, groups, layout.v.group).swapaxes(1, 2)  # (Hkv, groups, tile, group)
    codes, scale, minimum = _codes(
        grouped, grouped.min(axis=3, keepdims=True), grouped.max(axis=3, keepdims=True), layout.v_kind
    )
    codes = codes.swapaxes(1, 2).reshape(h, layout.tile, layout.width)
    if layout.v_kind == Q4:
        nibbles = codes.reshape(h, layout.tile // 8, 2, 4, layout.width)
        codes = nibbles[:, :, 0] | nibbles[:, :, 1] << np.uint8(4)
    packed = codes.reshape(h, -1, 4, layout.width // LANES, LANES).transpose(0, 1, 3, 4, 2)
    _fill(heads, layout.v.params, packed, scale, minimum)


def _fill(heads: Bytes, params: int, packed: NDArray[np.uint8], scale: Bytes, minimum: Bytes) -> None:
    """Write codes, scales and minima of every head one after the other."""
    heads[:, :params] = packed.reshape(len(heads), -1)
    half = (heads.shape[1] - params) // 2
    heads[:, params : params + half] = scale.reshape(len(heads), -1)
    heads[:, params + half :] = minimum.reshape(len(heads), -1)
