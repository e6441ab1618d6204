"""What a cache will take, before anything is read: the bytes that ``Session.nbytes`` says afterwards; and what there is.

A cache takes up room as it grows, so a run that does not fit would end somewhere in its midst, or be ended by the system.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..kernels.layout import DENSE_DTYPES
from ..kernels.simd import LANES
from ..models.config import ModelConfig
from ..models.errors import UsageError
from .layer import lead_of, sealed_tiles
from .policy import DENSE, CachePolicy
from .session import CHUNK

PROPOSED_BITS = (8, 4, 3, 2)
UNLIMITED = 1 << 60  # where cgroups have no limit they say a number beyond this


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a cache that holds so many tokens, all layers together.

    Attributes:
        tokens: that it holds.
        sink, recent: bytes of the dense parts.
        tiers: bytes of each old tier, youngest first; as many as the layer with the most has.

    """

    tokens: int
    sink: int
    tiers: tuple[int, ...]
    recent: int

    @property
    def old(self) -> int:
        """Bytes of all tiers."""
        return sum(self.tiers)

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.sink + self.old + self.recent

    def nbytes(self) -> dict[str, int]:
        """As ``Session.nbytes`` has them: {"sink", "old", "recent", "total"}."""
        return {"sink": self.sink, "old": self.old, "recent": self.recent, "total": self.total}


class _Tiles:
    """The tiles of a store by number alone; see kernels/segment.py ``TileStore``."""

    def __init__(self, page_tiles: int) -> None:
        self.first = self.stop = self.written = 0
        self.page_tiles = page_tiles

    def extend(self, stop: int) -> None:
        self.stop = max(self.stop, stop)

    def forget_before(self, tile: int) -> None:
        if tile > self.first:
            self.written = self.written if self.stop >= tile else tile
            self.first, self.stop = tile, max(self.stop, tile)

    @property
    def count(self) -> int:
        """Tiles that take up room."""
        return self.stop - max(self.first - self.first % self.page_tiles, min(self.written, self.first))


