"""Experts of Hugging Face folders by the names of names.py: Mixtral's are called otherwise, gpt-oss's are stacked."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .check import shown
from .config import ModelConfig
from .errors import ModelError
from .safetensors import SafetensorsSource

Float32 = NDArray[np.float32]
Found = tuple[str, int | None, Callable[[Float32], Float32]]  # a tensor, the expert's place in it, what becomes of that

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = re.compile(r"(model\.layers\.(0|[1-9][0-9]{0,3})\.)(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d{1,4})\.(w[123])\.weight")
_GPT_OSS: Mapping[str, tuple[tuple[str, Callable[[Float32], Float32]], ...]] = {
    # inputs are rows, and the columns of gate and up alternate
    "mlp.experts.gate_up_proj": (
        ("gate_proj.weight", lambda x: x[:, 0::2].T), ("up_proj.weight", lambda x: x[:, 1::2].T),
    ),
    "mlp.experts.gate_up_proj_bias": (("gate_proj.bias", lambda x: x[0::2]), ("up_proj.bias", lambda x: x[1::2])),
    "mlp.experts.down_proj": (("down_proj.weight", lambda x: x.T),),
    "mlp.experts.down_proj_bias": (("down_proj.bias", lambda x: x),),
}  # fmt: skip


class ExpertSource:
    """The tensors of a folder, experts one by one. Attributes and methods are those of ``SafetensorsSource``.

    Raises ModelError where two tensors of the folder are one.
    """

    def __init__(self, source: SafetensorsSource, n_layers: int, n_experts: int) -> None:
        self._source = source
        self._found: dict[str, Found] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in source.shapes.items():
            for own, found in _renamed(name, shape, n_layers, n_experts).items():
                if own in self._found:
                    raise ModelError(f"{source.where}: {shown(self._found[own][0])} and {shown(name)} are both {own}")
                self._found[own] = found
                example = np.broadcast_to(np.float32(0), shape if found[1] is None else shape[1:])
                shapes[own] = found[2](example).shape
        self.shapes = MappingProxyType(shapes)
        self.stored_types = MappingProxyType({own: source.stored_types[x[0]] for own, x in self._found.items()})
        self.nbytes = source.nbytes

    def read(self, name: str) -> Float32:
        """One tensor as float32, C order."""
        tensor, place, change = self._found[name]
        values = self._source.read(tensor) if place is None else self._source.part(tensor, place)
        return np.ascontiguousarray(change(values))

    def stored(self, name: str) -> NDArray[np.generic]:
        """One matrix as the file holds it where it is a tensor of its own, else as float32."""
        tensor, place, _ = self._found[name]
        return self._source.stored(tensor) if place is None else self.read(name)

    def forget(self, name: str) -> None:
        """Give back the memory that reading a tensor took up."""
        self._source.forget(self._found[name][0])


def _renamed(name: str, shape: tuple[int, ...], n_layers: int, n_experts: int) -> dict[str, Found]:
    """What a tensor of the file is under our names; one of a layer that there is not keeps its own."""
    match = _LAYER.fullmatch(name)
    prefix, rest = (match[1], match[3]) if match and int(match[2]) < n_layers else ("", name)
    if expert := _EXPERT.fullmatch(rest):
        return {f"{prefix}mlp.experts.{expert[1]}.{MIXTRAL[expert[2]]}.weight": (name, None, _same)}
    if rest in _GPT_OSS and len(shape) == (2 if rest.endswith("bias") else 3) and shape[0] == n_experts:
        return {
            f"{prefix}mlp.experts.{i}.{own}": (name, i, change)
            for i in range(n_experts)
            for own, change in _GPT_OSS[rest]
        }
    for before in ("block_sparse_moe.gate.", "mlp.router."):
        if rest.startswith(before):
            rest = "mlp.gate." + rest.removeprefix(before)
    return {prefix + rest: (name, None, _same)}


def _same(x: Float32) -> Float32:
    return x


def with_experts(config: ModelConfig, source: SafetensorsSource) -> SafetensorsSource | ExpertSource:
    """The source of a folder, as a model of this config needs it."""
    renames = config.architecture in ("mixtral", "gpt_oss")
    return ExpertSource(source, config.num_hidden_layers, config.num_experts) if renames else source
