"""CachePolicy: what a cache keeps, and how precisely."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..kernels.layout import BF16, F16, F32, KIND_OF_BITS, PAGE, TileLayout
from ..kernels.routes import route
from ..models.check import shown
from ..models.errors import UsageError
from ..models.limits import MAX_LAYERS, MAX_OVERRIDES, MAX_ROLLBACK, MAX_SINKS, MAX_TIERS, MAX_WINDOW
from .policy_fields import (
    BITS,
    DENSE_BITS,
    SCALARS,
    SIDE_AXES,
    SIDES,
    Override,
    Tier,
    check_field,
    settled_groups,
    settled_tiers,
)
from .policy_text import SUFFIXES, check_length, fields_of_line, fields_of_short, is_one_line, named, one_line
from .policy_toml import fields_of_toml, of_file, toml

__all__ = [
    "BITS", "DENSE", "MAX_ROLLBACK", "MAX_SINKS", "MAX_TIERS", "MAX_WINDOW", "PRESETS", "CachePolicy", "Override", "Tier",
]  # fmt: skip

SYSTEM_PAGE = 4096  # bytes: memory comes in multiples of it
MOST_PAGES = 4  # that are made one page in longer tiers, where this leaves less of the memory unused
SHORT_PAGE = 128  # positions of a page of short tiers: a page takes up room until all of its tokens have left it
DENSE = {"f16": F16, "bf16": BF16, "f32": F32}


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How the KV cache of a session is kept. Frozen, hashable, and checked when it is made.

    Attributes:
        window: tokens of the recent past that every query is guaranteed to see at high precision, itself included (with a
            window of 0, a query that ends a tile sees all of it, itself too, as old).
        sinks: first tokens of the text that stay at high precision for ever.
        k_bits, v_bits: bits of a code of the first old tier, 2, 3, 4 or 8; 16 and 32 are float16 (bfloat16 where ``dense``
            is) and float32, whose axis and group have no effect and must be the usual ones.
        tile: tokens that are quantized together: 32, 64 or 128.
        dense: dtype of the sinks and the recent segment: "f16", "bf16" or "f32".
        k_axis, v_axis: which have scales of their own: "channel" or "token".
        k_group, v_group: by token, channels that share a scale, a multiple of 16 up to 256; 0 for the layout's default. By
            channel it is the tile, which is kept as 0.
        rotate_k, rotate_v: whether keys (and queries), or values, are kept Hadamard-rotated; only where a tier has codes of
            them.
        scales: how scales and minima of codes under 8 bits are found: "fit", by least squares, or "range", the smallest and
            the largest value (kernels/quantize.py).
        rollback: tokens that a session can always be taken back by.
        older: further tiers of age, youngest first, at most 3; each begins ``after`` more tokens than the one before.
        overrides: what is otherwise in some layers; of two that name a field for a layer the later one counts. They must
            make legal policies in a model of 4,096 layers; what else overlaps in a smaller one, ``check_model`` finds.

    Raises:
        UsageError: (a ValueError) a value out of its range, with the range and the nearest legal value.

    """

    window: int = 128
    sinks: int = 4
    k_bits: int = 4
    v_bits: int = 4
    tile: int = 64
    dense: str = "f16"
    k_axis: str = SIDE_AXES["k"]
    v_axis: str = SIDE_AXES["v"]
    k_group: int = 0
    v_group: int = 0
    rotate_k: bool = True
    rotate_v: bool = True
    scales: str = "fit"
    rollback: int = 0
    older: tuple[Tier, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for name in SCALARS:
            check_field(name, getattr(self, name))
        set_ = object.__setattr__
        for name, group in settled_groups(self._fields(), self.tile).items():
            set_(self, name, group)
        set_(self, "older", settled_tiers(self.older, self.window, self.tile))
        if not isinstance(self.overrides, list | tuple) or not all(isinstance(o, Override) for o in self.overrides):
            raise UsageError(f"overrides must be a tuple of Override, found {shown(self.overrides)}")
        set_(self, "overrides", tuple(self.overrides))
        if len(self.overrides) > MAX_OVERRIDES:
            raise UsageError(f"overrides must be at most {MAX_OVERRIDES}, found {len(self.overrides)}")
        if self.overrides:
            check_length(str(self))
            self._check_overrides()

    def _check_overrides(self) -> None:
        """Make the policies of all layers of a deep model, one for each combination of overrides."""
        spans = [override.spans(MAX_LAYERS) for override in self.overrides]
        starts = {layer for own in spans for first, last in own for layer in (first, last + 1)}
        seen: set[tuple[bool, ...]] = set()
        for layer in sorted(starts - {MAX_LAYERS}):
            covered = tuple(any(first <= layer <= last for first, last in own) for own in spans)
            if covered not in seen:
                seen.add(covered)
                self._with([o for o, covers in zip(self.overrides, covered, strict=True) if covers])

    def _with(self, overrides: list[Override]) -> "CachePolicy":
        """The policy that these overrides make of this one, in their order."""
        own: dict[str, Any] = {}
        for override in overrides:
            own |= dict(override.fields)
        try:
            return replace(self, overrides=(), **own)
        except UsageError as error:
            which = ", ".join(override.layers for override in overrides)
            raise UsageError(f"with the overrides for layers {which}: {error}") from None

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def full(cls) -> "CachePolicy":
        """Everything in float32: no token is ever rounded."""
        return cls(**named("f32"))

    # --- as text -------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> "CachePolicy":
        """The policy of a text: the name of a preset, a short name, or the one-line form.

        Short names are "k4v2", "k8v8:window=64:sinks=0:tile=32:dense=bf16", or a dense type alone: "f32", "f16" and "bf16"
        keep every token in that type, without window and sinks; suffixes change that. The one-line form is what ``str``
        gives, in any order; what it does not name is as by default (policy_text.py).

        Raises:
            UsageError: a text that is none of them, or a value out of its range.

        """
        if text in PRESETS:
            return PRESETS[text]
        try:
            check_length(text)
            return cls(**(fields_of_line(text) if is_one_line(text) else fields_of_short(text, PRESETS)))
        except UsageError as error:
            raise UsageError(f"cache policy {shown(text)}: {error}") from None

    def __str__(self) -> str:
        """The canonical one-line form: ``parse`` reads it back, and ``digest`` is made of it."""
        named_fields = self._fields()
        if not self.rollback:
            del named_fields["rollback"]
        return one_line(named_fields)

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(str(self).encode("ascii")).hexdigest()[:16]

    @property
    def spec(self) -> str:
        """The short name that ``parse`` turns into this policy, without what it implies; ``str`` where there is none."""
        everything = CachePolicy(**named(self.dense), tile=self.tile)
        name = self.dense if self == everything else f"k{self.k_bits}v{self.v_bits}"
        implied = CachePolicy(**named(name))
        own = {field: getattr(self, field) for field in SUFFIXES if getattr(self, field) != getattr(implied, field)}
        if replace(implied, **own) != self:
            return str(self)
        return ":".join([name, *(f"{field}={value}" for field, value in own.items())])

    @classmethod
    def from_toml(cls, text: str) -> "CachePolicy":
        """The policy of a TOML text: the names of the fields as keys, and [[older]] and [[overrides]] as tables.

        Raises:
            UsageError: what is no TOML; unknown keys; wrong types, and values out of their range.

        """
        return cls(**fields_of_toml(text))

    def to_toml(self) -> str:
        """The TOML that ``from_toml`` reads back, every field written out."""
        return toml(self._fields())

    @classmethod
    def load(cls, path: str | Path) -> "CachePolicy":
        """The policy of a TOML file of at most 1 MiB; UsageError, which names the file, where there is none in it."""
        return of_file(Path(path), "policy", cls.from_toml)

    # --- what it says --------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """All old tiers, youngest first: the policy's own, after the window, then ``older``."""
        return Tier(self.window, **{name: getattr(self, name) for name in SIDES}), *self.older

    @property
    def rotates(self) -> tuple[bool, bool]:
        """Whether keys, and values, are kept rotated: it is of use to codes only."""
        k, v = (any(getattr(tier, bits) not in DENSE_BITS for tier in self.tiers) for bits in ("k_bits", "v_bits"))
        return self.rotate_k and k, self.rotate_v and v

    def for_layer(self, layer: int, n_layers: int) -> "CachePolicy":
        """The policy of one layer of a model, without overrides.

        Args:
            layer: from 0 on.
            n_layers: of the model.

        Raises:
            UsageError: a layer, or one that an override names, that the model has not; overrides that together are illegal.

        """
        if not 0 <= layer < n_layers:
            raise UsageError(f"layer must be from 0 to {n_layers - 1}, found {layer}")
        if not self.overrides:
            return self
        return self._with([override for override in self.overrides if override.covers(layer, n_layers)])

    def check_model(self, n_layers: int, head_dim: int) -> None:
        """UsageError where an override names a layer that a model has not, or a group does not fit its ``head_dim``."""
        first: dict[CachePolicy, int] = {}
        for layer in range(n_layers):
            first.setdefault(self.for_layer(layer, n_layers), layer)
        for policy, layer in first.items():
            try:
                policy.tier_layouts(1, head_dim)
            except UsageError as error:
                raise UsageError(f"layer {layer}: {error}" if self.overrides else str(error)) from None

    def boundary(self, position: int, tier: int = 0) -> int:
        """B(p) of a tier: the query at this position sees what lies below it in this tier or an older one.

        A multiple of ``tile``; from the B(p) of tier 0 on tokens are dense.
        """
        after = self.older[tier - 1].after if tier else self.window
        return self.tile * max(0, (position + 1 - after) // self.tile)

    def dense_layout(self, n_kv_heads: int, head_dim: int) -> TileLayout:
        """The layout of the recent segment's tiles."""
        return TileLayout(n_kv_heads, head_dim, self.tile, DENSE[self.dense], DENSE[self.dense])

    def tier_layouts(self, n_kv_heads: int, head_dim: int) -> list[TileLayout]:
        """The layouts of the old tiers' tiles, one a tier; UsageError for a group or codes that do not fit ``head_dim``."""
        layouts: list[TileLayout] = []
        ends = [*(tier.after for tier in self.older), math.inf]
        for name, tier in self._named_tiers().items():
            k, v = self._kinds(tier)
            axes = tier.k_axis, tier.v_axis, tier.k_group, tier.v_group
            is_short = ends[len(layouts)] - tier.after < 4 * PAGE
            pages = [SHORT_PAGE] if is_short else [count * PAGE for count in range(1, MOST_PAGES + 1)]
            try:
                possible = [
                    TileLayout(n_kv_heads, head_dim, self.tile, k, v, *axes, page_tiles=page // self.tile)
                    for page in pages
                ]
                layouts.append(min(possible, key=_unused))
            except ValueError as error:
                raise UsageError(f"{name}: {error}") from None
        return layouts

    def old_layout(self, n_kv_heads: int, head_dim: int) -> TileLayout:
        """The layout of the first old tier's tiles."""
        return self.tier_layouts(n_kv_heads, head_dim)[0]

    def nbytes_per_token(self, n_kv_heads: int, head_dim: int) -> tuple[list[float], float]:
        """Bytes of one token of one layer: (of each tier, dense), scales and padding included; without overrides."""
        tiers, dense = self.tier_layouts(n_kv_heads, head_dim), self.dense_layout(n_kv_heads, head_dim)
        return [layout.nbytes / self.tile for layout in tiers], dense.nbytes / self.tile

    def routes(self) -> dict[str, dict[str, str]]:
        """How each segment is computed, without overrides; see kernels/routes.py.

        {"sink": {"k": ..., "v": ...}, "old": ..., "recent": ...}, with "old2" and so on for further tiers.
        """
        dense = DENSE[self.dense], DENSE[self.dense]
        kinds = {name: self._kinds(tier) for name, tier in self._named_tiers().items()}
        segments = {"sink": dense, **kinds, "recent": dense}
        return {name: {"k": route(k), "v": route(v)} for name, (k, v) in segments.items()}

    def _named_tiers(self) -> Mapping[str, Tier]:
        return {f"old{i + 1 if i else ''}": tier for i, tier in enumerate(self.tiers)}

    def _kinds(self, tier: Tier) -> tuple[int, int]:
        """The formats of a tier's K and V; 16 bits are bfloat16 where the dense parts are."""
        half = BF16 if self.dense == "bf16" else F16
        kinds = {**KIND_OF_BITS, 16: half, 32: F32}
        return kinds[tier.k_bits], kinds[tier.v_bits]


def _unused(layout: TileLayout) -> float:
    """The part of a page's memory, which comes in whole pages of the system, that nothing is written to; 0 up to 1 %."""
    nbytes = layout.page_tiles * layout.nbytes
    unused = -nbytes % SYSTEM_PAGE / nbytes
    return unused if unused > 0.01 else 0.0


PRESETS = {
    "full": CachePolicy.full(),
    "f16": CachePolicy(**named("f16")),
    "balanced": CachePolicy(),
    "small": CachePolicy(k_bits=3, v_bits=3),
    "tiny": CachePolicy(
        window=64, tile=128, v_bits=3, older=(Tier(128, k_bits=3, v_bits=3), Tier(256, k_bits=3, v_bits=2))
    ),
}
"""Policies by name. What they cost in quality and memory is in docs/quality.md."""
