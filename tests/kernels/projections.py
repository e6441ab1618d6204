"""Linear layers of packed weights, and what they must give, in float64.

How codes lie in a row is written from the description of ``CodedRows``, how activations are rounded from that of
kernels/activations.py, both apart from the package.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from mixkv.kernels.activations import CLAMPED, GELU, NORM, PLAIN, SILU
from mixkv.kernels.chain import Projection, chain_addresses, chain_table, room_nbytes
from mixkv.kernels.dots import next_byte_rows
from mixkv.kernels.jit import kernel
from mixkv.kernels.project import GATE, OWN_BUFFERS, run_chain
from mixkv.kernels.weights import (
    W4,
    W4M,
    W8,
    WBF16,
    WF16,
    WF32,
    CodedRows,
    Matrix,
    Stored,
    empty_matrix,
    store_coded,
    store_dense,
)

from .oracle import DTYPES, normal

KINDS = {"q8": W8, "q4": W4, "q4m": W4M, "bf16": WBF16, "f16": WF16, "f32": WF32}
CODES = ("q8", "q4", "q4m")
LOWEST = {"q8": -128, "q4": -8, "q4m": 0}  # of the codes less their middle
LEVELS = {"q8": 256, "q4": 16, "q4m": 16}


def silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def gelu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def clamped(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


GATES = {"gate": silu, "gelu": gelu, "clamped": clamped}
HOWS = {"plain": PLAIN, "norm": NORM, "gate": SILU, "gelu": GELU, "clamped": CLAMPED}
GROUP = 32

# Largest difference from float64, of the largest output of the row: sums of codes are exact within a group of 32, numbers
# are added one after the other
TOLERANCE = {"codes": 1e-6, "numbers": 2e-6}
# A number so close to halfway between two codes, in steps, may be rounded to either: 127 times what a SiLU costs without a
# fused multiply-add is 2e-4.
HALFWAY = 5e-4


# --- Weights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix as a file has them, and their values, float64 (rows, columns)."""

    kind: str
    stored: Stored
    values: np.ndarray


