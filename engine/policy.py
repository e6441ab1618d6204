"""CachePolicy: what a cache keeps, and how precisely."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.layout import BF16, F16, F32, KIND_OF_BITS, PAGE, TILES, TileLayout
from ..kernels.routes import route
from ..kernels.simd import LANES
from ..models.check import shown
from ..models.errors import UsageError

DENSE = {"f16": F16, "bf16": BF16, "f32": F32}
BITS = (2, 3, 4, 8, 16, 32)
MAX_WINDOW = 1 << 24
MAX_SINKS = 1 << 16
_SUFFIXES = ("window", "sinks", "tile", "dense")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How the KV cache of a session is kept. Frozen, and checked when it is made.

    Attributes:
        window: tokens of the recent past that every query is guaranteed to see at high precision, itself included (with a
            window of 0, a query that ends a tile sees all of it, itself too, as old).
        sinks: first tokens of the text that stay at high precision for ever.
        k_bits, v_bits: bits of a code of the old segment, 2, 3, 4 or 8; 16 and 32 are float16 and float32.
        tile: tokens that are quantized together: 32, 64 or 128.
        dense: dtype of the sinks and the recent segment: "f16", "bf16" or "f32".

    Raises:
        UsageError: (a ValueError) a value out of its range, with the range.

    """

    window: int = 128
    sinks: int = 4
    k_bits: int = 4
    v_bits: int = 4
    tile: int = 64
    dense: str = "f16"

    def __post_init__(self) -> None:
        self._check_range("window", self.window, 0, MAX_WINDOW)
        self._check_range("sinks", self.sinks, 0, MAX_SINKS)
        for name, allowed in (("k_bits", BITS), ("v_bits", BITS), ("tile", TILES)):
            value = getattr(self, name)
            if not _is_int(value) or value not in allowed:
                nearest = f"; the nearest is {min(allowed, key=lambda a: abs(a - value))}" if _is_int(value) else ""
                raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, found {value!r}{nearest}")
        if not isinstance(self.dense, str) or self.dense not in DENSE:
            raise UsageError(f"dense must be one of {', '.join(DENSE)}, found {self.dense!r}")

    @staticmethod
    def _check_range(name: str, value: object, low: int, high: int) -> None:
        if not _is_int(value) or not low <= value <= high:  # type: ignore[operator]
            raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")

    @classmethod
    def full(cls) -> "CachePolicy":
        """Everything in float32: no token is ever rounded."""
        return cls(window=0, sinks=0, k_bits=32, v_bits=32, dense="f32")

    @classmethod
    def parse(cls, text: str) -> "CachePolicy":
        """The policy of a short name: "k4v2", "k8v8:window=64:sinks=0:tile=32:dense=bf16", or a dense type alone.

        "f32", "f16" and "bf16" keep every token in that type, without window and sinks; suffixes change that.

        Raises:
            UsageError: a name or suffix that is none, or a value out of its range.

        """
        name, *suffixes = text.split(":")
        fields, given = _named(name), set()
        try:
            if not fields:
                raise UsageError(f"the name must be one of {', '.join(DENSE)}, or like k4v4, found {shown(name)}")
            for suffix in suffixes:
                field, _, value = suffix.partition("=")
                if field not in _SUFFIXES or field in given:
                    raise UsageError(f"after the name, {', '.join(_SUFFIXES)} may follow once, found {shown(suffix)}")
                given.add(field)
                fields[field] = int(value) if re.fullmatch("[0-9]{1,9}", value) else value
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"cache policy {shown(text)}: {error}") from None

    @property
    def spec(self) -> str:
        """The one short name that ``parse`` turns into this policy; what is as the name implies is left out."""
        everything = CachePolicy(**_named(self.dense), tile=self.tile)
        name = self.dense if self == everything else f"k{self.k_bits}v{self.v_bits}"
        implied = CachePolicy(**_named(name))
        own = [field for field in _SUFFIXES if getattr(self, field) != getattr(implied, field)]
        return ":".join([name, *(f"{field}={getattr(self, field)}" for field in own)])

    def boundary(self, position: int) -> int:
        """B(p): the query at this position sees old tokens below it and dense ones from it on; a multiple of ``tile``."""
        return self.tile * max(0, (position + 1 - self.window) // self.tile)

    def boundaries(self, positions: np.ndarray) -> np.ndarray:
        """B(p) of many positions, int64."""
        return self.tile * np.maximum(0, (positions + 1 - self.window) // self.tile)

    def dense_layout(self, n_kv_heads: int, head_dim: int) -> TileLayout:
        """The layout of the recent segment's tiles."""
        return TileLayout(n_kv_heads, head_dim, self.tile, DENSE[self.dense], DENSE[self.dense])

    def old_layout(self, n_kv_heads: int, head_dim: int) -> TileLayout:
        """The layout of the old segment's tiles."""
        k, v = (_kind(bits, self.dense) for bits in (self.k_bits, self.v_bits))
        return TileLayout(n_kv_heads, head_dim, self.tile, k, v, page_tiles=PAGE // self.tile)

    def nbytes_per_token(self, n_kv_heads: int, head_dim: int) -> tuple[float, float]:
        """Bytes of one token of one layer: (old, dense), scales and padding included."""
        old, dense = self.old_layout(n_kv_heads, head_dim), self.dense_layout(n_kv_heads, head_dim)
        return old.nbytes / self.tile, dense.nbytes / self.tile

    def routes(self) -> dict[str, dict[str, str]]:
        """How a segment is computed, {"sink": {"k": ..., "v": ...}, "old": ..., "recent": ...}; see kernels/routes.py."""
        old, dense = self.old_layout(1, LANES), self.dense_layout(1, LANES)
        return {
            name: {"k": route(layout.k_kind), "v": route(layout.v_kind)}
            for name, layout in (("sink", dense), ("old", old), ("recent", dense))
        }

    def __str__(self) -> str:
        return (
            f"window={self.window} sinks={self.sinks} k_bits={self.k_bits} v_bits={self.v_bits} "
            f"tile={self.tile} dense={self.dense}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _named(name: str) -> dict[str, Any]:
    """The fields that the name of a policy stands for; none for what is no name."""
    if name in DENSE:
        bits = 32 if name == "f32" else 16
        return {"window": 0, "sinks": 0, "k_bits": bits, "v_bits": bits, "dense": name}
    codes = re.fullmatch("k([0-9]{1,9})v([0-9]{1,9})", name)
    return {} if codes is None else {"k_bits": int(codes[1]), "v_bits": int(codes[2])}


def _kind(bits: int, dense: str) -> int:
    """The format of so many bits; 16 bits are bfloat16 where the dense parts are."""
    if bits == 16:
        return BF16 if dense == "bf16" else F16
    return F32 if bits == 32 else KIND_OF_BITS[bits]
