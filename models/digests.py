"""A digest of every tensor of a model as it is kept in memory, by Hugging Face's names: so a change can be named."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ..kernels.simd import LANES
from ..kernels.weights import NAMES, Matrix
from .config import ModelConfig
from .experts import Experts
from .linear import FloatLinear, Linear, Norm, PackedLinear
from .names import expected_tensors, expert_name, gate_up_names, layer_prefix, norm_names, qkv_names
from .transformer import Layer, Weights

DIGITS = 16  # hexadecimal, of SHA-256


@dataclass(frozen=True, slots=True)
class _Place:
    """A linear layer: its own name, those of the tensors whose rows it has in turn, and that of the norm in front."""

    name: str
    tensors: list[str]
    norm: str | None = None


Rows = Matrix | NDArray[np.float32]  # some of a layer's, packed or not


def digests(config: ModelConfig, weights: Weights) -> dict[str, str]:
    """The format and 16 hexadecimal digits of SHA-256 of each tensor: {"model.norm.weight": "f32 0123456789abcdef"}.

    All bytes count, those that fill up blocks included. Where tensors cannot be told apart in memory, or have no name in
    Hugging Face's terms, the layer stands for them: "model.layers.3.qkv.weight". A tied output head is the embedding, and
    not named again. TypeError for a layer that this does not know.
    """
    rows = {name: shape[0] for name, shape in expected_tensors(config).items()} | {"lm_head.weight": config.vocab_size}
    found = dict(_linear(_Place("embedding", ["model.embed_tokens"]), weights.embedding, rows))
    for i, layer in enumerate(weights.layers):
        for place, linear in _linears(config, layer_prefix(i), layer):
            found |= _linear(place, linear, rows)
        found |= _loose(config, layer_prefix(i), layer)
    head = dict(_linear(_Place("head", ["lm_head"], "model.norm"), weights.head, rows))
    if [id(x) for x in _matrices(weights.head)] == [id(x) for x in _matrices(weights.embedding)]:
        del head["lm_head.weight"]
    return found | head


def _linears(config: ModelConfig, prefix: str, layer: Layer) -> Iterator[tuple[_Place, Linear]]:
    """Each linear layer of a layer, with the names of its tensors."""
    norms = {place: prefix + name for place, name in norm_names(config).items()}

    def place(name: str, tensors: list[str], norm: str | None = None) -> _Place:
        return _Place(prefix + name, [prefix + tensor for tensor in tensors], norm)

    yield place("qkv", qkv_names(config), norms.get("attention_in")), layer.qkv
    yield place("o", ["self_attn.o_proj"]), layer.o
    if not isinstance(layer.mlp, Experts):
        yield place("gate_up", gate_up_names(config), norms.get("mlp_in")), layer.mlp.gate_up
        yield place("down", ["mlp.down_proj"]), layer.mlp.down
        return
    yield place("router", ["mlp.gate"], norms.get("mlp_in")), layer.mlp.router
    for i, expert in enumerate(layer.mlp.experts):
        names = [expert_name(i, matrix) for matrix in ("gate_proj", "up_proj")]
        yield place(f"experts.{i}.gate_up", names), expert.gate_up
        yield place(f"experts.{i}.down", [expert_name(i, "down_proj")]), expert.down


def _loose(config: ModelConfig, prefix: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """The digests of what belongs to no linear layer."""
    norms = norm_names(config)
    every = {
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        f"{norms.get('attention_out')}.weight": layer.attention_norm,
        f"{norms.get('mlp_out')}.weight": layer.mlp_norm,
    }
    for name, norm in every.items():
        if norm is not None:
            yield prefix + name, _digest([norm.weight])
    if layer.sink_logits is not None:
        yield f"{prefix}self_attn.sinks", _digest([layer.sink_logits])


def _matrices(linear: object) -> list[Rows]:
    """What holds the numbers of a layer's matrix, in the order of its rows."""
    if isinstance(linear, PackedLinear):
        return [*linear.parts]
    if isinstance(linear, FloatLinear):
        return [linear.weight]
    raise TypeError(f"a layer must be a FloatLinear or PackedLinear, found {type(linear).__name__}")


def _linear(place: _Place, linear: object, rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The digests of one layer: matrices, biases, and the norm in front. rows: of every tensor by its name."""
    names = place.tensors
    counts = [rows.get(f"{name}.weight", 0) for name in names]
    matrices = _matrices(linear)
    assert isinstance(linear, FloatLinear | PackedLinear)
    pieces = _split(matrices, counts)
    if pieces is None:
        names, counts, pieces = [place.name], [linear.rows], [matrices]
    for name, own in zip(names, pieces, strict=True):
        yield f"{name}.weight", _digest(own)
    if linear.bias is not None:
        for name, stop, count in zip(names, accumulate(counts), counts, strict=True):
            yield f"{name}.bias", _digest([linear.bias[stop - count : stop]])
    if isinstance(linear.before, Norm):
        yield f"{place.norm or place.name + '.before'}.weight", _digest([linear.before.weight])


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
