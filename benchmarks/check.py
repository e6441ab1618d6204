"""Whether the kernels are right in every case of the table, at a size that float64 can follow.

What is stored in a tile is read back by the tests' description of the layout (tests/kernels/oracle.py), which shares no
code with the kernels, and the bounds are the tests' too. So the answer wanted is that of ``kernels.reference`` over the
very numbers that the kernel gets.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cases import Case

from mixkv.kernels import Segment, empty_state, flash_attention, merge_states, quantize
from mixkv.kernels.layout import F16, F32, KIND_OF_BITS, PAGE, TileLayout
from mixkv.kernels.matmul import matvec
from mixkv.kernels.quantize import quantize_tile, store_rows
from mixkv.kernels.reference import reference_attention

KINDS = {32: F32, 16: F16, **KIND_OF_BITS}
MERGE_BOUND = 1e-6  # of |v| <= 1, absolute; as in the tests
MATVEC_BOUND = 1e-6  # of the sum of the products' magnitudes


def _load_oracle() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "oracle.py"
    spec = importlib.util.spec_from_file_location("mixkv_tests_oracle", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


@dataclass(frozen=True)
class Result:
    """The largest error found, and the largest that would have been right."""

    error: float
    bound: float
    unit: str

    @property
    def right(self) -> bool:
        """Whether the error is within the bound; not so where it is not a number."""
        return self.error <= self.bound


def normal(rng: np.random.Generator, *shape: int) -> Any:
    """Standard-normal numbers, float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def layout_of(case: Case) -> TileLayout:
    """The layout of the tiles of a case."""
    return TileLayout(
        case.kv_heads, case.head_dim, case.tile, KINDS[case.k_bits], KINDS[case.v_bits], case.k_axis, case.v_axis,
        page_tiles=PAGE // case.tile,
    )  # fmt: skip


def quantize_as(case: Case, k: Any, v: Any) -> Segment:
    """``quantize`` with the formats of a case."""
    return quantize(
        k, v, k_bits=case.k_bits, v_bits=case.v_bits, tile=case.tile, k_axis=case.k_axis, v_axis=case.v_axis
    )


def _names(case: Case) -> tuple[str, str]:
    """The names that the tests have for the formats of K and of V."""
    both = ((case.k_bits, case.k_axis), (case.v_bits, case.v_axis))
    k, v = (f"f{bits}" if bits in (32, 16) else f"q{bits}{axis[0]}" for bits, axis in both)
    return k, v


@lru_cache(maxsize=8)
def _keys(stored: Case) -> tuple[Segment, Any, Any]:
    """Keys in the formats of a case, and what they are in float64."""
    rng = np.random.default_rng(stored.keys + stored.head_dim)
    shape = (stored.keys, stored.kv_heads, stored.head_dim)
    segment = quantize_as(stored, normal(rng, *shape), normal(rng, *shape))
    return (segment, *oracle.read_segment(segment, _names(stored), stored.tile))


def _same_keys(case: Case) -> Case:
    """A case that stands for all that can run on the same keys, for the cache above."""
    return Case(
        "", "", "attend", 0, case.kv_heads, case.head_dim, case.keys, 0, case.k_bits, case.v_bits, case.k_axis, case.v_axis,
        case.tile,
    )  # fmt: skip


def reduced(case: Case, keys: int, queries: int) -> Case:
    """The case at no more keys and queries than these, and a matrix with no more rows."""
    return replace(case, keys=min(case.keys, keys), queries=min(case.queries, queries), rows=min(case.rows, keys))


