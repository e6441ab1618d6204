"""Experts of Hugging Face folders by the names of names.py: Mixtral's are called otherwise, gpt-oss's are stacked.

gpt-oss's are numbers, or bytes of MXFP4 and exponents, as it is published.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.weights import Stored
from . import mxfp4
from .check import shown
from .config import ModelConfig
from .errors import ModelError
from .safetensors import SafetensorsSource

Float32 = NDArray[np.float32]
Change = Callable[[NDArray[Any]], NDArray[Any]]


class Found(NamedTuple):
    """A tensor, the expert's place in it, what becomes of that, and of MXFP4 the tensor of the exponents."""

    tensor: str
    place: int | None
    change: Change
    exponents: str = ""


MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = re.compile(r"(model\.layers\.(0|[1-9][0-9]{0,3})\.)(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d{1,4})\.(w[123])\.weight")
_GPT_OSS: Mapping[str, tuple[tuple[str, Change], ...]] = {
    # inputs are rows, and the columns of gate and up alternate
    "mlp.experts.gate_up_proj": (
        ("gate_proj.weight", lambda x: x[:, 0::2].T), ("up_proj.weight", lambda x: x[:, 1::2].T),
    ),
    "mlp.experts.gate_up_proj_bias": (("gate_proj.bias", lambda x: x[0::2]), ("up_proj.bias", lambda x: x[1::2])),
    "mlp.experts.down_proj": (("down_proj.weight", lambda x: x.T),),
    "mlp.experts.down_proj_bias": (("down_proj.bias", lambda x: x),),
}  # fmt: skip
# Of MXFP4 outputs are rows: bytes of two columns each, blocks of 32 columns, which have an exponent each
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
_MXFP4: Mapping[str, tuple[tuple[str, Change], ...]] = {
    "mlp.experts.gate_up_proj": (("gate_proj.weight", lambda x: x[0::2]), ("up_proj.weight", lambda x: x[1::2])),
    "mlp.experts.down_proj": (("down_proj.weight", lambda x: x),),
}


