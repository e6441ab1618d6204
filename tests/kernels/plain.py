"""A plain quantizer in NumPy, and what is the same, and how near, in the tiles that the kernels make."""

import numpy as np

from .oracle import Format, Row, formats, padded_width

Codes = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, and the scale and minimum of each, all (tile, D)

SUBNORMAL, COARSEST = 2.0**-24, 2.0**-18  # float16's smallest step, and where it would cost more than 1/64 of a scale


def stored_scale(scale: np.ndarray) -> np.ndarray:
    """Float32 as float16 stores a scale: to the nearest, but up where float16 has nothing but steps of 2^-24."""
    with np.errstate(over="ignore"):
        nearest = scale.astype(np.float16)
    up = (np.ceil(scale.astype(np.float64) / SUBNORMAL) * SUBNORMAL).astype(np.float16)
    return np.where(scale < 2.0**-14, up, nearest).astype(np.float32)


def needs_float32(x: np.ndarray, form: Format, dead: int = 0) -> bool:
    """Whether the scales of X (tile, Hkv, D) do not fit float16: those of any head are beyond it, or all too small."""
    for head in range(x.shape[1]):
        _, scales, minima = plain(x[:, head], form, dead, wide=True)
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16), minima.astype(np.float16)
        if np.isinf(halves).any() or 0 < scales.max() < COARSEST:
            return True
    return False


def plain(x: np.ndarray, form: Format, dead: int = 0, wide: bool = False) -> Codes:
    """X (tile, D) in codes: scale and minimum of a group's live values as float16, or as ``wide``, then the nearest code.

    Single precision up to the code, as the kernel does it: whether 6.5 steps become 6 or 7 must not depend on us.
    """
    tile, d = x.shape
    dead = dead if dead < tile else 0
    largest = np.float32(2**form.bits - 1)
    parts = [slice(c, c + 1) for c in range(d)]
    if form.axis == "token":
        group = form.group(padded_width(d))
        parts = [slice(first, min(first + group, d)) for first in range(0, d, group)]
    found = np.zeros((3, tile, d), np.float32)
    for part in parts:
        low, high = x[:, part].min(axis=1, keepdims=True), x[:, part].max(axis=1, keepdims=True)
        if form.axis == "channel":
            low, high = x[dead:, part].min(axis=0), x[dead:, part].max(axis=0)
        scale, minimum = (high - low) / largest, low
        if not wide:
            scale, minimum = stored_scale(scale), low.astype(np.float16).astype(np.float32)
        steps = (x[:, part] - minimum) / np.where(scale == 0, np.float32(np.inf), scale)
        found[0][:, part] = np.clip(np.rint(steps), 0, largest)
        found[1][:, part], found[2][:, part] = scale, minimum
    return tuple(found.astype(np.float64))


def check_row(k: np.ndarray, v: np.ndarray, row: Row, dead: int = 0) -> None:
    """The same of a tile whose scales are float16 or float32, whichever it needs."""
    found = tuple([row.coded(side, head) for head in range(row.heads)] for side in (0, 1))
    check_sides(k, v, row.kinds, found, row.wide, dead)


def check_sides(
    k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], found: tuple, wide: tuple[bool, bool], dead: int
) -> None:  # fmt: skip
    tile, heads, _ = k.shape
    for x, form, own, is_wide in zip((k, v), formats(kinds), found, wide, strict=True):
        assert is_wide == needs_float32(x, form, dead)
        for h in range(heads):
            for part, wanted in zip(own[h], plain(x[:, h], form, dead, is_wide), strict=True):
                np.testing.assert_array_equal(part, wanted)
            live = slice(dead if form.axis == "channel" and dead < tile else 0, None)
            assert_within_half_a_step(x[live, h], *(part[live] for part in own[h]), 2**form.bits - 1, is_wide)


def rounding(x: np.ndarray, wide: bool) -> np.ndarray:
    """The most that storing x in float16 (or float32) changes it: half a step, or half of the smallest subnormal."""
    return np.maximum(np.abs(x) * 2.0**-24, 2.0**-150) if wide else np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)


def assert_within_half_a_step(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, largest: int, wide: bool = False
) -> None:
    """Half a stored step; at the ends of the range also what rounding the scale and the minimum cut off."""
    error = np.abs(codes * scales + minima - x)
    bound = scales / 2 + largest * rounding(scales, wide) + rounding(minima, wide) + 2.0**-22 * np.abs(x)
    assert (error <= bound).all(), f"{(error - bound).max()} beyond the bound"
    inside = (codes > 0) & (codes < largest)
    assert (error[inside] <= (scales / 2 + 2.0**-22 * (np.abs(x) + np.abs(minima)))[inside]).all()
