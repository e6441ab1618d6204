"""What the kernels are compared with, and how close they must come. Written from the documents, not from the kernels."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mixkv.kernels import Segment, empty_state, flash_attention, quantize
from mixkv.kernels.layout import BF16, F16, F32, K_PARAMS, KIND_OF_BITS, V_PARAMS, TileLayout
from mixkv.kernels.quantize import IMPOSSIBLE_AT, quantize_jobs, quantize_tile, store_rows
from mixkv.kernels.reference import reference_attention
from mixkv.kernels.segment import TileStore, seal_job, widen_as_found

# Largest difference from float64 for standard-normal q and k and scale 1/sqrt(D), by operation and type of the keys. The
# reference gets the very numbers that are stored, so what storing costs is no part of it. Outputs are relative to the
# largest |v| of the call, S to itself; M is absolute. "codes" is the integer route, whose factors have 16 bits; with
# precision="f32" codes are held to the bounds of "f32".
TOLERANCE = {
    ("out", "f32"): 1e-6,
    ("out", "f16"): 1e-6,
    ("out", "bf16"): 1e-6,
    ("out", "codes"): 3e-4,
    ("M", "any"): 5e-6,
    ("S", "any"): 5e-6,
    ("M", "codes"): 5e-4,
    ("S", "codes"): 5e-4,
}
MERGE = 1e-6  # absolute, for |v| <= 1: attention in pieces against attention in one
# Any logit is rounded to float32, so where |M| is large this much of it is added; and this much of a soft-cap, whose tanh
# is computed as 1 minus something.
ROUNDING = 2.0**-23

CODED = ("q8", "q4", "q3", "q2")
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
KINDS = (*DTYPES, *CODED)  # formats by their names; see ``Format``


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
    sliding_window: int | None = None,
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
    if sliding_window is not None:
        low = np.maximum(low, where - k_position - sliding_window + 1)
    slopes = np.array(alibi_slopes(h, max_bias)) if max_bias else None
    return reference_attention(q, k, v, start=low, stop=high, slopes=slopes, positions=where - k_position, **options)


def rounding_of_logits(M: np.ndarray, softcap: float = 0.0) -> float:
    """What float32 costs where logits are larger than standard-normal data makes them."""
    top = np.abs(M[np.isfinite(M)]).max(initial=0.0)
    return ROUNDING * ((2 * top if top > 16 else 0.0) + softcap)


def assert_attention(
    out: np.ndarray, state: np.ndarray, want: tuple[np.ndarray, ...], v: np.ndarray, kind: str, softcap: float = 0.0
) -> None:
    """Compare what the kernel found with (o, M, S) of the reference; ``kind`` is a type of keys or "codes"."""
    o, M, S = want
    more = rounding_of_logits(M, softcap)
    largest = np.abs(v).max(initial=0)
    of_state = "codes" if kind == "codes" else "any"
    assert out.dtype == state.dtype == np.float32
    np.testing.assert_allclose(out, o, rtol=0, atol=float(largest) * (TOLERANCE["out", kind] + more))
    np.testing.assert_allclose(state[..., 0], M, rtol=0, atol=TOLERANCE["M", of_state] + more)
    np.testing.assert_allclose(state[..., 1], S, rtol=TOLERANCE["S", of_state] + 2 * more, atol=0)


# --- The layout of tiles and pages, read back from the description in kernels/layout.py ---------------------------------


def padded_width(head_dim: int) -> int:
    width = 16
    while width < head_dim:
        width += 16
    return width


@dataclass(frozen=True)
class Format:
    """A format by its name: "f16"; "q4" as K is by channel and V by token; "q3c" by channel, "q3t" and "q3t16" by token."""

    kind: str
    side: str  # "k" or "v"

    @property
    def bits(self) -> int:
        return int(self.kind[1])

    @property
    def axis(self) -> str:
        letter = self.kind[2:3] or {"k": "c", "v": "t"}[self.side]
        return {"c": "channel", "t": "token"}[letter]

    @property
    def given_group(self) -> int:
        return int(self.kind[3:] or 0)

    def group(self, width: int) -> int:
        """Channels that share a scale by token: 64 at most, a multiple of 16 that divides; under 32, the whole width."""
        if self.given_group:
            return self.given_group
        return next((group for group in (64, 48, 32) if width % group == 0), width)

    def number(self) -> int:
        """What kernels/layout.py calls it."""
        return {"f32": F32, "f16": F16, "bf16": BF16}[self.kind] if self.kind in DTYPES else KIND_OF_BITS[self.bits]

    def pairs(self, tile: int, width: int) -> int:
        """Pairs (scale, minimum) of one head in one tile."""
        return width if self.axis == "channel" else tile * width // self.group(width)

    def sizes(self, tile: int, width: int) -> tuple[int, int]:
        """Bytes of one head in one tile: of scales and minima, and of codes or numbers."""
        values = tile * width
        if self.kind in DTYPES:
            return 0, values * DTYPES[self.kind].itemsize
        return 2 * 2 * self.pairs(tile, width), values * self.bits // 8

    def coded(self, raw: np.ndarray, tile: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes of one head, and the scale and minimum of each code; all float64 (tile, width)."""
        first_code, _ = self.sizes(tile, width)
        return self.coded_with(raw[:first_code].view(np.float16), raw[first_code:], tile, width)

    def coded_with(
        self, params: np.ndarray, codes: np.ndarray, tile: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of scales and minima, float16 or float32, and the bytes of codes."""
        params = params.astype(np.float64)
        lanes, steps = (tile, width) if self.side == "k" else (width, tile)
        scales_along_lanes = (self.side == "k") == (self.axis == "token")
        length = (self.group(width) if self.side == "k" else tile) if scales_along_lanes else steps
        halves = self.halves(codes, lanes * steps // 32).reshape(2, lanes // 16, steps // length, length // 2, 16)
        # What stands at [half][block][part][i][lane] is the code of lane 16 block + lane and step part * length + half *
        # length/2 + i.
        stored = halves.transpose(1, 4, 2, 0, 3).reshape(lanes, steps)
        middle = 2 ** (self.bits - 1)
        values = ((stored + middle) % 2**self.bits).astype(np.float64)  # stored is the code less the middle one
        values = values if self.side == "k" else values.T
        if self.axis == "channel":
            return values, *(np.repeat(x[None], tile, axis=0) for x in params.reshape(2, width))
        group = self.group(width)
        return values, *(np.repeat(x.T, group, axis=1) for x in params.reshape(2, width // group, tile))

    def halves(self, codes: np.ndarray, count: int) -> np.ndarray:
        """What is stored in the lower and in the upper halves of the words, unsigned: (2, count, 16 lanes)."""

        def plane(part: np.ndarray, bits: int) -> np.ndarray:
            words = part.view("<u2").reshape(-1, 16, 2).astype(np.int64)
            places = [(words >> (bits * i)) % 2**bits for i in range(16 // bits)]
            return np.stack(places, axis=1).reshape(count, 16, 2).transpose(2, 0, 1)

        if self.bits != 3:
            return plane(codes, self.bits)
        two_thirds = len(codes) // 3 * 2
        return plane(codes[:two_thirds], 2) + 4 * plane(codes[two_thirds:], 1)

    def read(self, raw: np.ndarray, tile: int, width: int) -> np.ndarray:
        """K or V of one head, float64 (tile, width): scales and minima come first, then codes."""
        if self.kind not in DTYPES:
            codes, scales, minima = self.coded(raw, tile, width)
            return codes * scales + minima
        numbers = raw.view(DTYPES[self.kind]).astype(np.float64)
        return numbers.reshape(tile, width) if self.side == "v" else numbers.reshape(width, tile).T


def formats(kinds: tuple[str, str]) -> tuple[Format, Format]:
    return Format(kinds[0], "k"), Format(kinds[1], "v")


def layout_of(kinds: tuple[str, str], tile: int, heads: int, head_dim: int, page_tiles: int = 1) -> TileLayout:
    """The layout that the package makes of two names."""
    k, v = formats(kinds)
    axes = [x.axis if x.kind not in DTYPES else "token" for x in (k, v)]
    groups = [x.given_group if x.kind not in DTYPES else 0 for x in (k, v)]
    return TileLayout(heads, head_dim, tile, k.number(), v.number(), *axes, *groups, page_tiles=page_tiles)


def part_sizes(kinds: tuple[str, str], tile: int, head_dim: int) -> tuple[int, int, int, int]:
    """Bytes of one head in one tile, in their order: scales and minima of K, its codes, those of V, its codes."""
    k, v = (x.sizes(tile, padded_width(head_dim)) for x in formats(kinds))
    return *k, *v


def part_offsets(
    kinds: tuple[str, str], tile: int, head_dim: int, page_tiles: int, head: int, slot: int
) -> tuple[int, int, int, int]:
    """Where these parts of one head of the tile in a slot begin in a page."""
    sizes = part_sizes(kinds, tile, head_dim)
    at, offsets = head * page_tiles * sum(sizes), []
    for size in sizes:
        offsets.append(at + slot * size)
        at += page_tiles * size
    return tuple(offsets)


def page_tile(page: np.ndarray, slot: int, kinds: tuple[str, str], tile: int, heads: int, head_dim: int) -> np.ndarray:
    """The bytes of the tile in a slot of a page, as a page of one tile has them."""
    assert page.dtype == np.uint8 and page.ndim == 1 and page.ctypes.data % 64 == 0
    sizes = part_sizes(kinds, tile, head_dim)
    page_tiles, rest = divmod(len(page), heads * sum(sizes))
    assert rest == 0 and 0 <= slot < page_tiles
    parts = []
    for head in range(heads):
        offsets = part_offsets(kinds, tile, head_dim, page_tiles, head, slot)
        parts += [page[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
    return np.concatenate(parts)


def head_parts(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, head_dim: int) -> tuple[list, list]:
    """The bytes of K, and those of V, of every head of a page of one tile; of each the scales and minima first."""
    sizes = part_sizes(kinds, tile, head_dim)
    k_size, size = sizes[0] + sizes[1], sum(sizes)
    assert len(raw) == heads * size
    rows = raw.reshape(heads, size)
    return [row[:k_size] for row in rows], [row[k_size:] for row in rows]


def read_tile(raw: np.ndarray, kinds: tuple[str, str], tile: int, heads: int, head_dim: int) -> tuple[Any, Any]:
    """K and V of a page of one tile, float64 (tile, Hkv, D)."""
    width = padded_width(head_dim)
    k_parts, v_parts = head_parts(raw, kinds, tile, heads, head_dim)
    k_format, v_format = formats(kinds)
    k = [k_format.read(part, tile, width) for part in k_parts]
    v = [v_format.read(part, tile, width) for part in v_parts]
    for values, kind in [*((x, kinds[0]) for x in k), *((x, kinds[1]) for x in v)]:
        if kind in DTYPES:
            np.testing.assert_array_equal(values[:, head_dim:], 0)
    return np.stack(k, axis=1)[..., :head_dim], np.stack(v, axis=1)[..., :head_dim]


def read_tiles(
    tiles: Sequence[np.ndarray], kinds: tuple[str, str], tile: int, heads: int, head_dim: int
) -> tuple[Any, Any]:
    """K and V of consecutive tiles, each as a page of one has it, float64 (N, Hkv, D)."""
    if not tiles:
        return np.zeros((0, heads, head_dim)), np.zeros((0, heads, head_dim))
    pairs = [read_tile(raw, kinds, tile, heads, head_dim) for raw in tiles]
    return np.concatenate([k for k, _ in pairs]), np.concatenate([v for _, v in pairs])


@dataclass(frozen=True)
class Row:
    """A tile by its row of a table of addresses, from which scales of float32 are found too (odd addresses)."""

    addresses: Sequence[int]  # of the first head: codes and scales of K, then of V
    kinds: tuple[str, str]
    tile: int
    heads: int
    head_dim: int
    page_tiles: int
    owner: Any  # of the memory

    @property
    def wide(self) -> tuple[bool, bool]:
        """Whether the scales of K, and those of V, are float32."""
        return self.addresses[K_PARAMS] % 2 == 1, self.addresses[V_PARAMS] % 2 == 1

    def parts(self, side: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and minima, and the bytes of codes or numbers, of one head of K (0) or V (1)."""
        sizes = part_sizes(self.kinds, self.tile, self.head_dim)
        offset = head * self.page_tiles * sum(sizes)
        codes, params = self.addresses[2 * side] + offset, self.addresses[2 * side + 1] + offset
        size, dtype = sizes[2 * side], np.float16
        if params % 2:
            params, size, dtype = params - 1, 2 * size, np.float32
        return bytes_at(params, size).view(dtype).copy(), bytes_at(codes, sizes[2 * side + 1]).copy()

    def coded(self, side: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes and the scale and minimum of each, all float64 (tile, head_dim)."""
        form, width = formats(self.kinds)[side], padded_width(self.head_dim)
        found = form.coded_with(*self.parts(side, head), self.tile, width)
        return tuple(x[:, : self.head_dim] for x in found)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """K and V, float64 (tile, Hkv, D)."""
        both = []
        for side, form in enumerate(formats(self.kinds)):
            heads = []
            for head in range(self.heads):
                if form.kind in DTYPES:
                    heads.append(form.read(self.parts(side, head)[1], self.tile, padded_width(self.head_dim)))
                else:
                    codes, scales, minima = self.coded(side, head)
                    heads.append(codes * scales + minima)
            both.append(np.stack(heads, axis=1)[..., : self.head_dim])
        return both[0], both[1]


def bytes_at(address: int, nbytes: int) -> np.ndarray:
    """Memory at an address, uint8, as it is now and to be written to."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(int(address)), np.uint8)


def store_row(store: TileStore, kinds: tuple[str, str], tile: int) -> Row:
    """A tile that a store holds."""
    layout = store.layout
    shape = kinds, layout.tile, layout.n_kv_heads, layout.head_dim, layout.page_tiles
    return Row(store.row(tile).tolist(), *shape, store)


def dense_store(k: np.ndarray, v: np.ndarray, kind: str = "f32", tile: int = 64) -> TileStore:
    """k, v (N, Hkv, D), N a multiple of the tile, as numbers, a page a tile."""
    store = TileStore(layout_of((kind, kind), tile, *k.shape[1:]))
    for first in range(0, len(k), tile):
        store_rows(store.layout, store.place(store.stop)[0], 0, k[first : first + tile], v[first : first + tile])
        store.append()
    return store


def seal(
    source: TileStore, kinds: tuple[str, str], dead: int = 0, page_tiles: int = 0, fitted: bool = False
) -> TileStore:
    """All tiles of a store in the formats ``kinds``, with scales of float32 where they have to be; OverflowError."""
    layout = source.layout
    target = TileStore(
        layout_of(kinds, layout.tile, layout.n_kv_heads, layout.head_dim, page_tiles or 512 // layout.tile)
    )
    for t in range(source.first, source.stop):
        target.append()
        for _ in range(2):
            jobs = np.array([seal_job(source, target, t, dead if t == 0 else 0, fitted)])
            quantize_jobs(jobs, target.layout)
            if jobs[0, IMPOSSIBLE_AT:].any():
                raise OverflowError
            if not widen_as_found(target, t, jobs[0]):
                break
        else:
            raise AssertionError("a second time was not enough")
    return target


def make_store(
    k: np.ndarray, v: np.ndarray, kinds: tuple[str, str], tile: int = 64, dead: int = 0, page_tiles: int = 0
) -> TileStore:
    """k, v (N, Hkv, D), N a multiple of the tile, stored in the formats ``kinds``, in pages of 512 unless told."""
    n, heads, head_dim = k.shape
    dense = TileLayout(heads, head_dim, tile, F32, F32)
    target = layout_of(kinds, tile, heads, head_dim, page_tiles or 512 // tile)
    store = TileStore(target)
    for first in range(0, n, tile):
        source = dense.empty_page()
        store_rows(dense, source, 0, k[first : first + tile], v[first : first + tile])
        page, slot = store.place(store.stop)
        assert quantize_tile(source, dense, target, dead if first == 0 else 0, page, slot) is page
        store.append()
    return store


def store_tiles(store: TileStore, kinds: tuple[str, str]) -> list[np.ndarray]:
    """Every tile that a store holds, as a page of one has it."""
    layout = store.layout
    return [
        page_tile(*store.place(t), kinds, layout.tile, layout.n_kv_heads, layout.head_dim)
        for t in range(store.first, store.stop)
    ]


def read_store(store: TileStore, kinds: tuple[str, str]) -> tuple[Any, Any]:
    """K and V of all tiles that a store holds, float64 (N, Hkv, D)."""
    pairs = [store_row(store, kinds, t).read() for t in range(store.first, store.stop)]
    return np.concatenate([k for k, _ in pairs]), np.concatenate([v for _, v in pairs])


def segment_tiles(segment: Segment, kinds: tuple[str, str], tile: int) -> list[np.ndarray]:
    """The tiles of a segment made by ``quantize``, in pages of 512 positions, each as a page of one has it."""
    page_tiles, heads, head_dim = 512 // tile, segment.n_kv_heads, segment.head_dim
    return [
        page_tile(segment.owner[t // page_tiles], t % page_tiles, kinds, tile, heads, head_dim)
        for t in range(-(-segment.stop // tile))
    ]


def read_segment(segment: Segment, kinds: tuple[str, str], tile: int) -> tuple[Any, Any]:
    """K and V of a segment made by ``quantize``, float64 (N, Hkv, D)."""
    pairs = [row.read() for row in segment_rows(segment, kinds, tile)]
    if not pairs:
        return read_tiles([], kinds, tile, segment.n_kv_heads, segment.head_dim)
    k, v = (np.concatenate(x) for x in zip(*pairs, strict=True))
    return k[: segment.stop], v[: segment.stop]


def segment_rows(segment: Segment, kinds: tuple[str, str], tile: int) -> list[Row]:
    """The tiles of a segment made by ``quantize``, by their addresses."""
    shape = kinds, tile, segment.n_kv_heads, segment.head_dim, 512 // tile, segment.owner
    return [Row(segment.table[t].tolist(), *shape) for t in range(-(-segment.stop // tile))]


# --- A call and what it must give ----------------------------------------------------------------------------------------


def check(q: np.ndarray, keys: tuple, stored: tuple, kind: str, **options: object) -> None:
    """``flash_attention`` over ``keys`` against the reference over the numbers that are ``stored``.

    Coded keys are held to the bounds of the integer route, and once more, in float32, to those of float32.
    """
    want = expected(q, *stored, **options)
    softcap = float(options.get("softcap", 0.0))
    for precision in ("default", "f32") if kind not in DTYPES else ("default",):
        state, out = empty_state(q.shape[1], q.shape[0]), np.full_like(q, np.nan)
        flash_attention(q, *keys, state=state, out=out, precision=precision, **options)
        bounds = kind if kind in DTYPES else "codes" if precision == "default" else "f32"
        assert_attention(out, state, want, stored[1], bounds, softcap)


def dense(rng: np.random.Generator, n: int, heads: int, d: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return normal(rng, n, heads, d).astype(DTYPES[kind]), normal(rng, n, heads, d).astype(DTYPES[kind])


def quantize_as(kinds: tuple[str, str], k: np.ndarray, v: np.ndarray, tile: int = 64) -> Segment:
    """``quantize`` with the arguments that two names stand for."""
    k_format, v_format = formats(kinds)
    return quantize(
        k, v, tile=tile, k_bits=k_format.bits, v_bits=v_format.bits, k_axis=k_format.axis, v_axis=v_format.axis,
        k_group=k_format.given_group, v_group=v_format.given_group,
    )  # fmt: skip


def make_keys(rng: np.random.Generator, n: int, heads: int, d: int, kind: str, tile: int = 64) -> tuple[tuple, tuple]:
    """(what the kernel gets, what it must make of it)."""
    if kind in DTYPES:
        pair = dense(rng, n, heads, d, kind)
        return pair, tuple(x.astype(np.float64) for x in pair)
    segment = quantize_as((kind, kind), normal(rng, n, heads, d), normal(rng, n, heads, d), tile)
    return (segment,), read_segment(segment, (kind, kind), tile)
