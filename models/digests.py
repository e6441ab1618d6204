"""A digest of every tensor of a model as it is kept in memory, by Hugging Face's names: so a change can be named."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ..kernels.simd import LANES
from ..kernels.weights import NAMES, Matrix
from .config import ModelConfig
from .linear import FloatLinear, Norm, PackedLinear
from .load import expected_tensors
from .transformer import Weights

DIGITS = 16  # hexadecimal, of SHA-256
# The tensors whose rows a layer has one below the other, and the norm in front of it
_TENSORS = {
    "embedding": ["model.embed_tokens"], "head": ["lm_head"],
    "qkv": [f"self_attn.{part}_proj" for part in "qkv"], "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
}  # fmt: skip
_NORMS = {"head": "model.norm", "qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}

Rows = Matrix | NDArray[np.float32]  # some of a layer's, packed or not


def digests(config: ModelConfig, weights: Weights) -> dict[str, str]:
    """The format and 16 hexadecimal digits of SHA-256 of each tensor: {"model.norm.weight": "f32 0123456789abcdef"}.

    All bytes count, those that fill up blocks included. Where tensors cannot be told apart in memory, or have no name in
    Hugging Face's terms, the layer stands for them: "model.layers.3.qkv.weight". A tied output head is the embedding, and
    not named again. TypeError for a layer that this does not know.
    """
    rows = {name: shape[0] for name, shape in expected_tensors(config).items()} | {"lm_head.weight": config.vocab_size}
    layers = {"embedding": weights.embedding}
    for i, layer in enumerate(weights.layers):
        layers |= {f"model.layers.{i}.{field.name}": getattr(layer, field.name) for field in fields(layer)}
    found: dict[str, str] = {}
    for name, linear in layers.items():
        found |= _linear(name, linear, rows)
    head = dict(_linear("head", weights.head, rows))
    if [id(x) for x in _matrices(weights.head)] == [id(x) for x in _matrices(weights.embedding)]:
        del head["lm_head.weight"]
    return found | head


def _matrices(linear: object) -> list[Rows]:
    """What holds the numbers of a layer's matrix, in the order of its rows."""
    if isinstance(linear, PackedLinear):
        return [*linear.parts]
    if isinstance(linear, FloatLinear):
        return [linear.weight]
    raise TypeError(f"a layer must be a FloatLinear or PackedLinear, found {type(linear).__name__}")


def _linear(place: str, linear: object, rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The digests of one layer: matrices, biases, and the norm in front. rows: of every tensor by its name."""
    prefix, dot, field = place.rpartition(".")
    names = [prefix + dot + tensor for tensor in _TENSORS.get(field, [])]
    counts = [rows.get(f"{name}.weight", 0) for name in names]
    matrices = _matrices(linear)
    assert isinstance(linear, FloatLinear | PackedLinear)
    pieces = _split(matrices, counts)
    if pieces is None:
        names, counts, pieces = [place], [linear.rows], [matrices]
    for name, own in zip(names, pieces, strict=True):
        yield f"{name}.weight", _digest(own)
    if linear.bias is not None:
        for name, stop, count in zip(names, accumulate(counts), counts, strict=True):
            yield f"{name}.bias", _digest([linear.bias[stop - count : stop]])
    if isinstance(linear.before, Norm):
        norm = _NORMS.get(field, f"{field}.before")
        yield f"{prefix}{dot}{norm}.weight", _digest([linear.before.weight])


def _split(matrices: Sequence[Rows], counts: Sequence[int]) -> list[list[Rows]] | None:
    """Matrices cut to so many rows for each tensor; None where they do not come out even."""
    pieces: list[list[Rows]] = []
    left, first = list(matrices), 0
    for count in counts:
        if not left or not count or first + count > _n_rows(left[0]):
            return None
        whole = left[0]
        if not isinstance(whole, Matrix):
            piece: Rows = whole[first : first + count]
        elif first % LANES:
            return None
        else:
            blocks = whole.data.reshape(whole.blocks, -1)[first // LANES : -(-(first + count) // LANES)]
            piece = Matrix(whole.kind, count, whole.columns, blocks, whole.block_nbytes)
        pieces.append([piece])
        first += count
        if first == _n_rows(whole):
            left, first = left[1:], 0
    return None if left or not pieces else pieces


def _n_rows(rows: Rows) -> int:
    return rows.rows if isinstance(rows, Matrix) else len(rows)


def _digest(pieces: Sequence[Rows]) -> str:
    kept_as = dict.fromkeys(NAMES[x.kind] if isinstance(x, Matrix) else "f32" for x in pieces)
    digest = hashlib.sha256()
    for x in pieces:
        about, data = ((x.rows, x.columns), x.data) if isinstance(x, Matrix) else (x.shape, x)
        contents = np.ascontiguousarray(data)
        digest.update(f"{about} {contents.dtype}".encode())
        digest.update(contents.reshape(-1).view(np.uint8).data)
    return f"{'+'.join(kept_as)} {digest.hexdigest()[:DIGITS]}"