class ExpertSource:
    """The tensors of a folder, experts one by one. Attributes and methods are those of ``SafetensorsSource``.

    Raises ModelError where two tensors of the folder are one, and for MXFP4 whose shapes or types are not that format's.
    """

    def __init__(self, source: SafetensorsSource, n_layers: int, n_experts: int) -> None:
        self._source = source
        self._found: dict[str, Found] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in source.shapes.items():
            for own, found in _renamed(name, source, n_layers, n_experts).items():
                if own in self._found:
                    raise ModelError(
                        f"{source.where}: {shown(self._found[own].tensor)} and {shown(name)} are both {own}"
                    )
                self._found[own] = found
                one = shape if found.place is None else shape[1:]
                one = (one[0], one[1] * mxfp4.GROUP) if found.exponents else one
                shapes[own] = found.change(np.broadcast_to(np.float32(0), one)).shape
        self.shapes = MappingProxyType(shapes)
        kinds = {own: "MXFP4" if x.exponents else source.stored_types[x.tensor] for own, x in self._found.items()}
        self.stored_types = MappingProxyType(kinds)
        self.nbytes = source.nbytes

    def read(self, name: str) -> Float32:
        """One tensor as float32, C order."""
        found = self._found[name]
        if found.exponents:
            return mxfp4.as_numbers(*self._codes(found))
        place = found.place
        values = self._source.read(found.tensor) if place is None else self._source.part(found.tensor, place)
        return np.ascontiguousarray(found.change(values))

    def stored(self, name: str) -> Stored:
        """One matrix as the file holds it where it is a tensor of its own, or MXFP4 whose scales fit; else as float32."""
        found = self._found[name]
        if found.exponents:
            coded = mxfp4.as_coded_rows(*self._codes(found))
            return self.read(name) if coded is None else coded
        return self._source.stored(found.tensor) if found.place is None else self.read(name)

    def _codes(self, found: Found) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Of MXFP4: codes (rows, groups, 32), and exponents (rows, groups)."""
        assert found.place is not None
        words, exponents = (self._source.packed(name, found.place) for name in (found.tensor, found.exponents))
        words = found.change(words)
        codes = np.stack(mxfp4.halves(words), axis=-1)  # a byte has two neighbours
        return codes.reshape(*words.shape[:2], mxfp4.GROUP), found.change(exponents)

    def forget(self, name: str) -> None:
        """Give back the memory that reading a tensor took up."""
        self._source.forget(self._found[name].tensor)


def _renamed(name: str, source: SafetensorsSource, n_layers: int, n_experts: int) -> dict[str, Found]:
    """What a tensor of the file is under our names; one of a layer that there is not keeps its own."""
    shape = source.shapes[name]
    match = _LAYER.fullmatch(name)
    prefix, rest = (match[1], match[3]) if match and int(match[2]) < n_layers else ("", name)
    if expert := _EXPERT.fullmatch(rest):
        return {f"{prefix}mlp.experts.{expert[1]}.{MIXTRAL[expert[2]]}.weight": Found(name, None, _same)}
    if rest in _GPT_OSS and len(shape) == (2 if rest.endswith("bias") else 3) and shape[0] == n_experts:
        return _each(prefix, _GPT_OSS[rest], n_experts, name)
    if rest.removesuffix(_BLOCKS) in _MXFP4 and rest.endswith(_BLOCKS):
        exponents = name.removesuffix(_BLOCKS) + _EXPONENTS
        _check_mxfp4(source, name, exponents, n_experts)
        return _each(prefix, _MXFP4[rest.removesuffix(_BLOCKS)], n_experts, name, exponents)
    if rest.removesuffix(_EXPONENTS) in _MXFP4 and name.removesuffix(_EXPONENTS) + _BLOCKS in source.shapes:
        return {}  # belongs to those
    for before in ("block_sparse_moe.gate.", "mlp.router."):
        if rest.startswith(before):
            rest = "mlp.gate." + rest.removeprefix(before)
    return {prefix + rest: Found(name, None, _same)}


def _each(
    prefix: str, own: tuple[tuple[str, Change], ...], n_experts: int, name: str, exponents: str = ""
) -> dict[str, Found]:
    """The matrices, or biases, of all experts that one tensor holds."""
    return {
        f"{prefix}mlp.experts.{i}.{matrix}": Found(name, i, change, exponents)
        for i in range(n_experts)
        for matrix, change in own
    }


def _check_mxfp4(source: SafetensorsSource, blocks: str, exponents: str, n_experts: int) -> None:
    """ModelError where two tensors are not the bytes and the exponents of one stack of matrices."""
    shape = source.shapes[blocks]
    if exponents not in source.shapes:
        raise ModelError(f"{source.where}: {shown(blocks)} without {shown(exponents)}")
    if len(shape) != 4 or shape[0] != n_experts or shape[3] != mxfp4.GROUP // 2:
        raise ModelError(
            f"{source.where}: shape of {shown(blocks)} is {shape}; expected {n_experts} experts, rows, blocks of 32 "
            f"columns, {mxfp4.GROUP // 2} bytes"
        )
    if source.shapes[exponents] != shape[:3]:
        raise ModelError(
            f"{source.where}: shape of {shown(exponents)} is {source.shapes[exponents]}; expected {shape[:3]}, one for "
            f"each block of {shown(blocks)}"
        )
    for name in (blocks, exponents):
        if source.stored_types[name] != "U8":
            raise ModelError(f"{source.where}: tensor {shown(name)} is {source.stored_types[name]}; of mxfp4 it is U8")


def _same(x: NDArray[Any]) -> NDArray[Any]:
    return x


def with_experts(config: ModelConfig, source: SafetensorsSource) -> SafetensorsSource | ExpertSource:
    """The source of a folder, as a model of this config needs it."""
    renames = config.architecture in ("mixtral", "gpt_oss")
    return ExpertSource(source, config.num_hidden_layers, config.num_experts) if renames else source
