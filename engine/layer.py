"""The mixed KV cache of a layer: a list of segments - sink, tiers of codes, recent - and one rule for who sees what.

Positions are absolute. Tile t holds the positions t * tile .. (t + 1) * tile. While it is recent it is dense; it is
*sealed* (quantized into the youngest tier) before a query comes that may not see it densely, and goes on from tier to tier
as it ages. With B_0(p) >= B_1(p) >= ... the boundaries of the tiers (``CachePolicy.boundary``), and L(p) the first
position of a sliding window, or 0, the query at position p sees

    sinks        [L(p), min(sinks, p + 1))             in tier i    [max(B_i+1(p), sinks, L(p)), B_i(p))
    recent       [max(B_0(p), sinks, L(p)), p + 1)     the oldest   [max(sinks, L(p)), B_n-1(p))

A tile may exist in several forms for a while; the range of each query picks one. So a query sees what it would have seen
token by token, however the prompt was cut, and whenever the tile was sealed.

Keys, and queries with them, or values may be rotated (kernels/hadamard.py); then every segment holds them so.
"""

import math
import sys
from bisect import bisect_left
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..kernels.attention import attend_segments
from ..kernels.crew import ALL_WORKERS
from ..kernels.flash import empty_call
from ..kernels.hadamard import block_size, rotated
from ..kernels.layout import DENSE_DTYPES, F32
from ..kernels.quantize import IMPOSSIBLE_AT, TOO_WIDE_AT, Float32, narrow, store_rows
from ..kernels.segment import Int64, TileStore, seal, seal_job, segment_of_arrays, widen_as_found
from ..kernels.sight import look
from ..kernels.simd import LANES
from ..kernels.state import pad_last_axis
from ..kernels.tables import (
    APPEND_AS_IS,
    APPENDED,
    CALL_FIELDS,
    DENSE_KIND,
    FIRST_QUERY,
    FRESH,
    HEAD_DIM,
    JOB_STARTS,
    JOBS,
    K_BLOCK,
    LEDGER,
    LOST,
    MAX_N_REP,
    MAX_ROUNDS,
    N_HEADS,
    N_SEGMENTS,
    N_SINKS,
    OPTIONS,
    SEGMENTS,
    STEP,
    V_BLOCK,
)
from ..kernels.threads import most_threads
from ..models.errors import NumericalError, UsageError
from ..models.transformer import Softmax
from .policy import DENSE, CachePolicy

LEADS = 8  # so many groups of layers, as many parts of a tile apart
_WIDER = "use a policy with dense='f32' and k_bits and v_bits of 32"


def lead_of(layer: int, n_layers: int, tile: int) -> int:
    """How many tokens early tiles of a layer enter a tier (``LayerCache``): an eighth of the layers at a time.

    With all of them at once such a step takes a quarter longer than others; one by one, every second step a fiftieth.
    """
    return layer * LEADS // n_layers * (tile // LEADS)


def sealed_tiles(stop: int, age: int, lead: int, tile: int) -> int:
    """How many tiles have entered a tier of so old ones once there are ``stop`` tokens; see ``LayerCache``."""
    return min(max(stop - age + lead, 0), stop) // tile