def check_attend(case: Case, keys: tuple[Segment, Any, Any] | None = None) -> Result:
    """``flash_attention`` against the reference: output, M and S; the error is in parts of what each may be wrong by."""
    segment, k, v = _keys(_same_keys(case)) if keys is None else keys
    q = normal(np.random.default_rng(case.q_heads), case.queries, case.q_heads, case.head_dim)
    state, out = empty_state(case.q_heads, case.queries), np.full_like(q, np.nan)
    flash_attention(q, segment, causal=case.causal, precision=case.precision, state=state, out=out)
    # The queries are the last ones: each sees one key more than the one before.
    last = case.keys - case.queries + 1 + np.arange(case.queries)
    want = reference_attention(q, k, v, stop=last if case.causal else None)
    coded = min(case.k_bits, case.v_bits) <= 8 and case.precision != "f32"
    tolerance = oracle.TOLERANCE
    out_bound = tolerance["out", "codes" if coded else "f32"] * np.abs(v).max()
    state_kind = "codes" if coded else "any"
    parts = (
        np.abs(out - want[0]).max() / out_bound,
        np.abs(state[..., 0] - want[1]).max() / tolerance["M", state_kind],
        np.abs(state[..., 1] / want[2] - 1).max() / tolerance["S", state_kind],
    )
    return Result(float(max(parts)), 1.0, f"of the bound, {out_bound:.1g} for the output")


def check_quantize(case: Case) -> Result:
    """Codes against what was quantized: half a step, and what float16 costs a scale and a minimum."""
    rng = np.random.default_rng(case.head_dim)
    both = [normal(rng, case.tile, case.kv_heads, case.head_dim) for _ in range(2)]
    dense = TileLayout(case.kv_heads, case.head_dim, case.tile, F32, F32)
    source = dense.empty_page()
    store_rows(dense, source, 0, *both)
    page, shape = quantize_tile(source, dense, layout_of(case)), (case.tile, case.kv_heads, case.head_dim)
    stored = oracle.read_tile(oracle.page_tile(page, 0, _names(case), *shape), _names(case), *shape)
    worst = 0.0
    for is_k, x, found in zip((True, False), both, stored, strict=True):
        bits, axis = (case.k_bits, case.k_axis) if is_k else (case.v_bits, case.v_axis)
        name, side = _names(case)[not is_k], "kv"[not is_k]
        group = case.tile if axis == "channel" else oracle.Format(name, side).group(case.head_dim)
        x = x.astype(np.float64).swapaxes(0, 1)  # heads, tokens, channels
        values = found.swapaxes(0, 1)
        if axis == "channel":
            x, values = x.swapaxes(1, 2), values.swapaxes(1, 2)
        x, values = (a.reshape(case.kv_heads, -1, group) for a in (x, values))  # what shares a scale comes last
        low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
        largest = 2**bits - 1
        half_ulp = 2.0**-11  # of float16, relative
        step = (high - low) / largest * (1 + half_ulp)
        bound = step / 2 + (high - low) * half_ulp + np.abs(low) * half_ulp + 1e-6
        worst = max(worst, float((np.abs(values - x) / bound).max()))
    return Result(worst, 1.0, "of the bound, half a step and a half's rounding")


def check_merge(case: Case) -> Result:
    """Two partial attentions merged, against the attention over the union of their keys."""
    rng = np.random.default_rng(case.queries)
    q = normal(rng, case.queries, case.q_heads, case.head_dim)
    k = normal(rng, case.keys, case.kv_heads, case.head_dim)
    v = rng.uniform(-1, 1, k.shape).astype(np.float32)
    halves = []
    for half in (slice(0, case.keys // 3), slice(case.keys // 3, None)):
        state = empty_state(case.q_heads, case.queries)
        halves += [flash_attention(q, k[half], v[half], state=state), state]
    out, _ = merge_states(*halves)
    return Result(float(np.abs(out - reference_attention(q, k, v)[0]).max()), MERGE_BOUND, "absolute, |v| <= 1")


def check_matvec(case: Case) -> Result:
    """The product of a matrix with a row, against float64."""
    rng = np.random.default_rng(case.rows)
    weight, x = normal(rng, case.rows, case.columns), normal(rng, case.columns)
    want, most = weight.astype(np.float64) @ x.astype(np.float64), np.abs(weight) @ np.abs(x)
    return Result(float((np.abs(matvec(weight, x) - want) / most).max()), MATVEC_BOUND, "of the products' magnitudes")


CHECKS: dict[str, Callable[[Case], Result]] = {
    "attend": check_attend,
    "quantize": check_quantize,
    "merge": check_merge,
    "matvec": check_matvec,
}


def check(case: Case, keys: int = 1_100, queries: int = 70) -> Result:
    """A case of the table at no more than so many keys and queries. 1,100 fill neither a tile nor a split."""
    return CHECKS[case.kernel](reduced(case, keys, queries))