def coded_rows(
    kind: str, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None, columns: int | None = None
) -> Rows:
    """Rows of codes less their middle (rows, groups, 32), scales and minima (rows, groups)."""
    rows, groups, _ = codes.shape
    if kind == "q8":
        stored = codes.astype(np.int8).view(np.uint8)
    else:
        stored, unsigned = np.zeros((rows, groups, 16), np.uint8), (codes - LOWEST[kind]).astype(np.uint8)
        for column in range(GROUP):
            stored[:, :, column % 16] |= unsigned[:, :, column] << (4 * (column // 16))
    scales = scales.astype(np.float16)
    values = codes * scales.astype(np.float64)[..., None]
    if minima is not None:
        minima = minima.astype(np.float16)
        values = values + minima.astype(np.float64)[..., None]
    values = values.reshape(rows, groups * GROUP)[:, :columns]
    return Rows(kind, CodedRows(KINDS[kind], np.ascontiguousarray(stored).view(np.uint32), scales, minima), values)


def random_rows(rng: np.random.Generator, kind: str, rows: int, columns: int) -> Rows:
    """Any codes, also in the columns that fill the last group, and scales that differ much."""
    if kind in DTYPES:
        dense = (0.3 * normal(rng, rows, columns)).astype(DTYPES[kind])
        return Rows(kind, dense, dense.astype(np.float64))
    groups = -(-columns // GROUP)
    codes = rng.integers(LOWEST[kind], LOWEST[kind] + LEVELS[kind], (rows, groups, GROUP))
    scales = rng.uniform(0.1, 1, (rows, groups)) / LEVELS[kind]
    minima = -scales * rng.uniform(5, 10, scales.shape) if kind == "q4m" else None
    return coded_rows(kind, codes, scales, minima, columns)


def packed(*tensors: Rows) -> Matrix:
    """A matrix of rows of some tensors of one kind, one below the other; all but the last end with a block of 16."""
    kind = tensors[0].kind
    rows = [len(x.values) for x in tensors]
    matrix, first = empty_matrix(KINDS[kind], sum(rows), tensors[0].values.shape[1]), 0
    for tensor, count in zip(tensors, rows, strict=True):
        (store_dense if kind in DTYPES else store_coded)(matrix, first, tensor.stored)
        first += count
    return matrix


# --- Layers ---------------------------------------------------------------------------------------------------------------


def round_groups(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (T, columns) rounded to 127ths of the largest of each 32; and by how much each number may be off, mostly 0."""
    columns = x.shape[1]
    groups = np.pad(x, ((0, 0), (0, -columns % GROUP))).reshape(len(x), -1, GROUP)
    steps = np.abs(groups).max(axis=2, keepdims=True) / 127
    quotients = groups / np.where(steps == 0, np.inf, steps)
    halfway = np.abs(np.abs(quotients - np.rint(quotients)) - 0.5) < HALFWAY
    return tuple((y * steps).reshape(len(x), -1)[:, :columns] for y in (np.rint(quotients), halfway))


@dataclass(frozen=True)
class Layer:
    """A linear layer: matrices one below the other, with what comes before and after the product."""

    parts: Sequence[Rows]
    how: str = "plain"
    bias: np.ndarray | None = None
    norm_weight: np.ndarray | None = None
    eps: float = 1e-5

    @property
    def rows(self) -> int:
        return sum(len(part.values) for part in self.parts)

    @property
    def columns(self) -> int:
        return self.parts[0].values.shape[1]

    def projection(self) -> Projection:
        return Projection([packed(part) for part in self.parts], self.bias, HOWS[self.how], self.norm_weight, self.eps)

    def input(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        return normal(rng, rows, self.columns * (2 if self.how in GATES else 1))

    def before(self, x: np.ndarray) -> np.ndarray:
        """What is multiplied, in float64."""
        x = x.astype(np.float64)
        if self.how == "norm":
            return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + self.eps) * self.norm_weight
        if self.how in GATES:
            return GATES[self.how](x[:, : self.columns], x[:, self.columns :])
        return x

    def expected(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The outputs in float64 (T, rows), and by how much each may be off because a number is nearly halfway."""
        x = self.before(x)
        rounded, doubts = round_groups(x)
        outputs = [(rounded if part.kind in CODES else x) @ part.values.T for part in self.parts]
        allowed = [doubts @ np.abs(part.values).T * (part.kind in CODES) for part in self.parts]
        want = np.concatenate(outputs, axis=1)
        return want if self.bias is None else want + self.bias, np.concatenate(allowed, axis=1)

    def error(self, x: np.ndarray, found: np.ndarray) -> float:
        """Largest difference of what was found, in parts of what is tolerated."""
        want, allowed = self.expected(x)
        assert found.dtype == np.float32 and found.shape == want.shape
        excess = np.maximum(np.abs(found - want) - allowed, 0)
        largest = np.abs(want).max(axis=1, keepdims=True)
        tolerance = max(TOLERANCE["codes" if part.kind in CODES else "numbers"] for part in self.parts)
        return float((excess / np.where(largest == 0, 1e-30, largest)).max(initial=0)) / tolerance


def random_layer(
    rng: np.random.Generator, parts: Sequence[tuple[str, int]], columns: int, how: str = "plain", biased: bool = False
) -> Layer:
    """A layer of so many rows of each kind."""
    rows = sum(count for _, count in parts)
    bias = normal(rng, rows) if biased else None
    weight = rng.uniform(0.5, 1.5, columns).astype(np.float32) if how == "norm" else None
    return Layer([random_rows(rng, kind, count, columns) for kind, count in parts], how, bias, weight)


def apply(layer: Layer, x: np.ndarray, workers: int | None = None) -> np.ndarray:
    return layer.projection()(x, numba.get_num_threads() if workers is None else workers)


def mlp(layers: Sequence[Layer], x: np.ndarray, workers: int, cut: int = 0, together: bool = False) -> np.ndarray:
    """An MLP, as one chain: ``layers`` are gate and up, behind a norm, and down, behind a gate.

    cut: 1 to run the second link in a call of its own. together: gate and up are one matrix. Fails where the gate was not
    given to the first link, or where many rows were written to the buffer between.
    """
    first, second = layers
    norm = first.norm_weight
    matrices = [packed(*first.parts)] if together else [packed(part) for part in first.parts]
    links = (Projection(matrices, None, NORM, norm, first.eps), second.projection())
    between, out = np.full((len(x), first.rows), np.nan, np.float32), np.empty((len(x), second.rows), np.float32)
    table = chain_table([links[0].link(OWN_BUFFERS, OWN_BUFFERS + 1), links[1].link(OWN_BUFFERS + 1, OWN_BUFFERS + 2)])
    assert list(table[:, GATE]) == [HOWS[second.how], 0]
    room = np.full(room_nbytes(table, len(x)) + 128, 0xA5, np.uint8)
    tasks, addresses = chain_addresses(2, room[64:], [x, between, out])
    if cut:
        assert run_chain(table[:1], 0, addresses, len(x), workers) == 1
    assert run_chain(table, cut, addresses, len(x), workers) == 2
    del tasks
    assert (room[:64] == 0xA5).all() and (room[-64:] == 0xA5).all()
    assert len(x) == 1 or np.isnan(between).all()
    return out


def random_mlp(rng: np.random.Generator, kinds: Sequence[str], hidden: int, inner: int, gate: str) -> list[Layer]:
    """Gate, up and down of these kinds."""
    gate_up = random_layer(rng, [(kinds[0], inner), (kinds[1], inner)], hidden, "norm")
    return [gate_up, random_layer(rng, [(kinds[2], hidden)], inner, gate)]


# --- What another process can tell of its CPU ----------------------------------------------------------------------------


@kernel
def _byte_rows(asked, found):
    for i in range(asked.size):
        found[i] = next_byte_rows(asked[i])


def byte_rows() -> list[int]:
    """The numbers of rows that dot products of bytes take at once; always the largest that there is and that is wanted."""
    asked = np.arange(1, 41)
    found = np.zeros_like(asked)
    _byte_rows(asked, found)
    there = np.unique(found)
    np.testing.assert_array_equal(found, [max(x for x in there if x <= want) for want in asked])
    return there.tolist()


def wrong_byte_products() -> list[str]:
    """Dot products of codes and bytes that are not exact.

    A group of whole numbers of which the largest is 127 is rounded to itself, and its scale is 1; scales of weights are
    whole, too. Two neighbouring products of 255 and 127 are beyond 16 bits.
    """
    rng = np.random.default_rng(31)
    wrong = []
    for kind, groups in itertools.product(CODES, (1, 2, 7)):
        lowest, highest = LOWEST[kind], LOWEST[kind] + LEVELS[kind] - 1
        codes = rng.integers(lowest, highest + 1, (40, groups, GROUP))
        codes[0], codes[1], codes[2, :, ::2], codes[2, :, 1::2] = lowest, highest, lowest, highest
        scales = rng.integers(1, 3, (40, groups))
        layer = Layer([coded_rows(kind, codes, scales, rng.integers(-9, 9, (40, groups)) if kind == "q4m" else None)])
        x = rng.integers(-127, 128, (17, groups, GROUP))
        x[:, :, 5] = 127
        x[0], x[1], x[2, :, ::2], x[2, :, 1::2] = 127, -127, 127, -127
        x = x.reshape(17, -1).astype(np.float32)
        want = x.astype(np.float64) @ layer.parts[0].values.T
        assert np.abs(want).max() < 2**24
        for rows in (1, 2, 3, 4, 7, 8, 9, 17):
            for first in {0, 1, 2, 17 - rows} if rows <= 3 else {0}:
                part = slice(first, first + rows)
                if not np.array_equal(apply(layer, x[part]), want[part]):
                    wrong.append(f"{kind}, {groups} groups, rows {first} to {first + rows}")
    return wrong


def _layers() -> dict[str, Layer]:
    """Layers of every kind behind everything that can come before, and one of all kinds."""
    rng = np.random.default_rng(32)
    layers = {}
    for kind, how in itertools.product(KINDS, HOWS):
        layers[f"{how} {kind}"] = random_layer(rng, [(kind, 41)], 80, how, biased=how == "norm")
    layers["norm everything"] = random_layer(rng, [(kind, 25) for kind in KINDS], 112, "norm", biased=True)
    return layers


def projection_errors() -> dict[str, float]:
    """The largest error of each layer, in parts of what is tolerated."""
    errors, rng = {}, np.random.default_rng(33)
    for name, layer in _layers().items():
        errors[name] = 0.0
        for rows in (1, 2, 5, 19):
            x = layer.input(rng, rows)
            errors[name] = max(errors[name], layer.error(x, apply(layer, x)))
    return errors


def projection_bits() -> dict[str, str]:
    """Hashes of the outputs of the same layers."""
    hashes, rng = {}, np.random.default_rng(34)
    for name, layer in _layers().items():
        for rows in (1, 2, 5, 19):
            found = apply(layer, layer.input(rng, rows))
            hashes[f"{name} {rows}"] = hashlib.sha256(found.tobytes()).hexdigest()
    layers = random_mlp(rng, ("q4m", "q8", "q4"), 80, 224, "gate")
    x = layers[0].input(rng, 19)
    for rows in (1, 2, 5, 19):
        hashes[f"mlp {rows}"] = hashlib.sha256(mlp(layers, x[:rows], numba.get_num_threads()).tobytes()).hexdigest()
    return hashes


def projections() -> dict[str, Any]:
    """Everything of the above."""
    return {
        "byte rows": byte_rows(), "wrong": wrong_byte_products(), "errors": projection_errors(),
        "bits": projection_bits(),
    }  # fmt: skip