def plan(
    config: ModelConfig,
    policy: CachePolicy,
    tokens: int,
    *,
    context: int | None = None,
    chunk: int = CHUNK,
) -> Plan:
    """The bytes of a session that has read so many tokens, but for numbers that float16 cannot hold.

    Args:
        config: of the model.
        policy: of the cache.
        tokens: 0 or more.
        context: of the session, where there are fewer tokens than the policy has sinks; the model's limit unless given.
        chunk: tokens read at once. What a sliding window leaves behind unwritten depends on it, nothing else.

    Raises:
        UsageError: a policy that does not fit the model.

    """
    n_layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    policy.check_model(n_layers, head_dim)
    context = config.max_position_embeddings if context is None else context
    policies = [policy.for_layer(i, n_layers) for i in range(n_layers)]
    leads = [lead_of(i, n_layers, own.tile) for i, own in enumerate(policies)]
    layers = list(zip(policies, config.sliding_windows, leads, strict=True))
    sink, recent, tiers = 0, 0, list[int]()
    for own, window, lead in dict.fromkeys(layers):
        times = layers.count((own, window, lead))
        width = -(-head_dim // LANES) * LANES
        sinks = min(own.sinks, context)
        sink += times * 2 * sinks * heads * width * DENSE_DTYPES[DENSE[own.dense]].itemsize
        dense, layouts = own.dense_layout(heads, head_dim), own.tier_layouts(heads, head_dim)
        stores = _stores(own, [layout.page_tiles for layout in layouts], tokens, window, chunk, lead)
        recent += times * stores[0].count * dense.nbytes
        tiers += [0] * (len(layouts) - len(tiers))
        for i, (layout, store) in enumerate(zip(layouts, stores[1:], strict=True)):
            tiers[i] += times * store.count * layout.nbytes
    return Plan(tokens, sink, tuple(tiers), recent)


def _stores(
    policy: CachePolicy, page_tiles: list[int], tokens: int, window: int | None, chunk: int, lead: int
) -> list[_Tiles]:
    """The recent segment and the tiers of a layer that has read so many tokens (engine/layer.py ``LayerCache``)."""
    recent, tiers = _Tiles(1), [_Tiles(each) for each in page_tiles]
    tile = policy.tile

    def first_seen(position: int) -> int:
        return 0 if window is None else max(0, position - policy.rollback + 1 - window) // tile

    for start in range(0, tokens, chunk if window is not None else max(tokens, 1)):
        stop = min(start + chunk, tokens) if window is not None else tokens
        for i, tier in enumerate(tiers):
            age = policy.tiers[i].after
            sealed = sealed_tiles(stop, age, lead, tile) if window is None or window > age else 0
            if tier.stop < sealed:
                tier.forget_before(first_seen(start))
                tier.extend(sealed)
        recent.extend(-(-stop // tile))
        source, horizon = recent, max(0, stop - policy.rollback)
        for i, tier in enumerate(tiers):
            entered = min(policy.boundary(horizon, i), horizon) // tile
            source.forget_before(max(first_seen(stop), min(tier.stop, entered)))
            source = tier
        source.forget_before(first_seen(stop))
    return [recent, *tiers]


# --- what there is ------------------------------------------------------------------------------------------------


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that can be had without swapping: of the machine, and of the control groups that we are in.

    None where nobody says so, which is everywhere but on Linux. ``root`` is where /proc and /sys are.
    """
    if sys.platform != "linux":
        return None
    found = [_meminfo(root / "proc/meminfo"), *_cgroups(root)]
    return min((nbytes for nbytes in found if nbytes is not None), default=None)


def _meminfo(path: Path) -> int | None:
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdecimal():
            return int(value.split()[0]) << 10
    return None


def _cgroups(root: Path) -> list[int | None]:
    """What is left in each control group from our own up, of both versions; a container sees its own as the topmost."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        found += [_left(top.joinpath(*parts[:n]), *names) for n in range(len(parts), -1, -1)]
    return found


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Bytes up to the limit of one group; what it only keeps of files counts as free. None without a limit."""
    most, current = (_text(folder / name).strip() for name in (limit, used))
    if not most.isdecimal() or not current.isdecimal() or int(most) >= UNLIMITED:
        return None
    kept = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    free = kept.get(reclaimable, "0").strip()
    return max(0, int(most) - int(current) + (int(free) if free.isdecimal() else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


# --- whether it fits ----------------------------------------------------------------------------------------------


def check_fits(
    config: ModelConfig,
    policy: CachePolicy,
    tokens: int,
    *,
    context: int | None = None,
    beside: Sequence[CachePolicy] = (),
    held: int = 0,
    available: int | None = None,
) -> int:
    """The bytes that a cache of so many tokens will take, if there are as many.

    Args:
        config, policy, tokens, context: see ``plan``.
        beside: policies of other caches that will hold the same tokens at the same time.
        held: bytes of it that are taken already.
        available: bytes that there are; ``available_nbytes()`` unless given. Where nobody knows, everything fits.

    Raises:
        UsageError: more than there are; with the window and bits that would fit, or the most tokens that do.

    """

    def needed(policy: CachePolicy, tokens: int) -> int:
        return sum(plan(config, each, tokens, context=context).total for each in (policy, *beside)) - held

    nbytes = needed(policy, tokens)
    room = available_nbytes() if available is None else available
    if room is None or nbytes <= room:
        return nbytes
    smaller = _largest_policy(policy, tokens, lambda each: needed(each, tokens) <= room)
    if smaller is not None:
        advice = f"window={smaller.window} k_bits={smaller.k_bits} v_bits={smaller.v_bits} would fit"
    elif most := _most_tokens(policy.tile, tokens, lambda n: needed(policy, n) <= room):
        advice = f"no window and bits make it fit, but {most} tokens do"
    else:
        advice = f"not even {policy.tile} tokens fit"
    beside_text = f" and {len(beside)} beside it" if beside else ""
    raise UsageError(
        f"a cache of {tokens} tokens{beside_text} needs {nbytes} bytes more, {room} bytes of memory are available: {advice}"
    )


def _largest_policy(policy: CachePolicy, tokens: int, fits: Callable[[CachePolicy], bool]) -> CachePolicy | None:
    """The policy with the most bits, and of these with the largest window, that fits; a window under 128 only if it must.

    Neither is larger than it was. Only what ``window``, ``k_bits`` and ``v_bits`` say is changed: older tiers and overrides
    stay as they are.
    """
    largest = min(policy.window, tokens)
    least = min(largest, CachePolicy().window)
    for low, high in ((least, largest), (0, least)):
        steps = range(-(-(high - low) // policy.tile) + 1)
        for bits in PROPOSED_BITS:

            def too_large(step: int, low: int = low, high: int = high, bits: int = bits) -> bool:
                changed = _changed(policy, min(low + step * policy.tile, high), bits)
                return changed is None or not fits(changed)

            if n := bisect_right(steps, False, key=too_large):
                return _changed(policy, min(low + (n - 1) * policy.tile, high), bits)
    return None


def _changed(policy: CachePolicy, window: int, bits: int) -> CachePolicy | None:
    """The policy with another window and no more bits than these, or None where there is none."""
    try:
        return replace(policy, window=window, k_bits=min(policy.k_bits, bits), v_bits=min(policy.v_bits, bits))
    except UsageError:
        return None


def _most_tokens(tile: int, tokens: int, fits: Callable[[int], bool]) -> int:
    """Tokens that fit, in whole tiles: the most, or nearly, as pages of tiers go all at once."""
    return tile * (bisect_right(range(1, tokens // tile + 1), False, key=lambda n: not fits(n * tile)))
