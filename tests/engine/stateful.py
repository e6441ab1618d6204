"""What the stateful test of sessions draws and compares with: policies, a stub model, and a plain model of a cache."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkv.engine.cache import Cache
from mixkv.engine.layer import LayerCache
from mixkv.engine.policy import CachePolicy, Override, Tier
from mixkv.kernels.hadamard import rotated
from mixkv.kernels.segment import TileStore
from mixkv.models.transformer import Softmax, Step

from ..kernels.oracle import DTYPES, Format, store_row
from ..kernels.plain import plain

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

BITS, DENSE_TYPES, TILES = (2, 3, 4, 8, 16, 32), ("f16", "bf16", "f32"), (32, 64, 128)
HEAD_DIMS = (16, 20, 32, 48, 64)
VOCAB, LIMIT = 997, 5000
SMALL, LARGE = 2.0**-21, 2.0**18  # sizes of numbers whose scales float16 does not hold, or not well
# As in test_cache_oracle.py, where they are explained
TOLERANCE, CODES, CODES_A_LOGIT = 2e-5, 5e-4, 2.0**-14


# --- what is drawn ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a model; ``sizes`` of its keys and of its values."""

    layers: int
    kv_heads: int
    n_rep: int
    head_dim: int
    windows: tuple[int | None, ...]
    sizes: tuple[float, float]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    layers = draw(st.integers(2, 3))
    window = st.sampled_from([None, None, 1, 17, 40, 64, 100, 150, 300])
    return Shape(
        layers, draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from(HEAD_DIMS)),
        tuple(draw(window) for _ in range(layers)) if draw(st.booleans()) else (None,) * layers,
        (draw(st.sampled_from([1.0, 1.0, 1.0, SMALL])), draw(st.sampled_from([1.0, 1.0, 1.0, SMALL, LARGE]))),
    )  # fmt: skip