class View:
    """What the queries of one step see, the same in every layer of one policy and window (kernels/sight.py).

    Attributes:
        position: of the first query; stop: one past the last.
        ranges: int64 (2 * (tiers + 2), T), where each starts and stops: of the sinks, of each tier from the oldest on, of
            the recent tokens.
        state: float32 (n_heads, T, 2), to be used by one layer after the other.
        fields: int64, what a call has from STEP on.
        addresses: of the state and the parts, as a chain takes them (kernels/project.py, ATTENTIONS); the same tuple until
            something has moved.

    """

    def __init__(self, cache: "LayerCache", position: int, qkv: Float32) -> None:
        n_kv_heads = cache.recent.layout.n_kv_heads
        n_queries, heads = len(qkv), qkv.shape[1] - 2 * n_kv_heads
        if n_queries == 0:
            raise ValueError("there must be a query, found none")
        if heads > MAX_N_REP * n_kv_heads:  # the kernels would write beyond their tables
            raise ValueError(f"at most {MAX_N_REP} query heads may share a KV head, found {heads} and {n_kv_heads}")
        self.n_queries, self.heads = n_queries, heads
        self.state = np.empty((heads, n_queries, 2), np.float32)
        self.ranges = np.empty((2 * (len(cache.ages) + 2), n_queries), np.int64)
        self.fields = np.empty(CALL_FIELDS - STEP, np.int64)
        self._shape, self._width = qkv.shape, -(-qkv.shape[2] // LANES) * LANES
        self._fixed = (
            np.array(cache.ages, np.int64), cache.policy.tile, cache.sinks, cache.sliding_window or 0, heads, n_kv_heads,
            4 * qkv.shape[1] * self._width, most_threads(),
        )  # fmt: skip
        self._n_parts, self._parts = -1, (np.empty(0, np.float32),) * 2
        self.go_to(position)

    def go_to(self, position: int) -> None:
        """See what as many queries see from another position on. An interrupt leaves no address of freed memory."""
        self.position = -1  # fits no step until all is done
        n_parts = look(position, *self._fixed, self.ranges, self.fields)
        if n_parts != self._n_parts:  # room for outputs and states of parts that are merged (kernels/attention.py)
            rows = n_parts * self.n_queries * self.heads
            parts = np.empty(rows * self._width + LANES, np.float32), np.empty(rows * 2 + 1, np.float32)
            addresses = self.state.ctypes.data, *(x.ctypes.data for x in parts)
            self._n_parts = -1
            self._parts, self.addresses = parts, addresses
            self._n_parts = n_parts
        self.position, self.stop = position, position + self.n_queries

    def fits(self, qkv: Float32) -> bool:
        """Whether it does for other queries, keys and values, wherever they are."""
        return qkv.shape == self._shape


class LayerCache:
    """Keys and values of one layer, from position 0 to the last one appended.

    ``exact`` keeps attention float32 throughout, as ``precision="f32"`` of ``flash_attention`` does.

    Args:
        policy: one without overrides (``CachePolicy.for_layer``).
        n_kv_heads, head_dim: shape of a token's keys and of its values.
        context: the most tokens there will be, if that is known.
        sliding_window: a query sees no more than so many positions, itself included; None for all.
        lead: tiles enter a tier so many tokens before they must, if they are complete. Until then queries see their old
            form. In another layer another lead, and no step has many tiles to quantize, unless they must at once.

    """

    exact = False
    keeps_dense = False  # dense tiles for ever, as shadow mode does (shadow.py)

    def __init__(
        self,
        policy: CachePolicy,
        n_kv_heads: int,
        head_dim: int,
        context: int | None = None,
        sliding_window: int | None = None,
        lead: int = 0,
    ) -> None:
        self.policy, self.head_dim, self.sliding_window, self.lead = policy, head_dim, sliding_window, lead
        self.sinks = policy.sinks if context is None else min(policy.sinks, context)
        self.ages = [tier.after for tier in policy.tiers]
        self.in_reach = [sliding_window is None or sliding_window > age for age in self.ages]
        self.recent = TileStore(policy.dense_layout(n_kv_heads, head_dim))
        layouts = policy.tier_layouts(n_kv_heads, head_dim)
        stays = sliding_window is None  # what the oldest tier holds
        self.tiers = [TileStore(x, stays and i == len(layouts) - 1) for i, x in enumerate(layouts)]  # youngest first
        dtype = DENSE_DTYPES[DENSE[policy.dense]]
        self._set_sinks(*np.zeros((2, self.sinks, n_kv_heads, -(-head_dim // LANES) * LANES), dtype))
        self._call: Int64 | None = None
        self.call_address = 0  # of the last call
        self._entering: list[tuple[int, int]] = []  # what the last call described quantizes: (tier, tile)
        self._options = np.zeros(3, np.float32)
        self._jobs: Int64 | None = None
        self.ledger: Float32 | None = None  # (segments, H, T, 2): the state after each segment of the last ``attend``
        self.keeps_ledger = False
        self.tiles_quantized = 0  # each tile once for every tier that it enters, which is tested by this count

    @property
    def old(self) -> TileStore:
        """The youngest tier."""
        return self.tiers[0]

    @property
    def view_key(self) -> tuple[object, ...]:
        """Layers for which this is the same have the same ``View``."""
        return self.sinks, self.policy.tile, *self.ages, self.sliding_window

    def sealed(self, stop: int) -> list[int]:
        """How many tiles have entered each tier, or have gone on from it, once there are ``stop`` tokens."""
        return [
            sealed_tiles(stop, age, self.lead, self.policy.tile) if seen else 0
            for age, seen in zip(self.ages, self.in_reach, strict=True)
        ]

    @property
    def lets_in_at(self) -> int:
        """The number of tokens with which the next tile enters a tier."""
        tile, later = self.policy.tile, [max(age - self.lead, 0) for age in self.ages]
        found = zip(self.tiers, later, self.in_reach, strict=True)
        return min((tile * (tier.stop + 1) + wait for tier, wait, seen in found if seen), default=sys.maxsize)

    @property
    def _fitted(self) -> bool:
        return self.policy.scales == "fit"

    def _dead(self, tile: int) -> int:
        """How many of the first tokens of a tile are sinks, and so never seen in it."""
        return min(max(self.sinks - tile * self.policy.tile, 0), self.policy.tile)

    def _set_sinks(self, k: NDArray[np.generic], v: NDArray[np.generic]) -> None:
        segment = self._sink_segment = segment_of_arrays(k, v)
        self._sink_addresses = segment.table.ctypes.data, segment.geometry.ctypes.data
        self.sink_v = v
        self.sink_k = k  # last: an interrupt may come before, and this one's type tells whether all is done

    def attend(
        self,
        qkv: Float32,
        position: int,
        softmax: Softmax,
        out: Float32 | None = None,
        view: View | None = None,
        first: int = 0,
    ) -> Float32:
        """Append keys and values at ``position``, and attend with the queries there.

        Args:
            qkv: float32 (T, n_heads + 2 * n_kv_heads, head_dim), queries, keys and values of T tokens, C order. What the
                policy rotates is rotated in place.
            position: of the first of them.
            softmax: scale, soft-cap and sink logits.
            out: float32 (T, n_heads, head_dim), C order, to write to.
            view: what the queries see, where the caller has it already.
            first: the first query whose output is wanted, up to T; those before may not be there.

        Returns o, float32 (T, n_heads, head_dim). Nothing is final before ``commit``; to append something else at the
        same position, ``truncate`` to it first.
        """
        if view is None:
            view = self.view(position, qkv)
        heads, head_dim, width = view.heads, qkv.shape[2], self.recent.layout.width
        if out is None:
            out = np.empty((view.n_queries, heads, head_dim), np.float32)
        padded, result = qkv, out
        if head_dim != width:
            padded, result = pad_last_axis(qkv), np.empty((view.n_queries, heads, width), np.float32)
        call = self.describe(view, softmax)
        while True:
            call[FIRST_QUERY] = 0 if self.keeps_ledger else first
            if not call[FRESH]:  # go on from the sink logits instead of from nothing
                view.state[...], result[...] = softmax.first_state(heads, view.n_queries), 0
            attend_segments(call, padded, result, view.state, ALL_WORKERS)
            if self.settle(padded[:, heads:]):
                break
            call = self.describe_again(view, softmax)
        if result is not out:
            out[...] = result[..., :head_dim]
        return out

    def view(self, position: int, qkv: Float32) -> View:
        """What the queries of ``attend`` see."""
        return View(self, position, qkv)

    def describe(self, view: View, softmax: Softmax) -> Int64:
        """The call of ``attend_segments`` for one step; places for its tokens, and in the tiers, are made."""
        self._entering = self._places_in_tiers(view)
        return self._describe(view, softmax, self._entering)

    @property
    def is_settled(self) -> bool:
        """Whether the call just described, with other ``View.fields``, does for steps that let no tile in."""
        return not self._entering and self.ledger is None

    @property
    def room(self) -> int:
        """The position up to which there are places for tokens."""
        return self.recent.stop * self.policy.tile

    def _store_addresses(self) -> list[int]:
        """Of the tables and geometries of tiers and recent tiles, in the order of positions."""
        return [x for store in self._by_position for x in store.addresses()]

    def settle(self, kv: Float32) -> bool:
        """After a call: make room where something did not fit. False if there was such, and the call is to be repeated.

        kv: float32 (T, 2 * n_kv_heads, width), the keys and values that were appended.

        Raises:
            NumericalError: a tile that cannot be quantized.

        """
        assert self._call is not None
        if self._call[LOST] and self._lost_any(kv):
            self.widen_dense()
            return False
        if self._entering and self._widened(self._entering):
            return False
        self.count_tiles()
        return True

    def count_tiles(self) -> None:
        """Count the tiles that the call quantized, all of which fitted."""
        stores = self.recent, *self.tiers
        for i, _ in self._entering:
            old, new = stores[i].layout, stores[i + 1].layout
            self.tiles_quantized += (old.k_kind, old.v_kind) != (new.k_kind, new.v_kind)  # else it is only copied
        self._entering = []

    def describe_again(self, view: View, softmax: Softmax) -> Int64:
        """The last call, with more room; what is rotated must not be so twice."""
        call = self._describe(view, softmax, self._entering)
        call[APPENDED] = APPEND_AS_IS
        return call

    def _places_in_tiers(self, view: View) -> list[tuple[int, int]]:
        """Make places for the tiles that are to enter a tier: (tier, tile) of each, tier after tier."""
        found: list[tuple[int, int]] = []
        for i, (tier, stop) in enumerate(zip(self.tiers, self.sealed(view.stop), strict=True)):
            if tier.stop < stop:
                tier.forget_before(self._first_seen(view.position))  # what a sliding window has left behind
                found += [(i, t) for t in range(tier.stop, stop)]
                tier.append(stop - tier.stop)
        return found

    def _describe(self, view: View, softmax: Softmax, tiles: list[tuple[int, int]]) -> Int64:
        """The call of ``attend_segments``; places for new tokens are made."""
        recent = self.recent
        if view.stop > self.room:
            recent.append(-(-view.stop // recent.layout.tile) - recent.stop)
        if self._call is None or self._call[N_HEADS] != view.heads:
            self._call = self._begin_call(view.heads)
        call = self._call
        self._options[:] = softmax.scale, softmax.softcap, self.exact  # SCALE, SOFTCAP, EXACT
        call[FRESH] = softmax.sink_logits is None
        call[STEP:CALL_FIELDS] = view.fields
        stop = SEGMENTS + 2 + 2 * len(self._by_position)
        call[SEGMENTS + 2 : stop] = self._store_addresses()
        if tiles:
            stores = [recent, *self.tiers]
            jobs = [seal_job(stores[i], stores[i + 1], t, self._dead(t), self._fitted) for i, t in tiles]
            self._jobs = np.array(jobs, np.int64)
            rounds = [tier for tier, _ in tiles]
            starts = [bisect_left(rounds, i) for i in range(MAX_ROUNDS + 1)]
            call[JOBS], call[JOB_STARTS:STEP] = self._jobs.ctypes.data, starts
        elif self._jobs is not None:
            self._jobs, call[JOB_STARTS:STEP] = None, 0
        if self.keeps_ledger:
            self.ledger = np.empty((len(self.tiers) + 2, view.heads, view.n_queries, 2), np.float32)
            call[LEDGER] = self.ledger.ctypes.data
        elif self.ledger is not None:
            self.ledger, call[LEDGER] = None, 0
        return call

    def _begin_call(self, heads: int) -> Int64:
        """What is the same in every call with so many query heads."""
        self._widen_sinks()
        self._by_position = *reversed(self.tiers), self.recent
        layouts = [tier.layout for tier in self.tiers]
        most = max(side.parts * side.limbs for layout in layouts for side in (layout.k, layout.v))
        call = empty_call(heads, layouts[0].n_kv_heads, layouts[0].width, most)
        call[N_SEGMENTS], call[N_SINKS] = len(self.tiers) + 2, self.sinks
        call[HEAD_DIM], call[DENSE_KIND] = self.head_dim, DENSE[self.policy.dense]
        call[K_BLOCK], call[V_BLOCK] = (block_size(self.head_dim) * rotates for rotates in self.policy.rotates)
        call[OPTIONS] = self._options.ctypes.data
        call[SEGMENTS : SEGMENTS + 2] = self._sink_addresses
        self.call_address = call.ctypes.data
        return call

    def _lost_any(self, kv: Float32) -> bool:
        """Whether there are finite keys or values that the dense parts cannot hold."""
        if self._call is not None:
            self._call[LOST] = 0
        try:
            narrow(kv, self.recent.layout.k_kind)
        except OverflowError:
            return True
        return False

    def widen_dense(self) -> None:
        """Keep the dense parts as float32 from now on: there are numbers that float16 cannot hold.

        Only these are kept otherwise than before (append.py): no query sees whether a part has been widened already.
        """
        wide = TileStore(replace(self.recent.layout, k_kind=F32, v_kind=F32))
        wide.forget_before(self.recent.first)
        for t in range(self.recent.first, self.recent.stop):
            wide.append()
            seal(self.recent, wide, t, 0, False)
        self._call, self.recent = None, wide
        self._widen_sinks()

    def _widen_sinks(self) -> None:
        """Give the sinks the type of the recent segment; an interrupt may have come between the two."""
        dtype = DENSE_DTYPES[self.recent.layout.k_kind]
        if self.sink_k.dtype != dtype:
            self._set_sinks(self.sink_k.astype(dtype), self.sink_v.astype(dtype))

    def _as_kept(self, x: Float32) -> Float32:
        """Numbers as the dense parts keep them: rounded to their type, but for those that are beyond it."""
        with np.errstate(over="ignore"):
            rounded = x.astype(DENSE_DTYPES[DENSE[self.policy.dense]]).astype(np.float32)
        return np.where(np.isfinite(rounded), rounded, x)

    def _widened(self, tiles: list[tuple[int, int]]) -> bool:
        """Make room for scales as float32 where a job just done says so; whether there was one.

        Raises:
            NumericalError: a tile that cannot be quantized.

        """
        jobs = self._jobs
        assert jobs is not None
        again: set[int] = set()  # tiles whose source is quantized once more: their jobs have seen no final one
        for (i, t), job in zip(tiles, jobs, strict=True) if jobs[:, TOO_WIDE_AT:].any() else ():
            if t in again:
                continue
            if job[IMPOSSIBLE_AT:].any():
                why = "a number or a range is beyond its type, or not a number"
                raise NumericalError(f"tile {t} cannot be quantized: {why}; {_WIDER}")
            if widen_as_found(self.tiers[i], t, job):
                again.add(t)
        return bool(again)

    def _first_seen(self, position: int) -> int:
        """The first tile that a sliding window leaves in sight of any query that may still come."""
        if self.sliding_window is None:
            return 0
        return max(0, position - self.policy.rollback + 1 - self.sliding_window) // self.policy.tile

    def commit(self, position: int) -> None:
        """Everything below ``position`` is final: forget forms of tiles that no query from there on sees.

        Queries go on from ``position``, or, after ``truncate``, from up to ``policy.rollback`` tokens before.
        """
        self.forget(self.still_seen(position))

    def still_seen(self, position: int) -> list[int]:
        """The first tile that queries see, once ``position`` is final, as recent, in each tier, and at all.

        The same for all layers of one ``view_key``. A tier may not hold so many tiles yet.
        """
        policy, horizon = self.policy, max(0, position - self.policy.rollback)
        # Not with a window of 0 a tile that the token at the horizon is still missing in
        entered = [min(policy.boundary(horizon, i), horizon) // policy.tile for i in range(len(self.tiers))]
        return [*entered, self._first_seen(position)]

    def forget(self, still_seen: list[int], coming: int = 0) -> None:
        """Forget forms of tiles before the first that is still seen.

        coming: the position up to which tokens follow at once; memory of recent tiles is kept for theirs.
        """
        *entered, seen = still_seen
        keep = max(-(-coming // self.policy.tile) - self.recent.stop, 0)
        source = self.recent
        for tier, first in zip(self.tiers, entered, strict=True):
            if source is not self.recent or not self.keeps_dense:
                source.forget_before(max(seen, min(tier.stop, first)), keep)
            source, keep = tier, 0
        source.forget_before(seen)

    @property
    def lowest(self) -> int:
        """The first position that ``truncate`` can go back to: everything that a query from there on sees is still held."""
        reach = math.inf if self.sliding_window is None else self.sliding_window
        lowest = 0
        for age, source in zip([*self.ages, math.inf], (self.recent, *self.tiers), strict=True):
            if source.first:  # then age or reach is a number
                lowest = max(lowest, source.first * self.policy.tile + max(int(min(age, reach)), 1) - 1)
        return lowest

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on, which is ``lowest`` or more. What is next appended goes there."""
        self._widen_sinks()
        tile, source = self.policy.tile, self.recent
        for tier, stop in zip(self.tiers, self.sealed(position), strict=True):
            # Not what the last query that stays had sealed; nor what its source does not hold any more
            tier.forget_from(max(stop, source.first))
            source = tier
        self.recent.forget_from(-(-position // tile))
        if position % tile:
            self.recent.own(position // tile)

    def fill_sinks(self, k: NDArray[np.generic], v: NDArray[np.generic]) -> None:
        """Set the sinks, both (sinks, n_kv_heads, width) in the dtype of the dense parts."""
        self.sink_k[:], self.sink_v[:] = k, v

    def check_spans(self, spans: list[tuple[int, int]], position: int) -> None:
        """UsageError where recent and tiers with these first and last + 1 tiles could not go on at ``position``."""
        tile, reach = self.policy.tile, math.inf if self.sliding_window is None else self.sliding_window
        fits = spans[0][1] == -(-position // tile)
        for i, reached in enumerate(self.in_reach):
            (source_first, _), (first, stop) = spans[i], spans[i + 1]
            sealed = self.policy.boundary(position - 1, i) // tile
            fits &= not reached or (source_first <= stop and sealed <= stop <= max(position // tile, first))
        for (first, stop), age in zip(spans, [*self.ages, math.inf], strict=True):
            fits &= 0 <= first <= stop <= position + 1
            fits &= first == 0 or first * tile + max(min(age, reach), 1) - 1 <= position  # as ``lowest`` says
        if not fits:
            raise UsageError(f"a cache at position {position} cannot hold the tiles {spans}")

    def fork(self) -> "LayerCache":
        """A cache of the same tokens, which shares what neither of the two will write to."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._call, other._jobs, other._options = None, None, self._options.copy()
        other._entering = []
        other.ledger = None
        other._set_sinks(self.sink_k.copy(), self.sink_v.copy())
        other.recent, other.tiers = self.recent.fork(), [tier.fork() for tier in self.tiers]
        for cache in (self, other):
            cache.recent.own(cache.recent.stop - 1)
        return other

    def values(self, start: int, stop: int, *, as_held: bool = False) -> tuple[Float32, Float32, NDArray[np.bool_]]:
        """Keys and values of positions, as exactly as they are held, and which of them are codes only.

        Args:
            start, stop: the first position, and one past the last.
            as_held: leave what is rotated so.

        Returns:
            k, v: float32 (stop - start, n_kv_heads, head_dim); coded: bool (stop - start,). Positions that a sliding window
            has left behind are zeros.

        """
        layout, tile = self.recent.layout, self.policy.tile
        wide = TileStore(replace(layout, k_kind=F32, v_kind=F32))
        found = np.zeros((2, stop - start, layout.n_kv_heads, self.head_dim), np.float32)
        coded = np.zeros(stop - start, bool)
        for t in range(start // tile, -(-stop // tile)):
            stores = [store for store in (self.recent, *self.tiers) if store.first <= t < store.stop]
            if not stores:
                continue
            wide.forget_before(t)
            wide.append()
            seal(stores[0], wide, t, 0, False)
            page, _ = wide.place(t)
            here = slice(max(start - t * tile, 0), min(stop - t * tile, tile))
            there = slice(t * tile + here.start - start, t * tile + here.stop - start)
            found[0, there] = wide.layout.dense_k(page)[:, 0, : self.head_dim, here].transpose(2, 0, 1)
            found[1, there] = wide.layout.dense_v(page)[:, 0, here, : self.head_dim].transpose(1, 0, 2)
            coded[there] = stores[0].layout.has_codes
        sinks = min(self.sinks, stop)
        if start < sinks:
            for x, kept in zip(found, (self.sink_k, self.sink_v), strict=True):
                x[: sinks - start] = kept[start:sinks, :, : self.head_dim]
            coded[: sinks - start] = False
        k, v = (rotated(x) if y and not as_held else x for x, y in zip(found, self.policy.rotates, strict=True))
        return k, v, coded

    def take_over(self, other: "LayerCache", position: int) -> dict[str, int]:
        """Fill this cache, which is empty, with what another one of the same model holds; see ``Session.retier``."""
        tile = self.policy.tile
        found = {"requantized": 0, "not_restored": 0}
        turned_alike = self.policy.rotates == other.policy.rotates
        alike = turned_alike and tile == other.policy.tile
        for t in range(self._first_seen(position), -(-position // tile)):
            start, stop = t * tile, min((t + 1) * tile, position)
            *kv, coded = other.values(start, stop, as_held=turned_alike)
            k, v = (rotated(x) if y and not turned_alike else x for x, y in zip(kv, self.policy.rotates, strict=True))
            if not self.recent.stop:
                self.recent.forget_before(t)
            k, v = self._as_kept(k), self._as_kept(v)
            if self._lost_any(np.stack([k, v])):
                self.widen_dense()
            store_rows(self.recent.layout, self.recent.place(t)[0], 0, k, v)
            self.recent.append()
            for x, kept in ((k, self.sink_k), (v, self.sink_v)):
                rows = min(stop, self.sinks) - start
                if rows > 0:
                    kept[start : start + rows, :, : self.head_dim] = x[:rows]
            # What was a sink has nothing worth having in its tile
            alive = alike and (self.sinks >= other.sinks or t * tile >= other.sinks)
            sources = other.worth_copying(t) if alive else []
            kept_as = self._enter(t, position, sources)
            dead = min(self._dead(t), stop - start)
            n_coded = int(coded[dead:].sum())
            found["not_restored"] += int(coded[:dead].sum()) + (n_coded if kept_as == "dense" else 0)
            found["requantized"] += n_coded if kept_as == "anew" else 0
        self.commit(position)
        return found

    def worth_copying(self, t: int) -> list[TileStore]:
        """The tiers whose forms of tile t are better copied than made anew: no codes that something dense lies above."""
        if self.recent.first <= t < self.recent.stop:
            return []
        held = [tier for tier in self.tiers if tier.first <= t < tier.stop]
        coded = not held or held[0].layout.has_codes
        return [tier for tier in held if coded or not tier.layout.has_codes]

    def _enter(self, t: int, position: int, sources: list[TileStore]) -> str:
        """Take tile t, the last of the recent segment, through the tiers that it has reached.

        Returns how the query before ``position`` has to see it: "dense", "as it was" where it could be copied from one of
        ``sources``, or in new codes "anew".
        """
        source, kept_as = self.recent, "dense"
        for i, (tier, stop) in enumerate(zip(self.tiers, self.sealed(position), strict=True)):
            if t >= stop:
                break
            if not tier.stop:
                tier.forget_before(t)
            tier.append()
            same = [other for other in sources if other.layout.same_tiles(tier.layout)]
            if t < self.policy.boundary(position - 1, i) // self.policy.tile:
                kept_as = "as it was" if same else "anew" if tier.layout.has_codes else "dense"
            if same:
                tier.copy(t, same[0])
            else:
                try:
                    seal(source, tier, t, self._dead(t), self._fitted)
                except OverflowError as error:
                    raise NumericalError(f"tile {t} cannot be quantized: {error}; {_WIDER}") from None
            source = tier
        return kept_as

    def nbytes(self) -> dict[str, int]:
        """Bytes in use of each segment; all tiers are "old"."""
        return {
            "sink": self.sink_k.nbytes + self.sink_v.nbytes,
            "old": sum(tier.nbytes for tier in self.tiers),
            "recent": self.recent.nbytes,
        }