@st.composite
def side_formats(draw: st.DrawFn, name: str, head_dim: int, bits: tuple[int, ...]) -> dict[str, Any]:
    """Bits, axis and group of K or of V."""
    own: dict[str, Any] = {f"{name}_bits": draw(st.sampled_from(bits))}
    if own[f"{name}_bits"] < 16:
        axis = own[f"{name}_axis"] = draw(st.sampled_from(["channel", "token"]))
        width = -(-head_dim // 16) * 16
        if axis == "token":
            own[f"{name}_group"] = draw(st.sampled_from([0, *(g for g in range(16, width + 1, 16) if width % g == 0)]))
    return own


@st.composite
def older_tiers(draw: st.DrawFn, window: int, head_dim: int, bits: tuple[int, ...]) -> tuple[Tier, ...]:
    after, tiers = window, []
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        after += draw(st.sampled_from([1, 5, 32, 50, 64, 100]))
        tiers.append(
            Tier(after, **draw(side_formats("k", head_dim, bits)), **draw(side_formats("v", head_dim, bits)))
        )  # fmt: skip
    return tuple(tiers)


@st.composite
def policies(draw: st.DrawFn, shape: Shape) -> CachePolicy:
    """Policies for a model: every field, tiers, and overrides, such that its numbers do not leave their types."""
    dense = draw(st.sampled_from(["bf16", "f32"] if LARGE in shape.sizes else DENSE_TYPES))
    bits = tuple(b for b in BITS if b != 16) if LARGE in shape.sizes and dense == "f32" else BITS
    windows = st.one_of(st.integers(0, 8), st.integers(0, 70), st.integers(0, 200))

    def aged() -> dict[str, Any]:
        window = draw(windows)
        return {"window": window, "older": draw(older_tiers(window, shape.head_dim, bits))}

    fields: dict[str, Any] = {
        "sinks": draw(st.integers(0, 8)), "tile": draw(st.sampled_from(TILES)), "dense": dense,
        "rotate_k": draw(st.booleans()), "rotate_v": draw(st.booleans()), "scales": draw(st.sampled_from(["fit", "range"])),
        "rollback": draw(st.one_of(st.just(0), st.integers(0, 100))), **aged(),
        **draw(side_formats("k", shape.head_dim, bits)), **draw(side_formats("v", shape.head_dim, bits)),
    }  # fmt: skip
    overrides = []
    for layers in draw(st.lists(st.sampled_from(["0", "1", "-1", "0..1", "-2..-1", "0+-1"]), max_size=2)):
        usual = {"k_bits": 4, "k_axis": "channel", "k_group": 0, "v_bits": 4, "v_axis": "token", "v_group": 0}
        own: dict[str, Any] = {}
        for part in draw(st.sets(st.integers(0, 4), min_size=1, max_size=3)):
            if part == 0:
                own |= (
                    usual
                    | draw(side_formats("k", shape.head_dim, bits))
                    | draw(side_formats("v", shape.head_dim, bits))
                )
            elif part == 1:
                own |= aged()
            elif part == 2:
                own["tile"] = draw(st.sampled_from(TILES))
            elif part == 3:
                own |= {"sinks": draw(st.integers(0, 8)), "scales": draw(st.sampled_from(["fit", "range"]))}
            else:
                own |= {"rotate_k": draw(st.booleans()), "rotate_v": draw(st.booleans())}
        overrides.append(Override(layers, **own))
    return CachePolicy(**fields, overrides=tuple(overrides))


@st.composite
def variations(draw: st.DrawFn, policy: CachePolicy) -> CachePolicy:
    """Policies that differ in little: much of what they hold can be kept as it is."""
    one = draw(st.sampled_from(["rotate_k", "rotate_v", "sinks", "scales", "rollback", "window", "older"]))
    if one.startswith("rotate"):
        return replace(policy, **{one: not getattr(policy, one)})
    if one == "window":
        return replace(policy, window=draw(st.integers(0, policy.window)))
    values = {"sinks": st.integers(0, 8), "scales": st.sampled_from(["fit", "range"]), "rollback": st.integers(0, 100)}
    return replace(policy, **{one: draw(values.get(one, st.just(())))})


# --- a model ------------------------------------------------------------------------------------------------------


class StubTransformer:
    """Attention layers whose q, k and v are looked up by token and position; the "logits" are their outputs."""

    def __init__(self, shape: Shape, seed: int, plain_model: "PlainModel | None") -> None:
        self.shape, self.plain_model = shape, plain_model
        generator = np.random.default_rng(seed)
        heads = shape.kv_heads * (shape.n_rep + 2)
        self.tables = generator.standard_normal((shape.layers, VOCAB, heads, shape.head_dim), np.float32)
        loud = (1 + 3 * (np.arange(shape.head_dim) % 5 == 0)).astype(
            np.float32
        )  # some channels of keys are, as in models
        self.tables[:, :, shape.kv_heads * shape.n_rep : -shape.kv_heads] *= loud

    def forward(self, step: Step, logits: str | None, watch: Any = None) -> Float32 | None:
        shape, outs = self.shape, []
        [(cache, _, _)] = step.spans
        phase = np.cos(step.positions).astype(np.float32)[:, None, None]
        first_k, first_v = shape.kv_heads * shape.n_rep, shape.kv_heads * (shape.n_rep + 1)
        for layer in range(shape.layers):
            qkv = self.tables[layer, step.token_ids] + phase
            qkv[:, first_k:first_v] *= np.float32(shape.sizes[0])
            qkv[:, first_v:] *= np.float32(shape.sizes[1])
            position, scale = int(step.positions[0]), shape.head_dim**-0.5
            if self.plain_model is None:
                outs.append(cache.attend(layer, qkv, position, Softmax(scale)))
            else:
                outs.append(self.plain_model.attend(cache, layer, qkv, position, scale))
        rows = np.concatenate(outs, axis=1).reshape(len(step.token_ids), -1)
        return None if logits is None else rows[-1:] if logits == "last" else rows


def stub_model(shape: Shape, seed: int, plain_model: "PlainModel | None" = None) -> Any:
    config = SimpleNamespace(
        max_position_embeddings=LIMIT, vocab_size=VOCAB, num_hidden_layers=shape.layers,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
    )  # fmt: skip
    return SimpleNamespace(config=config, transformer=StubTransformer(shape, seed, plain_model), windows=shape.windows)


def new_cache(session: Any, policy: CachePolicy) -> Cache:
    """In the place of ``Session._new_cache``, which knows no sliding windows."""
    config = session.model.config
    return Cache(
        policy, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, session.context,
        session.model.windows,
    )  # fmt: skip


# --- what is held -------------------------------------------------------------------------------------------------


def raw(store: TileStore, tile: int) -> bytes:
    """All bytes of a tile: codes or numbers and scales, those of float32 too."""
    page, slot = store.place(tile)
    layout = store.layout
    views = [view(page, side)[:, slot] for side in (layout.k, layout.v) for view in (layout.params, layout.codes)]
    wide = [scales for (t, _), scales in sorted(store.wide_scales().items()) if t == tile]
    return b"".join(x.tobytes() for x in (*views, *wide))


def everything(cache: Cache, position: int) -> list[object]:
    """What a cache holds, rows that no longer count left out."""
    found: list[object] = []
    for layer in cache.layers:
        found.append([(store.first, store.stop) for store in (layer.recent, *layer.tiers)])
        filled = min(position, layer.sinks)
        found += [layer.sink_k[:filled].tobytes(), layer.sink_v[:filled].tobytes()]
        found += [raw(tier, t) for tier in layer.tiers for t in range(tier.first, tier.stop)]
        k, v = recent_rows(layer, position)
        found += [k.tobytes(), v.tobytes()]
    return found


def recent_rows(layer: LayerCache, position: int) -> tuple[Float32, Float32]:
    """The dense K and V from the first one held on, (n, H, D)."""
    store, tile, head_dim = layer.recent, layer.policy.tile, layer.head_dim
    ks, vs = [np.zeros((0, store.layout.n_kv_heads, head_dim))], [np.zeros((0, store.layout.n_kv_heads, head_dim))]
    for t in range(store.first, store.stop):
        page, slot = store.place(t)
        rows = min(position - t * tile, tile)
        ks.append(store.layout.dense_k(page)[:, slot, :head_dim, :rows].transpose(2, 0, 1))
        vs.append(store.layout.dense_v(page)[:, slot, :rows, :head_dim].transpose(1, 0, 2))
    return np.concatenate(ks).astype(np.float32), np.concatenate(vs).astype(np.float32)


# --- the plain model ----------------------------------------------------------------------------------------------


def hadamard(x: Float64) -> Float64:
    """Rotated by the matrix of Sylvester's construction, in blocks of the largest power of two in head_dim."""
    size, matrix = x.shape[-1] & -x.shape[-1], np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return (x.reshape(*x.shape[:-1], -1, size) @ (matrix / np.sqrt(size))).reshape(x.shape)


@dataclass
class Form:
    """A tile in one tier: numbers, float64 (tile, H, D), and its bytes."""

    k: Float64
    v: Float64
    bytes: bytes


@dataclass
class Rules:
    """The policy of a layer in plain words."""

    policy: CachePolicy
    sliding: int | None
    head_dim: int

    def __post_init__(self) -> None:
        p = self.policy
        self.tile, self.sinks = p.tile, p.sinks
        self.tiers = [Tier(p.window, p.k_bits, p.v_bits, p.k_axis, p.v_axis, p.k_group, p.v_group), *p.older]
        self.rotates = (
            p.rotate_k and any(t.k_bits < 16 for t in self.tiers),
            p.rotate_v and any(t.v_bits < 16 for t in self.tiers),
        )
        self.half = "bf16" if p.dense == "bf16" else "f16"

    def formats(self, tier: int) -> tuple[Format, Format]:
        own, found = self.tiers[tier], []
        for side, bits, axis, group in (
            ("k", own.k_bits, own.k_axis, own.k_group), ("v", own.v_bits, own.v_axis, own.v_group),
        ):  # fmt: skip
            name = {16: self.half, 32: "f32"}.get(bits, f"q{bits}{axis[0]}{group if group and axis == 'token' else ''}")
            found.append(Format(name, side))
        return found[0], found[1]

    def kinds(self, tier: int) -> tuple[str, str]:
        """Types alone, without axes and groups; -1 is the dense segment."""
        if tier < 0:
            return self.policy.dense, self.policy.dense
        k, v = self.formats(tier)
        return k.kind[:2] if k.kind not in DTYPES else k.kind, v.kind[:2] if v.kind not in DTYPES else v.kind

    def tiles_in(self, tier: int, p: int) -> int:
        """How many tiles the query at p sees in this tier or an older one: those with ``after`` tokens behind them."""
        t = 0
        while (t + 1) * self.tile + self.tiers[tier].after <= p + 1:
            t += 1
        return t

    def tiles_entered(self, tier: int, p: int, lead: int) -> int:
        """How many complete tiles are in this tier or an older one, ``lead`` tokens before the query at p has to see so."""
        complete = (p + 1) // self.tile
        return next(
            (t for t in range(complete) if (t + 1) * self.tile + self.tiers[tier].after - lead > p + 1), complete
        )

    def in_reach(self, tier: int) -> bool:
        return self.sliding is None or self.sliding > self.tiers[tier].after

    def first_seen(self, p: int) -> int:
        return 0 if self.sliding is None else max(0, p + 1 - self.sliding)

    def form_of(self, p: int, t: int) -> int:
        """The tier in which the query at p sees a tile, -1 for densely."""
        ripe = [i for i in range(len(self.tiers)) if t < self.tiles_in(i, p)]
        return max(ripe, default=-1)


@dataclass
class LayerBook:
    """Every token of a layer, in every form that it has been given."""

    rules: Rules
    k: Float32  # as the dense segment has them: rotated, and rounded to its type
    v: Float32
    forms: dict[tuple[int, int], Form] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    sealed: int = 0
    quantized: int = 0

    def copy(self) -> "LayerBook":
        return LayerBook(self.rules, self.k, self.v, dict(self.forms), list(self.stops), self.sealed, self.quantized)

    def truncate(self, position: int, layer: LayerCache) -> None:
        """What the cache keeps must be all that the last query left has seen; what it drops is forgotten here too."""
        self.k, self.v = self.k[:position], self.v[:position]
        for i, tier in enumerate(layer.tiers):
            least = self.rules.tiles_in(i, position - 1) if position and self.rules.in_reach(i) else 0
            assert min(least, self.stops[i]) <= tier.stop <= max(self.stops[i], tier.first)
            self.stops[i] = tier.stop
            self.forms = {key: form for key, form in self.forms.items() if key[0] != i or key[1] < tier.stop}

    def append(self, k: Float32, v: Float32) -> None:
        dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}[self.rules.policy.dense]
        both = []
        for x, rotates in zip((k, v), self.rules.rotates, strict=True):
            turned = x
            if rotates:
                turned = rotated(x)
                np.testing.assert_allclose(turned, hadamard(x.astype(float)), rtol=0, atol=2e-6 * np.abs(x).max())
            both.append(turned.astype(dtype).astype(np.float32))
        self.k, self.v = np.concatenate([self.k, both[0]]), np.concatenate([self.v, both[1]])

    def source(self, tier: int, tile: int) -> tuple[Float64, Float64]:
        if tier >= 0:
            form = self.forms[tier, tile]
            return form.k, form.v
        rows = slice(tile * self.rules.tile, (tile + 1) * self.rules.tile)
        return self.k[rows].astype(float), self.v[rows].astype(float)

    def note_sealed(self, layer: LayerCache, last: int, jobs: set[tuple[int, int]]) -> None:
        """Look at the tiles that have just entered a tier, up to what the query at ``last`` sees."""
        rules, due = self.rules, set()
        for i, tier in enumerate(layer.tiers):
            entered = rules.tiles_entered(i, last, layer.lead) if rules.in_reach(i) else 0
            assert tier.stop == max(entered, self.stops[i], tier.first)
            for t in range(max(self.stops[i], tier.first), tier.stop):
                due.add((i, t))
                assert (i, t) not in self.forms, "a tile was quantized a second time"
                self.forms[i, t] = self.read(layer, i, t)
                self.check_form(layer, i, t, self.source(i - 1, t))
                self.sealed += max(rules.tiers[i].k_bits < 16, rules.tiers[i].v_bits < 16)
                self.quantized += rules.kinds(i) != rules.kinds(i - 1)
            self.stops[i] = tier.stop
        assert jobs == due

    def read(self, layer: LayerCache, tier: int, tile: int) -> Form:
        k, v = self.rules.formats(tier)
        store = layer.tiers[tier]
        return Form(*store_row(store, (k.kind, v.kind), tile).read(), raw(store, tile))

    def check_form(self, layer: LayerCache, tier: int, tile: int, source: tuple[Float64, Float64]) -> None:
        """A tile is what the form above makes of it: exactly, but for fitted scales, which lose a step and a bit."""
        rules, form = self.rules, self.forms[tier, tile]
        dead = min(max(rules.sinks - tile * rules.tile, 0), rules.tile)
        formats, store = rules.formats(tier), layer.tiers[tier]
        wide = store_row(store, (formats[0].kind, formats[1].kind), tile).wide
        for x, own, fmt, is_wide in zip(source, (form.k, form.v), formats, wide, strict=True):
            live = x[dead:]
            if not live.size:
                continue
            if fmt.kind in DTYPES:
                exact = live.astype(np.float32).astype(DTYPES[fmt.kind]).astype(float)
                np.testing.assert_array_equal(own[dead:], exact)
                continue
            exactly = rules.policy.scales == "range" and (tier == 0 or not self._any_wide(layer, tier - 1, tile))
            for head in range(x.shape[1]):
                if exactly:
                    codes, scales, minima = plain(x[:, head].astype(np.float32), fmt, dead, is_wide)
                    np.testing.assert_array_equal(own[dead:, head], (codes * scales + minima)[dead:])
                    continue
                spans = group_ranges(x[:, head], fmt, dead)[dead:]
                bound = spans * (steps_off(fmt) / (2**fmt.bits - 1) + 2.0**-9) + 2.0**-10 * np.abs(x[dead:, head]).max()
                bound += 0 if is_wide else 2.0**-16
                error = np.abs(own[dead:, head] - x[dead:, head])
                assert (error <= bound).all(), f"{fmt}, wide {is_wide}: {(error / bound).max()} of the bound"

    @staticmethod
    def _any_wide(layer: LayerCache, tier: int, tile: int) -> bool:
        store = layer.tiers[tier]
        return not store.first <= tile < store.stop or any(t == tile for t, _ in store.wide_scales())

    def seen(self, p: int) -> tuple[Float64, Float64, int, bool]:
        """Keys and values as the query at p sees them, the first of them that it does see, and whether some are codes."""
        rules, first, codes = self.rules, self.rules.first_seen(p), False
        k, v = self.k[: p + 1].astype(float), self.v[: p + 1].astype(float)
        for t in range(first // rules.tile, p // rules.tile + 1):
            i = rules.form_of(p, t)
            rows = slice(max(t * rules.tile, rules.sinks, first), (t + 1) * rules.tile)
            if i < 0 or rows.start >= rows.stop:
                continue
            form, offset = self.forms[i, t], t * rules.tile
            k[rows], v[rows] = form.k[rows.start - offset :], form.v[rows.start - offset :]
            codes |= min(rules.tiers[i].k_bits, rules.tiers[i].v_bits) < 16
        return k[first:], v[first:], first, codes

    def expected(self, p: int, q: Float32, scale: float) -> tuple[Float64, float, bool]:
        """The output (heads, D) of a query (heads, D), the largest logit, and whether it has seen codes."""
        k, v, _, codes = self.seen(p)
        turned = hadamard(q.astype(float)) if self.rules.rotates[0] else q.astype(float)
        n_rep, out, largest = len(q) // k.shape[1], np.empty(q.shape), 0.0
        for head in range(len(q)):
            logits = k[:, head // n_rep] @ turned[head] * scale
            largest = max(largest, float(np.abs(logits).max()))
            weights = np.exp(logits - logits.max())
            out[head] = weights @ v[:, head // n_rep] / weights.sum()
        return hadamard(out) if self.rules.rotates[1] else out, largest, codes

    def check_held(self, layer: LayerCache, position: int) -> None:
        """What the cache holds is what was put there: nobody else has written to it."""
        assert len(self.k) == position
        filled = min(layer.sinks, position)
        for own, kept in ((self.k, layer.sink_k), (self.v, layer.sink_v)):
            np.testing.assert_array_equal(kept[:filled, :, : layer.head_dim].astype(np.float32), own[:filled])
        first = layer.recent.first * self.rules.tile
        for own, kept in zip((self.k, self.v), recent_rows(layer, position), strict=True):
            np.testing.assert_array_equal(kept, own[first:])
        # What a sliding window has left behind is skipped
        self.stops = [max(stop, tier.first) for stop, tier in zip(self.stops, layer.tiers, strict=True)]
        assert self.stops == [tier.stop for tier in layer.tiers]
        for i, tier in enumerate(layer.tiers):
            for t in range(tier.first, tier.stop):
                assert raw(tier, t) == self.forms[i, t].bytes


def steps_off(fmt: Format) -> int:
    """The steps of its range that a value may be off: with few codes, a line that fits most of them cuts off outliers."""
    return 2 if fmt.bits < 4 else 1


def group_ranges(x: Float64, fmt: Format, dead: int) -> Float64:
    """The range of each value's group, of X (tile, D)."""
    found = np.empty(x.shape)
    if fmt.axis == "channel":
        found[:] = np.ptp(x[dead:], axis=0)
        return found
    group = fmt.group(-(-x.shape[1] // 16) * 16)
    for first in range(0, x.shape[1], group):
        part = slice(first, first + group)
        found[:, part] = np.ptp(x[:, part], axis=1, keepdims=True)
    return found


class Book:
    """The layers of one cache."""

    def __init__(self, cache: Cache, layers: list[LayerBook]) -> None:
        self.cache, self.layers = cache, layers

    @classmethod
    def of(cls, cache: Cache, shape: Shape, position: int = 0) -> "Book":
        """Of a cache as it is, its dense numbers and forms taken for true."""
        books = []
        for i, layer in enumerate(cache.layers):
            rules = Rules(cache.policy.for_layer(i, shape.layers), shape.windows[i], shape.head_dim)
            k, v = np.full((2, position, shape.kv_heads, shape.head_dim), np.nan, np.float32)
            book = LayerBook(rules, k, v, {}, [tier.stop for tier in layer.tiers])
            if position:
                filled, first = min(layer.sinks, position), layer.recent.first * rules.tile
                k[first:], v[first:] = recent_rows(layer, position)
                k[:filled], v[:filled] = (
                    layer.sink_k[:filled, :, : shape.head_dim],
                    layer.sink_v[:filled, :, : shape.head_dim],
                )
                for j, tier in enumerate(layer.tiers):
                    for t in range(tier.first, tier.stop):
                        book.forms[j, t] = book.read(layer, j, t)
            books.append(book)
        return cls(cache, books)

    def copy(self, cache: Cache) -> "Book":
        return Book(cache, [layer.copy() for layer in self.layers])

    def truncate(self, position: int) -> None:
        for book, layer in zip(self.layers, self.cache.layers, strict=True):
            book.truncate(position, layer)

    def check_held(self, position: int) -> None:
        for book, layer in zip(self.layers, self.cache.layers, strict=True):
            book.check_held(layer, position)


class PlainModel:
    """Looks at every call of ``Cache.attend``, and computes what it should return."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.books: dict[int, Book] = {}  # by the id of their caches, which they keep alive
        self.jobs: list[tuple[TileStore, TileStore, int]] = []  # what ``seal_job`` was called for
        self.sealed = self.queries = self.with_codes = 0

    def book(self, cache: Cache) -> Book:
        if id(cache) not in self.books:
            self.add(Book.of(cache, self.shape))
        return self.books[id(cache)]

    def add(self, book: Book) -> Book:
        self.books[id(book.cache)] = book
        return book

    def attend(self, cache: Cache, layer: int, qkv: Float32, position: int, scale: float) -> Float32:
        shape, store, book = self.shape, cache.layers[layer], self.book(cache).layers[layer]
        heads, last = shape.kv_heads * shape.n_rep, position + len(qkv) - 1
        q, k, v = (x.copy() for x in np.split(qkv, [heads, heads + shape.kv_heads], axis=1))
        self.jobs.clear()
        quantized, sealed, counted = book.quantized, book.sealed, store.tiles_quantized
        out = cache.attend(layer, qkv, position, Softmax(scale))
        assert len(book.k) == position
        book.append(k, v)
        stores = [store.recent, *store.tiers]
        jobs = set()
        for source, target, t in self.jobs:
            i = stores.index(target) - 1
            assert source is stores[i], "a tile was not taken from the tier above"
            jobs.add((i, t))
        book.note_sealed(store, last, jobs)
        assert store.tiles_quantized - counted == book.quantized - quantized
        self.sealed += book.sealed - sealed
        # The first and the last query, those before and behind each boundary, and a few others
        tile, ages = book.rules.tile, [tier.after for tier in book.rules.tiers]
        edges = {t * tile + age + d for age in ages for t in range(1, last // tile + 2) for d in (-2, -1)}
        some = sorted(p for p in edges if position <= p <= last)
        some = some[:: max(1, len(some) // 6)]
        for p in sorted({position, last, *some, *range(position, last, max(1, len(qkv) // 3))}):
            want, largest, codes = book.expected(p, q[p - position], scale)
            size = float(
                np.abs(
                    book.v[book.rules.first_seen(p) : p + 1][~np.isnan(book.v[book.rules.first_seen(p) : p + 1])]
                ).max()
            )
            bound = TOLERANCE * max(size / 4, 2.0**-100)
            if codes and not LayerCache.exact:
                bound = max(bound, (CODES + CODES_A_LOGIT * largest) * size)
            found = out[p - position]
            assert (np.abs(found - want) <= bound).all(), (
                f"layer {layer}, query {p} of {position}..{last}: {np.abs(found - want).max()} beyond {bound}"
            )
            self.queries += 1
            self.with_codes += codes
        return out
